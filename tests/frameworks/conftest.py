"""The databases of the outbox's tests."""

from tests.outbox.conftest import postgres_server

__all__ = ["postgres_server"]
