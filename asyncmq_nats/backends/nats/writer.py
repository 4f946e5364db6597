"""Writes to a stream, repeated until they are confirmed.

Writes that are sent and not confirmed are in one table. A reconnect sends the whole table again, so
does a confirmation that is overdue. A write that is awaited has a random message id of its own, in
a batch its first message: by that the server knows a repetition, also when what was written is gone
again and all that it expects holds once more.
"""

import asyncio
import itertools
import json
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final

import nats.errors

from asyncmq_nats._logging import Throttle, get_logger
from asyncmq_nats.backends.base import Record, Settle, Settled, Write
from asyncmq_nats.backends.filters import is_key, matches
from asyncmq_nats.backends.nats.budget import Budget, Load
from asyncmq_nats.backends.nats.connection import Connection
from asyncmq_nats.backends.nats.errors import (
    STREAM_MISSING,
    is_full,
    is_out_of_batches,
    is_transient,
    write_error,
)
from asyncmq_nats.backends.nats.headers import (
    BATCH_LINES,
    HEADER_ROOM,
    encode_headers,
    new_message_id,
)
from asyncmq_nats.backends.nats.staging import Commit, Staged, named, post_batch, post_index_entry
from asyncmq_nats.exceptions import (
    AssetMissing,
    AsyncMQError,
    BackendError,
    ConnectionLost,
    PayloadTooLarge,
    PermissionRefused,
    StorageFull,
    StreamBusy,
    Unconfirmed,
    WriteRefused,
)

__all__ = ["BATCH_LIMIT", "Writer"]

logger = get_logger(__name__)

BATCH_LIMIT: Final = 1000
WRITES_AT_ONCE: Final = 500
"""Writes of `write_each` that are under way together."""
RESEND_AFTER: Final = 2.0
SWEEP_EVERY: Final = 0.25
LONGEST_HEADERS: Final = 8 * 1024
"""Ids have up to 1,024 bytes, and headers name a few."""
FULL_PATIENCE: Final = 1.0
"""Seconds for which an awaited write is repeated while the store is full: that may pass."""
BATCH_PATIENCE: Final = 3.0
"""Seconds for which to try again when a stream has too many open batches: ours end within less."""
NEVER: Final = float("inf")
FULL_SIGHT: Final = 5.0
"""Seconds after the last refusal for which the store counts as full."""
ERROR: Final = b'"error"'
SEQUENCE: Final = b'"seq":'

Last = Callable[[str, str], Awaitable[list[Record]]]


def _nothing() -> None:
    """Do nothing."""


@dataclass(slots=True)
class Unsettled:
    """Writes on their way: one message, or a batch."""

    log: str
    writes: Sequence[Write]
    settle: Settle
    begun: float
    deadline: float
    token: bytes = b""
    sent_at: float = 0.0
    sendings: int = 0
    full_since: float = 0.0
    staged: Staged | None = None
    """What was sent of a batch before all of it was known."""


class Writer:
    """The table of unconfirmed writes of one connection."""

    def __init__(
        self,
        connection: Connection,
        timeout: float,
        last: Last,
        on_missing: Callable[[str], None],
    ) -> None:
        """`on_missing`: told of a log that is not there."""
        self._connection = connection
        self._client = connection.client
        self._timeout = timeout
        self._last = last
        self._on_missing = on_missing
        self._table: dict[bytes, Unsettled] = {}
        self._tokens = itertools.count(1)
        self._inbox = self._client.new_inbox().encode() + b"."
        self._budget = Budget()
        self._full_at = float("-inf")
        self._ends_in_wait: set[bytes] = set()
        self.on_full: Callable[[], None] = _nothing
        """Called when the end of a job found no room. Must not block."""
        self._full_warnings = Throttle(interval=30.0)
        self._sweeping = False
        connection.on_reconnect.append(self._resend_all)
        connection.on_refusal.append(self._on_forbidden)
        connection.on_close.append(self._end_all)

    async def open(self) -> None:
        """Listen for confirmations."""
        await self._client.listen(self._inbox.decode() + "*", self._on_reply)

    async def write(self, log: str, writes: Sequence[Write], staged: Staged | None = None) -> int:
        """See `Backend.write`. `staged`: has sent some of them."""
        if self._ends_in_wait:  # they go first: the end of a job makes room
            raise StorageFull(log, "the ends of jobs that run here wait for room")
        future: asyncio.Future[Settled] = asyncio.get_running_loop().create_future()

        def settle(result: Settled) -> None:
            if not future.done():
                future.set_result(result)

        writes, count = named(writes), len(writes)
        now = time.monotonic()
        entry = Unsettled(log, writes, settle, now, now + self._timeout, staged=staged)
        if staged is not None:
            staged.release()
        size = len(writes[0].body) if count == 1 else sum([len(write.body) for write in writes])
        load = Load(count > 1, count, size)
        if not self._budget.take_now(load):
            await self._wait_for_budget(load, writes[0].subject)
        try:
            self._submit(entry)
            if self._client.is_overfull:
                await self._client.make_room()
            result = await future
        finally:
            self._table.pop(entry.token, None)  # cancelled: the caller repeats it, if anyone
            self._budget.release(load)
        if isinstance(result, BackendError):
            raise result
        return result

    def stage(self, log: str, write: Commit) -> Staged:
        """Begin a batch that is sent while it is made. `write`: stores it."""
        return Staged(self._connection, self._budget, write, log)

    async def write_each(self, log: str, writes: Sequence[Write]) -> list[int | AsyncMQError]:
        """See `Backend.write_each`."""
        if self._ends_in_wait:
            raise StorageFull(log, "the ends of jobs that run here wait for room")
        results: list[int | AsyncMQError] = []
        for start in range(0, len(writes), WRITES_AT_ONCE):
            results += await self._write_some(log, writes[start : start + WRITES_AT_ONCE])
        return results

    async def _write_some(self, log: str, writes: Sequence[Write]) -> list[int | AsyncMQError]:
        now = time.monotonic()
        load = Load(0, len(writes), sum(len(write.body) for write in writes))
        await self._wait_for_budget(load, writes[0].subject)
        found: dict[int, int | AsyncMQError] = {}
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def settle(number: int, result: int | AsyncMQError) -> None:
            found[number] = result
            if len(found) == len(writes) and not done.done():
                done.set_result(None)

        entries = [
            Unsettled(
                log,
                named((write,)),
                partial(settle, number),
                now,
                now + self._timeout,
            )
            for number, write in enumerate(writes)
        ]
        try:
            for number, entry in enumerate(entries):
                try:
                    self._submit(entry)
                except AsyncMQError as error:
                    settle(number, error)
            await self._client.make_room()
            await done
        finally:
            for entry in entries:  # as in `write`
                self._table.pop(entry.token, None)
            self._budget.release(load)
        return [found[number] for number in range(len(writes))]

    async def _wait_for_budget(self, load: Load, subject: str) -> None:
        try:
            await self._budget.take(load, self._timeout)
        except TimeoutError:
            raise Unconfirmed(f"the write to {subject}", self._timeout) from None

    @property
    def is_full(self) -> bool:
        """Whether a write to a bucket found no room a moment ago."""
        return time.monotonic() < self._full_at + FULL_SIGHT

    def send(self, log: str, write: Write, settle: Settle, timeout: float | None = None) -> None:
        """See `Backend.send`."""
        now = time.monotonic()
        deadline = NEVER if timeout is None else now + timeout
        self._submit(Unsettled(log, (write,), settle, now, deadline))

    def _submit(self, entry: Unsettled) -> None:
        most = self._client.max_payload - LONGEST_HEADERS
        for write in entry.writes:
            if len(write.body) > most:
                self._check_size(write)
        token = entry.token = b"%d" % next(self._tokens)
        self._table[token] = entry
        if not self._sweeping:
            self._sweeping = True
            self._connection.background.run(self._sweep())
        self._transmit(entry)

    def _check_size(self, write: Write) -> None:
        size, most = len(write.body), self._client.max_payload
        room = most - max(HEADER_ROOM, len(encode_headers(write, BATCH_LINES)))
        if size > room:
            raise PayloadTooLarge(f"the body for {write.subject}", size, room)

    def _transmit(self, entry: Unsettled) -> None:
        entry.sent_at = time.monotonic()
        entry.sendings += 1
        reply = self._inbox + entry.token
        staged, entry.staged = entry.staged, None
        try:
            if staged is not None and staged.finish(reply):
                return
            if len(entry.writes) == 1:
                write = entry.writes[0]
                if write.index is not None:
                    post_index_entry(self._connection, write, again=entry.sendings > 1)
                headers = encode_headers(write)
                self._client.post(write.subject.encode(), write.body, reply, headers)
            else:
                count = len(entry.writes)
                post_batch(
                    self._connection, new_message_id(), entry.writes, commit=count, reply=reply
                )
        except nats.errors.MaxPayloadError:  # another server of the cluster, with a lower limit
            subject, most = entry.writes[0].subject, self._client.max_payload
            text = (
                f"the write to {subject} is larger than this server's max_payload of {most:,} bytes"
            )
            self._finish(entry, BackendError(text))
        except nats.errors.Error as error:
            if self._client.is_closed:
                self._finish(entry, ConnectionLost(self._connection.servers))
            else:
                logger.debug("%s: sending again later: %s", entry.log, error)

    def _on_reply(self, subject: bytes, _: bytes, body: bytes, __: bytes | None) -> None:
        entry = self._table.get(subject[len(self._inbox) :])
        if entry is None:
            return
        if ERROR not in body and body:
            end = body.find(b",", start := body.find(SEQUENCE) + len(SEQUENCE))
            self._finish(entry, int(body[start : end if end > 0 else -1]))
        elif not body:  # 503: no stream listens to the subject, or its leader is being replaced
            self._connection.background.run(self._on_no_stream(entry))
        else:
            self._on_refusal(entry, json.loads(body)["error"])

    async def _on_no_stream(self, entry: Unsettled) -> None:
        answer = await self._connection.call(f"STREAM.INFO.{entry.log}")
        if answer.get("error", {}).get("err_code") == STREAM_MISSING:
            self._finish(entry, AssetMissing(f"stream {entry.log}"))
            return
        if "error" not in answer:
            taken = answer["config"].get("subjects") or ()
            foreign = next((w.subject for w in entry.writes if not matches(taken, w.subject)), None)
            if foreign is not None:
                text = (
                    f"stream {entry.log} does not take {foreign}: it was made with other subjects"
                )
                self._finish(entry, BackendError(text))
                return
        entry.sent_at = time.monotonic() - RESEND_AFTER

    def _on_refusal(self, entry: Unsettled, error: dict[str, Any]) -> None:
        if is_full(error):
            self._on_full(entry, error)
        elif (
            is_out_of_batches(error)
            and not is_key(entry.writes[0].subject)  # strangers cannot reach a bucket
            and time.monotonic() > entry.begun + BATCH_PATIENCE
        ):
            self._finish(entry, StreamBusy(entry.log))
        elif is_transient(error):
            entry.sent_at = time.monotonic() - RESEND_AFTER + random.uniform(0.0, 0.3)
        else:
            refused = write_error(entry.log, error)
            if isinstance(refused, WriteRefused) and entry.sendings > 1:
                self._connection.background.run(self._settle_repetition(entry, refused))
            else:
                self._finish(entry, refused)

    def _on_full(self, entry: Unsettled, error: dict[str, Any]) -> None:
        """Store the smaller body, if the write has one.

        End an awaited write soon, and repeat any other.
        """
        now = time.monotonic()
        entry.full_since = entry.full_since or now
        full = write_error(entry.log, error)
        if times := self._full_warnings.note():
            logger.error("%s (%d writes refused)", full, times)
        first, awaited = entry.writes[0], entry.deadline < NEVER
        if is_key(first.subject):
            self._full_at = now
        if not awaited:
            self._ends_in_wait.add(entry.token)
            self.on_full()
        if len(entry.writes) == 1 and first.when_full is not None:
            smaller = first.when_full(first.body)
            entry.writes = (replace(first, body=min(first.body, smaller, key=len), when_full=None),)
            self._transmit(entry)
        elif awaited and now - entry.full_since >= FULL_PATIENCE:
            self._finish(entry, full)
        else:
            entry.sent_at = now - RESEND_AFTER + random.uniform(0.2, 0.5)

    async def _settle_repetition(self, entry: Unsettled, refused: BackendError) -> None:
        """Settle a write that is refused unless its first sending was stored."""
        write = entry.writes[0]
        if write.message_id is not None:
            sequence = await self._find_stored(entry, write.message_id)
        else:  # sent, and not awaited: the end of an attempt, of which no two are the same
            records = await self._last(entry.log, write.subject)
            ours = bool(records) and records[0].body == write.body and not records[0].marker
            sequence = records[0].sequence if ours else None
        self._finish(entry, refused if sequence is None else sequence + len(entry.writes) - 1)

    async def _find_stored(self, entry: Unsettled, message_id: str) -> int | None:
        """Ask under which sequence a message id is stored; `None` if it is not.

        The question is a publish that is never stored, since it asks for a roll-up that the stream
        does not allow. A cluster checks that after the duplicates and before the proposal to its
        replicas; a single server checks expectations first.
        """
        headers = f"NATS/1.0\r\nNats-Msg-Id: {message_id}\r\nNats-Rollup: none\r\n\r\n".encode()
        subject = entry.writes[0].subject
        while entry.token in self._table:
            try:
                (reply,) = await self._connection.collect(
                    subject, b"", headers=headers, timeout=RESEND_AFTER, finished=bool
                )
            except TimeoutError:
                continue
            answer = json.loads(reply.body or b'{"error": {"code": 503}}')
            if "error" not in answer:
                return int(answer["seq"])
            if not is_transient(answer["error"]):
                return None
            await asyncio.sleep(SWEEP_EVERY)
        return None

    def _on_forbidden(self, refused: str, text: str) -> None:
        for entry in list(self._table.values()):
            subject = next(
                (write.subject for write in entry.writes if write.subject.lower() == refused), None
            )
            if subject is not None:
                self._finish(entry, PermissionRefused(f"publishing to {subject}", text))

    def _finish(self, entry: Unsettled, result: Settled) -> None:
        if self._table.pop(entry.token, None) is None:
            return
        self._ends_in_wait.discard(entry.token)
        if isinstance(result, AssetMissing):
            self._on_missing(entry.log)
        try:
            entry.settle(result)
        except Exception:
            logger.exception("%s: the callback of a write failed", entry.log)

    # -- repetition

    def _resend_all(self) -> None:
        """Send all again, at once: the server may be killed again, and then knows no message id."""
        overdue = time.monotonic() - RESEND_AFTER
        for entry in self._table.values():
            if any(write.once for write in entry.writes):
                # A killed server forgets the message ids of removed messages, and another process
                # may have made the same write: what came of it can be gone.
                subject = entry.writes[0].subject
                text = f"the connection was lost, and {subject} was not stored"
                lost = WriteRefused(entry.log, text)
                self._connection.background.run(self._settle_repetition(entry, lost))
                entry.sent_at = NEVER
            else:
                entry.sent_at = min(entry.sent_at, overdue)
        self._resend_overdue()

    def _end_all(self) -> None:
        for entry in list(self._table.values()):
            self._finish(entry, ConnectionLost(self._connection.servers))

    async def _sweep(self) -> None:
        try:
            while self._table:
                await asyncio.sleep(SWEEP_EVERY)
                self._resend_overdue()
        finally:
            self._sweeping = False

    def _resend_overdue(self) -> None:
        now = time.monotonic()
        for entry in [
            entry
            for entry in self._table.values()
            if now - entry.sent_at >= RESEND_AFTER or now >= entry.deadline
        ]:
            if now >= entry.deadline:
                subject = entry.writes[0].subject
                unconfirmed = Unconfirmed(f"the write to {subject}", entry.deadline - entry.begun)
                self._finish(entry, unconfirmed)
            elif self._connection.client.is_connected:
                self._transmit(entry)
