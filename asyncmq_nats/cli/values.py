"""Parses values of the command line: times, durations, arguments, and selections of jobs."""

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, Any, Final

import typer
from pydantic_core import from_json

from asyncmq_nats import JobFilter, State
from asyncmq_nats.cli.command import CommandFailed, Options
from asyncmq_nats.cli.output import moment
from asyncmq_nats.schedules import parse_every

__all__ = [
    "Arguments",
    "ArgumentsAsJson",
    "ChosenDelayed",
    "ChosenJobs",
    "ChosenToEdit",
    "JobsToMove",
    "Keywords",
    "MatchingJobs",
    "Selection",
    "parse_duration",
    "parse_future",
    "parse_json",
    "parse_keywords",
    "parse_past",
    "parse_value",
    "select",
]

LEAST_UNIX_TIME: Final = 1_000_000_000.0
"""A number from here on is a time in Unix seconds, a smaller one a duration."""


def parse_past(text: str, now: float) -> float:
    """Return a time in Unix seconds, of `2h` (two hours before now), ISO 8601, or Unix seconds.

    A date without a zone is in UTC.

    Raises:
        CommandFailed: it is none of these.
    """
    return _parse_time(text, now, -1)


def parse_future(text: str, now: float) -> float:
    """Return a time as `parse_past` does, but `2h` is two hours from now."""
    return _parse_time(text, now, 1)


def _parse_time(text: str, now: float, direction: int) -> float:
    try:
        value = datetime.fromisoformat(text.strip())
    except ValueError:
        pass
    else:
        return (value if value.tzinfo else value.replace(tzinfo=UTC)).timestamp()
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if number >= LEAST_UNIX_TIME:
        return number
    try:
        return now + direction * parse_every(text)
    except ValueError:
        raise CommandFailed(
            f"{text!r} is no time: write 10m, 2h, 2026-01-31T12:00, or Unix seconds"
        ) from None


def parse_duration(text: str | None) -> float | None:
    """Return a duration in seconds, of a text such as `90`, `5m` or `1h30m`.

    Raises:
        CommandFailed: it is none.
    """
    if text is None or text == "0":
        return None if text is None else 0.0
    try:
        return parse_every(text)
    except ValueError:
        raise CommandFailed(f"{text!r} is no duration: write 90, 5m or 1h30m") from None


def parse_value(text: str) -> Any:
    """Return the value of a JSON text; what is no JSON is a text."""
    try:
        return from_json(text, allow_inf_nan=False)
    except ValueError:
        return text


def parse_json(text: str | None, option: str, kind: type) -> Any:
    """Return the list or the object that an option was given as JSON; `None` for none.

    Raises:
        CommandFailed: it is something else.
    """
    if text is None:
        return None
    value = parse_value(text)
    if not isinstance(value, kind):
        raise CommandFailed(f"{option} must be a JSON {'list' if kind is list else 'object'}")
    return value


def parse_keywords(pairs: Sequence[str] | None) -> dict[str, Any] | None:
    """Return the values of texts such as `name=value`; `None` for none.

    Raises:
        CommandFailed: one has no `=`.
    """
    if not pairs:
        return None
    values = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or not name:
            raise CommandFailed(f"{pair!r} is no argument by name: write NAME=VALUE")
        values[name] = parse_value(text)
    return values


Keywords = Annotated[
    list[str] | None,
    typer.Option("--kwarg", "-k", metavar="NAME=VALUE", help="Argument by name; JSON or a text."),
]
Arguments = Annotated[
    list[str] | None,
    typer.Argument(metavar="[ARG]...", help="Arguments in order; each JSON or a text."),
]
ArgumentsAsJson = Annotated[
    str | None, typer.Option("--args", metavar="JSON", help="A list: all arguments in order.")
]


# -- which jobs


def _complete_states(incomplete: str) -> list[str]:
    return [state for state in State if state.startswith(incomplete)]


JobIds = Annotated[
    list[str] | None,
    typer.Argument(metavar="[ID]...", help="Ids of jobs; `-` reads them from stdin, one a line."),
]
States = Annotated[
    list[str] | None,
    typer.Option(
        "--state",
        metavar="STATE",
        help=f"Jobs in this state: {', '.join(State)}. May be given several times.",
        autocompletion=_complete_states,
    ),
]
OfTask = Annotated[
    str | None, typer.Option("--task", metavar="NAME", help="Jobs of this task; * and ? match.")
]
Text = Annotated[
    str | None,
    typer.Option(
        "--search", metavar="TEXT", help="Found in the id, task, arguments, error or result."
    ),
]
Since = Annotated[
    str | None,
    typer.Option("--since", metavar="TIME", help="In their state since then: 2h (ago), or a date."),
]
Until = Annotated[
    str | None,
    typer.Option("--until", metavar="TIME", help="In their state before: 10m (ago), or a date."),
]
OfWorker = Annotated[
    str | None, typer.Option("--worker", metavar="ID", help="Run by this worker; * and ? match.")
]
AllJobs = Annotated[bool, typer.Option("--all", "-a", help="All jobs, without a filter.")]

FILTER: Final[dict[str, Any]] = {"task": OfTask, "search": Text, "since": Since, "until": Until}
CHOICE: Final[dict[str, Any]] = FILTER | {"everything": AllJobs}

# The options that say which jobs a command is for: `select` takes them.
MatchingJobs = Annotated[dict[str, Any], Options(state=States, **FILTER, worker=OfWorker)]
ChosenJobs = Annotated[
    dict[str, Any],
    Options(ids=JobIds, state=States, **FILTER, worker=OfWorker, everything=AllJobs),
]
ChosenToEdit = Annotated[dict[str, Any], Options(ids=JobIds, state=States, **CHOICE)]
ChosenDelayed = Annotated[dict[str, Any], Options(ids=JobIds, **CHOICE)]
JobsToMove = Annotated[dict[str, Any], Options(state=States, **CHOICE)]


@dataclass(frozen=True, slots=True)
class Selection:
    """The jobs that a command is for: those of some ids, or those that match a filter."""

    ids: tuple[str, ...] = ()
    where: JobFilter | None = None
    words: tuple[str, ...] = ()
    """The filter options as they may be typed again, without `--until`."""


def select(
    now: float,
    *,
    ids: Iterable[str] | None = None,
    state: Sequence[str] | None = None,
    task: str | None = None,
    search: str | None = None,
    since: str | None = None,
    until: str | None = None,
    worker: str | None = None,
    everything: bool = False,
) -> Selection:
    """Return which jobs are meant.

    Raises:
        CommandFailed: neither ids nor a filter are given, or both.
        InvalidArgument: there is no such state.
    """
    start = None if since is None else parse_past(since, now)
    given = {
        "--task": task,
        "--search": search,
        "--since": None if start is None else moment(start),  # `2h` is another time later
        "--worker": worker,
    }
    words = [word for each in state or () for word in ("--state", each)]
    words += [word for name, value in given.items() if value is not None for word in (name, value)]
    found = tuple(_read_ids(ids))
    narrowed = bool(words) or until is not None
    if found and (narrowed or everything):
        raise CommandFailed("give either ids of jobs, or a filter, not both")
    if found:
        return Selection(found)
    if not narrowed and not everything:
        raise CommandFailed("say which jobs: ids, or a filter such as --task, or --all")
    where = JobFilter(
        state=state or None,
        task=task,
        text=search,
        since=start,
        until=None if until is None else parse_past(until, now),
        worker=worker,
    )
    return Selection(where=where, words=tuple(words) if narrowed else ("--all",))


def _read_ids(ids: Iterable[str] | None) -> list[str]:
    found = []
    for each in ids or ():
        if each == "-":
            found += [line.strip() for line in sys.stdin if line.strip()]
        else:
            found.append(each)
    return found
