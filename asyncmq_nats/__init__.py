"""A job queue with the API of AsyncMQ's `Queue`, on NATS JetStream: no Redis, no Postgres, no second broker."""

from typing import TYPE_CHECKING, Any

from asyncmq_nats._concurrency import deadline
from asyncmq_nats.backends.inmemory import InMemoryBackend
from asyncmq_nats.jobs import Job
from asyncmq_nats.queues import Queue
from asyncmq_nats.settings import Settings, settings
from asyncmq_nats.states import State
from asyncmq_nats.tasks import task
from asyncmq_nats.workers import Worker

if TYPE_CHECKING:
    from asyncmq_nats.backends.nats.backend import NATSBackend

__all__ = [
    "InMemoryBackend",
    "Job",
    "NATSBackend",
    "Queue",
    "Settings",
    "State",
    "Worker",
    "__version__",
    "deadline",
    "settings",
    "task",
]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if (
        name == "NATSBackend"
    ):  # loaded when used: a user of the in-memory backend needs no nats-py loaded
        from asyncmq_nats.backends.nats.backend import NATSBackend

        return NATSBackend
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
