"""nats-py's client with two shortcuts for the path that every job takes.

Per message, nats-py makes a `Msg`, parses its headers, passes a queue and awaits a callback; per
publish it validates and encodes header by header. `listen` hands the raw bytes to a function (see
`parser`); `post` queues raw bytes. Connecting, reconnecting and flushing stay nats-py's. (Built on
names of nats-py 2.16 that begin with `_`; the contract tests notice when they change.)
"""

import asyncio
import socket
from collections.abc import Iterable
from contextlib import suppress
from itertools import starmap
from typing import Final

from nats.aio.client import Client
from nats.aio.transport import TcpTransport
from nats.errors import ConnectionClosedError, MaxPayloadError, OutboundBufferLimitError

from asyncmq_nats.backends.nats._client.parser import DirectParser, Handler

__all__ = ["DirectClient", "parse_headers", "status_of"]

PING: Final = b"PING\r\n"
MAX_CONTROL_LINE: Final = 4096
"""Bytes of a command that nats-server takes by default; it ends the connection for a longer one."""
MAX_SUBJECTS: Final = MAX_CONTROL_LINE - 32
"""Bytes of a subject and its reply subject: the rest is for names, sizes and blanks."""


class DirectClient(Client):
    """A nats-py client with a raw `listen` and `post`."""

    def __init__(self) -> None:
        super().__init__()
        self._direct: dict[int, Handler] = {}
        self._ps = DirectParser(self, self._direct)
        self._flush_due = False

    @property
    def is_clustered(self) -> bool:
        """Whether the server that it is connected to is one of several."""
        return bool(self._server_info.get("cluster"))

    @property
    def server_id(self) -> str:
        """Of the server that it is connected to; another one after each start of a server."""
        return str(self._server_info.get("server_id"))

    async def listen(self, subject: str, handler: Handler) -> int:
        """Call the handler for every message on the subject.

        Return a number for `stop_listening`.
        """
        subscription = await self.subscribe(subject)
        self._direct[subscription._id] = handler
        return subscription._id

    async def stop_listening(self, *numbers: int) -> None:
        """Unsubscribe.

        The handler gets the messages that the server had sent, and none after the return.
        """
        for number in numbers:
            await self._send_unsubscribe(number)
        await self.barrier()
        self.forget(*numbers)

    def forget(self, *numbers: int) -> None:
        """End the interest of a client that is disconnected: it does not subscribe again."""
        for number in numbers:
            self._remove_sub(number)
            self._direct.pop(number, None)

    def post(self, subject: bytes, body: bytes, reply: bytes = b"", headers: bytes = b"") -> None:
        """Queue a message; it is on its way with the next turn of the event loop.

        `headers`: as on the wire. The subject is not validated.

        Raises:
            ConnectionClosedError: the client was closed.
            MaxPayloadError: it is too large, or its subjects are too long: the server would end the
                connection.
            OutboundBufferLimitError: disconnected, and as much is waiting to be sent as may.
        """
        command = self._command(subject, body, reply, headers)
        size = len(command)
        if self._status != Client.CONNECTED:
            self._check_buffer(size)
        self._pending.append(command)
        self._pending_data_size += size
        if not self._flush_due:
            self._flush_soon()

    def signal(self, subject: bytes, body: bytes, reply: bytes = b"") -> None:
        """Queue a message, or drop it while there is no connection.

        Raises:
            MaxPayloadError: as for `post`.
        """
        if self._status == Client.CONNECTED:
            self.post(subject, body, reply)

    def post_all(self, messages: Iterable[tuple[bytes, bytes, bytes, bytes]]) -> None:
        """Queue messages, all or none: their subjects, bodies, reply subjects, headers.

        Raises:
            ConnectionClosedError, MaxPayloadError, OutboundBufferLimitError: as for `post`.
        """
        commands = list(starmap(self._command, messages))
        size = sum(map(len, commands))
        if self._status != Client.CONNECTED:
            self._check_buffer(size)
        self._pending += commands
        self._pending_data_size += size
        if not self._flush_due:
            self._flush_soon()

    def _command(self, subject: bytes, body: bytes, reply: bytes, headers: bytes) -> bytes:
        header_size = len(headers)
        size = header_size + len(body)  # headers count as payload
        if size > self._max_payload or len(subject) + len(reply) > MAX_SUBJECTS:
            raise MaxPayloadError
        if not headers:
            return b"PUB %b %b %d\r\n%b\r\n" % (subject, reply, size, body)
        parts = subject, reply, header_size, size, headers, body
        return b"HPUB %b %b %d %d\r\n%b%b\r\n" % parts

    def _check_buffer(self, size: int) -> None:
        if self.is_closed:
            raise ConnectionClosedError
        if self._pending_data_size + size > self._max_pending_size:
            raise OutboundBufferLimitError

    def _flush_soon(self) -> None:
        if self._status == Client.CONNECTED:  # else nats-py flushes when it is connected again
            self._flush_due = True
            asyncio.get_running_loop().call_soon(self._flush_now)

    def _flush_now(self) -> None:
        """Write all that this turn of the event loop has queued.

        nats-py's flusher does the same in a task of its own, which is left what has to wait: while
        the socket takes no more, and what goes through a WebSocket.
        """
        self._flush_due = False
        queue, transport = self._flush_queue, self._transport
        if not self._pending or queue is None or self._status != Client.CONNECTED:
            return
        if not queue.empty():  # the flusher is about to
            return
        writer = transport._io_writer if isinstance(transport, TcpTransport) else None
        if writer is None or writer.is_closing() or writer.transport.get_write_buffer_size():
            queue.put_nowait(asyncio.get_running_loop().create_future())
            return
        commands, self._pending, self._pending_data_size = self._pending, [], 0
        writer.writelines(commands)

    @property
    def is_overfull(self) -> bool:
        """Whether more is queued than should be."""
        return self._pending_data_size > self._max_pending_size

    async def make_room(self) -> None:
        """Wait while too much is queued, for the flush timeout at most.

        It does not use nats-py's `_flush_pending`, which swallows a cancellation (2.16).
        """
        queue = self._flush_queue
        if self.is_overfull and self.is_connected and queue is not None:
            flushed = asyncio.get_running_loop().create_future()
            await queue.put(flushed)
            await asyncio.wait([flushed], timeout=self._flush_timeout)

    async def close(self) -> None:
        """Disconnect.

        Drop what a lost connection has not sent: nats-py would write it to the lost transport.
        """
        if self._flush_queue is None:  # it never began to connect: its options were refused
            return
        if not self.is_connected:
            self._pending, self._pending_data_size = [], 0
        await super().close()

    def abandon(self) -> None:
        """Disconnect without awaiting anything: the event loop of the connection runs no more."""
        if not self.is_closed:
            self._status = Client.CLOSED  # so that no task reconnects, should the loop run again
            writer = getattr(self._transport, "_bare_io_writer", None)
            if writer is not None:
                # The transport closes its own socket, for which the loop has to run again; the
                # server is told now.
                with suppress(OSError), writer.get_extra_info("socket").dup() as twin:
                    twin.shutdown(socket.SHUT_RDWR)
                with suppress(RuntimeError):  # it was closed, and never will
                    writer.transport.abort()

    @property
    def is_reading(self) -> bool:
        """Whether the connection is being read.

        It is not once `asyncio.run` has cancelled the tasks that are left at its end.
        """
        return self._reading_task is not None and not self._reading_task.done()

    async def _process_pong(self) -> None:
        """Take in the answer to a PING.

        If the task that waited for it has been cancelled, nats-py's (2.16) fails, and nothing is
        read any more.
        """
        if self._pongs:
            answered = self._pongs.pop(0)
            if not answered.done():
                answered.set_result(True)
            self._pongs_received += 1
            self._pings_outstanding = 0

    async def _process_connect_init(self) -> None:
        """Begin a connection.

        Drop the pending answers of the one before: their tasks ask again.
        """
        lost = self._pongs
        await super()._process_connect_init()
        for pong in lost:
            pong.cancel()

    async def _close(self, status: int, do_cbs: bool = True) -> None:
        await super()._close(status, do_cbs)
        for pong in self._pongs:
            pong.cancel()

    async def barrier(self) -> None:
        """Return when the server has processed all that was sent before.

        If the connection is lost, it waits for that on the next one. nats-py's `flush` alone does
        not do that: it writes its PING past the commands that are still queued (2.16), waits ten
        seconds for a PONG that went with the connection, and for nothing while there is none.

        Raises:
            ConnectionClosedError: the client was closed.
        """
        while not self.is_closed:
            pong = asyncio.get_running_loop().create_future()
            self._pongs.append(pong)
            if self.is_connected and self._transport is not None:
                self._transport.writelines([*self._pending, PING])
                self._pending, self._pending_data_size = [], 0
                if not self.is_reading:
                    return
            await asyncio.wait([pong])
            if not pong.cancelled():
                return
        raise ConnectionClosedError


def status_of(headers: bytes | None) -> str:
    """Return the status code in raw headers, as `"404"`, or `""`."""
    if headers is None or not headers.startswith(b"NATS/1.0 "):
        return ""
    return headers[9:12].decode()


def parse_headers(headers: bytes | None) -> dict[str, str]:
    """Return raw headers as a dict; the text of a status line is under `Description`."""
    found: dict[str, str] = {}
    if headers is None:
        return found
    first, *lines = headers.decode("utf-8", "replace").split("\r\n")
    if len(first) > 13:
        found["Description"] = first[13:]
    for line in lines:
        name, colon, value = line.partition(":")
        if colon:
            found[name.strip()] = value.strip()
    return found
