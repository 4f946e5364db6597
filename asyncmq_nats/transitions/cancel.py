"""Transitions that a person or a program asks for, rather than a worker: retry, remove."""

from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any, Final

from asyncmq_nats._logging import get_logger
from asyncmq_nats.backends.base import Expect, Record, Write
from asyncmq_nats.exceptions import (
    BackendError,
    ConnectionLost,
    InvalidJob,
    Unconfirmed,
    WriteRefused,
)
from asyncmq_nats.jobs import Job
from asyncmq_nats.states import Place, State
from asyncmq_nats.store.commit import commit
from asyncmq_nats.store.queue_store import QueueStore
from asyncmq_nats.store.records import MARKER_TTL, outcome_body, without_markers
from asyncmq_nats.store.snapshot import Snapshot, count_reruns
from asyncmq_nats.transitions.claim import CLAIM_TTL, Claim
from asyncmq_nats.transitions.deliver import OUTCOME_FIELDS
from asyncmq_nats.transitions.finish import PUT_OFF_FIELDS
from asyncmq_nats.transitions.release import Dependencies
from asyncmq_nats.transitions.timers import (
    follow_timers,
    is_ringing,
    remove_overtaken,
    wait_for_timers,
)
from asyncmq_nats.wire.codec import dump_json, load_json
from asyncmq_nats.wire.keys import QueueSubjects, decode_token, encode_token

__all__ = ["PLACES_OF", "Administration", "is_delayed"]

logger = get_logger(__name__)

CANCELLED: Final = "cancelled"
"""The error of a job that was cancelled for no other reason."""
PLACES_OF: Final = {
    State.WAITING: (Place.RELEASED,),
    State.DELAYED: (Place.DELAYED,),
    State.WAITING_CHILDREN: (Place.PARKED,),
}

MAX_TRIES: Final = 20
"""How often a rerun is written that others change at the same time."""


class Administration:
    """The transitions of the jobs of one queue by hand."""

    def __init__(self, store: QueueStore) -> None:
        self._store = store
        self._keys = store.keys
        self._dependencies = Dependencies(store)

    async def remove_delayed(self, job_id: str) -> bool:
        """Remove a job that is delayed. Return whether it was."""
        token = encode_token(job_id)
        for place in (
            Place.DELAYED,
            Place.RELEASED,
        ):  # in this order: the job moves from one to the other
            records = await self._store.last(self._keys.later(token, place))
            if not any(self._is_delayed(record) for record in records):
                continue
            for record in await follow_timers(self._store, records):
                removed = await self._store.delete(record)
                return bool(await remove_overtaken(self._store, [record])) or removed
        return False

    async def take_due(self, jobs: Sequence[Job]) -> list[Job]:
        """Remove released jobs, and return those that were still there to be removed.

        One whose removal is in doubt is the last that is returned: it may run as well, but what has
        been taken is not lost.
        """
        taken = []
        for job in jobs:
            try:
                if await self._delete_record(
                    self._keys.later(encode_token(job.job_id), Place.RELEASED)
                ):
                    taken.append(job)
            except (ConnectionLost, Unconfirmed):
                return [*taken, job]
        return taken

    async def _delete_record(self, subject: str) -> bool:
        records = await self._store.last(subject)
        if not records or records[0].marker:
            return False
        return await self._store.delete(records[0])

    async def cancel(self, job_id: str, reason: str = CANCELLED) -> bool:
        """End a job that has not ended as cancelled, wherever it is. Return whether there was one.

        `reason`: its error. One write records the outcome; what is left of the job is deleted
        afterwards. A worker that runs it must be told.
        """
        token, written = encode_token(job_id), b""

        async def end() -> bool:
            nonlocal written
            snapshot = await self._read_after_timer(token)
            if snapshot.outcome is not None and snapshot.outcome.body != written:
                return False
            if snapshot.outcome is None:  # else the confirmation of ours was lost
                ready = await self._store.last(self._keys.ready_any(token))
                if not snapshot.later and not ready:
                    return False
                writes = self._cancellation(snapshot, ready, reason)
                written = writes[0].body
                await self._dependencies.write_and_sweep(*writes)
            await self._finish_cancellation(snapshot, count_reruns(written))
            if b'"wide"' in written:
                await self._dependencies.forget(token)
            return True

        return await commit(end)

    async def _read_after_timer(self, token: str) -> Snapshot:
        """Return the records of a job; wait for its timer if that goes off at this moment."""
        snapshot = await self._store.read_snapshot(token)
        delayed = snapshot.later.get(Place.DELAYED)
        if delayed is None or not is_ringing(self._store, delayed):
            return snapshot
        await wait_for_timers(self._store, [delayed])
        return await self._store.read_snapshot(token)

    async def finish_cancel(self, job_id: str) -> None:
        """Finish a cancellation whose process died. Repeatable."""
        snapshot = await self._store.read_snapshot(encode_token(job_id))
        if snapshot.outcome is not None and snapshot.state is State.CANCELLED:
            await self._finish_cancellation(snapshot, count_reruns(snapshot.outcome.body))

    def _cancellation(
        self, snapshot: Snapshot, ready: Sequence[Record], reason: str
    ) -> list[Write]:
        """Return the writes that cancel a job: its outcome, and a reminder for its children."""
        source = next(iter([*snapshot.later.values(), *ready]))
        try:
            job = load_json(source.body)
        except InvalidJob:
            job = {"task": "?"}
        outcome = self.cancellation(snapshot.token, job, snapshot.fence, reason)
        reminder = self._reminder(snapshot, outcome.body)
        delayed = snapshot.later.get(Place.DELAYED)
        if reminder:
            return [outcome, *reminder, *self._markers(snapshot, {w.subject for w in reminder})]
        if delayed is not None:
            # Its timer goes with the same message: the job cannot become due any more.
            outcome = replace(outcome, removes=delayed.subject)
        return [outcome]

    @staticmethod
    def _markers(snapshot: Snapshot, kept: Collection[str]) -> list[Write]:
        """Return the writes that remove a job in transit inside a batch.

        Each expects what it removes: on a cluster, a promoter that moves it is then noticed.
        """
        return [
            Write(r.subject, b"", Expect(r.subject, r.sequence), ttl=MARKER_TTL, marker=True)
            for r in snapshot.later.values()
            if r.subject not in kept
        ]

    async def _finish_cancellation(self, snapshot: Snapshot, reruns: int) -> None:
        """Tell the children of a cancelled job, and delete its leftovers.

        Records of a later retry by hand stay.
        """
        keys, token = self._keys, snapshot.token
        try:
            await self._dependencies.release(token)
        except BackendError:
            key = keys.outcome(token, State.CANCELLED)
            if any(not r.marker for r in await self._store.last(key)):
                raise
        for filter in (keys.later_all(token), keys.ready_any(token)):
            for record in without_markers(await self._store.last(filter)):
                if count_reruns(record.body) <= reruns:
                    await self._store.delete(record)
        if snapshot.claim is not None:
            await self._store.delete(snapshot.claim)
        await remove_overtaken(self._store, snapshot.later.values())

    def _reminder(self, snapshot: Snapshot, outcome: bytes) -> list[Write]:
        """Return the write that has a promoter tell the children, should this process die first.

        A promoter reads the reminder as a released job with a chosen id, and checks whether the job
        has ended. Outcome and reminder are one batch. Only a parent needs it.
        """
        job = load_json(outcome)
        if not job.get("children") and not snapshot.edges:
            return []
        there = snapshot.later.get(Place.RELEASED)
        key = self._keys.later(snapshot.token, Place.RELEASED)
        expect = Expect(key, 0 if there is None else there.sequence)
        body = dump_json(job | {"custom_id": True, "retries": 0, "reruns": 0})
        return [Write(key, body, expect)]

    async def remove(self, job_id: str) -> bool:
        """Remove a job that is not running, in any state. Return whether it was removed."""
        token, keys, removed = encode_token(job_id), self._keys, False
        for _ in range(2):  # once more: it may have moved on after its place was read
            records = await self._store.last(keys.later_all(token), keys.ends(token))
            records = await follow_timers(self._store, records)
            ready = await self._store.last(keys.ready_any(token))
            if any([await self._is_taken(record) for record in ready]):
                return False
            for record in [*without_markers(records), *ready]:
                if await self._store.delete(record):
                    removed |= not keys.is_claim(record.subject)
                    if b'"wide"' in record.body:
                        await self._dependencies.forget(token)
            removed |= bool(await remove_overtaken(self._store, records))
        return removed

    async def _is_taken(self, ready: Record) -> bool:
        priority, _ = self._keys.split_ready(ready.subject)
        tier = await self._store.look_up_tier(priority)
        return tier is not None and ready.sequence <= tier.delivered_sequence

    def cancellation(
        self,
        token: str,
        job: Mapping[str, Any],
        expect: Expect,
        reason: str = CANCELLED,
        removes: str | None = None,
    ) -> Write:
        """Return the write of an outcome `cancelled`. `removes`: the record of a delayed job."""
        now = self._store.now()
        fields = {
            "id": decode_token(token),
            "status": State.CANCELLED,
            "finished_at": now,
            "last_error": reason,
        }
        subject = self._keys.outcome(token, State.CANCELLED)
        return Write(
            subject,
            outcome_body(job, fields, self._store.backend.max_body),
            expect,
            ttl=self._store.assets.settings.failed_ttl,
            removes=removes,
            beside=True,
            index=self._keys.index(token, State.CANCELLED),
        )

    async def rerun(self, job_id: str) -> bool:
        """Release a job that ended badly, or that is delayed, as if it were new.

        Return whether it was in such a state, and was not retried by another caller.
        """
        with suppress(WriteRefused):  # others retry it each time
            return await commit(partial(self._rerun, encode_token(job_id)), MAX_TRIES)
        return False

    async def _rerun(self, token: str) -> bool:
        snapshot = await self._read_after_timer(token)
        if snapshot.ended:
            return await self._rerun_ended(snapshot)
        delayed = [record for record in snapshot.later.values() if self._is_delayed(record)]
        return bool(delayed) and await self._rerun_delayed(token, delayed[0])

    async def _rerun_ended(self, snapshot: Snapshot) -> bool:
        """Void what earlier workers may still write, release the job, then delete the outcome.

        The released record is the transaction: a promoter that finds it beside the outcome of an
        earlier run finishes the rerun. It expects nothing new in transit, so only one caller
        releases it.
        """
        if snapshot.outcome is None or snapshot.state is State.COMPLETED:
            return False
        keys, released = self._keys, not snapshot.is_rerun
        if released:
            job = load_json(snapshot.outcome.body)
            if job.get("truncated"):
                text = "job %s cannot be retried: its arguments were not kept; add it again"
                logger.warning(text, decode_token(snapshot.token))
                return False
            if snapshot.claim is None or not Claim.decode(snapshot.claim.body).voids_all:
                await self._void_earlier_runs(snapshot)
            key = keys.later(snapshot.token, Place.RELEASED)
            expect = Expect(keys.later_all(snapshot.token), snapshot.last_later)
            await self._store.write(Write(key, self.renewed(job), expect, beside=True))
        await self._store.delete(snapshot.outcome)
        return released

    async def _void_earlier_runs(self, snapshot: Snapshot) -> None:
        keys = self._keys
        claim = Claim.on_all_until(await self._store.backend.last_sequence(keys.ready_log))
        key = keys.claim(snapshot.token)
        write = Write(key, claim.encode(), snapshot.fence, ttl=CLAIM_TTL)
        await self._store.write(write)

    async def _rerun_delayed(self, token: str, delayed: Record) -> bool:
        released = self._keys.later(token, Place.RELEASED)
        write = Write(
            released,
            self.renewed(load_json(delayed.body)),
            Expect(delayed.subject, delayed.sequence),
            removes=None if delayed.subject == released else delayed.subject,
        )
        await self._store.write(write)
        return True

    def _is_delayed(self, record: Record) -> bool:
        return is_delayed(record, self._keys, self._store.now())

    def renewed(self, data: dict[str, Any]) -> bytes:
        """Return a job as if it were new, but with its errors.

        Its time to live begins now. Changes `data`.
        """
        for name in (*OUTCOME_FIELDS, *PUT_OFF_FIELDS, "delay_until"):
            data.pop(name, None)
        return dump_json(
            data
            | {"retries": 0, "reruns": data.get("reruns", 0) + 1, "created_at": self._store.now()}
        )


def is_delayed(record: Record, keys: QueueSubjects, now: float) -> bool:
    """Return whether a record in transit is of a job that is delayed.

    Jobs are released a little before their time.
    """
    if record.marker:
        return False
    if keys.is_later(record.subject, Place.RELEASED):
        try:
            return Job.decode(record.body).is_early(now)
        except InvalidJob:  # a promoter makes it ready, for a worker to record as failed
            return False
    return keys.is_later(record.subject, Place.DELAYED)
