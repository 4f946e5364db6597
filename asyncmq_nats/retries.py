"""Whether and when a failed job runs again. Pure functions of values."""

import math
import random
import traceback as tracebacks
from collections.abc import Callable
from dataclasses import dataclass, replace
from inspect import signature
from typing import Any, Final

from pydantic import ValidationError

from asyncmq_nats._logging import get_logger
from asyncmq_nats.exceptions import Fail, Retry
from asyncmq_nats.jobs import Backoff, Job

__all__ = [
    "BackoffFunction",
    "FailedElsewhere",
    "Failure",
    "add_failure",
    "backoff_delay",
    "retry_delay",
]

logger = get_logger(__name__)

MAX_ERROR: Final = 2_000
MAX_TRACEBACK: Final = 4_000
MAX_ERRORS: Final = 10
MAX_DELAY: Final = 365 * 86_400.0

IN_DOUBT: Final = 1.5
"""The backoff when a task's own function fails: that of `@task`."""

BackoffFunction = Callable[[int], float] | Callable[[], float]
"""Given the number of the retry (1, 2, …), or nothing, the seconds to wait before it."""


@dataclass(frozen=True, slots=True)
class Failure:
    """What went wrong in one attempt, and when (Unix seconds). Texts are cut so that they fit into the job's record.

    `final`: no more attempts. `delay`: the task's own wish for when to try again.
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
    """Return the text without what UTF-8 cannot hold (lone surrogates), its middle left out if it is longer."""
    text = text.encode("utf-8", "replace").decode()
    if len(text) <= length:
        return text
    return text[: length // 3] + "\n…\n" + text[-(2 * length // 3) :]


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
    job: Job, failure: Failure, function: BackoffFunction | None = None
) -> float | None:
    """Return how long to wait before the next attempt of a job that has just failed, 0 for at once; `None`: no more attempts.

    The task's own wish comes first, then the job's backoff, then that of its task (`function`).
    """
    if failure.final or job.retries >= job.max_retries:
        return None
    retry = job.retries + 1
    if failure.delay is not None:
        wished = failure.delay
    elif job.backoff is not None:
        wished = backoff_delay(job.backoff, retry)
    else:
        wished = 0.0 if function is None else _ask(function, retry)
    return min(max(0.0, wished), MAX_DELAY)


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


def backoff_delay(
    backoff: float | Backoff, retry: int, share: Callable[[], float] = random.random
) -> float:
    """Return the seconds before the `retry`-th retry. A number is raised to the power of `retry` (AsyncMQ `Job.next_retry_delay`).

    `share`: where jitter takes its random number from 0 to 1.
    """
    try:
        if not isinstance(backoff, Backoff):
            return float(backoff**retry)
        delay = backoff.delay * (1.0 if backoff.kind == "fixed" else backoff.factor ** (retry - 1))
    except OverflowError:
        delay = MAX_DELAY
    if isinstance(backoff, Backoff):
        delay = min(delay, MAX_DELAY if backoff.maximum is None else backoff.maximum)
        delay *= 1.0 - backoff.jitter * share()
    return delay
