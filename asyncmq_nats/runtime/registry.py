"""Which task runs for which id, and how it is called."""

import functools
import inspect
import sys
from collections.abc import Awaitable, Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from types import CodeType
from typing import Any, Final

from anyio import CapacityLimiter, to_thread

from asyncmq_nats._concurrency import is_async
from asyncmq_nats._logging import get_logger
from asyncmq_nats.context import JobContext
from asyncmq_nats.exceptions import InvalidArgument, TaskNotFound
from asyncmq_nats.jobs import Backoff, JobHead, new_job
from asyncmq_nats.retries import BackoffFunction, ErrorTypes, checked_errors
from asyncmq_nats.runtime.processes import run_in_process
from asyncmq_nats.wire.arguments import PLAIN, Arguments, write_by_class
from asyncmq_nats.wire.keys import check_queue_name

__all__ = ["TASK_REGISTRY", "RegisteredTask", "TaskRegistry"]

logger = get_logger(__name__)

ASYNCMQ_KEYS: Final = {
    "func": "called",
    "queue": "queue",
    "retries": "retries",
    "ttl": "ttl",
    "progress_enabled": "progress",
}
"""The keys of AsyncMQ's registry, and our names."""


@dataclass(frozen=True, slots=True, eq=False)
class RegisteredTask(Mapping[str, Any]):
    """A function that workers run, and the default options of its jobs.

    It is a mapping, too, with the keys of AsyncMQ's registry: `func`, `queue`, `retries`, `ttl`,
    `progress_enabled`. As there, `func` is the `TaskWrapper`, if `@task` made one.
    """

    id: str
    function: Callable[..., Any]
    arguments: Arguments = field(repr=False)
    queue: str
    is_async: bool = False
    """Whether calling it returns at once, so that it needs no thread."""
    retries: int = 0
    ttl: float | None = None
    backoff: float | Backoff | None = None
    backoff_function: BackoffFunction | None = None
    timeout: float | None = None
    progress: bool = False
    process: bool = False
    validate: bool = True
    retry_on: tuple[type[BaseException], ...] | None = None
    """The only exceptions after which a job is retried; `None`: any."""
    give_up_on: tuple[type[BaseException], ...] | None = None
    """The exceptions after which it is not."""
    wrapper: Any = field(default=None, repr=False)
    """The `TaskWrapper` of the function."""

    @property
    def called(self) -> Any:
        """The wrapper, which has `enqueue`, or without one the function."""
        return self.function if self.wrapper is None else self.wrapper

    @property
    def options(self) -> dict[str, Any]:
        """The options without a key in AsyncMQ, as keywords of `TaskRegistry.register`."""
        return {
            "backoff": self.backoff_function or self.backoff,
            "timeout": self.timeout,
            "process": self.process,
            "validate": self.validate,
            "retry_on": self.retry_on,
            "give_up_on": self.give_up_on,
        }

    def run(self, job: JobHead, threads: CapacityLimiter, context: JobContext) -> Awaitable[Any]:
        """Run the task on the job's arguments. Await the result.

        An async function here, a sync one in a thread, a `process` one in a process. `threads`
        bounds the threads and processes. An awaitable result of a sync function is awaited here.
        """
        if self.is_async and not self.process:
            result: Awaitable[Any] = self._call(job, context)
            return result
        return self._run_elsewhere(job, threads, context)

    async def _run_elsewhere(
        self, job: JobHead, threads: CapacityLimiter, context: JobContext
    ) -> Any:
        if self.process:
            return await run_in_process(
                self.function,
                job.job_id,
                (job.args, job.kwargs),
                threads,
                validate=self.validate,
            )
        result = await to_thread.run_sync(
            self._call_in_thread, job, context, abandon_on_cancel=True, limiter=threads
        )
        if isinstance(result, _Raised):
            raise result.error
        return await result if inspect.isawaitable(result) else result

    def _call_in_thread(self, job: JobHead, context: JobContext) -> Any:
        try:
            return self._call(job, context)
        except GeneratorExit as error:
            # Carried out as a value: thrown into a coroutine, it would close all that await it.
            return _Raised(error)

    def _call(self, job: JobHead, context: JobContext) -> Any:
        args, kwargs = self.arguments.read(job.args, job.kwargs)
        if self.progress:
            kwargs["report_progress"] = context.report_progress
        return self.function(*args, **kwargs)

    # -- as AsyncMQ has it

    def __getitem__(self, key: str) -> Any:
        return getattr(self, ASYNCMQ_KEYS[key])

    def __iter__(self) -> Iterator[str]:
        return iter(ASYNCMQ_KEYS)

    def __len__(self) -> int:
        return len(ASYNCMQ_KEYS)

    __hash__ = object.__hash__


@dataclass(frozen=True, slots=True)
class _Raised:
    error: BaseException


class TaskRegistry(MutableMapping[str, RegisteredTask]):
    """Tasks by id. A worker runs the tasks of one registry, by default those of `@task`."""

    def __init__(self) -> None:
        self._tasks: dict[str, RegisteredTask] = {}
        self._runs: dict[str, list[object]] = {}
        """The runs of its modules in which each task was registered."""

    def register(
        self,
        function: Callable[..., Any],
        *,
        queue: str,
        name: str | None = None,
        retries: int = 0,
        ttl: float | None = None,
        backoff: float | Backoff | BackoffFunction | None = None,
        timeout: float | None = None,
        progress: bool = False,
        process: bool = False,
        validate: bool = True,
        retry_on: ErrorTypes | None = None,
        give_up_on: ErrorTypes | None = None,
    ) -> RegisteredTask:
        """Add a function under its name, or `module.function`.

        A `TaskWrapper` stands for its function.

        Raises:
            InvalidArgument: it has no name, and is given none; or it cannot run in a process.
            ValueError: another function has that name already, or what its jobs get is not valid.
        """
        check_queue_name(queue)
        if not callable(function):
            raise InvalidArgument("a task must be a function", function)
        wrapped = _wrapped_task(function)
        wrapper = None if wrapped is None else function
        function = function if wrapped is None else wrapped.function
        runs_here = is_async(function)
        if process:
            _check_process(function, progress=progress, runs_here=runs_here)
        task_id = name or _name_of(function)
        self._check_identity(task_id, function)
        backoff_function = backoff if callable(backoff) else None
        job = new_job(
            task_id=task_id,
            max_retries=retries,
            ttl=ttl,
            timeout=timeout,
            backoff=None if backoff_function else backoff,
        )
        entry = RegisteredTask(
            id=task_id,
            function=function,
            arguments=Arguments(
                function, validate=validate, supplied=("report_progress",) if progress else ()
            ),
            is_async=runs_here,
            queue=queue,
            retries=job.max_retries,
            ttl=job.ttl,
            backoff=job.backoff,
            backoff_function=backoff_function,
            timeout=job.timeout,
            progress=progress,
            process=process,
            validate=validate,
            retry_on=checked_errors(retry_on, "retry_on"),
            give_up_on=checked_errors(give_up_on, "give_up_on"),
            wrapper=wrapper,
        )
        self._tasks[task_id] = entry
        self._runs[task_id] = _runs_of_modules(function)
        return entry

    def _check_identity(self, task_id: str, function: Callable[..., Any]) -> None:
        known = self._tasks.get(task_id)
        if known is None or _is_same(known.function, function):
            return
        if _origins(known.function) == _origins(function) and (
            _is_interactive(function)
            or [*map(id, self._runs.get(task_id, ()))] != [*map(id, _runs_of_modules(function))]
        ):
            return  # one of its modules was loaded again
        raise ValueError(
            f"task {task_id!r} is registered already, for {known.function!r}: give each function "
            "a name= of its own (those of one factory, or of a decorator without functools.wraps, "
            "have one name)"
        )

    def find(self, task_id: str, queue: str | None = None) -> RegisteredTask:
        """Return the task with that id.

        Args:
            task_id: what a job names.
            queue: only a task of this queue will do; `None`: of any.

        Raises:
            TaskNotFound: there is none.
        """
        entry = self._tasks.get(task_id)
        if entry is None or queue not in (None, entry.queue):
            known = [each.id for each in self._tasks.values() if queue in (None, each.queue)]
            raise TaskNotFound(task_id, known, None if entry is None else (entry.queue, str(queue)))
        return entry

    def write(
        self, task_id: Any, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> tuple[list[Any], dict[str, Any]]:
        """Return the arguments of a call as plain data that arrives equal (docs/arguments.md).

        The annotations of the task say how, if it is in this registry; otherwise the classes of
        the values do.

        Raises:
            NotSerializable: one would not arrive equal; the message names it.
        """
        entry = self._tasks.get(task_id) if isinstance(task_id, str) else None
        if entry is None:
            return write_by_class(args, kwargs, task_id)
        return entry.arguments.write(args, kwargs, task_id)

    def plain_classes(
        self, task_id: str, count: int, names: tuple[str, ...]
    ) -> Sequence[frozenset[type]] | None:
        """Return the classes of arguments of which `write` passes on all values that JSON has.

        Args:
            task_id: what a job names.
            count: of the positional arguments.
            names: of the others.

        Returns:
            The classes of each argument, in order; `None` if some are not known before.
        """
        entry = self._tasks.get(task_id)
        if entry is None:
            return [PLAIN] * (count + len(names))
        return entry.arguments.plain_classes(count, names)

    def __getitem__(self, task_id: str) -> RegisteredTask:
        return self._tasks[task_id]

    def __setitem__(self, task_id: str, entry: Mapping[str, Any]) -> None:
        """Add a task of `register`, or a dict with AsyncMQ's keys, in place of the one before."""
        self._tasks.pop(task_id, None)
        if isinstance(entry, RegisteredTask):
            self._tasks[task_id] = entry
            return
        wrapped = _wrapped_task(entry["func"])
        given = {**(wrapped or {}), **entry}
        self.register(
            given["func"],
            name=task_id,
            queue=given.get("queue", "default"),
            retries=given.get("retries", 0),
            ttl=given.get("ttl"),
            progress=given.get("progress_enabled", False),
            **({} if wrapped is None else wrapped.options),
        )

    def __delitem__(self, task_id: str) -> None:
        del self._tasks[task_id]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tasks)

    def __len__(self) -> int:
        return len(self._tasks)


TASK_REGISTRY = TaskRegistry()
"""The registry of `@task` (AsyncMQ `TASK_REGISTRY`)."""


def _wrapped_task(function: Any) -> RegisteredTask | None:
    """Return the task of a `TaskWrapper`; `None` for anything else."""
    entry = getattr(function, "entry", None)
    return entry if isinstance(entry, RegisteredTask) else None


def _check_process(function: Callable[..., Any], *, progress: bool, runs_here: bool) -> None:
    if progress or runs_here:
        raise ValueError(
            f"{_describe(function)}: process=True is for sync functions, and without progress"
        )
    is_bound = inspect.ismethod(function) and not isinstance(function.__self__, type)
    if "<locals>" in _origin(function)[1] or not hasattr(function, "__qualname__") or is_bound:
        raise InvalidArgument(
            "a task with process=True must be a function of a module: its process finds it by name",
            function,
        )


def _name_of(function: Callable[..., Any]) -> str:
    name, module = getattr(function, "__name__", None), getattr(function, "__module__", None)
    if not name or not module or name == "<lambda>":
        raise InvalidArgument("a task without a name of its own needs one: name='…'", function)
    # A process that was spawned knows its main module by another name.
    return f"{module.replace('__mp_main__', '__main__')}.{name}"


def _describe(function: Callable[..., Any]) -> str:
    return getattr(function, "__qualname__", None) or repr(function)


def _code(function: Any) -> CodeType | None:
    return getattr(function, "__code__", None)


def _origin(function: Any) -> tuple[str, str]:
    """Return where a function was defined: its module, and its name there.

    An object counts as its class.
    """
    while isinstance(function, functools.partial):
        function = function.func
    named = function if hasattr(function, "__qualname__") else type(function)
    return named.__module__, named.__qualname__


def _parts(function: Any) -> list[Any]:
    """Return the function and those in its closure, such as the one that it decorates."""
    parts = [function]
    for part in parts:  # it grows meanwhile
        inner = [part.func] if isinstance(part, functools.partial) else _captured(part)
        parts += [value for value in inner if callable(value) and value not in parts]
    return parts


def _origins(function: Any) -> list[tuple[str, str]]:
    return [_origin(part) for part in _parts(function)]


def _runs_of_modules(function: Any) -> list[object]:
    """Return the objects that are replaced when one of the function's modules is loaded again."""
    modules = [sys.modules.get(module) for module, _ in _origins(function)]
    return [getattr(module, "__spec__", None) or module for module in modules]


def _is_interactive(function: Any) -> bool:
    module = sys.modules.get(_origin(function)[0])
    return module is not None and module.__name__ == "__main__" and not hasattr(module, "__file__")


def _is_same(one: Any, other: Any, seen: frozenset[tuple[int, int]] = frozenset()) -> bool:
    """Return whether two functions do the same.

    One function, or one definition that was run twice with the same values. `seen`: what is being
    compared already, for functions that name themselves.
    """
    if one is other or (id(one), id(other)) in seen:
        return True
    if isinstance(one, functools.partial) and isinstance(other, functools.partial):
        return _is_same(one.func, other.func) and (one.args, one.keywords) == (
            other.args,
            other.keywords,
        )
    if _code(one) is None or _code(one) is not _code(other):
        return False
    seen |= {(id(one), id(other))}
    pairs = zip(_captured(one), _captured(other), strict=True)
    return all(_is_same(a, b, seen) or _is_equal(a, b) for a, b in pairs)


def _is_equal(one: Any, other: Any) -> bool:
    try:
        return hash(one) == hash(other) and type(one) is type(other) and bool(one == other)
    except Exception:  # it can be changed: another one is another one
        return False


def _captured(function: Any) -> list[Any]:
    """Return the values that a function took along when it was defined."""
    if _code(function) is None:
        return []
    cells = [_content(cell) for cell in function.__closure__ or ()]
    named = function.__kwdefaults__ or {}
    return [*cells, *(function.__defaults__ or ()), *named.values()]


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not yet set: a function that names itself
        return None
