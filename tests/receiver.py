"""Shared parts of the backend's tests: a receiver that pulls, and waits with a bound."""

from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

import anyio

from asyncmq_nats.backends.base import Backend, Delivery
from tests.passing import clocks, pass_time

T = TypeVar("T")
PATIENCE: Final = 60.0
"""How long a test waits for what must happen, in seconds: a bound against hangs, never a measure.

On a machine that does other work, an awaited event still takes a small part of it.
"""


class Receiver:
    """A puller, what it delivered and whose credit lapsed."""

    def __init__(self, backend: Backend, log: str, *, extend: bool = True) -> None:
        self.deliveries: list[Delivery] = []
        self.lapses: list[str] = []
        self._taken = 0
        self._changed = anyio.Event()
        self.puller = backend.puller(log, self._on_delivery, self._on_lapse, extend=extend)

    def _on_delivery(self, delivery: Delivery) -> None:
        self.deliveries.append(delivery)
        self._change()

    def _on_lapse(self, consumer: str) -> None:
        self.lapses.append(consumer)
        self._change()

    def _change(self) -> None:
        self._changed.set()
        self._changed = anyio.Event()

    async def wait_for(self, condition: Callable[[], bool], patience: float = PATIENCE) -> None:
        """Wait until the condition holds, looking again after every delivery and lapse."""
        with anyio.fail_after(patience):
            while not condition():
                if clocks:
                    await pass_time(0.05)
                else:
                    await self._changed.wait()

    async def take(self, count: int = 1) -> list[Delivery]:
        """Return the next `count` deliveries, which must have been requested."""
        await self.wait_for(lambda: len(self.deliveries) >= self._taken + count)
        taken = self.deliveries[self._taken : self._taken + count]
        self._taken += count
        return taken

    async def pull(
        self, consumer: str, count: int = 1, *, wait: float = PATIENCE
    ) -> list[Delivery]:
        """Request `count` records and return them."""
        await self.puller.request(consumer, count, wait=wait)
        return await self.take(count)

    async def pull_rest(self, consumer: str, *, wait: float = 0.0) -> list[Delivery]:
        """Return what comes within `wait`: a bounded pull, to prove an absence."""
        seen = len(self.lapses)
        await self.puller.request(consumer, 100, wait=wait)
        await self.wait_for(lambda: len(self.lapses) > seen)
        rest = self.deliveries[self._taken :]
        self._taken = len(self.deliveries)
        return rest


async def until(
    read: Callable[[], Awaitable[T]], condition: Callable[[T], bool], within: float = PATIENCE
) -> T:
    """Read until the condition holds, and return the value: no event says that a server is done."""
    value: T | None = None
    pause = 0.01
    try:
        with anyio.fail_after(within):
            while True:
                if condition(value := await read()):
                    return value
                await pass_time(pause)
                pause = min(1.2 * pause, 0.05)
    except TimeoutError as error:
        error.add_note(f"The last value: {value!r}")
        raise


async def holds(condition: Callable[[], bool], within: float = PATIENCE) -> None:
    """Wait until the condition holds, where no event tells the test."""
    with anyio.fail_after(within):
        while not condition():
            await pass_time(0.005)
