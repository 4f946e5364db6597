"""Lists of jobs, read page by page. A page costs the same in a queue of ten jobs and of a million.

A state is one or more *sources*: stretches of a log's sequences that match one filter. Most records
of a long list match, so they are read as they stand; of a short one, the server knows where its few
are.
"""

from bisect import bisect_left
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass
from math import inf
from typing import Final

from asyncmq_nats.backends.base import ConsumerState, Record
from asyncmq_nats.exceptions import AssetMissing, InvalidArgument
from asyncmq_nats.jobs import Job
from asyncmq_nats.states import OUTCOMES, Place, State
from asyncmq_nats.store.queue_store import QueueStore
from asyncmq_nats.store.reads import PAGE_SIZE, PLACE_STATES, Inspection
from asyncmq_nats.wire.keys import INDEXED, last_token

__all__ = ["JobLists", "Source"]

SMALL_LIST_LIMIT: Final = 500
"""A list of up to this many jobs is read whole: one request."""
COUNTED_MATCHES_LIMIT: Final = 10_000
"""The server counts up to this many matches in milliseconds before it sends the first."""
PAGE_BYTES: Final = 4 * 1024 * 1024
"""About the most that a page with more than the usual number of records holds."""
RECORD_BYTES: Final = 500
"""What a record takes beside its body, about."""
INDEX_SLACK: Final = 32
"""Index entries that are read beyond a page.

An entry may stand in another order than its outcome, or for none.
"""


@dataclass(frozen=True, slots=True)
class Source:
    """Records of one log that match a filter, from sequence `first` to `last`.

    `total`: how many there are. `matches`: how many match in the whole log.
    """

    name: str
    log: str
    filter: str
    total: int
    matches: int
    first: int = 1
    last: int | None = None
    index: str | None = None
    """Filter of the index entries, if each match has one."""
    tier: ConsumerState | None = None
    place: Place | None = None

    @property
    def is_dense(self) -> bool:
        """Whether to read all records and skip the others.

        A few among many outcomes cost the server as much as many: it checks each job's keys.
        """
        return self.name.startswith("done.") or self.matches > COUNTED_MATCHES_LIMIT

    def holds(self, record: Record) -> bool:
        """Return whether a matching record is in the stretch."""
        return record.sequence >= self.first and (self.last is None or record.sequence <= self.last)


class JobLists:
    """The lists of one queue."""

    def __init__(self, store: QueueStore, inspection: Inspection) -> None:
        self._store = store
        self._backend = store.backend
        self._keys = store.keys
        self._inspection = inspection

    @property
    def logs(self) -> tuple[str, str]:
        """The logs that the jobs are in."""
        return self._keys.ready_log, self._keys.bucket_log

    # -- sources

    async def sources(self, state: State) -> list[Source]:
        """Return where the jobs of a state are, oldest first."""
        if state in OUTCOMES:
            return [await self._outcomes(state)]
        found = await self._tiers(state) if state in (State.WAITING, State.ACTIVE) else []
        places = [place for place, shown in PLACE_STATES.items() if shown is state]
        if state in (State.WAITING, State.DELAYED, State.WAITING_CHILDREN):
            places.append(Place.RELEASED)
        return found + [await self.place(place) for place in places]

    async def _outcomes(self, state: State) -> Source:
        log, filter = self._keys.bucket_log, self._keys.outcomes(state)
        total = await self._count(f"done_{state}")
        index = None
        if state in INDEXED and total and await self._inspection.count(f"index_{state}") >= total:
            index = self._keys.indexed(state)
        return Source(f"done.{state}", log, filter, total, total, index=index)

    async def place(self, place: Place) -> Source:
        """Return the source of the jobs at a place in transit."""
        total = await self._count(f"later_{place}")
        filter = self._keys.place(place)
        return Source(f"later.{place}", self._keys.bucket_log, filter, total, total, place=place)

    async def _count(self, counter: str) -> int:
        """Return the count of a counter; without one, a number that has all records read."""
        count = await self._inspection.count_or_none(counter)
        return COUNTED_MATCHES_LIMIT + 1 if count is None else count

    async def _tiers(self, state: State) -> list[Source]:
        found = []
        for priority in await self._store.assets.list_tiers():
            tier = await self._inspection.tier(priority)
            delivered = tier.delivered_sequence
            source = Source(
                f"ready.{priority}",
                self._keys.ready_log,
                self._keys.tier(priority),
                tier.leased if state is State.ACTIVE else tier.pending,
                tier.leased + tier.pending,
                first=1 if state is State.ACTIVE else delivered + 1,
                last=delivered if state is State.ACTIVE else None,
                tier=tier,
            )
            found.append(source)
        return found

    # -- pages

    async def read_page(
        self, state: State, after: str | None, limit: int, *, descending: bool
    ) -> tuple[list[Job], str | None]:
        """Return the next jobs of a state after a cursor, and the cursor to go on with.

        `None` when these were the last.

        Raises:
            InvalidArgument: the cursor is not one of this state.
        """
        sources = await self.sources(state)
        if descending:
            sources.reverse()
        at, sequence = _parse_cursor(after, sources, state, descending=descending)
        jobs: list[Job] = []
        for source in sources[at:]:
            while True:
                wanted = limit - len(jobs)
                records = await self.read_records(source, sequence, wanted, descending=descending)
                jobs += self.jobs_in(source, records, state)
                if len(records) < wanted:
                    break
                sequence = records[-1].sequence
                if len(jobs) >= limit:
                    return jobs, f"{source.name}:{sequence}"
            sequence = None
        return jobs, None

    def jobs_in(self, source: Source, records: Iterable[Record], state: State) -> list[Job]:
        """Return the jobs in records of a source that are in that state.

        A released one is delayed or waits.
        """
        if source.tier is not None:
            return [self._inspection.ready_job(record, source.tier) for record in records]
        jobs = [self._inspection.job_in_bucket(record) for record in records]
        return [job for job in jobs if job is not None and job.status is state]

    def state_of(self, source: Source, record: Record, state: State) -> State | None:
        """Return the state of the job in a record of a source, as far as its key alone tells.

        `state`: the one whose source it is. `None`: a released job, whose record tells it.
        """
        if source.tier is not None:
            return self._inspection.ready_state(record, source.tier)
        return None if source.place is Place.RELEASED else state

    def token_in(self, source: Source, record: Record) -> str:
        """Return the token of the job in a record of a source."""
        key = record.subject
        return last_token(key) if source.tier is not None else self._keys.token(key)

    async def read_records(
        self, source: Source, after: int | None, limit: int, *, descending: bool
    ) -> list[Record]:
        """Return the next records of a source after a sequence, markers included.

        Fewer than `limit` when there are no more.
        """
        if not source.total:
            return []
        try:
            if source.matches <= SMALL_LIST_LIMIT:
                found = await self._read_few(source, after, limit, descending=descending)
            elif descending:
                found = await self._read_back(source, after, limit)
            else:
                found = await self._backend.page(
                    source.log,
                    source.filter,
                    from_sequence=source.first if after is None else after + 1,
                    limit=limit,
                    mostly=source.is_dense,
                    index=source.index,
                )
        except AssetMissing:
            return []
        return [record for record in found if source.holds(record)][:limit]

    async def _read_back(self, source: Source, after: int | None, limit: int) -> list[Record]:
        before = source.last + 1 if after is None and source.last is not None else after
        return await self._backend.page_back(
            source.log, source.filter, before=before, limit=limit, index=source.index
        )

    async def _read_few(
        self, source: Source, after: int | None, limit: int, *, descending: bool
    ) -> list[Record]:
        if source.index is None:
            records = await self._backend.last(source.log, source.filter)
        else:
            records = await self._read_indexed(source, after, limit, descending=descending)
        records = [record for record in records if source.holds(record)]
        if descending:
            records.reverse()
        if after is not None:
            records = [
                record
                for record in records
                if (record.sequence < after if descending else record.sequence > after)
            ]
        return records

    async def _read_indexed(
        self, source: Source, after: int | None, limit: int, *, descending: bool
    ) -> list[Record]:
        """Read a page of outcomes by the keys in their index entries, more when some are gone."""
        assert source.index is not None
        entries = await self._backend.last(source.log, source.index)
        keys = [self._keys.indexed_key(entry.subject) for entry in entries]
        sequences = [entry.sequence for entry in entries]
        if descending:
            end = len(keys) if after is None else bisect_left(sequences, after) + INDEX_SLACK
            ordered = keys[:end][::-1]
        else:
            start = 0 if after is None else bisect_left(sequences, after) - INDEX_SLACK
            ordered = keys[max(0, start) :]
        found: dict[int, Record] = {}
        for start in range(0, len(ordered), limit + 2 * INDEX_SLACK):
            part = ordered[start : start + limit + 2 * INDEX_SLACK]
            read = await self._backend.last(source.log, *part)
            found |= {record.sequence: record for record in read}
            fresh = [
                sequence
                for sequence in found
                if after is None or (sequence < after if descending else sequence > after)
            ]
            if len(fresh) >= limit:
                break
        return [found[sequence] for sequence in sorted(found)]

    # -- all of a list

    async def read(self, state: State, *, descending: bool = False) -> AsyncIterator[Job]:
        """Yield the jobs in a state, by sequence.

        About in the order in which they reached that state.
        """
        async for source, records in self._pages(state, PAGE_SIZE, descending=descending):
            for job in self.jobs_in(source, records, state):
                yield job

    async def read_raw(self, state: State) -> AsyncIterator[list[Record]]:
        """Yield the records of the jobs in a state, and of all released jobs, page by page."""
        async for _, records in self._pages(state, PAGE_SIZE, descending=False):
            yield records

    async def read_due(self) -> AsyncIterator[Job]:
        """Yield the delayed jobs whose time has come and that no promoter has moved on yet."""
        source = await self.place(Place.RELEASED)
        async for records in self.source_pages(source, PAGE_SIZE, descending=False):
            for job in self.jobs_in(source, records, State.WAITING):
                if job.delay_until is not None:
                    yield job

    async def _pages(
        self, state: State, first_limit: int, *, descending: bool
    ) -> AsyncIterator[tuple[Source, list[Record]]]:
        sources = await self.sources(state)
        for source in reversed(sources) if descending else sources:
            async for records in self.source_pages(source, first_limit, descending=descending):
                yield source, records

    async def source_pages(
        self, source: Source, first_limit: int, *, descending: bool, largest: int = PAGE_SIZE
    ) -> AsyncIterator[list[Record]]:
        """Yield the records of a source page by page, markers included; the first page is small.

        `largest`: how many records a page may have if they are small.
        """
        after: int | None = None
        limit = max(1, min(first_limit, PAGE_SIZE))
        while True:
            records = await self.read_records(source, after, limit, descending=descending)
            yield records
            if len(records) < limit:
                return
            after, limit = records[-1].sequence, _next_limit(records, largest)

    # -- by time

    async def first_sequence_since(self, log: str, time: float) -> int:
        """Return the sequence from which on all records are as young as `time`.

        It grows with the time.

        Raises:
            AssetMissing: there is no such log.
        """
        first, end = 1, await self._backend.last_sequence(log) + 1
        while first < end and time != inf:
            middle = (first + end) // 2
            page = await self._backend.page(log, ">", from_sequence=middle, limit=1, mostly=True)
            if page and page[0].time < time:
                first = page[0].sequence + 1
            else:
                end = middle
        return end

    async def oldest_waiting(self) -> tuple[Job, float] | None:
        """Return the job that has waited longest to be run, and when that began (Unix seconds)."""
        oldest: tuple[Job, float] | None = None
        for source in await self.sources(State.WAITING):
            for record in await self.read_records(source, None, SMALL_LIST_LIMIT, descending=False):
                if oldest is not None and record.time >= oldest[1]:
                    break
                if found := self.jobs_in(source, [record], State.WAITING):
                    oldest = found[0], record.time
                    break
        return oldest

    async def slice(
        self, states: Sequence[State], start: int, end: int, *, ascending: bool
    ) -> list[Job]:
        """Return the jobs from index `start` to `end` (included; -1: the last), state after state.

        Newest first unless `ascending`.
        """
        jobs: list[Job] = []
        skip, wanted = start, None if end < 0 else end - start + 1
        for state in states:
            left = None if wanted is None else wanted - len(jobs)
            if left is not None and left <= 0:
                break
            found, skip = await self._slice_state(state, skip, left, ascending=ascending)
            jobs += found
        return jobs

    async def _slice_state(
        self, state: State, skip: int, wanted: int | None, *, ascending: bool
    ) -> tuple[list[Job], int]:
        """Return up to `wanted` jobs after the first `skip`, and the `skip` that is left."""
        if skip and state in OUTCOMES and wanted is not None:
            (source,) = await self.sources(state)
            if source.total > COUNTED_MATCHES_LIMIT and 2 * skip > source.total:
                return await self._slice_from_end(source, state, skip, wanted, ascending=ascending)
        jobs: list[Job] = []
        first = PAGE_SIZE if wanted is None else skip + wanted
        async for source, records in self._pages(state, first, descending=not ascending):
            if source.tier is not None or state in OUTCOMES:  # each record is a job of the state
                live = [record for record in records if not record.marker]
                found = self.jobs_in(source, live[skip:], state)
                skip -= min(skip, len(live))
            else:
                found = self.jobs_in(source, records, state)
                skip, found = skip - min(skip, len(found)), found[skip:]
            jobs += found
            if wanted is not None and len(jobs) >= wanted:
                return jobs[:wanted], 0
        return jobs, skip

    async def _slice_from_end(
        self, source: Source, state: State, skip: int, wanted: int, *, ascending: bool
    ) -> tuple[list[Job], int]:
        """Skip from the other end, which is nearer."""
        beyond = source.total - skip - wanted
        if skip >= source.total:
            return [], skip - source.total
        found, _ = await self._slice_state(
            state, max(0, beyond), wanted + min(0, beyond), ascending=not ascending
        )
        return found[::-1], 0


def _next_limit(page: Sequence[Record], largest: int) -> int:
    """Return how many records the page after this one may have."""
    size = max(len(record.body) for record in page) + RECORD_BYTES
    return max(PAGE_SIZE, min(largest, PAGE_BYTES // size))


def _parse_cursor(
    cursor: str | None, sources: Sequence[Source], state: State, *, descending: bool
) -> tuple[int, int | None]:
    """Return the index of the source to go on with, and the sequence to go on after."""
    if cursor is None:
        return 0, None
    name, _, digits = str(cursor).rpartition(":")
    if not digits.isascii() or not digits.isdigit():
        raise InvalidArgument(
            f"after must be the cursor of an earlier page of {state} jobs", cursor
        )
    for at, source in enumerate(sources):
        if source.name == name:
            return at, int(digits)
    kind, _, priority = name.partition(".")
    if kind != "ready" or state not in (State.WAITING, State.ACTIVE):
        raise InvalidArgument(
            f"after must be the cursor of an earlier page of {state} jobs", cursor
        )
    # Its tier is gone: go on with the next one.
    order = _priority_order(priority)
    for at, source in enumerate(sources):
        other = _priority_order(source.name.partition(".")[2])
        if other > order if not descending else other < order:
            return at, None
    return len(sources), None


def _priority_order(word: str) -> float:
    """Return a tier's place among the sources of a state; other places come last."""
    try:
        return int(word)
    except ValueError:
        return float("inf")
