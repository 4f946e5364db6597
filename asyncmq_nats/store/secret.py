"""The secret of a queue, and the ids made with it that only the queue's own processes can tell."""

import os
from functools import partial
from hashlib import blake2b
from typing import Final

from asyncmq_nats._logging import get_logger
from asyncmq_nats.backends.base import Expect, Record, Write
from asyncmq_nats.exceptions import StorageFull, WriteRefused
from asyncmq_nats.store.commit import REPLICA_LAG_DELAYS, look_for
from asyncmq_nats.store.queue_store import QueueStore

__all__ = ["QueueSecret", "keyed_id"]

logger = get_logger(__name__)

SECRET_BYTES: Final = 32
ID_BYTES: Final = 16


def keyed_id(secret: bytes, *parts: str) -> str:
    """Return an id that is the same in every process of the queue, and that no one else can tell.

    It is for message ids: the server drops a write under an id that it knows, so a stranger who
    guesses one could make a job vanish by writing first.
    """
    return blake2b("\0".join(parts).encode(), key=secret, digest_size=ID_BYTES).hexdigest()


class QueueSecret:
    """The random bytes `queue.secret` of one queue, made by the first process that asks.

    The key has two tokens, so no event is made of it.
    """

    def __init__(self, store: QueueStore) -> None:
        self._store = store
        self._keys = store.keys
        self._secret = b""

    async def get(self) -> bytes:
        """Return the secret. It is read once.

        Raises:
            BackendError: it cannot be read or stored.
        """
        while not self._secret:
            record = await self._read()
            if record is not None and len(record.body) >= SECRET_BYTES:
                self._secret = record.body[:64]
            else:
                await self._make(record)
        return self._secret

    async def _make(self, malformed: Record | None) -> None:
        """Store a secret, unless another process does."""
        key, secret = self._keys.secret, os.urandom(SECRET_BYTES).hex().encode()
        if malformed is not None:
            logger.warning("%s is too short for a secret; replacing it", key)
        expect = Expect(key, 0 if malformed is None else malformed.sequence)
        try:
            await self._store.write(Write(key, secret, expect))
        except StorageFull as error:
            # Its own secret makes this process's ids unguessable. Another process has another
            # one: then only what a write expects refuses a repetition.
            logger.warning("queue %s: its secret is not stored: %s", self._keys.queue, error)
            self._secret = secret
        except WriteRefused:  # another process was faster: a replica may not know it yet
            await look_for(partial(self._is_other_than, malformed), REPLICA_LAG_DELAYS)
        else:
            self._secret = secret

    async def _read(self) -> Record | None:
        records = await self._store.last(self._keys.secret)
        return records[0] if records else None

    async def _is_other_than(self, malformed: Record | None) -> bool:
        record = await self._read()
        return record is not None and (malformed is None or record.sequence > malformed.sequence)
