"""A delayed job is changed just as its timer goes off.

nats-server first reads the records whose time has come, then stores what they release, one by one,
and removes what is there by then. So a write over such a record, or its removal, is accepted and
has no effect. With many timers at one instant this takes a second and more. So such a record is
left alone, and the job is followed to where its timer puts it.
"""

from collections.abc import Iterable, Sequence
from typing import Final

from asyncmq_nats._clock import brief_pause
from asyncmq_nats.backends.base import Record
from asyncmq_nats.exceptions import InvalidJob, WriteRefused
from asyncmq_nats.states import Place
from asyncmq_nats.store.queue_store import QueueStore
from asyncmq_nats.store.records import MOVED_FROM, TIMER_LEAD, without_markers
from asyncmq_nats.wire.codec import load_json

__all__ = [
    "CLOCK_SLACK",
    "OVERTAKING_SECONDS",
    "expect_to_stay",
    "follow_timers",
    "is_ringing",
    "remove_overtaken",
    "wait_for_timers",
]

WRITE_SLACK: Final = 0.1
"""Seconds before its timer from which a record is not changed any more: a write takes its time."""
CLOCK_SLACK: Final = 0.05
"""Seconds by which the time that is known of the server may be wrong."""
OVERTAKING_SECONDS: Final = 1.0
"""How long a timer that has gone off may take to overtake a write, in seconds."""
REMOVAL_PAUSE: Final = 0.25
"""The same for a removal, in seconds: less than the lead of timers, so that none has run yet."""
POLL_DELAYS: Final = (0.0, 0.01, 0.02, *[0.05] * 100)
"""Pauses (seconds) between the looks at timers that go off."""


def is_ringing(store: QueueStore, record: Record, slack: float = WRITE_SLACK) -> bool:
    """Return whether a record is of a delayed job whose timer goes off, within `slack` seconds."""
    if not store.backend.timers_lag or record.marker:
        return False
    if not store.keys.is_later(record.subject, Place.DELAYED):
        return False
    try:
        data = load_json(record.body)
    except InvalidJob:
        return False
    run_at = data.get("delay_until")
    if not isinstance(run_at, int | float) or MOVED_FROM in data:  # a hold has another timer
        return False
    return run_at - TIMER_LEAD - slack <= store.now()


async def follow_timers(store: QueueStore, records: Iterable[Record]) -> list[Record]:
    """Return records as they are once the timers that go off now have done so.

    A record that was released is replaced by the one that its timer made; it is left out if a
    promoter has already taken that one. If the server takes too long, it is returned as it is.
    """
    kept, ringing = list[Record](), list[Record]()
    for record in records:
        (ringing if is_ringing(store, record) else kept).append(record)
    if not ringing:
        return kept
    there = await wait_for_timers(store, ringing)
    found = await store.last_of_many([_released(store, record) for record in ringing])
    return [*kept, *there, *without_markers(found)]


async def wait_for_timers(store: QueueStore, ringing: Sequence[Record]) -> list[Record]:
    """Wait until the timers of these records have gone off.

    Return the records that are there all the same: the server takes too long.
    """
    there = list(ringing)
    for pause in POLL_DELAYS:
        await brief_pause(pause)
        found = await store.last_of_many([record.subject for record in there])
        left = {(record.subject, record.sequence) for record in found}
        there = [record for record in there if (record.subject, record.sequence) in left]
        if not there:
            break
    return there


def _released(store: QueueStore, delayed: Record) -> str:
    """Return the key of the record that the timer of a delayed job makes."""
    return store.keys.later(store.keys.token(delayed.subject), Place.RELEASED)


async def remove_overtaken(store: QueueStore, removed: Iterable[Record]) -> set[str]:
    """Remove what timers have released of records whose removal took so long that they went off.

    Return the tokens of the jobs that were removed so.
    """
    bodies = {
        _released(store, record): record.body
        for record in removed
        if is_ringing(store, record, CLOCK_SLACK)
    }
    if not bodies:
        return set()
    await brief_pause(REMOVAL_PAUSE)
    return {
        store.keys.token(record.subject)
        for record in without_markers(await store.last_of_many(bodies))
        if record.body == bodies[record.subject] and await store.delete(record)
    }


async def expect_to_stay(store: QueueStore, before: Record, sequence: int) -> None:
    """Look whether a write over a delayed job is still there, if its timer may have overtaken it.

    Raises:
        WriteRefused: it is not: read the job again.
    """
    if not is_ringing(store, before, CLOCK_SLACK):
        return
    keys = store.keys
    await brief_pause(OVERTAKING_SECONDS)
    records = await store.last(keys.later_all(keys.token(before.subject)))
    if all(record.sequence != sequence for record in records):
        raise WriteRefused(keys.bucket_log, "the timer of the job has gone off meanwhile")
