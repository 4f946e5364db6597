"""The lifespan of a worker: opened before its first job, closed after its last one.

The tests run on both backends.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import pytest

from asyncmq_nats import Queue, current_job
from asyncmq_nats.backends.base import Backend
from asyncmq_nats.runtime.registry import TaskRegistry
from tests.running import PATIENCE, outcome, running


def queue_of(backend: Backend, lifespan: Any, **tasks: Any) -> Queue:
    registry = TaskRegistry()
    for name, function in tasks.items():
        registry.register(function, queue="work", name=name)
    return Queue("work", backend, registry=registry, lifespan=lifespan)


async def test_jobs_have_what_it_yields_and_hooks_are_within_it(backend: Backend) -> None:
    calls: list[Any] = []

    @asynccontextmanager
    async def lifespan(queue: str, worker_id: str) -> AsyncIterator[dict[str, Any]]:
        calls.append(f"open {queue}")
        yield {"worker": worker_id}
        await anyio.lowlevel.checkpoint()
        calls.append("close")

    async def here() -> str:
        calls.append("job")
        return str(current_job().state["worker"])

    def in_thread() -> str:
        return str(current_job().state["worker"])

    queue = queue_of(backend, lifespan, here=here, in_thread=in_thread)
    queue.on_startup(lambda: calls.append("startup"))
    queue.on_shutdown(lambda: calls.append("shutdown"))
    async with running(queue) as worker:
        for name in ("here", "in_thread"):
            assert await queue.wait_for(await queue.add(name), PATIENCE) == worker.id
    assert calls == ["open work", "startup", "job", "shutdown", "close"]


async def test_each_worker_has_its_own(backend: Backend) -> None:
    opened: list[str] = []

    @asynccontextmanager
    async def lifespan(worker_id: str) -> AsyncIterator[str]:
        opened.append(worker_id)
        yield worker_id
        opened.remove(worker_id)

    queue = queue_of(backend, lifespan)
    async with running(queue) as one, running(queue) as other:
        assert opened == [one.id, other.id]
    assert opened == []


async def test_a_cancelled_worker_closes_it_in_order(backend: Backend) -> None:
    closed: list[str] = []

    @asynccontextmanager
    async def lifespan() -> AsyncIterator[Any]:
        async with anyio.create_task_group() as group:
            group.start_soon(anyio.sleep_forever)
            yield group
            await anyio.sleep(0.01)  # not cut short
            closed.append("yes")
            group.cancel_scope.cancel()

    queue = queue_of(backend, lifespan)
    async with anyio.create_task_group() as group:
        await group.start(queue.run)
        group.cancel_scope.cancel()
    assert closed == ["yes"]


async def test_an_error_at_its_start_ends_the_worker_before_a_job(backend: Backend) -> None:
    @asynccontextmanager
    async def lifespan() -> AsyncIterator[None]:
        raise RuntimeError("no database")
        yield

    queue = queue_of(backend, lifespan, work=lambda: None)
    job_id = await queue.add("work")
    with anyio.fail_after(PATIENCE), pytest.raises(RuntimeError, match="no database"):
        await queue.run()
    assert await queue.get_job_state(job_id) == "waiting"


async def test_it_is_closed_when_a_startup_hook_fails(backend: Backend) -> None:
    closed: list[str] = []

    @asynccontextmanager
    async def lifespan() -> AsyncIterator[None]:
        yield
        closed.append("yes")

    queue = queue_of(backend, lifespan)

    @queue.on_startup
    def fail() -> None:
        raise RuntimeError("no cache")

    with anyio.fail_after(PATIENCE), pytest.raises(RuntimeError, match="no cache"):
        await queue.run()
    assert closed == ["yes"]


async def test_an_error_at_its_end_is_logged(
    backend: Backend, caplog: pytest.LogCaptureFixture
) -> None:
    @asynccontextmanager
    async def lifespan() -> AsyncIterator[None]:
        yield
        raise RuntimeError("no goodbye")

    queue = queue_of(backend, lifespan, work=lambda: None)
    job_id = await queue.add("work")
    async with running(queue):
        await outcome(queue, job_id)
    assert "no goodbye" in caplog.text


async def test_a_part_of_it_that_fails_ends_the_worker(backend: Backend) -> None:
    failing = anyio.Event()

    @asynccontextmanager
    async def lifespan() -> AsyncIterator[None]:
        async def fail() -> None:
            await failing.wait()
            raise RuntimeError("lost the database")

        async with anyio.create_task_group() as group:
            group.start_soon(fail)
            yield
            group.cancel_scope.cancel()

    queue = queue_of(backend, lifespan)
    queue.on_startup(failing.set)
    with anyio.fail_after(PATIENCE), pytest.raises(RuntimeError, match="lost the database"):
        await queue.run()
