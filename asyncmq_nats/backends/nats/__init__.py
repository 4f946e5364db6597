"""The backend on NATS JetStream: the only importer of nats-py."""

from asyncmq_nats.backends.nats.backend import NATSBackend
from asyncmq_nats.backends.nats.embedded.server import EmbeddedServer

__all__ = ["EmbeddedServer", "NATSBackend"]
