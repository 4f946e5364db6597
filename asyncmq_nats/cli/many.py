"""One action on many jobs: count, confirm, act with progress, go on after an interruption."""

import shlex
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Annotated, Any

import typer

from asyncmq_nats import Queue
from asyncmq_nats.cli.command import CommandFailed, DryRun, Force, Options, Session, confirm
from asyncmq_nats.cli.output import count_jobs, moment, number
from asyncmq_nats.cli.values import Selection

__all__ = ["Safeguards", "act_on_many", "run_with_progress"]

Act = Callable[[str], Awaitable[bool]]
Limit = Annotated[int | None, typer.Option("--limit", min=1, help="How many jobs at most.")]
Safeguards = Annotated[dict[str, Any], Options(limit=Limit, force=Force, dry_run=DryRun)]
"""The options of a command that acts on many jobs: `act_on_many` takes them."""


async def act_on_many(
    session: Session,
    queue: Queue,
    selection: Selection,
    action: str | Act,
    *,
    verbs: tuple[str, str],
    force: bool,
    dry_run: bool,
    limit: int | None = None,
    again: str,
) -> None:
    """Apply an action to the selected jobs, after a count and a confirmation.

    Args:
        session: of the command.
        queue: that the jobs are in.
        selection: the jobs.
        action: of `Queue.apply`.
        verbs: the verb and its participle, such as `("retry", "retried")`.
        force: do not ask.
        dry_run: only tell the count.
        limit: how many jobs at most.
        again: the command that goes on after an interruption, without its filter and limit.

    Raises:
        CommandFailed: the answer was no; or of the ids that were given, some were not acted on.
    """
    act, acted = verbs
    if selection.where is None:
        await _act_on_ids(session, queue, selection, action, verbs, dry_run=dry_run)
        return
    # Jobs that reach the state after this count are left alone.
    counted = await queue.apply(selection.where, action, dry_run=True, limit=limit)
    if dry_run or not counted.matched:
        match = "matches" if counted.matched == 1 else "match"
        session.output.line(f"{count_jobs(counted.matched)} {match}; nothing was done")
        return
    confirm(f"{act} {count_jobs(counted.matched)} of queue {queue.name}?", force=force)
    where = replace(selection.where, until=counted.until)
    done = [0]

    def note(count: int) -> None:
        done[0] = count
        move(count)

    bar, move = session.output.progress(counted.matched, acted)
    try:
        with bar:
            result = await queue.apply(where, action, limit=limit, progress=note)
    except BaseException:  # interrupted, or the connection is lost: told, and raised again
        if limit != done[0]:
            left = [] if limit is None else ["--limit", str(limit - done[0])]
            words = shlex.join([*_words_until(selection, counted.until), *left])
            so_far = f"stopped after {number(done[0])} of {count_jobs(counted.matched)}"
            session.output.note(f"{so_far}; to go on: {again} {words}")
        raise
    session.count = result.done
    session.output.line(f"{acted} {number(result.done)} of {count_jobs(result.matched)}")


def _words_until(selection: Selection, until: float | None) -> list[str]:
    """Return the options of a filter, and the time before which its jobs reached their state."""
    if until is None:
        return list(selection.words)
    return [word for word in selection.words if word != "--all"] + ["--until", moment(until)]


async def _act_on_ids(
    session: Session,
    queue: Queue,
    selection: Selection,
    action: str | Act,
    verbs: tuple[str, str],
    *,
    dry_run: bool,
) -> None:
    if dry_run:
        session.output.line(f"would {verbs[0]} {count_jobs(len(set(selection.ids)))}")
        return
    result = await queue.apply(selection.ids, action)
    session.count = result.done
    text = f"{verbs[1]} {number(result.done)} of {count_jobs(result.matched)}"
    if result.done < result.matched:
        others = "it is" if result.matched == 1 else "the others are"
        raise CommandFailed(f"{text}: {others} not there, or cannot be {verbs[1]} in that state")
    session.output.line(text)


async def run_with_progress(
    session: Session, what: str, total: int, act: Callable[[Callable[[int], None]], Awaitable[Any]]
) -> Any:
    """Run a function that reports its progress, and show a bar."""
    bar, move = session.output.progress(total, what)
    with bar:
        return await act(move)
