"""FastAPI, Starlette, Litestar: a queue and a worker in the web process, on a real server."""

import importlib.util
from typing import Any

import anyio
import pytest
from anyio import to_thread

from asyncmq_nats import InMemoryBackend, NATSBackend, Queue, Worker
from asyncmq_nats.backends.nats.embedded.server import EmbeddedServer
from asyncmq_nats.contrib import web
from asyncmq_nats.exceptions import ConnectionFailed, InvalidArgument
from asyncmq_nats.settings import Settings
from tests.frameworks.sites import EXAMPLES, serving
from tests.receiver import PATIENCE, holds, until
from tests.running import has, make_queue


@pytest.mark.slow
@pytest.mark.parametrize("framework", ["fastapi", "starlette", "litestar"])
async def test_a_request_adds_a_job_and_the_worker_beside_it_runs_it(
    framework: str, server: EmbeddedServer
) -> None:
    if importlib.util.find_spec(framework) is None or importlib.util.find_spec("uvicorn") is None:
        pytest.skip(f"no {framework} and uvicorn")
    with serving(f"{framework}_app:app", EXAMPLES, ASYNCMQ_NATS_SERVERS=server.url) as site:

        async def ask(path: str, body: Any = None) -> tuple[int, Any]:
            return await to_thread.run_sync(site.ask, path, body)

        status, answer = await ask("/orders", {"customer": "Ada", "total": 7.5})
        assert status == 202

        async def job() -> Any:
            return (await ask(f"/jobs/{answer['job']}"))[1]

        ended = await until(job, lambda job: job["state"] == "completed")
        assert ended["result"] == "Ada pays 7.50"
        assert (await ask("/jobs/none"))[0] == 404


async def test_the_connection_is_that_of_the_lifespan(server: EmbeddedServer) -> None:
    queue = Queue("web", NATSBackend(server.url))
    async with web.lifespan(queue)(None):
        await queue.backend.ping()
        await has(queue, 0)


async def test_without_a_server_the_application_does_not_start() -> None:
    settings = Settings(servers="nats://127.0.0.1:1", connect_timeout=0.2)  # type: ignore[arg-type]
    queue = Queue("web", NATSBackend(settings=settings))
    for worker in (None, Worker(queue)):
        with pytest.raises(ConnectionFailed):
            async with web.lifespan(queue, worker=worker)(None):
                raise AssertionError("it must not start")


async def test_running_jobs_finish_when_the_application_ends(
    caplog: pytest.LogCaptureFixture,
) -> None:
    begun, ended = anyio.Event(), anyio.Event()

    async def slow() -> None:
        begun.set()
        await anyio.sleep(0.05)
        ended.set()

    queue = make_queue(InMemoryBackend(), slow=slow)
    async with web.lifespan(worker=Worker(queue))(None):
        await queue.add("slow")
        with anyio.fail_after(PATIENCE):
            await begun.wait()
    assert ended.is_set()
    assert "again" not in caplog.text


async def test_a_worker_that_fails_starts_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(web, "RESTART_DELAY", 0.001)
    done: list[int] = []
    runs = 0

    class Fragile(Worker):
        async def run(self, **options: Any) -> None:
            nonlocal runs
            runs += 1
            if runs == 1:
                options["task_status"].started()
                raise RuntimeError("as it should")
            await super().run(**options)

    queue = make_queue(InMemoryBackend(), note=done.append)
    async with web.lifespan(worker=Fragile(queue))(None):
        await queue.add("note", [1])
        await holds(lambda: done == [1])
    assert runs == 2
    assert "has failed; it starts again" in caplog.text


async def test_an_error_of_the_application_is_told_as_it_is() -> None:
    queue = make_queue(InMemoryBackend())
    with pytest.raises(ZeroDivisionError):
        async with web.lifespan(worker=Worker(queue))(None):
            raise ZeroDivisionError


def test_a_lifespan_of_nothing_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="needs a queue or a worker"):
        web.lifespan()
