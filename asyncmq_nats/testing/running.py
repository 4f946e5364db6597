"""A task is run by itself, as a worker would: `run_task`, `job_context`."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import anyio

from asyncmq_nats.context import JobContext, JobLogLine, running_job
from asyncmq_nats.exceptions import InvalidArgument
from asyncmq_nats.jobs import Job, JobHead, new_job
from asyncmq_nats.runtime.registry import TASK_REGISTRY, RegisteredTask
from asyncmq_nats.settings import settings
from asyncmq_nats.tasks import TaskWrapper

__all__ = ["RunningJob", "job_context", "run_task"]

R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class _Source:
    job: Job

    @property
    def head(self) -> Job:
        return self.job


@dataclass(slots=True)
class _Services:
    """The services of a worker for the task."""

    parents: Mapping[str, Any]
    reports: list[tuple[float, Any]] = field(default_factory=list)
    lines: list[JobLogLine] = field(default_factory=list)

    def now(self) -> float:
        backend = settings.backend
        return new_job(task_id="now").created_at if backend is None else float(backend.now())

    def now_at_most(self) -> float:
        return self.now()

    def report_progress(self, job: Job, progress: float, data: Any) -> None:
        self.reports.append((progress, data))

    def keep_line(self, job_id: str, line: JobLogLine) -> None:
        self.lines.append(line)

    async def results_of_parents(self, job: Job) -> dict[str, Any]:
        return dict(self.parents)


@dataclass(frozen=True, slots=True)
class RunningJob:
    """The job of a test, and what its task does."""

    context: JobContext
    """The value of `current_job()`."""
    reports: list[tuple[float, Any]]
    """The progress that was reported: share and data."""
    lines: Sequence[JobLogLine] = ()
    """The lines that were kept by `current_job().log`."""

    @property
    def follow_ups(self) -> Sequence[Job]:
        """The jobs that were added by `current_job().add`."""
        return self.context.follow_ups


@contextmanager
def job_context(
    task: "TaskWrapper[..., Any] | str" = "test",
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    attempt: int = 1,
    parent_results: Mapping[str, Any] | None = None,
    job_id: str | None = None,
    queue: str | None = None,
    meta: Mapping[str, str] | None = None,
    state: Any = None,
) -> Iterator[RunningJob]:
    """Have `current_job()` return a job inside the block, for code that is called by a task.

    Args:
        task: the task, or the id of one.
        args: the arguments of the job.
        kwargs: likewise.
        attempt: the number of the attempt, 1 for the first.
        parent_results: what `current_job().parent_results()` returns, by the ids of the parents.
        job_id: the id of the job; by default a random one.
        queue: the name of the queue; by default the task's, or `test`.
        meta: what was sent along with the job.
        state: what the worker's lifespan yielded: `current_job().state`.

    Raises:
        InvalidArgument: attempt is less than 1.
    """
    if attempt < 1:
        raise InvalidArgument("attempt must be 1 or more", attempt)
    entry = task.entry if isinstance(task, TaskWrapper) else TASK_REGISTRY.get(task)
    parents = dict(parent_results or {})
    job = new_job(
        task_id=task if isinstance(task, str) else task.task_id,
        args=list(args),
        kwargs=dict(kwargs or {}),
        job_id=job_id,
        retries=attempt - 1,
        max_retries=max(attempt - 1, 0 if entry is None else entry.retries),
        depends_on=list(parents),
        meta=dict(meta or {}),
    )
    services = _Services(parents)
    name = queue or ("test" if entry is None else entry.queue)
    context = JobContext(
        job.job_id, name, _Source(job), services, state=state, _write=TASK_REGISTRY.write
    )
    token = running_job.set(context)
    try:
        yield RunningJob(context, services.reports, services.lines)
    finally:
        running_job.reset(token)


async def run_task(
    task: "TaskWrapper[..., R]",
    *args: Any,
    attempt: int = 1,
    parent_results: Mapping[str, Any] | None = None,
    job_id: str | None = None,
    meta: Mapping[str, str] | None = None,
    state: Any = None,
    **kwargs: Any,
) -> R:
    """Run a task as a worker runs it, and return what it returns.

    The arguments are written and read as for a job, so that what would not arrive is an error here
    too. `current_job()` is the job. A sync function runs in a thread, one with `process=True` too.
    An exception of the task is raised; there are no retries and no time limit.

    Args:
        task: the task.
        args: its arguments.
        attempt: the number of the attempt, 1 for the first.
        parent_results: what `current_job().parent_results()` returns, by the ids of the parents.
        job_id: the id of the job; by default a random one.
        meta: what was sent along with the job.
        state: what the worker's lifespan yielded.
        kwargs: its arguments by name.

    Raises:
        NotSerializable: an argument would not arrive equal.
    """
    entry = task.entry
    written = entry.arguments.write(args, kwargs, entry.id)
    with job_context(
        task,
        *written,
        attempt=attempt,
        parent_results=parent_results,
        job_id=job_id,
        meta=meta,
        state=state,
    ) as running:
        head = JobHead.decode(running.context.job.encode())
        result: R = await _here(entry).run(head, anyio.CapacityLimiter(1), running.context)
        return result


def _here(entry: RegisteredTask) -> RegisteredTask:
    """Return the task so that it runs in this process, where a test can watch it."""
    return replace(entry, process=False) if entry.process else entry
