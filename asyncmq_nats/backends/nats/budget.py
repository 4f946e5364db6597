"""Bounds the batches, messages and bytes that one process has under way to the server.

The server refuses the 51st open batch of a stream (10210), and more than 10,000 messages that it
has not stored yet (10167). A bound here makes callers take turns in order, instead of by luck.
"""

import asyncio
from collections import deque
from typing import Final, NamedTuple

__all__ = ["Budget", "Load"]

MAX_BATCHES: Final = 32
MAX_MESSAGES: Final = 8_000
MAX_BYTES: Final = 32 * 1024 * 1024


class Load(NamedTuple):
    """The load of one write."""

    batches: int
    messages: int
    size: int
    """In bytes."""


class Budget:
    """The budget of one connection. A load that is larger than all of it goes alone."""

    def __init__(self) -> None:
        self._batches = self._messages = self._size = 0
        self._waiting: deque[tuple[asyncio.Future[None], Load]] = deque()

    def take_now(self, load: Load) -> bool:
        """Take room for a load if there is some and no other waits. Return whether it was taken."""
        return not self._waiting and self._take(load)

    async def take(self, load: Load, timeout: float) -> None:
        """Reserve room for a load, first come, first served; `release` it.

        Raises:
            TimeoutError: there was none within `timeout` seconds.
        """
        if self.take_now(load):
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((turn, load))
        try:
            async with asyncio.timeout(timeout):
                await turn
        except BaseException:
            if turn.done() and not turn.cancelled():
                self.release(load)
            else:
                turn.cancel()
                self._admit()
            raise

    def release(self, load: Load) -> None:
        """Give the room back."""
        self._batches -= load.batches
        self._messages -= load.messages
        self._size -= load.size
        if self._waiting:
            self._admit()

    def _admit(self) -> None:
        """Admit waiters in order.

        A cancelled one takes nothing, and its task may not have run yet.
        """
        while self._waiting:
            turn, load = self._waiting[0]
            if not turn.done():
                if not self._take(load):
                    return
                turn.set_result(None)
            self._waiting.popleft()

    def _take(self, load: Load) -> bool:
        """Take room for a load if there is some. Return whether it was taken."""
        batches = self._batches + load.batches
        messages = self._messages + load.messages
        size = self._size + load.size
        if self._messages and (
            batches > MAX_BATCHES or messages > MAX_MESSAGES or size > MAX_BYTES
        ):
            return False
        self._batches, self._messages, self._size = batches, messages, size
        return True
