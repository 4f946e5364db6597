"""`queue`: look at queues, pause them, clean up, move, save."""

import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Final

import anyio
import typer
from pydantic_core import from_json
from rich.live import Live

from asyncmq_nats import JobFilter, Queue, list_queues, list_workers
from asyncmq_nats.cli.command import (
    AsJson,
    AsNames,
    CommandFailed,
    DryRun,
    Force,
    QueueName,
    Session,
    command,
    confirm,
    make_group,
    require_queue,
)
from asyncmq_nats.cli.many import run_with_progress
from asyncmq_nats.cli.output import (
    count_jobs,
    duration,
    instant,
    make_table,
    number,
    plain_json,
    size,
)
from asyncmq_nats.cli.values import JobsToMove, parse_duration, parse_future, select
from asyncmq_nats.states import JOB_STATES, OUTCOMES

__all__ = ["group"]

SHOWN_STATES: Final = ("waiting", "active", "delayed", "waiting-children", "completed", "failed")

group = make_group("queue", "Queues: look at them, pause, clean up, move, save.")

StateOption = Annotated[str, typer.Option("--state", metavar="STATE", help="Such as completed.")]


# -- look


@command(group, "ls")
async def list_all(session: Session, as_json: AsJson = False, names: AsNames = False) -> None:
    """List the queues, with the number of jobs in each state."""
    found = await list_queues(session.backend)
    if names:
        for name in found:
            session.output.raw(name)
        return
    rows = [await _summary(session, name) for name in found]
    if as_json:
        session.output.json(rows)
        return
    session.output.table(
        ["queue", *(f"#{state}" for state in SHOWN_STATES), "state"],
        [
            [
                row["name"],
                *(number(row["counts"][state]) for state in SHOWN_STATES),
                "paused" if row["paused"] else "",
            ]
            for row in rows
        ],
    )


async def _summary(session: Session, name: str) -> dict[str, Any]:
    queue = session.queue(name)
    return {
        "name": name,
        "paused": await queue.is_paused(),
        "counts": await queue.queue_stats(),
    }


@command(group, "info")
async def show(session: Session, queue: QueueName, as_json: AsJson = False) -> None:
    """Show a queue: counts, the oldest waiting job, rates, priorities, pause, storage, workers."""
    info = await (await require_queue(session, queue)).info()
    if info is None:
        raise CommandFailed(f"there is no queue {queue!r}")
    workers = await list_workers(session.backend, queue)
    if as_json:
        session.output.json(asdict(info) | {"workers": [worker.id for worker in workers]})
        return
    paused = "no"
    if info.paused:
        paused = "yes" if info.paused_until is None else f"until {instant(info.paused_until)}"
    fields: dict[str, str] = {
        "queue": info.name,
        "paused": paused,
        **{str(state): number(info.counts[state]) for state in JOB_STATES},
        "oldest waiting": duration(info.oldest_waiting_age),
        "a minute": ", ".join(
            f"{number(round(info.ended_per_second[state] * 60))} {state}" for state in OUTCOMES
        ),
        "workers": f"{len(workers)}, with {sum(each.concurrency for each in workers)} slots",
    }
    for name, log in (("ready jobs", info.ready), ("other records", info.records)):
        if log is not None:
            limit = "" if log.max_bytes is None else f" of {size(log.max_bytes)}"
            behind = f", {log.replicas_behind} behind" if log.replicas_behind else ""
            fields[name] = (
                f"{number(log.records)} records, {size(log.bytes)}{limit}, {log.storage} storage, "
                f"{log.replicas} replica{'s' if log.replicas > 1 else ''}{behind}"
            )
    session.output.fields(fields)
    if info.tiers:
        session.output.line("")
        rows = [[str(t.priority), number(t.waiting), number(t.active)] for t in info.tiers]
        session.output.table(["#priority", "#waiting", "#active"], rows)


@command(group, "stats")
async def show_counts(
    session: Session,
    queue: QueueName,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Again and again.")] = False,
    every: Annotated[str, typer.Option("--every", metavar="TIME", help="How often.")] = "1s",
    count: Annotated[
        int | None, typer.Option("--count", min=1, help="Stop after this many lines.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show how many jobs are in each state; with --watch also how that changes each second."""
    jobs = await require_queue(session, queue)
    if not watch:
        counts = await jobs.queue_stats()
        if as_json:
            session.output.json(counts)
        else:
            rows = [[state, number(count)] for state, count in counts.items()]
            session.output.table(["state", "#jobs"], rows)
        return
    await _watch(session, jobs, parse_duration(every) or 1.0, count, as_json=as_json)


async def _watch(
    session: Session, queue: Queue, every: float, count: int | None, *, as_json: bool
) -> None:
    """Show the counts again and again: in place on a terminal, otherwise line by line."""
    before: Mapping[str, int] | None = None
    shown, at = 0, anyio.current_time()
    in_place = session.output.console.is_terminal and not as_json
    with Live(console=session.output.console, auto_refresh=False) as live:
        while count is None or shown < count:
            counts = await queue.queue_stats()
            now = anyio.current_time()
            rates = {
                state: 0.0 if before is None else (counts[state] - before[state]) / (now - at)
                for state in counts
            }
            if in_place:
                rows = [[s, number(counts[s]), f"{rates[s]:+,.1f}"] for s in counts]
                live.update(make_table(["state", "#jobs", "#a second"], rows), refresh=True)
            elif as_json:
                session.output.json_line({"counts": counts, "per_second": rates})
            else:
                words = [f"{s}={counts[s]} ({rates[s]:+.1f}/s)" for s in counts if counts[s]]
                session.output.line(" ".join(words) or "no jobs")
            before, at, shown = counts, now, shown + 1
            if count is None or shown < count:
                await anyio.sleep(every)


# -- control


@command(group, "pause", audited=True)
async def pause(
    session: Session,
    queue: QueueName,
    until: Annotated[
        str | None, typer.Option("--until", metavar="TIME", help="10m (from now), or a date.")
    ] = None,
) -> None:
    """Pause a queue: no worker starts another job of it. Running jobs go on."""
    jobs = await require_queue(session, queue)
    end = None if until is None else parse_future(until, session.backend.now_at_most())
    await jobs.pause(end)
    session.output.line(
        f"queue {queue} is paused" + ("" if end is None else f" until {instant(end)}")
    )


@command(group, "resume", audited=True)
async def resume(session: Session, queue: QueueName) -> None:
    """Let a paused queue go on."""
    await (await require_queue(session, queue)).resume()
    session.output.line(f"queue {queue} goes on")


@command(group, "drain", audited=True)
async def drain(
    session: Session,
    queue: QueueName,
    include_delayed: Annotated[
        bool, typer.Option("--include-delayed", help="Delayed jobs as well.")
    ] = False,
    force: Force = False,
    dry_run: DryRun = False,
) -> None:
    """Remove the jobs that wait to be run. Jobs that run or have ended stay."""
    jobs = await require_queue(session, queue)
    counts = await jobs.queue_stats()
    total = counts["waiting"] + (counts["delayed"] if include_delayed else 0)
    if dry_run:
        session.output.line(f"would remove {count_jobs(total)}")
        return
    confirm(f"remove {count_jobs(total)} of queue {queue}?", force=force)
    removed = await run_with_progress(
        session,
        "removed",
        total,
        lambda move: jobs.drain(include_delayed, progress=move),
    )
    session.count = len(removed)
    session.output.line(f"removed {count_jobs(len(removed))}")


@command(group, "clean", audited=True)
async def clean(
    session: Session,
    queue: QueueName,
    state: StateOption,
    grace: Annotated[
        str, typer.Option("--grace", metavar="TIME", help="Only those older than this, as in 7d.")
    ] = "0",
    limit: Annotated[int, typer.Option("--limit", min=0, help="At most; 0: all.")] = 0,
    force: Force = False,
    dry_run: DryRun = False,
) -> None:
    """Remove the jobs in a state, the oldest first."""
    jobs = await require_queue(session, queue)
    seconds = parse_duration(grace) or 0.0
    total = (await jobs.get_job_counts(state))[state]
    if dry_run:
        before = session.backend.now() - seconds
        counted = await jobs.apply(
            JobFilter(state=state, until=before), "remove", dry_run=True, limit=limit or None
        )
        session.output.line(f"would remove {count_jobs(counted.matched)}")
        return
    most = min(total, limit or total)
    confirm(f"remove up to {count_jobs(most)} ({state}) of queue {queue}?", force=force)
    removed = await run_with_progress(
        session,
        "removed",
        most,
        lambda move: jobs.clean_jobs(seconds, limit, state, progress=move),
    )
    session.count = len(removed)
    session.output.line(f"removed {count_jobs(len(removed))}")


@command(group, "obliterate", audited=True)
async def obliterate(
    session: Session,
    queue: QueueName,
    force: Annotated[
        bool, typer.Option("--force", "-f", help="Do not ask; cancel the jobs that run.")
    ] = False,
    dry_run: DryRun = False,
) -> None:
    """Remove everything of a queue: jobs in all states, schedules, windows, a pause."""
    jobs = await require_queue(session, queue)
    total = sum((await jobs.queue_stats()).values())
    schedules = len(await jobs.list_repeatables())
    what = f"{count_jobs(total)} and {number(schedules)} schedule{'' if schedules == 1 else 's'}"
    if dry_run:
        session.output.line(f"would remove {what}")
        return
    confirm(f"remove all of queue {queue}, {what}?", force=force)
    removed = await jobs.obliterate(force=force)
    session.count = len(removed)
    session.output.line(f"removed {count_jobs(len(removed))} and all else of queue {queue}")


# -- move, save, restore


@command(group, "move", audited=True)
async def move(
    session: Session,
    queue: QueueName,
    target: Annotated[str, typer.Argument(metavar="TARGET", help="Name of the other queue.")],
    which: JobsToMove,
    to_server: Annotated[
        str | None,
        typer.Option("--to-server", metavar="URL", help="The server of the other queue."),
    ] = None,
    force: Force = False,
    dry_run: DryRun = False,
) -> None:
    """Move jobs to another queue; each runs here or there, never in both.

    The queue is paused meanwhile, and goes on afterwards unless it was paused before: after a kill,
    do it again, and resume it. Jobs that run, and those of flows, stay.
    """
    jobs = await require_queue(session, queue)
    chosen = select(session.backend.now(), **which)
    assert chosen.where is not None
    other = session if to_server is None else session.elsewhere(to_server)
    counted = await jobs.move(other.queue(target), chosen.where, dry_run=True)
    if dry_run:
        session.output.line(f"would move up to {count_jobs(counted.matched)}")
        return
    text = f"move up to {count_jobs(counted.matched)} of queue {queue} to {target}?"
    confirm(text, force=force)
    was_paused = await jobs.is_paused()
    try:
        await jobs.pause()
        result = await run_with_progress(
            session,
            "moved",
            counted.matched,
            lambda told: jobs.move(other.queue(target), chosen.where, progress=told),
        )
    finally:
        with anyio.CancelScope(shield=True):
            if not was_paused:
                await jobs.resume()
            if other is not session:
                await other.close()
    session.count = result.moved
    session.output.line(f"moved {number(result.moved)} of {count_jobs(result.matched)}")


@command(group, "export")
async def export(
    session: Session,
    queue: QueueName,
    file: Annotated[
        Path | None, typer.Argument(metavar="[FILE]", help="By default stdout.")
    ] = None,
) -> None:
    """Save a queue as lines of JSON: all jobs with all that is stored of them, and the schedules.

    Pause the queue first, and let its workers finish, for an exact copy.
    """
    jobs = await require_queue(session, queue)
    count = 0
    with _opened(file, "w") as to:
        async for line in jobs.export():
            to.write(f"{plain_json(line)}\n")
            count += "job" in line
    session.output.note(f"saved {count_jobs(count)}")


@command(group, "import", audited=True)
async def restore(
    session: Session,
    queue: QueueName,
    file: Annotated[Path | None, typer.Argument(metavar="[FILE]", help="By default stdin.")] = None,
) -> None:
    """Restore what `queue export` saved, into this or another queue.

    Existing jobs stay, so it can be repeated.
    """
    with _opened(file, "r") as lines:
        given = (_parse_line(line, at) for at, line in enumerate(lines, 1) if line.strip())
        result = await session.queue(queue).import_jobs(given)
    were = "was" if result.existing == 1 else "were"
    text = f"added {count_jobs(result.added)}; {number(result.existing)} {were} there already"
    session.output.line(text)


def _opened(file: Path | None, mode: str) -> AbstractContextManager[Any]:
    """Open a file, or stdin or stdout without one.

    It blocks: a command does nothing else meanwhile.
    """
    if file is None:
        return nullcontext(sys.stdin if mode == "r" else sys.stdout)
    return open(file, mode, encoding="utf-8")


def _parse_line(line: str, number_of_line: int) -> Any:
    try:
        return from_json(line)
    except ValueError as error:
        raise CommandFailed(f"line {number_of_line} is no JSON: {error}") from None
