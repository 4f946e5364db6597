"""The output of commands: tables for people, JSON for programs, names for pipes.

Results go to stdout, all else to stderr.
"""

import sys
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from math import isfinite
from typing import Any, Final

from pydantic_core import to_json
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from asyncmq_nats._logging import escape_controls

__all__ = [
    "Output",
    "duration",
    "instant",
    "interval",
    "number",
    "plain_json",
    "size",
]

PIPE_WIDTH: Final = 100_000
"""The width of an output that is no terminal: nothing is wrapped there."""
STYLES: Final = {
    "failed": "red",
    "expired": "red",
    "cancelled": "yellow",
    "completed": "green",
    "active": "cyan",
    "paused": "yellow",
}


def number(value: float) -> str:
    """Return a number with its thousands apart."""
    return f"{value:,}" if isinstance(value, int) else f"{value:,.1f}"


def duration(seconds: float | None) -> str:
    """Return a duration in its two largest units: `3d4h`, `1m05s`, `0.4s`."""
    if seconds is None:
        return "-"
    if seconds < 60:
        return f"{seconds:.1f}s" if seconds < 10 else f"{seconds:.0f}s"
    minutes, hours, days = int(seconds // 60), int(seconds // 3600), int(seconds // 86_400)
    if hours < 1:
        return f"{minutes}m{int(seconds) % 60:02d}s"
    if days < 1:
        return f"{hours}h{minutes % 60:02d}m"
    return f"{days}d{hours % 24:02d}h"


def interval(seconds: float) -> str:
    """Return an interval exactly, as it may be typed: `1h30m`, `0.5s`."""
    text, left = "", seconds
    for unit, length in (("d", 86_400.0), ("h", 3600.0), ("m", 60.0)):
        if left >= length:
            text += f"{int(left // length)}{unit}"
            left %= length
    return text + (f"{left:g}s" if left or not text else "")


def size(count: int) -> str:
    """Return a number of bytes in a larger unit: `1.2 MiB`."""
    value, units = float(count), ["B", "KiB", "MiB", "GiB", "TiB"]
    while value >= 1024 and len(units) > 1:
        value, units = value / 1024, units[1:]
    return f"{value:,.0f} {units[0]}" if units[0] == "B" else f"{value:,.1f} {units[0]}"


def instant(time: float | None) -> str:
    """Return a time as UTC to the second: `2026-01-31 12:00:00`."""
    if time is None or not isfinite(time):
        return "-"
    try:
        return datetime.fromtimestamp(time, UTC).strftime("%Y-%m-%d %H:%M:%S")
    except (OverflowError, OSError, ValueError):
        return f"{time:.0f}"


def plain_json(value: Any, *, indent: int | None = None) -> str:
    """Return a value as JSON; what JSON has no word for (infinity) is null."""
    return to_json(value, indent=indent, inf_nan_mode="null", by_alias=True).decode()


class Output:
    """Prints the output of one command."""

    def __init__(self) -> None:
        terminal = sys.stdout.isatty()
        self.console = Console(width=None if terminal else PIPE_WIDTH, highlight=False)
        self.errors = Console(
            stderr=True, width=None if sys.stderr.isatty() else PIPE_WIDTH, highlight=False
        )

    # -- results

    def line(self, text: str, style: str = "") -> None:
        """Print one line."""
        self.console.print(Text(escape_controls(text), style=style), soft_wrap=True)

    def text(self, text: str) -> None:
        """Print a text of several lines, such as a traceback."""
        for line in text.splitlines():
            self.line(line)

    def json(self, value: Any) -> None:
        """Print a value as indented JSON."""
        self.raw(plain_json(value, indent=2))

    def json_line(self, value: Any) -> None:
        """Print a value as JSON on one line, and at once.

        A program reads it while this one runs.
        """
        self.raw(plain_json(value))
        sys.stdout.flush()

    async def stream_json(self, values: AsyncIterator[Any]) -> None:
        """Print values as a JSON array, each as soon as it is there, on a line of its own."""
        before = "[\n"
        async for value in values:
            sys.stdout.write(before + plain_json(value))
            before = ",\n"
        sys.stdout.write("[]\n" if before == "[\n" else "\n]\n")

    def raw(self, text: str) -> None:
        """Print a text as it is."""
        sys.stdout.write(f"{text}\n")

    def table(self, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        """Print a table.

        A column whose name begins with `#` has numbers, and is set to the right.
        """
        table = make_table(columns, rows)
        self.console.print(table)

    def fields(self, values: Mapping[str, str]) -> None:
        """Print names and values below each other."""
        table = Table(box=None, show_header=False, pad_edge=False)
        table.add_column(style="bold", no_wrap=True)
        table.add_column(overflow="fold")
        for name, value in values.items():
            table.add_row(Text(name), _cell(value))
        self.console.print(table)

    # -- beside the results

    def note(self, text: str) -> None:
        """Print a note for the person, on stderr."""
        self.errors.print(Text(escape_controls(text)), soft_wrap=True)

    def error(self, text: str) -> None:
        """Print an error in one line."""
        line = " ".join(escape_controls(part.strip()) for part in text.splitlines())
        message = Text.assemble(("error: ", "bold red"), line)
        self.errors.print(message, soft_wrap=True)

    def progress(self, total: int, what: str) -> tuple[Progress, Callable[[int], None]]:
        """Return a bar, to be entered, and what moves it."""
        bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=self.errors,
            transient=True,
            disable=not self.errors.is_terminal,
        )
        task = bar.add_task(what, total=total)
        return bar, lambda done: bar.update(task, completed=done)


def make_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """Return a table; see `Output.table`."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        right = column.startswith("#")
        table.add_column(column.lstrip("#"), justify="right" if right else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(_cell, row))
    return table


def _cell(value: str) -> Text:
    return Text(escape_controls(value), style=STYLES.get(value, ""))
