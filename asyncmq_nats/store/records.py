"""Constructors of records that more than one transition writes."""

from collections.abc import Iterable, Mapping
from typing import Any, Final

from asyncmq_nats.backends.base import Expect, Record, Timer, Write
from asyncmq_nats.states import Place
from asyncmq_nats.wire.codec import dump_json
from asyncmq_nats.wire.keys import QueueSubjects

__all__ = [
    "MARKER_TTL",
    "MOVED_FROM",
    "TIMER_LEAD",
    "delayed_write",
    "outcome_body",
    "without_markers",
]

TIMER_LEAD: Final = 0.4
"""Seconds by which a timer is early: the server looks at its timers every 0.25 s.

The promoter waits out the rest.
"""
MOVED_FROM: Final = "moved_from"
"""The member of a hold (see `transitions/move.py`) that says which queue it is from."""
MARKER_TTL: Final = 1.0
"""Seconds that a delete marker lives."""
KEPT_WHEN_TRUNCATED: Final = ("id", "task", "reruns", "children", "wide_children")
"""The fields of a job that a truncated outcome keeps: its children are told by them."""


def without_markers(records: Iterable[Record]) -> list[Record]:
    """Return those records that are not delete markers."""
    return [record for record in records if not record.marker]


def delayed_write(
    keys: QueueSubjects,
    token: str,
    body: bytes,
    times: tuple[float, float],
    expect: Expect | None = None,
) -> Write:
    """Return the write that has a job wait until its time, when the server releases it.

    A job whose time is near is released at once: the promoter waits for it, a timer would be late.

    Args:
        keys: the keys of the queue.
        token: of the job.
        body: the job.
        times: when it is to run and the time now (Unix seconds).
        expect: the condition of the write.
    """
    run_at, now = times
    if (
        run_at - TIMER_LEAD <= now
    ):  # beside: a promoter may be removing the record of the attempt before
        return Write(keys.later(token, Place.RELEASED), body, expect, beside=True)
    timer = Timer(run_at - TIMER_LEAD, keys.later(token, Place.RELEASED))
    return Write(keys.later(token, Place.DELAYED), body, expect, timer=timer)


def outcome_body(
    job: Mapping[str, Any], fields: Mapping[str, Any], limit: int, what: str = "the outcome"
) -> bytes:
    """Return the body of an outcome of at most `limit` bytes: `truncated` if the job is too large.

    Raises:
        NotSerializable: a field is not JSON; `what` is how the message names it.
    """
    body = dump_json({**job, **fields}, what)
    if len(body) > limit:
        kept = {name: job[name] for name in KEPT_WHEN_TRUNCATED if name in job}
        body = dump_json({**kept, "truncated": True, "max_retries": 0, **fields}, what)
    return body
