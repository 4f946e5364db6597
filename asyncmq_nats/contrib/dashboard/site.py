"""The parts that all pages share: backend, visibility, templates, links and answers."""

import json
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeVar
from urllib.parse import quote, urlencode

from jinja2 import Environment, PackageLoader
from starlette.datastructures import FormData
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response

from asyncmq_nats import default_backend
from asyncmq_nats.audit import AuditEntry, record_action
from asyncmq_nats.backends.base import Backend
from asyncmq_nats.contrib.dashboard import words
from asyncmq_nats.contrib.dashboard.access import Role, SessionLogin, User
from asyncmq_nats.contrib.dashboard.reading import SharedReads
from asyncmq_nats.contrib.dashboard.redaction import Redactor
from asyncmq_nats.exceptions import InvalidQueueName
from asyncmq_nats.queues import Queue, list_queues
from asyncmq_nats.states import JOB_STATES, OUTCOMES

if TYPE_CHECKING:
    from asyncmq_nats.telemetry.prometheus import HistoryCounts

__all__ = [
    "Operation",
    "Site",
    "is_part",
    "job_link",
    "link",
    "page_of_ours",
    "schedule_link",
    "site_of",
    "text_of",
    "who_of",
]

T = TypeVar("T")
TOLD_SECONDS: Final = 30.0
"""How long pages tell of an operation that has ended."""
PACKAGE: Final = "asyncmq_nats.contrib.dashboard"
NAVIGATION: Final = (
    ("Overview", "", "o"),
    ("Queues", "queues", "q"),
    ("Failures", "failures", "f"),
    ("Schedules", "schedules", "s"),
    ("Flows", "flows", "l"),
    ("Workers", "workers", "w"),
    ("Metrics", "metrics", "m"),
    ("Events", "events", "e"),
    ("Audit", "audit", "a"),
    ("Server", "server", "v"),
)
"""Pages of the menu: their name, their path, and the key that follows `g`."""


def _token(text: str) -> str:
    """Return an id as one segment of a path that no browser and no proxy changes.

    Encoded once here and once more in the path: then an id such as `../a` or `a/b` arrives.
    """
    token = quote(text, safe="")
    return token.replace(".", "%2E") if set(text) == {"."} else token


def link(request: Request, *segments: str, **query: Any) -> str:
    """Return the path of a page below the prefix at which the dashboard is mounted."""
    path = "/".join(quote(segment, safe="") for segment in segments)
    given = {name: value for name, value in query.items() if value not in (None, "")}
    return f"{request.scope.get('root_path', '')}/{path}" + (
        f"?{urlencode(given, doseq=True)}" if given else ""
    )


def job_link(request: Request, queue: str, job_id: str, *more: str) -> str:
    """Return the path of a job's page, or of an action on it."""
    return link(request, "queues", queue, "jobs", _token(job_id), *more)


def worker_link(request: Request, worker: str, action: str) -> str:
    """Return the path of an action on a worker."""
    return link(request, "workers", _token(worker), action)


def schedule_link(request: Request, queue: str, rid: str, action: str) -> str:
    """Return the path of an action on a schedule."""
    return link(request, "queues", queue, "schedules", _token(rid), action)


@dataclass(slots=True)
class Operation:
    """Something that is done to many jobs and takes its time. `count`: jobs so far."""

    who: str
    what: str
    queue: str
    count: int = 0
    ended: float | None = None
    """When it ended, in seconds of `time.monotonic`."""
    problem: str = ""

    def progress(self, count: int) -> None:
        """Note how many jobs it was done to so far."""
        self.count = count

    def end(self, problem: str = "") -> None:
        """Note that it has ended, and why before its time."""
        self.problem, self.ended = problem, time.monotonic()


@dataclass(slots=True)
class Site:
    """One dashboard. `queues`: the names of those it shows; `None`: all."""

    given_backend: Backend | None
    redactor: Redactor
    title: str = "asyncmq-nats"
    read_only: bool = False
    queues: frozenset[str] | None = None
    refresh: float = 2.0
    """How often a page that is open is brought up to date, in seconds."""
    operations: list[Operation] = field(default_factory=list)
    reads: SharedReads = field(default_factory=SharedReads)
    templates: Environment = field(default_factory=lambda: _make_templates())
    history_counts: "HistoryCounts | None" = None
    """What Prometheus has been shown so far."""

    @property
    def backend(self) -> Backend:
        """Where the queues are."""
        return default_backend() if self.given_backend is None else self.given_backend

    # -- queues

    async def list_queues(self) -> list[str]:
        """Return the names of the queues that are shown."""

        async def read() -> list[str]:
            names = await list_queues(self.backend)
            return [name for name in names if self.queues is None or name in self.queues]

        return await self.reads.get("queues", read)

    async def queue(self, request: Request) -> Queue:
        """Return the queue of a path.

        Raises:
            HTTPException: 404, there is none, or it is not shown.
        """
        return await self.find_queue(str(request.path_params["queue"]))

    async def find_queue(self, name: str) -> Queue:
        """Return the queue of that name; see `queue`."""
        if name not in await self.list_queues():
            raise HTTPException(404, f"There is no queue {name!r}.")
        try:
            return Queue(name, self.backend)
        except InvalidQueueName as error:
            raise HTTPException(404, str(error)) from None

    async def share(self, what: str, queue: Queue, read: Callable[[], Awaitable[T]]) -> T:
        """Return something of a queue that all viewers share."""
        return await self.reads.get((what, queue.name), read)

    async def counts(self, queue: Queue) -> dict[str, int]:
        """Return how many jobs are in each state."""
        return await self.share("counts", queue, queue.queue_stats)

    # -- answers

    def page(
        self, request: Request, template: str, context: Mapping[str, Any], status: int = 200
    ) -> Response:
        """Return a page. For a part that is brought up to date, the page without its frame."""
        user: User | None = getattr(request.state, "user", None)
        now = self.backend.now() if context.get("now") is None else context["now"]
        shared = {
            "request": request,
            "site": self,
            "user": user,
            "may_act": self.may_act(user),
            "may_log_out": isinstance(request.app.state.login, SessionLogin),
            "frame": "_part.html" if is_part(request) else "_frame.html",
            "now": now,
            "link": partial(link, request),
            "job_link": partial(job_link, request),
            "schedule_link": partial(schedule_link, request),
            "worker_link": partial(worker_link, request),
            "here": _here(request),
            "navigation": NAVIGATION,
            "ago": lambda at: words.ago(at, now),
        }
        return HTMLResponse(
            self.templates.get_template(template).render(shared | dict(context)), status
        )

    def may_act(self, user: User | None) -> bool:
        """Return whether a user may change anything."""
        return not self.read_only and user is not None and user.role is Role.OPERATOR

    async def done(
        self,
        request: Request,
        said: str,
        *,
        to: str | None = None,
        kind: str = "success",
    ) -> Response:
        """Answer an action.

        The browser shows the message and reloads the page, or goes to the page `to`.
        """
        self.reads.forget()
        if "hx-request" not in request.headers:
            return RedirectResponse(to or page_of_ours(request, "back"), 303)
        events: dict[str, Any] = {"said": {"text": said, "kind": kind}}
        events |= {"leave": {"to": to}} if to is not None else {"refresh": {}}
        return Response(status_code=204, headers={"HX-Trigger": json.dumps(events)})

    def begin(self, request: Request, what: str, queue: str) -> Operation:
        """Note that something was begun: all pages tell of it until a while after its end."""
        self.operations[:] = self.operations_of()
        self.operations.append(Operation(who_of(request), what, queue))
        return self.operations[-1]

    def operations_of(self, queue: str | None = None) -> list[Operation]:
        """Return the operations under way, or ended a moment ago, in one queue or in all."""
        now = time.monotonic()
        return [
            each
            for each in self.operations
            if queue in (None, each.queue)
            and (each.ended is None or now - each.ended < TOLD_SECONDS)
        ]

    async def record(
        self,
        request: Request,
        action: str,
        queue: str = "",
        target: str = "",
        count: int = 1,
        **details: Any,
    ) -> None:
        """Write into the audit log who did what, to how many."""
        entry = AuditEntry(who_of(request), action, queue, target, count, details)
        await record_action(self.backend, entry)


def who_of(request: Request) -> str:
    """Return the name of the user who makes a request."""
    user: User | None = getattr(request.state, "user", None)
    return "?" if user is None else user.name


def is_part(request: Request) -> bool:
    """Return whether a page is brought up to date, so that its frame is not needed."""
    return "hx-request" in request.headers


def site_of(request: Request) -> Site:
    """Return the dashboard of a request."""
    site: Site = request.app.state.site
    return site


def _here(request: Request) -> str:
    """Return the path and the query of this page."""
    query = request.url.query
    return quote(request.url.path, safe="/%") + (f"?{query}" if query else "")


def page_of_ours(request: Request, name: str) -> str:
    """Return the page that a query names, if it is one of ours; otherwise the first one."""
    prefix = f"{request.scope.get('root_path', '')}/"
    given = request.query_params.get(name, prefix)
    safe = given.startswith(prefix) and not given.startswith("//") and "\\" not in given
    return given if safe and given.isprintable() else prefix


def text_of(form: FormData, name: str) -> str:
    """Return what was written into a field, without blanks around it; `""` if nothing was."""
    value = form.get(name, "")
    return value.strip() if isinstance(value, str) else ""


def _make_templates() -> Environment:
    environment = Environment(
        loader=PackageLoader(PACKAGE),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "duration": words.duration,
        "iso": words.iso_time,
        "number": words.number,
        "preview": words.preview,
        "pretty": words.pretty_json,
        "short_error": words.short_error,
        "size": words.size,
    }
    environment.globals |= {
        "call_preview": words.call_preview,
        "states": [str(state) for state in JOB_STATES],
        "outcomes": [str(state) for state in OUTCOMES],
    }
    return environment
