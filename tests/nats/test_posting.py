"""The client queues a batch whole, or not at all."""

import asyncio
from collections.abc import Iterable
from typing import Any

import pytest
from nats.errors import MaxPayloadError, OutboundBufferLimitError

from asyncmq_nats.backends.base import Expect, Log, Timer, Write
from asyncmq_nats.backends.nats._client.client import DirectClient
from asyncmq_nats.backends.nats.backend import NATSBackend
from asyncmq_nats.backends.nats.headers import encode_headers, has_headers
from tests.receiver import holds


def disconnected(room: int) -> DirectClient:
    client = DirectClient()
    client._status, client._max_pending_size = DirectClient.RECONNECTING, room
    return client


def test_a_batch_for_which_there_is_no_room_while_disconnected_is_not_begun() -> None:
    client = disconnected(room=100)
    with pytest.raises(OutboundBufferLimitError):
        client.post_all([(b"a", b"x" * 60, b"", b""), (b"b", b"x" * 60, b"", b"")])
    assert not client._pending
    client.post_all([(b"a", b"x" * 20, b"", b""), (b"b", b"x" * 20, b"", b"")])
    assert len(client._pending) == 2


def test_a_batch_with_a_message_that_is_too_large_is_not_begun() -> None:
    client = disconnected(room=10_000)
    client._max_payload = 50
    with pytest.raises(MaxPayloadError):
        client.post_all([(b"a", b"x" * 20, b"", b""), (b"b", b"x" * 60, b"", b"")])
    assert not client._pending


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"expect": Expect("notes.a")},
        {"ttl": 60.0},
        {"timer": Timer(1.0, "notes.b")},
        {"message_id": "m"},
        {"removes": "notes.b"},
        {"marker": True},
        {"beside": True},
        {"index": "notes.b"},
    ],
    ids=str,
)
@pytest.mark.parametrize("subject", ["notes.a", "$KV.notes.a"])
def test_a_write_without_headers_has_none(subject: str, options: dict[str, Any]) -> None:
    write = Write(subject, b"", **options)
    assert has_headers(write) or encode_headers(write) == b""
    assert not has_headers(Write("notes.a", b""))


async def test_what_was_staged_is_sent_once(
    nats_backend: NATSBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    await nats_backend.declare_log(Log("notes", ("notes.>",)))
    sizes, post_all = list[int](), DirectClient.post_all

    def counted(client: DirectClient, messages: Iterable[tuple[bytes, ...]]) -> None:
        given = list(messages)
        sizes.append(len(given))
        post_all(client, given)  # type: ignore[arg-type]

    monkeypatch.setattr(DirectClient, "post_all", counted)
    staged = nats_backend.stage("notes")
    for start in range(0, 30, 10):
        await staged.add(*[Write(f"notes.{n}", b"") for n in range(start, start + 10)])
    await staged.commit()
    assert sizes == [9, 10, 10, 1]  # the last one that is known is held back: it commits


class SlowServer:
    """Speaks as much of the protocol as a client needs, and reads nothing more until told to."""

    def __init__(self) -> None:
        self.reads = asyncio.Event()
        self.received = b""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b'INFO {"version": "2.12.2", "max_payload": 1048576, "headers": true}\r\n')
        while (line := await reader.readline()) and not line.startswith(b"PING"):
            pass
        writer.write(b"PONG\r\n")
        await self.reads.wait()
        while data := await reader.read(1 << 20):
            self.received += data
        writer.close()


async def test_what_the_socket_does_not_take_waits_in_the_queue_and_is_sent_later() -> None:
    server, client = SlowServer(), DirectClient()
    async with await asyncio.start_server(server.serve, "127.0.0.1", 0) as listening:
        port = listening.sockets[0].getsockname()[1]
        await client.connect(f"nats://127.0.0.1:{port}", allow_reconnect=False)
        body, count = b"x" * 500_000, 60
        try:
            for _ in range(count):  # each in a turn of its own
                client.post(b"a", body)
                await asyncio.sleep(0)
                await asyncio.sleep(0)
            # The bound on what is queued holds only for what the transport was not given.
            assert client.is_overfull
            assert client._pending_data_size > (count - 40) * len(body)
            server.reads.set()
            await holds(lambda: server.received.count(b"PUB a  500000\r\n") == count)
            assert not client.is_overfull
        finally:
            server.reads.set()
            await client.close()
    await holds(lambda: server.received.count(body) == count)
