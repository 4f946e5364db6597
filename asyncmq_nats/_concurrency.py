"""The event loops of a process, one after another: what must not stay behind in one that has ended. And what runs in one, until an event.

`asyncio.run(main())` twice is two event loops, and so are two tests. A backend or a queue of the module is used on each of them.
"""

import asyncio
import inspect
import os
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Any
from weakref import WeakKeyDictionary

from anyio import CancelScope, Event, Lock, create_task_group, to_thread

from asyncmq_nats.exceptions import BackendError, sole_error

__all__ = ["Home", "Turns", "all_done_before", "call_either", "is_async", "running_task"]


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


def is_async(function: Any) -> bool:
    """Return whether calling it returns at once: a coroutine function, or an object that is called like one."""
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


async def all_done_before(stop: Event, *steps: Callable[[], Awaitable[object]]) -> bool:
    """Take the steps in turn, and return whether all were done when `stop` was set; what is not done then is cancelled."""
    done = 0

    async def cancel(scope: CancelScope) -> None:
        await stop.wait()
        scope.cancel()

    with sole_error():
        async with create_task_group() as group:
            group.start_soon(cancel, group.cancel_scope)
            for step in steps:
                await step()
                done += 1
            group.cancel_scope.cancel()
    return done == len(steps)
