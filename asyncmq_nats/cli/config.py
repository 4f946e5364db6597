"""`config`: what this command line, and a worker started like it, would use."""

import os
from typing import Any

from asyncmq_nats import Settings
from asyncmq_nats.cli.command import AsJson, Session, command, make_group
from asyncmq_nats.cli.connection import describe_sources
from asyncmq_nats.cli.output import plain_json

__all__ = ["group"]

group = make_group("config", "The settings that are in force here.")


@command(group, "show")
async def show(session: Session, as_json: AsJson = False) -> None:
    """Show each setting, its value, and where that comes from. Secrets are masked."""
    settings = session.backend.settings
    values = settings.model_dump(mode="json")
    sources = describe_sources(session.options, os.environ)
    if as_json:
        rows: list[dict[str, Any]] = [
            {"name": name, "value": value, "source": sources.get(name, "default")}
            for name, value in values.items()
        ]
        session.output.json(rows)
        return
    session.output.table(
        ["setting", "value", "from"],
        [
            [name, _shown(value), sources.get(name, "default")]
            for name, value in values.items()
            if name in Settings.model_fields
        ],
    )


def _shown(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, list):
        return ",".join(map(str, value))
    return value if isinstance(value, str) else plain_json(value)
