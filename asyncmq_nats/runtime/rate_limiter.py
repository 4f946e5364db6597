"""A rate limit for a whole queue.

One token bucket in one record, changed by compare-and-set, from which workers lease permits. A
permit is for one start. A worker leases as many as it has free slots, and asks for jobs against
permits only, so one that waits holds no jobs. Unused permits count against the bucket's size, so
idle workers cannot save up a burst.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from asyncmq_nats._logging import Throttle, get_logger
from asyncmq_nats.backends.base import Expect, Record, Write
from asyncmq_nats.exceptions import AssetMissing, InvalidJob
from asyncmq_nats.store.queue_store import QueueStore
from asyncmq_nats.wire.codec import dump_json, load_json

__all__ = [
    "LEASE_SECONDS",
    "Bucket",
    "Limit",
    "RateLimitInfo",
    "RateLimiter",
    "lease",
    "read_rate_limit",
]

logger = get_logger(__name__)

LEASE_SECONDS: Final = 10.0
"""Seconds of silence after which a worker's permits are taken back."""
SHORTEST_WAIT: Final = 0.005
SHORTEST_LEASE_SECONDS: Final = 0.01
"""A lease has permits for at least this many seconds: contention stays low at high rates."""


@dataclass(frozen=True, slots=True)
class Limit:
    """`starts` jobs per `interval` seconds."""

    starts: int
    interval: float

    @property
    def per_second(self) -> float:
        """The rate at which permits come."""
        return self.starts / self.interval


@dataclass(frozen=True, slots=True)
class Bucket:
    """Permits there are, as of `at` (Unix seconds), and those that are leased.

    Worker → (count, when the lease ends).
    """

    tokens: float
    at: float
    leased: Mapping[str, tuple[int, float]] = field(default_factory=dict)

    def encode(self) -> bytes:
        """Return the record."""
        return dump_json(
            {
                "tokens": self.tokens,
                "at": self.at,
                "leased": {worker: list(entry) for worker, entry in self.leased.items()},
            }
        )

    @classmethod
    def decode(cls, body: bytes) -> "Bucket":
        """Return the bucket of a record.

        Raises:
            InvalidJob: it is malformed.
        """
        data: dict[str, Any] = load_json(body)
        try:
            bucket = cls(
                float(data["tokens"]),
                float(data["at"]),
                {worker: (int(n), float(end)) for worker, (n, end) in data["leased"].items()},
            )
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise InvalidJob(f"no token bucket: {error!r}") from None
        numbers = (bucket.tokens, bucket.at, *(end for _, end in bucket.leased.values()))
        if not all(map(math.isfinite, numbers)):
            raise InvalidJob("no token bucket: a number is not finite")
        return bucket

    def is_plausible(self, now: float) -> bool:
        """Return whether workers can have written it.

        Nothing in it is of a time that is far off.
        """
        return self.at <= now + LEASE_SECONDS and all(
            count >= 0 and end <= now + 2 * LEASE_SECONDS for count, end in self.leased.values()
        )


def lease(
    bucket: Bucket | None, limit: Limit, worker: str, held: int, wanted: int, now: float
) -> tuple[Bucket, int, float]:
    """Return the bucket after a request for permits, the number granted, and the wait for the next.

    The worker has `held` unused permits and asks for `wanted` more.

    A worker that asks for a negative number gives permits back.
    """
    if bucket is None:
        bucket = Bucket(float(limit.starts), now)
    others = {
        name: entry for name, entry in bucket.leased.items() if name != worker and entry[1] > now
    }
    room = limit.starts - sum(count for count, _ in others.values()) - held
    earned = max(0.0, now - bucket.at) * limit.per_second
    tokens = max(0.0, min(bucket.tokens + earned, float(max(0, room))))
    granted = wanted if wanted < 0 else min(wanted, int(tokens + 1e-9))
    if granted < 0:
        tokens = min(tokens - granted, float(limit.starts))
    else:
        tokens = max(0.0, tokens - granted)
    keeps = held + granted
    leased = others | ({worker: (keeps, now + LEASE_SECONDS)} if keeps > 0 else {})
    wait = (
        0.0
        if granted >= wanted
        else max(
            SHORTEST_WAIT,
            (1.0 - tokens) / limit.per_second,
            min(SHORTEST_LEASE_SECONDS, limit.interval / 2),
        )
    )
    return Bucket(tokens, max(now, bucket.at), leased), granted, wait


@dataclass(frozen=True, slots=True)
class RateLimitInfo:
    """A rate limit that workers of a queue keep to: `limit` starts per `interval` seconds.

    `free`: permits that no worker has leased yet. `leased`: those that workers hold, as far as
    they have told.
    """

    limit: int
    interval: float
    free: int
    leased: int


async def read_rate_limit(store: QueueStore, limit: Limit) -> RateLimitInfo:
    """Return how much of a limit is left now."""
    now, stored = store.now(), None
    try:
        for record in await store.last(store.keys.rate_limit):
            stored = _bucket_in(record, now)
    except (AssetMissing, InvalidJob):  # workers make it again
        pass
    bucket, _, _ = lease(stored, limit, "", 0, 0, now)
    leased = sum(count for count, _ in bucket.leased.values())
    return RateLimitInfo(limit.starts, limit.interval, int(bucket.tokens + 1e-9), leased)


def _bucket_in(record: Record, now: float) -> Bucket | None:
    """Return the bucket of a record; `None` if it was removed.

    Raises:
        InvalidJob: it is malformed, or of another time.
    """
    if record.marker:
        return None
    bucket = Bucket.decode(record.body)
    if not bucket.is_plausible(now):
        raise InvalidJob("it is of another time")
    return bucket


class RateLimiter:
    """The permits of one worker of a queue."""

    def __init__(self, store: QueueStore, limit: Limit, worker: str) -> None:
        self._store = store
        self._key = store.keys.rate_limit
        self._limit = limit
        self._worker = worker
        self._read: tuple[int, Bucket | None] | None = None
        self._renew_at = 0.0
        self._ends_at = 0.0
        self._held = 0
        self._recorded = 0
        self._malformed = Throttle()

    @property
    def blocks(self) -> bool:
        """Whether nothing may ever start: a limit of 0."""
        return self._limit.starts == 0

    @property
    def permits(self) -> int:
        """The permits that are leased and not used.

        A worker that was silent for longer than its lease has none.
        """
        return self._held if self._held and self._store.now() < self._ends_at else 0

    def use(self) -> None:
        """Spend a permit: a job starts."""
        self._held -= 1

    async def acquire(self, wanted: int) -> float:
        """Lease up to `wanted` more permits, or give some back if it is negative.

        Return how long to wait for more, 0 if all were there.
        """
        self._held = self.permits
        renew = self._held > 0 and self._store.now() > self._renew_at
        # A worker that wants no more still reports the permits it used: recorded leases are kept
        # from the others.
        report = renew or (wanted == 0 and self._held < self._recorded)
        if wanted == 0 and not report:
            return 0.0
        for _ in range(50):
            remembered = self._read is not None
            sequence, bucket = self._read or await self._look()
            now = self._store.now()
            held = self._held
            changed, granted, wait = lease(bucket, self._limit, self._worker, held, wanted, now)
            if granted == 0 and not report:
                self._read = None
                if remembered:  # others may have given permits back since
                    continue
                return wait
            write = Write(self._key, changed.encode(), Expect(self._key, sequence))
            stored = await self._store.write_if_expected(write)
            if stored is None:
                self._read = None
                continue
            self._read = (stored, changed)
            self._held += granted  # of which some may have been used meanwhile
            self._recorded = held + granted
            self._renew_at, self._ends_at = now + LEASE_SECONDS / 2, now + LEASE_SECONDS
            return wait
        logger.warning(
            "queue %s: too many workers change the rate limit at once", self._store.keys.bucket_log
        )
        return self._limit.interval

    async def _look(self) -> tuple[int, Bucket | None]:
        records = await self._store.last(self._key)
        return (records[0].sequence, self._bucket_of(records[0])) if records else (0, None)

    def _bucket_of(self, record: Record) -> Bucket | None:
        """Return the bucket of a record; `None`, for a new one, if it is malformed."""
        try:
            return _bucket_in(record, self._store.now())
        except InvalidJob as problem:
            if times := self._malformed.note():
                text = "%s: the record of the rate limit is malformed and made again (%d times): %s"
                logger.warning(text, self._store.keys.bucket_log, times, problem)
            return None
