"""Whether the event loop of a worker runs, and which task holds it up.

A task of the loop beats four times a second. A thread looks at the beats: only it can say, while
the loop is blocked, what blocks it.
"""

import asyncio
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any, Final
from weakref import WeakKeyDictionary

import anyio

from asyncmq_nats._logging import get_logger

__all__ = ["Pulse"]

logger = get_logger(__name__)

BEAT_INTERVAL: Final = 0.25
"""Seconds between two beats."""
SHORTEST_WATCH_INTERVAL: Final = 0.05
JOIN_TIMEOUT: Final = 0.5
"""Seconds that the end of a worker waits for the thread, which may be writing a warning."""
WATCHER: Final = "asyncmq-nats loop watcher"

Describe = Callable[["asyncio.Task[Any] | None"], str | None]
"""Says what runs in a task; `None`: no job."""
_pulses: "WeakKeyDictionary[asyncio.AbstractEventLoop, dict[float | None, list[Pulse]]]" = (
    WeakKeyDictionary()
)
"""By event loop and limit: each queue of a worker has a pulse, and the first watches for all."""


class Pulse:
    """The beats of one event loop.

    Args:
        worker: named in warnings.
        limit: seconds without a beat that are worth a warning; `None`: there is no thread.
        describe: says which job runs in a task of the loop. Called in the thread.
    """

    def __init__(self, worker: str, limit: float | None, describe: Describe) -> None:
        self._worker = worker
        self._limit = limit
        self._describe = describe
        self._beat_at = time.monotonic()
        self._beside: list[Pulse] = []
        """The pulses of the event loop, this one included, of which the first one watches."""
        self._stopped = threading.Event()

    @property
    def age(self) -> float:
        """Seconds since the last beat. May be read from any thread."""
        return time.monotonic() - self._beat_at

    async def run(self) -> None:
        """Beat until cancelled."""
        loop = asyncio.get_running_loop()
        self._beside = _pulses.setdefault(loop, {}).setdefault(self._limit, [])
        self._beside.append(self)
        watcher = None
        try:
            while True:
                self._beat_at = time.monotonic()
                if watcher is None and self._limit is not None and self._beside[0] is self:
                    args = (loop, threading.get_ident(), self._limit)
                    watcher = threading.Thread(
                        target=self._watch, args=args, name=WATCHER, daemon=True
                    )
                    watcher.start()
                await anyio.sleep(BEAT_INTERVAL)
        finally:
            self._beside.remove(self)
            self._stopped.set()
            if watcher is not None:  # it wakes at once: nothing of a worker outlives it
                watcher.join(JOIN_TIMEOUT)

    def _watch(self, loop: asyncio.AbstractEventLoop, thread: int, limit: float) -> None:
        """Warn once of each time in which the loop is blocked, from a thread."""
        pause = max(SHORTEST_WATCH_INTERVAL, min(limit / 4, BEAT_INTERVAL))
        warned_at = 0.0
        while True:
            slept = time.monotonic()
            if self._stopped.wait(pause):
                return
            # A process that stood still has no news of its loop.
            stood_still = time.monotonic() - slept > pause + limit / 2
            beat = self._beat_at
            if (
                not stood_still
                and beat != warned_at
                and time.monotonic() - beat > limit + BEAT_INTERVAL
            ):
                warned_at = beat
                self._warn(loop, thread, time.monotonic() - beat)

    def _warn(self, loop: asyncio.AbstractEventLoop, thread: int, seconds: float) -> None:
        try:
            task = asyncio.current_task(loop)
            what = next(filter(None, [each._describe(task) for each in list(self._beside)]), None)
        except RuntimeError:  # the jobs change while they are looked through: so the loop runs
            return
        if task is None:  # it waits for its turn on a busy machine
            return
        logger.warning(
            "worker %s: the event loop has been blocked for %.1f s by %s%s: "
            "leases, heartbeats and all other jobs wait; use a sync task, or process=True",
            self._worker,
            seconds,
            what or f"task {task.get_name()!r}",
            _place(sys._current_frames().get(thread)),
        )


def _place(frame: FrameType | None) -> str:
    """Return where a thread is."""
    if frame is None:
        return ""
    code = frame.f_code
    return f", at {code.co_filename}:{frame.f_lineno} in {code.co_name}"
