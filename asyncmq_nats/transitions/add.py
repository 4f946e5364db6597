"""New jobs: they are added one by one, in batches, and as flows."""

from collections.abc import Collection, Coroutine, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

from asyncmq_nats._concurrency import Turns
from asyncmq_nats._new_jobs import Addition, NewJob, whole_job
from asyncmq_nats.backends.base import Expect, Staged, Write
from asyncmq_nats.events import DUPLICATED
from asyncmq_nats.exceptions import (
    AssetMissing,
    InvalidFlow,
    PayloadTooLarge,
    StreamBusy,
    WriteRefused,
)
from asyncmq_nats.jobs import Job, size_limit
from asyncmq_nats.states import Place
from asyncmq_nats.store.announcing import announce
from asyncmq_nats.store.commit import REPLICA_LAG_DELAYS, look_for, pause_after_refusal
from asyncmq_nats.store.queue_store import QueueStore
from asyncmq_nats.store.records import delayed_write
from asyncmq_nats.transitions.parked import linking_body, parked_body
from asyncmq_nats.transitions.plan import PLAN_JOBS, Plans, outside_of, tie
from asyncmq_nats.transitions.release import Dependencies
from asyncmq_nats.transitions.waits import NARROW_LIMIT, Parent
from asyncmq_nats.wire.codec import load_json
from asyncmq_nats.wire.keys import check_job_id, encode_token

__all__ = ["Additions", "is_independent", "is_plain"]

BATCH_LIMIT: Final = 1000
EDGES_IN_BATCH: Final = 100
"""A job with more edges than this has them written after the batch that it is in."""


def is_independent(job: Addition) -> bool:
    """Return whether a new job is one record, with an id that no other has."""
    return not job.custom_id and not job.depends_on


def is_plain(job: Addition) -> bool:
    """Return whether a new job is ready at once: it is one record in the ready log."""
    return job.delay_until is None and is_independent(job)


@dataclass(slots=True)
class Batch:
    """The writes that add some jobs."""

    writes: list[Write] = field(default_factory=list)
    count: int = 0
    """The number of jobs that the writes add."""
    late: list[tuple[Job, list[str]]] = field(default_factory=list)
    """Jobs whose edges are written afterwards, with their parents."""
    failed: list[str] = field(default_factory=list)
    """Tokens of the jobs that fail at once, with a parent."""


class Additions:
    """Adds jobs to one queue."""

    def __init__(self, store: QueueStore) -> None:
        self.store = store
        self._backend = store.backend
        self._keys = store.keys
        self._assets = store.assets
        self.dependencies = Dependencies(store)
        self.plans = Plans(store, self.dependencies, self.first_write)
        self.refused = Turns()
        """A lock for refused additions: those that wait for the same job take turns."""

    def add(self, job: Addition) -> Coroutine[Any, Any, str]:
        """Store a new job where it belongs and return its id.

        The existing one if the producer chose an id that exists.

        Raises:
            InvalidJobId: no record can be kept under its id.
            NotSerializable: an argument is not JSON.
            PayloadTooLarge: the job is too large for the server.
            Unconfirmed: it may or may not have been added.
        """
        if not job.custom_id and not job.depends_on:
            return self._add_independent(job)
        return self._add_other(job)

    async def _add_other(self, job: Addition) -> str:
        """Store a job with a chosen id, or one that depends on others."""
        if not self._assets.is_declared(job.priority):
            await self._declare({job.priority})
        with suppress(WriteRefused):
            return await self._add_once(job)
        async with self.refused:
            while True:
                await pause_after_refusal()
                if await self.are_stored([job]):
                    await self.resume([job])
                    return job.job_id
                try:
                    return await self._add_once(job)
                except (
                    WriteRefused
                ):  # a job with that id has appeared, or a parent has ended or got another child
                    continue

    async def _add_independent(self, job: Addition) -> str:
        """Store a job that no other can have the id of, and that depends on none."""
        if not self._assets.is_declared(job.priority):
            await self._declare({job.priority})
        write = self.first_write(job)
        log = self._keys.log_of(write.subject)
        try:
            try:  # as `_write_again_when_missing`, with a coroutine less: each job comes here
                await self._backend.write(log, write)
            except AssetMissing:
                await self._declare_again({job.priority})
                await self._backend.write(log, write)
        except WriteRefused:  # the confirmation of an earlier sending was lost
            if not await look_for(partial(self.are_stored, [job]), REPLICA_LAG_DELAYS):
                raise WriteRefused(self._keys.bucket_log, f"job {job.job_id!r}") from None
        return job.job_id

    async def _add_once(self, job: Addition) -> str:
        last = 0
        if job.custom_id:
            missing = await self.plans.missing([job.job_id])
            if not missing:
                await self.repeat([job])
                return job.job_id
            last = missing[job.job_id]
        write = self.first_write(job, last=last)
        if job.depends_on:
            return await self._add_waiting(job, last)
        await self._write_again_when_missing([write], {job.priority})
        return job.job_id

    async def _add_waiting(self, job: Addition, last: int) -> str:
        """Store a job that depends on others. `last`: see `Plans.missing`.

        Raises:
            WriteRefused: a job with its id is there, or an earlier try stored it.
        """
        known = await self.plans.links.find(job.depends_on or ())
        planned = self.plans.links.plan(whole_job(job), known)
        if not planned.waits_for_others:
            write = self.first_write(planned, last=last)
            await self._write_again_when_missing([write], {job.priority})
            return job.job_id
        self.check_size(planned)
        links, token = self.plans.links, encode_token(job.job_id)
        sequence = await links.park(planned, last)
        came = await links.connect(planned, planned.parents, known)
        if came.failed:
            await self.dependencies.release(token)
        else:
            await self.dependencies.parked.settle(planned, sequence, closed=came.closed)
        return job.job_id

    async def add_batch(
        self,
        jobs: Sequence[Addition],
        missing: Mapping[str, int],
        staged: Staged | None = None,
    ) -> None:
        """Store up to 1,000 new jobs, all or none.

        One batch is in one log: if any of them goes through the scheduler bucket, all of them do.
        `missing`: those with chosen ids. `staged`: has all their writes, by `early_writes`.

        Raises:
            WriteRefused: one of them exists.
        """
        if len(jobs) == 1 and jobs[0].depends_on:
            await self._assets.declare_tier(jobs[0].priority)
            await self._add_waiting(jobs[0], missing.get(jobs[0].job_id, 0))
            return
        priorities = {job.priority for job in jobs}
        for priority in priorities:
            await self._assets.declare_tier(priority)
        in_bucket = not all(map(is_plain, jobs))
        batch = Batch()
        try:
            if staged is None or not await self._commit(staged):
                batch = await self._batch(jobs, missing, in_bucket=in_bucket)
                await self._write_again_when_missing(batch.writes, priorities)
        except StreamBusy:  # strangers can keep batches of the ready log open, not of the bucket
            if in_bucket:
                raise
            batch = await self._batch(jobs, missing, in_bucket=True)
            await self._write_again_when_missing(batch.writes, priorities)
        await self._finish_batch(batch)

    async def stage(self, *, in_bucket: bool) -> Staged:
        """Begin a batch of independent jobs, of `early_writes`, that is sent while it is made.

        `in_bucket`: whether they are delayed; else they are plain.
        """
        await self._assets.declare()
        return self._backend.stage(self._keys.bucket_log if in_bucket else self._keys.ready_log)

    async def early_writes(self, jobs: Sequence[Addition]) -> list[Write]:
        """Return the writes that add independent jobs in one batch; they have passed `check`."""
        for priority in {job.priority for job in jobs}:
            await self._assets.declare_tier(priority)
        return [self._insertion(job, job.encode(), in_batch=True) for job in jobs]

    async def _commit(self, staged: Staged) -> bool:
        """Store a batch. Return whether the log was there."""
        try:
            await staged.commit()
        except AssetMissing:  # deleted since this process declared it
            return False
        return True

    async def add_linked(self, jobs: Sequence[Job]) -> None:
        """Store jobs that depend on each other; each comes after its `children`.

        Up to 1,000 writes are all or nothing. Few jobs are one record that holds them all; many,
        and those with ids that were chosen, which must not exist, are atomic batches.

        Raises:
            InvalidFlow: one of them exists.
        """
        priorities = {job.priority for job in jobs}
        for priority in priorities:
            await self._assets.declare_tier(priority)
        jobs = tie(jobs)
        for job in jobs:
            if not job.depends_on:
                self.check(job)
        chosen = [job for job in jobs if job.custom_id]
        missing = await self._refuse_existing(chosen)
        if 1 < len(jobs) <= PLAN_JOBS and not chosen:
            planned = await self.plans.plan(jobs)
            for job in planned:
                self.check_size(job)
            if await self.plans.add_flow(planned):
                return
        inside = {job.job_id for job in jobs}
        rest = list(jobs)
        while rest:
            rest = rest[await self._add_next_linked(rest, inside, missing, priorities) :]

    async def _add_next_linked(
        self,
        jobs: Sequence[Job],
        inside: Collection[str],
        missing: Mapping[str, int],
        priorities: Collection[int],
    ) -> int:
        """Store the first of the jobs, as many as fit into a batch; return how many."""
        more = 20
        while True:
            more, batch = more - 1, await self._batch(jobs, missing, inside=inside, in_bucket=True)
            try:
                await self._write_again_when_missing(batch.writes, priorities)
            except (
                WriteRefused
            ):  # a parent outside has ended, or a job with one of the ids is there
                if not await self.are_stored(jobs[: batch.count]):
                    missing = {**missing, **await self._refuse_existing(jobs[: batch.count])}
                    if not more:
                        raise
                    await pause_after_refusal()
                    continue
            await self._finish_batch(batch)
            return batch.count

    async def are_stored(self, jobs: Sequence[Addition]) -> bool:
        """Return whether jobs that were refused are there, all as one.

        A confirmation was lost, and they have moved on since.
        """
        ours = next((job for job in jobs if not job.custom_id), None)  # no other job has its id
        return ours is not None and await self.plans.exists(ours.job_id)

    # -- batches

    async def _batch(
        self,
        jobs: Sequence[Addition],
        missing: Mapping[str, int],
        *,
        inside: Collection[str] = (),
        in_bucket: bool,
    ) -> Batch:
        """Return the writes that add the first of the jobs, as many as fit into a batch.

        Those that depend on no other have passed `check`. `missing`: those with chosen ids, see
        `Plans.missing`.

        Raises:
            JobNotFound: one depends on a job that is neither in this queue nor `inside`.
            NotSerializable, PayloadTooLarge: as for `add`.
        """
        batch = Batch()
        jobs = jobs[:BATCH_LIMIT]
        known = await self.plans.links.read_parents(outside_of(jobs, inside))
        for job in jobs:
            last = missing.get(job.job_id, 0)
            if not job.depends_on:
                if len(batch.writes) == BATCH_LIMIT:
                    break
                write = self._insertion(job, job.encode(), last, in_bucket=in_bucket, in_batch=True)
                batch.writes.append(write)
                batch.count += 1
                continue
            planned = self.plans.links.plan(whole_job(job), known, inside)
            outside = [parent for parent in planned.parents if parent not in inside]
            late = bool(planned.wide) or len(outside) > EDGES_IN_BATCH
            writes = await self._writes(
                planned, {} if late else known, outside, last=last, in_bucket=in_bucket
            )
            if batch.writes and len(batch.writes) + len(writes) > BATCH_LIMIT:
                break
            batch.writes += writes
            batch.count += 1
            if late and outside:
                batch.late.append((planned, outside))
            if any(self._keys.outcome_state(write.subject) for write in writes):
                batch.failed.append(encode_token(job.job_id))
        return batch

    async def batch_of(self, jobs: Sequence[Job], completed: Mapping[str, Any]) -> list[Write]:
        """Return the writes that add jobs together with the outcome of others, in one batch.

        Args:
            jobs: those that depend on each other know their `children`.
            completed: results of the jobs that complete in the batch, by id.

        Raises:
            PayloadTooLarge, JobNotFound: as for `add`.
        """
        inside = {job.job_id for job in jobs}
        known = await self.plans.links.read_parents(outside_of(jobs, inside | completed.keys()))
        writes: list[Write] = []
        for job in jobs:
            planned = self.plans.links.plan(job, known, inside, completed)
            outside = [parent for parent in planned.parents if parent not in inside]
            # Without its edges: a promoter writes them when its timer is over.
            late = bool(planned.wide) or len(outside) > EDGES_IN_BATCH
            writes += await self._writes(planned, {} if late else known, outside)
        return writes

    async def _writes(
        self,
        job: Job,
        known: Mapping[str, Parent],
        outside: Sequence[str],
        *,
        last: int = 0,
        in_bucket: bool = True,
    ) -> list[Write]:
        """Return the writes that add a planned job. No `known` parents: its edges are for later."""
        if not job.waits_for_others:
            return [self.first_write(job, last=last, in_bucket=in_bucket)]
        self.check_size(job)
        token = encode_token(job.job_id)
        failed = [parent for parent in outside if parent in known and known[parent].state]
        if failed and job.on_parent_failure == "fail":
            return [await self._failed_at_once(job, token, failed[0])]
        linking = bool(outside) and not known
        parked = self.dependencies.parked
        body = linking_body(job) if linking else parked_body(job)
        expect = Expect(self._keys.later_all(token), last)
        parked_write = parked.parked_write(token, body, expect, linking=linking)
        parked_write.once = job.custom_id
        writes = [*parked.waits.writes(job), parked_write]
        for parent_id in outside if known else ():
            parent = encode_token(parent_id)
            edge = self._keys.edge(parent, token)
            open_still = Expect(self._keys.done_all(parent), known[parent_id].last)
            writes.append(Write(edge, b"{}", open_still))
        return writes

    async def _failed_at_once(self, job: Job, token: str, parent_id: str) -> Write:
        """Return the write of a new job's failure.

        Raises:
            WriteRefused: a job with its id has ended already.
        """
        end = await self.store.read_end(token)
        if end.ended:
            raise WriteRefused(self._keys.bucket_log, f"job {job.job_id!r} has ended")
        data = load_json(parked_body(job))
        return self.dependencies.parked.failure(data, token, parent_id, end.fence)

    async def _finish_batch(self, batch: Batch) -> None:
        """Write the edges that did not fit into a batch, and release what waits for failed jobs."""
        for job, outside in batch.late:
            came = await self.plans.links.connect(job, outside, {})
            if came.failed:
                await self.dependencies.release(encode_token(job.job_id))
            else:
                await self.dependencies.parked.settle(job, 0, closed=came.closed)
        for token in batch.failed:
            await self.dependencies.release(token)

    async def _refuse_existing(self, jobs: Sequence[Job]) -> dict[str, int]:
        """Return what `Plans.missing` says of jobs that must not exist.

        Raises:
            InvalidFlow: one of them does.
        """
        missing = await self.plans.missing([job.job_id for job in jobs])
        for job in jobs:
            if job.job_id not in missing:
                raise InvalidFlow(
                    f"a job {job.job_id!r} exists already: each flow needs ids of its own"
                )
        return missing

    async def _write_again_when_missing(
        self, writes: Sequence[Write], priorities: Iterable[int]
    ) -> None:
        log = self._keys.log_of(writes[0].subject)
        try:
            await self._backend.write(log, *writes)
        except AssetMissing:
            await self._declare_again(priorities)
            await self._backend.write(log, *writes)

    async def _declare_again(self, priorities: Iterable[int]) -> None:
        """Declare what was deleted since this process declared it."""
        self._assets.forget()
        await self._declare(priorities)

    async def _declare(self, priorities: Iterable[int]) -> None:
        await self._assets.declare()
        for priority in priorities:
            await self._assets.declare_tier(priority)

    def first_write(self, job: Addition, *, last: int = 0, in_bucket: bool = False) -> Write:
        """Return the write that adds the job.

        Args:
            job: waits for no other.
            last: see `Plans.missing`.
            in_bucket: also a job that could run at once goes through the scheduler bucket.

        Raises:
            InvalidJobId, NotSerializable, PayloadTooLarge: as for `add`.
        """
        return self._insertion(job, self.check(job), last, in_bucket=in_bucket)

    def _insertion(
        self,
        job: Addition,
        body: bytes,
        last: int = 0,
        *,
        in_bucket: bool = False,
        in_batch: bool = False,
    ) -> Write:
        """Return the write that adds a job; see `first_write`.

        `body`: its record, checked. `in_batch`: a batch is known by its first message.
        """
        token = encode_token(job.job_id)
        if job.delay_until is None and not (job.custom_id or in_bucket):
            message_id = None if in_batch else job.job_id
            return Write(self._keys.ready(job.priority, token), body, message_id=message_id)
        nothing = Expect(self._keys.later_all(token), last)
        if job.delay_until is not None:
            times = job.delay_until, self._backend.now()
            write = delayed_write(self._keys, token, body, times, nothing)
        else:
            write = Write(self._keys.later(token, Place.RELEASED), body, nothing)
        write.once = job.custom_id  # another producer may add it meanwhile
        return write

    @property
    def size_limit(self) -> int:
        """How many bytes the record of a new job may have."""
        return size_limit(self._backend.max_body, self._backend.settings.max_job_payload_bytes)

    def check(self, job: Addition, limit: int | None = None) -> bytes:
        """Return the record of a job, before anything is written.

        `limit`: that of `size_limit`, if it is known.

        Raises:
            InvalidJobId, NotSerializable, PayloadTooLarge: as for `add`.
        """
        if job.custom_id:
            check_job_id(job.job_id)
        return self.check_size(job, limit)

    def check_size(self, job: Addition, limit: int | None = None) -> bytes:
        """Return the record of a job. `limit`: see `check`.

        Raises:
            NotSerializable, PayloadTooLarge: as for `add`.
        """
        body = job.encode() if isinstance(job, NewJob) else parked_body(job)
        most = self.size_limit if limit is None else limit
        if len(body) > most:
            what = f"job {job.job_id!r} of task {job.task_id!r}"
            if job.depends_on and len(job.depends_on) > NARROW_LIMIT:
                what += f", which depends on {len(job.depends_on):,} jobs (each id counts),"
            raise PayloadTooLarge(what, len(body), most)
        return body

    async def is_duplicate(self, job: Addition) -> bool:
        """Return whether the queue has a job with the id of this one; if so, see `repeat`."""
        duplicate = await self.exists(job.job_id)
        if duplicate:
            await self.repeat([job])
        return duplicate

    async def repeat(self, jobs: Sequence[Addition]) -> None:
        """Tell that jobs were added that the queue has; go on where a producer has not ended."""
        await self.resume(jobs)
        for job in jobs:
            await self.announce(DUPLICATED, job.job_id)

    async def resume(self, jobs: Sequence[Addition]) -> None:
        """See `link_again`: those of the jobs that depend on others."""
        await self.link_again([job.job_id for job in jobs if job.depends_on])

    async def link_again(self, job_ids: Sequence[str]) -> None:
        """Link jobs that are stored to those that they depend on, if their producer has not."""
        if job_ids:
            for token in await self.plans.links.resume(job_ids):
                await self.dependencies.release(token)

    async def announce(self, what: str, job_id: str, **data: Any) -> None:
        """See `announcing.announce`."""
        await announce(self.store, what, job_id, **data)

    async def exists(self, job_id: str) -> bool:
        """See `Plans.exists`."""
        return await self.plans.exists(job_id)
