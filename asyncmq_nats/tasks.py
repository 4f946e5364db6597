"""`@task`: functions that workers run, and that producers enqueue by calling a method of them."""

from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import replace
from functools import update_wrapper
from typing import Any, Final, Generic, Literal, ParamSpec, Protocol, TypeVar, overload

from asyncmq_nats._concurrency import call_either
from asyncmq_nats.backends import default_backend
from asyncmq_nats.backends.base import Backend
from asyncmq_nats.context import DONE
from asyncmq_nats.exceptions import InvalidArgument
from asyncmq_nats.jobs import Backoff
from asyncmq_nats.queues import Queue
from asyncmq_nats.retries import BackoffFunction, ErrorTypes
from asyncmq_nats.runtime.registry import TASK_REGISTRY, RegisteredTask, TaskRegistry
from asyncmq_nats.store.topology import DEFAULT_PRIORITY
from asyncmq_nats.wire.arguments import Arguments

__all__ = ["TASK_REGISTRY", "TaskRegistry", "TaskWrapper", "list_tasks", "task"]

P = ParamSpec("P")
R = TypeVar("R")

OUR_KEYWORDS: Final = frozenset(
    {
        "backend",
        "delay",
        "depends_on",
        "job_id",
        "on_parent_failure",
        "priority",
        "repeat_every",
    }
)
"""The keywords of `enqueue`: a task cannot be given arguments of these names by it."""
QUEUES: Final = "_asyncmq_nats_queues"
"""The attribute of a backend that keeps its queues, so that they go with it."""


class TaskWrapper(Generic[P, R]):
    """A function that is a task. Awaiting a call runs it here; `enqueue` has a worker run it (AsyncMQ `TaskWrapper`).

    Type checkers check the arguments of a call, and those of `enqueue` where it is given none of its own keywords: a signature cannot
    have both. Of a task with `progress=True` they check none, since a parameter is not given by the caller.
    """

    def __init__(self, entry: RegisteredTask, registry: TaskRegistry = TASK_REGISTRY) -> None:
        update_wrapper(self, entry.function)
        self.entry = replace(entry, wrapper=self)
        self.task_id = entry.id
        self._registry = registry

    async def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Run the function here; a sync one in a thread."""
        if self.entry.progress:
            kwargs.setdefault("report_progress", _report_nothing)
        result: R = await call_either(self.entry.function, *args, **kwargs)
        return result

    # One overload for each keyword that may be the first of those that are given, and one for none.
    # fmt: off
    @overload
    async def enqueue(self, *args: P.args, **kwargs: P.kwargs) -> str: ...
    @overload
    async def enqueue(
        self, *args: Any, backend: Backend | None, delay: float = ..., priority: int = ..., depends_on: Sequence[str] | None = ...,
        on_parent_failure: str = ..., repeat_every: float | str | None = ..., job_id: str | None = ..., **kwargs: Any,
    ) -> str: ...
    @overload
    async def enqueue(
        self, *args: Any, delay: float, priority: int = ..., depends_on: Sequence[str] | None = ..., on_parent_failure: str = ...,
        repeat_every: float | str | None = ..., job_id: str | None = ..., **kwargs: Any,
    ) -> str: ...
    @overload
    async def enqueue(
        self, *args: Any, priority: int, depends_on: Sequence[str] | None = ..., on_parent_failure: str = ...,
        repeat_every: float | str | None = ..., job_id: str | None = ..., **kwargs: Any,
    ) -> str: ...
    @overload
    async def enqueue(
        self, *args: Any, depends_on: Sequence[str] | None, on_parent_failure: str = ..., repeat_every: float | str | None = ...,
        job_id: str | None = ..., **kwargs: Any,
    ) -> str: ...
    @overload
    async def enqueue(self, *args: Any, repeat_every: float | str | None, job_id: str | None = ..., **kwargs: Any) -> str: ...
    @overload
    async def enqueue(self, *args: Any, job_id: str | None, **kwargs: Any) -> str: ...
    # fmt: on

    async def enqueue(
        self,
        *args: Any,  # to a type checker, `P` might have one of these names, of another type
        backend: Any = None,
        delay: Any = 0,
        priority: Any = DEFAULT_PRIORITY,
        depends_on: Any = None,
        on_parent_failure: Any = "wait",
        repeat_every: Any = None,
        job_id: Any = None,
        **kwargs: Any,
    ) -> str:
        """Add a job that runs the task with these arguments, on the task's queue, and return its id.

        `backend`, `delay`, `priority`, `depends_on`, `on_parent_failure`, `repeat_every` and `job_id` are as for `Queue.add`; `@task`
        refuses a function that has a parameter of one of these names.
        """
        entry = self.entry
        return await _queue(entry.queue, backend, self._registry).add(
            entry.id,
            args,
            kwargs,
            retries=entry.retries,
            ttl=entry.ttl,
            backoff=entry.backoff,
            timeout=entry.timeout,
            priority=priority,
            delay=delay or None,
            job_id=job_id,
            depends_on=depends_on,
            on_parent_failure=on_parent_failure,
            repeat_every=repeat_every,
        )

    delay = enqueue
    send = enqueue


class _Decorator(Protocol):
    """Makes a function a task whose calls take its arguments."""

    @overload
    def __call__(self, function: Callable[P, Coroutine[Any, Any, R]], /) -> TaskWrapper[P, R]: ...
    @overload
    def __call__(self, function: Callable[P, R], /) -> TaskWrapper[P, R]: ...


class _ProgressDecorator(Protocol):
    """Makes a function a task that is given one argument more than its calls."""

    @overload
    def __call__(
        self, function: Callable[..., Coroutine[Any, Any, R]], /
    ) -> TaskWrapper[..., R]: ...
    @overload
    def __call__(self, function: Callable[..., R], /) -> TaskWrapper[..., R]: ...


# fmt: off
@overload
def task(
    queue: str, retries: int = ..., ttl: float | None = ..., progress: Literal[False] = ..., *,
    backoff: float | Backoff | BackoffFunction | None = ..., timeout: float | None = ..., process: bool = ..., validate: bool = ...,
    name: str | None = ..., registry: TaskRegistry = ..., retry_on: ErrorTypes | None = ..., give_up_on: ErrorTypes | None = ...,
) -> _Decorator: ...
@overload
def task(
    queue: str, retries: int = ..., ttl: float | None = ..., progress: bool = ..., *,
    backoff: float | Backoff | BackoffFunction | None = ..., timeout: float | None = ..., process: bool = ..., validate: bool = ...,
    name: str | None = ..., registry: TaskRegistry = ..., retry_on: ErrorTypes | None = ..., give_up_on: ErrorTypes | None = ...,
) -> _ProgressDecorator: ...
# fmt: on


def task(
    queue: str,
    retries: int = 0,
    ttl: float | None = None,
    progress: bool = False,
    *,
    backoff: float | Backoff | BackoffFunction | None = 1.5,
    timeout: float | None = None,
    process: bool = False,
    validate: bool = True,
    name: str | None = None,
    registry: TaskRegistry = TASK_REGISTRY,
    retry_on: ErrorTypes | None = None,
    give_up_on: ErrorTypes | None = None,
) -> _Decorator | _ProgressDecorator:
    """Make a function a task (AsyncMQ `task`).

    Args:
        queue: the name of the queue that `enqueue` adds to.
        retries: for the jobs that `enqueue` adds; see `Queue.add`.
        ttl: likewise.
        backoff: likewise; also a function that is given the number of the retry (1, 2, …), and if it takes two arguments the exception,
            and returns seconds.
        timeout: likewise.
        progress: the function is given `report_progress(share, data=None)`, a share from 0 to 1; in async functions it may be awaited.
        process: run it in a process of its own, for work that keeps the processor busy; sync functions only.
        validate: make the arguments what the annotations say; without, the function is given plain data.
        name: the id of the task, instead of `module.function`.
        registry: where workers find it.
        retry_on: the class of exceptions, or several, after which a job is retried; after all others it is not.
        give_up_on: those after which it is not.

    Raises:
        InvalidArgument: `enqueue` could not give one of its parameters, or it has no name.
        ValueError: another function has its name.
    """
    if callable(queue):
        raise InvalidArgument("@task needs the name of a queue: @task(queue='email')", queue)

    def decorate(function: Callable[..., Any], /) -> TaskWrapper[..., Any]:
        _check_names(function)
        entry = registry.register(
            function,
            queue=queue,
            name=name,
            retries=retries,
            ttl=ttl,
            backoff=backoff,
            timeout=timeout,
            progress=progress,
            process=process,
            validate=validate,
            retry_on=retry_on,
            give_up_on=give_up_on,
        )
        wrapper: TaskWrapper[..., Any] = TaskWrapper(entry, registry)
        registry[entry.id] = wrapper.entry  # AsyncMQ's registry has the wrapper, too
        return wrapper

    return decorate


def _report_nothing(progress: float, data: Any = None) -> Awaitable[None]:
    """Stand in for `report_progress` where no job runs."""
    return DONE


def list_tasks() -> dict[str, RegisteredTask]:
    """Return a copy of the default registry (AsyncMQ `list_tasks`)."""
    return dict(TASK_REGISTRY)


def _check_names(function: Callable[..., Any]) -> None:
    names = Arguments(function).names
    if taken := sorted(names & OUR_KEYWORDS):
        raise InvalidArgument(
            f"a task cannot have a parameter {taken[0]!r}, since enqueue() has one of that name: "
            "rename it, or register the function by TaskRegistry.register and add by Queue.add",
            function,
        )


def _queue(name: str, backend: Backend | None, registry: TaskRegistry) -> Queue:
    backend = default_backend() if backend is None else backend
    if not hasattr(backend, "__dict__"):
        return Queue(name, backend, registry=registry)
    queues: dict[tuple[str, int], Queue] = vars(backend).setdefault(QUEUES, {})
    key = name, id(registry)  # the queue keeps the registry
    if key not in queues:
        queues[key] = Queue(name, backend, registry=registry)
    return queues[key]
