"""Constructors of records that more than one transition writes."""

from typing import Final

from asyncmq_nats.backends.base import Expect, Timer, Write
from asyncmq_nats.states import Place
from asyncmq_nats.wire.keys import QueueSubjects

__all__ = ["LEAD", "MARKER_TTL", "delayed_write"]

LEAD: Final = 0.4
"""Seconds by which a timer is early: the server looks at its timers every 0.25 s. The promoter waits out the rest."""
MARKER_TTL: Final = 1.0
"""Seconds that a delete marker lives."""


def delayed_write(
    subjects: QueueSubjects,
    token: str,
    body: bytes,
    times: tuple[float, float],
    expect: Expect | None = None,
) -> Write:
    """Return the write that has a job wait until its time, when the server releases it.

    A job whose time is near is released at once: the promoter waits for it, a timer would be late.

    Args:
        subjects: the keys of the queue.
        token: of the job.
        body: the job.
        times: when it is to run and the time now (Unix seconds).
        expect: the condition of the write.
    """
    run_at, now = times
    if run_at - LEAD <= now:  # beside: a promoter may be removing the record of the attempt before
        return Write(subjects.later(token, Place.RELEASED), body, expect, beside=True)
    timer = Timer(run_at - LEAD, subjects.later(token, Place.RELEASED))
    return Write(subjects.later(token, Place.DELAYED), body, expect, timer=timer)
