"""Objects that are reused across event loops, task groups that raise one error, deadlines.

`asyncio.run(main())` twice is two event loops, and so are two tests. A backend or a queue of a
module is used on each of them.
"""

import asyncio
import inspect
import os
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, TypeVarTuple
from weakref import WeakKeyDictionary

from anyio import CancelScope, Event, Lock, create_task_group, move_on_after, to_thread
from anyio.abc import TaskGroup

from asyncmq_nats._logging import get_logger
from asyncmq_nats.exceptions import AsyncMQError, BackendError, Unconfirmed

__all__ = [
    "Home",
    "KeyedTurns",
    "Spawner",
    "Turns",
    "all_done_before",
    "call_either",
    "deadline",
    "is_async",
    "open_task_group",
    "running_task",
    "unwrap_single_error",
]

Ts = TypeVarTuple("Ts")
logger = get_logger(__name__)


class Home:
    """The event loop that a backend serves, one at a time."""

    def __init__(self) -> None:
        self.loop: asyncio.AbstractEventLoop | None = None
        self._process = 0

    def move(self) -> bool:
        """Serve the running event loop. Return whether another one was left for it.

        Raises:
            BackendError: the one before still runs.
        """
        loop, left = asyncio.get_running_loop(), self.loop
        if left is loop:
            return False
        if left is not None and left.is_running() and not self.is_elsewhere:
            raise BackendError(
                "this backend serves an event loop that still runs in another thread: "
                "use one backend per event loop"
            )
        self.loop, self._process = loop, os.getpid()
        return left is not None

    def leave(self) -> None:
        """Serve no event loop until the next `move`."""
        self.loop = None

    @property
    def is_elsewhere(self) -> bool:
        """Whether the event loop belongs to the process that this one was forked from."""
        return self._process != os.getpid()


class Turns:
    """A lock for the tasks of an event loop.

    Each loop has its own: one that ended with its tasks half way holds up no other.
    """

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


class Spawner:
    """Starts tasks for plain callbacks of the event loop: those of a backend.

    No callback may call `TaskGroup.start_soon`: anyio 4.14 and later, beside `sniffio`, need a
    current task for it unless `anyio.run` started the loop.
    """

    def __init__(self) -> None:
        self._calls: deque[tuple[Callable[..., Coroutine[Any, Any, object]], tuple[Any, ...]]] = (
            deque()
        )
        self._called = asyncio.Event()

    def spawn(self, function: Callable[[*Ts], Coroutine[Any, Any, object]], *args: *Ts) -> None:
        """Start the function soon, in the task group of `serve`. May be called from anywhere."""
        self._calls.append((function, args))
        self._called.set()

    async def serve(self, group: TaskGroup) -> None:
        """Start in this group what was spawned before and what will be, until cancelled."""
        while True:
            await self._called.wait()
            self._called.clear()
            while self._calls:
                function, args = self._calls.popleft()
                group.start_soon(function, *args)


@dataclass(slots=True)
class _Turn:
    lock: Lock = field(default_factory=Lock)
    users: int = 0


class KeyedTurns:
    """A lock per key for the tasks of an event loop. It keeps only the keys in use."""

    def __init__(self) -> None:
        self._turns: WeakKeyDictionary[asyncio.AbstractEventLoop, dict[str, _Turn]] = (
            WeakKeyDictionary()
        )

    @asynccontextmanager
    async def of(self, key: str) -> AsyncIterator[bool]:
        """Hold the lock of the key inside the block. The value: whether another task had it."""
        turns = self._turns.setdefault(asyncio.get_running_loop(), {})
        turn = turns.setdefault(key, _Turn())
        waited = turn.users > 0
        turn.users += 1
        try:
            async with turn.lock:
                yield waited
        finally:
            turn.users -= 1
            if not turn.users:
                del turns[key]


def is_async(function: Any) -> bool:
    """Return whether it is a coroutine function, or an object that is called like one."""
    called = getattr(function, "__call__", None)  # noqa: B004
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(called)


async def call_either(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a function, a sync one in a thread, and await what it returns if that can be awaited."""
    if is_async(function):
        return await function(*args, **kwargs)
    result = await to_thread.run_sync(lambda: function(*args, **kwargs))
    return await result if inspect.isawaitable(result) else result


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
                logger.warning("error %r, raised together with: %r", chosen, error)
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

    `with deadline(2.0): job_id = await queue.add(…)`; the nearest of nested deadlines counts. A
    write under way when the time is over may or may not be stored; it is not repeated.

    Raises:
        Unconfirmed: the time is over. It is a `TimeoutError`.
    """
    with move_on_after(seconds) as scope:
        yield
    if scope.cancelled_caught:
        raise Unconfirmed("what was asked of the server", seconds)


async def all_done_before(stop: Event, *steps: Callable[[], Awaitable[object]]) -> bool:
    """Run the steps in turn until `stop` is set, which cancels the rest.

    Return whether all were done.
    """
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
