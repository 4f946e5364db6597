"""`current_job()`: the job that a task runs for."""

from collections.abc import Generator, Mapping, Sequence
from contextvars import Context, ContextVar, copy_context
from dataclasses import dataclass, field
from typing import Any, Protocol, overload

from asyncmq_nats._arguments import WriteArguments, build_addition, write_plainly
from asyncmq_nats._new_jobs import whole_job
from asyncmq_nats.calls import Call
from asyncmq_nats.exceptions import InvalidFlow
from asyncmq_nats.jobs import Backoff, Job, JobHead

__all__ = ["JobContext", "JobLogLine", "JobServices", "current_job", "running_job"]

MOST_FOLLOW_UPS = 900


class _Awaitable:
    """Nothing to wait for: makes `await report_progress(…)` and a plain call the same."""

    def __await__(self) -> Generator[None, None, None]:
        return
        yield


DONE = _Awaitable()


@dataclass(frozen=True, slots=True)
class JobLogLine:
    """A line that a task kept with its job. `at`: Unix seconds by the server's clock."""

    at: float
    level: str
    message: str
    attempt: int


class JobServices(Protocol):
    """The services of a worker for the tasks that it runs."""

    def now(self) -> float:
        """Return the server's time."""

    def now_at_most(self) -> float:
        """Return the latest time that the server's clock may show now: delays count from it."""

    def report_progress(self, job: Job, progress: float, data: Any) -> None:
        """Store the progress of a job. It is called from any thread and must not block."""

    def keep_line(self, job_id: str, line: "JobLogLine") -> None:
        """Keep a line with a job. It is called from any thread and must not block."""

    async def results_of_parents(self, job: Job) -> dict[str, Any]:
        """Return the results of the jobs that a job depends on, by id."""


class JobSource(Protocol):
    """A holder of the job."""

    @property
    def job(self) -> Job:
        """All of the job."""

    @property
    def head(self) -> JobHead | Job:
        """The head of the job, known before all of it is read."""


@dataclass(slots=True)
class JobContext:
    """The job that runs, for its task."""

    id: str
    """The id of the job."""
    queue: str
    _source: JobSource = field(repr=False)
    _services: JobServices = field(repr=False)
    cancel_requested: bool = False
    """Whether the job was cancelled, or the worker wants it back.

    Sync tasks ask it now and then: no thread can be interrupted.
    """
    follow_ups: list[Job] = field(default_factory=list, repr=False)
    """The jobs that were added so far."""
    worker: str = ""
    """The id of the worker that runs it."""
    state: Any = field(default=None, repr=False)
    """The value that the worker's lifespan yielded; see `Queue(lifespan=…)`."""
    _write: WriteArguments = field(default=write_plainly, repr=False)
    origins: list[Context] | None = field(default=None, repr=False)
    """The context of each call of `add`, for the middleware; `None` if there is none."""
    _notes: dict[str, Any] | None = field(default=None, repr=False)

    @property
    def job(self) -> Job:
        """The job."""
        return self._source.job

    @property
    def task_id(self) -> str:
        """The id of the task."""
        return self._source.head.task_id

    @property
    def attempt(self) -> int:
        """The number of this attempt: 1 for the first."""
        retries = self._source.head.retries
        return (retries if isinstance(retries, int) else self.job.retries) + 1

    @property
    def snoozes(self) -> int:
        """How often in a row the task has put the job off by `Snooze` before this run."""
        return self.job.snoozes

    @property
    def meta(self) -> Mapping[str, str]:
        """The strings sent with the job, such as the id of a request or of a trace."""
        meta = self._source.head.meta
        if not isinstance(meta, dict):  # none, or what another program wrote
            return {}
        return {key: value for key, value in meta.items() if isinstance(value, str)}

    @property
    def notes(self) -> dict[str, Any]:
        """Values that a middleware keeps from the start of the run to its end.

        They are not stored.
        """
        if self._notes is None:
            self._notes = {}
        return self._notes

    def now(self) -> float:
        """Return the server's time, in Unix seconds: that of all times of a job."""
        return self._services.now()

    def report_progress(self, progress: float, data: Any = None) -> _Awaitable:
        """Store how far the job is, and tell its listeners.

        May be awaited, or called from a thread. `progress`: a share from 0 to 1. After the first
        ten, reports are sent at most 20 times a second, each time the latest one; the last one of
        the job always is.

        Raises:
            ValueError: it is not between 0 and 1.
            NotSerializable: the data is not JSON.
            PayloadTooLarge: the data does not fit into a message.
        """
        if not 0 <= progress <= 1:
            raise ValueError(f"progress must be between 0 and 1, not {progress}")
        self._services.report_progress(self.job, float(progress), data)
        return DONE

    def log(self, message: object, level: str = "INFO") -> None:
        """Keep a line with the job; see `Queue.job_logs`. May be called from a thread.

        The last `Settings.job_log_lines` lines of each attempt are kept, each up to 2,000
        characters, in all up to 128 KiB. They are written twice a second, and before the outcome.
        """
        line = JobLogLine(self._services.now(), level, str(message), self.attempt)
        self._services.keep_line(self.id, line)

    @overload
    def add(self, task_id: Call[Any], /) -> str: ...
    @overload
    def add(
        self,
        task_id: str,
        args: Sequence[Any] | None = None,
        kwargs: Mapping[str, Any] | None = None,
        retries: int = 0,
        ttl: float | None = None,
        backoff: float | Backoff | None = None,
        priority: int = 5,
        delay: float | None = None,
        depends_on: Sequence[str] | None = None,
        *,
        timeout: float | None = None,
        on_parent_failure: str = "wait",
        meta: Mapping[str, str] | None = None,
    ) -> str: ...

    def add(
        self,
        task_id: str | Call[Any],
        args: Sequence[Any] | None = None,
        kwargs: Mapping[str, Any] | None = None,
        retries: int = 0,
        ttl: float | None = None,
        backoff: float | Backoff | None = None,
        priority: int = 5,
        delay: float | None = None,
        depends_on: Sequence[str] | None = None,
        *,
        timeout: float | None = None,
        on_parent_failure: str = "wait",
        meta: Mapping[str, str] | None = None,
    ) -> str:
        """Add a follow-up job to the same queue and return its id; see `Queue.add`.

        It may be given as the `call` of a task, alone. It is committed together with this job's
        outcome, or, when this attempt fails or its worker dies, not at all. Its default `meta` is
        that of this job.

        Raises:
            InvalidFlow: it has 900 follow-ups already.
            NotSerializable, InvalidArgument: as for `Queue.add`.
        """
        if len(self.follow_ups) >= MOST_FOLLOW_UPS:
            raise InvalidFlow(
                f"a job can have {MOST_FOLLOW_UPS} follow-ups at most: add one that adds the others"
            )
        now, latest = self._services.now(), self._services.now_at_most()
        if isinstance(task_id, Call):
            task_id.require_queue(self.queue)
            return self._add(task_id.follow_up(now, latest, self.meta))
        job = build_addition(
            now,
            latest,
            write=self._write,
            task_id=task_id,
            args=args,
            kwargs=kwargs,
            retries=retries,
            ttl=ttl,
            backoff=backoff,
            priority=priority,
            delay=delay,
            timeout=timeout,
            depends_on=depends_on,
            on_parent_failure=on_parent_failure,
            meta=self.meta if meta is None else meta,
        )
        return self._add(whole_job(job))

    def _add(self, job: Job) -> str:
        job.encode()  # not JSON? Then say so here
        self.follow_ups.append(job)
        if self.origins is not None:
            self.origins.append(copy_context())
        return job.job_id

    async def parent_results(self) -> dict[str, Any]:
        """Return the results of the jobs that this one depends on, by id.

        Jobs that did not complete are left out.
        """
        return await self._services.results_of_parents(self.job)


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
