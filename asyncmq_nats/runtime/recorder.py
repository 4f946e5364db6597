"""Counts the ends of a worker's jobs, and writes them to the history.

What happens is noted, and counted later: many at once are cheap. A task of its own writes, and no
job waits for it: a write that fails is logged.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

from asyncmq_nats._clock import NANOSECONDS
from asyncmq_nats._concurrency import Spawner
from asyncmq_nats._logging import Throttle, get_logger
from asyncmq_nats.backends.base import Backend, Settled, Write
from asyncmq_nats.exceptions import AssetMissing, AsyncMQError, BackendError
from asyncmq_nats.metrics import ENDS, TaskMetrics
from asyncmq_nats.store.history import STEP_SECONDS, history_key, history_log, history_ttl
from asyncmq_nats.wire.codec import dump_json
from asyncmq_nats.wire.keys import metrics_bucket

__all__ = ["UNKNOWN_TASK", "Recorder"]

logger = get_logger(__name__)

UNKNOWN_TASK: Final = "?"
"""Stands for the tasks that a worker does not know: any program may add jobs with any name."""
MOST_TASKS: Final = 2_000
"""Tasks that are counted apart; more can only be names that strangers made up."""
MOST_RUNS: Final = 500
"""Attempts of a task that are noted before they are counted."""
RECORD_INTERVAL: Final = STEP_SECONDS[0]
WARNING_INTERVAL: Final = 600.0


@dataclass(slots=True)
class _Stretch:
    """The counts of this worker in the current step of the history."""

    start: int
    written: bool = True
    slot_seconds: float = 0.0
    busy_seconds: float = 0.0
    tasks: dict[str, TaskMetrics] = field(default_factory=dict)
    incidents: dict[str, int] = field(default_factory=dict)

    def add(self, other: "_Stretch") -> None:
        self.written = False
        self.slot_seconds += other.slot_seconds
        self.busy_seconds += other.busy_seconds
        for task, metrics in other.tasks.items():
            self.tasks.setdefault(task, TaskMetrics()).merge(metrics)
        for name, count in other.incidents.items():
            self.incidents[name] = self.incidents.get(name, 0) + count


class Recorder:
    """The counts of one worker.

    Args:
        backend: of the queue.
        queue: its name.
        worker: the id of the worker.
        slots: how many it has.
        busy_seconds: how long the attempts that run now have run so far, together.
        incidents: counts since the start of the worker, by the words of `metrics.INCIDENTS`.
    """

    def __init__(
        self,
        backend: Backend,
        queue: str,
        worker: str,
        slots: int,
        busy_seconds: Callable[[], float],
        incidents: Callable[[], Mapping[str, int]],
    ) -> None:
        self._backend = backend
        self._queue = queue
        self._worker = worker
        self._slots = slots
        self._running_seconds = busy_seconds
        self.incidents = incidents
        self._log, _ = metrics_bucket(backend.settings.prefix)
        self._noted: dict[str, tuple[list[bytes | int], list[float], list[float]]] = defaultdict(
            lambda: ([], [], [])
        )
        """By task: the stamps of its deliveries, and when its attempts started and ended."""
        self._ends: dict[str, list[str]] = {end: [] for end in ENDS}
        self.note_end: dict[str, Callable[[str], None]] = {
            end: tasks.append for end, tasks in self._ends.items()
        }
        """By one of `metrics.ENDS`: counts an attempt of a task that ended so."""
        self._counts: dict[str, TaskMetrics] = {}
        self._totals: dict[str, TaskMetrics] = {}
        self._ended_seconds = 0.0
        self._told_seconds = 0.0
        self._told_incidents: dict[str, int] = {}
        self._taken_at = 0.0
        self._stretches: dict[int, _Stretch] = {}
        self._warnings = Throttle(WARNING_INTERVAL)

    # -- on the path of every job

    def note_run(self, task: str, stored: bytes | int, started: float, ended: float) -> None:
        """Count an attempt. `stored`: the stamp of its delivery; the others in Unix seconds."""
        stamps, starts, ends = self._noted[task]
        stamps.append(stored)
        starts.append(started)
        ends.append(ended)
        if len(ends) >= MOST_RUNS:
            self._count_noted()

    # -- later

    def _count_noted(self) -> None:
        """Count what was noted: that is cheap for many at once, and dear one by one."""
        noted = dict(self._noted)
        self._noted.clear()
        for task, (stamps, starts, ends) in noted.items():
            metrics = self._metrics_of(task)
            metrics.wait.add_many(
                [
                    start - int(stamp) / NANOSECONDS
                    for stamp, start in zip(stamps, starts, strict=True)
                ]
            )
            metrics.run.add_many([end - start for start, end in zip(starts, ends, strict=True)])
        for end, tasks in self._ends.items():
            for task, count in Counter(tasks).items():
                metrics = self._metrics_of(task)
                setattr(metrics, end, getattr(metrics, end) + count)
            tasks.clear()

    def _metrics_of(self, task: str) -> TaskMetrics:
        known = task in self._totals or task in self._counts
        if not known and len(self._totals) + len(self._counts) >= MOST_TASKS:
            task = UNKNOWN_TASK
        return self._counts.setdefault(task, TaskMetrics())

    # -- since the start of the worker

    def totals(self) -> dict[str, TaskMetrics]:
        """Return the counts since the worker started, by task."""
        self._count_noted()
        totals: dict[str, TaskMetrics] = {}
        for task, metrics in [*self._totals.items(), *self._counts.items()]:
            totals.setdefault(task, TaskMetrics()).merge(metrics)
        return totals

    # -- the history

    async def run(self, spawner: Spawner) -> None:
        """Write a record at the end of each ten seconds, by the server's clock, until cancelled."""
        self.begin()
        while True:
            now = self._backend.now()
            rest = RECORD_INTERVAL - now % RECORD_INTERVAL + 0.001
            await self._backend.clock.sleep(rest, upkeep=True)
            for write in self.take():
                self._send(spawner, write)

    def begin(self) -> None:
        """Count slots from now on."""
        self._taken_at = self._backend.now()

    async def close(self) -> None:
        """Write the counts since the last record, and wait until they are stored.

        A write that fails is logged.
        """
        try:
            for write in self.take(closing=True):
                try:
                    await self._backend.write(self._log, write)
                except AssetMissing:
                    await self._backend.declare_log(history_log(self._backend.settings))
                    await self._backend.write(self._log, write)
        except AsyncMQError as error:
            self._warn(error)

    def take(self, *, closing: bool = False) -> list[Write]:
        """Return the writes of the counts since the last call, and reset these."""
        taken, now = self._take_current(), self._backend.now()
        middle = (self._taken_at + now) / 2
        taken.slot_seconds = self._slots * max(0.0, now - self._taken_at)
        self._taken_at = now
        writes: list[Write] = []
        for step in STEP_SECONDS:
            start = math.floor(middle / step) * step
            stretch = self._stretches.get(step)
            if stretch is None or stretch.start != start:
                if stretch is not None and not stretch.written:  # its last part was idle
                    writes.append(self._write(step, stretch))
                stretch = self._stretches[step] = _Stretch(start)
            stretch.add(taken)
            # The slots of an idle worker are worth one write per step.
            if step == RECORD_INTERVAL or taken.tasks or taken.incidents or closing:
                writes.append(self._write(step, stretch))
        return writes

    def _take_current(self) -> _Stretch:
        self._count_noted()
        tasks, self._counts = self._counts, {}
        self._ended_seconds += sum(metrics.run.total for metrics in tasks.values())
        busy = self._ended_seconds + self._running_seconds()
        incidents = dict(self.incidents())
        told = self._told_incidents
        taken = _Stretch(
            0,
            busy_seconds=max(0.0, busy - self._told_seconds),
            tasks=tasks,
            incidents={n: new for n, c in incidents.items() if (new := c - told.get(n, 0)) > 0},
        )
        for task, metrics in tasks.items():
            self._totals.setdefault(task, TaskMetrics()).merge(metrics)
        self._told_seconds, self._told_incidents = busy, incidents
        return taken

    def _write(self, step: int, stretch: _Stretch) -> Write:
        stretch.written = True
        settings = self._backend.settings
        body = self._encode(step, stretch)
        if len(body) > self._backend.max_body // 4:
            body = self._encode(step, stretch, coarse=True)
        if len(body) > self._backend.max_body:
            total = TaskMetrics()
            for metrics in stretch.tasks.values():
                total.merge(metrics)
            body = self._encode(step, stretch, {UNKNOWN_TASK: total}, coarse=True)
        key = history_key(settings.prefix, self._queue, self._worker, stretch.start, step)
        return Write(key, body, ttl=history_ttl(step, settings))

    def _encode(
        self,
        step: int,
        stretch: _Stretch,
        tasks: Mapping[str, TaskMetrics] | None = None,
        *,
        coarse: bool = False,
    ) -> bytes:
        shown = stretch.tasks if tasks is None else tasks
        data: dict[str, Any] = {
            "v": 1,
            "queue": self._queue,
            "worker": self._worker,
            "start": stretch.start,
            "step": step,
            "slots": self._slots,
            "slot_seconds": round(stretch.slot_seconds, 3),
            "busy_seconds": round(stretch.busy_seconds, 3),
            "tasks": {task: metrics.to_dict(coarse=coarse) for task, metrics in shown.items()},
        }
        if stretch.incidents:
            data["incidents"] = stretch.incidents
        return dump_json(data)

    def _send(self, spawner: Spawner, write: Write) -> None:
        self._backend.send(self._log, write, partial(self._on_settled, spawner, write))

    def _on_settled(self, spawner: Spawner, write: Write, result: Settled) -> None:
        if isinstance(result, AssetMissing):
            spawner.spawn(self._declare_and_write, write)
        elif isinstance(result, BackendError):
            self._warn(result)

    async def _declare_and_write(self, write: Write) -> None:
        try:
            await self._backend.declare_log(history_log(self._backend.settings))
            await self._backend.write(self._log, write)
        except AsyncMQError as error:
            self._warn(error)

    def _warn(self, error: AsyncMQError) -> None:
        if times := self._warnings.note():
            text = "worker %s: the history was not written (%d times), jobs go on: %s"
            logger.warning(text, self._worker, times, error)
