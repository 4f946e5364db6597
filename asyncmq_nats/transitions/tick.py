"""A tick is due: its job is made, and the next tick is planned.

Four single writes, in this order: the job, the next tick (which expects the fire as it was
delivered), the removal of the fire, the acknowledgement. A crash in between is repeated by the
redelivery: the job's id is that of the planned time, so it is made once. Each change of a
definition touches a fire that is there, so one of the two is refused.
"""

from collections.abc import Sequence
from dataclasses import replace
from enum import Enum, auto
from functools import partial
from typing import Final

from asyncmq_nats._logging import get_logger
from asyncmq_nats.backends.base import Delivery, Expect, Record, Write
from asyncmq_nats.exceptions import InvalidJob, TooManyPriorities
from asyncmq_nats.jobs import Job
from asyncmq_nats.schedules import missed_ticks, next_run, next_run_after
from asyncmq_nats.store.commit import look_for, looks
from asyncmq_nats.store.queue_store import QueueStore
from asyncmq_nats.store.records import without_markers
from asyncmq_nats.store.secret import QueueSecret, keyed_id
from asyncmq_nats.store.snapshot import filters_of
from asyncmq_nats.store.topology import DEFAULT_PRIORITY
from asyncmq_nats.transitions.definition import (
    Definition,
    Tick,
    decode_definition,
    fingerprint,
    job_of,
    next_tick_write,
)
from asyncmq_nats.wire.codec import dump_json
from asyncmq_nats.wire.keys import encode_token

__all__ = ["TickEnd", "Ticker", "read_fire"]

logger = get_logger(__name__)

CATCH_UP_SECONDS: Final = 30.0
"""Ticks that were late because a worker died are all made up for, if they are no later."""
SHORT_DELAY_SECONDS: Final = 3.0
"""More seconds are an outage. Ticks that were late because a process or a server was busy are all
made up for."""
CACHED_DEFINITIONS: Final = 10_000
"""Definitions that a process keeps parsed."""

read_fire: Final = Tick.decode


class TickEnd(Enum):
    """The disposition of a fire that was carried out."""

    ACK = auto()
    """The next tick has taken its place."""
    REMOVE = auto()
    """Remove it, then acknowledge."""
    UNSEEN = auto()
    """It is not there: it cannot be delivered again; or a replica has yet to hear of it."""


class Ticker:
    """Carries out the ticks of one queue."""

    def __init__(self, store: QueueStore, secret: QueueSecret) -> None:
        self._store = store
        self._keys = store.keys
        self._secret = secret
        self._definitions: dict[tuple[str, str], tuple[Definition, bytes]] = {}
        """By id and fingerprint, with the record's body."""

    async def fire(self, delivery: Delivery, *, trusted: bool) -> TickEnd:
        """Make the job of a tick that is due, and plan the next one.

        A repeatable that was changed, paused or removed meanwhile makes none.

        Args:
            delivery: of `fire.<rid>`.
            trusted: it is a fresh first delivery, so the fire is there, and its definition is the
                one it was planned with.

        Raises:
            InvalidJob: it is no tick.
        """
        tick, rid = Tick.decode(delivery.body), self._keys.rid(delivery.subject)
        known = self._definitions.get((rid, tick.of)) if trusted else None
        if known is None:
            found = await self._look_up(delivery, rid, tick)
            if isinstance(found, TickEnd):
                return found
            known = found
        definition, now = known[0], self._store.now()
        due = due_times(definition, tick, now, again=delivery.deliveries > 1)
        if definition.overlap == "skip" and due:
            # The first one: a repetition after a crash makes the same job.
            due = [] if await self._is_unfinished(tick.last) else due[:1]
        jobs = [job_of(definition, at, now) for at in due]
        await self._make(jobs, again=not trusted)
        return await self._plan_next(delivery, known, tick, due, now)

    async def _look_up(
        self, delivery: Delivery, rid: str, tick: Tick
    ) -> tuple[Definition, bytes] | TickEnd:
        """Return the definition, or the disposition of a fire that makes no job."""
        keys, token = self._keys, encode_token(rid)
        names = keys.repeat(token), keys.tick(token), keys.fire(token)
        records = {
            record.subject: record for record in without_markers(await self._store.last(*names))
        }
        stored, planned, fire = (records.get(name) for name in names)
        if fire is None or fire.sequence != delivery.sequence:
            return TickEnd.ACK if fire and fire.sequence > delivery.sequence else TickEnd.UNSEEN
        if stored is None:
            return TickEnd.REMOVE
        definition = self._parse(rid, stored)
        if definition is None or definition.paused or definition.finished:
            return TickEnd.REMOVE
        if tick.of not in ("", fingerprint(stored.body)):  # it was planned before a change
            if planned is not None:
                return TickEnd.REMOVE
            # Its timer took away the tick that the change had planned: the series goes on.
            known = definition, stored.body
            return await self._plan_next(delivery, known, tick, [], self._store.now())
        if delivery.deliveries > 1 and planned is not None and _is_after(planned, tick):
            return TickEnd.REMOVE  # its worker died after it had planned the next one
        return definition, stored.body

    def _parse(self, rid: str, stored: Record) -> Definition | None:
        name = rid, fingerprint(stored.body)
        known = self._definitions.get(name)
        if known is not None:
            return known[0]
        try:
            definition = decode_definition(stored.body, rid)
        except InvalidJob as problem:
            logger.warning("repeatable %.200r is skipped: %s", stored.subject, problem)
            return None
        if len(self._definitions) >= CACHED_DEFINITIONS:
            self._definitions.clear()
        self._definitions[name] = definition, stored.body
        return definition

    async def _is_unfinished(self, job_id: str | None) -> bool:
        """Return whether a job is there and has not ended."""
        if job_id is None:
            return False
        read = partial(self._store.read_stage, encode_token(job_id))
        return await look_for(read, looks(self._store.backend)) == "unfinished"

    # -- jobs

    async def _make(self, jobs: Sequence[Job], *, again: bool) -> None:
        """Make the jobs of a tick. `again`: they may be there, or have ended."""
        if again and jobs:
            existing = await self._existing([encode_token(job.job_id) for job in jobs])
            jobs = [job for job in jobs if encode_token(job.job_id) not in existing]
        for job in jobs:
            priority, token = await self._tier_of(job), encode_token(job.job_id)
            write = Write(
                self._keys.ready(priority, token),
                job.encode(),
                Expect(self._keys.ready_any(token)),
                message_id=keyed_id(await self._secret.get(), "tick", job.job_id),
            )
            if await self._store.write_if_expected(write) is None:
                logger.debug("job %s of a repeatable is there already", job.job_id)

    async def _tier_of(self, job: Job) -> int:
        try:
            await self._store.assets.declare_tier(job.priority)
        except TooManyPriorities as error:
            logger.error("job %s runs with priority %d: %s", job.job_id, DEFAULT_PRIORITY, error)
            return DEFAULT_PRIORITY
        return job.priority

    async def _existing(self, tokens: Sequence[str]) -> set[str]:
        keys = self._keys
        bucket = await self._store.last(*filters_of(tokens, keys))
        ready = await self._store.last(*(keys.ready_any(token) for token in tokens))
        found = without_markers([*bucket, *ready])
        return {keys.token(record.subject) for record in found}

    # -- the next tick

    async def _plan_next(
        self,
        delivery: Delivery,
        known: tuple[Definition, bytes],
        tick: Tick,
        due: Sequence[float],
        now: float,
    ) -> TickEnd:
        """Plan the tick after those that were due at `now`.

        One that has come since is that tick.
        """
        definition, body = known
        rid = definition.rid
        last = job_of(definition, due[-1], now).job_id if due else tick.last
        at = following(definition, tick, due, now)
        planned = definition.plan(at, body, runs=tick.runs + len(due), last=last)
        expect = Expect(delivery.subject, delivery.sequence)
        if definition.is_done(planned):
            ended = replace(definition, finished=True, left=planned)
            key = self._keys.repeat(encode_token(rid))
            write = Write(key, dump_json(ended), expect)
        else:
            write = next_tick_write(self._keys, rid, planned, now, expect)
        if await self._store.write_if_expected(write) is None:
            logger.debug("repeatable %s was changed, or its tick was carried out elsewhere", rid)
            return TickEnd.ACK
        return TickEnd.ACK if write.subject == delivery.subject else TickEnd.REMOVE


def _is_after(record: Record, tick: Tick) -> bool:
    try:
        return Tick.decode(record.body).at > tick.at
    except InvalidJob:
        return False


def due_times(definition: Definition, tick: Tick, now: float, *, again: bool) -> list[float]:
    """Return the planned times for which a tick makes jobs. `again`: a worker died with it in hand.

    A short delay loses none. After an outage the definition decides: by default one.
    """
    schedule, late = definition.schedule, now - tick.run_at
    if late <= (CATCH_UP_SECONDS if again else SHORT_DELAY_SECONDS):
        # With jitter, `now` may be later than the planned time by nearly an interval.
        due = missed_ticks(schedule, tick.at, tick.at + max(late, 0.0))
    elif definition.catch_up == "all":
        due = missed_ticks(schedule, tick.at, now)
    else:
        due = [] if definition.catch_up == "none" else [tick.at]
    if schedule.end is not None:
        due = [at for at in due if at <= schedule.end]
    return due if definition.limit is None else due[: max(0, definition.limit - tick.runs)]


def following(definition: Definition, tick: Tick, due: Sequence[float], now: float) -> float:
    """Return the planned time of the tick after those that were carried out."""
    last = due[-1] if due else tick.at
    if definition.catch_up == "all" and due:  # the rest is carried out next
        return next_run(definition.schedule, last)
    return next_run_after(definition.schedule, last, now)
