"""When to look or to write again.

Jobs move while one looks for them, replicas lag behind their leader, and others write as well.
"""

import random
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, TypeVar

from asyncmq_nats._clock import brief_pause
from asyncmq_nats.backends.base import Backend

__all__ = [
    "REPLICA_LAG_DELAYS",
    "REPLICA_READ_DELAYS",
    "SHUTDOWN_STEP_TIMEOUT",
    "look_for",
    "looks",
    "pause_after_refusal",
]

Found = TypeVar("Found")

REPLICA_READ_DELAYS: Final = (0.0, 0.0, 0.1)
"""Pauses (seconds) before each read for a job that may not exist: a replica may lag behind."""
SINGLE_SERVER_READ_DELAYS: Final = (0.0, 0.0, 0.0)
"""The same on a single server: a job that is not seen in one look moved during it.

It cannot do so in three in a row.
"""
REPLICA_LAG_DELAYS: Final = (0.0, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0)
"""Pauses (seconds) before each look for what is known to be there.

A read may be answered by a replica that has yet to hear of it.
"""

SHUTDOWN_STEP_TIMEOUT: Final = 5.0
"""How long each step of a worker's stopping may take that needs the server: it may be gone."""


def looks(backend: Backend) -> Sequence[float]:
    """Return the pauses before each look for a job that may not exist."""
    return REPLICA_READ_DELAYS if backend.reads_may_lag else SINGLE_SERVER_READ_DELAYS


async def look_for(
    look: Callable[[], Awaitable[Found]], pauses: Sequence[float] = REPLICA_READ_DELAYS
) -> Found:
    """Look for a job until it is found, or has been missed often enough not to exist.

    Return what the last look returned.
    """
    for pause in pauses[:-1]:
        if pause:
            await brief_pause(pause)
        if found := await look():
            return found
    await brief_pause(pauses[-1])
    return await look()


async def pause_after_refusal() -> None:
    """Wait a little, by chance, before a write is repeated.

    Others may be doing the same, and each would refuse the others.
    """
    await brief_pause(random.uniform(0.0, 0.01))
