"""`events`: what happens to jobs, live."""

from collections.abc import Sequence
from contextlib import aclosing
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from typing import Annotated, Any, Final

import anyio
import typer
from anyio.streams.memory import MemoryObjectSendStream

from asyncmq_nats import Event, Queue, list_queues
from asyncmq_nats._concurrency import open_task_group
from asyncmq_nats.cli.command import AsJson, CommandFailed, Session, complete_queues
from asyncmq_nats.cli.output import STYLES, duration
from asyncmq_nats.events import ANNOUNCED, PREFIX
from asyncmq_nats.states import OUTCOMES

__all__ = ["follow"]

EVENT_BUFFER: Final = 1000
TYPES: Final = ("waiting", "delayed", "waiting-children", "retrying", *OUTCOMES, *ANNOUNCED)


async def follow(
    session: Session,
    queues: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[QUEUE]...", help="By default all.", autocompletion=complete_queues
        ),
    ] = None,
    kind: Annotated[
        list[str] | None,
        typer.Option("--type", metavar="NAME", help=f"Only these: {', '.join(TYPES)}."),
    ] = None,
    job: Annotated[str | None, typer.Option("--job", metavar="ID", help="Of one job.")] = None,
    task: Annotated[
        str | None, typer.Option("--task", metavar="NAME", help="Of this task; * and ? match.")
    ] = None,
    count: Annotated[
        int | None, typer.Option("--count", min=1, help="Stop after this many events.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Follow what happens to jobs, live: a line for each event; with --json one object a line.

    Events are sent at most once: those of a time without a connection are lost.
    """
    for name in kind or ():
        if name not in TYPES:
            raise CommandFailed(f"{name!r} is no type of event: use {', '.join(TYPES)}")
    names = list(queues or await list_queues(session.backend))
    if not names:
        raise CommandFailed("there is no queue yet: name the one whose events you want")
    left = count
    send, receive = anyio.create_memory_object_stream[Event](EVENT_BUFFER)
    async with open_task_group() as group, send, receive:
        for name in names:
            group.start_soon(_read, session.queue(name), kind or (), send)
        async for event in receive:
            if job in (None, event.job_id) and _is_of_task(event, task):
                _print(session, event, as_json=as_json)
                left = None if left is None else left - 1
            if left == 0:
                break
        group.cancel_scope.cancel()


async def _read(queue: Queue, kinds: Sequence[str], to: MemoryObjectSendStream[Event]) -> None:
    async with aclosing(queue.events(*(PREFIX + kind for kind in kinds))) as events:
        async for event in events:
            await to.send(event)


def _is_of_task(event: Event, task: str | None) -> bool:
    return task is None or fnmatchcase(str(event.data.get("task", "")), task)


def _print(session: Session, event: Event, *, as_json: bool) -> None:
    if as_json:
        session.output.json_line(
            {"event": event.name, "queue": event.queue, "id": event.job_id, "data": event.data}
        )
        return
    what = event.name.removeprefix(PREFIX)
    clock = datetime.now(UTC).strftime("%H:%M:%S.%f")[:-3]
    text = f"{clock} {event.queue} {what:<10} {event.job_id} {event.data.get('task', '')}"
    session.output.line(f"{text} {_note(event.data)}".rstrip(), STYLES.get(what, ""))


def _note(data: dict[str, Any]) -> str:
    """Return the details of an event for a person."""
    if data.get("last_error"):
        return str(data["last_error"])
    if data.get("progress") is not None:
        return f"{data['progress']:.0%}"
    started, ended = data.get("active_since"), data.get("finished_at")
    if isinstance(started, float) and isinstance(ended, float):
        return f"took {duration(ended - started)}"
    return ""
