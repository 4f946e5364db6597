"""Queues and workers in the text format of Prometheus. Needs the extra `prometheus`.

`render_queues` is for a web application; a worker has a port of its own (`Settings.metrics_port`).
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import anyio
from prometheus_client import generate_latest
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from asyncmq_nats._concurrency import open_task_group
from asyncmq_nats.backends.base import Backend
from asyncmq_nats.metrics import (
    ENDS,
    INCIDENTS,
    Histogram,
    TaskMetrics,
    read_all_metrics,
)

__all__ = [
    "BUCKET_BOUNDS",
    "CONTENT_TYPE",
    "HistoryCounts",
    "QueueGauges",
    "QueueSource",
    "WorkerCounts",
    "read_queue",
    "render",
    "render_queues",
]

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
BUCKET_BOUNDS: Final = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5),
    *(1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 900.0, 3600.0),
)
"""Upper bounds of the buckets of both histograms, in seconds."""
POINT_SECONDS: Final = 10.0
"""Seconds of the shortest points of the history: a worker writes that often."""
SETTLED_AFTER: Final = 120.0
"""Seconds after which no worker adds to a point of the history any more."""
KNOWN_SECONDS: Final = 3600.0
"""Tasks that ran in these seconds before the first read have counters of 0 at it."""
INCIDENT_NAMES: Final = {
    "redelivered": ("redeliveries", "Deliveries of jobs that had been delivered before."),
    "lost": ("lost_workers", "Jobs that were delivered again since their worker was lost."),
    "handed_back": ("handbacks", "Jobs that were returned to the queue before they ended."),
    "lease_lost": ("lost_leases", "Leases that ran out although the worker ran the job."),
    "reconnected": ("reconnects", "Times that the connection was lost and made again."),
}


class QueueSource(Protocol):
    """The methods of a `Queue` that are called."""

    name: str

    async def queue_stats(self) -> dict[str, int]:
        """Return how many jobs are in each state."""

    async def oldest_waiting(self) -> Any:
        """Return the job that has waited longest, with its `age` in seconds, or `None`."""

    async def is_paused(self) -> bool:
        """Return whether the queue is paused."""

    async def list_workers(self) -> Sequence[Any]:
        """Return the running workers, each with its `concurrency`."""


@dataclass(frozen=True, slots=True)
class QueueGauges:
    """The state of a queue now. `oldest_waiting`: seconds, 0 if no job waits."""

    queue: str
    counts: Mapping[str, int]
    oldest_waiting: float
    paused: bool
    workers: int
    slots: int


@dataclass(frozen=True, slots=True)
class WorkerCounts:
    """The counts of a worker since it started. `incidents`: by the words of `metrics.INCIDENTS`."""

    queue: str
    slots: int
    busy: int
    tasks: Mapping[str, TaskMetrics] = field(default_factory=dict)
    incidents: Mapping[str, int] = field(default_factory=dict)


async def read_queue(queue: QueueSource) -> QueueGauges:
    """Return the state of a queue now. Costs the same for any number of jobs."""
    workers, oldest = await queue.list_workers(), await queue.oldest_waiting()
    return QueueGauges(
        queue.name,
        await queue.queue_stats(),
        0.0 if oldest is None else oldest.age,
        await queue.is_paused(),
        len(workers),
        sum(worker.concurrency for worker in workers),
    )


class HistoryCounts:
    """The counts of all workers since the first read, from the history that they write.

    They are up to ten seconds old: that is how often a worker writes. Workers with
    `Settings.metrics` off are not counted.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._settled: list[WorkerCounts] = []
        """The counts of the points before `_since`."""
        self._since: float | None = None
        """Start of the first point that may still change, in Unix seconds."""
        self._lock = anyio.Lock()

    async def read(self) -> list[WorkerCounts]:
        """Return the counts of each queue. Costs the same however many jobs ran."""
        async with self._lock:
            if self._since is None:
                self._since = await self._begin()
            now = self._backend.now()
            histories = await read_all_metrics(
                self._backend, since=self._since, until=now + POINT_SECONDS, step=POINT_SECONDS
            )
            unsettled = max(self._since, _start_of_point(now - SETTLED_AFTER))
            recent: list[WorkerCounts] = []
            for queue, history in histories.items():
                for point in history.points:
                    counts = WorkerCounts(queue, 0, 0, point.tasks, point.incidents)
                    # After hours without a read, points are longer: the first may begin earlier.
                    if point.start >= self._since:
                        (recent if point.start >= unsettled else self._settled).append(counts)
            self._settled, self._since = _by_queue(self._settled), unsettled
            return _by_queue([*self._settled, *recent])

    async def _begin(self) -> float:
        """Return where the counts begin. Tasks that ran lately have counters of 0."""
        await self._backend.connect()
        start = _start_of_point(self._backend.now())
        histories = await read_all_metrics(self._backend, since=start - KNOWN_SECONDS, until=start)
        for queue, history in histories.items():
            tasks = {task: TaskMetrics() for task in history.tasks}
            self._settled.append(WorkerCounts(queue, 0, 0, tasks))
        return start


def _start_of_point(time: float) -> float:
    return math.floor(time / POINT_SECONDS) * POINT_SECONDS


async def render_queues(
    queues: Iterable[QueueSource], history: HistoryCounts | None = None
) -> bytes:
    """Return the states of the queues now, for a page that Prometheus reads.

    With `history`, also the counters of their jobs: workers show these at their own ports, too.
    """
    found: dict[str, QueueGauges] = {}

    async def read(queue: QueueSource) -> None:
        found[queue.name] = await read_queue(queue)

    async with open_task_group() as group:
        for queue in queues:
            group.start_soon(read, queue)
    counts = [] if history is None else await history.read()
    return render(
        [found[name] for name in sorted(found)],
        history=[each for each in counts if each.queue in found],
    )


def render(
    queues: Sequence[QueueGauges] = (),
    workers: Sequence[WorkerCounts] = (),
    history: Sequence[WorkerCounts] = (),
) -> bytes:
    """Return queues and workers in the text format of Prometheus.

    `history`: counts of all workers of a queue, whose slots are among those of the queues.
    """
    return generate_latest(_Collector(queues, workers, history))


class _Collector(Collector):
    """Makes the metrics of one answer."""

    def __init__(
        self,
        queues: Sequence[QueueGauges],
        workers: Sequence[WorkerCounts],
        history: Sequence[WorkerCounts],
    ) -> None:
        self._queues = queues
        self._workers = workers
        self._history = history

    def collect(self) -> Iterator[Metric]:
        """Yield all metrics that have a sample."""
        if self._queues:
            yield from _queue_metrics(self._queues)
        if self._workers:
            workers = _by_queue(self._workers)
            yield from _slot_metrics(workers)
            yield from _incident_metrics(workers)
            yield from _job_metrics(workers)
        if self._history:
            yield from _incident_metrics(self._history)
            yield from _job_metrics(self._history)


def _by_queue(workers: Iterable[WorkerCounts]) -> list[WorkerCounts]:
    """Return one entry per queue: a series may be there once."""
    found: dict[str, list[WorkerCounts]] = {}
    for worker in workers:
        found.setdefault(worker.queue, []).append(worker)
    return [_merged(queue, parts) for queue, parts in found.items()]


def _merged(queue: str, parts: Sequence[WorkerCounts]) -> WorkerCounts:
    tasks: dict[str, TaskMetrics] = {}
    for part in parts:
        for task, metrics in part.tasks.items():
            tasks.setdefault(task, TaskMetrics()).merge(metrics)
    incidents = {name: sum(part.incidents.get(name, 0) for part in parts) for name in INCIDENTS}
    slots, busy = sum(part.slots for part in parts), sum(part.busy for part in parts)
    return WorkerCounts(queue, slots, busy, tasks, incidents)


def _gauge(name: str, text: str, labels: Sequence[str] = ("queue",)) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"asyncmq_{name}", text, labels=labels)


def _queue_metrics(queues: Sequence[QueueGauges]) -> Iterator[Metric]:
    jobs = _gauge("jobs", "Jobs by queue and state.", ("queue", "state"))
    oldest = _gauge("oldest_waiting_seconds", "How long the oldest waiting job waits; 0: none.")
    paused = _gauge("queue_paused", "Whether the queue is paused.")
    workers = _gauge("workers", "Running workers of the queue.")
    slots = _gauge("slots", "Slots of all its running workers.")
    for queue in queues:
        for state, count in queue.counts.items():
            jobs.add_metric((queue.queue, state), count)
        labels = (queue.queue,)
        oldest.add_metric(labels, queue.oldest_waiting)
        paused.add_metric(labels, int(queue.paused))
        workers.add_metric(labels, queue.workers)
        slots.add_metric(labels, queue.slots)
    yield from (jobs, oldest, paused, workers, slots)


def _slot_metrics(workers: Sequence[WorkerCounts]) -> Iterator[Metric]:
    slots = _gauge("worker_slots", "Slots of this worker.")
    busy = _gauge("worker_slots_busy", "Slots of this worker that run a job.")
    for worker in workers:
        slots.add_metric((worker.queue,), worker.slots)
        busy.add_metric((worker.queue,), worker.busy)
    yield from (slots, busy)


def _incident_metrics(workers: Sequence[WorkerCounts]) -> Iterator[Metric]:
    incidents = {
        name: CounterMetricFamily(f"asyncmq_{word}", text, labels=("queue",))
        for name, (word, text) in INCIDENT_NAMES.items()
    }
    for worker in workers:
        for name, metric in incidents.items():
            metric.add_metric((worker.queue,), worker.incidents.get(name, 0))
    yield from incidents.values()


def _job_metrics(workers: Sequence[WorkerCounts]) -> Iterator[Metric]:
    labels = ("queue", "task")
    ends = {
        end: CounterMetricFamily(f"asyncmq_jobs_{end}", f"Attempts that were {end}.", labels=labels)
        for end in ENDS
    }
    wait = HistogramMetricFamily(
        "asyncmq_job_wait_seconds", "From when a job could run until it started.", labels=labels
    )
    run = HistogramMetricFamily(
        "asyncmq_job_run_seconds", "How long an attempt ran.", labels=labels
    )
    for worker in workers:
        for task, metrics in worker.tasks.items():
            key = (worker.queue, task)
            for end, metric in ends.items():
                metric.add_metric(key, getattr(metrics, end))
            wait.add_metric(key, *_buckets(metrics.wait))
            run.add_metric(key, *_buckets(metrics.run))
    yield from (*ends.values(), wait, run)


def _buckets(histogram: Histogram) -> tuple[list[tuple[str, float]], float]:
    """Return the counts up to each bound, and the sum, as Prometheus wants them."""
    counts = zip(BUCKET_BOUNDS, histogram.count_below(BUCKET_BOUNDS), strict=True)
    found: list[tuple[str, float]] = [(str(bound), count) for bound, count in counts]
    return [*found, ("+Inf", histogram.count)], histogram.total
