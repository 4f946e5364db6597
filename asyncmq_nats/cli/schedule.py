"""`schedule`: repeated jobs (repeatables): look at them, add, change, pause, run one now."""

from typing import Annotated, Any, Final

import cron_descriptor
import typer
from cron_descriptor import CasingTypeEnum, FormatError, get_description

from asyncmq_nats import Queue
from asyncmq_nats.cli.command import (
    AsJson,
    AsNames,
    CommandFailed,
    Options,
    QueueName,
    Session,
    command,
    make_group,
    require_queue,
)
from asyncmq_nats.cli.output import duration, instant, interval, plain_json
from asyncmq_nats.cli.values import (
    Arguments,
    ArgumentsAsJson,
    Keywords,
    parse_duration,
    parse_future,
    parse_json,
    parse_keywords,
    parse_value,
)
from asyncmq_nats.schedules import RepeatableInfo, upcoming_runs

__all__ = ["group"]

group = make_group("schedule", "Repeated jobs: look at them, add, change, pause, run one now.")

ScheduleName = Annotated[
    str, typer.Argument(metavar="NAME", help="Its name, or the id that `ls` shows.")
]
Every = Annotated[
    str | None, typer.Option("--every", metavar="TIME", help="An interval, as in 5m.")
]
Cron = Annotated[
    str | None,
    typer.Option("--cron", metavar="EXPR", help="Five fields, or six with seconds last."),
]
Timezone = Annotated[
    str | None, typer.Option("--timezone", metavar="NAME", help="Of --cron; an IANA name.")
]
Start = Annotated[
    str | None,
    typer.Option("--start", metavar="TIME", help="Not before: 2h (from now), or a date."),
]
End = Annotated[str | None, typer.Option("--end", metavar="TIME", help="Not after.")]
RunLimit = Annotated[int | None, typer.Option("--runs", min=1, help="How many runs at most.")]
Jitter = Annotated[
    str | None, typer.Option("--jitter", metavar="TIME", help="Each run is later by chance.")
]
Overlap = Annotated[
    str | None, typer.Option("--overlap", help="`skip`: not while the last one has not ended.")
]
CatchUp = Annotated[
    str | None, typer.Option("--catch-up", help="Of missed runs: one, all or none.")
]
Priority = Annotated[int | None, typer.Option("--priority", help="Lower runs first.")]
Retries = Annotated[int | None, typer.Option("--retries", min=0, help="After a failure.")]
Rhythm = Annotated[
    dict[str, Any],
    Options(
        every=Every,
        cron=Cron,
        timezone=Timezone,
        start=Start,
        end=End,
        runs=RunLimit,
        jitter=Jitter,
        overlap=Overlap,
        catch_up=CatchUp,
        priority=Priority,
        retries=Retries,
    ),
]

ENGLISH: Final = cron_descriptor.Options()
ENGLISH.use_24hour_time_format = True
ENGLISH.casing_type = CasingTypeEnum.Sentence


def describe(job_def: dict[str, Any]) -> str:
    """Return a rhythm in words: `every 5m`, or what a cron expression means."""
    cron = job_def.get("cron")
    if cron is None:
        return f"Every {interval(job_def['every'])}"
    zone = job_def.get("timezone") or "UTC"
    return f"{describe_cron(cron)} ({zone})"


def describe_cron(cron: str) -> str:
    """Return a cron expression in words, or as it is if there are none for it."""
    fields = cron.split()
    if len(fields) == 6:  # seconds come last with us, and first in the descriptor
        fields = [fields[5], *fields[:5]]
    try:
        return str(get_description(" ".join(fields), ENGLISH))
    except (FormatError, ValueError, IndexError):
        return cron


# -- look


@command(group, "ls")
async def list_all(
    session: Session, queue: QueueName, as_json: AsJson = False, names: AsNames = False
) -> None:
    """List the schedules of a queue, in words, with their next runs."""
    found = await (await require_queue(session, queue)).list_repeatables()
    if as_json:
        session.output.json([_as_dict(info) for info in found])
    elif names:
        for info in found:
            session.output.raw(info.job_def["id"])
    else:
        session.output.table(
            ["name", "task", "rhythm", "next run", "state"],
            [
                [
                    info.job_def["id"],
                    info.job_def["task_id"],
                    describe(info.job_def),
                    instant(info.next_run),
                    _state(info),
                ]
                for info in found
            ],
        )


def _as_dict(info: RepeatableInfo) -> dict[str, Any]:
    return info.job_def | {
        "words": describe(info.job_def),
        "next_run": info.next_run,
        "paused": info.paused,
        "runs": info.runs,
        "last_run": info.last_run,
        "last_job": info.last_job,
    }


def _state(info: RepeatableInfo) -> str:
    if info.paused:
        return "paused"
    return "ended" if info.next_run is None else ""


@command(group, "info")
async def show(
    session: Session, queue: QueueName, name: ScheduleName, as_json: AsJson = False
) -> None:
    """Show a schedule: its task and arguments, its rhythm in words, its next run."""
    _, info = await _open(session, queue, name)
    if as_json:
        session.output.json(_as_dict(info))
        return
    texts = {
        key: value if isinstance(value, str) else plain_json(value)
        for key, value in info.job_def.items()
        if value is not None
    }
    texts |= {key: instant(info.job_def[key]) for key in ("start", "end") if key in info.job_def}
    texts |= {"rhythm": describe(info.job_def), "next run": instant(info.next_run)}
    if info.last_job is not None:
        texts |= {"last run": instant(info.last_run), "last job": info.last_job}
    session.output.fields(texts | ({"state": _state(info)} if _state(info) else {}))


async def _open(session: Session, queue: str, name: str) -> tuple[Queue, RepeatableInfo]:
    """Return a queue and one of its schedules; both must exist."""
    found = await require_queue(session, queue)
    return found, await _find(found, name)


async def _find(queue: Queue, name: str) -> RepeatableInfo:
    found = await queue.list_repeatables()
    for info in found:
        if name in (info.job_def["id"], info.job_def["name"]):
            return info
    known = ", ".join(info.job_def["id"] for info in found[:10]) or "none"
    raise CommandFailed(f"queue {queue.name!r} has no schedule {name!r} (there: {known})")


@command(group, "next")
async def show_next(
    session: Session,
    queue: QueueName,
    name: ScheduleName,
    count: Annotated[int, typer.Option("--count", min=1, help="How many runs.")] = 10,
    as_json: AsJson = False,
) -> None:
    """Show when a schedule runs next, in UTC. A jitter comes on top."""
    _, info = await _open(session, queue, name)
    runs = upcoming_runs(info, count, session.backend.now())
    if as_json:
        session.output.json(runs)
        return
    now = session.backend.now()
    session.output.table(
        ["run", "in"], [[instant(at), duration(max(0.0, at - now))] for at in runs]
    )


# -- change


@command(group, "add", audited=True)
async def add(
    session: Session,
    queue: QueueName,
    name: Annotated[str, typer.Argument(metavar="NAME", help="What it is known by.")],
    task: Annotated[str, typer.Argument(metavar="TASK", help="Name of the task.")],
    arguments: Arguments = None,
    kwarg: Keywords = None,
    *,
    options: Rhythm,
) -> None:
    """Add a schedule: a job that is added again and again, by --every or by --cron."""
    await session.backend.connect()
    jobs = session.queue(queue)
    if any(name == info.job_def["name"] for info in await jobs.list_repeatables()):
        raise CommandFailed(f"there is a schedule {name!r}: `schedule edit` changes it")
    given = _given(session.backend.now(), options)
    args = [parse_value(text) for text in arguments or ()]
    await jobs.upsert_repeatable(task, args=args, kwargs=parse_keywords(kwarg), name=name, **given)
    info = await _find(jobs, name)
    session.output.line(f"{name}: {describe(info.job_def)}, next run {instant(info.next_run)}")


def _given(now: float, options: dict[str, Any]) -> dict[str, Any]:
    """Return the options that were given, as `Queue.upsert_repeatable` takes them."""
    found = {name: value for name, value in options.items() if value is not None}
    for name in ("start", "end"):
        if name in found:
            found[name] = parse_future(found[name], now)
    if "jitter" in found:
        found["jitter"] = parse_duration(found["jitter"])
    if "runs" in found:
        found["limit"] = found.pop("runs")
    return found


@command(group, "edit", audited=True)
async def edit(
    session: Session,
    queue: QueueName,
    name: ScheduleName,
    args: ArgumentsAsJson = None,
    kwarg: Keywords = None,
    *,
    options: Rhythm,
) -> None:
    """Change a schedule that has a name; what is not given stays.

    A pause goes on. A schedule that code declares is changed back when a worker with that code
    starts.
    """
    jobs, info = await _open(session, queue, name)
    if info.job_def["name"] is None:
        raise CommandFailed("a schedule without a name is what it says: remove it, and add another")
    kept = {key: value for key, value in info.job_def.items() if key != "id"}
    changes = _given(session.backend.now(), options)
    if args is not None:
        changes["args"] = parse_json(args, "--args", list)
    if kwarg:
        changes["kwargs"] = kept["kwargs"] | (parse_keywords(kwarg) or {})
    if not changes:
        raise CommandFailed("say what to change, such as --cron or --every")
    if "cron" in changes:
        kept.pop("every", None)
    if "every" in changes:
        for key in ("cron", "timezone"):
            kept.pop(key, None)
    await jobs.upsert_repeatable(**kept | changes)
    info = await _find(jobs, name)
    session.output.line(f"{name}: {describe(info.job_def)}, next run {instant(info.next_run)}")


@command(group, "rm", audited=True)
async def remove(session: Session, queue: QueueName, name: ScheduleName) -> None:
    """Remove a schedule. The jobs that it has added stay."""
    jobs, info = await _open(session, queue, name)
    await jobs.remove_repeatable(info.job_def["id"])
    session.output.line(f"schedule {name} is removed")


@command(group, "pause", audited=True)
async def pause(session: Session, queue: QueueName, name: ScheduleName) -> None:
    """Let a schedule add no more jobs."""
    jobs, info = await _open(session, queue, name)
    await jobs.pause_repeatable(info.job_def["id"])
    session.output.line(f"schedule {name} is paused")


@command(group, "resume", audited=True)
async def resume(session: Session, queue: QueueName, name: ScheduleName) -> None:
    """Let a paused schedule go on."""
    jobs, info = await _open(session, queue, name)
    at = await jobs.resume_repeatable(info.job_def["id"])
    session.output.line(f"schedule {name} goes on, next run {instant(at)}")


@command(group, "run-now", audited=True)
async def run_now(session: Session, queue: QueueName, name: ScheduleName) -> None:
    """Add one job of a schedule now, beside its series, and print its id."""
    jobs, info = await _open(session, queue, name)
    session.output.raw(await jobs.run_repeatable(info.job_def["id"]))
