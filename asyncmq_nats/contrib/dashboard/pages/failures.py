"""Failed jobs by task and error.

They are read page by page, the newest first: some at first, and further back if asked for.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import inf
from time import monotonic
from typing import Final

from starlette.requests import Request
from starlette.responses import Response

from asyncmq_nats.contrib.dashboard.failures import FailureGroups
from asyncmq_nats.contrib.dashboard.pages.jobs import ACTIONS, MAX_SELECTED, act_in_background
from asyncmq_nats.contrib.dashboard.pages.summaries import for_all, summaries, summarize, version_of
from asyncmq_nats.contrib.dashboard.site import Site, site_of, text_of
from asyncmq_nats.exceptions import InvalidArgument
from asyncmq_nats.queues import Queue
from asyncmq_nats.states import State

__all__ = ["act", "show", "show_queue"]

STEPS: Final = (1_000, 10_000, 100_000)
"""How many failed jobs of a queue are read: at first, and when a user asks for more."""
LEAST: Final = 100
"""Failed jobs of each queue that the page of all queues looks at, however many queues there are."""
LOOK_SECONDS: Final = 5.0
"""How long a page may look."""
SHOWN_GROUPS: Final = 200
PAGE: Final = 250
WANTED: Final = ("id", "task", "last_error", "finished_at", "created_at")


@dataclass(slots=True)
class Look:
    """The failed jobs that were read. `cursors`: where to go on, of each queue that has more."""

    groups: FailureGroups = field(default_factory=FailureGroups)
    cursors: dict[str, str] = field(default_factory=dict)
    looked_at: dict[str, int] = field(default_factory=dict)
    in_time: bool = True
    ids: list[str] = field(default_factory=list)
    """Ids of the jobs of the group that was asked for."""


async def look_at(
    site: Site,
    names: Iterable[str],
    most: int,
    after: str | None = None,
    *,
    seconds: float = LOOK_SECONDS,
    group: str | None = None,
) -> Look:
    """Look at failed jobs of each queue, the newest first, page by page.

    Args:
        site: the dashboard.
        names: of the queues.
        most: how many jobs of each queue at most.
        after: the cursor to go on from, if it is one queue.
        seconds: after this time it ends, with the jobs that it has seen.
        group: id of a group; the ids of all its jobs are returned.
    """
    look, end = Look(), monotonic() + seconds

    async def read(name: str) -> None:
        queue, cursor, left = Queue(name, site.backend), after, most
        while left > 0:  # one page of each queue, however late it is
            page = await queue.list_page(State.FAILED, cursor, limit=min(PAGE, left))
            for job in page.jobs:
                shown = site.redactor.job(name, {each: job.get(each) for each in WANTED})
                if look.groups.add(name, shown).id == group:
                    look.ids.append(str(job["id"]))
            left -= len(page.jobs)
            cursor = page.cursor
            if cursor is None:
                break
            if monotonic() >= end:
                look.in_time = False
                break
        look.looked_at[name] = most - left
        if cursor is not None:
            look.cursors[name] = cursor

    await for_all(names, read)
    return look


def _most(text: str) -> int:
    """Return the step that was asked for."""
    return next((step for step in STEPS if str(step) == text), STEPS[0])


async def show(request: Request) -> Response:
    """Show the failures of all queues."""
    site = site_of(request)
    found = await summaries(site)
    failed = {each.name: each.counts.get(State.FAILED, 0) for each in found}
    return await _show(request, site, {name: n for name, n in failed.items() if n}, None)


async def show_queue(request: Request) -> Response:
    """Show the failures of one queue."""
    site = site_of(request)
    queue = await site.queue(request)
    counts = await site.counts(queue)
    return await _show(request, site, {queue.name: counts.get(State.FAILED, 0)}, queue.name)


async def _show(
    request: Request, site: Site, failed: Mapping[str, int], chosen: str | None
) -> Response:
    query = request.query_params
    most = _most(query.get("most", ""))
    after = (query.get("after") or None) if chosen else None
    share = most if chosen else min(most, max(LEAST, 2 * most // max(1, len(failed))))

    async def read() -> Look:
        look = await look_at(site, failed, share, after)
        if after is None:  # a page that is just full has a cursor, though no job is older
            more = {name for name, count in failed.items() if look.looked_at[name] < count}
            look.cursors = {name: look.cursors[name] for name in look.cursors if name in more}
        return look

    # Read again when a job failed, or was retried, since: the counts are part of the key.
    key = ("failures", chosen, share, after, tuple(failed.items()))
    look = await site.reads.get(key, read)
    groups = look.groups.largest_first()
    # A long look is not repeated: the page is brought up to date after an action only.
    is_live = most == STEPS[0] and after is None
    watched = await (summarize(site, Queue(chosen, site.backend)) if chosen else summaries(site))
    topic = f"queue:{chosen}" if chosen else "queues"
    context = {
        "section": "queues" if chosen else "failures",
        "watch": (topic, version_of(watched)) if is_live else None,
        "chosen": chosen,
        "groups": groups[:SHOWN_GROUPS],
        "kinds": len(groups),
        "look": look,
        "failed": failed,
        "total": sum(failed.values()),
        "most": most,
        "share": share,
        "after": after,
        "wider": next((step for step in STEPS if step > most), None) if look.in_time else None,
    }
    return site.page(request, "failures.html", context)


async def act(request: Request) -> Response:
    """Do something to all jobs of a group that the page looked at."""
    site = site_of(request)
    queue = await site.queue(request)
    form = await request.form()
    action, group = text_of(form, "action"), text_of(form, "group")
    if action not in ("retry", "remove"):
        raise InvalidArgument("failed jobs can be retried or removed", action)
    most, after = text_of(form, "most"), text_of(form, "after") or None
    limit = int(most) if most.isdecimal() and len(most) < 7 else STEPS[0]
    look = await look_at(site, [queue.name], limit, after, seconds=inf, group=group)
    if not look.ids:
        raise InvalidArgument("no job of this group is failed any more", group)
    told = next(f"{g.task}: {g.signature}" for g in look.groups.largest_first() if g.id == group)
    if len(look.ids) > MAX_SELECTED:
        return await act_in_background(request, queue, action, look.ids, told)
    count = (await queue.apply(look.ids, action)).done
    await site.record(request, f"job.{action}", queue.name, told, count)
    return await site.done(request, f"{count:,} jobs were {ACTIONS[action][0]}.")
