"""Fixtures: a fresh server per test, and a connected backend of each kind."""

import os
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import pytest

from asyncmq_nats.backends.base import Backend
from asyncmq_nats.backends.inmemory import InMemoryBackend
from asyncmq_nats.backends.nats.embedded.server import EmbeddedServer
from asyncmq_nats.exceptions import ServerBinaryMissing
from asyncmq_nats.settings import Settings
from asyncmq_nats.testing import VirtualBackend
from tests.nats.processes import MakeServer
from tests.passing import clocks

# A shell has its background jobs ignore SIGINT, and so would every program that a test starts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

if TYPE_CHECKING:
    from asyncmq_nats.backends.nats.backend import NATSBackend

# An example may wait for a server; how long one takes says nothing.
hypothesis.settings.register_profile("asyncmq", deadline=None)
hypothesis.settings.load_profile("asyncmq")


OF_A_SERVER = ("test_compose.py", "test_embedded.py", "test_examples.py")
"""Modules whose tests start servers of their own; those in `tests/nats` do so too."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that need a server: `-m "not server"` leaves them out."""
    for item in items:
        if isinstance(item, pytest.Function) and _needs_server(item):
            item.add_marker("server")


def _needs_server(item: pytest.Function) -> bool:
    callspec = getattr(item, "callspec", None)
    chosen = callspec is not None and callspec.params.get("make_backend") == "nats"
    return (
        chosen
        or "server" in item.fixturenames
        or item.path.name in OF_A_SERVER
        or item.path.parent.name == "nats"
    )


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """The event loop of every test: nats-py knows asyncio only."""
    return "asyncio"


@pytest.fixture
def settings() -> Settings:
    """Settings with short leases; a test module that needs others defines this fixture."""
    return Settings(
        stalled_after=1.0,
        connect_timeout=5.0,
        publish_timeout=10.0,
        shutdown_timeout=5.0,
        unknown_task_timeout=0,  # what is put off is another test's matter
    )


@pytest.fixture
def server_config() -> str:
    """The configuration of `server`; a test module that needs another one defines this fixture."""
    return ""


@pytest.fixture
def server(tmp_path: Path, server_config: str) -> Iterator[EmbeddedServer]:
    """A running server with an empty store."""
    embedded = EmbeddedServer(tmp_path / "nats", config=server_config)
    try:
        embedded.start()
    except ServerBinaryMissing as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(error))
    yield embedded
    embedded.kill()  # thirty times as fast as `stop`, and no test needs what it would save
    embedded.stop()


@pytest.fixture
def make_server(server: EmbeddedServer, tmp_path: Path) -> Iterator[MakeServer]:
    """Maker of a server with a configuration of its own.

    `server` is there to skip where there is no nats-server.
    """
    servers: list[EmbeddedServer] = []

    def make(config: str) -> EmbeddedServer:
        servers.append(EmbeddedServer(tmp_path / f"configured-{len(servers)}", config=config))
        servers[-1].start()
        return servers[-1]

    yield make
    for each in servers:
        each.kill()
        each.stop()


@pytest.fixture
def make_nats_backend(server: EmbeddedServer, settings: Settings) -> "Callable[[], NATSBackend]":
    """Maker of handles on the server, not connected yet."""
    from asyncmq_nats.backends.nats.backend import NATSBackend

    return lambda: NATSBackend(servers=server.url, settings=settings)


@pytest.fixture(params=["inmemory", "nats"])
def make_backend(
    request: pytest.FixtureRequest, settings: Settings
) -> Iterator[Callable[[], Backend]]:
    """Maker of handles on one store, not connected yet; in memory each is the same object.

    In a module with `VIRTUAL_TIME = True` it is on a clock that `pass_time` moves.
    """
    if request.param == "nats":
        yield request.getfixturevalue("make_nats_backend")
    elif getattr(request.module, "VIRTUAL_TIME", False):
        virtual = VirtualBackend(settings=settings, workers=False)
        clocks.append(virtual.clock)
        yield lambda: virtual
        clocks.remove(virtual.clock)
    else:
        shared = InMemoryBackend(settings=settings)
        yield lambda: shared


@pytest.fixture
async def backend(make_backend: Callable[[], Backend]) -> AsyncIterator[Backend]:
    """A connected backend, of each kind in turn."""
    connected = make_backend()
    await connected.connect()
    yield connected
    await connected.close()


@pytest.fixture
async def twin(make_backend: Callable[[], Backend], backend: Backend) -> AsyncIterator[Backend]:
    """A second connected handle on the store of `backend`, as another process would have.

    In memory the same object.
    """
    connected = make_backend()
    if connected is backend:
        yield backend
        return
    await connected.connect()
    yield connected
    await connected.close()


@pytest.fixture
async def nats_backend(
    make_nats_backend: "Callable[[], NATSBackend]",
) -> "AsyncIterator[NATSBackend]":
    """A connected backend on `server`, for what only a server can do."""
    connected = make_nats_backend()
    await connected.connect()
    yield connected
    await connected.close()
