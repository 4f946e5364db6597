"""The history of the workers: rates, durations and totals, per queue and task.

Workers write it (`Settings.metrics`), so it is true over restarts, replicas and processes, and a
read costs the same however many jobs ran. Times are Unix seconds by the server's clock.
"""

import math
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Final

from asyncmq_nats._arguments import checked_seconds
from asyncmq_nats.backends.base import Backend
from asyncmq_nats.exceptions import InvalidArgument
from asyncmq_nats.store.history import STEP_SECONDS, HistoryRecord, history_ttl, read_history
from asyncmq_nats.wire.keys import check_queue_name

__all__ = [
    "ENDS",
    "INCIDENTS",
    "Histogram",
    "MetricsHistory",
    "MetricsPoint",
    "TaskMetrics",
    "read_all_metrics",
    "read_metrics",
]

ENDS: Final = ("completed", "failed", "retried", "expired", "cancelled")
"""The ends of an attempt.

`cancelled`: while it ran; the history counts no job that was cancelled while it waited.
"""
INCIDENTS: Final = ("redelivered", "lost", "handed_back", "lease_lost", "reconnected")
"""Counts of a worker beside the ends of attempts; see docs/monitoring.md."""
PER_DOUBLING: Final = 64
"""Buckets of a histogram per doubling: a percentile is right within 0.6 %."""
SHORTEST_SECONDS: Final = 1e-6
LONGEST_SECONDS: Final = 1e8
"""In seconds: a duration outside counts as this one."""
MOST_POINTS: Final = 200
"""Points of a read that is given no step, at most."""
NICE_STEPS: Final = (
    *(10, 20, 30, 60, 120, 300, 600, 1200, 1800, 3600),
    *(7200, 10_800, 21_600, 43_200, 86_400),
)
HOUR: Final = 3600.0


class Histogram:
    """Durations in seconds, counted in buckets that grow by 1.1 %."""

    __slots__ = ("_counts", "count", "maximum", "total")

    def __init__(self) -> None:
        self._counts: dict[int, int] = {}
        self.count = 0
        self.total = 0.0
        """Sum of all durations, in seconds."""
        self.maximum = 0.0
        """The longest one, in seconds."""

    def add(self, seconds: float) -> None:
        """Count one duration."""
        self.add_many([seconds])

    def add_many(self, durations: Sequence[float]) -> None:
        """Count many durations at once, which is cheaper than one by one.

        A duration below 0 counts as 0: a clock was put back.
        """
        if not durations:
            return
        ordered, start, counts = sorted(durations), 0, self._counts
        if ordered[0] < 0:
            ordered = [max(0.0, each) for each in ordered]
        self.count += len(ordered)
        self.total += sum(ordered)
        self.maximum = max(self.maximum, ordered[-1])
        while start < len(ordered):
            first = min(max(ordered[start], SHORTEST_SECONDS), LONGEST_SECONDS)
            index = math.ceil(math.log2(first) * PER_DOUBLING)
            end = bisect_right(ordered, 2 ** (index / PER_DOUBLING), start + 1)
            counts[index] = counts.get(index, 0) + end - start
            start = end

    def merge(self, other: "Histogram") -> None:
        """Count all durations of another histogram as well."""
        self.count += other.count
        self.total += other.total
        self.maximum = max(self.maximum, other.maximum)
        for index, count in other._counts.items():
            self._counts[index] = self._counts.get(index, 0) + count

    @property
    def mean(self) -> float | None:
        """The mean in seconds; `None` if nothing was counted."""
        return self.total / self.count if self.count else None

    def percentile(self, share: float) -> float | None:
        """Return the duration (seconds) below which a share (0 to 1) of them lies, by nearest rank.

        `None` if nothing was counted.
        """
        if not self.count:
            return None
        rank, seen = max(1, math.ceil(share * self.count)), 0
        for index in sorted(self._counts):
            seen += self._counts[index]
            if seen >= rank:
                return min(2 ** ((index - 0.5) / PER_DOUBLING), self.maximum)
        return self.maximum

    def count_below(self, bounds: Iterable[float]) -> list[int]:
        """Return for each bound (seconds, rising) how many durations are not above it."""
        indexes, found, seen, position = sorted(self._counts), list[int](), 0, 0
        for bound in bounds:
            limit = math.ceil(math.log2(bound) * PER_DOUBLING)  # the bucket that the bound is in
            while position < len(indexes) and indexes[position] <= limit:
                seen += self._counts[indexes[position]]
                position += 1
            found.append(seen)
        return found

    def to_list(self, *, coarse: bool = False) -> list[Any]:
        """Return it as JSON has it: sum, maximum, then index and count of each bucket in turn.

        `coarse`: with an eighth of the buckets.
        """
        counts = self._counts
        if coarse:
            counts = {}
            for index, count in self._counts.items():
                middle = index - index % 8 + 4
                counts[middle] = counts.get(middle, 0) + count
        pairs = [number for index in sorted(counts) for number in (index, counts[index])]
        return [round(self.total, 6), round(self.maximum, 6), *pairs]

    @classmethod
    def from_list(cls, data: object) -> "Histogram":
        """Return the histogram of such a list; an empty one if it is malformed."""
        found = cls()
        if not isinstance(data, list) or len(data) < 2 or len(data) % 2:
            return found
        if not all(isinstance(each, int | float) and math.isfinite(each) for each in data):
            return found
        found.total, found.maximum = float(data[0]), float(data[1])
        found._counts = {int(data[at]): int(data[at + 1]) for at in range(2, len(data), 2)}
        found.count = sum(found._counts.values())
        return found


@dataclass(slots=True)
class TaskMetrics:
    """Counts of the attempts at the jobs of one task, or of several."""

    completed: int = 0
    failed: int = 0
    """Failed for good."""
    retried: int = 0
    """Failed, and tried again."""
    expired: int = 0
    cancelled: int = 0
    """Cancelled while they ran."""
    wait: Histogram = field(default_factory=Histogram)
    """Seconds from when a job could run until it started, of each attempt that ran."""
    run: Histogram = field(default_factory=Histogram)
    """Seconds that each attempt ran."""

    @property
    def ended(self) -> int:
        """Jobs that ended: all but those that are tried again."""
        return self.completed + self.failed + self.expired + self.cancelled

    @property
    def failure_rate(self) -> float | None:
        """Share (0 to 1) of the ended jobs that failed for good; `None` if none ended."""
        return self.failed / self.ended if self.ended else None

    def merge(self, other: "TaskMetrics") -> None:
        """Count what another one has as well."""
        for name in ENDS:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.wait.merge(other.wait)
        self.run.merge(other.run)

    def to_dict(self, *, coarse: bool = False) -> dict[str, Any]:
        """Return the counts as JSON, without those that are 0."""
        data: dict[str, Any] = {name: n for name in ENDS if (n := getattr(self, name))}
        if self.run.count:
            data["wait"] = self.wait.to_list(coarse=coarse)
            data["run"] = self.run.to_list(coarse=coarse)
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "TaskMetrics":
        """Return the counts of such a dict; malformed ones count as 0."""
        counts = {name: n for name in ENDS if isinstance(n := data.get(name), int)}
        wait, run = Histogram.from_list(data.get("wait")), Histogram.from_list(data.get("run"))
        return cls(**counts, wait=wait, run=run)


def _merged(metrics: Iterable[TaskMetrics]) -> TaskMetrics:
    total = TaskMetrics()
    for each in metrics:
        total.merge(each)
    return total


@dataclass(slots=True)
class MetricsPoint:
    """The counts of `step` seconds from `start` on.

    `seconds`: how many of these are over; fewer than `step` in the last point only. `slots`,
    `busy`: mean number of slots, and of those that ran a job. `workers`: the number of workers that
    wrote.
    `incidents`: counts by the words of `INCIDENTS`.
    """

    start: float
    step: float
    seconds: float
    workers: int = 0
    slots: float = 0.0
    busy: float = 0.0
    tasks: dict[str, TaskMetrics] = field(default_factory=dict)
    incidents: dict[str, int] = field(default_factory=dict)

    @property
    def total(self) -> TaskMetrics:
        """The counts of all tasks together."""
        return _merged(self.tasks.values())

    def rate(self, count: int) -> float:
        """Return a count of this point per second, as in `point.rate(point.total.completed)`."""
        return count / self.seconds if self.seconds > 0 else 0.0


@dataclass(frozen=True, slots=True)
class MetricsHistory:
    """The points of a period in order, without gaps.

    `since`, `until`: its ends; `step`: seconds per point.
    """

    queue: str | None
    since: float
    until: float
    step: float
    points: Sequence[MetricsPoint]

    @property
    def tasks(self) -> dict[str, TaskMetrics]:
        """The counts of each task, over all points."""
        found: dict[str, TaskMetrics] = {}
        for point in self.points:
            for task, metrics in point.tasks.items():
                found.setdefault(task, TaskMetrics()).merge(metrics)
        return found

    @property
    def total(self) -> TaskMetrics:
        """The counts of all tasks and all points together."""
        return _merged(self.tasks.values())

    @property
    def incidents(self) -> dict[str, int]:
        """Counts by the words of `INCIDENTS`, over all points."""
        found = dict.fromkeys(INCIDENTS, 0)
        for point in self.points:
            for name, count in point.incidents.items():
                found[name] = found.get(name, 0) + count
        return found


async def read_metrics(
    backend: Backend,
    queue: str,
    *,
    since: float | None = None,
    until: float | None = None,
    step: float | None = None,
) -> MetricsHistory:
    """Return the history of a queue's workers.

    Args:
        backend: of the queue.
        queue: its name. One that no worker ran has points that are all 0.
        since: Unix seconds; by default an hour before `until`. It is moved back to the begin of its
            point.
        until: Unix seconds; by default now, with the running step. It is moved to the end of its
            point.
        step: seconds per point, by default as many as make at most 200 points. It is raised to what
            is kept: 10 s for three hours, 60 s for two days, 600 s for `metrics_ttl`.

    Raises:
        InvalidQueueName: no queue can have that name.
        InvalidArgument: `since` is not before `until`, or a number is none.
    """
    check_queue_name(queue)
    plan = await _plan(backend, since, until, step)
    records = await read_history(backend, queue, plan.since, plan.until, plan.stored)
    return _history(queue, plan, records)


async def read_all_metrics(
    backend: Backend,
    *,
    since: float | None = None,
    until: float | None = None,
    step: float | None = None,
) -> dict[str, MetricsHistory]:
    """Return the history of each queue with workers in that time, by name, in one read."""
    plan = await _plan(backend, since, until, step)
    by_queue: dict[str, list[HistoryRecord]] = {}
    for record in await read_history(backend, None, plan.since, plan.until, plan.stored):
        by_queue.setdefault(record.queue, []).append(record)
    return {queue: _history(queue, plan, by_queue[queue]) for queue in sorted(by_queue)}


@dataclass(frozen=True, slots=True)
class _Plan:
    """A request for a history.

    `stored`: the step of the records; `step`: that of the points, a multiple of it.
    """

    since: int
    until: int
    step: int
    stored: int
    now: float


async def _plan(
    backend: Backend, since: float | None, until: float | None, step: float | None
) -> _Plan:
    await backend.connect()
    now = backend.now()
    end = now if until is None else checked_seconds(until, "until")
    begin = end - HOUR if since is None else checked_seconds(since, "since")
    if begin >= end:
        raise InvalidArgument("since must be before until, both in Unix seconds", begin)
    wanted = _choose_step(end - begin) if step is None else checked_seconds(step, "step")
    if wanted <= 0:
        raise InvalidArgument("step must be above 0 s", step)
    age = now - begin
    kept = [
        each for each in STEP_SECONDS if age <= history_ttl(each, backend.settings)
    ] or STEP_SECONDS[-1:]
    stored = max([each for each in kept if each <= wanted], default=kept[0])
    # A multiple of what is stored, so that no record lies in two points.
    whole = stored * max(1, math.ceil(wanted / stored))
    first = math.floor(begin / whole) * whole
    return _Plan(first, math.ceil(end / whole) * whole, whole, stored, now)


def _choose_step(seconds: float) -> float:
    fitting = [step for step in NICE_STEPS if seconds / step <= MOST_POINTS]
    return fitting[0] if fitting else math.ceil(seconds / MOST_POINTS)


def _history(queue: str, plan: _Plan, records: Iterable[HistoryRecord]) -> MetricsHistory:
    edges = range(plan.since, plan.until + 1, plan.step)
    points = [
        MetricsPoint(start, plan.step, min(max(plan.now - start, 0.0), plan.step))
        for start, _ in pairwise(edges)
    ]
    workers: list[set[str]] = [set() for _ in points]
    for record in records:
        index = (record.start - plan.since) // plan.step
        workers[index].add(record.worker)
        _add(points[index], record.data)
    for point, names in zip(points, workers, strict=True):
        point.workers = len(names)
        if point.seconds > 0:
            point.slots /= point.seconds
            point.busy /= point.seconds
    return MetricsHistory(queue, plan.since, plan.until, plan.step, points)


def _add(point: MetricsPoint, data: Mapping[str, Any]) -> None:
    point.slots += _number(data.get("slot_seconds"))
    point.busy += _number(data.get("busy_seconds"))
    for task, metrics in _mapping(data.get("tasks")).items():
        found = TaskMetrics.from_dict(_mapping(metrics))
        point.tasks.setdefault(task, TaskMetrics()).merge(found)
    for name, count in _mapping(data.get("incidents")).items():
        point.incidents[name] = point.incidents.get(name, 0) + int(_number(count))


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else 0.0


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}
