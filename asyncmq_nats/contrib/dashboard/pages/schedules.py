"""Repeated jobs: what runs when, and the form that creates or changes one."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import unquote

from starlette.datastructures import FormData
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from asyncmq_nats.contrib.dashboard import words
from asyncmq_nats.contrib.dashboard.pages.jobs import (
    known_tasks,
    read_arguments,
    read_date,
    read_number,
    read_task,
)
from asyncmq_nats.contrib.dashboard.pages.summaries import for_all, summaries, version_of
from asyncmq_nats.contrib.dashboard.redaction import restore_hidden
from asyncmq_nats.contrib.dashboard.site import Site, job_link, link, site_of, text_of
from asyncmq_nats.exceptions import InvalidArgument
from asyncmq_nats.jobs import Backoff
from asyncmq_nats.queues import Queue
from asyncmq_nats.schedules import RepeatableInfo, upcoming_runs

__all__ = ["pause", "remove", "resume", "run_now", "save", "show", "show_all", "show_form"]

NEXT_RUNS: Final = 3


@dataclass(frozen=True, slots=True)
class Row:
    """A schedule as it is shown. `runs`: the next times, in Unix seconds.

    `last_run`: the time of the last one; `last_job`: id of its job.
    """

    queue: str
    id: str
    name: str
    task: str
    rhythm: str
    in_words: str
    timezone: str
    runs: list[float]
    paused: bool
    definition: dict[str, Any]
    last_run: float | None
    last_job: str | None

    @property
    def is_over(self) -> bool:
        """Whether it will not run again."""
        return not self.paused and not self.runs


def _row(site: Site, queue: str, info: RepeatableInfo) -> Row:
    given = info.job_def
    every, cron = given.get("every"), given.get("cron")
    definition = dict(given)
    shown = site.redactor.job(queue, given | {"task": given["task_id"]})
    definition |= {"args": shown["args"], "kwargs": shown["kwargs"]}
    return Row(
        queue=queue,
        id=str(given["id"]),
        name=str(given.get("name") or ""),
        task=str(given["task_id"]),
        rhythm=str(cron) if cron else words.duration(every),
        in_words=words.cron_in_words(cron) if cron else words.every_in_words(every),
        timezone=str(given.get("timezone") or ""),
        runs=_next_runs(info, site.backend.now()),
        paused=info.paused,
        definition=definition,
        last_run=info.last_run,
        last_job=info.last_job,
    )


def _next_runs(info: RepeatableInfo, now: float) -> list[float]:
    """Return the next times at which it runs, by its rhythm alone."""
    if info.next_run is None:
        return []
    try:
        return upcoming_runs(info, NEXT_RUNS, now)
    except ValueError:  # of another release
        return [info.next_run]


async def show_all(request: Request) -> Response:
    """Show the schedules of all queues."""
    return await _show(request, site_of(request), None)


async def show(request: Request) -> Response:
    """Show the schedules of one queue."""
    site = site_of(request)
    return await _show(request, site, (await site.queue(request)).name)


async def _show(request: Request, site: Site, chosen: str | None) -> Response:
    names = await site.list_queues()

    async def read(name: str) -> list[Row]:
        queue = Queue(name, site.backend)
        found = await site.share("schedules", queue, queue.list_repeatables)
        return [_row(site, name, info) for info in found]

    by_queue = await for_all([chosen] if chosen else names, read)
    rows = [row for name in names for row in by_queue.get(name, [])]
    rows.sort(key=lambda row: (row.runs[0] if row.runs else float("inf"), row.queue, row.id))
    version = version_of(await summaries(site))
    last = [(row.queue, row.last_job) for row in rows if row.last_job is not None]
    context = {
        "section": "queues" if chosen else "schedules",
        "chosen": chosen,
        "rows": rows,
        "last_jobs": await _read_last(site, last, version),
        "queues": names,
        "watch": ("queues", version),
    }
    return site.page(request, "schedules.html", context)


async def _read_last(
    site: Site, last: list[tuple[str, str]], version: str
) -> dict[tuple[str, str], dict[str, Any] | None]:
    """Return the last job of each schedule; `None` for one that is gone.

    `version`: of what the page watches, so that an end that changed it is seen.
    """

    async def read(name: tuple[str, str]) -> dict[str, Any] | None:
        queue, job_id = name
        job = await Queue(queue, site.backend).get_job(job_id)
        return None if job is None else site.redactor.job(queue, job)

    return await site.reads.get(("last runs", tuple(last), version), lambda: for_all(last, read))


async def _find(queue: Queue, rid: str) -> RepeatableInfo | None:
    found = await queue.list_repeatables()
    return next((each for each in found if str(each.job_def["id"]) == rid), None)


async def show_form(request: Request) -> Response:
    """Show the form that creates a schedule, or changes the one of `?name=`."""
    site = site_of(request)
    queue = await site.queue(request)
    rid = request.query_params.get("name", "")
    info = await _find(queue, rid) if rid else None
    if rid and info is None:
        raise HTTPException(404, f"Queue {queue.name} has no schedule {rid!r}.")
    row = None if info is None else _row(site, queue.name, info)
    given = {} if row is None else row.definition
    context = {
        "section": "schedules",
        "queue": queue,
        "row": row,
        "given": {name: value for name, value in given.items() if value is not None},
        "args": json.dumps(given.get("args", []), ensure_ascii=False),
        "kwargs": json.dumps(given.get("kwargs", {}), ensure_ascii=False),
        "tasks": await known_tasks(site, queue),
    }
    return site.page(request, "schedule.html", context)


async def save(request: Request) -> Response:
    """Create a schedule, or change one."""
    site = site_of(request)
    queue = await site.queue(request)
    form = await request.form()
    name, rid = text_of(form, "name"), text_of(form, "id")
    info = await _find(queue, rid or name) if rid or name else None
    if rid and info is None:
        raise InvalidArgument("this schedule was removed meanwhile: reload the page", rid)
    if info is not None and not rid:
        raise InvalidArgument("there is a schedule of that name: change that one", name)
    args, kwargs = read_arguments(form)
    stored: Mapping[str, Any] = {} if info is None else info.job_def
    shown = {} if info is None else _row(site, queue.name, info).definition
    args = restore_hidden(args, shown.get("args"), stored.get("args"))
    kwargs = restore_hidden(kwargs, shown.get("kwargs"), stored.get("kwargs"))
    if info is not None and not stored.get("name"):
        raise InvalidArgument(
            "a schedule without a name cannot be changed: create a named one", rid
        )
    if not name:
        raise InvalidArgument("give the schedule a name, by which it can be changed later", name)
    options = _rhythm(form) | _options(form)
    if options["backoff"] is None and isinstance(stored.get("backoff"), Mapping):
        options["backoff"] = Backoff(**stored["backoff"])  # the form has none of this kind
    at = await queue.upsert_repeatable(
        read_task(form), args=args, kwargs=kwargs, name=name, **options
    )
    changed = "schedule.change" if info is not None else "schedule.create"
    await site.record(request, changed, queue.name, name)
    said = f"Schedule {name} is stored"
    said += "." if at == float("inf") else f"; it runs next at {words.iso_time(at)[:19]} UTC."
    return await site.done(request, said, to=link(request, "queues", queue.name, "schedules"))


def _rhythm(form: FormData) -> dict[str, Any]:
    every, cron, timezone = (text_of(form, field) for field in ("every", "cron", "timezone"))
    return {
        "every": every or None,
        "cron": cron or None,
        "timezone": (timezone or None) if cron else None,
    }


def _options(form: FormData) -> dict[str, Any]:
    options: dict[str, Any] = {
        "retries": read_number(form, "retries", int) or 0,
        "ttl": read_number(form, "ttl", float),
        "timeout": read_number(form, "timeout", float),
        "backoff": read_number(form, "backoff", float),
        "limit": read_number(form, "limit", int),
        "jitter": read_number(form, "jitter", float),
        "overlap": text_of(form, "overlap") or "allow",
        "catch_up": text_of(form, "catch_up") or None,
        "start": read_date(text_of(form, "start"), "start"),
        "end": read_date(text_of(form, "end"), "end"),
    }
    priority = read_number(form, "priority", int)
    return options | ({} if priority is None else {"priority": priority})


# -- actions


def _rid(request: Request) -> str:
    return unquote(str(request.path_params["name"]))


def _gone(rid: str) -> InvalidArgument:
    return InvalidArgument("there is no such schedule any more", rid)


async def pause(request: Request) -> Response:
    """Have the schedule add no more jobs."""
    site = site_of(request)
    queue, rid = await site.queue(request), _rid(request)
    if not await queue.pause_repeatable(rid):
        raise _gone(rid)
    await site.record(request, "schedule.pause", queue.name, rid)
    return await site.done(request, f"Schedule {rid} is paused.")


async def resume(request: Request) -> Response:
    """Let a paused schedule go on."""
    site = site_of(request)
    queue, rid = await site.queue(request), _rid(request)
    try:
        await queue.resume_repeatable(rid)
    except KeyError:
        raise _gone(rid) from None
    await site.record(request, "schedule.resume", queue.name, rid)
    return await site.done(request, f"Schedule {rid} goes on.")


async def remove(request: Request) -> Response:
    """Remove the schedule; the jobs that it has added stay."""
    site = site_of(request)
    queue, rid = await site.queue(request), _rid(request)
    if not await queue.remove_repeatable(rid):
        raise _gone(rid)
    await site.record(request, "schedule.remove", queue.name, rid)
    return await site.done(request, f"Schedule {rid} was removed.")


async def run_now(request: Request) -> Response:
    """Add the job of a schedule now, beside its runs."""
    site = site_of(request)
    queue, rid = await site.queue(request), _rid(request)
    try:
        job_id = await queue.run_repeatable(rid)
    except KeyError:
        raise _gone(rid) from None
    await site.record(request, "schedule.run", queue.name, rid, job=job_id)
    said = f"Job {job_id} of schedule {rid} was added."
    return await site.done(request, said, to=job_link(request, queue.name, job_id))
