"""Room on the server: a reserve for outcomes, and the fill of streams that discard old records.

A worker acknowledges a job after its outcome is stored. In a store that is full to the last byte no
outcome fits, so nothing would be acknowledged and nothing would become free. Hence each bucket has
a ballast, a record of zeros: it is deleted when a write is refused for lack of room.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from asyncmq_nats._logging import get_logger
from asyncmq_nats.backends.base import Expect, Log, Record, Write
from asyncmq_nats.backends.nats.connection import Connection
from asyncmq_nats.exceptions import (
    AssetMissing,
    AsyncMQError,
    PermissionRefused,
    StorageFull,
    WriteRefused,
)

__all__ = ["Ballasts", "Fills"]

logger = get_logger(__name__)

BALLAST_SIZE: Final = 128 * 1024
"""Room for some 250 outcomes. Each lets go of a job, whose room the next outcome takes."""
RELAY_AFTER: Final = 30.0
"""Seconds without a refusal after which a ballast is written again."""
FILL_LIFETIME: Final = 1.0
HEADERS_SIZE: Final = 420
"""Bytes that a delayed job takes beside its subject and body: a timer has many headers."""
SMALL_BODY: Final = 2048
LIMIT_LIFETIME: Final = 30.0
"""How long (seconds) a stream is taken to have no limit: another process may have set one."""
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
        """Delete the ballasts soon, and write them again when there is room. Does not block."""
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
    """The fill of a stream. `limit`: in bytes; 0 if it discards no old records."""

    limit: int = 0
    size: int = 0
    read_at: float = field(default_factory=time.monotonic)

    @property
    def is_old(self) -> bool:
        """Whether it is to be read again."""
        lifetime = FILL_LIFETIME if self.limit else LIMIT_LIFETIME
        return time.monotonic() > self.read_at + lifetime


def _replaces(write: Write) -> bool:
    """Return whether a small record takes the place of one: a higher limit in a full bucket."""
    expect = write.expect
    return (
        expect is not None
        and expect.filter == write.subject
        and expect.sequence > 0
        and len(write.body) < SMALL_BODY
    )


class Fills:
    """The fill of the streams that have a limit and discard old records.

    Without this check they would discard jobs.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._fills: dict[str, Fill] = {}

    def learn(self, log: str, config: Mapping[str, Any]) -> None:
        """Take note of the configuration of a stream."""
        fill = self._fills.setdefault(log, Fill())
        limit = max(0, config.get("max_bytes", 0)) if config.get("discard") == "old" else 0
        if limit != fill.limit:
            fill.limit, fill.read_at = limit, float("-inf")

    def needs_check(self, log: str) -> bool:
        """Return whether a stream may have a limit: as a rule there is none."""
        fill = self._fills.get(log)
        return fill is not None and (fill.limit > 0 or fill.is_old)

    async def check(self, log: str, writes: Sequence[Write]) -> None:
        """Make sure that a stream has room for the writes.

        Raises:
            StorageFull: it would have to discard old records for them.
        """
        fill = self._fills.get(log)
        if fill is None:
            return
        if fill.is_old:
            fill.read_at = time.monotonic()
            if not fill.limit:  # as a rule there is none: no job waits for the answer
                self._connection.background.run(self._find_limit(log))
                return
            await self._read(log, fill)
        if not fill.limit or (len(writes) == 1 and _replaces(writes[0])):
            return
        size = sum(len(write.body) + len(write.subject) + HEADERS_SIZE for write in writes)
        if fill.size + size > FULL_FOR_JOBS * fill.limit:
            raise StorageFull(
                log,
                f"it has {fill.size:,} of its {fill.limit:,} bytes, and a tenth is for outcomes",
            )
        fill.size += size

    async def _read(self, log: str, fill: Fill) -> None:
        answer = await self._connection.require(f"STREAM.INFO.{log}")
        fill.size = answer["state"]["bytes"]
        self.learn(log, answer["config"])

    async def _find_limit(self, log: str) -> None:
        try:
            self.learn(log, (await self._connection.require(f"STREAM.INFO.{log}"))["config"])
        except AssetMissing:  # it is declared again by the next write
            self._fills.pop(log, None)
        except PermissionRefused:
            self._fills[log].read_at = float("inf")
