"""Filters of jobs, and whether a job matches one. Pure functions of values."""

import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Final

from asyncmq_nats.exceptions import InvalidArgument
from asyncmq_nats.jobs import Job
from asyncmq_nats.states import State
from asyncmq_nats.wire.codec import dump_json

__all__ = ["JobFilter"]

WILDCARDS: Final = re.compile(r"[*?]")
SEARCHED_FIELDS: Final = ("job_id", "task_id", "args", "kwargs", "last_error", "result")
"""Fields of a job in which a text is looked for."""


@dataclass(frozen=True, slots=True)
class JobFilter:
    """A filter of jobs. Criteria that are not given match all.

    Args:
        state: one state, or several.
        task: the name of the task; `*` and `?` stand for any letters and any letter.
        text: found in the id, the task, the arguments, the error or the result, in any case.
        since: Unix seconds; jobs that reached their state then or later: for outcomes, that ended.
        until: Unix seconds; jobs that reached their state before.
        worker: id of the worker that ran the job, or runs it; as `task`, with `*` and `?`.

    Raises:
        InvalidArgument: there is no such state.
    """

    state: str | Iterable[str] | None = None
    task: str | None = None
    text: str | None = None
    since: float | None = None
    until: float | None = None
    worker: str | None = None

    def __post_init__(self) -> None:
        given = () if self.state is None else self.state
        names = dict.fromkeys([given] if isinstance(given, str) else given)
        for name in names:
            if name not in set(State):
                raise InvalidArgument(f"state must be one of {', '.join(State)}", name)
        object.__setattr__(self, "state", tuple(State(name) for name in names) or None)

    @property
    def states(self) -> tuple[State, ...]:
        """The states of the filter; all if none was given."""
        wanted = State if self.state is None else self.state
        return tuple(State(name) for name in wanted)

    def may_match(self, subject: str, body: bytes) -> bool:
        """Return whether a job may match, by a cheap search of its bytes before they are parsed.

        JSON has several forms of a letter: a text with escapes or other alphabets may match.
        """
        if b"\\u" in body:
            return True
        if self.task is not None:
            piece = max(WILDCARDS.split(self.task), key=len)
            if _is_plain(piece) and piece.encode() not in body:
                return False
        if self.text is None or not _is_plain(self.text):
            return True
        needle = self.text.lower()
        return needle.encode() in body.lower() or needle in subject.lower()

    @property
    def looks_into_jobs(self) -> bool:
        """Whether `includes` does not say all."""
        return not (self.task is None and self.worker is None and self.text is None)

    def includes(self, state: State, at: float) -> bool:
        """Return whether a job in that state matches, by what its key and its record say."""
        return (
            (self.state is None or state in self.state)
            and (self.since is None or at >= self.since)
            and (self.until is None or at < self.until)
        )

    def matches(self, job: Job, at: float, running: Collection[str] = ()) -> bool:
        """Return whether a job matches.

        Args:
            job: the job, as it was found.
            at: when it reached its state, in Unix seconds.
            running: ids of the jobs that the filter's workers run now.
        """
        return (
            self.includes(job.status, at)
            and (self.task is None or _fits(job.task_id, self.task))
            and (self.worker is None or self._is_of_worker(job, running))
            and (self.text is None or self.text.lower() in _searched_text(job))
        )

    def _is_of_worker(self, job: Job, running: Collection[str]) -> bool:
        if job.status is State.ACTIVE:
            return job.job_id in running
        return self.fits_worker(job.worker)

    def fits_worker(self, worker: str | None) -> bool:
        """Return whether the filter includes the worker of that id."""
        return worker is not None and (self.worker is None or _fits(worker, self.worker))


def _fits(value: str, pattern: str) -> bool:
    return fnmatchcase(value, pattern.replace("[", "[[]"))


def _is_plain(text: str) -> bool:
    """Return whether a text stands in JSON as it is: no escape, and no other alphabet."""
    return text.isascii() and text.isprintable() and not set(text) & set('"\\/')


def _searched_text(job: Job) -> str:
    """Return the texts in a job as they are, and as JSON: a person may look for either."""
    values = [getattr(job, name) for name in SEARCHED_FIELDS]
    return "\n".join([*_texts_in(values), dump_json(values).decode()]).lower()


def _texts_in(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for inner in (*value, *value.values()):
            yield from _texts_in(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _texts_in(inner)
