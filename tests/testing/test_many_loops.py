"""Any number of event loops and threads use one virtual backend.

A test client's, `asyncio.run`'s.
"""

import asyncio
import threading
import warnings
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import anyio
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from asyncmq_nats import Queue, task
from asyncmq_nats.runtime.registry import TaskRegistry
from asyncmq_nats.testing import (
    VirtualBackend,
    VirtualClock,
    assert_enqueued,
    enqueued,
    refute_enqueued,
    virtual_backend,
    worker,
)

with warnings.catch_warnings():
    # Starlette 1.10 prefers httpx2, and takes httpx too.
    warnings.simplefilter("ignore")
    from starlette.testclient import TestClient

registry = TaskRegistry()
sent: list[str] = []


@task(queue="mail", name="welcome", registry=registry)
async def welcome(to: str) -> None:
    sent.append(to)
    if not to.startswith("re:"):
        await welcome.enqueue(f"re:{to}", delay=3600)


async def sign_up(request: Request) -> Response:
    return JSONResponse({"job": await welcome.enqueue(request.path_params["name"])})


async def result(request: Request) -> Response:
    queue = Queue("mail", registry=registry)
    return JSONResponse(await queue.get_job_state(request.path_params["id"]))


@asynccontextmanager
async def with_worker(_: Any) -> AsyncIterator[None]:
    async with worker(Queue("mail", registry=registry)):
        yield


def make_app(lifespan: Any = None) -> Starlette:
    routes = [Route("/sign-up/{name}", sign_up, methods=["POST"]), Route("/jobs/{id}", result)]
    return Starlette(routes=routes, lifespan=lifespan)


@pytest.fixture(autouse=True)
def backend(clock: VirtualClock) -> Iterator[VirtualBackend]:
    sent.clear()
    with virtual_backend(clock) as chosen:
        yield chosen


def test_a_sync_test_client_beside_asyncio_run(clock: VirtualClock) -> None:
    client = TestClient(make_app())
    job_id = client.post("/sign-up/ada").json()["job"]
    assert assert_enqueued(welcome, args=["ada"]).id == job_id
    asyncio.run(clock.run_until_idle())
    assert sent == ["ada"]
    assert client.get(f"/jobs/{job_id}").json() == "completed"
    assert_enqueued(welcome, args=["re:ada"], delay="1h")
    asyncio.run(clock.advance("1h"))
    assert sent == ["ada", "re:ada"]


def test_a_test_client_whose_event_loop_goes_on_running(clock: VirtualClock) -> None:
    with TestClient(make_app()) as client:
        for name in "abc":
            client.post(f"/sign-up/{name}")
            asyncio.run(clock.run_until_idle())
        asyncio.run(clock.advance("1h"))
        client.post("/sign-up/d")
    asyncio.run(clock.run_until_idle())
    assert sent == ["a", "b", "c", "re:a", "re:b", "re:c", "d"]


def test_a_worker_in_the_lifespan_of_the_application(clock: VirtualClock) -> None:
    with TestClient(make_app(with_worker)) as client:
        client.post("/sign-up/ada")
        asyncio.run(clock.run_until_idle())
        assert sent == ["ada"]
        asyncio.run(clock.advance("1h"))
        assert sent == ["ada", "re:ada"]
        assert [job.state for job in enqueued(welcome)] == ["completed", "completed"]


def test_inline_a_job_has_run_when_the_response_is_there(
    backend: VirtualBackend, clock: VirtualClock
) -> None:
    backend.inline = True
    with TestClient(make_app()) as client:
        job_id = client.post("/sign-up/ada").json()["job"]
        assert sent == ["ada"]
        assert client.get(f"/jobs/{job_id}").json() == "completed"
    asyncio.run(clock.advance("1h"))
    assert sent == ["ada", "re:ada"]


@pytest.mark.parametrize("how", ["add", "bulk", "job_id", "flow"])
async def test_inline_every_way_to_add_runs_at_once(backend: VirtualBackend, how: str) -> None:
    backend.inline = True
    queue = Queue("mail", registry=registry)
    if how == "add":
        await queue.add("welcome", ["re:a"])
    elif how == "bulk":
        await queue.add_bulk([{"task_id": "welcome", "args": ["re:a"]}])
    elif how == "job_id":
        await queue.add("welcome", ["re:a"], job_id="one")
    else:
        parent = await queue.add("welcome", ["re:parent"])
        sent.clear()
        await queue.add("welcome", ["re:a"], depends_on=[parent])
    assert sent == ["re:a"]


async def test_inline_a_failure_is_stored_and_not_raised(backend: VirtualBackend) -> None:
    @task(queue="mail", name="fail", registry=registry)
    async def fail() -> None:
        raise ValueError("no")

    backend.inline = True
    job_id = await fail.enqueue()
    job = await Queue("mail", registry=registry).get_job(job_id)
    assert job is not None
    assert (job["status"], job["last_error"]) == ("failed", "ValueError: no")


async def test_inline_many_at_once(backend: VirtualBackend) -> None:
    backend.inline = True
    async with anyio.create_task_group() as group:
        for number in range(20):
            group.start_soon(welcome.enqueue, f"re:{number}")
    assert sorted(sent) == sorted(f"re:{number}" for number in range(20))


def test_threads_add_while_the_time_is_moved(clock: VirtualClock) -> None:
    async def add(thread: int) -> None:
        for number in range(25):
            await welcome.enqueue(f"re:{thread}-{number}", delay=number % 3)

    threads = [
        threading.Thread(target=lambda number=number: asyncio.run(add(number)))
        for number in range(4)
    ]
    for each in threads:
        each.start()
    while any(each.is_alive() for each in threads):
        asyncio.run(clock.advance(1))
    for each in threads:
        each.join()
    asyncio.run(clock.advance(3))
    assert sorted(sent) == sorted(f"re:{a}-{b}" for a in range(4) for b in range(25))


def test_uvloop_runs_it_too(clock: VirtualClock) -> None:
    pytest.importorskip("uvloop")

    async def main() -> None:
        await welcome.enqueue("ada")
        await clock.advance("59m")
        refute_enqueued(welcome, args=["re:ada"], within="0.5s")
        await clock.advance("1m")

    anyio.run(main, backend_options={"use_uvloop": True})
    assert sent == ["ada", "re:ada"]


def test_a_worker_is_an_async_context_manager() -> None:
    assert isinstance(worker("mail"), AbstractAsyncContextManager)
