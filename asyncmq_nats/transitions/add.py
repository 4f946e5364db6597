"""New jobs: where they go, one by one, in batches, and as flows."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Final

from asyncmq_nats._concurrency import Turns
from asyncmq_nats.backends.base import Backend, Expect, Write
from asyncmq_nats.events import DUPLICATED
from asyncmq_nats.exceptions import (
    AssetMissing,
    InvalidFlow,
    PayloadTooLarge,
    StreamBusy,
    WriteRefused,
)
from asyncmq_nats.jobs import Job, check_size
from asyncmq_nats.states import Place
from asyncmq_nats.store.announcing import announce
from asyncmq_nats.store.commit import LAG, look_for, pause_after_refusal
from asyncmq_nats.store.topology import QueueAssets
from asyncmq_nats.transitions.release import Dependencies, delayed_write
from asyncmq_nats.wire.keys import QueueSubjects, check_job_id, encode_token

__all__ = ["Additions"]

BATCH: Final = 1000


class Additions:
    """Adds jobs to one queue."""

    def __init__(self, backend: Backend, subjects: QueueSubjects, assets: QueueAssets) -> None:
        self._backend = backend
        self._subjects = subjects
        self._assets = assets
        self.dependencies = Dependencies(backend, subjects)
        self.refused = Turns()
        """Held to repeat an addition that was refused: those of this process that wait for the same job take turns."""

    async def add(self, job: Job) -> str:
        """Store a new job where it belongs and return its id: the existing one if the producer chose an id that exists.

        Raises:
            InvalidJobId: no record can be kept under its id.
            NotSerializable: an argument is not JSON.
            PayloadTooLarge: the job is too large for the server.
            Unconfirmed: it may or may not have been added.
        """
        await self._assets.declare_tier(job.priority)
        try:
            return await self._add_once(job)
        except WriteRefused:
            if not job.custom_id and not job.depends_on:
                return await self._confirm(job)
        async with self.refused:
            while True:
                await pause_after_refusal()
                if await self.are_stored([job]):
                    return job.job_id
                try:
                    return await self._add_once(job)
                except (
                    WriteRefused
                ):  # a job with that id has appeared, or a parent has ended or got another child
                    continue

    async def _confirm(self, job: Job) -> str:
        """Return the id of a job that was refused although nobody else can have its id: the confirmation of an earlier sending was lost."""
        if not await look_for(partial(self.are_stored, [job]), LAG):
            raise WriteRefused(self._subjects.bucket_log, f"job {job.job_id!r}")
        return job.job_id

    async def _add_once(self, job: Job) -> str:
        if job.custom_id and await self.is_duplicate(job.job_id):
            return job.job_id
        await self._write_again_when_missing(await self.writes_of(job), {job.priority})
        return job.job_id

    async def writes_of(self, job: Job, *, in_bucket: bool = False) -> list[Write]:
        """Return the writes that add a job: one, or if it depends on jobs that have not ended, itself and its edges.

        Raises:
            JobNotFound: a job that it depends on is not in this queue.
            NotSerializable, PayloadTooLarge: as for `add`.
        """
        if not job.depends_on:
            return [self.first_write(job, in_bucket=in_bucket)]
        self.first_write(job)  # is it sound?
        job, writes = await self.dependencies.park(job)
        return writes or [self.first_write(job, in_bucket=in_bucket)]

    async def add_batch(self, jobs: Sequence[Job]) -> None:
        """Store up to 1,000 new jobs, all or none.

        One batch is in one log: if any of them goes through the scheduler bucket, all of them do.

        Raises:
            WriteRefused: one of them exists.
        """
        priorities = {job.priority for job in jobs}
        for priority in priorities:
            await self._assets.declare_tier(priority)
        in_bucket = any(
            job.custom_id or job.delay_until is not None or job.depends_on for job in jobs
        )
        writes = [write for job in jobs for write in await self.writes_of(job, in_bucket=in_bucket)]
        try:
            await self._write_again_when_missing(writes, priorities)
        except StreamBusy:  # strangers can keep batches of the ready log open, not of the bucket
            if in_bucket:
                raise
            writes = [self.first_write(job, in_bucket=True) for job in jobs]
            await self._write_again_when_missing(writes, priorities)

    async def add_linked(self, jobs: Sequence[Job]) -> None:
        """Store jobs that depend on each other; each comes after its `children`. Up to 1,000 writes are all or nothing.

        Raises:
            InvalidFlow: one of them exists.
        """
        priorities = {job.priority for job in jobs}
        for priority in priorities:
            await self._assets.declare_tier(priority)
        inside = {job.job_id for job in jobs}
        await self._refuse_existing([job for job in jobs if job.custom_id])
        rest = list(jobs)
        while rest:
            rest = rest[await self._add_next_linked(rest, inside, priorities) :]

    async def _add_next_linked(
        self, jobs: Sequence[Job], inside: Collection[str], priorities: Collection[int]
    ) -> int:
        """Store the first of the jobs, as many as fit into a batch; return how many."""
        more, count = 20, 0
        while True:
            more, (count, writes) = more - 1, await self._linked_batch(jobs, inside)
            try:
                await self._write_again_when_missing(writes, priorities)
            except (
                WriteRefused
            ):  # a parent outside has ended meanwhile, or a job with one of the ids is there
                if not await self.are_stored(jobs[:count]):
                    await self._refuse_existing(jobs[:count])
                    if not more:
                        raise
                    await pause_after_refusal()
                    continue
            for write in writes:
                if self._subjects.outcome_state(
                    write.subject
                ):  # failed at once, with a parent: those who wait for it must know
                    await self.dependencies.release(self._subjects.token(write.subject))
            return count

    async def _linked_batch(
        self, jobs: Sequence[Job], inside: Collection[str]
    ) -> tuple[int, list[Write]]:
        """Return how many of the jobs fit into a batch, and the writes that add them."""
        writes: list[Write] = []
        for count, job in enumerate(jobs):
            further = await self.linked_writes(job, inside)
            if writes and len(writes) + len(further) > BATCH:
                return count, writes
            writes += further
        return len(jobs), writes

    async def are_stored(self, jobs: Sequence[Job]) -> bool:
        """Return whether jobs that were refused are there, all as one: a confirmation was lost, and they have moved on since."""
        ours = next((job for job in jobs if not job.custom_id), None)  # nobody else has its id
        return ours is not None and await self.exists(ours.job_id)

    async def linked_writes(
        self, job: Job, inside: Collection[str], completed: Mapping[str, Any] | None = None
    ) -> list[Write]:
        """Return the writes that add a job which may depend on jobs that are added, or that complete, in the same batch.

        Args:
            job: the new one.
            inside: ids of the jobs that are added with it; those that it depends on name it in their `children`.
            completed: results of the jobs that complete with it, by id.

        Raises:
            JobNotFound, NotSerializable, PayloadTooLarge: as for `writes_of`.
        """
        completed = {
            parent: result
            for parent, result in (completed or {}).items()
            if parent in (job.depends_on or ())
        }
        outside = [
            parent
            for parent in job.depends_on or ()
            if parent not in inside and parent not in completed
        ]
        within = [parent for parent in dict.fromkeys(job.depends_on or ()) if parent in inside]
        parked, edges = await self.dependencies.park(replace(job, depends_on=outside))
        results = dict(parked.parent_results)
        for parent, result in completed.items():
            if self.dependencies.fits(results, result):
                results[parent] = result
        job = replace(
            parked,
            depends_on=job.depends_on,
            parents=[*parked.parents, *within],
            parent_results=results,
        )
        self.first_write(job)  # is it sound?
        if any(
            self._subjects.outcome_state(write.subject) for write in edges
        ):  # failed at once, with a parent
            return edges
        token = encode_token(job.job_id)
        if not job.parents:
            return [self.first_write(job, in_bucket=True)]
        key = self._subjects.later(token, Place.PARKED)
        return [
            *(edge for edge in edges if edge.subject != key),
            Write(key, job.encode(), Expect(self._subjects.later_all(token))),
        ]

    async def _refuse_existing(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            if await self.exists(job.job_id):
                raise InvalidFlow(
                    f"a job {job.job_id!r} exists already: each flow needs ids of its own"
                )

    async def _write_again_when_missing(
        self, writes: Sequence[Write], priorities: Iterable[int]
    ) -> None:
        log = self._log_of(writes[0])
        try:
            await self._backend.write(log, *writes)
        except AssetMissing:  # deleted since this process declared it
            self._assets.forget()
            await self._assets.declare()
            for priority in priorities:
                await self._assets.declare_tier(priority)
            await self._backend.write(log, *writes)

    def _log_of(self, write: Write) -> str:
        return (
            self._subjects.bucket_log
            if write.subject.startswith("$KV.")
            else self._subjects.ready_log
        )

    def first_write(self, job: Job, *, in_bucket: bool = False) -> Write:
        """Return the write that adds the job. `in_bucket`: also a job that could be run at once goes through the scheduler bucket.

        Raises:
            InvalidJobId, NotSerializable, PayloadTooLarge: as for `add`.
        """
        if job.custom_id:
            check_job_id(job.job_id)
        token, body = encode_token(job.job_id), job.encode()
        what, most = f"job {job.job_id!r} of task {job.task_id!r}", self._backend.max_body
        check_size(body, what, most)
        limit = self._backend.settings.max_job_payload_bytes
        if limit is not None and len(body) > limit:
            raise PayloadTooLarge(what, len(body), limit)
        nothing = Expect(self._subjects.later_all(token))
        if job.delay_until is not None:
            return delayed_write(
                self._subjects, token, body, (job.delay_until, self._backend.now()), nothing
            )
        if job.custom_id or in_bucket:
            return Write(self._subjects.later(token, Place.RELEASED), body, nothing)
        return Write(self._subjects.ready(job.priority, token), body, message_id=job.job_id)

    async def is_duplicate(self, job_id: str) -> bool:
        """Return whether the queue has a job with that id; if so, tell that it was added once more."""
        duplicate = await self.exists(job_id)
        if duplicate:
            await self.announce(DUPLICATED, job_id)
        return duplicate

    async def announce(self, what: str, job_id: str, **data: Any) -> None:
        """See `announcing.announce`."""
        await announce(self._backend, self._subjects, what, job_id, **data)

    async def exists(self, job_id: str) -> bool:
        """Return whether the queue has a job with that id, in any state."""
        token = encode_token(job_id)
        # Those who wait for a job that was removed are no trace of it: it may be added again. Nor is a claim, if nothing else is there.
        bucket = await self._backend.last(
            self._subjects.bucket_log, self._subjects.later_all(token), self._subjects.ends(token)
        )
        if any(
            not record.marker and not self._subjects.is_claim(record.subject) for record in bucket
        ):
            return True
        return bool(
            await self._backend.last(self._subjects.ready_log, self._subjects.ready_any(token))
        )
