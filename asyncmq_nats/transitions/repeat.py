"""Jobs that repeat: their definitions, stored, changed, paused and removed.

A definition is `repeat.<rid>`. Its next tick is `tick.<rid>`, a timer of the server that turns into
`fire.<rid>`, which a promoter carries out (`tick.py`). A change is one batch, and touches a fire
that is there: so a tick that was due before does not come to what was changed. Changes are rare.
The series are computed in `schedules`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Final

from asyncmq_nats._clock import brief_pause
from asyncmq_nats._logging import get_logger
from asyncmq_nats.backends.base import Expect, Record, Write
from asyncmq_nats.exceptions import InvalidJob
from asyncmq_nats.jobs import check_size
from asyncmq_nats.schedules import RepeatableInfo, first_run, next_run_after
from asyncmq_nats.store.queue_store import QueueStore
from asyncmq_nats.store.records import without_markers
from asyncmq_nats.transitions.definition import (
    CODE_OWNER,
    MARKER_TTL,
    TICK_LEAD,
    Definition,
    Tick,
    decode_definition,
    fingerprint,
    job_of,
    make_definition,
    next_tick_write,
    planned_time,
    repeatable_id,
)
from asyncmq_nats.transitions.timers import CLOCK_SLACK, OVERTAKING_SECONDS, wait_for_timers
from asyncmq_nats.wire.codec import dump_json
from asyncmq_nats.wire.keys import encode_token

__all__ = ["Definition", "RepeatableInfo", "Repeatables", "make_definition", "repeatable_id"]

logger = get_logger(__name__)

PAGE_SIZE: Final = 500
TICK_SLACK: Final = 0.2
"""Seconds before its timer from which a tick is not changed any more: see `timers.py`."""


class Repeatables:
    """The repeatables of one queue."""

    def __init__(self, store: QueueStore) -> None:
        self._store = store
        self._backend = store.backend
        self._keys = store.keys

    async def upsert(self, definition: Definition) -> float:
        """Store a definition and return its next run; `inf` if none is to come.

        The same one again changes nothing. A pause outlasts every change, and a series whose
        schedule is not changed goes on as it was planned.

        Raises:
            PayloadTooLarge: its jobs are too large for the server.
        """
        sample = job_of(definition, self._store.now(), self._store.now()).encode()
        check_size(
            sample,
            f"the repeated job of task {definition.task_id!r}",
            self._backend.max_body,
            self._backend.settings.max_job_payload_bytes,
        )
        while True:
            records = await self._read_after_timer(definition.rid)
            stored, tick, now = (
                self._definition_in(records),
                self._tick_in(records),
                self._store.now(),
            )
            if (
                stored is not None
                and stored.same_as(definition)
                and (self._goes_on(records) or stored.paused or stored.finished)
            ):
                return _next_of(stored, tick, now)
            at = await self._put(*_changed(stored, tick, definition, now), records)
            if at is not None:
                return at

    async def _put(
        self, definition: Definition, tick: Tick | None, records: Mapping[str, Record]
    ) -> float | None:
        """Write a definition and, unless it is paused or finished, its next tick.

        Return the time of its next run, or `None` if what was read has changed since.
        """
        key = self._keys.repeat(encode_token(definition.rid))
        fire = self._keys.fire(encode_token(definition.rid))
        body, writes = dump_json(definition), list[Write]()
        if tick is not None and not definition.paused and not definition.finished:
            planned = definition.plan(tick.at, body, runs=tick.runs, last=tick.last)
            writes.append(next_tick_write(self._keys, definition.rid, planned, self._store.now()))
        writes += [
            Write(record.subject, b"", ttl=MARKER_TTL, marker=True)
            for record in without_markers(records.values())
            if record.subject != key and record.subject not in {write.subject for write in writes}
        ]
        expect = Expect(key, _sequence(records, key))
        writes.append(Write(key, body, expect))
        if not await self._write(_fenced(writes, fire, records), definition.rid, records):
            return None
        return _next_of(definition, tick, self._store.now())

    async def _write(
        self, writes: Sequence[Write], rid: str, records: Mapping[str, Record]
    ) -> bool:
        """Write, and return whether what was read still held.

        A write that took so long that the timer of the tick has gone off looks whether it holds.
        """
        if await self._store.write_if_expected(*writes) is None:
            return False
        if self._ringing(rid, records, CLOCK_SLACK) is None:
            return True
        await brief_pause(OVERTAKING_SECONDS)
        records = await self._read(rid)
        definition = self._definition_in(records)
        if definition is None or definition.paused or definition.finished:
            return self._tick_in(records) is None
        return self._goes_on(records)

    def _goes_on(self, records: Mapping[str, Record]) -> bool:
        """Return whether there is a tick that was planned with the definition that is there."""
        record, tick = self._record_in(records), self._tick_in(records)
        return record is not None and tick is not None and tick.of in ("", fingerprint(record.body))

    async def _read_after_timer(self, rid: str) -> dict[str, Record]:
        """Return what is stored of one; wait for its timer if that goes off at this moment.

        Its tick would be carried out, and the series go on, in spite of what is written now.
        """
        records = await self._read(rid)
        ringing = self._ringing(rid, records)
        if ringing is None:
            return records
        await wait_for_timers(self._store, [ringing])
        return await self._read(rid)

    def _ringing(
        self, rid: str, records: Mapping[str, Record], slack: float = TICK_SLACK
    ) -> Record | None:
        """Return the record of the tick if its timer goes off, within `slack` seconds."""
        record = records.get(self._keys.tick(encode_token(rid)))
        if record is None or not self._backend.timers_lag:
            return None
        tick = self._tick_in({record.subject: record})
        is_due = tick is not None and tick.run_at - TICK_LEAD - slack <= self._store.now()
        return record if is_due else None

    async def _read(self, rid: str) -> dict[str, Record]:
        token = encode_token(rid)
        records = await self._store.last(
            self._keys.repeat(token),
            self._keys.tick(token),
            self._keys.fire(token),
        )
        return {record.subject: record for record in records}

    def _record_in(self, records: Mapping[str, Record]) -> Record | None:
        return next(
            (r for r in records.values() if self._keys.is_repeat(r.subject) and not r.marker),
            None,
        )

    def _definition_in(self, records: Mapping[str, Record]) -> Definition | None:
        """Return the definition; `None` if there is none, or one that cannot be run."""
        record = self._record_in(records)
        if record is None:
            return None
        try:
            return decode_definition(record.body, self._keys.rid(record.subject))
        except InvalidJob as problem:
            logger.warning("repeatable %.200r is skipped: %s", record.subject, problem)
            return None

    def _tick_in(self, records: Mapping[str, Record]) -> Tick | None:
        """Return the next tick among the records of a repeatable. A malformed one is no tick."""
        ticks = list[Tick]()
        for record in without_markers(records.values()):
            if not self._keys.is_repeat(record.subject):
                try:
                    ticks.append(Tick.decode(record.body))
                except InvalidJob as problem:
                    logger.debug("repeatable %.200r is skipped: %s", record.subject, problem)
        return min(ticks, key=lambda tick: tick.at, default=None)

    async def find(self, rid: str) -> Definition | None:
        """Return the definition of that id; `None` if there is none, or one that cannot be run."""
        return self._definition_in(await self._read(rid))

    async def read_all(self) -> list[RepeatableInfo]:
        """Return all of them."""
        found: list[RepeatableInfo] = []
        for _, definition in await self._all():
            tick = self._tick_in(await self._read(definition.rid))
            found.append(_info_of(definition, tick))
        return found

    async def _all(self) -> list[tuple[Record, Definition]]:
        found, start = list[tuple[Record, Definition]](), 1
        while page := await self._backend.page(
            self._keys.bucket_log, self._keys.repeat("*"), from_sequence=start, limit=PAGE_SIZE
        ):
            for record in page:
                definition = self._definition_in({record.subject: record})
                if definition is not None:
                    found.append((record, definition))
            start = page[-1].sequence + 1
        return found

    async def remove(self, rid: str) -> bool:
        """Remove one. Return whether it was there."""
        was_there = False
        while True:
            records = await self._read_after_timer(rid)
            if self._record_in(records) is not None:
                was_there = True
            elif not was_there or self._tick_in(records) is None:
                return was_there
            if await self._remove(rid, records):
                return True

    async def _remove(self, rid: str, records: Mapping[str, Record]) -> bool:
        """Remove what was read. Return `False` if it has changed since."""
        key, fire = self._keys.repeat(encode_token(rid)), self._keys.fire(encode_token(rid))
        writes = [
            Write(
                record.subject,
                b"",
                Expect(key, record.sequence) if record.subject == key else None,
                ttl=MARKER_TTL,
                marker=True,
            )
            for record in without_markers(records.values())
        ]
        return await self._write(_fenced(writes, fire, records), rid, records)

    async def pause(self, rid: str) -> bool:
        """Stop its series. Return whether it was there."""
        while True:
            records = await self._read_after_timer(rid)
            definition = self._definition_in(records)
            tick = self._tick_in(records)
            if definition is None or (definition.paused and tick is None):
                return definition is not None
            left = tick or definition.left
            paused = replace(definition, paused=True, left=left)
            if await self._put(paused, None, records) is not None:
                return True

    async def resume(self, rid: str) -> float:
        """Let a paused series go on and return its next run; `inf` if none is to come.

        It starts again from now, or with what was missed, as its `catch_up` says. One that is not
        paused is left alone.

        Raises:
            KeyError: it is not there.
        """
        while True:
            records = await self._read_after_timer(rid)
            definition, tick = self._definition_in(records), self._tick_in(records)
            if definition is None:
                raise KeyError(f"no repeatable {rid!r}")
            now = self._store.now()
            if not definition.paused and (self._goes_on(records) or definition.finished):
                return _next_of(definition, tick, now)
            at = await self._put(*_resumed(definition, now), records)
            if at is not None:
                return at

    # -- what code declares

    async def read_declared(self) -> dict[str, float]:
        """Return the ids of what code has declared, and when each was last changed."""
        return {
            definition.rid: record.time
            for record, definition in await self._all()
            if definition.owner == CODE_OWNER
        }

    async def retire(self, rid: str, before: float) -> Definition | None:
        """Remove a definition of code that was not changed since `before`, and return it."""
        records = await self._read_after_timer(rid)
        record, definition = self._record_in(records), self._definition_in(records)
        if record is None or definition is None:
            return None
        if definition.owner != CODE_OWNER or record.time >= before:
            return None
        return definition if await self._remove(rid, records) else None


def _info_of(definition: Definition, tick: Tick | None) -> RepeatableInfo:
    planned = None if tick is None or definition.paused else tick.at
    reached = tick or definition.left
    runs, last = (0, None) if reached is None else (reached.runs, reached.last)
    last_run = None if last is None else planned_time(definition.rid, last)
    return RepeatableInfo(definition.to_dict(), planned, definition.paused, runs, last, last_run)


def _sequence(records: Mapping[str, Record], subject: str) -> int:
    return records[subject].sequence if subject in records else 0


def _fenced(writes: Sequence[Write], fire: str, records: Mapping[str, Record]) -> list[Write]:
    """Return the writes of a change, refused if a tick has become due or was planned since."""
    fenced, expect = list[Write](), Expect(fire, _sequence(records, fire))
    bearer = next((write for write in writes if write.subject == fire), None) or next(
        (write for write in writes if write.expect is None), None
    )
    for write in writes:
        if write is bearer:
            fenced.append(replace(write, expect=expect))
        elif write.expect is None:
            own = Expect(write.subject, _sequence(records, write.subject))
            fenced.append(replace(write, expect=own))
        else:
            fenced.append(write)
    return fenced


def _next_of(definition: Definition, tick: Tick | None, now: float) -> float:
    """Return the time of the next run; that of a paused one is when it would be."""
    if definition.finished:
        return math.inf
    if tick is not None:
        return tick.at
    return first_run(definition.schedule, now)


def _begun(
    definition: Definition, now: float, last: str | None = None, runs: int = 0
) -> tuple[Definition, Tick]:
    """Return a definition whose series begins, and its first tick."""
    return _going_on(definition, Tick(first_run(definition.schedule, now), runs=runs, last=last))


def _going_on(definition: Definition, tick: Tick) -> tuple[Definition, Tick]:
    """Return a definition whose series goes on with a tick, unless its limit or end is reached."""
    finished = definition.is_done(tick)
    left = tick if finished or definition.paused else None
    return replace(definition, finished=finished, left=left), tick


def _changed(
    stored: Definition | None, tick: Tick | None, definition: Definition, now: float
) -> tuple[Definition, Tick]:
    """Return a definition as it is to be stored, with what is kept of the one that was."""
    if stored is None:
        return _begun(definition, now)
    kept = tick or stored.left
    definition = replace(definition, paused=stored.paused)
    if kept is None or stored.schedule != definition.schedule:
        return _begun(definition, now, None if kept is None else kept.last)
    return _going_on(definition, kept)


def _resumed(definition: Definition, now: float) -> tuple[Definition, Tick]:
    """Return a definition that goes on, and its next tick."""
    definition, left = replace(definition, paused=False), definition.left
    if left is None:
        return _begun(definition, now)
    if definition.catch_up is None:
        return _begun(definition, now, left.last, left.runs)
    if definition.catch_up == "none" and left.at <= now:
        left = replace(left, at=next_run_after(definition.schedule, left.at, now))
    return _going_on(definition, left)
