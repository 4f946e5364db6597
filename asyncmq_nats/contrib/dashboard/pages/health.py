"""`/health` and `/ready`, for probes. They need no login, so they tell no names."""

from time import perf_counter

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from asyncmq_nats import deadline
from asyncmq_nats.contrib.dashboard.site import Site, site_of
from asyncmq_nats.exceptions import AsyncMQError

__all__ = ["health", "ready"]

PROBE_SECONDS = 3.0


async def health(request: Request) -> Response:
    """Tell whether the server answers: 200, or 503."""
    return await _probe(site_of(request))


async def ready(request: Request) -> Response:
    """Tell the same as `health`, and whether queues can be read."""
    return await _probe(site_of(request), reads=True)


async def _probe(site: Site, *, reads: bool = False) -> Response:
    start = perf_counter()
    try:
        with deadline(PROBE_SECONDS):
            await site.backend.connect()
            await site.backend.ping()
            if reads:
                await site.list_queues()
    except AsyncMQError as error:
        return JSONResponse({"status": "unavailable", "problem": type(error).__name__}, 503)
    answered = round(perf_counter() - start, 4)
    return JSONResponse({"status": "ok", "answered_after": answered})
