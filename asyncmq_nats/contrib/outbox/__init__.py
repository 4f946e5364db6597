"""Transactional outbox: jobs are rows of the user's transaction; a relay adds them to their queues.

`add` writes a row with SQLAlchemy (`asyncmq_nats.contrib.django.outbox.add` with Django). Any
number of `Relay`s publish the rows. The row's job id makes the queue refuse a second publication,
so a relay that dies at any step loses nothing and doubles nothing. See docs/outbox.md.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from asyncmq_nats.contrib.outbox.relay import Relay
    from asyncmq_nats.contrib.outbox.table import OutboxRow, add, metadata

__all__ = ["OutboxRow", "Relay", "add", "metadata"]


def __getattr__(name: str) -> Any:
    # Loaded when used: Django writes rows without SQLAlchemy.
    if name == "Relay":
        from asyncmq_nats.contrib.outbox.relay import Relay

        return Relay
    if name in __all__:
        from asyncmq_nats.contrib.outbox import table

        return getattr(table, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
