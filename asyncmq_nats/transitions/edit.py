"""A job that has not started is changed by hand: it runs now, later, or with other arguments.

Each change is one write in the place of the record that was read, and expects that record: a job
that moves meanwhile is read again, and is neither lost nor there twice.
"""

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any, Final

from asyncmq_nats._logging import get_logger
from asyncmq_nats.backends.base import Expect, Record, Timer, Write
from asyncmq_nats.exceptions import WriteRefused, WrongState
from asyncmq_nats.jobs import Job, check_size
from asyncmq_nats.states import Place, State
from asyncmq_nats.store.commit import commit
from asyncmq_nats.store.queue_store import QueueStore
from asyncmq_nats.store.records import TIMER_LEAD, delayed_write
from asyncmq_nats.store.snapshot import Snapshot
from asyncmq_nats.transitions.cancel import is_delayed
from asyncmq_nats.transitions.claim import CLAIM_TTL, Claim
from asyncmq_nats.transitions.timers import CLOCK_SLACK, expect_to_stay, follow_timers, is_ringing
from asyncmq_nats.wire.codec import dump_json, load_json
from asyncmq_nats.wire.keys import decode_token, encode_token

__all__ = ["Edits"]

logger = get_logger(__name__)

MAX_TRIES: Final = 50
"""Refused writes after which a job is said to move too fast."""

NOT_STARTED: Final = "only a job that has not started can be"
BEING_ADDED: Final = "it is being added at this moment; try again"
BEING_MADE_READY: Final = (
    "a worker is about to make it ready, and none may run: try again, or cancel it"
)
HAS_COME: Final = "its time came meanwhile, and it may run with the arguments that it had"
MAY_START: Final = "it may be started at any moment: pause the queue first"

Change = Callable[[dict[str, Any]], dict[str, Any]]
"""Returns the members of a job as they are to be, from those that it has."""


class Edits:
    """Changes of the jobs of one queue that have not started."""

    def __init__(self, store: QueueStore) -> None:
        self._store = store
        self._keys = store.keys

    # -- when it runs

    async def promote(self, job_id: str) -> bool:
        """Let a delayed job run now, with the attempts that it has left.

        Return whether it was delayed.
        """
        return await self._change_delayed(encode_token(job_id), None)

    async def reschedule(self, job_id: str, run_at: float) -> bool:
        """Let a delayed job run at another time (Unix seconds). Return whether it was delayed."""
        return await self._change_delayed(encode_token(job_id), run_at)

    async def _change_delayed(self, token: str, run_at: float | None) -> bool:
        async def change() -> bool:
            snapshot = await self._store.read_snapshot(token)
            delayed = snapshot.later.get(Place.DELAYED)
            if delayed is None or snapshot.ended:
                return await self._change_released(snapshot, run_at)
            if is_ringing(self._store, delayed):
                return run_at is None  # as if it were released
            sequence = await self._store.write(self._moved(delayed, run_at))
            if run_at is not None:
                await expect_to_stay(self._store, delayed, sequence)
            return not await self._undo_if_ended(token, sequence)

        with suppress(WriteRefused):  # others change it each time
            return await commit(change, MAX_TRIES)
        return False

    async def _undo_if_ended(self, token: str, sequence: int) -> bool:
        """Remove what was written if the job was cancelled at that moment; return whether it was.

        A leader that has yet to apply a cancellation takes both writes.
        """
        end = await self._store.read_end(token)
        if not end.ended or end.is_rerun:
            return False
        await self._store.backend.delete(self._keys.bucket_log, sequence)
        return True

    async def _change_released(self, snapshot: Snapshot, run_at: float | None) -> bool:
        """Judge a job that the server has released, some tenths of a second before its time.

        A promoter has it in hand: it can only run now.
        """
        released = snapshot.later.get(Place.RELEASED)
        if released is None or snapshot.ended:
            return False
        return run_at is None and is_delayed(released, self._keys, self._store.now())

    def _moved(self, delayed: Record, run_at: float | None) -> Write:
        """Return the write that lets a delayed job run at another time, or now.

        It takes the timer with it, so the job cannot become due twice.
        """
        data, token = load_json(delayed.body), self._keys.token(delayed.subject)
        expect, now = Expect(delayed.subject, delayed.sequence), self._store.now()
        if run_at is not None and run_at - TIMER_LEAD > now:
            body = dump_json(data | {"delay_until": run_at})
            return delayed_write(self._keys, token, body, (run_at, now), expect)
        data.pop("delay_until", None)
        key = self._keys.later(token, Place.RELEASED)
        return Write(key, dump_json(data), expect, removes=delayed.subject, beside=True)

    # -- what it is called with

    async def edit(self, job_id: str, change: Change) -> bool:
        """Change the members of a job that has not started. Return whether there was such a job.

        Raises:
            WrongState: it has started, or may be started at any moment: the queue is not paused.
            PayloadTooLarge: what it would be is too large for the server.
        """
        token = encode_token(job_id)

        async def edit() -> bool:
            snapshot = await self._store.read_snapshot(token)
            if snapshot.ended and not snapshot.is_rerun:
                raise WrongState(job_id, str(snapshot.state), "edited", NOT_STARTED)
            return await self._edit_there(job_id, snapshot, change)

        with suppress(WriteRefused):  # it moved each time
            return await commit(edit, MAX_TRIES)
        raise WrongState(job_id, "moving", "edited", NOT_STARTED)

    async def _edit_there(self, job_id: str, snapshot: Snapshot, change: Change) -> bool:
        """Change a job where it is. Return whether it is anywhere.

        Raises:
            WriteRefused: it has moved.
        """
        record = snapshot.later.get(Place.DELAYED) or snapshot.later.get(Place.PARKED)
        if record is not None:
            if is_ringing(self._store, record):
                raise WrongState(job_id, State.WAITING, "edited", BEING_MADE_READY)
            write = self._rewritten(record, change)
            sequence = await self._store.write(write)
            if is_ringing(self._store, record, CLOCK_SLACK):
                edited = replace(record, body=write.body, sequence=sequence)
                await self._expect_edited(job_id, edited)
            return not await self._undo_if_ended(snapshot.token, sequence)
        if snapshot.later.get(Place.RELEASED) is not None:
            raise WrongState(job_id, State.WAITING, "edited", BEING_MADE_READY)
        ready = await self._store.last(self._keys.ready_any(snapshot.token))
        if ready:
            await self._edit_ready(job_id, ready[-1], change)
        return bool(ready)

    async def _expect_edited(self, job_id: str, edited: Record) -> None:
        """Wait for the timer of an edited job, and look with which arguments it released the job.

        Raises:
            WrongState: with the old ones, or that cannot be told any more.
        """
        after = await follow_timers(self._store, [edited])
        if all(record.body != edited.body for record in after):
            raise WrongState(job_id, State.WAITING, "edited", HAS_COME)

    def _rewritten(self, record: Record, change: Change) -> Write:
        """Return the write that changes a delayed or a parked job in its place, its timer kept."""
        data = load_json(record.body)
        if "linking" in data:
            job_id = decode_token(self._keys.token(record.subject))
            raise WrongState(job_id, State.WAITING_CHILDREN, "edited", BEING_ADDED)
        body = self._checked_body(change(data), record)
        expect = Expect(record.subject, record.sequence)
        if not self._keys.is_later(record.subject, Place.DELAYED):
            return Write(record.subject, body, expect)
        run_at = float(data.get("delay_until") or record.time)
        released = self._keys.later(self._keys.token(record.subject), Place.RELEASED)
        return Write(record.subject, body, expect, timer=Timer(run_at - TIMER_LEAD, released))

    def _checked_body(self, data: Mapping[str, Any], record: Record) -> bytes:
        body = dump_json(data)
        job = Job.decode(body)
        what = f"job {decode_token(self._keys.token(record.subject))!r} of task {job.task_id!r}"
        limit = self._store.backend.settings.max_job_payload_bytes
        check_size(body, what, self._store.backend.max_body, limit)
        return body

    async def _edit_ready(self, job_id: str, ready: Record, change: Change) -> None:
        """Change a job that a worker could fetch: only while the server gives out nothing.

        The new message takes the place of the old one in one write, last in its tier. Should the
        queue have been resumed at that very moment, and a worker have got the old one, a claim
        makes the server refuse its outcome.
        """
        priority, token = self._keys.split_ready(ready.subject)
        if await self._is_delivered(priority, ready):
            raise WrongState(job_id, State.ACTIVE, "edited", NOT_STARTED)
        if not await self._is_held_back(priority):
            raise WrongState(job_id, State.WAITING, "edited", MAY_START)
        body = self._checked_body(change(load_json(ready.body)), ready)
        write = Write(ready.subject, body, Expect(ready.subject, ready.sequence))
        await self._store.write(write)
        if await self._is_delivered(priority, ready):
            logger.warning("job %s may have started while it was edited: it runs again", job_id)
            await self._void(token, ready.sequence)

    async def _is_delivered(self, priority: int, ready: Record) -> bool:
        tier = await self._store.look_up_tier(priority)
        return tier is not None and tier.delivered_sequence >= ready.sequence

    async def _is_held_back(self, priority: int) -> bool:
        tier = await self._store.look_up_tier(priority)
        return tier is None or tier.paused

    async def _void(self, token: str, sequence: int) -> None:
        """Have the server refuse a worker's outcome of this message, or of an earlier one."""
        claim, key = Claim.on_all_until(sequence), self._keys.claim(token)

        async def void() -> None:
            end = await self._store.read_end(token)
            if not end.ended:
                write = Write(key, claim.encode(), end.fence, ttl=CLAIM_TTL)
                await self._store.write(write)

        await commit(void)
