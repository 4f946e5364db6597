"""Values of a stored repeatable and its next tick; `repeat.py` and `tick.py` write them."""

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from hashlib import blake2b
from typing import Any, Final, Literal

from pydantic import ConfigDict, Field, TypeAdapter
from pydantic.dataclasses import dataclass as validated

from asyncmq_nats._arguments import (
    WriteArguments,
    checked_args,
    checked_call,
    checked_mapping,
    write_plainly,
)
from asyncmq_nats.backends.base import Expect, Timer, Write
from asyncmq_nats.exceptions import InvalidArgument, InvalidJob
from asyncmq_nats.jobs import LATEST_TIME, Job, new_job
from asyncmq_nats.schedules import (
    Schedule,
    definition_id,
    is_over,
    make_schedule,
    next_run,
)
from asyncmq_nats.wire.codec import dump_json, load_json
from asyncmq_nats.wire.keys import QueueSubjects, encode_token, is_token

__all__ = [
    "CODE_OWNER",
    "MARKER_TTL",
    "Definition",
    "Tick",
    "decode_definition",
    "fingerprint",
    "job_of",
    "make_definition",
    "next_tick_write",
    "planned_time",
    "repeatable_id",
]

TICK_LEAD: Final = 0.3
SHORTEST_TIMER: Final = 0.6
"""A tick that is due within this many seconds has no timer, which would be late.

A promoter waits.
"""
MARKER_TTL: Final = 1.0
CODE_OWNER: Final = "code"
"""The owner of repeatables that code declares, by `Queue.add_repeatable`."""

OVERLAPS: Final = ("allow", "skip")
CATCH_UPS: Final = (None, "one", "all", "none")


@validated(frozen=True, slots=True, config=ConfigDict(extra="ignore"))
class Tick:
    """A planned run of a repeatable, as stored in `tick.<rid>` and `fire.<rid>`.

    `at`: the planned time, in Unix seconds. `run_at`: `at` and the jitter. `of`: the fingerprint of
    the definition, '' in records of releases without one. `runs`: how many jobs the series has
    made. `last`: id of the last one.
    """

    at: float = Field(ge=0, le=LATEST_TIME, allow_inf_nan=False, strict=True)
    of: str = ""
    runs: int = Field(default=0, ge=0)
    last: str | None = None
    run_at: float = Field(default=0.0, ge=0, le=LATEST_TIME, allow_inf_nan=False)

    @classmethod
    def decode(cls, body: bytes) -> "Tick":
        """Return the tick of a record.

        Raises:
            InvalidJob: it is none.
        """
        data = load_json(body)
        try:
            tick: Tick = TICK_ADAPTER.validate_python(data)
        except ValueError:
            raise InvalidJob(f"at: {data.get('at')!r:.50} is no time of a tick") from None
        return tick if tick.run_at else replace(tick, run_at=tick.at)


TICK_ADAPTER: Final = TypeAdapter(Tick)


@validated(frozen=True, slots=True, config=ConfigDict(extra="ignore"))
class Definition:
    """A repeatable as it is stored. `job`: the other parameters of the jobs it adds.

    `owner`: `"code"` for what is declared by `Queue.add_repeatable`. `finished`: its limit or its
    end is reached. `left`: the last tick of the series before it was paused or finished.
    """

    rid: str
    task_id: str
    args: list[Any]
    kwargs: dict[str, Any]
    job: dict[str, Any]
    schedule: Schedule
    name: str | None = None
    paused: bool = False
    overlap: Literal["allow", "skip"] = "allow"
    catch_up: Literal["one", "all", "none"] | None = None
    limit: int | None = None
    jitter: float = 0.0
    owner: str | None = None
    finished: bool = False
    left: Tick | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return AsyncMQ's keys, and ours beside them; options only if they were given."""
        schedule = self.schedule
        rhythm: dict[str, Any] = (
            {"every": schedule.every}
            if schedule.every is not None
            else {"cron": schedule.cron, "timezone": schedule.timezone}
        )
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
            | self.options()
        )

    def options(self) -> dict[str, Any]:
        """Return the options that differ from their defaults."""
        options = {
            "start": self.schedule.start,
            "end": self.schedule.end,
            "overlap": None if self.overlap == "allow" else self.overlap,
            "catch_up": self.catch_up,
            "limit": self.limit,
            "jitter": self.jitter or None,
        }
        return {name: value for name, value in options.items() if value is not None}

    def same_as(self, other: "Definition") -> bool:
        """Return whether both add the same jobs at the same times, and have the same owner."""
        return self._plain() == other._plain()

    def _plain(self) -> "Definition":
        return replace(self, paused=False, finished=False, left=None)

    def is_done(self, tick: Tick) -> bool:
        """Return whether the series ends before this tick."""
        return is_over(self.schedule, tick.at) or (
            self.limit is not None and tick.runs >= self.limit
        )

    def plan(self, at: float, body: bytes, *, runs: int = 0, last: str | None = None) -> Tick:
        """Return the tick that is planned for `at`. `body`: the definition, encoded.

        With jitter it runs later by chance, but before the tick after it.
        """
        run_at = at
        if self.jitter:
            run_at += random.uniform(0.0, min(self.jitter, next_run(self.schedule, at) - at))
        return Tick(at, fingerprint(body), runs, last, run_at)


DEFINITION_ADAPTER: Final = TypeAdapter(Definition)


def fingerprint(body: bytes) -> str:
    """Return the fingerprint of an encoded definition: an earlier one of its name has another."""
    return blake2b(body, digest_size=8).hexdigest()


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
    owner: str | None = None,
    shortest: float | None = None,
    start: float | None = None,
    end: float | None = None,
    overlap: str = "allow",
    catch_up: str | None = None,
    limit: int | None = None,
    jitter: float | None = None,
) -> Definition:
    """Return the definition of what a user described.

    Raises:
        ValueError: the schedule is malformed.
        NotSerializable: an argument is not JSON.
        InvalidArgument: another value is of the wrong kind.
    """
    schedule = make_schedule(every, cron, timezone, start=start, end=end, shortest=shortest)
    if name is not None and not (type(name) is str and len(name) <= 100 and is_token(name)):
        raise InvalidArgument("name must be a text of 1 to 100 characters", name)
    options = {
        "overlap": _choice(overlap, OVERLAPS, "overlap"),
        "catch_up": _choice(catch_up, CATCH_UPS, "catch_up"),
        "limit": _checked_limit(limit),
        "jitter": _checked_jitter(jitter, schedule),
    }
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
    definition: Definition = DEFINITION_ADAPTER.validate_python(
        {"rid": "-", "schedule": schedule, "name": name, "owner": owner, **described, **options}
    )
    if name is not None:
        return replace(definition, rid=name)
    rhythm = {"every": schedule.every, "cron": schedule.cron, "timezone": schedule.timezone}
    return replace(definition, rid=definition_id(described | rhythm | definition.options()))


def _choice(value: str | None, choices: Sequence[str | None], name: str) -> str | None:
    if value not in choices:
        words = ", ".join(repr(choice) for choice in choices)
        raise InvalidArgument(f"{name} must be one of {words}", value)
    return value


def _checked_limit(limit: int | None) -> int | None:
    if limit is not None and (type(limit) is not int or limit < 1):
        raise InvalidArgument("limit must be a number of runs of at least 1", limit)
    return limit


def _checked_jitter(jitter: float | None, schedule: Schedule) -> float:
    if jitter is None:
        return 0.0
    if isinstance(jitter, bool) or not isinstance(jitter, int | float):
        raise InvalidArgument("jitter must be a number of seconds", jitter)
    longest = schedule.every if schedule.every is not None else 86_400.0
    if not 0 <= jitter <= longest:  # not so for NaN, either
        raise InvalidArgument(f"jitter must be from 0 to {longest:g} s", jitter)
    return float(jitter)


def repeatable_id(job_def: Mapping[str, Any] | str, write: WriteArguments = write_plainly) -> str:
    """Return the id of a repeatable that is given by its name or by a dict.

    The dict is that of `RepeatableInfo`, or has the parameters that it was made of.

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
    options = {
        key: fields.pop(key)
        for key in ("start", "end", "overlap", "catch_up", "limit", "jitter")
        if key in fields
    }
    args, kwargs = checked_call(
        write, task_id, fields.pop("args", None), fields.pop("kwargs", None)
    )
    defaults = {"retries": 0, "ttl": None, "priority": 5, "backoff": None, "timeout": None}
    job = defaults | {key: value for key, value in fields.items() if key in defaults}
    return make_definition(task_id, args, kwargs, job, **rhythm, **options, name=None).rid


def _job_fields(job: Mapping[str, Any]) -> dict[str, Any]:
    fields = {"backoff": None} | dict(job)
    fields["max_retries"] = fields.pop("retries", 0)
    return fields


def decode_definition(body: bytes, rid: str) -> Definition:
    """Return the definition of a record.

    Raises:
        InvalidJob: it is none of that id, or no job or no schedule can be made of it.
    """
    try:
        definition: Definition = DEFINITION_ADAPTER.validate_json(body)
        rhythm = definition.schedule
        _check_rhythm(rhythm.every, rhythm.cron, None if rhythm.cron is None else rhythm.timezone)
        if not math.isfinite(definition.jitter):
            raise ValueError("its jitter is no number of seconds")
        job_of(definition, 0.0, 0.0).encode()
    except (ValueError, TypeError) as error:
        raise InvalidJob(str(error)) from None
    if encode_token(definition.rid) != encode_token(rid):
        raise InvalidJob(f"its id is {definition.rid!r}")
    return definition


_check_rhythm: Final = lru_cache(make_schedule)
"""Definitions are read again and again; to check a cron expression takes a millisecond."""


def job_of(definition: Definition, at: float, now: float) -> Job:
    """Return the job of a tick; its id is that of the repeatable and the planned time in ms."""
    return new_job(
        task_id=definition.task_id,
        args=definition.args,
        kwargs=definition.kwargs,
        job_id=f"{definition.rid}-{round(at * 1000)}",
        created_at=now,
        **_job_fields(definition.job),
    )


def planned_time(rid: str, job_id: str) -> float | None:
    """Return when the job of a tick was planned to run; `None`: its id is of another form."""
    digits = job_id.removeprefix(f"{rid}-")
    return int(digits) / 1000 if digits.isdecimal() and len(digits) < 18 else None


def next_tick_write(
    keys: QueueSubjects, rid: str, tick: Tick, now: float, expect: Expect | None = None
) -> Write:
    """Return the write that plans a tick."""
    token = encode_token(rid)
    body = dump_json(_tick_fields(tick))
    if tick.run_at - now < SHORTEST_TIMER:
        return Write(keys.fire(token), body, expect)
    timer = Timer(tick.run_at - TICK_LEAD, keys.fire(token))
    return Write(keys.tick(token), body, expect, timer=timer)


def _tick_fields(tick: Tick) -> dict[str, Any]:
    fields: dict[str, Any] = {"at": tick.at, "of": tick.of}
    if tick.runs:
        fields["runs"] = tick.runs
    if tick.last is not None:
        fields["last"] = tick.last
    if tick.run_at != tick.at:
        fields["run_at"] = tick.run_at
    return fields
