"""`@task`: functions that workers run, and that producers enqueue by calling a method of them."""

from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import update_wrapper
from inspect import Parameter, ismethod, signature
from types import EllipsisType
from typing import Any, Final, Generic, Literal, ParamSpec, Protocol, TypeVar, overload

from asyncmq_nats._concurrency import call_either
from asyncmq_nats.backends import default_backend
from asyncmq_nats.backends.base import Backend
from asyncmq_nats.calls import Call
from asyncmq_nats.context import DONE
from asyncmq_nats.exceptions import InvalidArgument
from asyncmq_nats.handles import JobHandle
from asyncmq_nats.jobs import Backoff
from asyncmq_nats.queues import Queue
from asyncmq_nats.retries import BackoffFunction, ErrorTypes
from asyncmq_nats.runtime.registry import TASK_REGISTRY, RegisteredTask, TaskRegistry
from asyncmq_nats.store.topology import DEFAULT_PRIORITY
from asyncmq_nats.wire.arguments import Results

__all__ = ["TASK_REGISTRY", "TaskOptions", "TaskRegistry", "TaskWrapper", "list_tasks", "task"]

P = ParamSpec("P")
R = TypeVar("R")
F = TypeVar("F", bound=Callable[..., Any])

QUEUES: Final = "_asyncmq_nats_queues"
"""The attribute of a backend that keeps its queues, so that they go with it."""


@dataclass(frozen=True, slots=True)
class TaskOptions(Generic[P, R]):
    """A task with options for its jobs: `send.options(delay=60).enqueue("ada@…")`.

    All arguments are the task's.
    """

    _task: "TaskWrapper[P, R]"
    _queue: Queue | str | None = None
    _backend: Backend | None = None
    _validate: bool = True
    _fields: Mapping[str, Any] = field(default_factory=dict)

    async def enqueue(self, *args: P.args, **kwargs: P.kwargs) -> JobHandle[R]:
        """Add a job that runs the task with these arguments. Return its id, which knows its job.

        Raises:
            InvalidCall: the task would refuse the arguments.
            AsyncMQError: as for `Queue.add`.
        """
        call = self.call(*args, **kwargs)  # before a connection is made
        queue = self._resolve_queue()
        return self._task.handle(await queue.add_call(call), queue)

    def call(self, *args: P.args, **kwargs: P.kwargs) -> Call[R]:
        """Return the call as a value, for `add_bulk`, flows and follow-ups.

        Raises:
            InvalidCall: the task would refuse the arguments.
            NotSerializable: one would not arrive equal.
        """
        entry, queue = self._task.entry, self._queue
        written, named = entry.arguments.write(args, kwargs, entry.id)
        if self._validate:
            entry.arguments.check(written, named, entry.id)
        name = queue.name if isinstance(queue, Queue) else queue or entry.queue
        return Call(entry.id, name, written, named, {**self._task.declared, **self._fields})

    def _resolve_queue(self) -> Queue:
        if isinstance(self._queue, Queue):
            return self._queue
        return self._task.queue(self._backend, self._queue)


def _enqueue_of_asyncmq(  # the signature that `inspect` shows
    self: Any,
    *args: Any,
    backend: Backend | None = None,
    delay: float = 0,
    priority: int = DEFAULT_PRIORITY,
    depends_on: Sequence[str] | None = None,
    on_parent_failure: str = "wait",
    repeat_every: float | str | None = None,
    job_id: str | None = None,
    **kwargs: Any,
) -> Any: ...


OUR_KEYWORDS: Final = frozenset(
    name
    for name, parameter in signature(_enqueue_of_asyncmq).parameters.items()
    if parameter.kind is Parameter.KEYWORD_ONLY
)
"""The keywords of `enqueue`; a parameter of the task with such a name takes precedence."""


def _with_signature_of(model: Callable[..., Any]) -> Callable[[F], F]:
    def copy_signature(function: F) -> F:
        vars(function)["__signature__"] = signature(model)
        return function

    return copy_signature


class TaskWrapper(Generic[P, R]):
    """A function that is a task.

    Awaiting a call runs it here; `enqueue` has a worker run it (AsyncMQ `TaskWrapper`). Type
    checkers check the arguments of a call, of `call`, of `options(…).enqueue`, and of `enqueue`
    without keywords of its own: a signature cannot have both. They check none of a task with
    `progress=True`: the caller does not give one of its parameters.
    """

    def __init__(self, entry: RegisteredTask, registry: TaskRegistry = TASK_REGISTRY) -> None:
        update_wrapper(self, entry.function)
        self.entry = replace(entry, wrapper=self)
        self.task_id = entry.id
        self._registry = registry
        self._keywords = OUR_KEYWORDS - entry.arguments.names
        self.declared = {
            "retries": entry.retries,
            "ttl": entry.ttl,
            "backoff": entry.backoff,
            "timeout": entry.timeout,
        }
        self._results = Results(entry.function, validate=entry.validate)

    async def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Run the function here; a sync one in a thread."""
        if self.entry.progress:
            kwargs.setdefault("report_progress", _report_nothing)
        result: R = await call_either(self.entry.function, *args, **kwargs)
        return result

    # One overload for each keyword that may be the first of those that are given, and one for none.
    @overload
    async def enqueue(self, *args: P.args, **kwargs: P.kwargs) -> JobHandle[R]: ...
    @overload
    async def enqueue(
        self,
        *args: Any,
        backend: Backend | None,
        delay: float = ...,
        priority: int = ...,
        depends_on: Sequence[str] | None = ...,
        on_parent_failure: str = ...,
        repeat_every: float | str | None = ...,
        job_id: str | None = ...,
        **kwargs: Any,
    ) -> JobHandle[R]: ...
    @overload
    async def enqueue(
        self,
        *args: Any,
        delay: float,
        priority: int = ...,
        depends_on: Sequence[str] | None = ...,
        on_parent_failure: str = ...,
        repeat_every: float | str | None = ...,
        job_id: str | None = ...,
        **kwargs: Any,
    ) -> JobHandle[R]: ...
    @overload
    async def enqueue(
        self,
        *args: Any,
        priority: int,
        depends_on: Sequence[str] | None = ...,
        on_parent_failure: str = ...,
        repeat_every: float | str | None = ...,
        job_id: str | None = ...,
        **kwargs: Any,
    ) -> JobHandle[R]: ...
    @overload
    async def enqueue(
        self,
        *args: Any,
        depends_on: Sequence[str] | None,
        on_parent_failure: str = ...,
        repeat_every: float | str | None = ...,
        job_id: str | None = ...,
        **kwargs: Any,
    ) -> JobHandle[R]: ...
    @overload
    async def enqueue(
        self, *args: Any, repeat_every: float | str | None, job_id: str | None = ..., **kwargs: Any
    ) -> JobHandle[R]: ...
    @overload
    async def enqueue(self, *args: Any, job_id: str | None, **kwargs: Any) -> JobHandle[R]: ...

    @_with_signature_of(_enqueue_of_asyncmq)
    async def enqueue(self, *args: Any, **kwargs: Any) -> JobHandle[R]:
        """Add a job that runs the task with these arguments, on the task's queue.

        Return its id, a `str` that knows its job.

        `backend`, `delay`, `priority`, `depends_on`, `on_parent_failure`, `repeat_every` and
        `job_id` are as for `Queue.add`; if the task has a parameter of such a name, the parameter
        is meant. `options` has them all, and takes no name from the task.

        Raises:
            InvalidCall: the task would refuse the arguments.
            AsyncMQError: as for `Queue.add`.
        """
        given = {name: kwargs.pop(name) for name in self._keywords & kwargs.keys()}
        if "delay" in given:
            given["delay"] = given["delay"] or None
        backend = given.pop("backend", None)
        options: TaskOptions[..., R] = TaskOptions(self, None, backend, True, given)
        return await options.enqueue(*args, **kwargs)

    delay = enqueue
    send = enqueue

    def options(
        self,
        *,
        queue: Queue | str | None = None,
        backend: Backend | None = None,
        delay: float | None = None,
        priority: int = DEFAULT_PRIORITY,
        retries: int | None = None,
        backoff: float | Backoff | EllipsisType | None = ...,
        ttl: float | EllipsisType | None = ...,
        timeout: float | EllipsisType | None = ...,
        job_id: str | None = None,
        deduplication: Mapping[str, Any] | None = None,
        depends_on: "Sequence[str | Call[Any]] | None" = None,
        on_parent_failure: Literal["wait", "fail", "run"] = "wait",
        repeat_every: float | str | None = None,
        meta: Mapping[str, str] | None = None,
        validate: bool = True,
    ) -> TaskOptions[P, R]:
        """Return the task with options for the jobs of its `enqueue` and its `call`.

        Args:
            queue: another queue than the task's, by name or with its backend; its workers must run
                the task (`any_task`).
            backend: by default that of `queue`, or the default backend.
            delay: as for `Queue.add`, like priority, job_id, deduplication, on_parent_failure,
                repeat_every and meta.
            priority: see `Queue.add`.
            retries: instead of those of `@task`, like backoff, ttl and timeout; `None` as there.
            backoff: see `retries`.
            ttl: see `retries`.
            timeout: see `retries`.
            job_id: see `Queue.add`.
            deduplication: see `Queue.add`.
            depends_on: ids of jobs; in a flow also other calls of it.
            on_parent_failure: see `Queue.add`.
            repeat_every: see `Queue.add`.
            meta: see `Queue.add`.
            validate: whether arguments that the task would refuse are refused here; by the task's
                worker, if not.

        Raises:
            InvalidArgument: the queue and the backend do not belong together.
        """
        if isinstance(queue, Queue) and backend not in (None, queue.backend):
            raise InvalidArgument("options(queue=…) has a backend already: give no other", backend)
        given = {
            "delay": delay,
            "priority": priority,
            "job_id": job_id,
            "deduplication": deduplication,
            "depends_on": depends_on,
            "on_parent_failure": on_parent_failure,
            "repeat_every": repeat_every,
            "meta": meta,
            "retries": retries,
        }
        fields: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        declared = {"backoff": backoff, "ttl": ttl, "timeout": timeout}
        fields |= {name: value for name, value in declared.items() if value is not ...}
        return TaskOptions(self, queue, backend, validate, fields)

    def call(self, *args: P.args, **kwargs: P.kwargs) -> Call[R]:
        """Return a call of the task as a value, for `add_bulk`, flows and follow-ups.

        See `TaskOptions.call`.
        """
        return TaskOptions(self).call(*args, **kwargs)

    def queue(self, backend: Backend | None = None, name: str | None = None) -> Queue:
        """Return the queue to which `enqueue` adds; by default `@task`'s on the default backend."""
        return _queue(name or self.entry.queue, backend, self._registry)

    def handle(self, job_id: str, queue: Queue | None = None) -> JobHandle[R]:
        """Return the handle of a job of this task by its id.

        It does no I/O: the job need not exist.
        """
        return JobHandle(job_id, queue or self.queue(), self._results)


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


@overload
def task(
    queue: str,
    retries: int = ...,
    ttl: float | None = ...,
    progress: Literal[False] = ...,
    *,
    backoff: float | Backoff | BackoffFunction | None = ...,
    timeout: float | None = ...,
    process: bool = ...,
    validate: bool = ...,
    name: str | None = ...,
    registry: TaskRegistry = ...,
    retry_on: ErrorTypes | None = ...,
    give_up_on: ErrorTypes | None = ...,
) -> _Decorator: ...
@overload
def task(
    queue: str,
    retries: int = ...,
    ttl: float | None = ...,
    progress: bool = ...,
    *,
    backoff: float | Backoff | BackoffFunction | None = ...,
    timeout: float | None = ...,
    process: bool = ...,
    validate: bool = ...,
    name: str | None = ...,
    registry: TaskRegistry = ...,
    retry_on: ErrorTypes | None = ...,
    give_up_on: ErrorTypes | None = ...,
) -> _ProgressDecorator: ...


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
        backoff: likewise; also a function that is given the number of the retry (1, 2, …), and if
            it takes two arguments the exception, and returns seconds.
        timeout: likewise.
        progress: the function is given `report_progress(share, data=None)`, a share from 0 to 1; in
            async functions it may be awaited.
        process: run it in a process of its own, for work that keeps the processor busy; sync
            functions only.
        validate: make the arguments what the annotations say; without, the function is given plain
            data.
        name: the id of the task, instead of `module.function`.
        registry: where workers find it.
        retry_on: the class of exceptions, or several, after which a job is retried; after all
            others it is not.
        give_up_on: likewise, those after which it is not retried.

    Raises:
        InvalidArgument: it has no name, or is a method of a class.
        ValueError: another function has its name.
    """
    if callable(queue):
        raise InvalidArgument("@task needs the name of a queue: @task(queue='email')", queue)

    def decorate(function: Callable[..., Any], /) -> TaskWrapper[..., Any]:
        _refuse_method(function)
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
        registry[entry.id] = wrapper.entry  # AsyncMQ's registry has the wrapper as well
        return wrapper

    return decorate


def _report_nothing(progress: float, data: Any = None) -> Awaitable[None]:
    """Stand in for `report_progress` where no job runs."""
    return DONE


def list_tasks() -> dict[str, RegisteredTask]:
    """Return a copy of the default registry (AsyncMQ `list_tasks`)."""
    return dict(TASK_REGISTRY)


def _refuse_method(function: Callable[..., Any]) -> None:
    owner = getattr(function, "__qualname__", "").rpartition(".")[0]
    code = getattr(function, "__code__", None)
    if ismethod(function) or code is None or not owner or owner.endswith("<locals>"):
        return
    if code.co_varnames[:1] == ("self",):
        raise InvalidArgument(
            "@task cannot decorate a method, whose object a job cannot carry: "
            "make a task of the bound method, task('queue')(mailer.send), or use a staticmethod",
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
