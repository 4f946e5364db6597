"""Startup and shutdown hooks, on both backends."""

import functools
from typing import Any

import anyio
import pytest

from asyncmq_nats.backends.base import Backend
from asyncmq_nats.middleware import Hooks
from asyncmq_nats.workers import Worker
from tests.running import PATIENCE, make_queue, running, wait_until_done


@pytest.fixture
def calls() -> list[Any]:
    return []


async def test_hooks_are_called_around_the_jobs(backend: Backend, calls: list[Any]) -> None:
    async def work() -> None:
        calls.append("job")

    queue = make_queue(backend, work=work)

    @queue.on_startup
    async def connect() -> None:
        calls.append("async startup")

    @queue.on_startup
    def prepare() -> None:
        calls.append("sync startup")

    @queue.on_shutdown
    def clean_up() -> None:
        calls.append("sync shutdown")

    @queue.on_shutdown
    async def disconnect() -> None:
        calls.append("async shutdown")

    await queue.add("work")
    async with running(queue):
        await wait_until_done(queue)
    assert calls == ["async startup", "sync startup", "job", "async shutdown", "sync shutdown"]


async def test_hooks_are_given_what_they_take(backend: Backend, calls: list[Any]) -> None:
    queue = make_queue(backend)
    queue.on_startup(lambda worker_id: calls.append(worker_id))
    queue.on_startup(lambda queue, backend: calls.append((queue, backend)))
    queue.on_startup(lambda **given: calls.append(set(given)))
    async with running(queue) as worker:
        assert calls == [worker.id, ("work", backend), {"worker_id", "queue", "backend"}]


async def test_a_worker_takes_hooks_too(backend: Backend, calls: list[Any]) -> None:
    worker = Worker(make_queue(backend))
    worker.on_startup(lambda: calls.append("startup"))
    worker.on_shutdown(lambda: calls.append("shutdown"))
    async with anyio.create_task_group() as group:
        await group.start(worker.run)
        worker.stop()
    assert calls == ["startup", "shutdown"]


async def test_a_job_that_runs_ends_before_the_shutdown_hooks(
    backend: Backend, calls: list[Any]
) -> None:
    started, opened = anyio.Event(), anyio.Event()

    async def work() -> None:
        started.set()
        await opened.wait()
        calls.append("job")

    queue = make_queue(backend, work=work)
    queue.on_shutdown(lambda: calls.append("shutdown"))
    await queue.add("work")
    async with running(queue) as worker:
        with anyio.fail_after(PATIENCE):
            await started.wait()
        worker.stop()
        opened.set()
    assert calls == ["job", "shutdown"]


async def test_a_cancelled_worker_calls_its_shutdown_hooks(
    backend: Backend, calls: list[Any]
) -> None:
    async def disconnect() -> None:
        await anyio.sleep(0.01)
        calls.append("shutdown")

    queue = make_queue(backend)
    queue.on_shutdown(disconnect)
    async with anyio.create_task_group() as group:
        await group.start(queue.run)
        group.cancel_scope.cancel()
    assert calls == ["shutdown"]


async def test_an_error_at_the_start_ends_the_worker_before_a_job(
    backend: Backend, calls: list[Any]
) -> None:
    queue = make_queue(backend, work=lambda: calls.append("job"))

    @queue.on_startup
    def fail() -> None:
        raise RuntimeError("no database")

    job_id = await queue.add("work")
    with anyio.fail_after(PATIENCE), pytest.raises(RuntimeError, match="no database"):
        await queue.run()
    assert calls == []
    assert await queue.get_job_state(job_id) == "waiting"
    assert await queue.list_workers() == []


async def test_an_error_at_the_end_is_logged_and_the_other_hooks_are_called(
    backend: Backend, calls: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    queue = make_queue(backend)

    @queue.on_shutdown
    def clean_up() -> None:
        calls.append("shutdown")

    @queue.on_shutdown
    async def fail() -> None:
        raise RuntimeError("no database")

    async with running(queue):
        pass
    assert calls == ["shutdown"]
    assert "no database" in caplog.text


async def test_each_worker_calls_the_hooks(backend: Backend, calls: list[Any]) -> None:
    queue = make_queue(backend)
    queue.on_startup(lambda worker_id: calls.append(worker_id))
    async with running(queue) as one, running(queue) as other:
        assert calls == [one.id, other.id]


async def test_hooks_run_without_any() -> None:
    hooks = Hooks()
    await hooks.start("worker")
    await hooks.stop("worker")


async def test_a_hook_may_be_an_object_or_decorated(backend: Backend, calls: list[Any]) -> None:
    class Opener:
        async def __call__(self, worker_id: str) -> None:
            await anyio.lowlevel.checkpoint()
            calls.append(("object", bool(worker_id)))

    async def close(queue: str) -> None:
        await anyio.lowlevel.checkpoint()
        calls.append(("wrapped", queue))

    @functools.wraps(close)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return close(*args, **kwargs)

    queue = make_queue(backend)
    queue.on_startup(Opener())
    queue.on_startup(wrapper)
    queue.on_startup(functools.partial(lambda kind, queue: calls.append((kind, queue)), "partial"))
    async with anyio.create_task_group() as group:
        await group.start(queue.run)
        group.cancel_scope.cancel()
    assert calls == [("object", True), ("wrapped", "work"), ("partial", "work")]
