"""Lists of jobs, what is done to many of them, and the form that adds one."""

import json
from collections.abc import Mapping
from contextlib import aclosing
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Any, Final

import anyio
from starlette.background import BackgroundTask
from starlette.datastructures import FormData, QueryParams
from starlette.requests import Request
from starlette.responses import Response

from asyncmq_nats.contrib.dashboard.pages.summaries import (
    all_workers,
    summarize,
    version_of,
)
from asyncmq_nats.contrib.dashboard.site import (
    Operation,
    Site,
    is_part,
    job_link,
    site_of,
    text_of,
)
from asyncmq_nats.exceptions import AsyncMQError, InvalidArgument
from asyncmq_nats.queues import Queue
from asyncmq_nats.schedules import parse_every
from asyncmq_nats.search import JobFilter
from asyncmq_nats.settings import mask_login
from asyncmq_nats.states import OUTCOMES, State

__all__ = [
    "ACTIONS",
    "MAX_SELECTED",
    "act",
    "act_in_background",
    "add",
    "read_arguments",
    "read_number",
    "show",
    "show_form",
]

PAGE_SIZES: Final = (20, 50, 100)
MOST_FOUND: Final = 500
"""Jobs that a search shows at most."""
SEARCH_SECONDS: Final = 5.0
"""How long a search may take."""
MAX_SELECTED: Final = 1_000
ANY: Final = "any"
"""Stands for all states."""
ENDED_AGAIN: Final = (State.FAILED, State.EXPIRED, State.CANCELLED)
ACTIONS: Final[Mapping[str, tuple[str, tuple[State, ...]]]] = {
    "retry": ("retried", ENDED_AGAIN),
    "promote": ("made ready", (State.DELAYED,)),
    "cancel": (
        "cancelled",
        (State.WAITING, State.ACTIVE, State.DELAYED, State.WAITING_CHILDREN),
    ),
    "remove": ("removed", tuple(state for state in State if state is not State.ACTIVE)),
}
"""The actions on jobs: the participle, and the states of the jobs."""


@dataclass(frozen=True, slots=True)
class Filters:
    """The query of a list, as it was written into its form."""

    state: str
    task: str = ""
    text: str = ""
    since: str = ""
    until: str = ""
    worker: str = ""

    @classmethod
    def read(cls, query: QueryParams | FormData) -> "Filters":
        """Return the query of a request or a form.

        Raises:
            InvalidArgument: there is no such state.
        """
        given = {
            name: str(query.get(name, "")).strip()
            for name in ("task", "text", "since", "until", "worker")
        }
        state = str(query.get("state") or State.WAITING)
        if state != ANY and state not in set(State):
            raise InvalidArgument(f"state must be one of {', '.join(State)}, {ANY}", state)
        return cls(state, **given)

    def query(self) -> dict[str, str]:
        """Return the parameters of a link with the same query."""
        names = ("task", "text", "since", "until", "worker")
        return {name: getattr(self, name) for name in names if getattr(self, name)}

    @property
    def narrows(self) -> bool:
        """Whether the query filters by more than a state."""
        return bool(self.query()) or self.state == ANY

    def job_filter(self, now: float) -> JobFilter:
        """Return the query as a filter."""
        return JobFilter(
            state=None if self.state == ANY else self.state,
            task=self.task or None,
            text=self.text or None,
            since=read_time(self.since, now, "since"),
            until=read_time(self.until, now, "until"),
            worker=self.worker or None,
        )

    def in_words(self) -> str:
        """Return the query as text for the audit log."""
        return " ".join(
            [f"state={self.state}", *(f"{name}={value}" for name, value in self.query().items())]
        )


def read_time(text: str, now: float, name: str) -> float | None:
    """Return a time that was written: so long ago (`15m`), or in UTC (`2027-01-31T08:00`).

    Raises:
        InvalidArgument: it is neither.
    """
    try:
        return now - parse_every(text) if text else None
    except ValueError:
        return read_date(text, name, "a duration such as 15m, or ")


def read_date(text: str, name: str, otherwise: str = "") -> float | None:
    """Return a time that was written as a date and a time of day, in Unix seconds.

    In UTC, unless it says otherwise. `otherwise`: what else the field takes.

    Raises:
        InvalidArgument: it is none.
    """
    if not text:
        return None
    try:
        at = datetime.fromisoformat(text)
        return (at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError):
        problem = f"{name} must be {otherwise}a time such as 2027-01-31T08:00"
        raise InvalidArgument(problem, text) from None


def possible_actions(state: str) -> list[str]:
    """Return the actions for jobs in a state, or in any."""
    return [name for name, (_, states) in ACTIONS.items() if state == ANY or state in states]


async def show(request: Request) -> Response:
    """Show a page of the jobs in one state, or those that match a filter."""
    site = site_of(request)
    queue = await site.queue(request)
    query = request.query_params
    filters = Filters.read(query)
    size = _page_size(query.get("size", ""))
    newest = query.get("order", "newest") != "oldest"
    after = query.get("after") or None
    cursor, in_time, most = None, True, size
    if filters.narrows:
        most = min(MOST_FOUND, max(size, _number(query.get("most", ""))))
        jobs, in_time = await _search(site, queue, filters, most + 1, newest=newest)
    else:
        page = await queue.list_page(filters.state, after, limit=size, newest_first=newest)
        jobs, cursor = page.jobs, page.cursor
    summary = await summarize(site, queue)
    context = {
        "section": "queues",
        "watch": (f"queue:{queue.name}", version_of(summary)),
        "queue": summary,
        "filters": filters,
        "state": filters.state,
        "jobs": [site.redactor.job(queue.name, job) for job in jobs[:most]],
        "more": most + size if len(jobs) > most and most < MOST_FOUND else None,
        "in_time": in_time,
        "cursor": cursor,
        "after": after,
        "size": size,
        "sizes": PAGE_SIZES,
        "order": "newest" if newest else "oldest",
        "ended": filters.state in OUTCOMES,
        "actions": possible_actions(filters.state),
        "tasks": [] if is_part(request) else await known_tasks(site, queue),
        "workers": sorted({w.id for w in await all_workers(site) if w.queue == queue.name}),
    }
    return site.page(request, "jobs.html", context)


async def _search(
    site: Site, queue: Queue, filters: Filters, most: int, *, newest: bool
) -> tuple[list[dict[str, Any]], bool]:
    """Return the first jobs that match, and whether the search was complete in time."""
    await site.backend.connect()
    where = filters.job_filter(site.backend.now())
    found: list[dict[str, Any]] = []
    with anyio.move_on_after(SEARCH_SECONDS) as scope:
        async with aclosing(queue.search(where, newest_first=newest, limit=most)) as jobs:
            async for job in jobs:
                found.append(job)  # noqa: PERF401 - those found in time are kept
    return found, not scope.cancelled_caught


def _number(text: str) -> int:
    return int(text) if text.isdecimal() and len(text) < 6 else 0


def _page_size(text: str) -> int:
    size = _number(text) or PAGE_SIZES[0]
    return min(PAGE_SIZES, key=lambda each: abs(each - size))


# -- actions on many


async def act(request: Request) -> Response:
    """Do something to the selected jobs, or to all that match."""
    site = site_of(request)
    queue = await site.queue(request)
    form = await request.form()
    action = text_of(form, "action")
    if action not in ACTIONS:
        raise InvalidArgument(f"action must be one of {', '.join(ACTIONS)}", action)
    if text_of(form, "all") == "yes":
        return await _act_on_all(request, site, queue, action, Filters.read(form))
    ids = [value for value in form.getlist("id") if isinstance(value, str)]
    if not ids or len(ids) > MAX_SELECTED:
        raise InvalidArgument(f"select 1 to {MAX_SELECTED:,} jobs", len(ids))
    applied = await queue.apply(ids, action)
    target = ids[0] if len(ids) == 1 else ""
    await site.record(request, f"job.{action}", queue.name, target, applied.done)
    said = f"{applied.done:,} of {applied.matched:,} jobs were {ACTIONS[action][0]}."
    if applied.done == applied.matched:
        word = "job was" if applied.done == 1 else "jobs were"
        said = f"{applied.done:,} {word} {ACTIONS[action][0]}."
    kind = "success" if applied.done == applied.matched else "warning"
    return await site.done(request, said, kind=kind)


async def _act_on_all(
    request: Request, site: Site, queue: Queue, action: str, filters: Filters
) -> Response:
    """Begin to act on all jobs that match; go on when the answer was sent."""
    await site.backend.connect()
    where = filters.job_filter(site.backend.now())
    # Refuse a bad filter now, and an action that does nothing in that state.
    await queue.apply(where, action, dry_run=True, limit=1)
    return await act_in_background(request, queue, action, where, filters.in_words())


async def act_in_background(
    request: Request, queue: Queue, action: str, where: JobFilter | list[str], told: str
) -> Response:
    """Begin to act on many jobs, answer, and go on. `told`: which ones, for the audit log."""
    site = site_of(request)
    if isinstance(where, JobFilter):
        what, which = "all that match", "All jobs that match"
    else:
        what, which = told, f"{len(where):,} jobs"
    operation = site.begin(request, f"{action} {what}", queue.name)
    said = f"{which} are being {ACTIONS[action][0]}; the page shows how far it is."
    response = await site.done(request, said)
    response.background = BackgroundTask(
        partial(_carry_out, request, queue, action, where, told, operation)
    )
    return response


async def _carry_out(
    request: Request,
    queue: Queue,
    action: str,
    where: JobFilter | list[str],
    told: str,
    operation: Operation,
) -> None:
    """Do something to many jobs, and record it."""
    site = site_of(request)
    problem = "it broke off"
    try:
        applied = await queue.apply(where, action, progress=operation.progress)
        operation.progress(applied.done)
        problem = ""
    except AsyncMQError as error:
        problem = mask_login(str(error))
    finally:
        operation.end(problem)
    details = {"problem": problem} if problem else {}
    await site.record(request, f"job.{action}", queue.name, told, operation.count, **details)
    site.reads.forget()


# -- add


async def show_form(request: Request) -> Response:
    """Show the form that adds a job."""
    site = site_of(request)
    queue = await site.queue(request)
    context = {"section": "queues", "queue": queue, "tasks": await known_tasks(site, queue)}
    return site.page(request, "add.html", context)


async def known_tasks(site: Site, queue: Queue) -> list[str]:
    """Return names of tasks that jobs of the queue had lately, for completion."""

    async def read() -> list[str]:
        names: set[str] = set()
        for state in (State.COMPLETED, State.FAILED, State.WAITING, State.DELAYED):
            page = await queue.list_page(state, limit=50)
            names |= {str(job["task"]) for job in page.jobs}
        return sorted(names)

    return await site.reads.get(("tasks", queue.name), read, fresh_for=60.0)


async def add(request: Request) -> Response:
    """Add a job."""
    site = site_of(request)
    queue = await site.queue(request)
    form = await request.form()
    args, kwargs = read_arguments(form)
    delay = text_of(form, "delay")
    job_id = await queue.add(
        read_task(form),
        args,
        kwargs,
        retries=read_number(form, "retries", int) or 0,
        priority=_default(read_number(form, "priority", int), 5),
        delay=parse_every(delay) if delay else None,
        ttl=read_number(form, "ttl", float),
        timeout=read_number(form, "timeout", float),
        backoff=read_number(form, "backoff", float),
        job_id=text_of(form, "job_id") or None,
        depends_on=text_of(form, "depends_on").split() or None,
    )
    await site.record(request, "job.add", queue.name, job_id)
    return await site.done(
        request, f"Job {job_id} was added.", to=job_link(request, queue.name, job_id)
    )


def _default(value: Any, default: Any) -> Any:
    return default if value is None else value


def read_task(form: FormData) -> str:
    """Return the name of the task.

    Raises:
        InvalidArgument: there is none.
    """
    task = text_of(form, "task")
    if not task:
        raise InvalidArgument("write the name of a task, such as app.tasks.send", task)
    return task


def read_arguments(form: FormData) -> tuple[list[Any], dict[str, Any]]:
    """Return the arguments that were written as JSON.

    Raises:
        InvalidArgument: they are no JSON list and no JSON object.
    """
    args = _read_json(form, "args", "[]")
    kwargs = _read_json(form, "kwargs", "{}")
    if not isinstance(args, list):
        raise InvalidArgument('the arguments must be a JSON list, such as ["ada", 3]', args)
    if not isinstance(kwargs, dict):
        raise InvalidArgument(
            'the named arguments must be a JSON object, such as {"to": "ada"}', kwargs
        )
    return args, kwargs


def _read_json(form: FormData, name: str, default: str) -> Any:
    text = text_of(form, name) or default
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise InvalidArgument(f"{name} is not JSON ({error})", text) from None


def _refuse_constant(text: str) -> Any:
    raise ValueError(f"{text} is no JSON number")


def read_number(form: FormData, name: str, kind: type[int] | type[float]) -> Any:
    """Return a number that was written into a field, `None` if nothing was.

    Raises:
        InvalidArgument: it is none.
    """
    text = text_of(form, name)
    if not text:
        return None
    try:
        return kind(text)
    except ValueError:
        word = "a whole number" if kind is int else "a number"
        raise InvalidArgument(f"{name} must be {word}", text) from None
