"""Whether an event loop is at rest, and what its jobs wait for."""

import asyncio
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from types import CodeType
from typing import Any, Final

from asyncmq_nats.runtime.slots import Slots
from asyncmq_nats.store.waiters import Waiters

__all__ = ["JobWatch", "settle_here", "waits_by_clock"]

BLIND_TURNS: Final = 25
"""Turns after which a loop is taken to be at rest that does not say what it has ready."""
PASSIVE_SECONDS: Final = 0.02
"""How long to wait for a job that waits for another task of the program: usually for the test."""

SLOT_CODE: Final = frozenset({Slots._run_delivery.__code__, Slots._run_suspect.__code__})
PASSIVE_CODE: Final = frozenset(
    each.__code__
    for each in (
        asyncio.Event.wait,
        asyncio.Condition.wait,
        asyncio.Lock.acquire,
        asyncio.Queue.get,
        asyncio.Queue.put,
        asyncio.Semaphore.acquire,
    )
)
Wait = tuple["asyncio.Task[Any]", "asyncio.Future[Any] | None"]
CLOCK_CODE: Final[set[CodeType]] = {Waiters.wait.__code__}


def waits_by_clock(function: Any) -> Any:
    """Mark a coroutine function: who awaits it waits until the clock is moved."""
    CLOCK_CODE.add(function.__code__)
    return function


async def settle_here() -> bool:
    """Return when every task of this event loop waits for something that is not ready.

    The value: whether something was done meanwhile.
    """
    # What is ready is private, and there on every loop of asyncio; other loops get some turns.
    ready = getattr(asyncio.get_running_loop(), "_ready", None)
    turns, worked = 0, False
    while turns < (1 if ready is not None else BLIND_TURNS):
        await asyncio.sleep(0)
        worked |= bool(ready)
        turns = 0 if ready else turns + 1
    return worked


@dataclass(frozen=True, slots=True)
class Look:
    """The jobs that run, and for what each waits: task and future."""

    limits: dict[Wait, float]
    """Real seconds to wait for each job; infinite: it is not at rest."""

    def waits(self, seconds: float) -> bool:
        """Return whether to wait on, after that many seconds."""
        return any(seconds < limit for limit in self.limits.values())


class JobWatch:
    """Watches the jobs that run in this process."""

    def __init__(self, patience: float) -> None:
        self._patience = patience
        self._given_up: set[Wait] = set()

    def running(self, loops: list[asyncio.AbstractEventLoop]) -> list["asyncio.Task[Any]"]:
        """Return the tasks in which jobs run, in this event loop and in those."""
        here = asyncio.get_running_loop()
        return [
            task
            for loop in (here, *loops)
            for task in asyncio.all_tasks(loop)
            if getattr(task.get_coro(), "cr_code", None) in SLOT_CODE
        ]

    def look(self, loops: list[asyncio.AbstractEventLoop]) -> Look:
        """Return what the jobs wait for now."""
        limits: dict[Wait, float] = {}
        for task in self.running(loops):
            wait = task, getattr(task, "_fut_waiter", None)
            if wait not in self._given_up:
                limits[wait] = self._limit(task)
        return Look(limits)

    def give_up(self, look: Look) -> None:
        """Wait for none of these any more, unless it waits for something else."""
        self._given_up = {wait for wait in self._given_up if not wait[0].done()}
        self._given_up.update(look.limits)

    def _limit(self, task: "asyncio.Task[Any]") -> float:
        frames = list(_chain(task.get_coro()))
        codes = {frame.cr_code for frame in frames}
        if codes & CLOCK_CODE:
            return 0.0
        last = frames[-1]
        if last.cr_code is asyncio.sleep.__code__ and last.cr_frame is not None:
            seconds = float(last.cr_frame.f_locals["delay"])
            return seconds + self._patience if seconds <= self._patience else 0.0
        return PASSIVE_SECONDS if last.cr_code in PASSIVE_CODE else self._patience


def _chain(coroutine: Any) -> Iterator[Any]:
    """Yield a coroutine, the one that it awaits, and so on."""
    while inspect.iscoroutine(coroutine):
        yield coroutine
        coroutine = coroutine.cr_await
