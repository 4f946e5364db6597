"""Removes many jobs at once: clean, drain, obliterate.

It works in steps that hold the stream for a short time each. One purge by filter would be one call,
but the server holds the stream for as long as it takes: 46 s for a million records.
"""

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import takewhile
from math import inf
from typing import Final

from asyncmq_nats.backends.base import ConsumerState, Expect, Record, Write
from asyncmq_nats.exceptions import AssetMissing, InvalidJob, WriteRefused
from asyncmq_nats.jobs import Job
from asyncmq_nats.states import OUTCOMES, Place, State
from asyncmq_nats.store.pages import JobLists, Source
from asyncmq_nats.store.queue_store import QueueStore
from asyncmq_nats.store.reads import Inspection
from asyncmq_nats.store.records import without_markers
from asyncmq_nats.transitions.cancel import PLACES_OF, is_delayed
from asyncmq_nats.transitions.timers import follow_timers, remove_overtaken
from asyncmq_nats.transitions.waits import Waits
from asyncmq_nats.wire.keys import INDEXED, decode_token

__all__ = ["PURGED_SHARE", "Cleanup", "Progress", "is_idle"]

RECORDS_PER_STEP: Final = 2_000
"""Records that are read at a time, and removed where each is removed by itself."""
RECORDS_PER_PURGE: Final = 20_000
"""Records that are removed by one purge, at least: the server looks through a file for each."""
PURGES: Final = 5
"""Purges of what a filter matches, about: the server looks through all matches for each, which
takes some 0.5 µs a match."""
PURGED_SHARE: Final = 1 / 60
"""The share of the matches from which a purge costs less than to remove each by itself."""

PURGE_STEP: Final = 200_000
"""Sequences that are purged at a time: the server is busy with the stream meanwhile."""

Progress = Callable[[int], None]
"""Called with the number of jobs removed so far."""


class Cleanup:
    """Removes many jobs of one queue."""

    def __init__(self, store: QueueStore, inspection: Inspection, lists: JobLists) -> None:
        self._store = store
        self._backend = store.backend
        self._keys = store.keys
        self._inspection = inspection
        self._lists = lists

    async def clean_jobs(
        self,
        state: State,
        older_than: float = inf,
        limit: int = 0,
        progress: Progress | None = None,
    ) -> list[str]:
        """Remove up to `limit` (0: all) jobs that reached a state before a time; return their ids.

        The oldest go first.

        Jobs that run stay.
        """
        ids: list[str] = []
        for source in await self._sources(state):
            if limit and len(ids) >= limit:
                break
            async for step in self._steps(source, older_than, limit):
                wanted = step[: limit - len(ids)] if limit else step
                ids += await self._remove_first(source, wanted)
                if progress is not None:
                    progress(len(ids))
                if limit and len(ids) >= limit:
                    break
        if state in INDEXED and not (limit and len(ids) >= limit):
            await self._purge([self._keys.indexed(state)], older_than)
        if state is State.WAITING_CHILDREN and ids:
            await self.remove_orphans()
        return ids

    async def remove_orphans(self) -> None:
        """Remove the parts of jobs with many parents that were removed."""
        await Waits(self._store).remove_orphans()

    async def clean(
        self, state: State, older_than: float = inf, progress: Progress | None = None
    ) -> None:
        """Remove the jobs that reached a state before a time; those that run stay.

        Outcomes are purged by filter, `PURGE_STEP` sequences at a time: their ids are not asked
        for.
        """
        if state not in OUTCOMES:
            await self.clean_jobs(state, older_than, progress=progress)
            return
        filters = [self._keys.outcomes(state)]
        filters += [self._keys.indexed(state)] if state in INDEXED else []
        await self._purge(filters, older_than, progress)

    async def _purge(
        self, filters: Sequence[str], older_than: float, progress: Progress | None = None
    ) -> None:
        """Purge what matches and is old enough, step by step. Progress is that of the first."""
        log, removed = self._keys.bucket_log, 0
        try:
            oldest = await self._backend.page(log, ">", limit=1, mostly=True)
            end = await self._lists.first_sequence_since(log, older_than)
        except AssetMissing:
            return
        start = oldest[0].sequence if oldest else end
        while start < end:
            start = min(end, start + PURGE_STEP)
            purged = [await self._backend.purge(log, filter, before=start) for filter in filters]
            removed += purged[0]
            if progress is not None:
                progress(removed)

    async def _sources(self, state: State) -> list[Source]:
        if state is State.ACTIVE:
            return []
        if state in OUTCOMES or state is State.WAITING:
            return await self._lists.sources(state)
        # The state of a released job depends on its time: see `drain`.
        return [await self._lists.place(place) for place in PLACES_OF[state]]

    async def _steps(
        self, source: Source, older_than: float, limit: int = 0
    ) -> AsyncIterator[list[Record]]:
        """Yield the records of a source that are old enough, oldest first.

        The sequence grows with the time.
        """
        after: int | None = None
        purged, most = self._can_be_purged(source), RECORDS_PER_STEP
        if purged:
            most = max(RECORDS_PER_PURGE, source.total // PURGES)
        most = min(most, limit or most)
        size = min(most, RECORDS_PER_STEP)
        step: list[Record] = []
        while True:
            records = await self._lists.read_records(source, after, size, descending=False)
            # Up to the first young one: a purge takes all before it, and clocks may go back.
            old = list(takewhile(lambda record: record.time < older_than, records))
            is_last = len(records) < size or len(old) < len(records)
            old = without_markers(old)
            if source.place is Place.RELEASED:
                old = [record for record in old if not self._waits(record)]
            # Many records are kept for a purge: without their bodies.
            step += [replace(record, body=b"") for record in old] if purged else old
            if step and (is_last or len(step) >= most):
                yield step
                step = []
            if is_last:
                return
            after = records[-1].sequence

    async def remove_records(self, source: Source, records: Sequence[Record]) -> list[str]:
        """Remove records of a source, and return the ids of their jobs.

        Jobs that a worker has fetched meanwhile stay.
        """
        ids: list[str] = []
        for start in range(0, len(records), RECORDS_PER_STEP):
            ids += await self._remove_some(source, records[start : start + RECORDS_PER_STEP])
        return ids

    async def _remove_some(self, source: Source, records: Sequence[Record]) -> list[str]:
        if source.tier is not None:
            # Read in each step: the tier goes on delivering.
            tier = await self._tier_of(records)
            records = [record for record in records if record.sequence > tier.delivered_sequence]
        elif source.place is Place.DELAYED:
            records = await follow_timers(self._store, records)
        sequences = [record.sequence for record in records]
        removed = set(await self._backend.delete_many(source.log, sequences))
        overtaken = await remove_overtaken(self._store, records)
        tokens = [(record.sequence, self._keys.parse(record.subject).token) for record in records]
        return [
            decode_token(token)
            for sequence, token in tokens
            if sequence in removed or token in overtaken
        ]

    async def _remove_first(self, source: Source, records: Sequence[Record]) -> list[str]:
        """Remove the first records of a source as `remove_records` does, by one purge if possible.

        That costs the server less than as many removals, but takes all that comes before.
        """
        if (
            not self._can_be_purged(source)
            or len(records) < source.total * PURGED_SHARE
            or (source.tier is not None and not is_idle(await self._tier_of(records)))
        ):
            return await self.remove_records(source, records)
        before = records[-1].sequence + 1
        await self._backend.purge(source.log, source.filter, before=before)
        return [decode_token(self._keys.parse(record.subject).token) for record in records]

    def _can_be_purged(self, source: Source) -> bool:
        """Return whether a purge by filter may remove the first records of a source.

        Only outcomes, and a tier that no worker uses. Not in a cluster: a replica that lags may
        leave out records that a purge would remove.
        """
        if source.place is not None or self._backend.reads_may_lag:
            return False
        return source.tier is None or is_idle(source.tier)

    async def _tier_of(self, records: Sequence[Record]) -> ConsumerState:
        priority, _ = self._keys.split_ready(records[0].subject)
        return await self._inspection.tier(priority)

    async def drain(self, *, include_delayed: bool, progress: Progress | None = None) -> list[str]:
        """Remove the jobs that wait to be run, and if wished those that are delayed.

        Return their ids. Jobs that run stay.
        """
        ids: list[str] = []
        async for source in self._drained(include_delayed=include_delayed):
            async for step in self._steps(source, inf):
                wanted = step
                if source.place is Place.RELEASED and not include_delayed:
                    wanted = [record for record in step if not self._is_early(record)]
                ids += await self._remove_first(source, wanted) if wanted else []
                if progress is not None:
                    progress(len(ids))
        return ids

    async def _drained(self, *, include_delayed: bool) -> AsyncIterator[Source]:
        """Yield what is drained in the order in which jobs move, each looked up when it is due.

        So a job that moves on meanwhile is not missed.
        """
        if include_delayed:
            yield await self._lists.place(Place.DELAYED)
        yield await self._lists.place(Place.RELEASED)
        for source in await self._lists.sources(State.WAITING):
            if source.tier is not None:
                yield source

    def _waits(self, record: Record) -> bool:
        """Return whether a released job waits for others: a promoter parks it again."""
        try:
            return Job.decode(record.body).waits_for_others
        except InvalidJob:
            return False

    def _is_early(self, record: Record) -> bool:
        """Return whether a released job was released a little before its time."""
        return is_delayed(record, self._keys, self._store.now())

    async def read_ids(self) -> list[str]:
        """Return the ids of all jobs."""
        ids: dict[str, None] = {}
        for state in State:
            async for records in self._lists.read_raw(state):
                keys = [self._keys.parse(r.subject) for r in records if not r.marker]
                ids |= dict.fromkeys(decode_token(key.token) for key in keys)
        return list(ids)

    async def obliterate(self) -> bool:
        """Remove everything of the queue: all jobs, repeatables, windows, a pause.

        Return whether there was a queue. Its assets stay for the running workers, and so does its
        secret: they make ids with it.
        """
        found, log, key = False, self._keys.bucket_log, self._keys.secret
        secrets: list[Record] = []
        with suppress(AssetMissing):
            secrets = await self._store.last(key)
        for each in (self._keys.ready_log, log):
            with suppress(AssetMissing):
                await self._backend.purge(each, ">")
                found = True
        for secret in secrets:
            with suppress(WriteRefused):  # a worker was faster
                await self._store.write(Write(key, secret.body, Expect(key)))
        return found


def is_idle(tier: ConsumerState) -> bool:
    """Return whether no job of a tier runs, and no worker asks for one."""
    return not tier.leased and not tier.waiting_pulls
