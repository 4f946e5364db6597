"""`flow`: jobs that depend on each other, as a tree."""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Annotated, Any, Final, NamedTuple

import typer
from rich.text import Text

from asyncmq_nats import JobNotFound
from asyncmq_nats._logging import escape_controls
from asyncmq_nats.cli.command import AsJson, QueueName, Session, command, make_group, require_queue
from asyncmq_nats.cli.output import STYLES

__all__ = ["group"]

group = make_group("flow", "Jobs that depend on each other.")


class Guides(NamedTuple):
    """The characters that draw a tree."""

    fork: str
    last: str
    line: str
    space: str


GUIDES: Final = Guides("├── ", "└── ", "│   ", "    ")
ASCII_GUIDES: Final = Guides("+-- ", "`-- ", "|   ", "    ")


@command(group, "show")
async def show(
    session: Session,
    queue: QueueName,
    job_id: Annotated[str, typer.Argument(metavar="ID", help="Id of the job.")],
    limit: Annotated[int, typer.Option("--limit", min=1, help="How many jobs at most.")] = 1000,
    as_json: AsJson = False,
) -> None:
    """Show a job as a tree: below each job are those that it waits for."""
    flow = await (await require_queue(session, queue)).get_flow(job_id, limit=limit)
    if flow is None:
        raise JobNotFound(queue, job_id)
    if as_json:
        session.output.json(asdict(flow))
        return
    guides = ASCII_GUIDES if session.output.console.options.ascii_only else GUIDES
    for before, shown in _rows(job_id, flow.jobs, guides):
        label = _label(shown, flow.jobs[shown])
        session.output.console.print(Text.assemble(before, label), soft_wrap=True)
    if flow.awaited_by:
        session.output.line("waited for by: " + ", ".join(flow.awaited_by))
    if not flow.complete:
        session.output.note(f"the first {limit:,} jobs; --limit shows more")


def _label(job_id: str, job: dict[str, Any] | None) -> Text:
    name = escape_controls(job_id)
    if job is None:
        return Text.assemble(name, "  ", ("not there any more", "dim"))
    task, state = escape_controls(job["task"]), job["status"]
    return Text.assemble(name, "  ", task, "  ", (state, STYLES.get(state, "")))


def _rows(
    job_id: str, jobs: dict[str, dict[str, Any] | None], guides: Guides
) -> Iterator[tuple[str, str]]:
    """Yield the guides before each job, and its id. What a job waits for is shown once.

    Not `rich.tree`: it recurses, and leaves out what is too deep for the terminal.
    """
    shown: set[str] = set()
    ahead = [("", "", job_id)]
    while ahead:
        before, below, at = ahead.pop()
        yield before, at
        job = jobs[at]
        if job is None or at in shown:
            continue
        shown.add(at)
        parents = [parent for parent in dict.fromkeys(job["depends_on"]) if parent in jobs]
        last = len(parents) - 1
        rows = [
            (below + guides.last, below + guides.space, parent)
            if number == last
            else (below + guides.fork, below + guides.line, parent)
            for number, parent in enumerate(parents)
        ]
        ahead += reversed(rows)
