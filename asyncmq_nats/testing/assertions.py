"""Assertions on enqueued jobs, for tests with or without an event loop."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from asyncmq_nats.backends import default_backend
from asyncmq_nats.exceptions import InvalidArgument
from asyncmq_nats.jobs import Job
from asyncmq_nats.queues import Queue
from asyncmq_nats.runtime.registry import TASK_REGISTRY, TaskRegistry
from asyncmq_nats.states import OUTCOMES, State
from asyncmq_nats.tasks import TaskWrapper
from asyncmq_nats.testing.backend import Addition, VirtualBackend
from asyncmq_nats.testing.clock import to_seconds
from asyncmq_nats.wire.codec import dump_json, load_json

__all__ = ["EnqueuedJob", "assert_enqueued", "enqueued", "refute_enqueued"]

Task = TaskWrapper[..., Any] | str
SHOWN_JOBS: Final = 20
DELAY_TOLERANCE: Final = 1.0
"""By how many seconds a delay may differ from the one asked for."""


@dataclass(frozen=True)
class EnqueuedJob:
    """A job that was enqueued. Times are Unix seconds by the virtual clock."""

    id: str
    queue: str
    task: str
    args: list[Any]
    """The arguments as plain data, as they travel."""
    kwargs: dict[str, Any]
    state: State
    delay: float
    """How many seconds it was to wait when it was enqueued; 0 for one that was due."""
    due: float
    """When it is to run next, or was to."""
    priority: int
    job: Job = field(repr=False)
    """All of it, as it is now."""


def enqueued(
    task: Task | None = None,
    *,
    queue: str | None = None,
    state: str | None = None,
    backend: VirtualBackend | None = None,
) -> list[EnqueuedJob]:
    """Return the jobs that were enqueued, in order: those that wait, and those that have run.

    Jobs that were cancelled or removed, or whose time to live is over, are left out.

    Args:
        task: only those of this task, or of this task id.
        queue: only those of this queue.
        state: only those that are in this state now, such as `waiting`, `delayed` or `cancelled`.
        backend: where they are; by default the default backend.

    Raises:
        InvalidArgument: the backend is no `VirtualBackend`.
    """
    store = _backend(backend)
    wanted = None if task is None else _id_of(task)
    found = []
    for addition in tuple(store.additions.values()):
        if queue not in (None, addition.queue):
            continue
        job = _find(store, addition)
        if job is None or wanted not in (None, job.task):
            continue
        if job.state == state or (state is None and job.state is not State.CANCELLED):
            found.append(job)
    return found


def assert_enqueued(
    task: Task,
    args: Sequence[Any] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    *,
    delay: float | str | None = None,
    within: float | str | None = None,
    queue: str | None = None,
    priority: int | None = None,
    count: int | None = None,
    backend: VirtualBackend | None = None,
) -> EnqueuedJob:
    """Assert that such a job was enqueued, and return it, the last one of several.

    Args:
        task: the task, or its id.
        args: its positional arguments; those that are not given are not compared, nor are those
            of `kwargs`. An argument is found whether it was given by position or by name.
        kwargs: its arguments by name.
        delay: how long it was to wait when it was enqueued: seconds, or a text such as `"1h"`.
        within: with `delay`, by how much that may differ, by default 1 s. Alone: it is due within
            that time from now.
        queue: the name of its queue.
        priority: its priority.
        count: how many such jobs there are, exactly; by default one or more.
        backend: where; by default the default backend.

    Raises:
        AssertionError: there is none, or not as many; it tells what was enqueued.
        InvalidArgument: the backend is no `VirtualBackend`.
    """
    store = _backend(backend)
    jobs = enqueued(task, queue=queue, backend=store)
    wanted = _Wanted(store, _id_of(task), args, kwargs, delay, within, priority)
    matching = [job for job in jobs if wanted.matches(job)]
    if (count is None and matching) or (count is not None and len(matching) == count):
        return matching[-1] if matching else _nothing(_id_of(task))
    number = "no job" if not matching else f"{len(matching)} jobs instead of {count}"
    raise AssertionError(f"{number} of {wanted} enqueued\n{_tell(store, jobs)}")


def refute_enqueued(
    task: Task,
    args: Sequence[Any] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    *,
    delay: float | str | None = None,
    within: float | str | None = None,
    queue: str | None = None,
    priority: int | None = None,
    backend: VirtualBackend | None = None,
) -> None:
    """Assert that no such job was enqueued; see `assert_enqueued`.

    Raises:
        AssertionError: there is one; it tells what was enqueued.
        InvalidArgument: the backend is no `VirtualBackend`.
    """
    store = _backend(backend)
    wanted = _Wanted(store, _id_of(task), args, kwargs, delay, within, priority)
    jobs = enqueued(task, queue=queue, backend=store)
    if matching := [job for job in jobs if wanted.matches(job)]:
        raise AssertionError(
            f"{len(matching)} of {wanted} enqueued, and none should be\n{_tell(store, jobs)}"
        )


class _Wanted:
    """The expected values of a job."""

    def __init__(
        self,
        backend: VirtualBackend,
        task: str,
        args: Sequence[Any] | None,
        kwargs: Mapping[str, Any] | None,
        delay: float | str | None,
        within: float | str | None,
        priority: int | None,
    ) -> None:
        self._task = task
        self._registry = _registry_of(backend, task)
        self._arguments = self._named(*self._write(args or (), kwargs or {}))
        self._delay = None if delay is None else to_seconds(delay)
        self._within = None if within is None else to_seconds(within)
        self._priority = priority
        self._now = backend.now()
        given = {"args": args, "kwargs": kwargs, "delay": delay, "within": within}
        given["priority"] = priority
        self._told = ", ".join(f"{k}={v!r}" for k, v in given.items() if v is not None)

    def __str__(self) -> str:
        return f"task {self._task}" + (f" with {self._told}" if self._told else "") + " is"

    def matches(self, job: EnqueuedJob) -> bool:
        """Return whether the job matches."""
        there = self._named(job.args, job.kwargs)
        return (
            all(name in there and there[name] == each for name, each in self._arguments.items())
            and self._priority in (None, job.priority)
            and self._is_in_time(job)
        )

    def _is_in_time(self, job: EnqueuedJob) -> bool:
        if self._delay is not None:
            tolerance = DELAY_TOLERANCE if self._within is None else self._within
            return abs(job.delay - self._delay) <= tolerance
        return self._within is None or job.due <= self._now + self._within

    def _write(
        self, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> tuple[list[Any], dict[str, Any]]:
        """Return arguments as they travel. An incomplete call is written value by value."""
        entry = self._registry.get(self._task)
        if entry is not None:
            try:
                return self._registry.write(self._task, args, kwargs)
            except (TypeError, ValueError):
                pass
        written = load_json(dump_json({"args": list(args), "kwargs": dict(kwargs)}))
        return written["args"], written["kwargs"]

    def _named(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str | int, Any]:
        """Return arguments by the names of their parameters, or by their places without a name."""
        entry = self._registry.get(self._task)
        names = [] if entry is None else _positional_names(entry.function)
        placed: dict[str | int, Any] = {
            (names[place] if place < len(names) else place): value
            for place, value in enumerate(args)
        }
        return placed | dict(kwargs)


def _positional_names(function: Callable[..., Any]) -> list[str]:
    """Return the names of the parameters that can be given by position, in order."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return []
    kinds = inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD
    return [each.name for each in parameters if each.kind in kinds]


def _find(backend: VirtualBackend, addition: Addition) -> EnqueuedJob | None:
    """Return the job as it is now; `None` if it is gone."""
    job = _current(backend, addition)
    if job is None:
        return None
    first = load_json(addition.body).get("delay_until")
    return EnqueuedJob(
        id=job.job_id,
        queue=addition.queue,
        task=job.task_id,
        args=job.args,
        kwargs=job.kwargs,
        state=State(job.status),
        delay=0.0 if first is None else max(0.0, first - addition.at),
        due=addition.at if job.delay_until is None else job.delay_until,
        priority=job.priority,
        job=job,
    )


def _current(backend: VirtualBackend, addition: Addition) -> Job | None:
    queue = _queue_of(backend, addition.queue)
    keys, token = backend.keys_of(addition.queue), addition.token
    records = backend.find(keys.bucket_log, keys.later_all(token), keys.done_all(token))
    jobs = [job for record in records if (job := queue.job_in_bucket(record)) is not None]
    for record in backend.find(keys.ready_log, keys.ready_any(token)):
        priority, _ = keys.split_ready(record.subject)
        jobs.append(queue.ready_job(record, backend.tier_state(keys, priority)))
    ended = [job for job in jobs if job.status in OUTCOMES]
    return max(ended or jobs, key=lambda job: job.order, default=None)


def _queue_of(backend: VirtualBackend, name: str) -> Any:
    found = [queue for (each, _), queue in backend.queues.items() if each == name]
    return (found[0] if found else Queue(name, backend))._inspection


def _registry_of(backend: VirtualBackend, task: str) -> TaskRegistry:
    registries = [queue._registry for queue in backend.queues.values()]
    return next((each for each in registries if task in each), TASK_REGISTRY)


def _id_of(task: Task) -> str:
    if isinstance(task, str):
        return task
    task_id = getattr(task, "task_id", None)
    if not isinstance(task_id, str):
        raise InvalidArgument("a task is what @task made, or the id of one", task)
    return task_id


def _backend(backend: VirtualBackend | None) -> VirtualBackend:
    chosen = default_backend() if backend is None else backend
    if not isinstance(chosen, VirtualBackend):
        raise InvalidArgument(
            "what was enqueued is known of a VirtualBackend only: use the fixture amq_backend, "
            "or `with virtual_backend():`, around the code under test",
            chosen,
        )
    return chosen


def _tell(backend: VirtualBackend, jobs: Sequence[EnqueuedJob]) -> str:
    """Return what was enqueued: of this task, or else of any."""
    of, shown = "of this task", list(jobs)
    if not shown:
        of, shown = "at all", enqueued(backend=backend)
    if not shown:
        return "nothing was enqueued"
    lines = [
        f"  {job.task} args={job.args!r} kwargs={job.kwargs!r} delay={job.delay:g} "
        f"priority={job.priority} queue={job.queue} state={job.state}"
        for job in shown[-SHOWN_JOBS:]
    ]
    return "\n".join([f"enqueued {of}:", *lines])


def _nothing(task: str) -> EnqueuedJob:
    raise AssertionError(f"count=0 asserts that no job of task {task} is there: refute_enqueued")
