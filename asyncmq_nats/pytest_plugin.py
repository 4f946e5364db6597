"""Fixtures for pytest, there as soon as the package is installed: docs/testing.md.

All are sync, so that they work beside pytest-asyncio, the plugin of anyio, and in sync tests.
"""

from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:  # every run of pytest loads this module, and most use nothing of it
    from asyncmq_nats import Queue, Worker
    from asyncmq_nats.testing import VirtualBackend, VirtualClock

__all__ = ["amq_backend", "amq_clock", "amq_inline", "amq_queue", "amq_server", "amq_worker"]

VIRTUAL = "asyncmq_nats_virtual"
_shared: "pytest.StashKey[VirtualBackend]" = pytest.StashKey()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the setting `asyncmq_nats_virtual` of the ini file."""
    parser.addini(
        VIRTUAL,
        "make a VirtualBackend the default backend of the whole run, for queues that are made "
        "when a module is imported",
        type="bool",
        default=False,
    )


def pytest_configure(config: pytest.Config) -> None:
    """Make the default backend a virtual one before any test module is imported, if so set."""
    if config.getini(VIRTUAL):
        from asyncmq_nats import set_default_backend
        from asyncmq_nats.testing import VirtualBackend

        config.stash[_shared] = VirtualBackend()
        set_default_backend(config.stash[_shared])


@pytest.fixture
def amq_backend(request: pytest.FixtureRequest) -> "Iterator[VirtualBackend]":
    """The default backend: in memory, empty, with a clock that the test moves."""
    from asyncmq_nats import set_default_backend
    from asyncmq_nats.testing import virtual_backend

    shared = request.config.stash.get(_shared, None)
    if shared is None:
        with virtual_backend() as backend:
            yield backend
        return
    shared.reset()
    set_default_backend(shared)
    yield shared
    shared.inline = False


@pytest.fixture
def amq_inline(amq_backend: "VirtualBackend") -> "VirtualBackend":
    """Likewise, and a job that is due has run when the call that adds it returns."""
    amq_backend.inline = True
    return amq_backend


@pytest.fixture
def amq_clock(amq_backend: "VirtualBackend") -> "VirtualClock":
    """The clock of the default backend: `await amq_clock.advance("1h")`."""
    return amq_backend.clock


@pytest.fixture
def amq_queue(amq_backend: "VirtualBackend") -> "Queue":
    """The queue `test` on the default backend."""
    from asyncmq_nats import Queue

    return Queue("test", amq_backend)


@pytest.fixture
def amq_worker(amq_queue: "Queue") -> "AbstractAsyncContextManager[Worker]":
    """A worker of `amq_queue`, which runs in `async with amq_worker:`."""
    from asyncmq_nats.testing import worker

    return worker(amq_queue)


@pytest.fixture
def amq_server(tmp_path: Path) -> Iterator[str]:
    """The address of a real server with an empty store, for this test only."""
    from asyncmq_nats.testing import private_server

    with private_server(tmp_path / "nats-server") as url:
        yield url
