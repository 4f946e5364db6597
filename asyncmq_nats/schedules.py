"""When a repeatable job runs next. Pure functions of values; the only importer of croniter."""

import hashlib
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from croniter import CroniterBadDateError, CroniterError, croniter

from asyncmq_nats.jobs import dump_json

__all__ = ["Schedule", "definition_id", "make_schedule", "missed_ticks", "next_run", "parse_every"]

FIELDS: Final = ("minute", "hour", "day of month", "month", "day of week", "second")
UNITS: Final = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0, "w": 604_800.0}
PART: Final = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(ms|s|m|h|d|w)\s*")
SHORTEST: Final = 0.05
MOST_MISSED: Final = 400


@dataclass(frozen=True, slots=True)
class Schedule:
    """A rhythm: every so many seconds, or a cron expression in a time zone (an IANA name)."""

    every: float | None = None
    cron: str | None = None
    timezone: str = "UTC"


def make_schedule(every: float | str | None, cron: str | None, timezone: str | None = None) -> Schedule:
    """Return the schedule that a user described.

    Raises:
        ValueError: neither or both are given, or one cannot be understood; the message shows where.
        TypeError: one is of another type.
    """
    if (every is None) == (cron is None):
        raise ValueError("give either every= (seconds, or a text such as '5m') or cron= (five or six fields)")
    if every is not None:
        if timezone is not None:
            raise ValueError("timezone= goes with cron=; an interval has none")
        return Schedule(every=parse_every(every))
    if not isinstance(cron, str):
        raise TypeError(f"cron must be a str, not {type(cron).__name__}")
    check_cron(cron)
    _zone(timezone or "UTC")
    return Schedule(cron=" ".join(cron.split()), timezone=timezone or "UTC")


def parse_every(every: float | str) -> float:
    """Return an interval in seconds: a number, or a text such as `"90"`, `"5m"`, `"1h30m"`, `"0.5s"` (units ms, s, m, h, d, w).

    Raises:
        ValueError: it is not understood, or shorter than 0.05 s.
        TypeError: it is neither number nor text.
    """
    if isinstance(every, bool) or not isinstance(every, int | float | str):
        raise TypeError(f"every must be a number of seconds or a text such as '5m', not {type(every).__name__}")
    seconds = _parse_text(every) if isinstance(every, str) else float(every)
    if not math.isfinite(seconds) or seconds < SHORTEST:
        raise ValueError(f"every={every!r}: the shortest interval is {SHORTEST} s")
    return seconds


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
        raise ValueError(f"every={text!r} is not an interval such as '90', '5m' or '1h30m':\n  {text}\n  {' ' * at}^")
    return seconds


def check_cron(expression: str) -> None:
    """Check a cron expression of five fields, or six with the seconds last, or an alias such as `@daily`.

    Raises:
        ValueError: it is malformed or never comes true; the message points at the field.
    """
    fields = list(re.finditer(r"\S+", expression))
    if expression.strip().startswith("@"):
        if not croniter.is_valid(expression.strip()):
            raise ValueError(f"cron {expression!r} is not a known alias (@hourly, @daily, @weekly, @monthly, @yearly)")
        return
    if len(fields) not in (5, 6):
        raise ValueError(
            f"cron {expression!r} has {len(fields)} fields: five (minute hour day month weekday) or six (and second) are needed\n"
            f"  {expression}\n  {' ' * len(expression)}^"
        )
    for index, field in enumerate(fields):
        alone = ["*"] * len(fields)
        alone[index] = field[0]
        try:
            croniter(" ".join(alone), datetime(2024, 1, 1))
        except (CroniterError, ValueError, KeyError) as error:
            pointer = f"  {expression}\n  {' ' * field.start()}{'^' * len(field[0])}"
            raise ValueError(f"cron {expression!r}: {field[0]!r} is not a valid {FIELDS[index]} ({error})\n{pointer}") from None
    try:
        croniter(expression, datetime(2024, 1, 1)).get_next(datetime)
    except CroniterBadDateError:
        raise ValueError(f"cron {expression!r} never comes true: no such date exists") from None


def next_run(schedule: Schedule, after: float) -> float:
    """Return the first time after `after` (Unix seconds). An interval counts from `after`: pass the planned time, so that none drifts."""
    if schedule.every is not None:
        return after + schedule.every
    return _next_cron(str(schedule.cron), _zone(schedule.timezone), after)


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


def _next_cron(expression: str, zone: ZoneInfo, after: float) -> float:
    """Return the next time of a cron expression by the wall clock of a zone.

    A time that the clock skips in spring comes an hour later, once. A time that it shows twice in autumn counts once, the first time,
    unless the hour is a wildcard: what runs every few minutes goes on through both hours.
    """
    local = datetime.fromtimestamp(after, zone)
    plain = _first_after(expression, local.replace(tzinfo=None), zone, after)
    hour = [*expression.split(), ""][1]
    second_pass = _second_pass(local, datetime.fromtimestamp(plain, zone)) if hour.startswith("*") else None
    if second_pass is None:
        return plain
    start, wall = second_pass
    return min(plain, _first_after(expression, wall, zone, max(after, start - 1e-3), fold=1))


def _first_after(expression: str, wall: datetime, zone: ZoneInfo, after: float, *, fold: int = 0) -> float:
    times = croniter(expression, wall)
    while True:
        candidate: datetime = times.get_next(datetime)
        at = candidate.replace(tzinfo=zone, fold=fold).timestamp()
        if at > after:
            return at


def _second_pass(start: datetime, end: datetime) -> tuple[float, datetime] | None:
    """Return when, between two local times, the clock is set back: the moment, and just before what the clock then shows; or `None`."""
    low, high = start.timestamp(), end.timestamp()
    zone = start.tzinfo
    before = start.utcoffset()
    after = end.utcoffset()
    if before is None or after is None or after >= before:
        if start.fold == 1 and before is not None:  # already in the second pass
            return low, start.replace(tzinfo=None, fold=0)
        return None
    while high - low > 0.5:
        middle = (low + high) / 2
        low, high = (middle, high) if datetime.fromtimestamp(middle, zone).utcoffset() == before else (low, middle)
    moment = float(round(high))
    wall = datetime.fromtimestamp(moment, UTC).replace(tzinfo=None) + after
    return moment, wall - timedelta(microseconds=1)


def _zone(name: str) -> ZoneInfo:
    try:
        return ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, IsADirectoryError):
        advice = "use an IANA name such as 'Europe/Berlin' (and pip install tzdata where the system has none)"
        raise ValueError(f"time zone {name!r} is unknown: {advice}") from None


def definition_id(definition: dict[str, Any]) -> str:
    """Return a stable id for a definition without a name: the same definition has the same id in every process."""
    canonical = dict(sorted((key, value) for key, value in definition.items() if value is not None))
    canonical["kwargs"] = dict(sorted((canonical.get("kwargs") or {}).items()))
    return hashlib.sha256(dump_json(canonical, "the arguments of a repeatable job")).hexdigest()[:24]
