"""One action on many jobs: count, confirm, act with progress, go on after an interruption."""

import shlex
from collections.abc import Awaitable, Callable
from dataclasses import replace
from datetime import UTC, datetime
from typing import Annotated, Any

import typer

from asyncmq_nats import Queue
from asyncmq_nats.cli.command import CommandFailed, DryRun, Force, Options, Session, confirm
from asyncmq_nats.cli.output import number
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
    again: str = "",
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
        again: the command that goes on after an interruption, without its filter.

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
        session.output.line(f"{number(counted.matched)} jobs match; nothing was done")
        return
    confirm(f"{act} {number(counted.matched)} jobs of queue {queue.name}?", force=force)
    where = replace(selection.where, until=counted.until)
    done: list[int] = [0]

    def note(count: int) -> None:
        done[0] = count
        move(count)

    bar, move = session.output.progress(counted.matched, acted)
    try:
        with bar:
            result = await queue.apply(where, action, limit=limit, progress=note)
    except BaseException:  # interrupted, or the connection is lost: told, and raised again
        if again:
            _tell_how_to_go_on(session, selection, counted.until, done[0], counted.matched, again)
        raise
    session.count = result.done
    session.output.line(f"{acted} {number(result.done)} of {number(result.matched)} jobs")


def _tell_how_to_go_on(
    session: Session, selection: Selection, until: float | None, done: int, of: int, again: str
) -> None:
    words = [*selection.words]
    if until is not None:
        moment = datetime.fromtimestamp(until, UTC).isoformat().replace("+00:00", "Z")
        words = [word for word in words if word != "--all"] + ["--until", moment]
    session.output.note(
        f"stopped after {number(done)} of {number(of)} jobs; to go on: {again} {shlex.join(words)}"
    )


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
        session.output.line(f"would {verbs[0]} {number(len(set(selection.ids)))} jobs")
        return
    result = await queue.apply(selection.ids, action)
    session.count = result.done
    text = f"{verbs[1]} {number(result.done)} of {number(result.matched)} jobs"
    if result.done < result.matched:
        raise CommandFailed(
            f"{text}: the others are not there, or in a state in which they cannot be {verbs[1]}"
        )
    session.output.line(text)


async def run_with_progress(
    session: Session, what: str, total: int, act: Callable[[Callable[[int], None]], Awaitable[Any]]
) -> Any:
    """Run a function that reports its progress, and show a bar."""
    bar, move = session.output.progress(total, what)
    with bar:
        return await act(move)
