"""Transitions that a person or a program asks for, rather than a worker: retry, remove."""

from collections.abc import Sequence
from typing import Final

from asyncmq_nats.backends.base import Backend, Expect, Write
from asyncmq_nats.exceptions import InvalidJob, WriteRefused
from asyncmq_nats.jobs import Job, dump_json, load_json
from asyncmq_nats.lifecycle import MARKER_TTL
from asyncmq_nats.states import Place, State
from asyncmq_nats.subjects import QueueSubjects, decode_token, encode_token

__all__ = ["Administration"]

OUTCOME_FIELDS: Final = (
    "status", "result", "last_error", "error_traceback", "active_since", "finished_at", "worker", "stalls", "delay_until",
)  # fmt: skip
"""What a job has only because of what became of it."""


class Administration:
    """What can be done to the jobs of one queue by hand."""

    def __init__(self, backend: Backend, subjects: QueueSubjects) -> None:
        self._backend = backend
        self._subjects = subjects

    async def remove_delayed(self, job_id: str) -> bool:
        """Remove a job that is delayed. Return whether it was."""
        return await self._delete_record(self._subjects.later(encode_token(job_id), Place.DELAYED))

    async def take_due(self, jobs: Sequence[Job]) -> list[Job]:
        """Remove released jobs, and return those that were still there to be removed."""
        return [job for job in jobs if await self._delete_record(self._subjects.later(encode_token(job.job_id), Place.RELEASED))]

    async def _delete_record(self, subject: str) -> bool:
        records = await self._backend.last(self._subjects.bucket_log, subject)
        if not records or records[0].marker:
            return False
        return await self._backend.delete(self._subjects.bucket_log, records[0].sequence)

    async def cancel(self, job_id: str) -> bool:
        """End a job that has not ended as cancelled, wherever it is. Return whether there was one. A worker that runs it must be told."""
        token, subjects = encode_token(job_id), self._subjects
        while True:
            records = await self._backend.last(subjects.bucket_log, subjects.later_all(token), subjects.done_all(token))
            ready = await self._backend.last(subjects.ready_log, subjects.ready_any(token))
            live = [record for record in records if not record.marker]
            if any(subjects.outcome_state(record.subject) for record in live):
                return False
            later = [record for record in live if not subjects.is_claim(record.subject) and ".done." not in record.subject]
            sources = later + ready
            if not sources:
                return False
            last = max((record.sequence for record in records if ".done." in record.subject), default=0)
            removed = [record.subject for record in live if record in later or subjects.is_claim(record.subject)]
            outcome = self._cancelled(token, sources[0].body, Expect(subjects.done_all(token), last))
            try:
                await self._write_and_sweep(outcome, *(_marker(subject) for subject in removed))
            except WriteRefused:  # it moved or ended meanwhile: look again
                continue
            for record in await self._backend.last(subjects.ready_log, subjects.ready_any(token)):
                await self._backend.delete(subjects.ready_log, record.sequence)
            return True

    def _cancelled(self, token: str, body: bytes, expect: Expect) -> Write:
        try:
            job = load_json(body)
        except InvalidJob:
            job = {"task": "?"}
        now = self._backend.now()
        job |= {"id": decode_token(token), "status": State.CANCELLED, "finished_at": now, "last_error": "cancelled"}
        subject = self._subjects.outcome(token, State.CANCELLED)
        return Write(subject, dump_json(job), expect, ttl=self._backend.settings.failed_ttl)

    async def rerun(self, job_id: str) -> bool:
        """Release a job that ended badly, or that is delayed, as if it were new. Return whether it was in such a state."""
        token, subjects = encode_token(job_id), self._subjects
        released = subjects.later(token, Place.RELEASED)
        for _ in range(10):
            records = await self._backend.last(subjects.bucket_log, subjects.later(token, Place.DELAYED), subjects.done_all(token))
            done = [record for record in records if ".done." in record.subject]
            outcome = next((r for r in done if not r.marker and subjects.outcome_state(r.subject) not in (None, State.COMPLETED)), None)
            delayed = next((r for r in records if not r.marker and subjects.is_later(r.subject, Place.DELAYED)), None)
            if outcome is not None:
                expect = Expect(subjects.done_all(token), max(record.sequence for record in done))
                writes = [Write(released, self._renewed(outcome.body), expect)]
                writes.append(_marker(outcome.subject))
            elif delayed is not None:
                expect = Expect(delayed.subject, delayed.sequence)
                writes = [Write(released, self._renewed(delayed.body), expect, removes=delayed.subject)]
            else:
                return False
            try:
                await self._write_and_sweep(*writes)
            except WriteRefused:  # it moved meanwhile: look again
                continue
            return True
        return False

    async def _write_and_sweep(self, *writes: Write) -> None:
        """Write a batch, and then remove its markers at once: they would be counted as records for the second that they live."""
        last = await self._backend.write(self._subjects.bucket_log, *writes)
        for number, write in enumerate(reversed(writes)):  # the sequences of a batch are consecutive
            if write.marker:
                await self._backend.delete(self._subjects.bucket_log, last - number)

    def _renewed(self, body: bytes) -> bytes:
        """Return a job as it was when it was new: only its errors tell what was. Its time to live begins now."""
        data = load_json(body)
        for name in OUTCOME_FIELDS:
            data.pop(name, None)
        return dump_json(data | {"retries": 0, "created_at": self._backend.now()})


def _marker(subject: str) -> Write:
    """Return the write that removes a record inside a batch; the marker itself goes a second later."""
    return Write(subject, b"", ttl=MARKER_TTL, marker=True)
