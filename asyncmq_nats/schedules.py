"""When a repeatable job runs next. Pure functions of values; the only importer of croniter."""

import hashlib
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, Final
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from croniter import CroniterBadDateError, CroniterError, croniter

from asyncmq_nats.jobs import LATEST_TIME
from asyncmq_nats.wire.codec import dump_json, load_json

__all__ = [
    "RepeatableInfo",
    "Schedule",
    "definition_id",
    "first_run",
    "is_over",
    "make_schedule",
    "missed_ticks",
    "next_run",
    "next_run_after",
    "parse_every",
    "upcoming_runs",
]

FIELDS: Final = ("minute", "hour", "day of month", "month", "day of week", "second")
RANGES: Final = ((0, 59), (0, 23), (1, 31), (1, 12), (0, 6), (0, 59))
"""First and last value of each field."""
STEP: Final = re.compile(r"/(\d+)")
UNITS: Final = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0, "w": 604_800.0}
PART: Final = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(ms|s|m|h|d|w)\s*")
SHORTEST_INTERVAL: Final = 0.05
LONGEST_INTERVAL: Final = 100 * 365 * 86_400.0
RANDOM_FIELD: Final = re.compile(r"(?:^|,)[HR]", re.IGNORECASE)
"""Croniter's own `H` and `R`: each worker would read a different time in them."""
ONE_VALUE: Final = re.compile(r"(?<![\w-])(\w+)-(\w+)(?:/\d+)?(?![\w-])")
"""A range, with its step, that may be of one value."""
MOST_MISSED: Final = 400
LARGEST_CHANGE: Final = 3 * 3600.0
"""No clock is set forward or back by more."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """A rhythm: an interval in seconds, or a cron expression in a time zone (an IANA name).

    No run is before `start` or after `end` (Unix seconds). An interval counts from `start`.
    """

    every: float | None = None
    cron: str | None = None
    timezone: str = "UTC"
    start: float | None = None
    end: float | None = None


@dataclass(frozen=True, slots=True)
class RepeatableInfo:
    """A stored repeatable: its definition, its next run, and whether it is paused (AsyncMQ).

    `next_run`: Unix seconds; `None` while it is paused, and after its last run. `runs`: how many
    jobs the series has added, since its rhythm was last changed. `last_job`: id of the last one;
    `last_run`: the time that it was planned for.
    """

    job_def: dict[str, Any]
    next_run: float | None
    paused: bool
    runs: int = 0
    last_job: str | None = None
    last_run: float | None = None


def make_schedule(
    every: float | str | None,
    cron: str | None,
    timezone: str | None = None,
    *,
    start: float | None = None,
    end: float | None = None,
    shortest: float | None = None,
) -> Schedule:
    """Return the schedule that a user described. `shortest`: see `parse_every`.

    Raises:
        ValueError: neither or both are given, or one cannot be understood; the message shows where.
        TypeError: one is of another type.
    """
    if (every is None) == (cron is None):
        raise ValueError(
            "give either every= (seconds, or a text such as '5m') or cron= (five or six fields)"
        )
    _check_span(start, end)
    if every is not None:
        if timezone is not None:
            raise ValueError("timezone= goes with cron=; an interval has none")
        return Schedule(every=parse_every(every, shortest), start=start, end=end)
    if not isinstance(cron, str):
        raise TypeError(f"cron must be a str, not {type(cron).__name__}")
    check_cron(cron)
    _zone(timezone or "UTC")
    plain = " ".join(cron.split())
    plain = plain.lower() if plain.startswith("@") else plain
    return Schedule(cron=plain, timezone=timezone or "UTC", start=start, end=end)


def _check_span(start: float | None, end: float | None) -> None:
    for name, at in (("start", start), ("end", end)):
        if at is None:
            continue
        if isinstance(at, bool) or not isinstance(at, int | float):
            raise TypeError(f"{name} must be a time in Unix seconds, not {type(at).__name__}")
        if not 0 <= at <= LATEST_TIME:  # not so for NaN, either
            raise ValueError(f"{name}={at!r} is no time in Unix seconds")
    if start is not None and end is not None and end < start:
        raise ValueError(f"end={end!r} is before start={start!r}: there would be no run")


def parse_every(every: float | str, shortest: float | None = None) -> float:
    """Return an interval in seconds.

    Args:
        every: a number, or a text such as `"90"`, `"5m"`, `"1h30m"`, `"0.5s"` (units ms, s, m, h,
            d, w).
        shortest: the shortest one that is taken, in seconds (the setting `min_repeat_interval`);
            by default, and at least, 0.05.

    Raises:
        ValueError: it is not understood, or too short, or longer than a hundred years.
        TypeError: it is neither number nor text.
    """
    least = SHORTEST_INTERVAL if shortest is None else max(SHORTEST_INTERVAL, shortest)
    if isinstance(every, bool) or not isinstance(every, int | float | str):
        raise TypeError(
            f"every must be a number of seconds or a text such as '5m', not {type(every).__name__}"
        )
    seconds = _parse_text(every) if isinstance(every, str) else every
    if not least <= seconds <= LONGEST_INTERVAL:  # not so for NaN, either
        raise ValueError(
            f"every={every!r}: the shortest interval is {least:g} s, "
            f"the longest {LONGEST_INTERVAL:.0f} s"
        )
    return float(seconds)


def _parse_text(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        pass
    at, seconds = 0, 0.0
    while at < len(text):
        part = PART.match(text, at)
        if part is None:
            break
        seconds += float(part[1]) * UNITS[part[2]]
        at = part.end()
    if at < len(text) or not text.strip():
        raise ValueError(
            f"every={text!r} is not an interval such as "
            f"'90', '5m' or '1h30m':{_point_at(text, at, at + 1)}"
        )
    return seconds


def check_cron(expression: str) -> None:
    """Check a cron expression: five fields, six with the seconds last, or an alias like `@daily`.

    Raises:
        ValueError: it is malformed or never comes true; the message points at the field.
    """
    fields = list(re.finditer(r"\S+", expression))
    if expression.strip().startswith("@"):
        if not croniter.is_valid(expression.strip()):
            raise ValueError(
                f"cron {expression!r} is not a known alias "
                "(@hourly, @daily, @weekly, @monthly, @yearly)"
            )
        return
    if len(fields) not in (5, 6):
        raise ValueError(
            f"cron {expression!r} has {len(fields)} fields: "
            "five (minute hour day month weekday) or six (and second) are needed"
            + _point_at(expression, len(expression), len(expression) + 1)
        )
    for index, field in enumerate(fields):
        alone = ["*"] * len(fields)
        alone[index] = field[0]
        try:
            if RANDOM_FIELD.search(field[0]):
                raise ValueError("nothing random is known here")
            _check_steps(field[0], index)
            _times(" ".join(alone), datetime(2024, 1, 1))
        except (CroniterError, ValueError, KeyError) as error:
            pointer = _point_at(expression, field.start(), field.end())
            raise ValueError(
                f"cron {expression!r}: {field[0]!r} is not a valid "
                f"{FIELDS[index]} ({error}){pointer}"
            ) from None
    try:
        _times(expression, datetime(2024, 1, 1)).get_next(datetime)
    except CroniterBadDateError:
        pointer = _point_at(expression, fields[2].start(), fields[4].end())
        raise ValueError(
            f"cron {expression!r} never comes true: no such date exists{pointer}"
        ) from None


def _check_steps(field: str, index: int) -> None:
    """Refuse a step that is larger than its field: croniter would take only the first value."""
    low, high = RANGES[index]
    for step in STEP.findall(field):
        if int(step) > high - low + 1:
            raise ValueError(
                f"a step of {step} is larger than the field, {low} to {high}: it would run at "
                f"{low} only. For an interval, use every="
            )


def _times(expression: str, start: datetime) -> croniter:
    """Return the times of an expression.

    Croniter takes a range of one value, such as `5-5`, for every value.
    """
    return croniter(
        ONE_VALUE.sub(
            lambda match: match[1] if _is_same(match[1], match[2]) else match[0], expression
        ),
        start,
    )


def _is_same(one: str, other: str) -> bool:
    return (
        int(one) == int(other)
        if one.isdecimal() and other.isdecimal()
        else one.lower() == other.lower()
    )


def _point_at(text: str, start: int, end: int) -> str:
    return f"\n  {text}\n  {' ' * start}{'^' * (end - start)}"


def next_run(schedule: Schedule, after: float) -> float:
    """Return the first time after `after` (Unix seconds).

    An interval counts from `after`: pass the planned time, so that none drifts.
    """
    if schedule.every is not None:
        return after + schedule.every
    return _next_cron(str(schedule.cron), _zone(schedule.timezone), after)


def first_run(schedule: Schedule, now: float) -> float:
    """Return the first time of a series that begins now, or at its `start`."""
    start = schedule.start
    if start is None:
        return next_run(schedule, now)
    if schedule.every is None:
        at = next_run(schedule, max(start - 0.001, now))  # `start` itself counts
        return at if at >= start else next_run(schedule, at)
    return start if start >= now else next_run_after(schedule, start, now)


def upcoming_runs(info: RepeatableInfo, count: int, now: float) -> list[float]:
    """Return the next `count` runs of a stored repeatable in Unix seconds, fewer if it ends before.

    Those of a paused one are counted as if it were resumed now.
    """
    definition = info.job_def
    names = ("every", "cron", "timezone", "start", "end")
    schedule = make_schedule(**{name: definition.get(name) for name in names})
    runs: list[float] = []
    at = first_run(schedule, now) if info.next_run is None else info.next_run
    while len(runs) < count and math.isfinite(at) and not is_over(schedule, at):
        runs.append(at)
        at = next_run(schedule, at)
    return runs


def is_over(schedule: Schedule, at: float) -> bool:
    """Return whether a time is after the end of the series."""
    return schedule.end is not None and at > schedule.end


def next_run_after(schedule: Schedule, planned: float, now: float) -> float:
    """Return the first time after now in the series to which `planned` belongs."""
    if schedule.every is None:
        return next_run(schedule, max(planned, now))
    return planned + schedule.every * max(1, math.floor((now - planned) / schedule.every) + 1)


def missed_ticks(schedule: Schedule, planned: float, now: float) -> list[float]:
    """Return the times of the series from `planned` (included) to now, at most 400."""
    return list(_series(schedule, planned, now))


def _series(schedule: Schedule, planned: float, now: float) -> Iterator[float]:
    at = planned
    for _ in range(MOST_MISSED):
        yield at
        at = next_run(schedule, at)
        if at > now:
            return


@lru_cache(maxsize=1024)
def _next_cron(expression: str, zone: ZoneInfo, after: float) -> float:
    """Return the next time of a cron expression by the wall clock of a zone.

    A time that the clock skips in spring comes later by as much as it skips, once. A time that it
    shows twice in autumn counts once, the first time, unless the hour is a wildcard: a job that
    runs every few minutes goes on through both hours. The result is kept for a while: many
    repeatables have the same expression, and it takes a third of a ms.
    """
    hour = "*" if expression == "@hourly" else [*expression.split(), ""][1]
    # Near a change of the clock, the times to come are to be looked for by what it shows before and
    # by what it shows after the change.
    around = {
        datetime.fromtimestamp(at, zone).utcoffset()
        for at in (after - LARGEST_CHANGE, after, after + LARGEST_CHANGE)
    }
    utc = datetime.fromtimestamp(after, UTC).replace(tzinfo=None)
    walls = [utc + offset for offset in around if offset is not None]
    return min(
        _first_after(expression, wall, zone, after, twice=hour.startswith("*")) for wall in walls
    )


def _first_after(
    expression: str, wall: datetime, zone: ZoneInfo, after: float, *, twice: bool
) -> float:
    times = _times(expression, wall)
    first, shown = math.inf, datetime.max
    while True:
        candidate: datetime = times.get_next(datetime)
        if candidate >= shown:
            return first
        at = min(
            (at for at in _moments(candidate, zone, twice=twice) if at > after), default=math.inf
        )
        if at < first:
            first, shown = at, datetime.fromtimestamp(at, zone).replace(tzinfo=None)
            if candidate >= shown:  # else it was skipped: one that is not may come before it
                return first


def _moments(wall: datetime, zone: ZoneInfo, *, twice: bool) -> list[float]:
    """Return when the clock shows this: the first time, or both.

    A time that it never shows is the one without the change.
    """
    first, second = (wall.replace(tzinfo=zone, fold=fold).timestamp() for fold in (0, 1))
    return [first, second] if twice and second > first else [first]


def _zone(name: str) -> ZoneInfo:
    try:
        return ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, TypeError, OSError):
        advice = (
            "use an IANA name such as 'Europe/Berlin' "
            "(and pip install tzdata where the system has none)"
        )
        raise ValueError(f"time zone {name!r} is unknown: {advice}") from None


def definition_id(definition: dict[str, Any]) -> str:
    """Return a stable id for a definition without a name.

    The same definition has the same id in every process.
    """
    given = {key: value for key, value in definition.items() if value is not None}
    plain = load_json(dump_json(given, "the arguments of a repeatable job"))
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:24]
