"""Shared parts of the tests of queues and workers.

A worker that runs while a block does, and patience with a bound.
"""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from asyncmq_nats.backends.base import Backend, Write
from asyncmq_nats.backends.inmemory import InMemoryBackend
from asyncmq_nats.exceptions import AssetMissing
from asyncmq_nats.queues import Queue
from asyncmq_nats.runtime.registry import TaskRegistry
from asyncmq_nats.transitions.finish import Lifecycle
from asyncmq_nats.wire.keys import tier_name
from asyncmq_nats.workers import Worker
from tests.passing import clocks, pass_time
from tests.receiver import PATIENCE as PATIENCE
from tests.receiver import Receiver, until


@asynccontextmanager
async def running(queue: Queue) -> AsyncIterator[Worker]:
    """Run a worker of the queue while the block runs; it stops in order."""
    worker = Worker(queue)
    failure: BaseException | None = None
    async with anyio.create_task_group() as group:
        await group.start(worker.run)
        try:
            yield worker
        except (
            Exception,
            pytest.fail.Exception,
        ) as error:  # told as it is, and not as a group of one
            failure = error
        worker.stop()
    if failure is not None:
        raise failure


async def run_jobs(queue: Queue) -> None:
    """Run the jobs of the queue until none is left to do."""
    async with running(queue):
        await wait_until_done(queue)


async def wait_until_done(queue: Queue) -> None:
    """Wait until no job is waiting, active or delayed.

    No event says so: it is read, twice, since a job that moves may be overlooked.
    """
    empty, pause = 0, 0.005
    with anyio.fail_after(2 * PATIENCE):
        while empty < 2:
            busy = await queue.count() + await queue.get_job_count_by_types("active")
            empty = 0 if busy else empty + 1
            if empty == 1:
                await counted(queue)
            await pass_time(pause)
            pause = min(1.2 * pause, 0.1)  # many jobs: counting them is work as well


async def only(queue: Queue, *, within: float = PATIENCE, **counts: int) -> None:
    """Wait until the queue has these jobs and no others: an acknowledgement may be on its way."""

    def are_there(stats: dict[str, int]) -> bool:
        return stats == dict.fromkeys(stats, 0) | counts

    await until(queue.queue_stats, are_there, within)
    await counted(queue)  # what was stored before, and should not have been, is seen now
    await until(queue.queue_stats, are_there, within)


async def has(queue: Queue, count: int, *states: str) -> None:
    """Wait until this number of jobs is in these states: by default those to be started."""

    async def read() -> int:
        return await (queue.get_job_count_by_types(*states) if states else queue.count())

    await until(read, lambda found: found == count)
    await counted(queue)  # one too many that was stored before is seen now
    await until(read, lambda found: found == count)


async def counted(queue: Queue) -> None:
    """Wait until the server has counted what is stored: its counters lag by some milliseconds.

    What is read from a count, as a list of a state is, then has all that was stored before.
    """
    if isinstance(queue.backend, InMemoryBackend):
        return
    backend, subjects, assets = queue.backend, queue._subjects, queue._assets
    inspection = queue._inspection

    async def read() -> dict[str, tuple[int, int]]:
        found: dict[str, tuple[int, int]] = {}
        with suppress(AssetMissing):
            for priority in await assets.list_tiers():
                tier = await inspection.tier(priority)
                stored = await backend.count(subjects.ready_log, subjects.tier(priority))
                found[tier_name(priority)] = tier.pending + tier.leased, stored
            for counter, filter in assets.counters.items():
                count = await inspection.count(counter)
                found[counter] = count, await backend.count(subjects.bucket_log, filter)
        return found

    await until(read, lambda found: all(count == stored for count, stored in found.values()))


async def outcome(queue: Queue, job_id: str) -> dict[str, Any]:
    """Wait until the job has ended, however, and return it."""
    ended = ("completed", "failed", "expired", "cancelled")
    with anyio.fail_after(PATIENCE):
        while True:
            job = await queue.get_job(job_id)
            if job is not None and job["status"] in ended:
                return job
            await pass_time(0.01)


async def result(queue: Queue, job_id: str) -> Any:
    """Wait until the job has ended, and return its result or raise `JobFailed`."""
    if not clocks:
        return await queue.wait_for(job_id, timeout=PATIENCE)
    with anyio.fail_after(PATIENCE):
        while True:
            try:
                return await queue.wait_for(job_id, timeout=0)
            except TimeoutError:
                await pass_time(0.05)


async def round_trips(backend: Backend, log: str, count: int = 20) -> None:
    """Let the backend and the workers of this loop do what they do at once: by work, not by time.

    Each answer comes after what the backend was told before, however busy the machine is.
    """
    for _ in range(count):
        await backend.last_sequence(log)
        await anyio.lowlevel.checkpoint()


def make_queue(
    backend: Backend, name: str = "work", *, concurrency: int = 3, **tasks: Callable[..., Any]
) -> Queue:
    """Return a queue whose workers know these tasks, each under its keyword."""
    registry = TaskRegistry()
    for task_id, function in tasks.items():
        registry.register(function, queue=name, name=task_id)
    return Queue(name, backend, concurrency=concurrency, registry=registry)


class Unsent:
    """A staged batch that is written when it is committed."""

    def __init__(self, write: Callable[..., Awaitable[int]]) -> None:
        self._write = write
        self._writes: list[Write] = []

    async def add(self, *writes: Write) -> None:
        self._writes += writes

    async def commit(self) -> int:
        return await self._write(*self._writes)

    def drop(self) -> None:
        self._writes.clear()


Action = Callable[[], Awaitable[Any]]


async def race(*actions: Action) -> list[Any]:
    """Run the actions at the same time and return their results in order."""
    results: dict[int, Any] = {}

    async def note(index: int, action: Action) -> None:
        results[index] = await action()

    async with anyio.create_task_group() as group:
        for index, action in enumerate(actions):
            group.start_soon(note, index, action)
    return [results[index] for index in range(len(actions))]


async def lose_worker(queue: Queue, *, runs: bool = False) -> None:
    """Take the next job as a worker does, run it for a while if wished, and be lost."""
    receiver = Receiver(queue.backend, f"amq_{queue.name}", extend=False)
    await receiver.pull("tier_5")
    if runs:
        await receiver.wait_for(lambda: bool(receiver.deliveries))
        lifecycle = Lifecycle(queue._store, "lost")
        assert await lifecycle.claim(lifecycle.open(receiver.deliveries[0]))
