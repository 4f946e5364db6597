"""Windows in which a second job with the same key is not added.

The cost is constant: one record a key, no scan, no lock. The record names the owner, and carries it
until it is stored: window by compare-and-set, then the job, then the window without the job. A
producer that finds a job in a window which is not stored stores it, so none is lost. A window
without a `ttl` is over when its owner has ended, which is looked up when a producer asks.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final

from asyncmq_nats._logging import get_logger
from asyncmq_nats.backends.base import Expect, Record, Write
from asyncmq_nats.events import DEBOUNCED, DEDUPLICATED
from asyncmq_nats.exceptions import AsyncMQError, ConnectionLost, Unconfirmed
from asyncmq_nats.jobs import Job
from asyncmq_nats.states import Place
from asyncmq_nats.store.commit import commit, look_for
from asyncmq_nats.store.queue_store import QueueStore
from asyncmq_nats.transitions.add import Additions
from asyncmq_nats.transitions.release import MARKER_TTL, delayed_write
from asyncmq_nats.transitions.timers import expect_to_stay, follow_timers
from asyncmq_nats.wire.codec import dump_json, load_json, splice
from asyncmq_nats.wire.keys import encode_token

__all__ = ["Deduplicator", "Window", "parse_window", "take_window"]

logger = get_logger(__name__)

LONGEST_WINDOW: Final = 10 * 365 * 86_400
"""The longest window, in seconds."""


@dataclass(frozen=True, slots=True)
class Window:
    """AsyncMQ's `deduplication`: `ttl` in seconds, or until the owner has ended."""

    id: str
    ttl: float | None = None
    extend: bool = False
    replace: bool = False


def parse_window(window: Mapping[str, Any]) -> Window:
    """Return the window that a user described.

    Raises:
        TypeError: it is no mapping, or `ttl` is no number.
        ValueError: the id is empty, or `ttl` is 0 or less or longer than ten years, or a key is
            unknown.
    """
    if not isinstance(window, Mapping):
        raise TypeError(
            f"deduplication must be a mapping with an 'id', not {type(window).__name__}"
        )
    unknown = sorted(str(key) for key in window.keys() - {"id", "ttl", "extend", "replace"})
    if unknown:
        raise ValueError(
            f"deduplication has unknown keys: {', '.join(unknown)} "
            "(known: id, ttl, extend, replace)"
        )
    key, ttl = window.get("id"), window.get("ttl")
    if not isinstance(key, str) or not key.strip():
        raise ValueError(f"deduplication needs an 'id', a text that is not empty, not {key!r}")
    if ttl is not None and (isinstance(ttl, bool) or not isinstance(ttl, int | float)):
        raise TypeError(f"deduplication ttl must be a number of seconds, not {type(ttl).__name__}")
    if ttl is not None and not 0 < ttl <= LONGEST_WINDOW:  # not so for NaN, either
        raise ValueError(
            f"deduplication ttl must be above 0 and at most {LONGEST_WINDOW:.0f} s, not {ttl}"
        )
    return Window(
        key,
        None if ttl is None else float(ttl),
        bool(window.get("extend")),
        bool(window.get("replace")),
    )


def take_window(entry: dict[str, Any]) -> Window | None:
    """Take the window out of the parameters of a job, if it has one.

    Raises:
        TypeError, ValueError: as for `parse_window`.
    """
    older, window = entry.pop("debounce", None), entry.pop("deduplication", None)
    window = older if window is None else window
    return None if window is None else parse_window(window)


class Deduplicator:
    """The windows of one queue."""

    def __init__(self, store: QueueStore, additions: Additions) -> None:
        self._store = store
        self._keys = store.keys
        self._additions = additions

    async def add(self, job: Job, window: Window) -> str:
        """Add the job, or return the id of the owner of the window; see `Queue.add`."""
        job = replace(job, deduplication={"id": window.id})
        self._additions.check(job)
        tries = 0

        async def add() -> str:
            nonlocal tries
            tries += 1
            if job.custom_id and await self._additions.is_duplicate(job):
                return job.job_id
            record = await self._read(window.id)
            owner = None if record is None else await self._live_owner(window.id, record)
            if record is None or owner is None:
                await self._open(job, window, 0 if record is None else record.sequence)
                return job.job_id
            if tries > 1 and owner == job.job_id:  # it was added, and the confirmation lost
                return owner
            await self._hit(job, window, record, owner)
            await self._announce(job, window, owner)
            return owner

        return await commit(add)

    async def _open(self, job: Job, window: Window, replaced: int) -> None:
        """Open a window in the place of a record with that sequence, and store its owner."""
        until = self._end_of(window)
        opened = self._record(window.id, job.job_id, until, replaced, job)
        sequence = await self._store.write(opened)
        try:
            await self._additions.add(job)
        except (ConnectionLost, Unconfirmed):  # the next producer that asks stores it
            raise
        except AsyncMQError:
            # Not a removal, which producers need no permission for otherwise.
            over = dump_json({"job_id": job.job_id, "until": 0.0})
            expect = Expect(opened.subject, sequence)
            # Refused: another producer has stored it, or opened its own.
            ended = Write(opened.subject, over, expect, ttl=MARKER_TTL)
            await self._store.write_if_expected(ended)
            raise
        self._take_out(window.id, job.job_id, until, sequence)

    def _take_out(self, key: str, owner: str, until: float | None, sequence: int) -> None:
        """Remove the owner from its window once it is stored.

        It is not awaited: it may be repeated.
        """
        write = self._record(key, owner, until, sequence)
        backend, log = self._store.backend, self._keys.bucket_log
        backend.send(log, write, lambda _: None, timeout=backend.settings.publish_timeout)

    async def _announce(self, job: Job, window: Window, owner: str) -> None:
        await self._additions.announce(DEBOUNCED, owner, debounce_id=window.id)
        await self._additions.announce(
            DEDUPLICATED, owner, deduplication_id=window.id, deduplicated_job_id=job.job_id
        )

    def _end_of(self, window: Window) -> float | None:
        """Return when a window ends that begins now; `None`: with its owner."""
        return None if window.ttl is None else self._store.now_at_most() + window.ttl

    def _record(
        self, key: str, owner: str, until: float | None, replaced: int, job: Job | None = None
    ) -> Write:
        """Return the record of a window, in the place of one with the sequence `replaced`.

        `job`: the owner, while it may not be stored.
        """
        subject = self._keys.deduplication(encode_token(key))
        body = dump_json({"job_id": owner, "until": until})
        if job is not None:
            body = splice(body, b'"job":' + job.encode())
        # The server removes it some time after its end at the earliest; `until` is exact.
        ttl = None if until is None else until - self._store.now() + 1
        return Write(subject, body, Expect(subject, replaced), ttl=ttl)

    async def _hit(self, job: Job, window: Window, record: Record, owner: str) -> None:
        """Replace the owner if that is wished and it is still delayed, then extend the window."""
        if window.replace:
            keys = [
                self._keys.later(encode_token(owner), place)
                for place in (Place.DELAYED, Place.RELEASED)
            ]
            records = await self._store.last(*keys)
            for delayed in await follow_timers(self._store, records):
                if not delayed.marker and Job.decode(delayed.body).is_early(
                    self._store.now()
                ):  # it is released a little before its time
                    writes = self._swapped(job, owner, delayed)
                    sequence = await self._store.write(*writes)
                    await expect_to_stay(self._store, delayed, sequence)
                    break
        if window.extend and window.ttl is not None:
            until = self._end_of(window)
            extended = self._record(window.id, owner, until, record.sequence)
            await self._store.write(extended)

    def _swapped(self, job: Job, owner: str, record: Record) -> list[Write]:
        """Return the writes that put the job in the place of one that is delayed, under its id.

        One write; or if it is released already, in its last moments, a batch with a marker over
        that record: the promoter that has it in hand must not see a moment without either.
        """
        run_at, token = (
            job.delay_until or float(load_json(record.body)["delay_until"]),
            encode_token(owner),
        )
        body, expect = (
            replace(job, job_id=owner, delay_until=run_at).encode(),
            Expect(record.subject, record.sequence),
        )
        if self._keys.is_later(record.subject, Place.DELAYED):
            return [delayed_write(self._keys, token, body, (run_at, 0.0), expect)]
        write = delayed_write(self._keys, token, body, (run_at, self._store.now()))
        if write.subject == record.subject:
            return [replace(write, expect=expect, beside=False)]
        return [Write(record.subject, b"", expect, ttl=MARKER_TTL, marker=True), write]

    async def owner(self, key: str) -> str | None:
        """Return the id of the job that owns a window, `None` if there is no such window."""
        record = await self._read(key)
        return None if record is None else await self._live_owner(key, record)

    async def remove(self, key: str) -> bool:
        """End a window. Return whether there was one."""
        subject = self._keys.deduplication(encode_token(key))
        return await self._store.purge(subject) > 0

    async def _read(self, key: str) -> Record | None:
        records = await self._store.last(self._keys.deduplication(encode_token(key)))
        return records[0] if records else None

    async def _live_owner(self, key: str, record: Record) -> str | None:
        """Return the owner of a window, stored if it was not; `None` if the window is over."""
        try:
            data = load_json(record.body)
            owner, until = (
                str(data["job_id"]),
                data["until"] if data["until"] is None else float(data["until"]),
            )
            job = None if data.get("job") is None else Job.from_dict(data["job"])
        except (ValueError, TypeError, KeyError) as problem:
            logger.warning(
                "deduplication window %.200r is malformed; ignoring it: %r", record.subject, problem
            )
            return None
        if until is not None and until <= self._store.now():
            return None
        if job is None and until is not None:
            return owner
        read = partial(self._store.read_stage, encode_token(owner))
        stage = await look_for(read)
        if job is not None:
            if stage is None:  # its producer may have died before it stored it
                await self._additions.add(job)
                stage = "unfinished"
            else:
                await self._additions.resume([job])
            self._take_out(key, owner, until, record.sequence)
        return owner if until is not None or stage == "unfinished" else None
