"""Jobs that repeat: their definitions, and the ticks that make a job of each. The series are computed in `schedules`.

A definition is `repeat.<rid>`. Its next tick is `tick.<rid>`, a timer of the server that turns into `fire.<rid>`. Whoever is given that
writes, in one batch that expects the fire as it was delivered: the job, the next tick, and the removal of the fire. Every change of the
definition touches a fire that is there. So each tick makes one job, whoever dies when, and nobody leads.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Final

from pydantic import ConfigDict, TypeAdapter
from pydantic.dataclasses import dataclass as validated

from asyncmq_nats._arguments import checked_args, checked_mapping
from asyncmq_nats._logging import get_logger
from asyncmq_nats.backends.base import Backend, Delivery, Expect, Record, Timer, Write
from asyncmq_nats.exceptions import InvalidArgument, InvalidJob, WriteRefused
from asyncmq_nats.jobs import LATEST, Job, check_size, new_job
from asyncmq_nats.schedules import (
    Schedule,
    definition_id,
    make_schedule,
    missed_ticks,
    next_run,
    next_run_after,
)
from asyncmq_nats.states import Place
from asyncmq_nats.store.topology import QueueAssets
from asyncmq_nats.wire.codec import dump_json, load_json
from asyncmq_nats.wire.keys import QueueSubjects, encode_token, is_token

__all__ = ["Definition", "RepeatableInfo", "Repeatables", "make_definition", "repeatable_id"]

logger = get_logger(__name__)

LEAD: Final = 0.3
SOON: Final = 0.6
"""A tick that is due sooner than this needs no timer, which would be late: the next promoter that is given it waits."""
CATCH_UP: Final = 30.0
"""Ticks that were late because a worker died are all made up for, if they are no later than this."""
HICCUP: Final = 3.0
"""No more is an outage: ticks that were late because a process or a server was busy are all made up for, too."""
MARKER_TTL: Final = 1.0


@validated(frozen=True, slots=True, config=ConfigDict(extra="ignore"))
class Definition:
    """A repeatable as it is stored. `job`: the other parameters of the jobs it adds."""

    rid: str
    task_id: str
    args: list[Any]
    kwargs: dict[str, Any]
    job: dict[str, Any]
    schedule: Schedule
    name: str | None = None
    paused: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Return AsyncMQ's keys, and ours beside them."""
        rhythm = (
            {"every": self.schedule.every}
            if self.schedule.every is not None
            else {"cron": self.schedule.cron}
        )
        zone = {} if self.schedule.cron is None else {"timezone": self.schedule.timezone}
        return (
            {
                "id": self.rid,
                "name": self.name,
                "task_id": self.task_id,
                "args": self.args,
                "kwargs": self.kwargs,
                **self.job,
            }
            | rhythm
            | zone
        )

    def same_as(self, other: "Definition") -> bool:
        """Return whether both add the same jobs at the same times."""
        return replace(self, paused=False) == replace(other, paused=False)


ADAPTER: Final = TypeAdapter(Definition)


@dataclass(frozen=True, slots=True)
class RepeatableInfo:
    """A stored repeatable: its definition, its next run (Unix seconds; `None` while it is paused), and whether it is paused."""

    job_def: dict[str, Any]
    next_run: float | None
    paused: bool


def make_definition(
    task_id: str,
    args: Sequence[Any] | None,
    kwargs: Mapping[str, Any] | None,
    job: Mapping[str, Any],
    *,
    every: float | str | None,
    cron: str | None,
    timezone: str | None,
    name: str | None,
) -> Definition:
    """Return the definition of what a user described.

    Raises:
        ValueError: the schedule is malformed.
        NotSerializable: an argument is not JSON.
        InvalidArgument: another value is of the wrong kind.
    """
    schedule = make_schedule(every, cron, timezone)
    if name is not None and not (type(name) is str and len(name) <= 100 and is_token(name)):
        raise InvalidArgument("name must be a text of 1 to 100 characters", name)
    fields = {key: value for key, value in job.items() if value is not None}
    given = {
        "args": checked_args(args, "args"),
        "kwargs": {} if kwargs is None else checked_mapping(kwargs, "kwargs"),
    }
    sample = new_job(task_id=task_id, **given, **_job_fields(fields))
    plain = load_json(sample.encode())
    described = {
        "task_id": task_id,
        "args": plain["args"],
        "kwargs": plain["kwargs"],
        "job": load_json(dump_json(fields)),
    }
    rid = name or definition_id(
        described | {"every": schedule.every, "cron": schedule.cron, "timezone": schedule.timezone}
    )
    return ADAPTER.validate_python({"rid": rid, "schedule": schedule, "name": name, **described})


def repeatable_id(job_def: Mapping[str, Any] | str) -> str:
    """Return the id of a repeatable that is given by its name, or by a dict: that of `RepeatableInfo`, or the parameters it was made of.

    Raises:
        ValueError: the dict describes no repeatable; `InvalidArgument`, it is neither.
    """
    if isinstance(job_def, str):
        return job_def
    job_def = checked_mapping(job_def, "a repeatable, if it is not its name,")
    if job_def.get("id") or job_def.get("name"):
        return str(job_def.get("id") or job_def["name"])
    fields = dict(job_def)
    task_id = fields.pop("task_id", None) or fields.pop("task", None)
    if task_id is None:
        raise ValueError("a job_def needs a task_id, or the id that list_repeatables() shows")
    rhythm = {key: fields.pop(key, None) for key in ("every", "cron", "timezone")}
    args, kwargs = fields.pop("args", None), fields.pop("kwargs", None)
    defaults = {"retries": 0, "ttl": None, "priority": 5, "backoff": None, "timeout": None}
    job = defaults | {key: value for key, value in fields.items() if key in defaults}
    return make_definition(task_id, args, kwargs, job, **rhythm, name=None).rid


def _job_fields(job: Mapping[str, Any]) -> dict[str, Any]:
    fields = {"backoff": None} | dict(job)
    fields["max_retries"] = fields.pop("retries", 0)
    return fields


def _decode_definition(body: bytes, rid: str) -> Definition:
    """Return the definition of a record.

    Raises:
        InvalidJob: it is none of that id, or no job or no schedule can be made of it.
    """
    try:
        definition: Definition = ADAPTER.validate_json(body)
        rhythm = definition.schedule
        _check_rhythm(rhythm.every, rhythm.cron, None if rhythm.cron is None else rhythm.timezone)
        new_job(
            task_id=definition.task_id,
            args=definition.args,
            kwargs=definition.kwargs,
            **_job_fields(definition.job),
        ).encode()
    except (ValueError, TypeError) as error:
        raise InvalidJob(str(error)) from None
    if encode_token(definition.rid) != encode_token(rid):
        raise InvalidJob(f"its id is {definition.rid!r}")
    return definition


_check_rhythm: Final = lru_cache(make_schedule)
"""A definition is read at each tick; to check a cron expression takes a millisecond."""


def _decode_time(body: bytes) -> float:
    """Return the planned time of a tick.

    Raises:
        InvalidJob: it has none.
    """
    at = load_json(body).get("at")
    if (
        isinstance(at, bool) or not isinstance(at, int | float) or not 0 <= at <= LATEST
    ):  # not so for NaN, either
        raise InvalidJob(f"at: {at!r} is no time")
    return float(at)


def _fenced(writes: Sequence[Write], fire: str, records: Mapping[str, Record]) -> list[Write]:
    """Return the writes of a change, refused if a tick has become due since `records` were read: it would come to what was changed."""
    expect = Expect(fire, records[fire].sequence if fire in records else 0)
    bearer = next((write for write in writes if write.subject == fire), None) or next(
        (w for w in writes if w.expect is None), None
    )
    return [replace(write, expect=expect) if write is bearer else write for write in writes]


class Repeatables:
    """The repeatables of one queue."""

    def __init__(self, backend: Backend, subjects: QueueSubjects, assets: QueueAssets) -> None:
        self._backend = backend
        self._subjects = subjects
        self._assets = assets
        self._log = subjects.bucket_log

    async def upsert(self, definition: Definition) -> float:
        """Store a definition and return its next run. The same one again changes nothing: neither its series nor a pause.

        Raises:
            PayloadTooLarge: its jobs are too large for the server.
        """
        sample = self.job_of(definition, self._backend.now()).encode()
        check_size(
            sample, f"the repeated job of task {definition.task_id!r}", self._backend.max_body
        )
        while True:
            records = await self._read(definition.rid)
            stored = self._definition_in(records)
            planned = self._planned_in(records)
            if (
                stored is not None
                and stored.same_as(definition)
                and (planned is not None or stored.paused)
            ):
                return (
                    planned
                    if planned is not None
                    else next_run(stored.schedule, self._backend.now())
                )
            now = self._backend.now()
            paused = stored is not None and stored.paused and stored.same_as(definition)
            at = await self._store(
                replace(definition, paused=paused), next_run(definition.schedule, now), records
            )
            if at is not None:
                return at

    async def _store(
        self, definition: Definition, at: float, records: Mapping[str, Record]
    ) -> float | None:
        """Write a definition and, unless it is paused, its next tick, expecting what was read.

        Return `at`, or `None` if that has changed.
        """
        key = self._subjects.repeat(encode_token(definition.rid))
        expect = Expect(key, records[key].sequence if key in records else 0)
        writes = [Write(key, dump_json(definition), expect)]
        fire = self._subjects.fire(encode_token(definition.rid))
        tick = self._subjects.tick(encode_token(definition.rid))
        if not definition.paused:
            writes.append(self._next_tick(definition.rid, at))
        writes += [
            Write(subject, b"", ttl=MARKER_TTL, marker=True)
            for subject in (fire, tick)
            if subject in records
            and not records[subject].marker
            and subject not in {write.subject for write in writes}
        ]
        try:
            await self._backend.write(self._log, *_fenced(writes, fire, records))
        except WriteRefused:
            return None
        return at

    def _next_tick(self, rid: str, at: float) -> Write:
        token, body = encode_token(rid), dump_json({"at": at})
        if at - self._backend.now() < SOON:
            return Write(self._subjects.fire(token), body)
        return Write(
            self._subjects.tick(token), body, timer=Timer(at - LEAD, self._subjects.fire(token))
        )

    async def _read(self, rid: str) -> dict[str, Record]:
        token = encode_token(rid)
        records = await self._backend.last(
            self._log,
            self._subjects.repeat(token),
            self._subjects.tick(token),
            self._subjects.fire(token),
        )
        return {record.subject: record for record in records}

    def _record_in(self, records: Mapping[str, Record]) -> Record | None:
        return next(
            (r for r in records.values() if self._subjects.is_repeat(r.subject) and not r.marker),
            None,
        )

    def _definition_in(self, records: Mapping[str, Record]) -> Definition | None:
        """Return the definition; `None` if there is none, or one that nobody could run."""
        record = self._record_in(records)
        try:
            return (
                None
                if record is None
                else _decode_definition(record.body, self._subjects.rid(record.subject))
            )
        except InvalidJob as problem:
            logger.warning("%.200r is passed over: %s", record and record.subject, problem)
            return None

    def _planned_in(self, records: Mapping[str, Record]) -> float | None:
        ticks = []
        for record in records.values():
            if not self._subjects.is_repeat(record.subject) and not record.marker:
                with suppress(InvalidJob):  # whoever is given it says so
                    ticks.append(_decode_time(record.body))
        return min(ticks, default=None)

    async def read_all(self) -> list[RepeatableInfo]:
        """Return all of them."""
        found: list[RepeatableInfo] = []
        start = 1
        while page := await self._backend.page(
            self._log, self._subjects.repeat("*"), from_sequence=start, limit=500
        ):
            for record in page:
                definition = self._definition_in({record.subject: record})
                if definition is not None:
                    planned = self._planned_in(await self._read(definition.rid))
                    found.append(
                        RepeatableInfo(
                            definition.to_dict(),
                            None if definition.paused else planned,
                            definition.paused,
                        )
                    )
            start = page[-1].sequence + 1
        return found

    async def remove(self, rid: str) -> bool:
        """Remove one. Return whether it was there."""
        while True:
            records = await self._read(rid)
            key = self._subjects.repeat(encode_token(rid))
            if self._record_in(records) is None:
                return False
            writes = [
                Write(
                    record.subject,
                    b"",
                    Expect(key, record.sequence) if record.subject == key else None,
                    ttl=MARKER_TTL,
                    marker=True,
                )
                for record in records.values()
                if not record.marker
            ]
            try:
                await self._backend.write(
                    self._log, *_fenced(writes, self._subjects.fire(encode_token(rid)), records)
                )
            except WriteRefused:
                continue
            return True

    async def pause(self, rid: str) -> bool:
        """Stop its series. Return whether it was there."""
        while True:
            records = await self._read(rid)
            definition = self._definition_in(records)
            if definition is None or definition.paused:
                return definition is not None
            if await self._store(replace(definition, paused=True), 0.0, records) is not None:
                return True

    async def resume(self, rid: str) -> float:
        """Begin its series anew from now, and return the next run; that of one which is not paused is left alone.

        Raises:
            KeyError: it is not there.
        """
        while True:
            records = await self._read(rid)
            definition = self._definition_in(records)
            if definition is None:
                raise KeyError(f"no repeatable {rid!r}")
            planned = self._planned_in(records)
            if not definition.paused and planned is not None:
                return planned
            at = await self._store(
                replace(definition, paused=False),
                next_run(definition.schedule, self._backend.now()),
                records,
            )
            if at is not None:
                return at

    # -- a tick is due

    async def fire(self, delivery: Delivery) -> bool:
        """Make the job of a tick that is due, and the next tick. What was changed, paused or removed meanwhile makes none.

        Return whether the delivery is done with. If not, the tick is not to be seen: it was taken care of, and cannot be delivered again;
        or a replica was asked that has yet to hear of it.

        Raises:
            InvalidJob: it is no tick.
        """
        records = await self._read(self._subjects.rid(delivery.subject))
        definition = self._definition_in(records)
        current = records.get(delivery.subject)
        if current is None or current.sequence < delivery.sequence:
            return False
        if definition is None or definition.paused or current.sequence > delivery.sequence:
            return True
        planned = _decode_time(delivery.body)
        now = self._backend.now()
        due = self._due(definition.schedule, planned, now, again=delivery.deliveries > 1)
        following = self._next_tick(
            definition.rid, next_run_after(definition.schedule, due[-1], now)
        )
        done = Write(delivery.subject, following.body, Expect(delivery.subject, delivery.sequence))
        writes = [self._job_write(definition, at) for at in due]
        if (
            following.subject == delivery.subject
        ):  # due soon: the next fire takes the place of this one
            writes.append(done)
        else:
            writes += [following, replace(done, body=b"", ttl=MARKER_TTL, marker=True)]
        try:
            await self._backend.write(self._log, *writes)
        except WriteRefused:
            logger.debug(
                "repeatable %s: this tick was taken care of by another worker", definition.rid
            )
        return True

    @staticmethod
    def _due(schedule: Schedule, planned: float, now: float, *, again: bool) -> list[float]:
        """Return the ticks to make up for: all after a hiccup or a worker's death with one in hand, one after an outage."""
        if now - planned <= (CATCH_UP if again else HICCUP):
            return missed_ticks(schedule, planned, now)
        return [planned]

    def _job_write(self, definition: Definition, at: float) -> Write:
        job = self.job_of(definition, at)
        token = encode_token(job.job_id)
        return Write(
            self._subjects.later(token, Place.RELEASED),
            job.encode(),
            Expect(self._subjects.later_all(token)),
        )

    def job_of(self, definition: Definition, at: float) -> Job:
        """Return the job of a tick; its id is that of the repeatable and the planned time in milliseconds."""
        return new_job(
            task_id=definition.task_id,
            args=definition.args,
            kwargs=definition.kwargs,
            job_id=f"{definition.rid}-{round(at * 1000)}",
            created_at=self._backend.now(),
            **_job_fields(definition.job),
        )
