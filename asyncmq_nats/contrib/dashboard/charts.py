"""The history of queues as lines of charts. Pure."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from asyncmq_nats.metrics import MetricsHistory, MetricsPoint, TaskMetrics

__all__ = ["SPANS", "Totals", "charts_of", "merge_histories", "totals_of"]

SPANS: Final = {"1h": 3600.0, "6h": 6 * 3600.0, "24h": 86_400.0, "7d": 7 * 86_400.0}
"""How far back the charts go, in seconds."""
MOST_TASKS: Final = 12
RECORD_LAG: Final = 10.0
"""Seconds after which workers have recorded what they did."""


@dataclass(frozen=True, slots=True)
class Totals:
    """The totals of a period. Durations are in seconds; `None` if nothing ran."""

    completed: int
    failed: int
    retried: int
    per_minute: float
    wait_median: float | None
    wait_p95: float | None
    run_median: float | None
    run_p95: float | None


def totals_of(metrics: TaskMetrics, seconds: float) -> Totals:
    """Return the totals of a period of this many seconds."""
    return Totals(
        metrics.completed,
        metrics.failed,
        metrics.retried,
        metrics.ended / seconds * 60 if seconds > 0 else 0.0,
        metrics.wait.percentile(0.5),
        metrics.wait.percentile(0.95),
        metrics.run.percentile(0.5),
        metrics.run.percentile(0.95),
    )


def merge_histories(histories: Iterable[MetricsHistory]) -> MetricsHistory | None:
    """Return the joint history of several queues; `None` if there is none."""
    merged: MetricsHistory | None = None
    for history in histories:
        if merged is None:
            points = [MetricsPoint(p.start, p.step, p.seconds) for p in history.points]
            merged = MetricsHistory(None, history.since, history.until, history.step, points)
        for into, point in zip(merged.points, history.points, strict=False):
            into.slots += point.slots
            into.busy += point.busy
            into.workers += point.workers
            for task, metrics in point.tasks.items():
                into.tasks.setdefault(task, TaskMetrics()).merge(metrics)
    return merged


def _told(points: list[MetricsPoint]) -> list[MetricsPoint]:
    """Return the points without the last ones if workers have not recorded enough of them yet.

    Otherwise a line would seem to fall at its end. If the other points have no data, return all.
    """
    if not points:
        return points
    now = points[-1].start + points[-1].seconds
    told = [
        point
        for point in points
        if point.start + point.step + RECORD_LAG <= now or point.seconds >= 6 * RECORD_LAG
    ]
    return told if any(point.slots or point.total.ended for point in told) else points


def charts_of(history: MetricsHistory) -> dict[str, Any]:
    """Return the charts as the browser draws them: the times, and a line for each name."""
    points = _told([point for point in history.points if point.seconds > 0])
    totals = [point.total for point in points]

    def rate(count: Callable[[TaskMetrics], int]) -> list[float]:
        pairs = zip(points, totals, strict=True)
        return [round(point.rate(count(total)) * 60, 3) for point, total in pairs]

    def share(value: Callable[[TaskMetrics], float | None]) -> list[float | None]:
        found = [value(total) for total in totals]
        return [None if each is None else round(each, 6) for each in found]

    def line(label: str, colour: str, values: list[Any], *, fill: bool = False) -> dict[str, Any]:
        return {"label": label, "colour": colour, "values": values, "fill": fill}

    throughput = [
        line("completed", "completed", rate(lambda t: t.completed), fill=True),
        line("failed", "failed", rate(lambda t: t.failed)),
        line("retried", "expired", rate(lambda t: t.retried)),
    ]
    wait = [
        line("median", "waiting", share(lambda t: t.wait.percentile(0.5))),
        line("95 %", "delayed", share(lambda t: t.wait.percentile(0.95))),
    ]
    run = [
        line("median", "active", share(lambda t: t.run.percentile(0.5))),
        line("95 %", "delayed", share(lambda t: t.run.percentile(0.95))),
    ]
    slots = [
        line("busy", "active", [round(p.busy, 3) for p in points], fill=True),
        line("all", "waiting", [round(p.slots, 3) for p in points]),
    ]
    at = [point.start for point in points]
    series: Mapping[str, tuple[str, list[dict[str, Any]]]] = {
        "throughput": ("", throughput),
        "wait": ("s", wait),
        "run": ("s", run),
        "slots": ("", slots),
    }
    return {
        name: {"at": at, "unit": unit, "series": lines} for name, (unit, lines) in series.items()
    }
