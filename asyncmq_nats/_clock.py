"""The clock that a worker waits by: the system's, unless a test gives its backend another one.

Timeouts of a caller follow the system's clock: `wait_for`, the steps of a shutdown, the answers to
a pause. Whatever happens by itself at a set time follows `Backend.clock`.
"""

import asyncio
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Final, Protocol

import anyio
import anyio.lowlevel

__all__ = [
    "ACTIVE_PAUSES",
    "NANOSECONDS",
    "SYSTEM_CLOCK",
    "Cancellable",
    "Clock",
    "SystemClock",
    "brief_pause",
]

NANOSECONDS: Final = 1_000_000_000
"""In a second."""
ACTIVE_PAUSES: set[object] = set()
"""The short pauses in real time that are under way in this process: see `brief_pause`."""


class Cancellable(Protocol):
    """A call that is due later."""

    def cancel(self) -> None:
        """Cancel the call; do nothing once it was made."""


class Clock(Protocol):
    """Time of one worker or backend. `upkeep`: a virtual clock passes over it and makes it up."""

    def time(self) -> float:
        """Return Unix seconds."""

    def monotonic(self) -> float:
        """Return seconds that never go back."""

    async def sleep(self, seconds: float, *, upkeep: bool = False) -> None:
        """Return when that many seconds have passed."""

    def move_on_after(
        self, seconds: float | None, *, upkeep: bool = False
    ) -> AbstractContextManager[anyio.CancelScope]:
        """Cancel the block after that many seconds, `None`: never; see `anyio.move_on_after`."""

    def call_later(self, seconds: float, call: Callable[[], object]) -> Cancellable:
        """Have `call` called in this event loop after that many seconds."""


class SystemClock:
    """The time of this machine."""

    monotonic = staticmethod(time.monotonic)
    time = staticmethod(time.time)

    async def sleep(self, seconds: float, *, upkeep: bool = False) -> None:
        """See `Clock`."""
        await anyio.sleep(seconds)

    def move_on_after(
        self, seconds: float | None, *, upkeep: bool = False
    ) -> AbstractContextManager[anyio.CancelScope]:
        """See `Clock`."""
        return anyio.move_on_after(seconds)

    def call_later(self, seconds: float, call: Callable[[], object]) -> Cancellable:
        """See `Clock`."""
        return asyncio.get_running_loop().call_later(seconds, call)


SYSTEM_CLOCK = SystemClock()


async def brief_pause(seconds: float) -> None:
    """Sleep for some milliseconds of real time before a read or a write is repeated.

    A virtual clock does not move meanwhile: what was begun is not over.
    """
    if seconds <= 0:
        await anyio.lowlevel.checkpoint()
        return
    this = object()
    ACTIVE_PAUSES.add(this)
    try:
        await anyio.sleep(seconds)
    finally:
        ACTIVE_PAUSES.discard(this)
