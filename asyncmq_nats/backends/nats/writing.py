"""Writes to a stream: headers, atomic batches, and repetition until confirmed without ever writing twice.

What was sent and not confirmed is in one table. A reconnect sends the whole table again, so does a confirmation that is overdue.
"""

import asyncio
import itertools
import json
import logging
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final

from nats.aio.msg import Msg

from asyncmq_nats.backends.base import Record, Settle, Settled, Write
from asyncmq_nats.backends.nats.connection import Connection
from asyncmq_nats.backends.nats.errors import DUPLICATE_IN_BATCH, STREAM_MISSING, is_transient, mapped_errors, write_error
from asyncmq_nats.exceptions import AssetMissing, BackendError, PayloadTooLarge, PermissionRefused, Unconfirmed, WriteRefused

__all__ = ["BATCH_LIMIT", "Writer", "write_headers"]

logger = logging.getLogger(__name__)

BATCH_LIMIT: Final = 1000
RESEND_AFTER: Final = 2.0
SWEEP_EVERY: Final = 0.25
ERROR: Final = b'"error"'
SEQUENCE: Final = b'"seq":'

Headers = dict[str, str]
Last = Callable[[str, str], Awaitable[list[Record]]]


def write_headers(write: Write) -> Headers | None:
    """Return the headers that say on the wire what the write asks for."""
    headers: Headers = {}
    if write.message_id is not None:
        headers["Nats-Msg-Id"] = write.message_id
    if write.expect is not None:
        headers["Nats-Expected-Last-Subject-Sequence"] = str(write.expect.sequence)
        headers["Nats-Expected-Last-Subject-Sequence-Subject"] = write.expect.filter
    if write.ttl is not None:
        headers["Nats-TTL"] = f"{max(1, round(write.ttl))}s"
    if write.timer is not None:
        headers["Nats-Schedule"] = "@at " + datetime.fromtimestamp(write.timer.at, UTC).isoformat().replace("+00:00", "Z")
        headers["Nats-Schedule-Target"] = write.timer.target
    if write.removes is not None:
        headers["Nats-Schedule-Next"] = "purge"
        headers["Nats-Scheduler"] = write.removes
    if write.marker:
        headers["KV-Operation"] = "DEL"
    return headers or None


@dataclass(slots=True)
class Unsettled:
    """Writes on their way: one message, or a batch."""

    log: str
    writes: Sequence[Write]
    settle: Settle
    deadline: float
    token: str = ""
    sent_at: float = 0.0
    sendings: int = 0
    on_the_way: bool = field(default=False)


class Writer:
    """The table of unconfirmed writes of one connection."""

    def __init__(self, connection: Connection, timeout: float, last: Last) -> None:
        self._connection = connection
        self._timeout = timeout
        self._last = last
        self._table: dict[str, Unsettled] = {}
        self._batches = itertools.count(1)
        self._batch_prefix = ""
        self._sweeping = False
        self._publish = connection.client.publish
        connection.on_reconnect.append(self._resend_all)

    async def write(self, log: str, writes: Sequence[Write]) -> int:
        """See `Backend.write`."""
        future: asyncio.Future[Settled] = asyncio.get_running_loop().create_future()

        async def settle(result: Settled) -> None:
            if not future.done():
                future.set_result(result)

        await self._submit(Unsettled(log, writes, settle, time.monotonic() + self._timeout))
        result = await future
        if isinstance(result, BackendError):
            raise result
        return result

    async def send(self, log: str, write: Write, settle: Settle) -> None:
        """See `Backend.send`."""
        await self._submit(Unsettled(log, (write,), settle, float("inf")))

    async def _submit(self, entry: Unsettled) -> None:
        self._check_size(entry.writes)

        async def on_reply(msg: Msg) -> None:
            await self._on_reply(entry, msg)

        entry.token = self._connection.expect_reply(on_reply)
        self._table[entry.token] = entry
        if not self._sweeping:
            self._sweeping = True
            self._connection.background.run(self._sweep())
        await self._transmit(entry)

    def _check_size(self, writes: Sequence[Write]) -> None:
        limit = self._connection.client.max_payload - 1024  # the server counts headers as well
        for write in writes:
            if len(write.body) > limit:
                raise PayloadTooLarge(f"the body for {write.subject}", len(write.body), limit)

    async def _transmit(self, entry: Unsettled) -> None:
        entry.sent_at = time.monotonic()
        if not self._connection.client.is_connected and entry.sendings:
            return
        entry.sendings += 1
        reply = self._connection.reply_to(entry.token)
        try:
            with mapped_errors(self._connection.servers):
                if len(entry.writes) == 1:
                    write = entry.writes[0]
                    await self._publish(write.subject, write.body, reply, write_headers(write))
                else:
                    await self._transmit_batch(entry.writes, reply)
        except BackendError as error:
            if self._connection.client.is_closed:
                await self._finish(entry, error)
            else:
                logger.debug("%s: sending again later: %s", entry.log, error)

    async def _transmit_batch(self, writes: Sequence[Write], reply: str) -> None:
        # One flush, without awaiting the first message's answer. Only the last message has a reply subject: a refused first message
        # makes the batch "incomplete" there, which is repeated; a batch id is never used twice.
        if not self._batch_prefix:
            self._batch_prefix = self._connection.client.new_inbox().rpartition(".")[2]
        batch_id = f"{self._batch_prefix}{next(self._batches)}"
        for number, write in enumerate(writes, 1):
            headers = write_headers(write) or {}
            headers["Nats-Batch-Id"] = batch_id
            headers["Nats-Batch-Sequence"] = str(number)
            if number == len(writes):
                headers["Nats-Batch-Commit"] = "1"
                await self._publish(write.subject, write.body, reply, headers)
            else:
                await self._publish(write.subject, write.body, "", headers)

    async def _on_reply(self, entry: Unsettled, msg: Msg) -> None:
        data = msg.data
        if ERROR not in data and data:
            end = data.find(b",", start := data.find(SEQUENCE) + len(SEQUENCE))
            await self._finish(entry, int(data[start : end if end > 0 else -1]))
        elif not data:  # 503: no stream listens to the subject, or its leader is being replaced
            self._connection.background.run(self._on_no_stream(entry))
        else:
            await self._on_refusal(entry, json.loads(data)["error"])

    async def _on_no_stream(self, entry: Unsettled) -> None:
        answer = await self._connection.call(f"STREAM.INFO.{entry.log}")
        if answer.get("error", {}).get("err_code") == STREAM_MISSING:
            await self._finish(entry, AssetMissing(f"stream {entry.log}"))
        elif "error" not in answer and self._foreign(entry, answer):
            await self._finish(
                entry, BackendError(f"stream {entry.log} does not take {entry.writes[0].subject}: it was made with other subjects")
            )
        else:
            entry.sent_at = time.monotonic() - RESEND_AFTER

    @staticmethod
    def _foreign(entry: Unsettled, answer: dict[str, Any]) -> bool:
        first = entry.writes[0].subject.split(".")
        return all(
            any(ours not in (token, "") and token not in ("*", ">") for token, ours in zip(subject.split("."), first, strict=False))
            for subject in answer["config"]["subjects"]
        )

    async def _on_refusal(self, entry: Unsettled, error: dict[str, Any]) -> None:
        if is_transient(error):
            entry.sent_at = time.monotonic() - RESEND_AFTER + random.uniform(0.0, 0.3)
        elif error.get("err_code") == DUPLICATE_IN_BATCH and entry.sendings > 1:
            self._connection.background.run(self._settle_if_written(entry, WriteRefused(entry.log, "a batch with the same messages")))
        else:
            refused = write_error(entry.log, error)
            if isinstance(refused, WriteRefused) and entry.sendings > 1:
                self._connection.background.run(self._settle_if_written(entry, refused))
            else:
                await self._finish(entry, refused)

    async def _settle_if_written(self, entry: Unsettled, refused: BackendError) -> None:
        """Settle a repetition that was refused: what refused it may be our own first sending."""
        write = entry.writes[-1]
        records = await self._last(entry.log, write.subject)
        ours = bool(records) and records[0].body == write.body
        await self._finish(entry, records[0].sequence if ours else refused)

    async def _finish(self, entry: Unsettled, result: Settled) -> None:
        if self._table.pop(entry.token, None) is None:
            return
        self._connection.forget(entry.token)
        await entry.settle(result)

    # -- repetition

    def _resend_all(self) -> None:
        overdue = time.monotonic() - RESEND_AFTER
        for entry in self._table.values():
            entry.sent_at = min(entry.sent_at, overdue)

    async def _sweep(self) -> None:
        try:
            while self._table:
                await asyncio.sleep(SWEEP_EVERY)
                now = time.monotonic()
                for entry in [entry for entry in self._table.values() if now - entry.sent_at >= RESEND_AFTER or now >= entry.deadline]:
                    if now >= entry.deadline:
                        await self._finish(entry, self._overdue(entry))
                    elif self._connection.client.is_connected:
                        await self._transmit(entry)
        finally:
            self._sweeping = False

    def _overdue(self, entry: Unsettled) -> BackendError:
        subject = entry.writes[0].subject
        refusal = self._connection.last_refusal(subject)
        if refusal is not None:
            return PermissionRefused(f"publishing to {subject}", refusal)
        return Unconfirmed(f"the write to {subject}", self._timeout)
