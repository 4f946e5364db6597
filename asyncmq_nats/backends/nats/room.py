"""Room on the server.

A reserve for outcomes, and how full the streams are that discard old records. A worker acknowledges
a job after its outcome is stored. In a store that is full to the last byte no outcome fits, so
nothing would be acknowledged and nothing would become free. Hence each bucket
has a ballast, a record of zeros: it is deleted when a write is refused for lack of room.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from asyncmq_nats._logging import get_logger
from asyncmq_nats.backends.base import Expect, Log, Record, Write
from asyncmq_nats.backends.nats.connection import Connection
from asyncmq_nats.exceptions import AsyncMQError, StorageFull, WriteRefused

__all__ = ["Ballasts", "Fills"]

logger = get_logger(__name__)

BALLAST_SIZE: Final = 128 * 1024
"""Room for some 250 outcomes. Each lets go of a job, whose room the next outcome takes."""
RELAY_AFTER: Final = 30.0
"""How long (seconds) nothing was refused before a ballast is laid again."""
FILL_LIFETIME: Final = 1.0
FULL_FOR_JOBS: Final = 0.9
"""A stream that discards old records takes no new jobs beyond; the rest is for outcomes."""

SendWrite = Callable[[str, Write], Awaitable[int]]
ReadLast = Callable[..., Awaitable[list[Record]]]
Delete = Callable[[str, int], Awaitable[bool]]


class Ballasts:
    """The ballast records of the logs that one connection uses."""

    def __init__(
        self,
        connection: Connection,
        write: SendWrite,
        read: ReadLast,
        delete: Delete,
        is_full: Callable[[], bool],
    ) -> None:
        self._connection = connection
        self._write = write
        self._read = read
        self._delete = delete
        self._is_full = is_full
        self._subjects: dict[str, str] = {}
        self._releasing = False

    async def lay(self, log: str) -> None:
        """Write the ballast of a log, unless it is there or there is no room for it."""
        subject = self._subjects.get(log)
        if subject is None:
            return
        try:
            size = min(BALLAST_SIZE, self._connection.client.max_payload // 4)
            await self._write(log, Write(subject, bytes(size), Expect(subject)))
        except (WriteRefused, StorageFull):
            pass
        except AsyncMQError as error:
            logger.warning("%s: no reserve for outcomes in a full store: %s", log, error)

    def note(self, log: Log) -> None:
        """Remember that a log may have a ballast."""
        if log.ballast is not None:
            self._subjects[log.name] = log.ballast

    def release_all(self) -> None:
        """Delete the ballasts soon, and lay them again when there is room. Does not block."""
        if self._subjects and not self._releasing:
            self._releasing = True
            self._connection.background.run(self._release_and_lay())

    async def _release_and_lay(self) -> None:
        try:
            for log, subject in list(self._subjects.items()):
                for record in await self._read(log, subject):
                    if await self._delete(log, record.sequence):
                        logger.warning("%s: the reserve for outcomes is in use", log)
            quiet_since = time.monotonic()
            while time.monotonic() < quiet_since + RELAY_AFTER:
                await asyncio.sleep(1.0)
                if self._is_full():
                    quiet_since = time.monotonic()
        finally:
            self._releasing = False
        for log in list(self._subjects):
            await self.lay(log)


@dataclass(slots=True)
class Fill:
    """How full a stream is."""

    limit: int
    size: int
    read_at: float


class Fills:
    """How full the streams are that have a limit and discard old records.

    Without this they would discard jobs.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._fills: dict[str, Fill] = {}

    def learn(self, log: str, config: Mapping[str, Any]) -> None:
        """Take note of the configuration of a stream."""
        limit = config.get("max_bytes", -1)
        if limit > 0 and config.get("discard") == "old":
            self._fills.setdefault(log, Fill(limit, 0, float("-inf")))
        else:
            self._fills.pop(log, None)

    def has_limit(self, log: str) -> bool:
        """Return whether it is one of these streams."""
        return log in self._fills

    async def check(self, log: str, writes: Sequence[Write]) -> None:
        """Make sure that a stream has room for the writes.

        Raises:
            StorageFull: it would have to discard old records for them.
        """
        fill = self._fills.get(log)
        if fill is None:
            return
        size = sum(len(write.body) for write in writes)
        if time.monotonic() > fill.read_at + FILL_LIFETIME:
            fill.read_at = time.monotonic()
            state = (await self._connection.require(f"STREAM.INFO.{log}"))["state"]
            fill.size = state["bytes"]
        if fill.size + size > FULL_FOR_JOBS * fill.limit:
            raise StorageFull(
                log,
                f"it has {fill.size:,} of its {fill.limit:,} bytes, and a tenth is for outcomes",
            )
        fill.size += size
