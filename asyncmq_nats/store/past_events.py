"""The latest events of a queue, as far as its records still tell them.

The server sends most events whenever a record is written (`docs/protocol.md`): a record that is
still there is an event of the past.
"""

from contextlib import suppress
from dataclasses import replace

from asyncmq_nats.backends.base import Record
from asyncmq_nats.events import Event, read_event
from asyncmq_nats.exceptions import AssetMissing
from asyncmq_nats.states import State
from asyncmq_nats.store.queue_store import QueueStore
from asyncmq_nats.wire.keys import last_token

__all__ = ["read_past_events"]


async def read_past_events(store: QueueStore, limit: int) -> list[Event]:
    """Return the latest events whose records are still there, the newest first."""
    backend, keys = store.backend, store.keys
    found: list[Event | None] = []
    with suppress(AssetMissing):
        for record in await backend.page_back(keys.ready_log, keys.all_ready, limit=limit):
            subject = keys.event(State.WAITING, last_token(record.subject))
            found.append(_event_in(record, keys.queue, subject))
    with suppress(AssetMissing):
        filter, _ = keys.republish_bucket
        for record in await backend.page_back(keys.bucket_log, filter, limit=limit):
            subject = keys.event_of(record.subject, keys.token(record.subject))
            found.append(_event_in(record, keys.queue, subject))
    events = [event for event in found if event is not None]
    return sorted(events, key=lambda event: -(event.at or 0.0))[:limit]


def _event_in(record: Record, queue: str, subject: str) -> Event | None:
    """Return the event that the server sent of a record; `None` if it is none for users."""
    event = None if record.marker else read_event(queue, subject, record.body)
    return None if event is None else replace(event, at=record.time)
