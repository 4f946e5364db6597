"""One job: all that is known of it, and what can be done to it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import unquote

from starlette.requests import Request
from starlette.responses import Response

from asyncmq_nats.contrib.dashboard import words
from asyncmq_nats.contrib.dashboard.pages.jobs import ACTIONS, possible_actions, read_arguments
from asyncmq_nats.contrib.dashboard.pages.summaries import all_workers, for_all, version_of
from asyncmq_nats.contrib.dashboard.redaction import MASK, restore_hidden
from asyncmq_nats.contrib.dashboard.site import Site, job_link, link, site_of, text_of
from asyncmq_nats.exceptions import InvalidArgument, JobNotFound
from asyncmq_nats.queues import Queue
from asyncmq_nats.schedules import parse_every
from asyncmq_nats.states import OUTCOMES, State

__all__ = ["Moment", "act", "edit", "job_id_of", "reschedule", "show", "show_edit", "timeline"]

MAX_LINES: Final = 500
"""Lines of a job's log that its page shows."""
SHOWN_PARENTS: Final = 50
"""Parents whose state is looked up."""


@dataclass(frozen=True, slots=True)
class Moment:
    """One step in the life of a job. `at`: Unix seconds; `kind`: a class of the style sheet."""

    at: float
    what: str
    kind: str = ""
    detail: str = ""


def job_id_of(request: Request) -> str:
    """Return the id of a path; see `site.job_link`."""
    return unquote(str(request.path_params["job"]))


async def _find(request: Request, site: Site, queue: Queue) -> dict[str, Any]:
    """Return the job of a path.

    Raises:
        JobNotFound: there is none.
    """
    job_id = job_id_of(request)
    found = await site.reads.get(("job", queue.name, job_id), lambda: queue.get_job(job_id))
    if found is None:
        raise JobNotFound(queue.name, job_id)
    return found


async def show(request: Request) -> Response:
    """Show one job."""
    site = site_of(request)
    queue = await site.queue(request)
    found = await _find(request, site, queue)
    job_id = str(found["id"])
    workers = [
        worker
        for worker in await all_workers(site)
        if worker.queue == queue.name and job_id in worker.running
    ]
    if found["status"] == State.ACTIVE:
        start = next((worker.start_of(job_id) for worker in workers), None)
        found = found | {"active_since": start}
    job = site.redactor.job(queue.name, found)
    now = site.backend.now()
    paused = await site.share("paused", queue, queue.is_paused)
    logs = await site.reads.get(("logs", queue.name, job_id), lambda: queue.job_logs(job_id))
    context = {
        "section": "queues",
        "watch": (f"job:{queue.name}:{job_id}", version_of(found)),
        "queue_name": queue.name,
        "job": job,
        "now": now,
        "moments": timeline(job, now),
        "parents": await _states(queue, job),
        "children": await _children(site, queue, job_id),
        "logs": [
            site.redactor.log_line(queue.name, job["task"], each) for each in logs[-MAX_LINES:]
        ],
        "logs_cut": len(logs) if len(logs) > MAX_LINES else 0,
        "runs_on": workers,
        "actions": possible_actions(job["status"]),
        "editable": _editable(job, paused=paused),
        "bundle": words.pretty_json(_bundle(queue.name, job)),
        "waited": _waited(job),
        "ran": _ran(job, now),
    }
    return site.page(request, "job.html", context)


async def _states(queue: Queue, job: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the jobs that this one depends on, with their states."""
    ids = [str(each) for each in job.get("depends_on") or []]

    async def read(job_id: str) -> str:
        return await queue.get_job_state(job_id) or "gone"

    found = await for_all(ids[:SHOWN_PARENTS], read)
    return [(each, found.get(each, "")) for each in ids]


async def _children(site: Site, queue: Queue, job_id: str) -> list[str]:
    """Return some of the jobs that wait for this one, or did."""

    async def read() -> list[str]:
        flow = await queue.get_flow(job_id, limit=1)
        return [] if flow is None else flow.awaited_by[:SHOWN_PARENTS]

    return await site.reads.get(("children", queue.name, job_id), read)


def timeline(job: Mapping[str, Any], now: float) -> list[Moment]:
    """Return the steps in the life of a job, in order."""
    moments = [Moment(job["created_at"], "Added", "added")]
    for failure in job.get("errors") or []:
        if isinstance(failure, Mapping) and isinstance(failure.get("at"), int | float):
            what = f"Attempt {failure.get('attempt', '?')} failed"
            error = words.short_error(str(failure.get("error", "")))
            moments.append(Moment(float(failure["at"]), what, "failed", error))
    state, started = job["status"], job.get("active_since")
    if started and state in (State.ACTIVE, *OUTCOMES):
        detail = f"by {job['worker']}" if job.get("worker") else ""
        moments.append(Moment(started, "Started", "active", detail))
    if job.get("finished_at"):
        moments.append(Moment(job["finished_at"], str(state).capitalize(), str(state)))
    due = job.get("delay_until")
    if due and state == State.DELAYED:
        moments.append(Moment(due, "Due" if due > now else "Was due", "delayed"))
    return sorted(moments, key=lambda each: each.at)


def _waited(job: Mapping[str, Any]) -> float | None:
    """Return the seconds from when the job could run until it started; `None` after a retry."""
    started = job.get("active_since")
    if not started or job.get("errors") or job.get("status") not in (State.ACTIVE, *OUTCOMES):
        return None
    return float(max(0.0, started - (job.get("delay_until") or job["created_at"])))


def _ran(job: Mapping[str, Any], now: float) -> float | None:
    """Return the seconds that the last attempt took, or takes so far."""
    started = job.get("active_since")
    if not started or job["status"] not in (State.ACTIVE, *OUTCOMES):
        return None
    return float(max(0.0, (job.get("finished_at") or now) - started))


def _bundle(queue: str, job: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a report on a job needs, without what is empty."""
    given = {key: value for key, value in job.items() if value not in (None, [], {}, "")}
    return {"queue": queue, **given}


def _editable(job: Mapping[str, Any], *, paused: bool) -> bool:
    """Return whether the arguments of a job can be changed; see `Queue.edit`."""
    if job["status"] in (State.DELAYED, State.WAITING_CHILDREN):
        return True
    return paused and job["status"] == State.WAITING


async def act(request: Request, action: str) -> Response:
    """Do one of `ACTIONS` to the job."""
    site = site_of(request)
    queue = await site.queue(request)
    job_id = job_id_of(request)
    applied = await queue.apply([job_id], action)
    if not applied.done:
        state = await queue.get_job_state(job_id)
        there = f"it is {state}" if state else "it is not there any more"
        raise InvalidArgument(f"the job cannot be {ACTIONS[action][0]}: {there}", job_id)
    await site.record(request, f"job.{action}", queue.name, job_id)
    to = link(request, "queues", queue.name, "jobs") if action == "remove" else None
    return await site.done(request, f"Job {job_id} was {ACTIONS[action][0]}.", to=to)


async def reschedule(request: Request) -> Response:
    """Have a delayed job run at another time."""
    site = site_of(request)
    queue = await site.queue(request)
    job_id = job_id_of(request)
    delay = text_of(await request.form(), "delay")
    run_at = site.backend.now_at_most() + parse_every(delay)
    if not await queue.reschedule(job_id, run_at):
        raise InvalidArgument("only a delayed job can be put off", job_id)
    await site.record(request, "job.reschedule", queue.name, job_id, run_at=run_at)
    return await site.done(request, f"Job {job_id} runs in {delay}.")


async def show_edit(request: Request) -> Response:
    """Show the form that changes the arguments of a job."""
    site = site_of(request)
    queue = await site.queue(request)
    job = await _find(request, site, queue)
    shown = site.redactor.job(queue.name, job)
    context = {
        "section": "queues",
        "queue_name": queue.name,
        "job": shown,
        "args": words.pretty_json(shown["args"]),
        "kwargs": words.pretty_json(shown["kwargs"]),
        "hidden": MASK,
    }
    return site.page(request, "edit.html", context)


async def edit(request: Request) -> Response:
    """Change the arguments of a job that has not started."""
    site = site_of(request)
    queue = await site.queue(request)
    job_id = job_id_of(request)
    stored = await queue.get_job(job_id)
    if stored is None:
        raise JobNotFound(queue.name, job_id)
    args, kwargs = read_arguments(await request.form())
    shown = site.redactor.job(queue.name, stored)
    await queue.edit(
        job_id,
        args=restore_hidden(args, shown["args"], stored["args"]),
        kwargs=restore_hidden(kwargs, shown["kwargs"], stored["kwargs"]),
    )
    await site.record(request, "job.edit", queue.name, job_id)
    to = job_link(request, queue.name, job_id)
    return await site.done(request, f"Job {job_id} has new arguments.", to=to)
