"""The client queues a batch whole, or not at all."""

import pytest
from nats.errors import MaxPayloadError, OutboundBufferLimitError

from asyncmq_nats.backends.nats._client.client import DirectClient


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
