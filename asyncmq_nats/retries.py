"""Whether and when a failed job runs again. Pure functions of values."""

import math
import traceback as tracebacks
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from inspect import Parameter, signature
from typing import Any, Final, Literal

from pydantic import ValidationError

from asyncmq_nats._logging import get_logger
from asyncmq_nats.exceptions import Expired, Fail, InvalidArgument, Retry, Snooze
from asyncmq_nats.jobs import MAX_DELAY, Job, backoff_delay

__all__ = [
    "BackoffFunction",
    "ErrorTypes",
    "FailedElsewhere",
    "Failure",
    "RetryLimits",
    "add_failure",
    "backoff_delay",
    "checked_errors",
    "judge",
    "retry_delay",
    "snooze_delay",
]

logger = get_logger(__name__)

MAX_ERROR: Final = 2_000
MAX_TRACEBACK: Final = 4_000
MAX_ERRORS: Final = 100
"""The failed attempts whose errors a job keeps."""
FULL_ERRORS: Final = 5
"""The last ones, with all of the message and the traceback."""
SHORT_ERROR: Final = 120
"""Characters of the message that are kept of an earlier attempt."""

FALLBACK_BACKOFF: Final = 1.5
"""The backoff when a task's own function fails: that of `@task`."""

QUICK_RETRIES: Final = 10
"""The number of retries that may follow at once."""

BackoffFunction = (
    Callable[[int], float] | Callable[[], float] | Callable[[int, BaseException], float]
)
"""A function of the number of the retry (1, 2, …) and the exception, of the number, or of nothing.

It returns the seconds before the retry.
"""
ErrorTypes = type[BaseException] | Sequence[type[BaseException]]


@dataclass(frozen=True, slots=True)
class Failure:
    """The failure of one attempt, and its time (Unix seconds).

    Texts are cut so that they fit into the job's record.
    `final`: no more attempts. `delay`: the task's own wish for when to try again. `end`: the
    outcome of the job, if it is not decided by its retries. `kind`: the class of the exception.
    `lineage`: the names of its class and of its bases, when the `exception` itself stayed in the
    process that raised it.
    """

    error: str
    traceback: str
    at: float
    final: bool = False
    delay: float | None = None
    end: Literal["failed", "expired", "snoozed"] = "failed"
    kind: str = ""
    lineage: tuple[str, ...] = ()
    exception: BaseException | None = field(default=None, repr=False, compare=False)

    @classmethod
    def of(cls, error: BaseException, at: float) -> "Failure":
        """Return the failure that an exception stands for."""
        if isinstance(error, FailedElsewhere):
            return replace(error.failure, at=at)
        cause = _sole(error)
        trace = "".join(tracebacks.format_exception(error))
        failure = cls(
            _cut(_describe(error), MAX_ERROR),
            _cut(trace, MAX_TRACEBACK),
            at,
            isinstance(cause, Fail),
            cause.delay if isinstance(cause, Retry) else None,
            kind=_cut(_name(type(cause)), SHORT_ERROR),
            lineage=tuple(map(_name, type(cause).__mro__)),
            exception=cause,
        )
        if isinstance(cause, Snooze):
            return replace(failure, end="snoozed", delay=cause.seconds)
        return replace(failure, end="expired") if isinstance(cause, Expired) else failure

    def is_one_of(self, types: Sequence[type[BaseException]]) -> bool:
        """Return whether it is an exception of one of these classes."""
        if self.exception is not None:
            return isinstance(self.exception, tuple(types))
        return any(_name(each) in self.lineage for each in types)


def _sole(error: BaseException) -> BaseException:
    """Return the one exception of a group that holds no other: a task group raises nothing else."""
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error


def _name(kind: type) -> str:
    module = kind.__module__.replace("__mp_main__", "__main__")
    return kind.__qualname__ if module == "builtins" else f"{module}.{kind.__qualname__}"


class FailedElsewhere(Exception):
    """A task failed in another process; its exception may have no class here."""

    def __init__(self, failure: Failure) -> None:
        self.failure = failure
        super().__init__(failure.error)


def _describe(error: BaseException) -> str:
    name = type(error).__name__
    if isinstance(error, ValidationError):
        problems = error.errors(include_url=False, include_context=False)
        return f"{name}: " + "; ".join(
            f"{error.title}: {'.'.join(map(str, p['loc']))}: {p['msg']}" for p in problems[:5]
        )
    try:
        message = str(error)
    except Exception as problem:  # the user's code, like the task itself
        message = f"<its __str__ raised {type(problem).__name__}>"
    return f"{name}: {message}" if message else name


def _cut(text: str, length: int) -> str:
    """Return the text without lone surrogates, its middle left out if it is longer."""
    text = text.encode("utf-8", "replace").decode()
    if len(text) <= length:
        return text
    return text[: length // 3] + "\n…\n" + text[-(2 * length // 3) :]


@dataclass(frozen=True, slots=True)
class RetryLimits:
    """The limits of a worker for a job, whatever the job says.

    They are a number of retries, and the least delay of the later ones.
    """

    retries: int = 10_000
    delay: float = 1.0


NO_LIMITS: Final = RetryLimits(retries=2**63, delay=0.0)


def add_failure(job: Job, failure: Failure) -> Job:
    """Return the job after one more failed attempt."""
    entry = {
        "attempt": job.retries + 1,
        "error": failure.error,
        "traceback": failure.traceback,
        "at": failure.at,
    }
    if failure.kind:
        entry["type"] = failure.kind
    errors = [*job.errors, entry][-MAX_ERRORS:]
    if len(errors) > FULL_ERRORS:
        earlier = -FULL_ERRORS
        errors[:earlier] = [_shortened(each) for each in errors[:earlier]]
    return replace(job, retries=job.retries + 1, errors=errors)


def _shortened(entry: Mapping[str, Any]) -> dict[str, Any]:
    error = _cut(str(entry.get("error", "")), SHORT_ERROR)
    return {**entry, "error": error, "traceback": ""}


def checked_errors(types: ErrorTypes | None, name: str) -> tuple[type[BaseException], ...] | None:
    """Return the classes of exceptions that `@task` was given, in a tuple.

    Raises:
        InvalidArgument: one is no class of an exception.
    """
    if types is None:
        return None
    given = (types,) if isinstance(types, type) else types
    if not isinstance(given, list | tuple | set | frozenset):
        raise InvalidArgument(f"{name} must be a class of exceptions, or a tuple of them", types)
    for each in given:
        if not (isinstance(each, type) and issubclass(each, BaseException)):
            raise InvalidArgument(f"{name} must be a class of exceptions, or a tuple of them", each)
    return tuple(given)


def judge(
    failure: Failure,
    retry_on: Sequence[type[BaseException]] | None,
    give_up_on: Sequence[type[BaseException]] | None,
) -> Failure:
    """Return the failure as its task wants it treated.

    `give_up_on`: these exceptions are final. `retry_on`: all others are. A task's own `Retry` or
    `Snooze` comes first.
    """
    if failure.final or failure.end != "failed" or failure.is_one_of((Retry,)):
        return failure
    if give_up_on is not None and failure.is_one_of(give_up_on):
        return replace(failure, final=True)
    if retry_on is not None and not failure.is_one_of(retry_on):
        return replace(failure, final=True)
    return failure


def snooze_delay(job: Job, failure: Failure, limits: "RetryLimits") -> float:
    """Return how long to wait before a job runs again that its task has put off."""
    least = limits.delay if job.snoozes >= QUICK_RETRIES else 0.0
    return min(max(least, failure.delay or 0.0), MAX_DELAY)


def retry_delay(
    job: Job,
    failure: Failure,
    function: BackoffFunction | None = None,
    limits: RetryLimits = NO_LIMITS,
) -> float | None:
    """Return how long to wait before the next attempt of a job that has just failed, 0 for at once.

    `None`: no more attempts. The task's own wish comes first, then the job's backoff, then that of
    its task (`function`).
    """
    if job.max_retries > limits.retries and not job.retries:
        logger.warning(
            "job %s: its %d retries are cut to %d (max_retries_limit)",
            job.job_id,
            job.max_retries,
            limits.retries,
        )
    if failure.final or job.retries >= min(job.max_retries, limits.retries):
        return None
    retry = job.retries + 1
    if failure.delay is not None:
        wished = failure.delay
    elif job.backoff is not None:
        wished = backoff_delay(job.backoff, retry)
    else:
        wished = 0.0 if function is None else _ask(function, retry, failure)
    return min(max(limits.delay if retry > QUICK_RETRIES else 0.0, wished), MAX_DELAY)


def _ask(function: Callable[..., Any], retry: int, failure: Failure) -> float:
    try:
        error = failure.exception or FailedElsewhere(failure)
        given = (retry, error)[: _count_taken(function)]
        seconds = float(function(*given))
        if not math.isfinite(seconds):
            raise ValueError(f"{seconds} is no delay")
    except Exception as error:  # the user's code, like the task itself
        logger.error(
            "retry %d: its backoff function %r failed, so the default backoff counts: %r",
            retry,
            function,
            error,
        )
        return backoff_delay(FALLBACK_BACKOFF, retry)
    return seconds


def _count_taken(function: Callable[..., Any]) -> int:
    """Return how many arguments to pass to a backoff function.

    The second one is passed only if it is required.
    """
    parameters = signature(function).parameters.values()
    required = [
        each
        for each in parameters
        if each.default is Parameter.empty
        and each.kind in (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
    ]
    return 2 if len(required) >= 2 else min(len(parameters), 1)
