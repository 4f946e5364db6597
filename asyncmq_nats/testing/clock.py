"""The virtual clock: it stands still until a test moves it, and stops wherever something is due."""

import asyncio
import heapq
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import (
    AbstractAsyncContextManager,
    AsyncExitStack,
    asynccontextmanager,
    contextmanager,
)
from contextvars import ContextVar
from datetime import UTC, datetime, timedelta
from itertools import count
from typing import Final, Protocol
from weakref import WeakSet

import anyio
import anyio.lowlevel

from asyncmq_nats._clock import ACTIVE_PAUSES
from asyncmq_nats.exceptions import InvalidArgument, VirtualTimeStuck
from asyncmq_nats.schedules import parse_every
from asyncmq_nats.testing.waiting import JobWatch, settle_here, waits_by_clock

__all__ = ["Due", "VirtualClock", "is_inside", "to_seconds"]

TIME_RESOLUTION: Final = 1e-6
"""Sums of floats are off by less: what is due within a tick is due."""
SHORT_WAIT_SECONDS: Final = 0.25
"""Seconds by which `run_until_idle` moves the time at most, while a job that is due has not begun:
an acknowledgement, or the answer of another worker, was on its way."""
TURN_CHECK: Final = 0.001
POLL_SECONDS: Final = (0.0005, 0.02)
"""First and last pause between two looks at jobs that wait for something real, in real seconds."""

is_inside: ContextVar[bool] = ContextVar("asyncmq_nats_is_inside", default=False)
"""Whether this runs in a worker that `advance` or `run_until_idle` waits for."""


class Crew(Protocol):
    """The workers that serve one backend while its clock moves."""

    async def start_missing(self) -> bool:
        """Start a worker for each queue without one. Return whether any was started."""

    def has_due_jobs(self, running: int) -> bool:
        """Return whether more jobs are due than those that run."""


class Employer(Protocol):
    """A backend on this clock."""

    def crew(self) -> AbstractAsyncContextManager[Crew]:
        """Have its jobs run inside the block."""


class Due:
    """A call that is due at a time.

    `loop`: where it belongs; `None`: wherever the time is moved.
    """

    __slots__ = ("call", "loop")

    def __init__(self, call: Callable[[], object], loop: asyncio.AbstractEventLoop | None) -> None:
        self.call: Callable[[], object] | None = call
        self.loop = loop

    def cancel(self) -> None:
        """Cancel the call."""
        self.call = None


class VirtualClock:
    """Time that moves only by `advance`: delays, retries, ticks, leases, timeouts happen in order.

    A `Clock`. The same calls give the same order of events, whatever the machine does meanwhile.

    Args:
        start: the first moment, as Unix seconds or a `datetime`; by default now, in whole seconds.
        patience: how many real seconds to wait for a job that waits for something real, such as a
            thread or a socket, before the time goes on without it.
    """

    def __init__(self, start: float | datetime | None = None, *, patience: float = 5.0) -> None:
        if isinstance(start, datetime):
            start = (start if start.tzinfo else start.astimezone()).timestamp()
        self._now = float(int(time.time()) if start is None else start)
        self.lock = threading.RLock()
        self._stops: list[tuple[float, int, Due]] = []
        self._upkeep: list[tuple[float, int, Due]] = []
        self._ties = count()
        self._employers: WeakSet[Employer] = WeakSet()
        self._listeners: list[Callable[[datetime], object]] = []
        self._loops: WeakSet[asyncio.AbstractEventLoop] = WeakSet()
        self._moving = False
        self.watch = JobWatch(patience)

    # -- a Clock

    def time(self) -> float:
        """Return Unix seconds."""
        return self._now

    def monotonic(self) -> float:
        """Return seconds that never go back."""
        return self._now

    @waits_by_clock
    async def sleep(self, seconds: float, *, upkeep: bool = False) -> None:
        """Return when the clock was moved by that much."""
        if seconds <= 0:
            await anyio.lowlevel.checkpoint()
            return
        woken = anyio.Event()
        due = self._at(self._now + seconds, woken.set, upkeep=upkeep)
        try:
            await woken.wait()
        finally:
            due.cancel()

    @contextmanager
    def move_on_after(
        self, seconds: float | None, *, upkeep: bool = False
    ) -> Iterator[anyio.CancelScope]:
        """Cancel the block when the clock was moved by that much; `None`: never."""
        with anyio.CancelScope() as scope:
            if seconds is None:
                yield scope
                return
            due = self._at(self._now + max(seconds, 0.0), scope.cancel, upkeep=upkeep)
            try:
                yield scope
            finally:
                due.cancel()

    def call_later(self, seconds: float, call: Callable[[], object]) -> Due:
        """Have `call` called in this event loop when the clock was moved by that much."""
        return self._at(self._now + seconds, call)

    def _at(self, when: float, call: Callable[[], object], *, upkeep: bool = False) -> Due:
        return self.at(when, call, upkeep=upkeep, loop=asyncio.get_running_loop())

    def at(
        self,
        when: float,
        call: Callable[[], object],
        *,
        upkeep: bool = False,
        loop: asyncio.AbstractEventLoop | None = None,
    ) -> Due:
        """Have `call` called at Unix time `when`; in the loop, or where the time is moved."""
        due = Due(call, loop)
        if loop is not None:
            self.note_loop(loop)
        with self.lock:
            heapq.heappush(self._upkeep if upkeep else self._stops, (when, next(self._ties), due))
        return due

    def note_loop(self, loop: asyncio.AbstractEventLoop) -> None:
        """Take note of an event loop that has something to do before the time moves."""
        self._loops.add(loop)

    # -- for tests

    def now(self) -> datetime:
        """Return the time as a `datetime` in UTC."""
        return datetime.fromtimestamp(self._now, UTC)

    def on_move(self, call: Callable[[datetime], object]) -> Callable[[], None]:
        """Have `call` called with each new time, such as `traveller.move_to` of time-machine.

        Returns:
            what ends it.
        """
        self._listeners.append(call)
        return lambda: self._listeners.remove(call)

    def employ(self, employer: Employer) -> None:
        """Have the jobs of a backend run while the time moves."""
        self._employers.add(employer)

    async def advance(self, duration: float | str | timedelta) -> None:
        """Move the time, and let all happen that is due until then, in order.

        That is delays, retries, ticks, leases, timeouts, times to live. Jobs that begin are run to
        their end, unless they wait for the clock, or for something in the test.

        Args:
            duration: seconds, a text such as `"90"`, `"5m"` or `"1h30m"`, or a `timedelta`.

        Raises:
            VirtualTimeStuck: called inside a job; or a job still waits when the time is over, and
                no worker of the test's own has it.
        """
        seconds = to_seconds(duration)
        await self._move(lambda now: now + seconds)

    async def advance_to(self, moment: float | datetime) -> None:
        """Advance to a moment: Unix seconds, or a `datetime`.

        Raises:
            InvalidArgument: it is over.
        """
        at = moment.timestamp() if isinstance(moment, datetime) else float(moment)
        if at < self._now - TIME_RESOLUTION:
            raise InvalidArgument(f"the clock is at {self.now()} and goes forward only", moment)
        await self._move(lambda now: max(at, now))

    async def run_until_idle(self) -> None:
        """Run all jobs that are due, and those that these add, without moving the time.

        Jobs that are delayed, back off or wait for a rate limit stay.

        Raises:
            VirtualTimeStuck: as for `advance`.
        """
        await self._move(None)

    async def _move(self, end_after: Callable[[float], float] | None) -> None:
        async with self._turn(), AsyncExitStack() as stack:
            end = None if end_after is None else end_after(self._now)
            crews = [
                await stack.enter_async_context(employer.crew())
                for employer in tuple(self._employers)
            ]
            mover = _Mover(self, crews)
            await mover.settle()
            limit = self._now + SHORT_WAIT_SECONDS if end is None else end
            while end is not None or mover.has_due_jobs():
                if not self._go_to_next(limit):
                    break
                await mover.settle()
            if end is not None and end > self._now:
                self._go_to(end)
                await mover.settle()
                while self._go_to_next(end):
                    await mover.settle()

    @asynccontextmanager
    async def _turn(self) -> AsyncIterator[None]:
        if is_inside.get():
            raise VirtualTimeStuck(
                "a job moved the clock that waits for it: move it in the test, beside the job"
            )
        while not self._take_turn():  # noqa: ASYNC110  another thread may have it
            await anyio.sleep(TURN_CHECK)
        token = is_inside.set(True)
        try:
            yield
        finally:
            is_inside.reset(token)
            self._moving = False

    def _take_turn(self) -> bool:
        with self.lock:
            if self._moving:
                return False
            self._moving = True
            return True

    # -- time

    def _go_to_next(self, limit: float) -> bool:
        """Go to the next moment at which something is due. Return whether there is one."""
        with self.lock:
            stops = self._stops
            while stops and stops[0][2].call is None:
                heapq.heappop(stops)
            if not stops or stops[0][0] > limit + TIME_RESOLUTION:
                return False
            self._go_to(stops[0][0])
        return True

    def _go_to(self, moment: float) -> None:
        self._now = max(self._now, moment)
        for listener in tuple(self._listeners):
            listener(self.now())
        self.ring()

    def ring(self) -> bool:
        """Make the calls that are due. Return whether there were any."""
        with self.lock:
            due = sorted([*self._pop(self._stops), *self._pop(self._upkeep)])
            for when, _, each in due:
                self._now = max(self._now, when)  # code that reads the time finds that it has come
                _call(each)
        return bool(due)

    def _pop(self, heap: list[tuple[float, int, Due]]) -> Iterator[tuple[float, int, Due]]:
        while heap and heap[0][0] <= self._now + TIME_RESOLUTION:
            entry = heapq.heappop(heap)
            if entry[2].call is not None:
                yield entry

    def loops(self) -> list[asyncio.AbstractEventLoop]:
        """Return the other event loops that run and wait by this clock."""
        here = asyncio.get_running_loop()
        return [loop for loop in tuple(self._loops) if loop is not here and loop.is_running()]


class _Mover:
    """Lets all happen that is due at one moment."""

    def __init__(self, clock: VirtualClock, crews: list[Crew]) -> None:
        self._clock = clock
        self._crews = crews
        self._watch = clock.watch

    def has_due_jobs(self) -> bool:
        """Return whether a job is due that does not run."""
        running = len(self._watch.running(self._clock.loops()))
        return any(crew.has_due_jobs(running) for crew in self._crews)

    async def settle(self) -> None:
        """Return when nothing more happens before the time moves."""
        while True:
            await self._settle_loops()
            started = [await crew.start_missing() for crew in self._crews]
            if self._clock.ring() or any(started):
                continue
            if not await self._wait_for_real():
                return

    async def _settle_loops(self) -> None:
        await settle_here()
        while others := self._clock.loops():
            worked = False
            for loop in others:
                there = asyncio.run_coroutine_threadsafe(settle_here(), loop)
                worked |= await asyncio.wrap_future(there)
            if not await settle_here() and not worked:
                return

    async def _wait_for_real(self) -> bool:
        """Wait until a job goes on that waits for something real. Return whether one did."""
        poll, longest = POLL_SECONDS
        begun = time.monotonic()
        seen = self._watch.look(self._clock.loops())
        while ACTIVE_PAUSES or seen.waits(time.monotonic() - begun):
            await asyncio.sleep(poll)
            poll = min(1.5 * poll, longest)
            if self._watch.look(self._clock.loops()) != seen:
                return True
        self._watch.give_up(seen)
        return False


def _call(due: Due) -> None:
    """Make a call, in the event loop that it belongs to."""
    call, due.call = due.call, None
    if call is None:
        return
    loop = due.loop
    try:
        here = asyncio.get_running_loop()
    except RuntimeError:
        here = None
    if loop is None or loop is here:
        call()
    elif loop.is_running():
        loop.call_soon_threadsafe(call)


def to_seconds(duration: float | str | timedelta) -> float:
    """Return a duration in seconds.

    Raises:
        InvalidArgument: it is below 0, or not finite.
        ValueError: it is a text that is no interval.
    """
    if isinstance(duration, timedelta):
        duration = duration.total_seconds()
    if isinstance(duration, int | float):
        if not 0 <= duration < float("inf"):
            raise InvalidArgument("a clock is moved forward by seconds, 0 or more", duration)
        return float(duration)
    return parse_every(duration, 0.0)
