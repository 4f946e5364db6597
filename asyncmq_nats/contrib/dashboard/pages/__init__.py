"""One module per page or group of pages: reads, forms and actions. `ROUTES` has all of them."""

from collections.abc import Awaitable, Callable
from functools import partial, wraps
from typing import Final

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from asyncmq_nats import deadline
from asyncmq_nats.contrib.dashboard.pages import (
    audit,
    events,
    failures,
    flow,
    health,
    history,
    job,
    jobs,
    login,
    overview,
    queues,
    schedules,
    server,
    workers,
)
from asyncmq_nats.contrib.dashboard.pages.jobs import ACTIONS

__all__ = ["ROUTES"]

READ_SECONDS: Final = 8.0
"""How long a page may wait for the server."""

Endpoint = Callable[[Request], Awaitable[Response]]
QUEUE: Final = "/queues/{queue}"
JOB: Final = f"{QUEUE}/jobs/{{job}}"
SCHEDULE: Final = f"{QUEUE}/schedules/{{name}}"


def _read(path: str, endpoint: Endpoint) -> Route:
    """Return the route of a page, which may not wait for long."""

    @wraps(endpoint)
    async def bounded(request: Request) -> Response:
        with deadline(READ_SECONDS):
            return await endpoint(request)

    return Route(path, bounded, methods=["GET"])


def _action(path: str, endpoint: Endpoint) -> Route:
    return Route(path, endpoint, methods=["POST"])


ROUTES: Final[list[BaseRoute]] = [
    _read("/", overview.show),
    _read("/find", overview.find),
    _read("/queues.json", queues.list_names),
    _read("/queues", queues.show_all),
    _read(QUEUE, queues.show),
    _action(f"{QUEUE}/pause", queues.pause),
    _action(f"{QUEUE}/resume", queues.resume),
    _action(f"{QUEUE}/drain", queues.drain),
    _action(f"{QUEUE}/clean", queues.clean),
    _action(f"{QUEUE}/obliterate", queues.obliterate),
    _read(f"{QUEUE}/add", jobs.show_form),
    _action(f"{QUEUE}/add", jobs.add),
    _read(f"{QUEUE}/jobs", jobs.show),
    _action(f"{QUEUE}/jobs", jobs.act),
    _read(JOB, job.show),
    *(_action(f"{JOB}/{action}", partial(job.act, action=action)) for action in ACTIONS),
    _action(f"{JOB}/reschedule", job.reschedule),
    _read(f"{JOB}/edit", job.show_edit),
    _action(f"{JOB}/edit", job.edit),
    _read("/failures", failures.show),
    _read(f"{QUEUE}/failures", failures.show_queue),
    _action(f"{QUEUE}/failures", failures.act),
    _read("/schedules", schedules.show_all),
    _read(f"{QUEUE}/schedules", schedules.show),
    _read(f"{QUEUE}/schedule", schedules.show_form),
    _action(f"{QUEUE}/schedule", schedules.save),
    _action(f"{SCHEDULE}/pause", schedules.pause),
    _action(f"{SCHEDULE}/resume", schedules.resume),
    _action(f"{SCHEDULE}/remove", schedules.remove),
    _action(f"{SCHEDULE}/run", schedules.run_now),
    _read("/workers", workers.show),
    _action("/workers/{worker}/stop", workers.stop),
    _read("/events", events.show),
    _read("/audit", audit.show),
    _read("/flows", flow.show_all),
    _read(f"{JOB}/flow", flow.show),
    _read("/server", server.show),
    _read("/metrics", history.show),
    _read("/metrics/history", history.all_charts),
    _read("/metrics/prometheus", history.prometheus),
    _read(f"{QUEUE}/history", history.queue_charts),
    Route("/live", events.watch, methods=["GET"]),
    Route("/events/live", events.stream, methods=["GET"]),
    Route("/health", health.health, methods=["GET"]),
    Route("/ready", health.ready, methods=["GET"]),
    Route("/login", login.show, methods=["GET"]),
    Route("/login", login.log_in, methods=["POST"]),
    Route("/logout", login.log_out, methods=["POST"]),
]
