"""A job with those that it depends on and those that depend on it, as a picture."""

from typing import Any, Final

from starlette.requests import Request
from starlette.responses import Response

from asyncmq_nats.contrib.dashboard.graph import draw
from asyncmq_nats.contrib.dashboard.pages.job import job_id_of
from asyncmq_nats.contrib.dashboard.pages.summaries import for_all, summaries, summarize, version_of
from asyncmq_nats.contrib.dashboard.site import Site, site_of
from asyncmq_nats.exceptions import JobNotFound
from asyncmq_nats.queues import Queue
from asyncmq_nats.states import State

__all__ = ["read_graph", "show", "show_all"]

MOST_JOBS: Final = 150
"""Jobs in one picture."""
LISTED_PER_QUEUE: Final = 20
"""Jobs of each queue that wait for others, on the page of all flows."""

Graph = dict[str, dict[str, Any] | None]


async def show(request: Request) -> Response:
    """Show the flow of a job."""
    site = site_of(request)
    queue = await site.queue(request)
    job_id = job_id_of(request)
    found = await site.reads.get(
        ("flow", queue.name, job_id), lambda: read_graph(queue, job_id, MOST_JOBS)
    )
    if found is None:
        raise JobNotFound(queue.name, job_id)
    jobs, complete = found
    parents = {each: _parents(job) for each, job in jobs.items()}
    context = {
        "section": "flows",
        "watch": (f"queue:{queue.name}", version_of(await summarize(site, queue))),
        "queue_name": queue.name,
        "job_id": job_id,
        "jobs": jobs,
        "drawing": draw(parents),
        "complete": complete,
    }
    return site.page(request, "flow.html", context)


def _parents(job: dict[str, Any] | None) -> list[str]:
    return [] if job is None else [str(each) for each in job.get("depends_on") or []]


async def read_graph(queue: Queue, job_id: str, most: int) -> tuple[Graph, bool] | None:
    """Return a job with its parents and children, near and far, and whether these are all.

    `None`: there is no such job. A child whose parents have all ended may be unknown to them.
    """
    jobs: Graph = {}
    ahead, looked, complete = [job_id], set[str](), True
    while ahead and len(jobs) < most:
        room = most - len(jobs)
        batch, later = ahead[:room], ahead[room:]
        looked.update(batch)
        flows = await for_all(batch, lambda each: queue.get_flow(each, limit=most))
        if job_id not in jobs and flows[job_id] is None:
            return None
        children: list[str] = []
        for flow in flows.values():
            if flow is not None:
                jobs |= {each: job for each, job in flow.jobs.items() if each not in jobs}
                children += flow.awaited_by
                complete = complete and flow.complete
        # A parent may have other children, too: they are part of the flow.
        found = dict.fromkeys([*later, *children, *jobs])
        ahead = [each for each in found if each not in looked]
    complete = complete and not ahead and len(jobs) <= most
    return dict(list(jobs.items())[:most]), complete


async def show_all(request: Request) -> Response:
    """Show the jobs that wait for others, of all queues."""
    site = site_of(request)
    context = {
        "section": "flows",
        "watch": ("queues", version_of(await summaries(site))),
        "rows": await _waiting(site),
    }
    return site.page(request, "flows.html", context)


async def _waiting(site: Site) -> list[tuple[str, dict[str, Any]]]:
    async def read(name: str) -> list[dict[str, Any]]:
        page = await Queue(name, site.backend).list_page(
            State.WAITING_CHILDREN, limit=LISTED_PER_QUEUE
        )
        return page.jobs

    async def read_all() -> list[tuple[str, dict[str, Any]]]:
        names = await site.list_queues()
        found = await for_all(names, read)
        return [(name, job) for name in names for job in found[name]]

    return await site.reads.get("flows", read_all)
