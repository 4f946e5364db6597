"""Whether and when a failed job runs again. Pure functions of values."""

import math
import traceback as tracebacks
from collections.abc import Callable
from dataclasses import dataclass, replace
from inspect import signature
from typing import Any, Final

from pydantic import ValidationError

from asyncmq_nats._logging import get_logger
from asyncmq_nats.exceptions import Fail, Retry
from asyncmq_nats.jobs import MAX_DELAY, Job, backoff_delay

__all__ = [
    "BackoffFunction",
    "FailedElsewhere",
    "Failure",
    "RetryLimits",
    "add_failure",
    "backoff_delay",
    "retry_delay",
]

logger = get_logger(__name__)

MAX_ERROR: Final = 2_000
MAX_TRACEBACK: Final = 4_000
MAX_ERRORS: Final = 10

IN_DOUBT: Final = 1.5
"""The backoff when a task's own function fails: that of `@task`."""

QUICK_RETRIES: Final = 10
"""The number of retries that may follow at once."""

BackoffFunction = Callable[[int], float] | Callable[[], float]
"""Given the number of the retry (1, 2, …), or nothing, the seconds to wait before it."""


@dataclass(frozen=True, slots=True)
class Failure:
    """What went wrong in one attempt, and when (Unix seconds).

    Texts are cut so that they fit into the job's record. `final`: no more attempts. `delay`: the
    task's own wish for when to try again.
    """

    error: str
    traceback: str
    at: float
    final: bool = False
    delay: float | None = None

    @classmethod
    def of(cls, error: BaseException, at: float) -> "Failure":
        """Return the failure that an exception stands for."""
        if isinstance(error, FailedElsewhere):
            return replace(error.failure, at=at)
        delay = error.delay if isinstance(error, Retry) else None
        trace = "".join(tracebacks.format_exception(error))
        return cls(
            _cut(_describe(error), MAX_ERROR),
            _cut(trace, MAX_TRACEBACK),
            at,
            isinstance(error, Fail),
            delay,
        )


class FailedElsewhere(Exception):
    """A task failed in another process; what it raised there may mean nothing here."""

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
    """What a worker grants to a job, whatever the job says.

    A number of retries; the later ones are some seconds apart at least.
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
    return replace(job, retries=job.retries + 1, errors=[*job.errors, entry][-MAX_ERRORS:])


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
            "job %s: of its %d retries it gets %d (the limit is max_retries_limit)",
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
        wished = 0.0 if function is None else _ask(function, retry)
    return min(max(limits.delay if retry > QUICK_RETRIES else 0.0, wished), MAX_DELAY)


def _ask(function: Callable[..., Any], retry: int) -> float:
    try:
        seconds = float(function(retry) if signature(function).parameters else function())
        if not math.isfinite(seconds):
            raise ValueError(f"{seconds} is no delay")
    except Exception as error:  # the user's code, like the task itself
        logger.error(
            "retry %d is not delayed as its task wishes: backoff function %r: %r",
            retry,
            function,
            error,
        )
        return backoff_delay(IN_DOUBT, retry)
    return seconds
