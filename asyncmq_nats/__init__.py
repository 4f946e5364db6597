"""A job queue with the API of AsyncMQ's `Queue`, on NATS JetStream.

No Redis, no Postgres, no second broker.
"""

from typing import TYPE_CHECKING, Any

from asyncmq_nats._concurrency import deadline
from asyncmq_nats._version import __version__
from asyncmq_nats.backends import default_backend, set_default_backend
from asyncmq_nats.backends.inmemory import InMemoryBackend
from asyncmq_nats.calls import Call
from asyncmq_nats.context import JobContext, current_job
from asyncmq_nats.events import Event, event_emitter
from asyncmq_nats.exceptions import (
    AsyncMQError,
    BulkAddFailed,
    Expired,
    Fail,
    InvalidArgument,
    JobFailed,
    JobNotFound,
    NotSerializable,
    PayloadTooLarge,
    Reject,
    Retry,
    Snooze,
    TaskTimeout,
    Unconfirmed,
)
from asyncmq_nats.flow import FlowProducer
from asyncmq_nats.handles import JobHandle
from asyncmq_nats.jobs import Backoff, Job
from asyncmq_nats.middleware import Middleware, add_middleware
from asyncmq_nats.queues import Queue, list_queues
from asyncmq_nats.search import JobFilter
from asyncmq_nats.settings import Settings, settings
from asyncmq_nats.states import State
from asyncmq_nats.tasks import task
from asyncmq_nats.workers import Worker, list_workers, run_worker, stop_worker

if TYPE_CHECKING:
    from asyncmq_nats.backends.nats.backend import NATSBackend

__all__ = [
    "AsyncMQError",
    "Backoff",
    "BulkAddFailed",
    "Call",
    "Event",
    "Expired",
    "Fail",
    "FlowProducer",
    "InMemoryBackend",
    "InvalidArgument",
    "Job",
    "JobContext",
    "JobFailed",
    "JobFilter",
    "JobHandle",
    "JobNotFound",
    "Middleware",
    "NATSBackend",
    "NotSerializable",
    "PayloadTooLarge",
    "Queue",
    "Reject",
    "Retry",
    "Settings",
    "Snooze",
    "State",
    "TaskTimeout",
    "Unconfirmed",
    "Worker",
    "__version__",
    "add_middleware",
    "current_job",
    "deadline",
    "default_backend",
    "event_emitter",
    "list_queues",
    "list_workers",
    "run_worker",
    "set_default_backend",
    "settings",
    "stop_worker",
    "task",
]


def __getattr__(name: str) -> Any:
    if (
        name == "NATSBackend"
    ):  # loaded when used: a user of the in-memory backend needs no nats-py loaded
        from asyncmq_nats.backends.nats.backend import NATSBackend

        return NATSBackend
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
