"""Where jobs are stored, and which backend a queue takes when it is given none."""

from asyncmq_nats.backends.base import Backend

__all__ = ["default_backend", "set_default_backend"]

_default: Backend | None = None


def default_backend() -> Backend:
    """Return the backend of queues that are given none: a `NATSBackend` of the settings, one for this process."""
    global _default
    if _default is None:
        from asyncmq_nats.backends.nats.backend import (
            NATSBackend,  # only here: a user of the in-memory backend loads no nats-py
        )

        _default = NATSBackend()
    return _default


def set_default_backend(backend: Backend | None) -> None:
    """Choose that backend; `None` goes back to one of the settings."""
    global _default
    _default = backend
