"""The secret of a queue: message ids made with it cannot be guessed by producers that only publish."""

import os

from asyncmq_nats.backends.base import Backend, Expect, Write
from asyncmq_nats.exceptions import InvalidJob, WriteRefused
from asyncmq_nats.wire.codec import dump_json, load_json
from asyncmq_nats.wire.keys import QueueSubjects

__all__ = ["QueueSecret"]


class QueueSecret:
    """Reads the secret of one queue, and makes it when there is none."""

    def __init__(self, backend: Backend, keys: QueueSubjects) -> None:
        self._backend = backend
        self._keys = keys
        self._secret = b""

    async def get(self) -> bytes:
        """Return the secret."""
        while not self._secret:
            self._secret = await self._read() or await self._make()
        return self._secret

    async def _read(self) -> bytes:
        records = await self._backend.last(self._keys.bucket_log, self._keys.secret)
        if not records or records[0].marker:
            return b""
        try:
            return str(load_json(records[0].body).get("secret", "")).encode()
        except InvalidJob:
            return b""

    async def _make(self) -> bytes:
        secret = os.urandom(32).hex()
        write = Write(
            self._keys.secret, dump_json({"secret": secret}), Expect(self._keys.secret, 0)
        )
        try:
            await self._backend.write(self._keys.bucket_log, write)
        except WriteRefused:  # another process was faster
            return await self._read()
        return secret.encode()
