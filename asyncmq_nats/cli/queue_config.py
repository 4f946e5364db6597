"""`queue config`: the settings that a queue keeps on the server, for all its workers."""

from typing import Annotated

import typer

from asyncmq_nats.cli.command import (
    AsJson,
    CommandFailed,
    QueueName,
    Session,
    command,
    make_group,
    require_queue,
)

__all__ = ["group"]

group = make_group("config", "Settings that a queue keeps on the server, for all its workers.")


@command(group, "get")
async def get(session: Session, queue: QueueName, as_json: AsJson = False) -> None:
    """Show the stored settings, and how the server differs from the settings in force."""
    found = await require_queue(session, queue)
    stored, drift = await found.get_configuration(), await found.find_drift()
    if as_json:
        rows = [
            {
                "asset": each.asset,
                "key": each.key,
                "found": each.found,
                "wanted": each.wanted,
                "can_change": each.can_change,
            }
            for each in drift
        ]
        session.output.json({"stored": stored, "drift": rows})
        return
    session.output.fields({name: _shown(value) for name, value in stored.items()})
    if not stored:
        session.output.note("nothing is stored: the settings are those of each process")
    for each in drift:
        session.output.note(
            f"{each.asset}: {each.key} is {each.found!r}, the settings say {each.wanted!r}"
            + ("" if each.can_change else " (cannot be changed in place)")
        )


@command(group, "set", audited=True)
async def set_values(
    session: Session,
    queue: QueueName,
    values: Annotated[
        list[str],
        typer.Argument(
            metavar="NAME=VALUE...", help="As in stalled_after=60; NAME= takes it back."
        ),
    ],
) -> None:
    """Store settings, and change the server at once. Running workers follow at their heartbeat."""
    found = await require_queue(session, queue)
    reset: list[str] = []
    given: dict[str, str] = {}
    for word in values:
        name, equals, value = word.partition("=")
        if not equals:
            raise CommandFailed(f"settings are written as NAME=VALUE, not {word!r}")
        if value:
            given[name] = value
        else:
            reset.append(name)
    for each in await found.configure(reset=reset, **given):
        session.output.line(f"{each.asset}: {each.key} {each.found!r} → {each.wanted!r}")
    stored = await found.get_configuration()
    session.output.fields({name: _shown(value) for name, value in stored.items()})


def _shown(value: object) -> str:
    if isinstance(value, tuple | list):
        return ",".join(map(str, value))
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
