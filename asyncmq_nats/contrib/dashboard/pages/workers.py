"""The running workers."""

from dataclasses import dataclass
from typing import Final

from starlette.requests import Request
from starlette.responses import Response

from asyncmq_nats.contrib.dashboard.pages.summaries import all_workers, version_of
from asyncmq_nats.contrib.dashboard.site import site_of
from asyncmq_nats.workers import WorkerInfo

__all__ = ["Row", "show"]

HEALTHY_BEATS: Final = 1.5
"""Heartbeats that may be missing in a healthy worker; after three its entry is gone."""
MAX_SHOWN_JOBS: Final = 20


@dataclass(frozen=True, slots=True)
class Row:
    """A worker as it is shown. `age`: seconds since its last heartbeat."""

    worker: WorkerInfo
    age: float
    health: str
    """`healthy`, or `ageing`: a heartbeat is overdue."""

    @property
    def jobs(self) -> tuple[str, ...]:
        """Some of the jobs that it runs."""
        return self.worker.running[:MAX_SHOWN_JOBS]


async def show(request: Request) -> Response:
    """Show all workers by queue."""
    site = site_of(request)
    workers = await all_workers(site)
    now, interval = site.backend.now(), site.backend.settings.heartbeat_interval
    rows = [
        Row(
            worker,
            max(0.0, now - worker.heartbeat),
            "healthy" if now - worker.heartbeat <= HEALTHY_BEATS * interval else "ageing",
        )
        for worker in sorted(workers, key=lambda each: (each.queue, each.host, each.pid))
    ]
    context = {
        "section": "workers",
        "watch": ("workers", version_of(workers)),
        "rows": rows,
        "slots": sum(worker.concurrency for worker in workers),
        "busy": sum(len(worker.running) for worker in workers),
        "interval": interval,
        "now": now,
    }
    return site.page(request, "workers.html", context)
