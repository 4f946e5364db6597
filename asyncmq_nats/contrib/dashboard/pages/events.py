"""What happens now: pages that are brought up to date, and the page of events."""

from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from functools import partial
from time import monotonic
from typing import Any, Final

import anyio
from anyio.abc import ObjectReceiveStream, ObjectSendStream
from sse_starlette import EventSourceResponse
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from asyncmq_nats import deadline
from asyncmq_nats._concurrency import open_task_group
from asyncmq_nats.contrib.dashboard.pages.summaries import (
    all_workers,
    for_all,
    summaries,
    summarize,
    version_of,
)
from asyncmq_nats.contrib.dashboard.site import Site, job_link, link, site_of
from asyncmq_nats.contrib.dashboard.words import ago
from asyncmq_nats.events import Event
from asyncmq_nats.exceptions import AsyncMQError
from asyncmq_nats.queues import Queue

__all__ = ["reader_of", "show", "stream", "watch"]

EVENTS: Final = (
    "waiting", "delayed", "waiting-children", "started", "progress", "retrying", "completed",
    "failed", "expired", "cancelled", "ready", "stalled", "duplicated", "debounced", "deduplicated",
)  # fmt: skip
FREQUENT_EVENTS: Final = ("progress", "waiting", "started")
"""Events that are not shown at first: there are many of them."""
STREAM_SECONDS: Final = 600.0
"""How long a stream lasts, in seconds: the browser asks for the next one with its login."""
BATCH_SECONDS: Final = 0.5
"""How often the events since then are sent, in seconds."""
MAX_BATCH: Final = 50
"""Events that are sent together at most; the number of the others is told."""
PAST_SHOWN: Final = 200
"""Events of the past on the page, at most."""
PAST_QUEUES: Final = 100
"""Queues of which events of the past are read; of more, only those of a chosen one."""
READ_SECONDS: Final = 8.0


# -- pages that are brought up to date


async def watch(request: Request) -> Response:
    """Tell a browser whenever what it shows has changed (server-sent events)."""
    site = site_of(request)
    read = await reader_of(site, request.query_params.get("topic", ""))
    seen = request.query_params.get("seen", "")
    return EventSourceResponse(_changes(site, read, seen), ping=15)


async def reader_of(site: Site, topic: str) -> Callable[[], Awaitable[Any]]:
    """Return what reads that of which a page shows the version.

    Raises:
        HTTPException: 404, there is nothing of this name, or it is not shown.
    """
    what, _, rest = topic.partition(":")
    if what == "queues":
        return lambda: summaries(site)
    if what == "workers":
        return lambda: all_workers(site)
    if what in ("queue", "job"):
        name, _, job_id = rest.partition(":")
        queue = await site.find_queue(name)
        if what == "queue":
            return lambda: summarize(site, queue)
        return lambda: site.reads.get(("job", name, job_id), lambda: queue.get_job(job_id))
    raise HTTPException(404, "There is nothing to watch under this topic.")


async def _changes(
    site: Site, read: Callable[[], Awaitable[Any]], seen: str
) -> AsyncIterator[dict[str, Any]]:
    end = monotonic() + STREAM_SECONDS
    while monotonic() < end:
        try:
            with deadline(READ_SECONDS):
                version = version_of(await read())
        except AsyncMQError:
            version = seen  # the server is away: the page stays as it is
        if version != seen:
            yield {"event": "changed", "data": version}
        seen = version
        await anyio.sleep(site.refresh)


# -- events


async def show(request: Request) -> Response:
    """Show the latest events and those that happen, of one queue or of all."""
    site = site_of(request)
    names = await site.list_queues()
    chosen = request.query_params.get("queue", "")
    if chosen:
        await site.find_queue(chosen)
    past = await site.reads.get(
        ("past events", chosen), lambda: _read_past(site, [chosen] if chosen else names)
    )
    context = {
        "past": None if past is None else [site.redactor.event(each) for each in past],
        "section": "events",
        "queues": names,
        "chosen": chosen,
        "events": EVENTS,
        "quiet": FREQUENT_EVENTS,
        "source": link(request, "events", "live", queue=chosen),
    }
    return site.page(request, "events.html", context)


async def stream(request: Request) -> Response:
    """Send the events of one queue, or of all, as rows of a table (server-sent events)."""
    site = site_of(request)
    chosen = request.query_params.get("queue", "")
    names = [chosen] if chosen else await site.list_queues()
    queues = [await site.find_queue(name) for name in names]
    send, receive = anyio.create_memory_object_stream[dict[str, Any]]()
    sender = partial(_send_rows, request, site, queues, send)
    return EventSourceResponse(_all_of(receive), data_sender_callable=sender, ping=15)


async def _read_past(site: Site, names: list[str]) -> list[Event] | None:
    """Return the latest events of these queues, the newest first; `None`: they are too many."""
    if len(names) > PAST_QUEUES:
        return None
    share = max(10, PAST_SHOWN // max(1, len(names)))
    found = await for_all(names, lambda name: Queue(name, site.backend).past_events(share))
    events = [event for each in found.values() for event in each]
    return sorted(events, key=lambda event: -(event.at or 0.0))[:PAST_SHOWN]


async def _all_of(rows: ObjectReceiveStream[dict[str, Any]]) -> AsyncIterator[dict[str, Any]]:
    """Yield all rows; the stream is closed when the browser has gone, too."""
    async with rows:
        async for row in rows:
            yield row


async def _send_rows(
    request: Request, site: Site, queues: list[Queue], rows: ObjectSendStream[dict[str, Any]]
) -> None:
    """Read events of the queues, and send them on a few times a second, the newest of them."""
    heard: deque[Event] = deque(maxlen=MAX_BATCH)
    count = 0

    async def listen(queue: Queue) -> None:
        nonlocal count
        async with aclosing(queue.events()) as events:
            async for event in events:
                heard.append(event)
                count += 1

    async with rows, open_task_group() as group:
        for queue in queues:
            group.start_soon(listen, queue)
        await anyio.sleep(BATCH_SECONDS)  # by now it listens
        # The events since the page was made, or since the browser's last stream.
        past = await _read_missed(site, [queue.name for queue in queues])
        known = {(event.name, event.queue, event.job_id) for event in heard}
        past = [e for e in past if (e.name, e.queue, e.job_id) not in known]
        await rows.send({"event": "past", "data": _render(request, site, past, 0)})
        for _ in range(int(STREAM_SECONDS / BATCH_SECONDS)):
            await anyio.sleep(BATCH_SECONDS)
            if heard:
                text = _render(request, site, list(heard)[::-1], count - len(heard))
                heard.clear()
                count = 0
                await rows.send({"event": "events", "data": text})
        group.cancel_scope.cancel()


async def _read_missed(site: Site, names: list[str]) -> list[Event]:
    try:
        with deadline(READ_SECONDS):
            return await _read_past(site, names) or []
    except AsyncMQError:  # the server is away: what happens from now on is shown
        return []


def _render(request: Request, site: Site, events: list[Event], left: int) -> str:
    """Return rows of the table. `events`: the newest first; `left`: how many are not among them."""
    text = site.templates.get_template("_events.html").render(
        events=[site.redactor.event(each) for each in events],
        left=left,
        now=site.backend.now(),
        ago=partial(ago, now=site.backend.now()),
        job_link=partial(job_link, request),
    )
    return " ".join(text.split("\n"))
