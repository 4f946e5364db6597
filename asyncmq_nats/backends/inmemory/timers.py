"""Alarms of the in-memory backend, on one handle of the event loop.

They know nothing of records.
"""

import asyncio
import heapq
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from itertools import count
from typing import Any, Final

from asyncmq_nats._clock import SYSTEM_CLOCK, Cancellable, Clock

__all__ = ["Agenda", "Alarm"]

LONGEST_SLEEP: Final = 86_400.0
"""Event loops do not take every delay; waking up for nothing once a day costs nothing."""
TOLERATED_DEAD: Final = 1_000


class Alarm:
    """Something that is due at a time, until it is cancelled."""

    __slots__ = ("call",)

    def __init__(self, call: Callable[[], None]) -> None:
        self.call: Callable[[], None] | None = call


class Agenda:
    """Alarms by time.

    They ring while it is started, in order, never early and never from inside `at`.
    """

    def __init__(self, clock: Clock = SYSTEM_CLOCK) -> None:
        self.clock = clock
        self.lock: AbstractContextManager[object] = nullcontext()
        """Held while its records change, where several threads may do so."""
        self._heap: list[tuple[float, int, Alarm]] = []
        self._ties = count()
        self._cancelled = 0
        self._handle: Cancellable | None = None
        self._handle_at = 0.0
        self.loop: asyncio.AbstractEventLoop | None = None

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Ring on this loop. Alarms that became due in the meantime ring soon."""
        self.loop = loop
        self._arm()

    def stop(self) -> None:
        """Ring no more, but keep the alarms."""
        if self._handle is not None:
            self._handle.cancel()
        self.loop = self._handle = None

    def now(self) -> float:
        """Return the time, in Unix seconds."""
        return self.clock.time()

    def soon(
        self, call: Callable[..., object], *args: Any, loop: asyncio.AbstractEventLoop | None = None
    ) -> bool:
        """Have `call` called soon.

        Return whether it will be: no, while no event loop is served. `loop`: the event loop for it,
        if several are served; here there is one.
        """
        if self.loop is None:
            return False
        self.loop.call_soon(call, *args)
        return True

    def at(self, when: float, call: Callable[[], None], *, upkeep: bool = False) -> Alarm:
        """Have `call` called at Unix time `when`. `upkeep`: see `Clock`."""
        alarm = Alarm(call)
        heapq.heappush(self._heap, (when, next(self._ties), alarm))
        self._arm()
        return alarm

    def cancel(self, alarm: Alarm | None) -> None:
        """Take the alarm away, if there is one and it has not rung."""
        if alarm is None or alarm.call is None:
            return
        alarm.call = None
        self._cancelled += 1
        # An outcome kept for a month and purged today must not stay in memory for a month.
        if self._cancelled > TOLERATED_DEAD and self._cancelled * 2 > len(self._heap):
            self._heap = [entry for entry in self._heap if entry[2].call is not None]
            heapq.heapify(self._heap)
            self._cancelled = 0

    def _arm(self) -> None:
        if self.loop is None or not self._heap:
            return
        first = self._heap[0][0]
        if self._handle is not None:
            if self._handle_at <= first:
                return
            self._handle.cancel()
        self._handle_at = first
        delay = min(max(first - self.now(), 0.0), LONGEST_SLEEP)
        self._handle = self.clock.call_later(delay, self._ring)

    def _ring(self) -> None:
        self._handle = None
        now = self.now()
        while self._heap and self._heap[0][0] <= now:
            alarm = heapq.heappop(self._heap)[2]
            call, alarm.call = alarm.call, None
            if call is None:
                self._cancelled -= 1
            else:
                call()
        self._arm()
