"""The event loops of a process, one after another: what must not stay behind in one that has ended.

`asyncio.run(main())` twice is two event loops, and so are two tests. A backend or a queue of the module is used on each of them.
"""

import asyncio
import os
from types import TracebackType
from weakref import WeakKeyDictionary

from anyio import Lock

from asyncmq_nats.exceptions import BackendError

__all__ = ["Home", "Turns"]


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
            raise BackendError("this backend serves an event loop that still runs in another thread: use one backend per event loop")
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

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._locks[asyncio.get_running_loop()].release()
