"""The server: whether it answers, what the doctor finds, and what each queue takes of it."""

from time import perf_counter, time
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import Response

import asyncmq_nats
from asyncmq_nats.contrib.dashboard.pages.summaries import for_all
from asyncmq_nats.contrib.dashboard.site import Site, site_of
from asyncmq_nats.doctor import Finding, Level, examine
from asyncmq_nats.queues import Queue

__all__ = ["show"]

FINDINGS_SECONDS: Final = 30.0
"""How long what the doctor found is shown again."""
EXAMINED_QUEUES: Final = 50
"""Queues that the doctor looks at."""
WORST_FIRST: Final = (Level.ERROR, Level.WARNING, Level.INFO, Level.OK)


async def show(request: Request) -> Response:
    """Show how fast the server answers, what is wrong with it, and the streams of each queue."""
    site = site_of(request)
    start = perf_counter()
    await site.backend.connect()
    await site.backend.ping()
    answered = perf_counter() - start
    names = await site.list_queues()
    found = await site.reads.get("infos", lambda: for_all(names, lambda name: _info(site, name)))
    findings = await site.reads.get(
        "findings", lambda: _examine(site, names[:EXAMINED_QUEUES]), fresh_for=FINDINGS_SECONDS
    )
    told = [each for each in findings if each.level is not Level.OK]
    context = {
        "section": "server",
        "answered": answered,
        "prefix": site.backend.settings.prefix,
        "version": asyncmq_nats.__version__,
        "clock": site.backend.now() - time(),
        "max_body": site.backend.max_body,
        "is_full": site.backend.is_full,
        "infos": [found[name] for name in names if found.get(name) is not None],
        "findings": sorted(told, key=lambda each: WORST_FIRST.index(each.level)),
        "sound": len(findings) - len(told),
    }
    return site.page(request, "server.html", context)


async def _info(site: Site, name: str) -> Any:
    return await Queue(name, site.backend).info()


async def _examine(site: Site, names: list[str]) -> list[Finding]:
    return [each async for each in examine(site.backend, queues=names, role="reader")]
