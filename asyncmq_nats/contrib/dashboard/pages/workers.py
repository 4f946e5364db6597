"""The running workers."""

from dataclasses import dataclass
from typing import Final
from urllib.parse import unquote

from starlette.requests import Request
from starlette.responses import Response

from asyncmq_nats.contrib.dashboard.pages.summaries import all_workers, version_of
from asyncmq_nats.contrib.dashboard.site import site_of
from asyncmq_nats.exceptions import InvalidArgument
from asyncmq_nats.workers import WorkerInfo, list_workers, stop_worker

__all__ = ["Row", "show", "stop"]

HEALTHY_BEATS: Final = 1.5
"""Heartbeats that may be missing in a healthy worker; after three its entry is gone."""
MAX_SHOWN_JOBS: Final = 20


@dataclass(frozen=True, slots=True)
class Row:
    """A worker as it is shown."""

    worker: WorkerInfo
    health: str
    """`healthy`; `ageing`: a heartbeat is overdue; `stopping`: it finishes what runs."""

    @property
    def jobs(self) -> tuple[str, ...]:
        """Some of the jobs that it runs."""
        return self.worker.running[:MAX_SHOWN_JOBS]


def _health(worker: WorkerInfo, now: float, interval: float) -> str:
    if worker.stopping:
        return "stopping"
    return "healthy" if now - worker.heartbeat <= HEALTHY_BEATS * interval else "ageing"


async def stop(request: Request) -> Response:
    """Have a worker stop in order: what runs may finish."""
    site = site_of(request)
    worker = unquote(str(request.path_params["worker"]))
    queues = {each.queue for each in await list_workers(site.backend) if each.id == worker}
    shown = sorted(queues if site.queues is None else queues & site.queues)
    if shown and len(shown) < len(queues):
        raise InvalidArgument("it runs queues that are not shown here: stop it elsewhere", worker)
    if not shown or not await stop_worker(site.backend, worker):
        raise InvalidArgument("no such worker answers", worker)
    await site.record(request, "worker.stop", shown[0], worker)
    return await site.done(request, f"Worker {worker} stops when its jobs have ended.")


async def show(request: Request) -> Response:
    """Show all workers by queue."""
    site = site_of(request)
    workers = await all_workers(site)
    now, interval = site.backend.now(), site.backend.settings.heartbeat_interval
    rows = [
        Row(worker, _health(worker, now, interval))
        for worker in sorted(workers, key=lambda each: (each.queue, each.host, each.pid))
    ]
    context = {
        "section": "workers",
        "watch": ("workers", version_of(workers)),
        "rows": rows,
        "slots": sum(worker.concurrency for worker in workers),
        "busy": sum(worker.busy for worker in workers),
        "interval": interval,
        "now": now,
    }
    return site.page(request, "workers.html", context)
