"""Which task runs for which id, and how its arguments become what its annotations say."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

from anyio import CapacityLimiter, to_thread
from pydantic import ConfigDict, validate_call
from pydantic.errors import PydanticUserError

from asyncmq_nats._logging import get_logger
from asyncmq_nats.context import JobContext
from asyncmq_nats.exceptions import TaskNotFound
from asyncmq_nats.jobs import Backoff, JobHead, new_job
from asyncmq_nats.retries import BackoffFunction
from asyncmq_nats.runtime.processes import run_in_process
from asyncmq_nats.wire.keys import check_queue_name

__all__ = ["TASK_REGISTRY", "RegisteredTask", "TaskRegistry"]

logger = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class RegisteredTask:
    """A function that workers run, and what its jobs get when their producer does not say.

    `call` validates the arguments against the annotations and calls the function; for an async one it returns the coroutine.
    """

    id: str
    function: Callable[..., Any]
    call: Callable[..., Any]
    is_async: bool
    queue: str
    retries: int = 0
    ttl: float | None = None
    backoff: float | Backoff | None = None
    backoff_function: BackoffFunction | None = None
    timeout: float | None = None
    progress: bool = False
    process: bool = False
    names: tuple[str, ...] = ()
    """Of the positional arguments, if all of them can be given by name."""

    async def run(self, job: JobHead, threads: CapacityLimiter, context: JobContext) -> Any:
        """Run the task on the job's arguments: an async function here, a sync one in a thread, a `process` one in a process.

        `threads` bounds the threads and processes.
        """
        args, kwargs = self._arguments(job)
        if self.progress:
            kwargs = kwargs | {"report_progress": context.report_progress}
        if self.process:
            return await run_in_process(self.function, args, kwargs, threads)
        if self.is_async:
            return await self.call(*args, **kwargs)
        return await to_thread.run_sync(
            partial(self.call, *args, **kwargs), abandon_on_cancel=True, limiter=threads
        )

    def _arguments(self, job: JobHead) -> tuple[list[Any], dict[str, Any]]:
        """Return the job's arguments, by name where that is possible: an error of pydantic then tells the name, not the position."""
        args, kwargs = job.args, job.kwargs
        if len(args) > len(self.names) or (
            kwargs and not kwargs.keys().isdisjoint(self.names[: len(args)])
        ):
            return args, kwargs
        named = dict(zip(self.names, args, strict=False))
        return [], named | kwargs if kwargs else named


class TaskRegistry(Mapping[str, RegisteredTask]):
    """Tasks by id. A worker runs the tasks of one registry, by default those of `@task`."""

    def __init__(self) -> None:
        self._tasks: dict[str, RegisteredTask] = {}

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
    ) -> RegisteredTask:
        """Add a function under its name, or `module.function`.

        Raises:
            ValueError: another function has that name already, or what its jobs get is not valid.
        """
        check_queue_name(queue)
        call = getattr(function, "__call__", None)  # noqa: B004
        is_async = inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(call)
        if process and (progress or is_async):
            raise ValueError(
                f"{function.__qualname__}: process=True is for sync functions, and without progress"
            )
        # A process that was spawned knows its main module by another name.
        task_id = (
            name or f"{function.__module__.replace('__mp_main__', '__main__')}.{function.__name__}"
        )
        known = self._tasks.get(task_id)
        if known is not None and not _is_same(known.function, function):
            raise ValueError(
                f"task {task_id!r} is registered already, for {known.function!r}: give one of them a name= of its own"
            )
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
            call=_validated(function),
            is_async=is_async,
            queue=queue,
            retries=job.max_retries,
            ttl=job.ttl,
            backoff=job.backoff,
            backoff_function=backoff_function,
            timeout=job.timeout,
            progress=progress,
            process=process,
            names=_positional_names(function),
        )
        self._tasks[task_id] = entry
        return entry

    def find(self, task_id: str) -> RegisteredTask:
        """Return the task with that id.

        Raises:
            TaskNotFound: there is none.
        """
        try:
            return self._tasks[task_id]
        except KeyError:
            raise TaskNotFound(task_id, list(self._tasks)) from None

    def __getitem__(self, task_id: str) -> RegisteredTask:
        return self._tasks[task_id]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tasks)

    def __len__(self) -> int:
        return len(self._tasks)


TASK_REGISTRY = TaskRegistry()
"""The registry of `@task` (AsyncMQ `TASK_REGISTRY`)."""


def _validated(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function with its arguments turned into what the annotations say, or as it is where pydantic knows no way."""
    try:
        validated: Callable[..., Any] = validate_call(
            config=ConfigDict(arbitrary_types_allowed=True)
        )(function)
    except PydanticUserError:
        return function
    except NameError:  # an annotation names what is defined later, or for type checkers only
        return _validated_later(function)
    return validated


def _validated_later(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function, validated from its first call on, if its annotations have a meaning by then."""

    @cache
    def resolve() -> Callable[..., Any]:
        try:
            return validate_call(config=ConfigDict(arbitrary_types_allowed=True))(function)
        except (PydanticUserError, NameError) as problem:
            logger.warning(
                "task %s: its arguments stay plain data, since its annotations cannot be read: %s",
                function.__qualname__,
                problem,
            )
            return function

    return lambda *args, **kwargs: resolve()(*args, **kwargs)


def _positional_names(function: Callable[..., Any]) -> tuple[str, ...]:
    parameters = inspect.signature(function, follow_wrapped=False).parameters.values()
    if any(
        parameter.kind in (parameter.POSITIONAL_ONLY, parameter.VAR_POSITIONAL)
        for parameter in parameters
    ):
        return ()
    return tuple(
        parameter.name
        for parameter in parameters
        if parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    )


def _is_same(one: Callable[..., Any], other: Callable[..., Any]) -> bool:
    """Return whether these are one function, perhaps imported twice (a reload, or `__main__` of a spawned process)."""
    return one is other or (
        one.__qualname__ == other.__qualname__ and one.__module__ == other.__module__
    )
