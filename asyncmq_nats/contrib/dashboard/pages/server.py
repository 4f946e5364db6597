"""The server: whether it answers, and what each queue takes of it."""

from time import perf_counter, time
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

import asyncmq_nats
from asyncmq_nats.backends.base import Difference
from asyncmq_nats.contrib.dashboard.pages.summaries import for_all
from asyncmq_nats.contrib.dashboard.site import Site, site_of
from asyncmq_nats.queues import Queue

__all__ = ["show"]


async def show(request: Request) -> Response:
    """Show how fast the server answers, and the streams of each queue."""
    site = site_of(request)
    start = perf_counter()
    await site.backend.connect()
    await site.backend.ping()
    answered = perf_counter() - start
    names = await site.list_queues()
    found = await site.reads.get("infos", lambda: for_all(names, lambda name: _info(site, name)))
    context = {
        "section": "server",
        "answered": answered,
        "prefix": site.backend.settings.prefix,
        "version": asyncmq_nats.__version__,
        "clock": site.backend.now() - time(),
        "max_body": site.backend.max_body,
        "is_full": site.backend.is_full,
        "infos": [found[name][0] for name in names if name in found and found[name][0] is not None],
        "drift": [(name, each) for name in names if name in found for each in found[name][1]],
    }
    return site.page(request, "server.html", context)


async def _info(site: Site, name: str) -> tuple[Any, list[Difference]]:
    """Return what a queue takes, and what of it is not as the settings say."""
    queue = Queue(name, site.backend)
    return await queue.info(), await queue.find_drift()
