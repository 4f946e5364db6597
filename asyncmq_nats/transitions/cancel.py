"""Transitions that a person or a program asks for, rather than a worker: retry, remove."""

from collections.abc import Sequence
from typing import Final

from asyncmq_nats.backends.base import Backend, Expect, Record, Write
from asyncmq_nats.exceptions import (
    BackendError,
    ConnectionLost,
    InvalidJob,
    Unconfirmed,
    WriteRefused,
)
from asyncmq_nats.jobs import Job
from asyncmq_nats.states import Place, State
from asyncmq_nats.store.commit import pause_after_refusal
from asyncmq_nats.store.topology import QueueAssets
from asyncmq_nats.transitions.claim import AFTERLIFE, Claim
from asyncmq_nats.transitions.finish import OUTCOME_FIELDS
from asyncmq_nats.transitions.release import MARKER_TTL, Dependencies
from asyncmq_nats.wire.codec import dump_json, load_json
from asyncmq_nats.wire.keys import QueueSubjects, decode_token, encode_token, tier_name

__all__ = ["PLACES_OF", "Administration", "is_delayed"]

PLACES_OF: Final = {
    State.WAITING: (Place.RELEASED,),
    State.DELAYED: (Place.DELAYED,),
    State.WAITING_CHILDREN: (Place.PARKED,),
}


class Administration:
    """What can be done to the jobs of one queue by hand."""

    def __init__(self, backend: Backend, subjects: QueueSubjects, assets: QueueAssets) -> None:
        self._backend = backend
        self._subjects = subjects
        self._assets = assets
        self._dependencies = Dependencies(backend, subjects)

    async def remove_delayed(self, job_id: str) -> bool:
        """Remove a job that is delayed. Return whether it was."""
        token = encode_token(job_id)
        for place in (
            Place.DELAYED,
            Place.RELEASED,
        ):  # in this order: it moves from one to the other
            records = await self._backend.last(
                self._subjects.bucket_log, self._subjects.later(token, place)
            )
            if any(is_delayed(record, self._subjects, self._backend.now()) for record in records):
                return await self._backend.delete(self._subjects.bucket_log, records[0].sequence)
        return False

    async def take_due(self, jobs: Sequence[Job]) -> list[Job]:
        """Remove released jobs, and return those that were still there to be removed.

        One whose removal is in doubt is the last that is returned: it may run as well, but what has been taken is not lost.
        """
        taken = []
        for job in jobs:
            try:
                if await self._delete_record(
                    self._subjects.later(encode_token(job.job_id), Place.RELEASED)
                ):
                    taken.append(job)
            except (ConnectionLost, Unconfirmed):
                return [*taken, job]
        return taken

    async def _delete_record(self, subject: str) -> bool:
        records = await self._backend.last(self._subjects.bucket_log, subject)
        if not records or records[0].marker:
            return False
        return await self._backend.delete(self._subjects.bucket_log, records[0].sequence)

    async def cancel(self, job_id: str) -> bool:
        """End a job that has not ended as cancelled, wherever it is. Return whether there was one. A worker that runs it must be told."""
        token, written = encode_token(job_id), b""
        while True:
            bucket, ready = await self._read_all(token)
            ended = next(
                (
                    record
                    for record in bucket
                    if not record.marker and self._subjects.outcome_state(record.subject)
                ),
                None,
            )
            if ended is not None and ended.body != written:
                return False
            if ended is None:
                writes = self._cancellation(token, bucket, ready)
                if not writes:
                    return False
                written = writes[0].body
                try:
                    await self._dependencies.write_and_sweep(*writes)
                except WriteRefused:  # it moved or ended meanwhile, or this was stored and its confirmation lost: look again
                    await pause_after_refusal()
                    continue
            await self._finish_cancellation(token, _reruns(written))
            return True

    async def _read_all(self, token: str) -> tuple[list[Record], list[Record]]:
        """Return all records of a job: those in the bucket, and the ready one."""
        subjects = self._subjects
        bucket = await self._backend.last(
            subjects.bucket_log, subjects.later_all(token), subjects.done_all(token)
        )
        return bucket, await self._backend.last(subjects.ready_log, subjects.ready_any(token))

    def _cancellation(
        self, token: str, bucket: Sequence[Record], ready: Sequence[Record]
    ) -> list[Write]:
        """Return the writes that cancel a job, its outcome first; none if there is no job."""
        subjects = self._subjects
        live = [record for record in bucket if not record.marker]
        later = [record for record in live if subjects.parse(record.subject).place is not None]
        sources = later + list(ready)
        if not sources:
            return []
        last = max(
            (record.sequence for record in bucket if subjects.is_done(record.subject)), default=0
        )
        removed = [
            record for record in live if record in later or subjects.is_claim(record.subject)
        ]
        outcome = self._cancelled(token, sources[0].body, Expect(subjects.done_all(token), last))
        reminder = self._reminder(token, outcome.body, live)
        kept = {write.subject for write in reminder}
        # Each marker expects what it removes, as whoever moves that does: on a cluster, they would not see each other otherwise.
        markers = [
            _marker(record.subject, Expect(record.subject, record.sequence))
            for record in removed
            if record.subject not in kept
        ]
        return [outcome, *reminder, *markers]

    async def _finish_cancellation(self, token: str, reruns: int) -> None:
        """Tell those who wait for a job that was cancelled, and remove what is left of it; but not what was made of it by a retry since."""
        subjects = self._subjects
        try:
            await self._dependencies.release(token)
        except BackendError:
            key = subjects.outcome(token, State.CANCELLED)
            if any(
                not record.marker for record in await self._backend.last(subjects.bucket_log, key)
            ):
                raise
        for log, filter in (
            (subjects.bucket_log, subjects.later_all(token)),
            (subjects.ready_log, subjects.ready_any(token)),
        ):
            for record in await self._backend.last(log, filter):
                if not record.marker and _reruns(record.body) <= reruns:
                    await self._backend.delete(log, record.sequence)

    def _reminder(self, token: str, outcome: bytes, records: Sequence[Record]) -> list[Write]:
        """Return the write that has a promoter tell those who wait for the job, if any do, should this process not come to that.

        To a promoter it is a job that is released, with a chosen id, so that it looks whether the job has ended.
        """
        job = load_json(outcome)
        if not job.get("children") and not any(
            self._subjects.is_edge(record.subject) for record in records
        ):
            return []
        key = self._subjects.later(token, Place.RELEASED)
        there = next((record.sequence for record in records if record.subject == key), 0)
        return [
            Write(
                key,
                dump_json(job | {"custom_id": True, "retries": 0, "reruns": 0}),
                Expect(key, there),
            )
        ]

    async def remove(self, job_id: str) -> bool:
        """Remove a job that is not running, in any state. Return whether it was removed."""
        token, subjects, removed = encode_token(job_id), self._subjects, False
        for _ in range(2):  # once more: it may have moved on after its place was looked at
            records = await self._backend.last(
                subjects.bucket_log, subjects.later_all(token), subjects.ends(token)
            )
            ready = await self._backend.last(subjects.ready_log, subjects.ready_any(token))
            if any([await self._is_taken(record) for record in ready]):
                return False
            found = [(subjects.bucket_log, record) for record in records if not record.marker] + [
                (subjects.ready_log, r) for r in ready
            ]
            for log, record in found:
                if await self._backend.delete(log, record.sequence):
                    removed |= not subjects.is_claim(record.subject)
        return removed

    async def _is_taken(self, ready: Record) -> bool:
        priority, _ = self._subjects.split_ready(ready.subject)
        tier = await self._backend.look_up(self._subjects.ready_log, tier_name(priority))
        return tier is not None and ready.sequence <= tier.delivered_sequence

    def _cancelled(self, token: str, body: bytes, expect: Expect) -> Write:
        try:
            job = load_json(body)
        except InvalidJob:
            job = {"task": "?"}
        now = self._backend.now()
        job |= {
            "id": decode_token(token),
            "status": State.CANCELLED,
            "finished_at": now,
            "last_error": "cancelled",
        }
        subject = self._subjects.outcome(token, State.CANCELLED)
        return Write(
            subject,
            dump_json(job),
            expect,
            ttl=self._backend.settings.failed_ttl,
            beside=True,
            index=self._subjects.index(token, State.CANCELLED),
        )

    async def rerun(self, job_id: str) -> bool:
        """Release a job that ended badly, or that is delayed, as if it were new. Return whether it was in such a state."""
        token, subjects = encode_token(job_id), self._subjects
        released = subjects.later(token, Place.RELEASED)
        for _ in range(10):
            records = await self._backend.last(
                subjects.bucket_log, subjects.later_all(token), subjects.done_all(token)
            )
            done = [record for record in records if subjects.is_done(record.subject)]
            outcome = next(
                (
                    r
                    for r in done
                    if not r.marker
                    and subjects.outcome_state(r.subject) not in (None, State.COMPLETED)
                ),
                None,
            )
            delayed = next(
                (
                    record
                    for record in records
                    if is_delayed(record, self._subjects, self._backend.now())
                ),
                None,
            )
            if outcome is not None:
                expect = Expect(subjects.done_all(token), max(record.sequence for record in done))
                # What a worker of an earlier attempt says of its end, or says again, comes to this claim.
                claim = Claim.on_all_until(await self._backend.last_sequence(subjects.ready_log))
                writes = [
                    Write(released, self._renewed(outcome.body), expect, beside=True),
                    _marker(outcome.subject),
                ]
                writes.append(Write(subjects.claim(token), claim.encode(), ttl=AFTERLIFE))
            elif delayed is not None:
                expect = Expect(delayed.subject, delayed.sequence)
                writes = [
                    Write(
                        released,
                        self._renewed(delayed.body),
                        expect,
                        removes=None if delayed.subject == released else delayed.subject,
                    )
                ]
            else:
                return False
            try:
                await self._dependencies.write_and_sweep(*writes)
            except WriteRefused:  # it moved meanwhile: look again
                continue
            return True
        return False

    def _renewed(self, body: bytes) -> bytes:
        """Return a job as it was when it was new: only its errors tell what was. Its time to live begins now."""
        data = load_json(body)
        for name in (*OUTCOME_FIELDS, "delay_until"):
            data.pop(name, None)
        return dump_json(
            data
            | {"retries": 0, "reruns": data.get("reruns", 0) + 1, "created_at": self._backend.now()}
        )


def _marker(subject: str, expect: Expect | None = None) -> Write:
    """Return the write that removes a record inside a batch; the marker itself goes a second later."""
    return Write(subject, b"", expect, ttl=MARKER_TTL, marker=True)


def _reruns(body: bytes) -> int:
    """Return how often a job was retried by hand; 0 for what is not a job."""
    try:
        reruns = load_json(body).get("reruns")
    except InvalidJob:
        return 0
    return reruns if isinstance(reruns, int) else 0


def is_delayed(record: Record, subjects: QueueSubjects, now: float) -> bool:
    """Return whether a record in transit is of a job that is delayed: jobs are released a little before their time."""
    if record.marker:
        return False
    if subjects.is_later(record.subject, Place.RELEASED):
        return Job.decode(record.body).is_early(now)
    return subjects.is_later(record.subject, Place.DELAYED)
