"""The in-memory backend under the name it also has in AsyncMQ."""

from asyncmq_nats.backends.inmemory import InMemoryBackend

__all__ = ["InMemoryBackend"]
