"""Tests of applications.

A backend in memory with a virtual clock, and assertions (docs/testing.md). Nothing of it is used by
a worker in production. The pytest fixtures are in `pytest_plugin`.
"""

from asyncmq_nats.testing.assertions import (
    EnqueuedJob,
    assert_enqueued,
    enqueued,
    refute_enqueued,
)
from asyncmq_nats.testing.backend import VirtualBackend, virtual_backend, worker
from asyncmq_nats.testing.clock import VirtualClock
from asyncmq_nats.testing.running import RunningJob, job_context, run_task
from asyncmq_nats.testing.server import private_server

__all__ = [
    "EnqueuedJob",
    "RunningJob",
    "VirtualBackend",
    "VirtualClock",
    "assert_enqueued",
    "enqueued",
    "job_context",
    "private_server",
    "refute_enqueued",
    "run_task",
    "virtual_backend",
    "worker",
]
