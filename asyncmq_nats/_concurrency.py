"""Objects that are reused across event loops, task groups that raise one error, deadlines.

`asyncio.run(main())` twice is two event loops, and so are two tests. A backend or a queue of a
module is used on each of them.
"""

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from types import TracebackType
from typing import Any
from weakref import WeakKeyDictionary

from anyio import CancelScope, Event, Lock, create_task_group, move_on_after
from anyio.abc import TaskGroup

from asyncmq_nats._logging import get_logger
from asyncmq_nats.exceptions import AsyncMQError, BackendError, Unconfirmed

__all__ = [
    "Home",
    "Turns",
    "all_done_before",
    "deadline",
    "open_task_group",
    "running_task",
    "unwrap_single_error",
]

logger = get_logger(__name__)


class Home:
    """The event loop that a backend serves: one at a time."""

    def __init__(self) -> None:
        self.loop: asyncio.AbstractEventLoop | None = None
        self._process = 0

    def move(self) -> bool:
        """Take the running event loop for the home. Return whether another one was left for it.

        Raises:
            BackendError: the one before still runs.
        """
        loop, left = asyncio.get_running_loop(), self.loop
        if left is loop:
            return False
        if left is not None and left.is_running() and not self.is_elsewhere:
            raise BackendError(
                "this backend serves an event loop that still runs in another thread: use one backend per event loop"
            )
        self.loop, self._process = loop, os.getpid()
        return left is not None

    def leave(self) -> None:
        """Have none, until the next `move`."""
        self.loop = None

    @property
    def is_elsewhere(self) -> bool:
        """Whether it is one of the process that this one was forked from."""
        return self._process != os.getpid()


class Turns:
    """A lock for the tasks of an event loop. Each loop has its own: one that ended with its tasks half way holds up no other."""

    def __init__(self) -> None:
        self._locks: WeakKeyDictionary[asyncio.AbstractEventLoop, Lock] = WeakKeyDictionary()

    async def __aenter__(self) -> None:
        await self._locks.setdefault(asyncio.get_running_loop(), Lock()).acquire()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._locks[asyncio.get_running_loop()].release()


def running_task() -> "asyncio.Task[Any]":
    """Return the task that calls this."""
    task = asyncio.current_task()
    assert task is not None
    return task


@asynccontextmanager
async def open_task_group() -> AsyncIterator[TaskGroup]:
    """Open a task group that raises one error and never a group of errors.

    The only way in which this package opens one: callers catch `AsyncMQError`, not groups.
    """
    with unwrap_single_error():
        async with create_task_group() as group:
            yield group


@contextmanager
def unwrap_single_error() -> Iterator[None]:
    """Raise one error of an exception group; log those beside it that say something else."""
    try:
        yield
    except BaseExceptionGroup as group:
        errors = list(_leaves(group))
        chosen = min(errors, key=_rank)
        told = {(type(chosen), str(chosen))}
        for error in errors:
            if (said := (type(error), str(error))) not in told:
                told.add(said)
                logger.warning("beside %r: %r", chosen, error)
        raise chosen from chosen.__cause__


def _leaves(error: BaseException) -> Iterator[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        for part in error.exceptions:
            yield from _leaves(part)
    else:
        yield error


def _rank(error: BaseException) -> int:
    """Return which error of several to raise, lowest first: what ends a program, then faults."""
    if not isinstance(error, Exception):
        return 0
    return 2 if isinstance(error, AsyncMQError) else 1


@contextmanager
def deadline(seconds: float) -> Iterator[None]:
    """Give all calls inside the block that many seconds together.

    `with deadline(2.0): job_id = await queue.add(…)`; the nearest of nested deadlines counts. What was written when the time is over may or may not have been stored; it is not repeated.

    Raises:
        Unconfirmed: the time is over. It is a `TimeoutError`.
    """
    with move_on_after(seconds) as scope:
        yield
    if scope.cancelled_caught:
        raise Unconfirmed("what was asked of the server", seconds)


async def all_done_before(stop: Event, *steps: Callable[[], Awaitable[object]]) -> bool:
    """Take the steps in turn, and return whether all were done when `stop` was set; what is not done then is cancelled."""
    done = 0

    async def cancel(scope: CancelScope) -> None:
        await stop.wait()
        scope.cancel()

    async with open_task_group() as group:
        group.start_soon(cancel, group.cancel_scope)
        for step in steps:
            await step()
            done += 1
        group.cancel_scope.cancel()
    return done == len(steps)
