"""`manage.py asyncmq_outbox_relay`: publish the outbox of one of Django's databases."""

import signal
from argparse import ArgumentParser
from typing import Any

import anyio
from django.core.management.base import BaseCommand, CommandError

from asyncmq_nats import AsyncMQError, default_backend
from asyncmq_nats._concurrency import open_task_group

__all__ = ["Command"]


class Command(BaseCommand):
    """The command."""

    help = "Publishes the jobs in the outbox until SIGINT or SIGTERM. Any number of relays may run."

    def add_arguments(self, parser: ArgumentParser) -> None:
        """Say what the command takes."""
        parser.add_argument("--database", default="default", help="an alias of DATABASES")
        parser.add_argument("--batch-size", type=int, default=500)
        parser.add_argument("--poll-interval", type=float, default=1.0)
        parser.add_argument("--lease", type=float, default=10.0)

    def handle(self, *_: Any, **options: Any) -> None:
        """Run the relay."""
        try:
            from asyncmq_nats.contrib.django.address import database_url
            from asyncmq_nats.contrib.outbox.relay import Relay
        except ImportError as error:
            raise CommandError(
                f"the relay needs {error.name}: pip install 'asyncmq-nats[outbox]'"
            ) from None
        try:
            relay = Relay(
                database_url(options["database"]),
                batch_size=options["batch_size"],
                poll_interval=options["poll_interval"],
                lease=options["lease"],
            )
        except AsyncMQError as error:
            raise CommandError(str(error)) from error
        anyio.run(self._run, relay)

    async def _run(self, relay: Any) -> None:
        try:
            async with open_task_group() as tasks:
                with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
                    await tasks.start(relay.run)
                    self.stderr.write(f"relay {relay.id} publishes rows")
                    async for _ in signals:
                        break
                tasks.cancel_scope.cancel()
        finally:
            with anyio.CancelScope(shield=True):
                await default_backend().close()
