"""Atomic batches: their messages, and those that are sent while they are still being made."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import fields
from operator import attrgetter
from typing import Final

import nats.errors

from asyncmq_nats.backends.base import Write
from asyncmq_nats.backends.nats.budget import Budget, Load
from asyncmq_nats.backends.nats.connection import Connection
from asyncmq_nats.backends.nats.headers import (
    batch_lines,
    encode_headers,
    has_headers,
    new_message_id,
)

__all__ = ["Commit", "Staged", "named", "post_batch", "post_index_entry"]

values_of: Final = attrgetter(*[each.name for each in fields(Write)])
NOTHING: Final = Load(0, 0, 0)

Commit = Callable[[str, Sequence[Write], "Staged"], Awaitable[int]]


def post_index_entry(connection: Connection, write: Write, *, again: bool = False) -> None:
    """Send the index entry of a write, unconfirmed. `again`: it may have been sent before.

    On one connection a stream stores in order, so it is there if what follows is.
    """
    assert write.index is not None
    # A roll-up costs the server time, also if nothing is there. An entry that a refused write has
    # left is no harm: readers take the last one.
    is_first = not again and write.expect is not None and not write.expect.sequence
    headers = encode_headers(Write(write.index, b"", ttl=write.ttl, beside=is_first))
    connection.client.post(write.index.encode(), b"", b"", headers)


def post_batch(
    connection: Connection,
    batch_id: str,
    writes: Iterable[Write],
    *,
    first: int = 1,
    commit: int = 0,
    reply: bytes = b"",
) -> None:
    """Send messages of a batch, all or none of them, after their index entries.

    One flush, without awaiting the first message's answer. Only the last message of the batch has a
    reply subject: a refused first message makes the batch "incomplete" there, which is repeated; a
    batch id is never used twice.

    Args:
        connection: to the server.
        batch_id: any text of up to 64 bytes.
        writes: those to send now.
        first: the number of the first of them in the batch.
        commit: the number of the batch's last one; 0 if it is not among these.
        reply: the subject for the answer to the last one.

    Raises:
        nats.errors.Error: as for `DirectClient.post`.
    """
    lines, mixed_up = batch_lines(batch_id), connection.mixes_up_expectations
    plain = f"NATS/1.0\r\n{lines}".encode()
    messages: list[tuple[bytes, bytes, bytes, bytes]] = []
    for number, write in enumerate(writes, first):
        if write.index is not None:
            post_index_entry(connection, write, again=True)
        last = number == commit
        if last or has_headers(write):
            more = f"{lines}{number}\r\n" + ("Nats-Batch-Commit: 1\r\n" if last else "")
            headers = encode_headers(write, more, number * mixed_up)
        else:
            headers = b"%b%d\r\n\r\n" % (plain, number)
        messages.append((write.subject.encode(), write.body, reply if last else b"", headers))
    connection.client.post_all(messages)


def named(writes: Sequence[Write]) -> Sequence[Write]:
    """Return the writes, the first of them with a message id."""
    if not writes or writes[0].message_id is not None:
        return writes
    first = Write(*values_of(writes[0]))  # `dataclasses.replace` takes five times as long
    first.message_id = new_message_id()
    return (first, *writes[1:])


class Staged:
    """A batch that is sent while it is made; see `Backend.stage`.

    The server keeps what it got apart, and stores it with the last message, the commit: the last
    write that is known is held back. If anything of it was lost on the way, the server refuses the
    commit as incomplete, and the writer sends the whole batch again under another id.
    """

    def __init__(
        self,
        connection: Connection,
        budget: Budget,
        write: Commit,
        log: str,
    ) -> None:
        """`write`: stores the batch."""
        self._connection = connection
        self._budget = budget
        self._write = write
        self._log = log
        self._writes: list[Write] = []
        self._id = new_message_id()
        self._sent = 0
        self._load = NOTHING
        self._is_open = True
        """Whether all but the last write are on their way."""

    async def add(self, *writes: Write) -> None:
        """See `base.Staged`."""
        self._writes += writes if self._writes else named(writes)
        if self._is_open and not self._send():
            self.drop()
        await asyncio.sleep(0)  # it is flushed now
        await self._connection.client.make_room()

    def _send(self) -> bool:
        """Send all but the last write. Return whether that is on its way."""
        client = self._connection.client
        writes = self._writes[self._sent : -1]
        if not writes:
            return True
        load = Load(int(not self._sent), len(writes), sum([len(write.body) for write in writes]))
        if not client.is_connected or client.is_overfull or not self._budget.take_now(load):
            return False
        self._load = Load(*map(sum, zip(self._load, load, strict=True)))
        try:
            post_batch(self._connection, self._id, writes, first=self._sent + 1)
        except nats.errors.Error:
            return False
        self._sent += len(writes)
        return True

    async def commit(self) -> int:
        """See `base.Staged`."""
        try:
            return await self._write(self._log, self._writes, self)
        finally:
            self.drop()

    def finish(self, reply: bytes) -> bool:
        """Send the rest, with the commit. Return `False` if the whole batch has to be sent.

        Raises:
            nats.errors.Error: as for `DirectClient.post`.
        """
        if not self._is_open or not self._sent:
            return False
        rest, count = self._writes[self._sent :], len(self._writes)
        post_batch(
            self._connection, self._id, rest, first=self._sent + 1, commit=count, reply=reply
        )
        self._is_open = False
        return True

    def release(self) -> None:
        """Give back the room in the budget, for the whole batch to take its own."""
        load, self._load = self._load, NOTHING
        self._budget.release(load)

    def drop(self) -> None:
        """See `base.Staged`."""
        if self._is_open and self._sent and self._connection.client.is_connected:
            # A number that does not follow ends a batch; else it would stay for ten seconds.
            gap = Write(self._writes[0].subject, b"")
            with suppress(nats.errors.Error):
                post_batch(self._connection, self._id, [gap], first=self._sent + 2)
        self._is_open = False
        self.release()
