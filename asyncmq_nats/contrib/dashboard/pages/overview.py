"""The first page: all queues at a glance, and the way to a queue or a job."""

from typing import Any, Final

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from asyncmq_nats.contrib.dashboard.pages.summaries import (
    QueueSummary,
    all_workers,
    for_all,
    summaries,
    version_of,
)
from asyncmq_nats.contrib.dashboard.site import Site, job_link, link, site_of
from asyncmq_nats.exceptions import InvalidJobId
from asyncmq_nats.queues import Queue
from asyncmq_nats.states import JOB_STATES, State

__all__ = ["find", "show"]

SHOWN_QUEUES: Final = 12
"""Queues on the first page: those with most to do."""
LATEST_JOBS: Final = 8
"""Latest jobs on the first page."""
LATEST_QUEUES: Final = 6
"""Queues of which the latest jobs are read."""
FIND_QUEUES: Final = 100
"""Queues in which a job is looked for."""


async def show(request: Request) -> Response:
    """Show totals, the queues with most to do, and the latest jobs that ended."""
    site = site_of(request)
    found = await summaries(site)
    totals = {state: sum(each.counts.get(state, 0) for each in found) for state in JOB_STATES}
    workers = await all_workers(site)
    busiest = sorted(found, key=lambda each: (-each.to_do, each.name))
    context = {
        "section": "",
        "watch": ("queues", version_of(found)),
        "queues": busiest[:SHOWN_QUEUES],
        "count": len(found),
        "totals": totals,
        "workers": workers,
        "slots": sum(worker.concurrency for worker in workers),
        "busy": sum(worker.busy for worker in workers),
        "stuck": [each for each in found if each.is_stuck],
        "paused": [each for each in found if each.paused],
        "charts": link(request, "metrics", "history"),
        "latest": await _latest(site, found),
    }
    return site.page(request, "overview.html", context)


async def _latest(site: Site, found: list[QueueSummary]) -> list[dict[str, Any]]:
    """Return the latest jobs that ended, of the queues with most of them."""
    ended = (State.COMPLETED, State.FAILED)
    by_ends = sorted(found, key=lambda each: -sum(each.counts.get(s, 0) for s in ended))
    wanted = [
        (each.name, state)
        for each in by_ends[:LATEST_QUEUES]
        for state in ended
        if each.counts.get(state)
    ]

    async def read(pair: tuple[str, State]) -> list[dict[str, Any]]:
        queue, state = pair
        page = await Queue(queue, site.backend).list_page(state, limit=LATEST_JOBS)
        return [job | {"queue": queue} for job in page.jobs]

    async def read_all() -> list[dict[str, Any]]:
        pages = await for_all(wanted, read)
        jobs = [job for page in pages.values() for job in page]
        return sorted(jobs, key=lambda job: -(job.get("finished_at") or 0.0))[:LATEST_JOBS]

    # With what the page watches as a part of the key, a job that has just ended is seen.
    jobs = await site.reads.get(("latest", version_of(found)), read_all)
    return [site.redactor.job(job["queue"], job) for job in jobs]


async def find(request: Request) -> Response:
    """Go to the queue or the job of that name."""
    site = site_of(request)
    text = request.query_params.get("text", "").strip()
    names = await site.list_queues()
    if text in names:
        return RedirectResponse(link(request, "queues", text), 303)

    async def look(name: str) -> bool:
        try:
            return await Queue(name, site.backend).get_job_state(text) is not None
        except InvalidJobId:
            return False

    there = await for_all(names[:FIND_QUEUES], look) if text else {}
    hits = [name for name in names if there.get(name)]
    if len(hits) == 1:
        return RedirectResponse(job_link(request, hits[0], text), 303)
    near = [name for name in names if text and text.lower() in name.lower()]
    context = {"text": text, "hits": hits, "near": near, "all": len(names) <= FIND_QUEUES}
    return site.page(request, "find.html", context)
