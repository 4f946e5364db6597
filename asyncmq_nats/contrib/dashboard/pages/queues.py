"""All queues, one queue, and what is done to a queue as a whole."""

from typing import Any, Final

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from asyncmq_nats.contrib.dashboard.pages.summaries import summaries, summarize, version_of
from asyncmq_nats.contrib.dashboard.site import link, site_of, text_of
from asyncmq_nats.exceptions import InvalidArgument
from asyncmq_nats.schedules import parse_every
from asyncmq_nats.states import State

__all__ = ["clean", "drain", "list_names", "obliterate", "pause", "resume", "show", "show_all"]

SORTS: Final = ("name", "waiting", "failed")
SHOWN_SCHEDULES: Final = 5
"""Schedules that the page of a queue shows."""


async def list_names(request: Request) -> Response:
    """Return the names of all queues, for completion."""
    return JSONResponse(await site_of(request).list_queues())


async def show_all(request: Request) -> Response:
    """Show a row for each queue."""
    site = site_of(request)
    found = await summaries(site)
    text = request.query_params.get("text", "").strip().lower()
    sort = request.query_params.get("sort", "name")
    shown = [each for each in found if text in each.name.lower()]
    if sort in ("waiting", "failed"):
        shown.sort(key=lambda each: (-each.counts.get(sort, 0), each.name))
    context = {
        "section": "queues",
        "watch": ("queues", version_of(found)),
        "queues": shown,
        "count": len(found),
        "text": text,
        "sort": sort if sort in SORTS else "name",
        "sorts": SORTS,
    }
    return site.page(request, "queues.html", context)


async def show(request: Request) -> Response:
    """Show one queue."""
    site = site_of(request)
    queue = await site.queue(request)
    summary = await summarize(site, queue)
    schedules = await site.share("schedules", queue, queue.list_repeatables)
    info = await site.share("info", queue, queue.info)
    coming = sorted((each for each in schedules if each.next_run), key=lambda s: s.next_run or 0)
    context: dict[str, Any] = {
        "section": "queues",
        "watch": (f"queue:{queue.name}", version_of(summary)),
        "queue": summary,
        "info": info,
        "limits": await site.share("limits", queue, queue.list_rate_limits),
        "configuration": await site.share("configuration", queue, queue.get_configuration),
        "charts": link(request, "queues", queue.name, "history"),
        "schedules": coming[:SHOWN_SCHEDULES],
        "schedule_count": len(schedules),
    }
    return site.page(request, "queue.html", context)


async def pause(request: Request) -> Response:
    """Pause the queue, for good or for some time."""
    site = site_of(request)
    queue = await site.queue(request)
    text = text_of(await request.form(), "for")
    until = site.backend.now_at_most() + parse_every(text) if text else None
    await queue.pause(until)
    await site.record(request, "queue.pause", queue.name, until=until)
    return await site.done(
        request, f"Queue {queue.name} is paused" + (f" for {text}." if text else ".")
    )


async def resume(request: Request) -> Response:
    """Let the queue go on."""
    site = site_of(request)
    queue = await site.queue(request)
    await queue.resume()
    await site.record(request, "queue.resume", queue.name)
    return await site.done(request, f"Queue {queue.name} goes on.")


async def drain(request: Request) -> Response:
    """Remove the jobs that wait, and if wished those that are delayed."""
    site = site_of(request)
    queue = await site.queue(request)
    with_delayed = text_of(await request.form(), "delayed") == "yes"
    removed = await queue.drain(with_delayed)
    await site.record(
        request, "queue.drain", queue.name, count=len(removed), include_delayed=with_delayed
    )
    return await site.done(request, f"{len(removed):,} jobs were removed.")


async def clean(request: Request) -> Response:
    """Remove jobs that have been in one state for some time."""
    site = site_of(request)
    queue = await site.queue(request)
    form = await request.form()
    state, age = text_of(form, "state"), text_of(form, "age") or "0"
    if state not in set(State):
        raise InvalidArgument(f"state must be one of {', '.join(State)}", state)
    grace = 0.0 if age == "0" else parse_every(age)
    removed = await queue.clean_jobs(grace, 0, state)
    await site.record(
        request, "queue.clean", queue.name, count=len(removed), state=state, older_than=grace
    )
    return await site.done(request, f"{len(removed):,} {state} jobs were removed.")


async def obliterate(request: Request) -> Response:
    """Remove everything of the queue."""
    site = site_of(request)
    queue = await site.queue(request)
    form = await request.form()
    if text_of(form, "name") != queue.name:
        raise InvalidArgument("write the queue's name to confirm", text_of(form, "name"))
    try:
        removed = await queue.obliterate(force=text_of(form, "force") == "yes")
    except RuntimeError as error:
        raise InvalidArgument(str(error).partition(":")[0], "forced") from None
    await site.record(request, "queue.obliterate", queue.name, count=len(removed))
    said = f"Everything of {queue.name} was removed: {len(removed):,} jobs."
    return await site.done(request, said, to=link(request, "queues", queue.name))
