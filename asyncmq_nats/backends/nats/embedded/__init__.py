"""An embedded nats-server, and the watchdog that ends it with this process."""

from asyncmq_nats.backends.nats.embedded.server import EmbeddedServer

__all__ = ["EmbeddedServer"]
