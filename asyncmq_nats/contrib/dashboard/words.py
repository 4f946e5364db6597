"""Values as people read them: times, durations, numbers, JSON, cron in words. Pure."""

import json
import math
import re
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, Final

from cron_descriptor import ExpressionDescriptor, FormatError, MissingFieldError, Options
from cron_descriptor import WrongArgumentError as WrongCronArgument

__all__ = [
    "ago",
    "cron_in_words",
    "duration",
    "every_in_words",
    "iso_time",
    "number",
    "pretty_json",
    "preview",
    "short_error",
    "signature_of_error",
    "size",
]

UNITS: Final = ((86_400.0, "d"), (3600.0, "h"), (60.0, "min"))
PREVIEW_LENGTH: Final = 120
LONGEST_JSON: Final = 200_000
"""Characters of one value that a page shows."""
ALIASES: Final = {
    "@hourly": "0 * * * *",
    "@daily": "0 0 * * *",
    "@midnight": "0 0 * * *",
    "@weekly": "0 0 * * 0",
    "@monthly": "0 0 1 * *",
    "@yearly": "0 0 1 1 *",
    "@annually": "0 0 1 1 *",
}
VARYING_PARTS: Final = (
    (re.compile(r"\b[0-9a-f]{8}-(?:[0-9a-f]{4}-){3}[0-9a-f]{12}\b", re.IGNORECASE), "‹id›"),
    (re.compile(r"0x[0-9a-f]+", re.IGNORECASE), "‹address›"),
    (re.compile(r"'[^'\n]{1,200}'|\"[^\"\n]{1,200}\""), "‹text›"),
    (re.compile(r"\b[0-9a-f]{16,}\b", re.IGNORECASE), "‹id›"),
    (re.compile(r"\d+(?:[.,:]\d+)*"), "‹n›"),
)
"""The parts in which two errors of one kind differ, and their placeholders."""


def duration(seconds: float | None) -> str:
    """Return a duration with two units at most, such as `3 min 20 s`."""
    if seconds is None or not math.isfinite(seconds):
        return "–"
    if seconds <= -0.0005:
        return f"-{duration(-seconds)}"
    if seconds < 1:
        return f"{abs(seconds) * 1000:.0f} ms"
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 60:
        return f"{seconds:.0f} s"
    whole = round(seconds)
    for index, (size, unit) in enumerate(UNITS):
        if whole >= size:
            count, rest = divmod(whole, int(size))
            smaller, name = (*UNITS, (1.0, "s"))[index + 1]
            lesser = int(rest // smaller)
            return f"{count} {unit}" + (f" {lesser} {name}" if lesser and count < 10 else "")
    return f"{whole} s"


def ago(at: float | None, now: float) -> str:
    """Return how long ago, or in how long, a time is."""
    if at is None:
        return "–"
    if abs(now - at) < 1:
        return "now"
    return f"{duration(now - at)} ago" if at < now else f"in {duration(at - now)}"


def iso_time(at: float | None) -> str:
    """Return a time in Unix seconds as ISO 8601, in UTC."""
    if at is None:
        return ""
    try:
        return datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds")
    except (OverflowError, ValueError, OSError):
        return str(at)


def number(value: float | None) -> str:
    """Return a number with its thousands apart."""
    if value is None:
        return "–"
    return f"{value:,.0f}" if value == int(value) or abs(value) >= 100 else f"{value:,.2g}"


def size(count: int | None) -> str:
    """Return a number of bytes in the unit that suits it."""
    if count is None:
        return "–"
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def preview(value: Any, length: int = PREVIEW_LENGTH) -> str:
    """Return a value as JSON on one line, shortened."""
    text = _dump(value, None)
    return text if len(text) <= length else text[: length - 1] + "…"


def pretty_json(value: Any) -> str:
    """Return a value as JSON on several lines, shortened if it is huge."""
    text = _dump(value, 2)
    if len(text) <= LONGEST_JSON:
        return text
    return f"{text[:LONGEST_JSON]}\n… ({len(text) - LONGEST_JSON:,} characters more)"


def _dump(value: Any, indent: int | None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent, default=str)


def call_preview(args: Any, kwargs: Any, length: int = PREVIEW_LENGTH) -> str:
    """Return arguments as a call has them, on one line, shortened."""
    parts = [preview(value, length) for value in (args or [])[:20]]
    parts += [f"{key}={preview(value, length)}" for key, value in list((kwargs or {}).items())[:20]]
    text = ", ".join(parts)
    return text if len(text) <= length else text[: length - 1] + "…"


def short_error(error: str | None) -> str:
    """Return the first line of an error."""
    return (error or "").strip().splitlines()[0][:300] if (error or "").strip() else ""


def signature_of_error(error: str | None) -> str:
    """Return the common form of errors of a kind: the first line without numbers, ids and texts."""
    text = short_error(error)
    for pattern, stand_in in VARYING_PARTS:
        text = pattern.sub(stand_in, text)
    return text or "no error was told"


@lru_cache(maxsize=1024)
def cron_in_words(expression: str | None) -> str:
    """Return a cron expression in words; nothing for one that has none."""
    if not expression:
        return ""
    plain = ALIASES.get(expression.strip().lower(), expression.strip())
    fields = plain.split()
    if len(fields) == 6:  # the seconds are last here, and first there
        plain = " ".join([fields[5], *fields[:5]])
    options = Options()
    options.use_24hour_time_format = True
    options.verbose = False
    try:
        return str(ExpressionDescriptor(plain, options).get_description())
    except (FormatError, MissingFieldError, WrongCronArgument, ValueError, IndexError):
        return ""


def every_in_words(seconds: float | None) -> str:
    """Return an interval in words."""
    if seconds is None:
        return ""
    for size, name in ((86_400.0, "day"), (3600.0, "hour"), (60.0, "minute"), (1.0, "second")):
        count = seconds / size
        if count >= 1 and count == int(count):
            return f"Every {name}" if count == 1 else f"Every {int(count)} {name}s"
    return f"Every {duration(seconds)}"
