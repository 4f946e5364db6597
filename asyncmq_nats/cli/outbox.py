"""`outbox`: publish the jobs that an application writes into its database, and count them."""

import importlib.util
import signal
from typing import Annotated, Any, Final

import anyio
import typer

from asyncmq_nats._concurrency import open_task_group
from asyncmq_nats.cli.command import AsJson, CommandFailed, Session, command, make_group
from asyncmq_nats.cli.output import duration, number

__all__ = ["group"]

REQUIRED_MODULES: Final = ("sqlalchemy", "psycopg", "aiosqlite")

Database = Annotated[
    str,
    typer.Option(
        "--database",
        "-d",
        metavar="URL",
        envvar="OUTBOX_DATABASE",
        help="Address of the database, as in postgresql://user@host/name or sqlite:///file.",
    ),
]

group = make_group("outbox", "Jobs that an application writes into its database.")


def _make_relay(database: str, session: Session, **options: Any) -> Any:
    missing = [package for package in REQUIRED_MODULES if importlib.util.find_spec(package) is None]
    if missing:
        raise CommandFailed(
            f"the outbox needs {', '.join(missing)}: pip install 'asyncmq-nats[outbox]'"
        )
    from asyncmq_nats.contrib.outbox.relay import Relay

    return Relay(database, session.backend, **options)


@command(group, "relay")
async def relay(
    session: Session,
    database: Database,
    batch_size: Annotated[
        int, typer.Option(help="How many rows are taken at a time, at most 1000.")
    ] = 500,
    poll_interval: Annotated[
        float, typer.Option(help="How often to look for rows, in seconds.")
    ] = 1.0,
    lease: Annotated[
        float,
        typer.Option(help="After this many seconds, another relay takes the rows of a lost one."),
    ] = 10.0,
) -> None:
    """Publish the rows of an outbox until SIGINT or SIGTERM. Any number of relays may run."""
    running = _make_relay(
        database, session, batch_size=batch_size, poll_interval=poll_interval, lease=lease
    )
    async with open_task_group() as tasks:
        with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
            await tasks.start(running.run)
            session.output.note(f"relay {running.id} publishes rows")
            async for _ in signals:
                break
        tasks.cancel_scope.cancel()


@command(group, "status")
async def status(session: Session, database: Database, as_json: AsJson = False) -> None:
    """Count the rows that wait to be published, and those that no queue takes."""
    relay = _make_relay(database, session)
    try:
        counts = await relay.count()
    finally:
        await relay.close()
    if as_json:
        session.output.json(
            {"waiting": counts.waiting, "refused": counts.refused, "oldest": counts.oldest}
        )
        return
    session.output.table(
        ["#waiting", "#refused", "oldest"],
        [[number(counts.waiting), number(counts.refused), duration(counts.oldest)]],
    )
