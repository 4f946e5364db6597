"""Summaries of queues that several pages show, read once for all viewers."""

from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar
from zlib import crc32

import anyio

from asyncmq_nats._concurrency import open_task_group
from asyncmq_nats.contrib.dashboard.site import Site
from asyncmq_nats.queues import Queue
from asyncmq_nats.states import OUTCOMES, State
from asyncmq_nats.workers import WorkerInfo, list_workers

__all__ = ["QueueSummary", "all_workers", "for_all", "summaries", "summarize", "version_of"]

T = TypeVar("T")
K = TypeVar("K")
READS_AT_ONCE: Final = 16


@dataclass(frozen=True, slots=True)
class QueueSummary:
    """A queue at a glance. `workers`: those that run it now; `slots`, `busy`: theirs together."""

    name: str
    counts: dict[str, int]
    paused: bool
    workers: list[WorkerInfo] = field(default_factory=list)

    @property
    def slots(self) -> int:
        """How many jobs can run at the same time."""
        return sum(worker.concurrency for worker in self.workers)

    @property
    def busy(self) -> int:
        """How many jobs run, as the workers last told."""
        return sum(worker.busy for worker in self.workers)

    @property
    def to_do(self) -> int:
        """How many jobs have not ended."""
        return sum(n for state, n in self.counts.items() if state not in OUTCOMES)

    def __repr__(self) -> str:
        # Only what the pages show: heartbeats would have them updated for nothing.
        workers = [
            (worker.id, worker.concurrency, worker.busy, worker.running, worker.stopping)
            for worker in self.workers
        ]
        return f"{self.name} {self.counts} {self.paused} {workers}"

    @property
    def is_stuck(self) -> bool:
        """Whether jobs wait and no worker is there to run them."""
        return bool(self.counts.get(State.WAITING)) and not self.workers and not self.paused


async def for_all(items: Iterable[K], read: Callable[[K], Awaitable[T]]) -> dict[K, T]:
    """Read something of each item, some at a time."""
    found: dict[K, T] = {}
    limiter = anyio.CapacityLimiter(READS_AT_ONCE)

    async def read_one(item: K) -> None:
        async with limiter:
            found[item] = await read(item)

    try:
        async with open_task_group() as group:
            for item in dict.fromkeys(items):
                group.start_soon(read_one, item)
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return found


async def all_workers(site: Site) -> list[WorkerInfo]:
    """Return the running workers of the queues that are shown."""

    async def read() -> list[WorkerInfo]:
        return await list_workers(site.backend)

    workers = await site.reads.get("workers", read)
    shown = site.queues
    return [worker for worker in workers if shown is None or worker.queue in shown]


async def summarize(site: Site, queue: Queue) -> QueueSummary:
    """Return a queue at a glance."""
    workers = await all_workers(site)
    return QueueSummary(
        queue.name,
        await site.counts(queue),
        await site.share("paused", queue, queue.is_paused),
        [worker for worker in workers if worker.queue == queue.name],
    )


async def summaries(site: Site) -> list[QueueSummary]:
    """Return all queues at a glance, by name."""

    async def read() -> list[QueueSummary]:
        names = await site.list_queues()
        workers = await list_workers(site.backend)

        async def read_one(name: str) -> QueueSummary:
            queue = Queue(name, site.backend)
            counts, paused = await queue.queue_stats(), await queue.is_paused()
            return QueueSummary(name, counts, paused, [w for w in workers if w.queue == name])

        found = await for_all(names, read_one)
        return [found[name] for name in names]

    return await site.reads.get("summaries", read)


def version_of(value: Any) -> str:
    """Return a fingerprint of a value: it tells a browser that its page is out of date."""
    return f"{crc32(repr(value).encode(errors='replace')):08x}"
