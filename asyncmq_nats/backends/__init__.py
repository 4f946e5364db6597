"""The backends, and the choice of the default one."""

from contextvars import ContextVar

from asyncmq_nats.backends.base import Backend
from asyncmq_nats.settings import settings

__all__ = ["backend_of_context", "default_backend", "set_default_backend"]

backend_of_context: ContextVar[Backend | None] = ContextVar("asyncmq_nats_backend", default=None)
"""The default backend where this is set: in the event loop of `asyncmq_nats.sync`."""


def default_backend() -> Backend:
    """Return the backend of queues that are given none: `settings.backend`.

    By default it is a `NATSBackend` of the settings, one for this process.
    """
    chosen: Backend | None = backend_of_context.get()
    if chosen is not None:
        return chosen
    chosen = settings.backend
    if chosen is None:
        # Only here: a user of the in-memory backend loads no nats-py.
        from asyncmq_nats.backends.nats.backend import NATSBackend

        chosen = settings.backend = NATSBackend()
    return chosen


def set_default_backend(backend: Backend | None) -> None:
    """Set the default backend; `None` goes back to one of the settings."""
    settings.backend = backend
