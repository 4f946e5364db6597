"""Failed jobs by task and error."""

from collections.abc import Mapping
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import Response

from asyncmq_nats.contrib.dashboard.failures import FailureGroup, group_failures
from asyncmq_nats.contrib.dashboard.pages.jobs import ACTIONS
from asyncmq_nats.contrib.dashboard.pages.summaries import for_all, summaries, summarize, version_of
from asyncmq_nats.contrib.dashboard.site import Site, site_of, text_of
from asyncmq_nats.exceptions import InvalidArgument
from asyncmq_nats.queues import Queue
from asyncmq_nats.states import State

__all__ = ["act", "show", "show_queue"]

READ_PER_QUEUE: Final = 1_000
"""The newest failed jobs of a queue that are grouped, at most."""
READ_OF_ALL: Final = 2_000
"""Those of all queues together."""
PAGE: Final = 250


async def show(request: Request) -> Response:
    """Show the failures of all queues."""
    site = site_of(request)
    found = await summaries(site)
    failed = {each.name: each.counts.get(State.FAILED, 0) for each in found}
    failed = {name: n for name, n in failed.items() if n}
    share = max(100, READ_OF_ALL // max(1, len(failed)))
    return await _show(request, site, failed, min(share, READ_PER_QUEUE), None)


async def show_queue(request: Request) -> Response:
    """Show the failures of one queue."""
    site = site_of(request)
    queue = await site.queue(request)
    counts = await site.counts(queue)
    failed = {queue.name: counts.get(State.FAILED, 0)}
    return await _show(request, site, failed, READ_PER_QUEUE, queue.name)


async def _show(
    request: Request, site: Site, failed: Mapping[str, int], most: int, chosen: str | None
) -> Response:
    async def read(name: str) -> list[tuple[str, dict[str, Any]]]:
        jobs = await read_failed(Queue(name, site.backend), most)
        return [(name, site.redactor.job(name, job)) for job in jobs]

    async def read_groups() -> tuple[list[FailureGroup], int]:
        by_queue = await for_all(failed, read)
        jobs = [job for each in by_queue.values() for job in each]
        return group_failures(jobs), len(jobs)

    # Read again when a job failed, or was retried, since: the counts are part of the key.
    key = ("failures", chosen, tuple(failed.items()))
    groups, looked_at = await site.reads.get(key, read_groups)
    watched = await (summarize(site, Queue(chosen, site.backend)) if chosen else summaries(site))
    topic = f"queue:{chosen}" if chosen else "queues"
    context = {
        "section": "queues" if chosen else "failures",
        "watch": (topic, version_of(watched)),
        "chosen": chosen,
        "groups": groups,
        "looked_at": looked_at,
        "total": sum(failed.values()),
    }
    return site.page(request, "failures.html", context)


async def read_failed(queue: Queue, most: int) -> list[dict[str, Any]]:
    """Return the newest failed jobs of a queue, without their arguments and results."""
    wanted = ("id", "task", "last_error", "finished_at", "created_at")
    jobs: list[dict[str, Any]] = []
    cursor: str | None = None
    while len(jobs) < most:
        page = await queue.list_page(State.FAILED, cursor, limit=min(PAGE, most - len(jobs)))
        jobs += [{name: job.get(name) for name in wanted} for job in page.jobs]
        cursor = page.cursor
        if cursor is None:
            break
    return jobs


async def act(request: Request) -> Response:
    """Do something to all jobs of a group that the page looked at."""
    site = site_of(request)
    queue = await site.queue(request)
    form = await request.form()
    action, group_id = text_of(form, "action"), text_of(form, "group")
    if action not in ("retry", "remove"):
        raise InvalidArgument("failed jobs can be retried or removed", action)
    jobs = await read_failed(queue, READ_PER_QUEUE)
    shown = [(queue.name, site.redactor.job(queue.name, job)) for job in jobs]
    group = next((each for each in group_failures(shown) if each.id == group_id), None)
    if group is None:
        raise InvalidArgument("no job of this group is failed any more", group_id)
    count = (await queue.apply(group.job_ids, action)).done
    target = f"{group.task}: {group.signature}"
    await site.record(request, f"job.{action}", queue.name, target, count)
    return await site.done(request, f"{count:,} jobs were {ACTIONS[action][0]}.")
