"""Fixtures for the tests that need a server, and workers that are processes of their own."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from asyncmq_nats.backends.nats.backend import NATSBackend
from asyncmq_nats.backends.nats.embedded.server import EmbeddedServer
from asyncmq_nats.queues import Queue
from asyncmq_nats.settings import Settings
from tests.nats.processes import Fleet


@pytest.fixture
def fleet(server: EmbeddedServer, settings: Settings, tmp_path: Path) -> Iterator[Fleet]:
    """Worker programs on `server`, with the test's settings."""
    changed = settings.model_dump(exclude_unset=True, exclude_none=True)
    workers = Fleet(
        server.url,
        tmp_path / "fleet",
        environment={f"ASYNCMQ_NATS_{name.upper()}": str(value) for name, value in changed.items()},
    )
    yield workers
    workers.stop()


@pytest.fixture
def queue(nats_backend: NATSBackend) -> Queue:
    """The queue of the fleet."""
    return Queue("fleet", nats_backend)
