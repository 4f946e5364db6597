"""Counts of a queue's jobs, and one job. Counting costs the same for ten jobs and for ten million.

Lists are in `pages.py`.
"""

from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final

from asyncmq_nats._concurrency import deadline, open_task_group
from asyncmq_nats.backends.base import ConsumerState, Record
from asyncmq_nats.exceptions import AssetMissing, AssetOffline, InvalidJob, Unconfirmed
from asyncmq_nats.jobs import Job, new_job
from asyncmq_nats.states import OUTCOMES, Place, State
from asyncmq_nats.store.commit import look_for, looks
from asyncmq_nats.store.queue_store import QueueStore
from asyncmq_nats.store.topology import COUNTER_PATIENCE
from asyncmq_nats.wire.codec import load_json
from asyncmq_nats.wire.keys import (
    counter_name,
    decode_token,
    encode_token,
)

__all__ = ["PAGE_SIZE", "PLACE_STATES", "Inspection", "JobPage", "WaitingJob"]

PAGE_SIZE: Final = 500
SMALL_QUEUE: Final = 5_000
SILENCE_LIFETIME: Final = 10.0
"""Seconds for which a counter that did not answer is not asked again."""
EMPTY_STATE: Final = ConsumerState(0, 0, 0)
PLACE_STATES: Final = {Place.DELAYED: State.DELAYED, Place.PARKED: State.WAITING_CHILDREN}
"""The state of a released job depends on its time: it is released early, see `TIMER_LEAD`."""


@dataclass(frozen=True, slots=True)
class JobPage:
    """A page of a list: the jobs as dicts, and the cursor of the next page.

    `None` when this was the last.
    """

    jobs: list[dict[str, Any]]
    cursor: str | None


@dataclass(frozen=True, slots=True)
class WaitingJob:
    """A job that waits to be run: since when (Unix seconds), and for how long (seconds)."""

    job: dict[str, Any]
    since: float
    age: float


class Inspection:
    """Reads of one queue."""

    def __init__(self, store: QueueStore) -> None:
        self._store = store
        self._backend = store.backend
        self._keys = store.keys
        self._silent_until: dict[str, float] = {}
        """When a counter that did not answer is asked again."""

    # -- counts

    async def count_by_state(self) -> dict[State, int]:
        """Return how many jobs are in each state; zeros if there is no such queue.

        The states are counted one after the other: a job that moves meanwhile may be counted twice
        or not at all.
        """
        counts: dict[State, int] = dict.fromkeys(State, 0)

        async def count_tier(priority: int) -> None:
            state = await self.tier(priority)
            counts[State.WAITING] += state.pending
            counts[State.ACTIVE] += state.leased

        async def count_records(counter: str, state: State) -> None:
            # Awaited first: `+=` reads its left side first, and the others add meanwhile.
            pending = await self.count(counter)
            counts[state] += pending

        async with open_task_group() as group:
            for priority in await self._store.assets.list_tiers():
                group.start_soon(count_tier, priority)
            group.start_soon(count_records, f"later_{Place.RELEASED}", State.WAITING)
            for place, state in PLACE_STATES.items():
                group.start_soon(count_records, f"later_{place}", state)
            for outcome in OUTCOMES:
                group.start_soon(count_records, f"done_{outcome}", outcome)
        if counts[State.WAITING] and sum(counts.values()) < SMALL_QUEUE:
            await self._count_early(counts)
        return counts

    async def _count_early(self, counts: dict[State, int]) -> None:
        """Count released jobs by their state: delayed if released early, or waiting for others.

        The server has to search for them: in a large queue they count as waiting.
        """
        with suppress(AssetMissing):
            page = await self._backend.page(
                self._keys.bucket_log, self._keys.place(Place.RELEASED), limit=PAGE_SIZE
            )
            for record in page:
                job = self.job_in_bucket(record)
                if job is not None and job.status is not State.WAITING and counts[State.WAITING]:
                    counts[State.WAITING] -= 1
                    counts[job.status] += 1

    async def tier(self, priority: int) -> ConsumerState:
        """Return the state of a tier's consumer; nothing if there is none."""
        with suppress(AssetMissing):
            state = await self._store.look_up_tier(priority)
            return state or EMPTY_STATE
        return EMPTY_STATE

    async def count(self, counter: str) -> int:
        """Return how many records a counter counts.

        `counter`: such as `done_failed`; see `counter_name`.
        """
        return await self.count_or_none(counter) or 0

    async def count_or_none(self, counter: str) -> int | None:
        """Same as `count`.

        `None` when there is no such counter, and this process may not make it. The records of a
        counter that does not answer are searched: its server may be lost, and others have them.
        """
        log, now = self._keys.bucket_log, self._store.now()
        try:
            if self._silent_until.get(counter, now) <= now:
                with suppress(AssetOffline, Unconfirmed), deadline(COUNTER_PATIENCE):
                    return await self._ask(counter)
                self._silent_until[counter] = now + SILENCE_LIFETIME
            return await self._backend.count(log, self._store.assets.counters[counter])
        except AssetMissing:
            return 0

    async def _ask(self, counter: str) -> int | None:
        log, name = self._keys.bucket_log, counter_name(counter)
        state = await self._backend.look_up(log, name)
        if state is None:  # it is in memory, and is made again
            await self._store.assets.declare_counters()
            state = await self._backend.look_up(log, name)
        return None if state is None else state.pending

    # -- one job

    async def find(self, job_id: str) -> Job | None:
        """Return the job as it is now, or `None`."""
        return await look_for(partial(self._find, encode_token(job_id)), looks(self._backend))

    async def _find(self, token: str) -> Job | None:
        """Read both logs in turn.

        A job is written to its new place before it is removed from the old one.
        """
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
        keys = self._keys
        filters = keys.later_all(token), keys.done_all(token), keys.progress(token)
        records = await self._store.last(*filters)
        reports = [
            record.body for record in records if record.subject == filters[-1] and not record.marker
        ]
        jobs = [job for record in records if (job := self.job_in_bucket(record)) is not None]
        ended = next((job for job in jobs if job.status in OUTCOMES), None)
        return ended or max(jobs, key=lambda job: job.order, default=None), load_json(
            reports[0]
        ) if reports else {}

    async def _find_ready(self, token: str) -> Job | None:
        records = await self._store.last(self._keys.ready_any(token))
        if not records:
            return None
        record = records[-1]
        priority, _ = self._keys.split_ready(record.subject)
        return self.ready_job(record, await self.tier(priority))

    @staticmethod
    def ready_state(record: Record, tier: ConsumerState) -> State:
        """Return the state of the job in a ready record.

        It is active if the tier has delivered it: no write per start is needed to know.
        """
        return State.ACTIVE if record.sequence <= tier.delivered_sequence else State.WAITING

    def ready_job(self, record: Record, tier: ConsumerState) -> Job:
        """Return the job in a ready record."""
        state = self.ready_state(record, tier)
        priority, token = self._keys.split_ready(record.subject)
        return self._decode(record, token, status=state, priority=priority)

    def job_in_bucket(self, record: Record) -> Job | None:
        """Return the job in a record of the bucket.

        `None` for markers, claims, edges and what is no job.
        """
        if record.marker:
            return None
        key = self._keys.parse(record.subject)
        if key.state is not None:
            return self._decode(record, key.token, status=key.state)
        if key.place is Place.RELEASED:
            job = self._decode(record, key.token, status=State.WAITING)
            if job.waits_for_others:  # a promoter writes its edges: its producer died
                return replace(job, status=State.WAITING_CHILDREN)
            return replace(job, status=State.DELAYED) if job.is_early(self._store.now()) else job
        if key.place is None:
            return None
        return self._decode(record, key.token, status=PLACE_STATES[key.place])

    @staticmethod
    def _decode(record: Record, token: str, **known: Any) -> Job:
        data: dict[str, Any] = {}
        try:
            data = load_json(record.body)
            data.setdefault("created_at", record.time)
            return Job.from_dict(data | {"id": decode_token(token)} | known)
        except InvalidJob as problem:
            return new_job(
                task_id="?",
                job_id=decode_token(token),
                created_at=record.time,
                status=known["status"],
                # of a newer version, if it was put off
                last_error=str(data.get("put_off_reason") or problem),
            )
