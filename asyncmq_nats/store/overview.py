"""One queue as a whole: its counts, rates, age, priorities, pause and storage."""

from dataclasses import dataclass
from typing import Final

from asyncmq_nats._concurrency import open_task_group
from asyncmq_nats.backends.base import LogState
from asyncmq_nats.states import OUTCOMES, State
from asyncmq_nats.store.pages import JobLists, Source
from asyncmq_nats.store.queue_store import QueueStore
from asyncmq_nats.store.reads import PAGE_SIZE, Inspection
from asyncmq_nats.store.topology import LATEST_PAUSE

__all__ = ["Overview", "QueueInfo", "TierInfo"]

RATE_PERIOD: Final = 60.0
RATE_SAMPLE: Final = 5_000
"""Outcomes that are read for a rate; if there are more, the last ones stand for all."""


@dataclass(frozen=True, slots=True)
class TierInfo:
    """The jobs of one priority, lower ones first."""

    priority: int
    waiting: int
    active: int


@dataclass(frozen=True, slots=True)
class QueueInfo:
    """An overview of a queue.

    `counts`: jobs by state. `paused_until`: Unix seconds; `None` if it is not paused or has no end.
    `oldest_waiting`: id of the job that has waited longest; `oldest_waiting_age`: for how many
    seconds. `ended_per_second`: jobs that reached each outcome, over the last minute.
    `ready`, `records`: the stream of the jobs that can be run, and the bucket of all others;
    `None` without the permission to ask.
    """

    name: str
    counts: dict[str, int]
    paused: bool
    paused_until: float | None
    oldest_waiting: str | None
    oldest_waiting_age: float | None
    ended_per_second: dict[str, float]
    tiers: list[TierInfo]
    ready: LogState | None
    records: LogState | None


class Overview:
    """Reads of one queue as a whole."""

    def __init__(self, store: QueueStore, inspection: Inspection, lists: JobLists) -> None:
        self._store = store
        self._keys = store.keys
        self._inspection = inspection
        self._lists = lists

    async def read(self) -> QueueInfo | None:
        """Return what there is to know; `None` if there is no such queue."""
        ready = await self._store.backend.describe_log(self._keys.ready_log)
        records = await self._store.backend.describe_log(self._keys.bucket_log)
        if ready is None and records is None:
            return None
        until = await self._store.assets.read_pause()
        oldest = await self._lists.oldest_waiting()
        now = self._store.now()
        return QueueInfo(
            name=self._keys.queue,
            counts={
                str(state): count
                for state, count in (await self._inspection.count_by_state()).items()
            },
            paused=await self._store.assets.is_paused(),
            paused_until=None if until is None or until >= LATEST_PAUSE else until,
            oldest_waiting=None if oldest is None else oldest[0].job_id,
            oldest_waiting_age=None if oldest is None else max(0.0, now - oldest[1]),
            ended_per_second=await self.rates(),
            tiers=await self._tiers(),
            ready=ready,
            records=records,
        )

    async def _tiers(self) -> list[TierInfo]:
        found = []
        for priority in await self._store.assets.list_tiers():
            tier = await self._inspection.tier(priority)
            found.append(TierInfo(priority, tier.pending, tier.leased))
        return found

    async def rates(self, period: float = RATE_PERIOD) -> dict[str, float]:
        """Return how many jobs a second reached each outcome. `period`: in seconds, until now.

        Outcomes that were removed since, by a person or by their time to live, are not counted.
        """
        rates: dict[str, float] = {}

        async def measure(state: State) -> None:
            (source,) = await self._lists.sources(state)
            rates[str(state)] = await self._rate(source, period)

        async with open_task_group() as group:
            for state in OUTCOMES:
                group.start_soon(measure, state)
        return {str(state): rates[str(state)] for state in OUTCOMES}

    async def _rate(self, source: Source, period: float) -> float:
        await self._store.backend.connect()
        now = oldest = self._store.now()
        count = 0
        async for records in self._lists.source_pages(source, PAGE_SIZE, descending=True):
            recent = [r.time for r in records if r.time >= now - period and not r.marker]
            count += len(recent)
            oldest = min([oldest, *recent])
            if len(recent) < len(records) or count >= RATE_SAMPLE:
                break
        if count < RATE_SAMPLE:
            return count / period
        # At most as many as there are: a rate of a few seconds need not hold for the whole period.
        return min(count / max(now - oldest, 0.001), source.total / period)
