"""Follows a stream by reading it: a work queue allows no second consumer.

A republish rule would have the server tell of each message at once, heard or not: a fifth of what
it costs to store a small one.
"""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import Final

from asyncmq_nats._logging import get_logger
from asyncmq_nats.backends.base import Record
from asyncmq_nats.backends.filters import compile_filter
from asyncmq_nats.backends.nats.connection import Background
from asyncmq_nats.backends.nats.reader import READ_LIMIT, Reader
from asyncmq_nats.exceptions import AssetMissing, AsyncMQError, PermissionRefused

__all__ = ["Watch", "Watches"]

logger = get_logger(__name__)

INTERVAL: Final = 0.1
"""Seconds between two reads, unless the first one brought all it may."""
READS_A_SECOND: Final = 100
"""Of all watches of one connection: a page of a dashboard may watch hundreds of queues."""
MISSING_INTERVAL: Final = 1.0
"""Seconds after a read of a stream that is not there, or does not answer."""
QUIET_READS: Final = 10
"""Reads without a record after which to ask by time: a stream that is made again begins at 1."""


class Watches:
    """The watches of one connection."""

    def __init__(self, reader: Reader, background: Background) -> None:
        self.reader = reader
        self.background = background
        self.open: set[Watch] = set()

    @property
    def interval(self) -> float:
        """Seconds between two reads of a watch."""
        return max(INTERVAL, len(self.open) / READS_A_SECOND)


class Watch:
    """A `Watching`: see there."""

    def __init__(
        self,
        watches: Watches,
        log: str,
        filter: str,
        on_record: Callable[[Record], None],
        after: float,
    ) -> None:
        """`after`: Unix seconds by the server's clock."""
        self._watches = watches
        self._log = log
        self._match = compile_filter(filter).match
        # A filter of many subjects has the server count all that match, so all are read then.
        self._filter = None if filter.endswith(("*", ">")) else filter
        self._on_record = on_record
        self._begin = self._time = after
        self._first = self._sequence = 0
        self._quiet = 0
        self._task: asyncio.Task[None] | None = None

    async def begin(self) -> None:
        """Hand out what is stored from now on."""
        with suppress(AsyncMQError):
            while len(await self._read()) == READ_LIMIT:
                pass
        self._first = self._sequence
        self._watches.open.add(self)
        self._task = self._watches.background.run(self._follow())

    def covers(self, sequence: int, time: float) -> bool:
        """See `Watching`."""
        return sequence > self._first if self._first else time > self._begin

    async def unsubscribe(self) -> None:
        """See `Subscription`."""
        self._watches.open.discard(self)
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    async def _follow(self) -> None:
        while True:
            pause = self._watches.interval
            try:
                records = await self._read()
            except PermissionRefused as error:
                logger.warning("%s: its new records are not heard of: %s", self._log, error)
                return
            except AssetMissing:
                records, pause, self._sequence = [], MISSING_INTERVAL, 0
            except AsyncMQError as error:
                logger.debug("%s: could not be read: %s", self._log, error)
                records, pause = [], MISSING_INTERVAL
            for record in records:
                self._hand_out(record)
            await asyncio.sleep(0.0 if len(records) == READ_LIMIT else pause)

    async def _read(self) -> list[Record]:
        """Return the next records."""
        by_time = not self._sequence or self._quiet == QUIET_READS
        start = None if by_time else self._sequence + 1
        found = await self._watches.reader.read_on(
            self._log, self._filter, from_sequence=start, after=self._time
        )
        # A time is asked for less exactly than the server knows it.
        time, sequence = self._time, self._sequence
        records = [each for each in found if each.time > time or each.sequence > sequence]
        self._quiet = 0 if records or by_time else self._quiet + 1
        if records:
            self._sequence, self._time = records[-1].sequence, records[-1].time
        return records

    def _hand_out(self, record: Record) -> None:
        if self._match(record.subject):
            try:
                self._on_record(record)
            except Exception:
                logger.exception("a callback for records of %s failed", self._log)
