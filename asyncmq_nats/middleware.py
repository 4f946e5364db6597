"""Middleware, hooks and lifespan: code around jobs and around the life of a worker."""

import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import filterfalse
from typing import Any, Final, Literal, NamedTuple, Protocol

import anyio
from anyio.abc import TaskStatus

from asyncmq_nats._arguments import checked_meta
from asyncmq_nats._concurrency import open_task_group
from asyncmq_nats._logging import get_logger
from asyncmq_nats.context import JobContext
from asyncmq_nats.exceptions import InvalidArgument
from asyncmq_nats.jobs import Job

__all__ = [
    "AddJobs",
    "CarryContext",
    "Chain",
    "EndState",
    "Ending",
    "Hook",
    "Hooks",
    "Lifespan",
    "Middleware",
    "RunTask",
    "add_middleware",
    "checked_middleware",
    "is_any_added",
    "remove_middleware",
]

logger = get_logger(__name__)

AddJobs = Callable[[Sequence[Job]], Awaitable[list[str]]]
"""Adds the jobs, by the next middleware or for good, and returns their ids in order."""
RunTask = Callable[[], Awaitable[Any]]
"""Runs the task, by the next middleware or for good, and returns its result."""


EndState = Literal["completed", "failed", "expired", "cancelled", "retrying", "snoozed"]


class Ending(NamedTuple):  # a third of the time of a frozen dataclass: it is made for each job
    """How an attempt at a job ended."""

    state: EndState
    """The state after the attempt. `retrying` and `snoozed`: the job will run again."""
    started_at: float
    """When the attempt began (Unix seconds, the server's); 0 if it did not."""
    ended_at: float
    result: Any = None
    error: str | None = None
    """The error in one line: `ValueError: not an address`."""
    error_type: str | None = None
    """The class of the exception: `ValueError`, `smtplib.SMTPException`."""
    traceback: str | None = None
    exception: BaseException | None = None
    """The exception itself, if there is one and it could be sent to this process."""
    delay: float | None = None
    """Seconds until the job runs again."""


class Middleware(Protocol):
    """Code around each job. Derive from it, and override what you need.

    The first one that was added is the outermost: its `enqueue` and `run` begin first and end
    last; `end` is called in the opposite order. Those of `add_middleware` are outside those of
    `Queue(middleware=…)`. A worker has those that were added when it starts.
    """

    async def enqueue(self, queue: str, jobs: Sequence[Job], add: AddJobs) -> list[str]:
        """Do something around the addition of jobs: call `add`, once, and return the ids.

        `jobs` are one, those of `add_bulk`, or those of a flow. Pass on as many, changed by
        `dataclasses.replace` if wished; their ids stay. To refuse them, raise an error.

        Jobs that a task adds by `current_job().add` come one by one when it has returned, each in
        the context (`contextvars`) of its call; `add` then returns at once, since they are stored
        with the result. What the server adds, repeats of a job, comes by no middleware.
        """
        return await add(jobs)

    async def run(self, context: JobContext, call: RunTask) -> Any:
        """Do something around each run of a task: `await call()`, and return its result.

        It runs in the task and the context of the job, within its timeout. An error that it raises
        is the job's; cancellation passes through it.
        """
        return await call()

    def end(self, context: JobContext, ending: Ending) -> Awaitable[None] | None:
        """Do something when the end of an attempt is stored. Its exceptions are logged.

        `async def`, or a plain function, which costs less: it is called at once, in the event
        loop, and must not block. It is also called for jobs that end without a run: expired, or
        given up after their workers were lost. It is not called when a worker hands a job back,
        or dies: at most once.
        """
        return None  # a body, so that a subclass need not have one


CARRIED_PREFIX: Final = "context."
"""How the names of carried context variables begin in `meta`."""
OVERRIDABLE: Final = ("enqueue", "run", "end")
_added: list[tuple[str | None, Middleware]] = []
"""Those of `add_middleware`, and the queue of each; `None`: of all."""


class CarryContext(Middleware):
    """Carries context variables from where a job is added to where its task runs.

    `add_middleware(CarryContext(tenant, request_id))`. Their values are texts, and go in `meta`
    under `context.<name>`. One that is not set, or is `None`, is left alone. Jobs that a task adds
    carry them on. A task that runs in a process of its own does not see them: it has no context.

    Raises:
        InvalidArgument: one is no `ContextVar`, or two have one name.
    """

    def __init__(self, *variables: ContextVar[Any]) -> None:
        for each in variables:
            if not isinstance(each, ContextVar):
                raise InvalidArgument("CarryContext takes ContextVar objects", each)
        self._variables = {CARRIED_PREFIX + each.name: each for each in variables}
        if len(self._variables) < len(variables):
            raise InvalidArgument(
                "CarryContext needs variables of different names", list(self._variables)
            )

    async def enqueue(self, queue: str, jobs: Sequence[Job], add: AddJobs) -> list[str]:
        """Write the values into the `meta` of the jobs."""
        values = {key: each.get(None) for key, each in self._variables.items()}
        carried = {key: value for key, value in values.items() if value is not None}
        if not carried:
            return await add(jobs)
        checked_meta(carried)
        return await add([replace(job, meta=job.meta | carried) for job in jobs])

    async def run(self, context: JobContext, call: RunTask) -> Any:
        """Set the variables while the task runs."""
        meta = context.meta
        tokens = [
            (each, each.set(meta[key])) for key, each in self._variables.items() if key in meta
        ]
        try:
            return await call()
        finally:
            for each, token in reversed(tokens):
                each.reset(token)


def add_middleware(middleware: Middleware, queue: str | None = None) -> None:
    """Have a middleware called for the jobs of a queue, or of all queues, in this process.

    Raises:
        InvalidArgument: it has no method `enqueue`, `run` or `end`.
    """
    _added.append((queue, checked_middleware(middleware)))


def is_any_added() -> bool:
    """Return whether `add_middleware` was called: a producer asks it for each job."""
    return bool(_added)


def remove_middleware(middleware: Middleware) -> None:
    """Undo `add_middleware`. Workers that run keep it."""
    _added[:] = [entry for entry in _added if entry[1] is not middleware]


def checked_middleware(middleware: Middleware) -> Middleware:
    """Return a middleware.

    Raises:
        InvalidArgument: it has no async method `enqueue` or `run`, and no method `end`.
    """
    around = [getattr(middleware, name, None) for name in ("enqueue", "run")]
    is_one = any(map(inspect.iscoroutinefunction, around)) or _overrides(middleware, "end")
    if isinstance(middleware, type) or not is_one:
        raise InvalidArgument(
            "a middleware must be an object with an async method enqueue or run, or a method end",
            middleware,
        )
    return middleware


def _overrides(middleware: Middleware, name: str) -> bool:
    """Return whether the middleware has that method.

    A class that does not derive from `Middleware` may lack it.
    """
    method = getattr(type(middleware), name, None)
    return method is not None and method is not getattr(Middleware, name)


def _waits_at_end(middleware: Middleware) -> bool:
    """Return whether its `end` is a coroutine function, whatever it is wrapped in."""
    return inspect.iscoroutinefunction(inspect.unwrap(middleware.end))


@dataclass(frozen=True, slots=True)
class Chain:
    """The middleware of one queue: those that do something in each place, outermost first.

    `ends`: those whose `end` is awaited; `plain_ends`: those whose `end` is a plain function.
    """

    queue: str = ""
    enqueues: tuple[Middleware, ...] = ()
    runs: tuple[Middleware, ...] = ()
    ends: tuple[Middleware, ...] = ()
    plain_ends: tuple[Middleware, ...] = ()

    @classmethod
    def of(cls, queue: str, own: Sequence[Middleware] = ()) -> "Chain":
        """Return the middleware of a queue now. `own`: that of its `Queue` object."""
        if not _added and not own:
            return cls(queue)
        members = [*(each for name, each in _added if name in (None, queue)), *own]
        of = {name: tuple(m for m in members if _overrides(m, name)) for name in OVERRIDABLE}
        awaited = tuple(filter(_waits_at_end, of["end"]))
        plain = tuple(filterfalse(_waits_at_end, of["end"]))
        return cls(queue, of["enqueue"], of["run"], awaited, plain)

    async def enqueue(self, jobs: Sequence[Job], store: AddJobs) -> list[str]:
        """Add jobs through all of them.

        Raises:
            InvalidArgument: one passes on another number of jobs, or returns no list of ids.
        """
        count = len(jobs)

        async def add(given: Sequence[Job]) -> list[str]:
            if len(given) != count:
                problem = f"a middleware must pass on as many jobs as it was given ({count})"
                raise InvalidArgument(problem, len(given))
            for job in given:
                checked_meta(job.meta)
            return await store(given)

        call: AddJobs = add
        for middleware in reversed(self.enqueues):
            call = partial(_enqueue, middleware, self.queue, call)
        return await call(jobs)

    def run(self, context: JobContext, call: RunTask) -> Awaitable[Any]:
        """Run a task within all of them."""
        for middleware in reversed(self.runs):
            call = partial(middleware.run, context, call)
        return call()

    def end_at_once(self, context: JobContext, ending: Ending) -> None:
        """Call the plain functions `end`, the innermost first."""
        for middleware in reversed(self.plain_ends):
            try:
                if middleware.end(context, ending) is not None:
                    raise TypeError("a plain `end` returned something: write `async def end`")
            except Exception:
                _log_failed_end(context, middleware)

    async def end(self, context: JobContext, ending: Ending) -> None:
        """Await the others, the innermost first."""
        for middleware in reversed(self.ends):
            try:
                if (told := middleware.end(context, ending)) is not None:
                    await told
            except Exception:
                _log_failed_end(context, middleware)


def _log_failed_end(context: JobContext, middleware: Middleware) -> None:
    logger.exception("job %s: the end of its middleware %r failed", context.id, middleware)


async def _enqueue(
    middleware: Middleware, queue: str, add: AddJobs, jobs: Sequence[Job]
) -> list[str]:
    ids: object = await middleware.enqueue(queue, jobs, add)
    if not isinstance(ids, list) or len(ids) != len(jobs):
        raise InvalidArgument(f"{middleware!r}.enqueue must return the ids of add(jobs)", ids)
    return ids


# -- the life of a worker

Hook = Callable[..., Any]
"""A function, sync or async, or an object that is called like one.

It is given those of the keywords `backend`, `worker_id` and `queue` that it takes.
"""
Lifespan = Callable[..., AbstractAsyncContextManager[Any]]
"""Returns an async context manager, of what a worker's jobs have as `current_job().state`.

It is given keywords as a hook is.
"""


@dataclass(slots=True)
class Hooks:
    """The hooks of a queue's workers, and their arguments."""

    given: dict[str, Any] = field(default_factory=dict)
    on_startup: list[Hook] = field(default_factory=list)
    on_shutdown: list[Hook] = field(default_factory=list)
    lifespan: Lifespan | None = None

    @asynccontextmanager
    async def open_lifespan(self, worker: str) -> AsyncIterator[Any]:
        """Hold the lifespan open inside the block; its value is that of the lifespan, or `None`.

        It lives in a task of its own: cancellation of the worker does not cut its end short.
        """
        if self.lifespan is None:
            yield None
            return
        closing = anyio.Event()
        async with open_task_group() as group:
            try:
                yield await group.start(self._hold_lifespan, worker, closing)
            finally:
                closing.set()

    async def _hold_lifespan(
        self, worker: str, closing: anyio.Event, *, task_status: TaskStatus[Any]
    ) -> None:
        assert self.lifespan is not None
        try:
            with anyio.CancelScope() as scope:
                async with self.lifespan(**self._keywords(self.lifespan, worker)) as state:
                    scope.shield = True
                    task_status.started(state)
                    await closing.wait()
        except Exception:
            if not closing.is_set():  # it could not begin, or something in it has failed
                raise
            logger.exception("worker %s: the end of its lifespan failed", worker)

    async def start(self, worker: str) -> None:
        """Call what was registered for the start, in order.

        An error ends the worker before it runs a job.
        """
        for hook in self.on_startup:
            await self._call(hook, worker)

    async def stop(self, worker: str) -> None:
        """Call what was registered for the stop, in reverse order.

        An error is logged, and the others are called.
        """
        for hook in reversed(self.on_shutdown):
            try:
                await self._call(hook, worker)
            except Exception:
                logger.exception("worker %s: shutdown hook %r failed", worker, hook)

    async def _call(self, hook: Hook, worker: str) -> None:
        result = hook(**self._keywords(hook, worker))
        if inspect.isawaitable(result):
            await result

    def _keywords(self, hook: Hook, worker: str) -> Mapping[str, Any]:
        given = self.given | {"worker_id": worker}
        return {name: given[name] for name in _taken_names(hook, given)}


def _taken_names(hook: Hook, names: Iterable[str]) -> list[str]:
    """Return those of the keywords that the hook takes, as it is called, whatever it wraps."""
    try:
        parameters = inspect.signature(hook, follow_wrapped=False).parameters
    except (ValueError, TypeError):  # one that is written in C and does not say
        return []
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        wrapped = getattr(hook, "__wrapped__", None)
        return list(names) if wrapped is None else _taken_names(wrapped, names)
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [name for name in names if name in parameters and parameters[name].kind in by_name]
