"""Jobs move to another queue, also on another server. Each is held there before it ends here.

1. *hold*: the job is written to the other queue as a delayed job that says where it comes from, and
   whose timer is years away.
2. *end*: it is cancelled here, which no worker and no timer can miss.
3. *release*: the hold becomes what the job was.
4. The cancelled outcome here is removed.

A mover that dies leaves a hold, which the next one finishes: by what has become of the job here.
"""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any, Final

from anyio import CancelScope

from asyncmq_nats.backends.base import Expect, Record, Timer, Write
from asyncmq_nats.exceptions import InvalidJob, WriteRefused
from asyncmq_nats.states import OUTCOMES, Place, State
from asyncmq_nats.store.many import for_each
from asyncmq_nats.store.queue_store import QueueStore
from asyncmq_nats.store.records import MOVED_FROM, delayed_write, without_markers
from asyncmq_nats.store.search import Found
from asyncmq_nats.store.secret import QueueSecret, keyed_id
from asyncmq_nats.transitions.add import Additions
from asyncmq_nats.transitions.cancel import Administration
from asyncmq_nats.transitions.clean import Progress
from asyncmq_nats.wire.codec import dump_json, load_json
from asyncmq_nats.wire.keys import encode_token

__all__ = ["MOVABLE_STATES", "Moved", "Mover", "write_outcome"]

MOVES_UNDER_WAY: Final = 16
HOLD_TIME: Final = 10 * 365 * 86_400.0
"""Seconds after which a hold would become due by itself."""
MOVED_TO: Final = "moved to queue "
"""How the error of a job begins that a mover ended. It is removed once the job is there."""
MOVABLE_STATES: Final = (State.WAITING, State.DELAYED, *OUTCOMES)
"""States in which a job can be moved. Running jobs stay, and so do jobs that wait for others."""


@dataclass(frozen=True, slots=True)
class Moved:
    """The result of `Queue.move`.

    `matched`: jobs that match. `moved`: those that are in the other queue now; the others stay:
    they have moved on, are part of a flow, or the other queue has a job with their id.
    """

    matched: int
    moved: int


@dataclass(frozen=True, slots=True)
class Side:
    """One of the two queues."""

    additions: Additions
    administration: Administration

    @property
    def store(self) -> QueueStore:
        """The records of the queue."""
        return self.additions.store


class Mover:
    """Moves jobs from one queue to another."""

    def __init__(self, here: Side, there: Side) -> None:
        self._here = here
        self._there = there
        self._source, self._target = here.store, there.store
        self._reason = f"{MOVED_TO}{there.store.keys.queue!r}"
        self._secret = QueueSecret(here.store)

    async def _origin(self) -> str:
        """Return what no other queue has, not even one of the same name on another server."""
        queue = self._source.keys.queue
        return f"{queue}:{keyed_id(await self._secret.get(), MOVED_FROM)}"

    async def move(
        self, pages: AsyncIterator[list[Found]], holds: AsyncIterator[list[Found]], told: Progress
    ) -> Moved:
        """Move the jobs of a search. `holds`: the delayed jobs of the other queue."""
        async for page in holds:
            for found in page:
                await self._finish(found)
        matched = moved = 0

        async def move_one(found: Found) -> None:
            nonlocal moved
            was_moved = await self._move(found)
            moved += was_moved

        async for page in pages:
            await for_each(move_one, page, limit=MOVES_UNDER_WAY)
            matched += len(page)
            if page:
                told(matched)
        return Moved(matched, moved)

    async def _move(self, found: Found) -> bool:
        job = found.job
        if job.depends_on or job.children or await self._is_awaited(job.job_id):
            return False
        if job.status is State.CANCELLED and (job.last_error or "").startswith(MOVED_TO):
            return False  # an interrupted move is finished by this outcome, maybe to a third queue
        missing = await self._there.additions.plans.missing([job.job_id])
        if job.job_id not in missing:
            return False
        try:
            data = found.stored() | {"custom_id": True}
        except InvalidJob:  # a worker records it as failed
            return False
        try:
            if job.status in OUTCOMES:
                await write_outcome(self._there.additions, data, job.status)
                return await self._source.delete(found.record)
            sequence = await self._hold(data, missing[job.job_id])
        except WriteRefused:  # a job with that id has appeared there
            return False
        return await self._end_and_release(job.job_id, data, sequence)

    async def _is_awaited(self, job_id: str) -> bool:
        found = await self._source.last(self._source.keys.edge(encode_token(job_id), "*"))
        return bool(without_markers(found))

    async def _hold(self, data: dict[str, Any], last: int) -> int:
        keys, token = self._target.keys, encode_token(data["id"])
        body = dump_json(data | {MOVED_FROM: await self._origin()})
        timer = Timer(self._target.now() + HOLD_TIME, keys.later(token, Place.RELEASED))
        key = keys.later(token, Place.DELAYED)
        write = Write(key, body, Expect(keys.later_all(token), last), timer=timer)
        return await self._target.write(write)

    async def _end_and_release(self, job_id: str, data: dict[str, Any], sequence: int) -> bool:
        """End a job here, and make of its hold what the job was.

        Return whether this did it. Shielded: an interruption does not tear it.
        """
        administration = self._here.administration
        with CancelScope(shield=True):
            if not await administration.cancel(job_id, self._reason):
                if await self._our_outcome(job_id) is None:
                    await self._target.backend.delete(self._target.keys.bucket_log, sequence)
                    return False
                # Another mover ended it, and may have died since: its message may be there still.
                await administration.finish_cancel(job_id)
            try:
                await self._release(data, sequence)
            except WriteRefused:  # another mover released it, or a user changed the hold
                return False
            await self._remove_outcome(job_id)
        return True

    async def _release(self, data: dict[str, Any], sequence: int) -> None:
        keys, token, now = self._target.keys, encode_token(data["id"]), self._target.now()
        held = keys.later(token, Place.DELAYED)
        run_at = data.get("delay_until")
        times = (float(run_at) if isinstance(run_at, int | float) else now, now)
        write = delayed_write(keys, token, dump_json(data), times, Expect(held, sequence))
        if write.subject != held:
            write.removes = held
        await self._target.write(write)

    async def _remove_outcome(self, job_id: str) -> None:
        record = await self._our_outcome(job_id)
        if record is not None:
            await self._source.delete(record)

    async def _our_outcome(self, job_id: str) -> Record | None:
        """Return the outcome of a job here if a mover ended it."""
        snapshot = await self._source.read_snapshot(encode_token(job_id))
        if snapshot.state is not State.CANCELLED or snapshot.outcome is None:
            return None
        ended_by = load_json(snapshot.outcome.body).get("last_error")
        return snapshot.outcome if ended_by == self._reason else None

    async def _finish(self, found: Found) -> None:
        """Finish what another mover began, if this is a hold of a job from here.

        If nothing is left of the job here, what became of it is unknown: the hold is kept.
        """
        try:
            data = load_json(found.record.body)
        except InvalidJob:
            return
        if MOVED_FROM not in data or data.pop(MOVED_FROM) != await self._origin():
            return
        if await self._here.additions.plans.exists(found.job.job_id):
            await self._end_and_release(found.job.job_id, data, found.record.sequence)


async def write_outcome(additions: Additions, data: dict[str, Any], state: State) -> None:
    """Store how a job ended in a queue that does not have it.

    Raises:
        WriteRefused: it has.
    """
    store, token = additions.store, encode_token(str(data["id"]))
    keys, settings = store.keys, store.assets.settings
    completed = state is State.COMPLETED
    write = Write(
        keys.outcome(token, state),
        dump_json(data),
        Expect(keys.done_all(token)),
        ttl=settings.completed_ttl if completed else settings.failed_ttl,
        index=None if completed else keys.index(token, state),
    )
    await store.write(write)
