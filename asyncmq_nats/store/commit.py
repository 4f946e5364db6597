"""Read, decide, write: when to look again, and what to do when the server refuses a write.

Jobs move while one looks for them, replicas lag behind their leader, and others write as well.
"""

import random
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, TypeVar

from asyncmq_nats._clock import brief_pause
from asyncmq_nats.backends.base import Backend, Write
from asyncmq_nats.exceptions import WriteRefused

__all__ = [
    "FAREWELL",
    "LAG",
    "LOOKS",
    "commit",
    "look_for",
    "looks",
    "pause_after_refusal",
    "write_if_expected",
]

Found = TypeVar("Found")
Result = TypeVar("Result")

LOOKS: Final = (0.0, 0.0, 0.1)
"""Pauses (seconds) before each read for a job that may not exist: a replica may lag behind."""
LOOKS_AT_ONE_SERVER: Final = (0.0, 0.0, 0.0)
"""The same on a single server: a job that is not seen in one look moved during it.

It cannot do so in three in a row.
"""
LAG: Final = (0.0, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0)
"""Pauses (seconds) before each look for what is known to be there.

A read may be answered by a replica that has yet to hear of it.
"""

FAREWELL: Final = 5.0
"""How long each step of a worker's stopping may take that needs the server: it may be gone."""


def looks(backend: Backend) -> Sequence[float]:
    """Return the pauses before each look for a job that may not exist."""
    return LOOKS if backend.reads_may_lag else LOOKS_AT_ONE_SERVER


async def look_for(look: Callable[[], Awaitable[Found]], pauses: Sequence[float] = LOOKS) -> Found:
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


async def commit(decide: Callable[[], Awaitable[Result]], tries: int | None = None) -> Result:
    """Read, decide and write, again after each write that is refused, and return what came of it.

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


async def write_if_expected(backend: Backend, log: str, *writes: Write) -> int | None:
    """Write, and return the sequence; `None` if what it expects does not hold."""
    try:
        return await backend.write(log, *writes)
    except WriteRefused:
        return None


async def pause_after_refusal() -> None:
    """Wait a little, by chance, before a write is repeated.

    Others may be doing the same, and each would refuse the others.
    """
    await brief_pause(random.uniform(0.0, 0.01))
