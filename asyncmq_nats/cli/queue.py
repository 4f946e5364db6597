"""`queue`: look at queues, pause them, clean up, move, save."""

from typing import Any, Final

from asyncmq_nats import list_queues
from asyncmq_nats.cli.command import AsJson, AsNames, Session, command, make_group
from asyncmq_nats.cli.output import number

__all__ = ["group"]

SHOWN_STATES: Final = ("waiting", "active", "delayed", "waiting-children", "completed", "failed")

group = make_group("queue", "Queues: look at them, pause, clean up, move, save.")


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
