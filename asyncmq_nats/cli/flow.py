"""`flow`: jobs that depend on each other, as a tree."""

from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.text import Text
from rich.tree import Tree

from asyncmq_nats import JobNotFound
from asyncmq_nats.cli.command import AsJson, QueueName, Session, command, make_group, require_queue
from asyncmq_nats.cli.output import STYLES

__all__ = ["group"]

group = make_group("flow", "Jobs that depend on each other.")


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
    tree = Tree(_label(job_id, flow.jobs[job_id]))
    _grow(tree, job_id, flow.jobs, {job_id})
    session.output.console.print(tree)
    if flow.awaited_by:
        session.output.line("waited for by: " + ", ".join(flow.awaited_by))
    if not flow.complete:
        session.output.note(f"the first {limit:,} jobs; --limit shows more")


def _label(job_id: str, job: dict[str, Any] | None) -> Text:
    if job is None:
        return Text.assemble(job_id, "  ", ("not there any more", "dim"))
    state = job["status"]
    return Text.assemble(job_id, "  ", job["task"], "  ", (state, STYLES.get(state, "")))


def _grow(tree: Tree, job_id: str, jobs: dict[str, dict[str, Any] | None], shown: set[str]) -> None:
    """Add what a job waits for; a job that several wait for has its own only the first time."""
    job = jobs.get(job_id)
    for parent in dict.fromkeys(job["depends_on"] if job is not None else ()):
        if parent not in jobs:
            continue
        branch = tree.add(_label(parent, jobs[parent]))
        if parent not in shown:
            shown.add(parent)
            _grow(branch, parent, jobs, shown)
