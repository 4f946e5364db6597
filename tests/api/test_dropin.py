"""Calls of programs written for AsyncMQ, beside the methods of `Queue`, on both backends."""

from typing import Any

import anyio
import pytest

from asyncmq_nats.backends.base import Backend
from asyncmq_nats.exceptions import InvalidArgument, PayloadTooLarge
from asyncmq_nats.queues import Queue
from asyncmq_nats.runtime import registry
from asyncmq_nats.tasks import task
from asyncmq_nats.workers import Worker, list_workers, run_worker
from tests.running import PATIENCE, has, make_queue, running

KEYWORDS = dict(Queue.__init__.__kwdefaults__ or {})


async def echo(value: Any = None) -> Any:
    return value


async def test_run_worker_repeats_what_it_is_given(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticked = anyio.Event()

    async def tick(value: int) -> None:
        assert value == 7
        ticked.set()

    registered = {"task_id": "tick", "every": 0.2, "args": [7], "kwargs": {}}
    queue = make_queue(backend, tick=tick)
    monkeypatch.setattr(
        Queue.__init__,
        "__kwdefaults__",
        KEYWORDS | {"registry": queue._registry},
    )
    with anyio.fail_after(PATIENCE):
        async with anyio.create_task_group() as group:
            group.start_soon(run_worker, "work", backend, 1, None, 1.0, [registered])
            await ticked.wait()
            (stored,) = await queue.list_repeatables()
            group.cancel_scope.cancel()
    assert stored.job_def["task_id"] == "tick"


async def test_a_repeatable_with_an_unknown_key_is_refused(backend: Backend) -> None:
    with pytest.raises(InvalidArgument, match="evry"):
        await run_worker("work", backend, repeatables=[{"task_id": "tick", "evry": 5}])


@pytest.fixture
def two_jobs(backend: Backend) -> Any:
    """A queue whose task runs until `release` is set, one at a time."""
    started, release = anyio.Event(), anyio.Event()

    async def hold() -> str:
        started.set()
        await release.wait()
        return "done"

    return make_queue(backend, concurrency=1, hold=hold), started, release


async def test_the_drain_event_ends_a_worker_after_what_runs(
    backend: Backend, two_jobs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue, started, release = two_jobs
    monkeypatch.setattr(
        Queue.__init__,
        "__kwdefaults__",
        KEYWORDS | {"registry": queue._registry},
    )
    first, second = await queue.add("hold"), await queue.add("hold")
    drain = anyio.Event()
    with anyio.fail_after(PATIENCE):
        async with anyio.create_task_group() as group:
            group.start_soon(run_worker, "work", backend, 1, None, 1.0, None, None, drain)
            await started.wait()
            drain.set()
            await anyio.wait_all_tasks_blocked()
            assert await queue.get_job_state(second) in ("waiting", "active")
            release.set()
    assert await queue.get_job_state(first) == "completed"
    assert await queue.get_job_state(second) != "completed"
    assert await list_workers(backend) == []


async def test_drain_waits_for_what_runs(two_jobs: Any) -> None:
    queue, started, release = two_jobs
    first, second = await queue.add("hold"), await queue.add("hold")
    worker, drained = Worker(queue), anyio.Event()

    async def drain() -> None:
        await worker.drain()
        drained.set()

    with anyio.fail_after(PATIENCE):
        async with anyio.create_task_group() as group:
            await group.start(worker.run)
            await started.wait()
            group.start_soon(drain)
            await anyio.wait_all_tasks_blocked()
            assert not drained.is_set()
            release.set()
    assert drained.is_set()
    assert await queue.get_job_state(first) == "completed"
    assert await queue.get_job_state(second) != "completed"


async def test_draining_a_worker_that_never_ran_returns(backend: Backend) -> None:
    with anyio.fail_after(PATIENCE):
        await Worker(make_queue(backend, echo=echo)).drain()


async def test_a_job_over_the_limit_of_the_settings_is_refused(backend: Backend) -> None:
    queue, large = make_queue(backend, echo=echo), ["x" * 512]
    before, backend.settings.max_job_payload_bytes = backend.settings.max_job_payload_bytes, 400
    try:
        for add in (
            lambda: queue.add("echo", large),
            lambda: queue.add_bulk([{"task_id": "echo", "args": large}]),
            lambda: queue.enqueue({"task": "echo", "args": large}),
            lambda: queue.add("echo", large, delay=60),
            lambda: queue.upsert_repeatable("echo", every=60, args=large),
        ):
            with pytest.raises(PayloadTooLarge, match="max_job_payload_bytes"):
                await add()
        async with running(queue):
            fits = await queue.add("echo", ["x" * 100])
            assert await queue.wait_for(fits, timeout=PATIENCE) == "x" * 100
    finally:
        backend.settings.max_job_payload_bytes = before
    await has(queue, 0)
    assert await queue.list_repeatables() == []


async def test_add_leaves_out_what_the_task_declares(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = registry.TaskRegistry()
    declared = task("work", retries=4, ttl=60, registry=tasks)(echo)
    queue = Queue("work", backend, registry=tasks)
    plain = await queue.get_job(await queue.add(declared.task_id))
    assert plain is not None
    assert (plain["max_retries"], plain["ttl"]) == (0, None)
    job_id = await declared.enqueue(backend=backend)
    by_task = await queue.get_job(job_id)
    assert by_task is not None
    assert (by_task["max_retries"], by_task["ttl"]) == (4, 60)
