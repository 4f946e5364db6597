"""What a task can know of the job it runs for: `current_job()`."""

from collections.abc import Callable, Generator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from asyncmq_nats.jobs import Job

__all__ = ["JobContext", "current_job", "running_job"]


class _Awaitable:
    """Nothing to wait for: makes `await report_progress(…)` and a plain call the same."""

    def __await__(self) -> Generator[None, None, None]:
        return
        yield


DONE = _Awaitable()


@dataclass(slots=True)
class JobContext:
    """The job that runs. `attempt` is 1 for the first."""

    id: str
    task_id: str
    queue: str
    attempt: int
    job: Job = field(repr=False)
    report: Callable[[float, Any], None] = field(repr=False)
    cancel_requested: bool = False
    """Whether the job was cancelled, or the worker wants it back. For sync tasks to ask now and then: no thread can be interrupted."""

    def report_progress(self, progress: float, data: Any = None) -> _Awaitable:
        """Store how far the job is, and tell whoever listens. `progress`: a share from 0 to 1. May be awaited, and called from a thread.

        Raises:
            ValueError: it is not between 0 and 1.
            NotSerializable: the data is not JSON.
        """
        if not 0 <= progress <= 1:
            raise ValueError(f"progress must be between 0 and 1, not {progress}")
        self.report(float(progress), data)
        return DONE


running_job: ContextVar[JobContext] = ContextVar("asyncmq_nats_running_job")


def current_job() -> JobContext:
    """Return the job that the calling task runs for; also in a sync task's thread.

    Raises:
        LookupError: no job runs here.
    """
    try:
        return running_job.get()
    except LookupError:
        raise LookupError("current_job() was called outside a job") from None
