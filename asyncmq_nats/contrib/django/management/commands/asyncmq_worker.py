"""`manage.py asyncmq_worker QUEUE…`.

Run the jobs of queues, with the tasks of all installed apps.
"""

from argparse import ArgumentParser
from typing import Any

from django.core.management.base import BaseCommand, CommandError
from django.utils.module_loading import autodiscover_modules

from asyncmq_nats import AsyncMQError, Queue, Worker
from asyncmq_nats.contrib.django.database import close_old_connections_of_tasks
from asyncmq_nats.tasks import TASK_REGISTRY

__all__ = ["Command"]


class Command(BaseCommand):
    """The command."""

    help = (
        "Runs the jobs of queues until SIGINT or SIGTERM, with the tasks in tasks.py of each app."
    )

    def add_arguments(self, parser: ArgumentParser) -> None:
        """Say what the command takes."""
        parser.add_argument("queues", nargs="+", metavar="QUEUE", help="names of queues")
        parser.add_argument(
            "--concurrency", type=int, default=None, help="how many jobs run at a time; default: 3"
        )
        parser.add_argument("--processes", type=int, default=1, help="worker processes; default: 1")
        parser.add_argument("--burst", action="store_true", help="end when no job is left to run")

    def handle(self, *_: Any, **options: Any) -> None:
        """Run the worker."""
        autodiscover_modules("tasks")
        close_old_connections_of_tasks(TASK_REGISTRY)
        try:
            Worker(
                [Queue(name) for name in options["queues"]],
                concurrency=options["concurrency"],
                processes=options["processes"],
                burst=options["burst"],
            ).start()
        except (AsyncMQError, ValueError) as error:
            raise CommandError(str(error)) from error
