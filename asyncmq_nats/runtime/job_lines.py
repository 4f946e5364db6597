"""The log lines of a worker's jobs: start, end, failure, each one line with the job's fields."""

import logging
from collections.abc import Callable
from typing import Any

from asyncmq_nats._logging import get_logger
from asyncmq_nats.exceptions import InvalidJob
from asyncmq_nats.jobs import Job
from asyncmq_nats.retries import Failure
from asyncmq_nats.transitions.claim import Attempt

__all__ = ["JobLines"]

logger = get_logger(__name__)


class JobLines:
    """The lines of one worker.

    `level`: of those that tell of a start and of a result. `now`: returns the server's time.
    """

    def __init__(self, queue: str, worker: str, level: str, now: Callable[[], float]) -> None:
        self._queue = queue
        self._worker = worker
        self._now = now
        self._level = logging.getLevelNamesMapping()[level]

    def _fields(self, job: Job) -> dict[str, Any]:
        return {
            "job_id": job.job_id,
            "task": job.task_id,
            "queue": self._queue,
            "attempt": job.retries + 1,
            "worker": self._worker,
        }

    def started(self, attempt: Attempt) -> None:
        """Log a start. It is on the path of every job."""
        if logger.isEnabledFor(self._level) and (job := _read(attempt)) is not None:
            text = "job %s (%s) started, attempt %d"
            args = (job.job_id, job.task_id, job.retries + 1)
            logger.log(self._level, text, *args, extra=self._fields(job))

    def completed(self, attempt: Attempt) -> None:
        """Log a result. It is on the path of every job."""
        if logger.isEnabledFor(self._level) and (job := _read(attempt)) is not None:
            seconds = round(self._now() - attempt.started_at, 6)
            extra = self._fields(job) | {"duration": seconds}
            text = "job %s (%s) completed in %.3f s"
            logger.log(self._level, text, job.job_id, job.task_id, seconds, extra=extra)

    def retried(self, job: Job, failure: Failure, delay: float) -> None:
        """Log that an attempt failed, and that another one follows."""
        text = "job %s (%s) is retried in %g s: %s"
        args = (job.job_id, job.task_id, delay, failure.error)
        logger.info(text, *args, extra=self._fields(job))

    def failed(self, job: Job, failure: Failure) -> None:
        """Log that a job failed for good, with its exception: error trackers look for that."""
        text = "job %s (%s) failed: %s"
        args = (job.job_id, job.task_id, failure.error)
        logger.error(text, *args, exc_info=failure.exception, extra=self._fields(job))


def _read(attempt: Attempt) -> Job | None:
    """Return the job; `None` if a part is malformed that is not needed to run it."""
    try:
        return attempt.job
    except InvalidJob:
        return None
