"""Charts, figures by task, and the text format of Prometheus."""

from typing import Any, Final

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from asyncmq_nats.contrib.dashboard.charts import (
    MOST_TASKS,
    SPANS,
    charts_of,
    merge_histories,
    totals_of,
)
from asyncmq_nats.contrib.dashboard.site import Site, site_of
from asyncmq_nats.metrics import MetricsHistory, read_all_metrics, read_metrics
from asyncmq_nats.queues import Queue

__all__ = ["all_charts", "prometheus", "queue_charts", "read_history", "show"]

FRESH_SECONDS: Final = 5.0


async def read_history(site: Site, queue: str | None, span: str) -> MetricsHistory | None:
    """Return what workers did, in one queue or in all that are shown.

    `None` if there is nothing.
    """
    seconds = SPANS.get(span, SPANS["1h"])

    async def read() -> MetricsHistory | None:
        await site.backend.connect()
        since = site.backend.now() - seconds
        if queue is not None:
            return await read_metrics(site.backend, queue, since=since)
        found = await read_all_metrics(site.backend, since=since)
        shown = [each for name, each in found.items() if site.queues is None or name in site.queues]
        return merge_histories(shown)

    return await site.reads.get(("history", queue, seconds), read, fresh_for=FRESH_SECONDS)


async def all_charts(request: Request) -> Response:
    """Return the charts of all queues together, as JSON."""
    return await _charts(request, None)


async def queue_charts(request: Request) -> Response:
    """Return the charts of one queue, as JSON."""
    return await _charts(request, (await site_of(request).queue(request)).name)


async def _charts(request: Request, queue: str | None) -> Response:
    span = request.query_params.get("span", "1h")
    history = await read_history(site_of(request), queue, span)
    return JSONResponse({} if history is None else charts_of(history))


async def show(request: Request) -> Response:
    """Show the charts of all queues or of one, and what became of the jobs of each task."""
    site = site_of(request)
    names = await site.list_queues()
    chosen, span = request.query_params.get("queue", ""), request.query_params.get("span", "1h")
    if chosen:
        await site.find_queue(chosen)
    history = await read_history(site, chosen or None, span)
    seconds = SPANS.get(span, SPANS["1h"])
    rows: list[tuple[str, Any]] = []
    if history is not None:
        tasks = sorted(history.tasks.items(), key=lambda pair: -pair[1].ended)[:MOST_TASKS]
        rows = [(task, totals_of(metrics, seconds)) for task, metrics in tasks]
    context = {
        "section": "metrics",
        "queues": names,
        "chosen": chosen,
        "span": span if span in SPANS else "1h",
        "spans": list(SPANS),
        "rows": rows,
        "totals": None if history is None else totals_of(history.total, seconds),
        "incidents": {} if history is None else history.incidents,
    }
    return site.page(request, "metrics.html", context)


async def prometheus(request: Request) -> Response:
    """Return all queues in the text format of Prometheus; needs the extra `prometheus`.

    `?only=queues` leaves out the counters of jobs: Prometheus may read these from the workers.
    """
    try:
        from asyncmq_nats.telemetry.prometheus import CONTENT_TYPE, HistoryCounts, render_queues
    except ImportError:
        text = "pip install 'asyncmq-nats[prometheus]' for the text format of Prometheus"
        raise HTTPException(404, text) from None
    site = site_of(request)
    names, with_jobs = await site.list_queues(), request.query_params.get("only") != "queues"
    counts = site.history_counts = site.history_counts or HistoryCounts(site.backend)

    async def read() -> bytes:
        queues = [Queue(name, site.backend) for name in names]
        return await render_queues(queues, counts if with_jobs else None)

    body = await site.reads.get(("prometheus", tuple(names), with_jobs), read)
    return Response(body, headers={"Content-Type": CONTENT_TYPE})
