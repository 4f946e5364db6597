"""Whether and when a failed job runs again. Pure functions of values."""

import traceback as tracebacks
from dataclasses import dataclass, replace
from typing import Final

from asyncmq_nats.jobs import Job

__all__ = ["Failure", "add_failure", "retry_delay"]

MAX_ERROR: Final = 2_000
MAX_TRACEBACK: Final = 4_000
MAX_ERRORS: Final = 10
MAX_DELAY: Final = 365 * 86_400.0


@dataclass(frozen=True, slots=True)
class Failure:
    """What went wrong in one attempt, and when (Unix seconds). Texts are cut so that they fit into the job's record."""

    error: str
    traceback: str
    at: float

    @classmethod
    def of(cls, error: BaseException, at: float) -> "Failure":
        """Return the failure that an exception stands for."""
        text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        return cls(_cut(text, MAX_ERROR), _cut("".join(tracebacks.format_exception(error)), MAX_TRACEBACK), at)


def _cut(text: str, length: int) -> str:
    """Return the text, its middle left out if it is longer."""
    if len(text) <= length:
        return text
    return text[: length // 3] + "\n…\n" + text[-(2 * length // 3) :]


def add_failure(job: Job, failure: Failure) -> Job:
    """Return the job after one more failed attempt."""
    entry = {"attempt": job.retries + 1, "error": failure.error, "traceback": failure.traceback, "at": failure.at}
    return replace(job, retries=job.retries + 1, errors=[*job.errors, entry][-MAX_ERRORS:])


def retry_delay(job: Job) -> float | None:
    """Return how long to wait before the next attempt of a job that has just failed, 0 for at once; `None`: no more attempts.

    As AsyncMQ: the n-th retry waits `backoff ** n` seconds, and none at all without a backoff.
    """
    if job.retries >= job.max_retries:
        return None
    if job.backoff is None:
        return 0.0
    try:
        return min(float(job.backoff ** (job.retries + 1)), MAX_DELAY)
    except OverflowError:
        return MAX_DELAY
