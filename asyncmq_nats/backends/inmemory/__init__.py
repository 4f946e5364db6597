"""The in-memory backend: `InMemoryBackend`."""

from asyncmq_nats.backends.inmemory.backend import InMemoryBackend

__all__ = ["InMemoryBackend"]
