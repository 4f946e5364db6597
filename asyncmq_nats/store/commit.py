"""Read, decide, write: when to look again, and what to do when the server refuses a write.

Jobs move while one looks for them, replicas lag behind their leader, and others write as well.
"""

import random
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, TypeVar

from asyncmq_nats._clock import brief_pause
from asyncmq_nats.backends.base import Backend
from asyncmq_nats.exceptions import WriteRefused

__all__ = [
    "REPLICA_LAG_DELAYS",
    "REPLICA_READ_DELAYS",
    "SHUTDOWN_STEP_TIMEOUT",
    "commit",
    "look_for",
    "looks",
    "pause_after_refusal",
]

Found = TypeVar("Found")
Result = TypeVar("Result")

REPLICA_READ_DELAYS: Final = (0.0, 0.0, 0.1)
"""Pauses (seconds) before each read for a job that may not exist: a replica may lag behind."""
SINGLE_SERVER_READ_DELAYS: Final = (0.0, 0.0, 0.0)
"""The same on a single server: a job that a read misses has moved during it.

It cannot do so three times in a row.
"""
REPLICA_LAG_DELAYS: Final = (0.0, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0)
"""Pauses (seconds) before each read of a record that exists: a replica may lag behind."""

SHUTDOWN_STEP_TIMEOUT: Final = 5.0
"""Seconds for each step of a worker's shutdown that needs the server: it may be gone."""


def looks(backend: Backend) -> Sequence[float]:
    """Return the pauses before each look for a job that may not exist."""
    return REPLICA_READ_DELAYS if backend.reads_may_lag else SINGLE_SERVER_READ_DELAYS


async def look_for(
    look: Callable[[], Awaitable[Found]], pauses: Sequence[float] = REPLICA_READ_DELAYS
) -> Found:
    """Read until a job is found, or has been missed often enough not to exist.

    Return the last result.
    """
    for pause in pauses[:-1]:
        if pause:
            await brief_pause(pause)
        if found := await look():
            return found
    await brief_pause(pauses[-1])
    return await look()


async def commit(decide: Callable[[], Awaitable[Result]], tries: int | None = None) -> Result:
    """Read, decide and write, again after each refused write, and return the result.

    Args:
        decide: reads what is stored, and writes what expects just that. Called again, it must find
            out whether what was refused is its own earlier write, whose confirmation was lost.
        tries: how often at most; `None` is no limit.

    Raises:
        WriteRefused: that many writes were refused.
    """
    refusals = 0
    while True:
        try:
            return await decide()
        except WriteRefused:
            refusals += 1
            if refusals == tries:
                raise
        await pause_after_refusal()


async def pause_after_refusal() -> None:
    """Wait a little, by chance, before a write is repeated.

    Others may be doing the same, and each would refuse the others.
    """
    await brief_pause(random.uniform(0.0, 0.01))
