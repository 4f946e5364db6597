"""Every look into a queue. Counting costs the same for ten jobs and for ten million; lists are read page by page."""

from collections.abc import AsyncIterator, Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final

from asyncmq_nats._concurrency import open_task_group
from asyncmq_nats.backends.base import Backend, ConsumerState, Record
from asyncmq_nats.exceptions import AssetMissing, InvalidJob
from asyncmq_nats.jobs import Job, new_job
from asyncmq_nats.states import OUTCOMES, Place, State
from asyncmq_nats.store.commit import look_for
from asyncmq_nats.store.topology import QueueAssets
from asyncmq_nats.wire.codec import load_json
from asyncmq_nats.wire.keys import (
    QueueSubjects,
    counter_name,
    decode_token,
    encode_token,
    tier_name,
)

__all__ = ["DelayedInfo", "Inspection"]

PAGE: Final = 500
MANY: Final = 5_000
NOTHING: Final = ConsumerState(0, 0, 0)
PLACE_STATES: Final = {Place.DELAYED: State.DELAYED, Place.PARKED: State.WAITING_CHILDREN}
"""What a released job is its time decides: it is released a little early, see `LEAD`."""


@dataclass(frozen=True, slots=True)
class DelayedInfo:
    """A delayed job: its id, when it runs (Unix seconds), and the job as a dict (AsyncMQ `DelayedInfo`)."""

    job_id: str
    run_at: float
    payload: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Order:
    """How to read a list: from which end, how many records at first, and whether there are few in all."""

    descending: bool = False
    first_page: int = PAGE
    few: bool = False


class Inspection:
    """Reads of one queue."""

    def __init__(self, backend: Backend, subjects: QueueSubjects, assets: QueueAssets) -> None:
        self._backend = backend
        self._subjects = subjects
        self._assets = assets

    # -- counts

    async def count_by_state(self) -> dict[State, int]:
        """Return how many jobs are in each state.

        The states are counted one after the other: a job that moves meanwhile may be counted twice or not at all.
        """
        await self._assets.declare_all()
        counts: dict[State, int] = dict.fromkeys(State, 0)

        async def count_tier(priority: int) -> None:
            state = await self._consumer(self._subjects.ready_log, tier_name(priority))
            counts[State.WAITING] += state.pending
            counts[State.ACTIVE] += state.leased

        async def count_records(counter: str, state: State) -> None:
            pending = (
                await self._consumer(self._subjects.bucket_log, counter_name(counter))
            ).pending
            counts[state] += (
                pending  # after the await: `+=` reads its left side first, and the others add meanwhile
            )

        async with open_task_group() as group:
            for priority in await self._assets.list_tiers():
                group.start_soon(count_tier, priority)
            group.start_soon(count_records, f"later_{Place.RELEASED}", State.WAITING)
            for place, state in PLACE_STATES.items():
                group.start_soon(count_records, f"later_{place}", state)
            for outcome in OUTCOMES:
                group.start_soon(count_records, f"done_{outcome}", outcome)
        if counts[State.WAITING] and sum(counts.values()) < MANY:
            await self._count_early(counts)
        return counts

    async def _count_early(self, counts: dict[State, int]) -> None:
        """Count those as delayed that were released early. For the server this is a search: where there are many jobs, they are waiting."""
        page = await self._backend.page(
            self._subjects.bucket_log, self._subjects.place(Place.RELEASED), limit=PAGE
        )
        early = sum(
            job.status is State.DELAYED
            for record in page
            if (job := self._job_of(record)) is not None
        )
        early = min(early, counts[State.WAITING])
        counts[State.WAITING] -= early
        counts[State.DELAYED] += early

    async def _consumer(self, log: str, name: str) -> ConsumerState:
        with suppress(AssetMissing):
            if (state := await self._backend.look_up(log, name)) is not None:
                return state
        # Counters are in memory and are made again. Nothing may have been declared at all.
        self._assets.forget()
        await self._assets.declare_all()
        return await self._backend.look_up(log, name) or NOTHING

    # -- one job

    async def find(self, job_id: str) -> Job | None:
        """Return the job as it is now, or `None`."""
        return await look_for(partial(self._find, encode_token(job_id)))

    async def _find(self, token: str) -> Job | None:
        """Look at both places in turn: a job is written where it goes before it is removed where it was."""
        try:
            job, progress = await self._find_in_bucket(token)
        except AssetMissing:  # a server that came back empty: new jobs are in the ready log already
            job, progress = None, {}
        try:
            ready = (
                None
                if job is not None and job.status in OUTCOMES
                else await self._find_ready(token)
            )
        except AssetMissing:
            ready = None
        if ready is not None and (job is None or ready.order >= job.order):
            job = ready
        return (
            None
            if job is None
            else replace(job, progress=progress.get("progress"), progress_data=progress.get("data"))
        )

    async def _find_in_bucket(self, token: str) -> tuple[Job | None, dict[str, Any]]:
        """Return the job, if the bucket has it, and what its task reported of its progress."""
        subjects = self._subjects
        filters = subjects.later_all(token), subjects.done_all(token), subjects.progress(token)
        records = await self._backend.last(subjects.bucket_log, *filters)
        reports = [
            record.body for record in records if record.subject == filters[-1] and not record.marker
        ]
        jobs = [job for record in records if (job := self._job_of(record)) is not None]
        ended = next((job for job in jobs if job.status in OUTCOMES), None)
        return ended or max(jobs, key=lambda job: job.order, default=None), load_json(
            reports[0]
        ) if reports else {}

    async def _find_ready(self, token: str) -> Job | None:
        records = await self._backend.last(
            self._subjects.ready_log, self._subjects.ready_any(token)
        )
        if not records:
            return None
        record = records[-1]
        priority, _ = self._subjects.split_ready(record.subject)
        tier = await self._backend.look_up(self._subjects.ready_log, tier_name(priority)) or NOTHING
        return self._ready_job(record, tier)

    def _ready_job(self, record: Record, tier: ConsumerState) -> Job:
        # A ready job is active if the tier has delivered it: no write per start is needed to know.
        state = State.ACTIVE if record.sequence <= tier.delivered_sequence else State.WAITING
        priority, token = self._subjects.split_ready(record.subject)
        return self._decode(record, token, status=state, priority=priority)

    def _job_of(self, record: Record) -> Job | None:
        """Return the job in a record of the bucket; `None` for markers, claims and dependents."""
        if record.marker:
            return None
        token = self._subjects.token(record.subject)
        outcome = self._subjects.outcome_state(record.subject)
        if outcome is not None:
            return self._decode(record, token, status=outcome)
        if self._subjects.is_later(record.subject, Place.RELEASED):
            job = self._decode(record, token, status=State.WAITING)
            return replace(job, status=State.DELAYED) if job.is_early(self._backend.now()) else job
        place = next(
            (place for place in Place if self._subjects.is_later(record.subject, place)), None
        )
        return None if place is None else self._decode(record, token, status=PLACE_STATES[place])

    @staticmethod
    def _decode(record: Record, token: str, **known: Any) -> Job:
        try:
            data = load_json(record.body)
            data.setdefault("created_at", record.time)
            return _with_last_error(Job.from_dict(data | {"id": decode_token(token)} | known))
        except InvalidJob as problem:
            return new_job(
                task_id="?",
                job_id=decode_token(token),
                created_at=record.time,
                status=known["status"],
                last_error=str(problem),
            )

    # -- many jobs

    async def read(
        self, state: State, *, descending: bool = False, first_page: int = PAGE
    ) -> AsyncIterator[Job]:
        """Yield the jobs in a state, a page at a time: by sequence, so about in the order in which they came to that state."""
        order = Order(descending, max(1, min(first_page, PAGE)))
        sources = [self._read_ready(state, order)] if state in (State.WAITING, State.ACTIVE) else []
        sources += [
            self._read_place(place, order)
            for place, shown in PLACE_STATES.items()
            if shown is state
        ]
        if state in (State.WAITING, State.DELAYED):
            sources.append(self._read_released(state, order))
        if state in OUTCOMES:
            sources.append(
                self._read_bucket(self._subjects.outcomes(state), f"done_{state}", order)
            )
        for source in reversed(sources) if descending else sources:
            async for job in source:
                yield job

    async def read_due(self) -> AsyncIterator[Job]:
        """Yield the delayed jobs whose time has come and that no promoter has moved on yet."""
        async for job in self._read_released(State.WAITING, Order()):
            if job.delay_until is not None:
                yield job

    async def _read_released(self, state: State, order: Order) -> AsyncIterator[Job]:
        async for job in self._read_place(Place.RELEASED, order):
            if job.status is state:
                yield job

    def _read_place(self, place: Place, order: Order) -> AsyncIterator[Job]:
        return self._read_bucket(self._subjects.place(place), f"later_{place}", order)

    async def _read_bucket(self, filter: str, counter: str, order: Order) -> AsyncIterator[Job]:
        if order.descending:
            few = (
                await self._consumer(self._subjects.bucket_log, counter_name(counter))
            ).pending <= PAGE
            order = replace(order, few=few)
        async for record in self._records(self._subjects.bucket_log, filter, (1, None), order):
            job = self._job_of(record)
            if job is not None:
                yield job

    async def _read_ready(self, state: State, order: Order) -> AsyncIterator[Job]:
        log = self._subjects.ready_log
        tiers = await self._assets.list_tiers()
        for priority in reversed(tiers) if order.descending else tiers:
            tier = await self._backend.look_up(log, tier_name(priority)) or NOTHING
            span = (
                (1, tier.delivered_sequence)
                if state is State.ACTIVE
                else (tier.delivered_sequence + 1, None)
            )
            async for record in self._records(log, self._subjects.tier(priority), span, order):
                yield self._ready_job(record, tier)

    async def _records(
        self, log: str, filter: str, span: tuple[int, int | None], order: Order
    ) -> AsyncIterator[Record]:
        """Yield what matches and whose sequence is in the span, first and last included."""
        pages = self._pages(log, filter, span, order)
        try:
            async for page in pages:
                for record in reversed(page) if order.descending else page:
                    yield record
        except AssetMissing:
            return

    async def _pages(
        self, log: str, filter: str, span: tuple[int, int | None], order: Order
    ) -> AsyncIterator[list[Record]]:
        if order.few:
            yield [
                record
                async for page in self._forwards(log, filter, *span, size=PAGE)
                for record in page
            ]
            return
        reader = (
            self._backwards(log, filter, *span, width=order.first_page)
            if order.descending
            else None
        )
        async for page in reader or self._forwards(log, filter, *span, size=order.first_page):
            yield page

    async def _forwards(
        self, log: str, filter: str, first: int, last: int | None, *, size: int
    ) -> AsyncIterator[list[Record]]:
        while page := await self._backend.page(
            log, filter, from_sequence=first, limit=size, mostly=True
        ):
            wanted = [record for record in page if last is None or record.sequence <= last]
            yield wanted
            if len(page) < size or (last is not None and page[-1].sequence >= last):
                return
            first, size = page[-1].sequence + 1, PAGE

    async def _backwards(
        self, log: str, filter: str, first: int, last: int | None, *, width: int
    ) -> AsyncIterator[list[Record]]:
        """Read windows of sequences from the end; one that held little makes the next one larger."""
        end = await self._backend.last_sequence(log) if last is None else last
        while end >= first:
            start = max(first, end - width + 1)
            window = [
                record
                async for page in self._forwards(log, filter, start, end, size=min(width, PAGE))
                for record in page
            ]
            yield window
            end = start - 1
            if len(window) < width // 2 or width < PAGE:
                width *= 4

    async def slice(
        self, states: Iterable[State], start: int, end: int, *, ascending: bool
    ) -> list[Job]:
        """Return the jobs from index `start` to `end` (included; -1: to the last), newest first unless `ascending`; state after state."""
        found: list[Job] = []
        index = 0
        for state in states:
            async for job in self.read(
                state, descending=not ascending, first_page=PAGE if end < 0 else end + 1 - index
            ):
                if index >= start:
                    found.append(job)
                if index == end:
                    return found
                index += 1
        return found


def _with_last_error(job: Job) -> Job:
    """Return a job that is to be tried again with what went wrong last, as one that has ended has it."""
    if not job.errors or job.status in OUTCOMES:
        return job
    last = job.errors[-1]
    at = last.get("at")
    return replace(
        job,
        last_error=str(last.get("error", "")),
        error_traceback=str(last.get("traceback", "")),
        last_attempt=at if isinstance(at, int | float) else None,
    )
