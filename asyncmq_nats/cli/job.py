"""`job`: find jobs, look at them, add, run, retry, cancel, change them."""

import logging
import shlex
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from functools import partial
from typing import Annotated, Any, Final

import typer

from asyncmq_nats import (
    InMemoryBackend,
    JobFailed,
    JobFilter,
    JobNotFound,
    Queue,
    State,
)
from asyncmq_nats._concurrency import open_task_group
from asyncmq_nats.cli.command import (
    AsJson,
    AsNames,
    CommandFailed,
    QueueName,
    Session,
    command,
    make_group,
    require_queue,
    shows_tracebacks,
)
from asyncmq_nats.cli.many import Safeguards, act_on_many
from asyncmq_nats.cli.output import duration, instant, moment, number, plain_json
from asyncmq_nats.cli.values import (
    Arguments,
    ArgumentsAsJson,
    ChosenDelayed,
    ChosenJobs,
    ChosenToEdit,
    Keywords,
    MatchingJobs,
    parse_duration,
    parse_future,
    parse_json,
    parse_keywords,
    parse_value,
    select,
)
from asyncmq_nats.exceptions import WrongState
from asyncmq_nats.workers import autodiscover_tasks, list_workers

__all__ = ["group"]

group = make_group("job", "Jobs: find them, look at them, add, retry, cancel, change them.")

SHOWN_JOBS: Final = 50
SHOWN_ERROR: Final = 100
"""Characters of an error in a list."""

NOT_STARTED: Final = (State.WAITING, State.DELAYED, State.WAITING_CHILDREN)

JobId = Annotated[str, typer.Argument(metavar="ID", help="Id of the job.")]


# -- look


@command(group, "ls")
async def list_jobs(
    session: Session,
    queue: QueueName,
    which: MatchingJobs,
    limit: Annotated[int, typer.Option("--limit", min=1, help="How many at most.")] = SHOWN_JOBS,
    everything: Annotated[bool, typer.Option("--all", "-a", help="Without a limit.")] = False,
    oldest: Annotated[bool, typer.Option("--oldest", help="The oldest first.")] = False,
    as_json: AsJson = False,
    names: AsNames = False,
) -> None:
    """List jobs, the newest of each state first; all filters together narrow the list."""
    jobs = await require_queue(session, queue)
    chosen = select(session.backend.now(), **which, everything=True)
    most = None if everything else limit
    found = jobs.search(chosen.where, newest_first=not oldest, limit=most)
    if as_json:
        await session.output.stream_json(found)
    elif names:
        async for job in found:
            session.output.raw(job["id"])
    else:
        shown = [job async for job in found]
        columns = ["id", "task", "state", "since", "#tries", "error"]
        rows = [_row(job) for job in shown]
        if any(_due(job) for job in shown):
            columns.insert(4, "runs at")
            for row, job in zip(rows, shown, strict=True):
                row.insert(4, instant(_due(job)) if _due(job) else "")
        session.output.table(columns, rows)
        if most is not None and len(rows) == most:
            session.output.note(f"the first {number(most)}; --limit or --all shows more")


def _row(job: dict[str, Any]) -> list[str]:
    error = str(job.get("last_error") or "")
    return [
        job["id"],
        job["task"],
        job["status"],
        instant(job["updated_at"]),
        str(_attempts(job)),
        error if len(error) <= SHOWN_ERROR else error[:SHOWN_ERROR] + "…",
    ]


def _due(job: dict[str, Any]) -> float | None:
    """Return when a job runs that is delayed (Unix seconds)."""
    return job["delay_until"] if job["status"] == "delayed" else None


def _attempts(job: dict[str, Any]) -> int:
    """Return how many attempts have begun: `retries` counts those that failed."""
    under_way = job["status"] in ("active", "completed")
    return int(job["retries"]) + under_way


@command(group, "info")
async def show(session: Session, queue: QueueName, job_id: JobId, as_json: AsJson = False) -> None:
    """Show all that is known of a job: arguments, attempts, result, traceback."""
    job = await _find(session, queue, job_id)
    if as_json:
        session.output.json(job)
        return
    runs_on = ""
    if job["status"] == State.ACTIVE:
        workers = [
            each for each in await list_workers(session.backend, queue) if job_id in each.running
        ]
        runs_on = ", ".join(each.id for each in workers)
        job["active_since"] = next((each.start_of(job_id) for each in workers), None)
    session.output.fields(_fields(job, runs_on))
    for failure in job["errors"]:
        at = instant(failure.get("at"))
        session.output.line("")
        session.output.line(f"attempt {failure.get('attempt')} at {at}: {failure.get('error')}")
        session.output.text(str(failure.get("traceback") or ""))
    if job.get("error_traceback") and not job["errors"]:
        session.output.line("")
        session.output.text(job["error_traceback"])


def _fields(job: dict[str, Any], runs_on: str) -> dict[str, str]:
    times = {
        "created": job["created_at"],
        "runs at": _due(job),
        "started": job.get("active_since"),
        "ended": job["finished_at"],
    }
    texts = {
        "id": job["id"],
        "task": job["task"],
        "state": job["status"],
        "args": plain_json(job["args"]),
        "kwargs": plain_json(job["kwargs"]),
        "priority": str(job["priority"]),
        "attempts": f"{_attempts(job)} of at most {job['max_retries'] + 1}",
        "worker": runs_on or job["worker"] or "",
        "stalls": str(job["stalls"] or ""),
        "depends on": ", ".join(job["depends_on"]),
        "progress": plain_json(job["progress"]) if job.get("progress") is not None else "",
        "result": plain_json(job["result"]) if job["status"] == "completed" else "",
        "error": job.get("last_error") or "",
    }
    texts |= {name: instant(at) for name, at in times.items() if at is not None}
    if job.get("active_since") and job["finished_at"]:
        texts["took"] = duration(job["finished_at"] - job["active_since"])
    return {name: text for name, text in texts.items() if text}


async def _find(session: Session, queue: str, job_id: str) -> dict[str, Any]:
    job = await session.queue(queue).get_job(job_id)
    if job is None:
        raise JobNotFound(queue, job_id)
    return job


@command(group, "logs")
async def show_logs(
    session: Session, queue: QueueName, job_id: JobId, as_json: AsJson = False
) -> None:
    """Show the lines that a task kept with its job, by `current_job().log` or a log handler."""
    await _find(session, queue, job_id)
    lines = await session.queue(queue).job_logs(job_id)
    if as_json:
        session.output.json([asdict(line) for line in lines])
        return
    for line in lines:
        shown = f"{instant(line.at)}  attempt {line.attempt}  {line.level}  {line.message}"
        session.output.text(shown)


@command(group, "result")
async def show_result(
    session: Session,
    queue: QueueName,
    job_id: JobId,
    wait: Annotated[bool, typer.Option("--wait", "-w", help="Wait until the job ends.")] = False,
    max_wait: Annotated[
        str | None, typer.Option("--max-wait", metavar="TIME", help="Wait no longer, as in 30s.")
    ] = None,
) -> None:
    """Print the result of a job as JSON.

    If it did not complete, print its error and exit with 1.
    """
    seconds = parse_duration(max_wait)
    patience = seconds if wait or seconds is not None else 0.0
    session.output.json(await session.queue(queue).wait_for(job_id, patience))


# -- add and run


@command(group, "add")
async def add(
    session: Session,
    queue: QueueName,
    task: Annotated[str, typer.Argument(metavar="TASK", help="Name of the task.")],
    arguments: Arguments = None,
    kwarg: Keywords = None,
    job_id: Annotated[str | None, typer.Option("--id", help="An id of your own.")] = None,
    delay: Annotated[
        str | None, typer.Option("--delay", metavar="TIME", help="Run later: 10m, or a date.")
    ] = None,
    priority: Annotated[int, typer.Option("--priority", help="Lower runs first.")] = 5,
    retries: Annotated[int, typer.Option("--retries", min=0, help="After a failure.")] = 0,
    backoff: Annotated[
        float | None, typer.Option("--backoff", help="The n-th retry waits this ** n seconds.")
    ] = None,
    ttl: Annotated[
        str | None, typer.Option("--ttl", metavar="TIME", help="Expires if not started by then.")
    ] = None,
    run_timeout: Annotated[
        str | None, typer.Option("--run-timeout", metavar="TIME", help="Of one attempt.")
    ] = None,
    depends_on: Annotated[
        list[str] | None, typer.Option("--depends-on", metavar="ID", help="Waits for this job.")
    ] = None,
    deduplicate: Annotated[
        str | None, typer.Option("--deduplicate", metavar="KEY", help="Not while one has this key.")
    ] = None,
    wait: Annotated[bool, typer.Option("--wait", "-w", help="Print its result.")] = False,
) -> None:
    """Add a job, and print its id. Arguments after `--` may begin with a dash."""
    jobs = session.queue(queue)
    await session.backend.connect()
    now = session.backend.now()
    added = await jobs.add(
        task,
        [parse_value(text) for text in arguments or ()],
        parse_keywords(kwarg),
        retries=retries,
        ttl=parse_duration(ttl),
        backoff=backoff,
        priority=priority,
        delay=None if delay is None else parse_future(delay, now) - now,
        job_id=job_id,
        deduplication=None if deduplicate is None else {"id": deduplicate},
        depends_on=depends_on or None,
        timeout=parse_duration(run_timeout),
    )
    session.output.raw(added)
    if wait:
        session.output.json(await jobs.wait_for(added))


@command(group, "run")
async def run_here(
    session: Session,
    queue: QueueName,
    job_id: JobId,
    tasks: Annotated[
        list[str] | None,
        typer.Option("--tasks", metavar="MODULE", help="Modules with the tasks; else the setting."),
    ] = None,
) -> None:
    """Run a job here, in this process, to see what it does: the one in the queue stays as it is.

    Jobs that the task adds by `current_job()` are not added. Prints the result, or the traceback,
    with exit code 1.
    """
    job = await _find(session, queue, job_id)
    settings = session.backend.settings.model_copy(
        update={"tasks": tuple(tasks or session.backend.settings.tasks)}
    )
    here = InMemoryBackend(settings=settings)
    autodiscover_tasks(here)
    trial = Queue(queue, here, any_task=True, concurrency=1)
    kept = {name: job[name] for name in ("id", "task", "args", "kwargs", "timeout")}
    await trial.enqueue(kept)
    with _quiet():
        async with open_task_group() as group:
            await group.start(trial.run)
            ended = await _wait_for_end(trial, job_id)
            group.cancel_scope.cancel()
    if ended["status"] != "completed":
        session.output.text(str(ended.get("error_traceback") or ""))
        raise CommandFailed(str(ended["last_error"]))
    session.output.json(ended["result"])


@contextmanager
def _quiet() -> Iterator[None]:
    """Log nothing of a worker whose one job is shown anyway, unless `-v` was given."""
    library = logging.getLogger("asyncmq_nats")
    level = library.level
    if not shows_tracebacks():
        library.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        library.setLevel(level)


async def _wait_for_end(queue: Queue, job_id: str) -> dict[str, Any]:
    with suppress(JobFailed):
        await queue.wait_for(job_id)
    job = await queue.get_job(job_id)
    assert job is not None
    return job


# -- act on one or on many


async def _act(
    session: Session,
    queue: str,
    verbs: tuple[str, str],
    which: dict[str, Any],
    safeguards: dict[str, Any],
    *,
    name: str | None = None,
) -> None:
    """Do what a verb says, an action of `Queue.apply`. `name`: of the command, if it is another."""
    jobs = await require_queue(session, queue)
    selection = select(session.backend.now(), **which)
    again = f"amq job {name or verbs[0]} {queue}"
    await act_on_many(session, jobs, selection, verbs[0], verbs=verbs, again=again, **safeguards)


@command(group, "retry", audited=True)
async def retry(
    session: Session, queue: QueueName, which: ChosenJobs, safeguards: Safeguards
) -> None:
    """Run jobs again that failed, expired, were cancelled, or are delayed, with all their retries.

    A filter without --state means failed and expired jobs.
    """
    await _act(session, queue, ("retry", "retried"), which, safeguards)


@command(group, "cancel", audited=True)
async def cancel(
    session: Session, queue: QueueName, which: ChosenJobs, safeguards: Safeguards
) -> None:
    """Cancel jobs that have not ended; those that run are interrupted."""
    await _act(session, queue, ("cancel", "cancelled"), which, safeguards)


@command(group, "rm", audited=True)
async def remove(
    session: Session, queue: QueueName, which: ChosenJobs, safeguards: Safeguards
) -> None:
    """Remove jobs for good, in any state but active."""
    await _act(session, queue, ("remove", "removed"), which, safeguards, name="rm")


@command(group, "promote", audited=True)
async def promote(
    session: Session, queue: QueueName, which: ChosenDelayed, safeguards: Safeguards
) -> None:
    """Let delayed jobs run now."""
    await _act(session, queue, ("promote", "promoted"), which, safeguards)


@command(group, "reschedule", audited=True)
async def reschedule(
    session: Session,
    queue: QueueName,
    at: Annotated[str, typer.Option("--at", metavar="TIME", help="10m (from now), or a date.")],
    which: ChosenDelayed,
    safeguards: Safeguards,
) -> None:
    """Let delayed jobs run at another time."""
    jobs = await require_queue(session, queue)
    now = session.backend.now()
    run_at = parse_future(at, session.backend.now_at_most())
    selection = select(now, **which)
    if selection.where is not None:
        delayed = replace(selection.where, state="delayed")
        selection = replace(selection, where=delayed)
    await act_on_many(
        session,
        jobs,
        selection,
        partial(jobs.reschedule, run_at=run_at),
        verbs=("reschedule", "rescheduled"),
        again=f"amq job reschedule {queue} --at {moment(run_at)}",
        **safeguards,
    )


@command(group, "edit", audited=True)
async def edit(
    session: Session,
    queue: QueueName,
    which: ChosenToEdit,
    safeguards: Safeguards,
    args: ArgumentsAsJson = None,
    kwargs: Annotated[
        str | None, typer.Option("--kwargs", metavar="JSON", help="An object: all by name.")
    ] = None,
    kwarg: Keywords = None,
) -> None:
    """Change the arguments of jobs that have not started.

    Those that wait to be run can be changed while the queue is paused. `--kwarg` changes one
    argument by name, `--kwargs` replaces all.
    """
    jobs = await require_queue(session, queue)
    new_args, new_kwargs = parse_json(args, "--args", list), parse_json(kwargs, "--kwargs", dict)
    changed = parse_keywords(kwarg)
    if new_args is None and new_kwargs is None and changed is None:
        raise CommandFailed("say what to change: --args, --kwargs or --kwarg")
    selection = select(session.backend.now(), **which)
    if selection.where is not None:
        selection = replace(selection, where=_not_started(selection.where))
    refusals: list[str] = []

    async def edit_one(job_id: str) -> bool:
        by_name = new_kwargs
        if changed is not None:
            kept = (await _find(session, queue, job_id))["kwargs"] if by_name is None else by_name
            by_name = kept | changed
        await jobs.edit(job_id, args=new_args, kwargs=by_name)
        return True

    async def try_to_edit(job_id: str) -> bool:
        try:
            return await edit_one(job_id)
        except (JobNotFound, WrongState) as refusal:
            refusals.append(str(refusal))
            return False

    alone = len(selection.ids) == 1
    given = {"--args": args, "--kwargs": kwargs}
    words = [word for name, text in given.items() if text is not None for word in (name, text)]
    words += [word for pair in kwarg or () for word in ("--kwarg", pair)]
    try:
        await act_on_many(
            session,
            jobs,
            selection,
            edit_one if alone else try_to_edit,
            verbs=("edit", "edited"),
            again=f"amq job edit {queue} {shlex.join(words)}",
            **safeguards,
        )
    finally:
        if refusals:
            session.output.note(f"not edited, such as this one: {refusals[0]}")


def _not_started(where: JobFilter) -> JobFilter:
    """Return the filter, without a state those of jobs that have not started."""
    if where.state is None:
        return replace(where, state=NOT_STARTED)
    if useless := [state for state in where.states if state not in NOT_STARTED]:
        raise CommandFailed(f"edit is for jobs that are {', '.join(NOT_STARTED)}, not {useless[0]}")
    return where
