"""Room in a full store: the oldest results go, so that jobs can end. Nothing else is removed."""

from typing import Final

from asyncmq_nats._logging import get_logger
from asyncmq_nats.states import State
from asyncmq_nats.store.queue_store import QueueStore

__all__ = ["make_room"]

logger = get_logger(__name__)

REMOVED_AT_ONCE: Final = 1_000
LEAST_OUTCOME_AGE: Final = 5.0
"""Seconds. An outcome is the proof that its job ended until its message is gone."""


async def make_room(store: QueueStore) -> int:
    """Remove the oldest outcomes of completed jobs while others find no room. Return how many."""
    backend, keys = store.backend, store.keys
    if not backend.is_full:
        return 0
    log, filter = keys.bucket_log, keys.outcomes(State.COMPLETED)
    newest = backend.now() - backend.settings.stalled_after - LEAST_OUTCOME_AGE
    page = await backend.page(log, filter, limit=REMOVED_AT_ONCE)
    old = [record.sequence for record in page if record.time < newest]
    if not old:
        return 0
    removed = await backend.purge(log, filter, before=old[-1] + 1)
    logger.error(
        "queue %s: the store is full; the oldest %d results were removed for the next ones",
        keys.queue,
        removed,
    )
    return removed
