"""Where jobs are stored, and which backend a queue takes when it is given none."""

from asyncmq_nats.backends.base import Backend
from asyncmq_nats.settings import settings

__all__ = ["default_backend", "set_default_backend"]


def default_backend() -> Backend:
    """Return the backend of queues that are given none: `settings.backend`.

    Unless one was set, it is a `NATSBackend` of the settings, one for this process.
    """
    chosen: Backend | None = settings.backend
    if chosen is None:
        # Only here: a user of the in-memory backend loads no nats-py.
        from asyncmq_nats.backends.nats.backend import NATSBackend

        chosen = settings.backend = NATSBackend()
    return chosen


def set_default_backend(backend: Backend | None) -> None:
    """Choose that backend; `None` goes back to one of the settings."""
    settings.backend = backend
