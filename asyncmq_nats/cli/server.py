"""`server`: a nats-server with JetStream in the foreground, for development and single machines."""

import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Final

import anyio
import typer
from anyio.abc import TaskStatus

from asyncmq_nats import NATSBackend
from asyncmq_nats._concurrency import open_task_group
from asyncmq_nats.cli.command import CommandFailed, Session
from asyncmq_nats.cli.program import program

__all__ = ["register"]

CHECK_INTERVAL: Final = 0.5


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    program(app, "server")(server)


def server(
    session: Session,
    store: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Where the jobs are kept; without it they go at the end."),
    ] = None,
    port: Annotated[int, typer.Option(help="Port on 127.0.0.1; -1 takes a free one.")] = 4222,
) -> None:
    """Run a nats-server on this machine until SIGTERM or Ctrl-C (extra `embedded`).

    It prints the address for clients, with its token, which allows everything.
    """
    if port != -1 and not 1 <= port <= 65535:
        raise CommandFailed(f"a port is a number from 1 to 65535, or -1 for a free one, not {port}")
    backend = NATSBackend.embedded(store, port=port)
    kept = f"keeps the jobs in {store}" if store else "forgets the jobs when it ends"

    def announce() -> None:
        session.output.raw(f"export NATS_URL={backend.url}")
        sys.stdout.flush()
        session.output.note(f"nats-server runs as {backend.server_pid} and {kept}")

    if not anyio.run(_serve, backend, announce):
        raise CommandFailed("the nats-server has ended by itself: its log says why")


async def _serve(backend: NATSBackend, announce: Callable[[], None]) -> bool:
    """Wait for a signal. Return `False` if the server has ended before."""
    stopped = False
    async with open_task_group() as group:

        async def stop_on_signal(*, task_status: TaskStatus[None]) -> None:
            nonlocal stopped
            with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
                task_status.started()
                async for _ in signals:
                    stopped = True
                    group.cancel_scope.cancel()

        await group.start(stop_on_signal)
        announce()
        while backend.server_pid is not None:  # noqa: ASYNC110  the system has no event for it
            await anyio.sleep(CHECK_INTERVAL)
        group.cancel_scope.cancel()
    await backend.close()
    return stopped
