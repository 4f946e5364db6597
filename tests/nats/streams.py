"""A queue's streams seen with plain nats-py: what is really stored, whatever the library says."""

import json
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import nats
from nats.aio.client import Client

from asyncmq_nats import NATSBackend
from tests.receiver import until

__all__ = ["Streams", "plain_client", "stored"]


@asynccontextmanager
async def plain_client(url: str | list[str], **options: Any) -> AsyncIterator[Client]:
    """Yield a connected nats-py client."""
    client = await nats.connect(url, **options)
    try:
        yield client
    finally:
        await client.close()


async def stored(backend: NATSBackend) -> dict[str, Any]:
    """Return all that a server says of its streams and consumers, but for times of being used."""
    connection = backend._connection
    assert connection is not None
    found: dict[str, Any] = {}
    for name in sorted((await connection.require("STREAM.NAMES"))["streams"]):
        stream = await connection.require(f"STREAM.INFO.{name}")
        found[name] = (stream["config"], stream["state"])
        for each in (await connection.require(f"CONSUMER.LIST.{name}"))["consumers"]:
            for key in ("delivered", "ack_floor"):
                each[key].pop("last_active", None)
            kept = ("config", "delivered", "ack_floor", "num_ack_pending", "num_redelivered")
            more = ("num_pending", "paused")
            found[f"{name} {each['name']}"] = {key: each.get(key) for key in (*kept, *more)}
    return found


class Streams:
    """The two streams of a queue, by hand."""

    def __init__(self, client: Client, queue: str = "fleet", prefix: str = "amq") -> None:
        self._client = client
        self.ready = f"{prefix}_{queue}"
        self.bucket = f"KV_{prefix}_{queue}_scheduler"

    async def call(self, subject: str, payload: dict[str, Any] | None = None) -> dict[str, Any]:
        """Call the JetStream API."""
        reply = await self._client.request(
            f"$JS.API.{subject}",
            b"" if payload is None else json.dumps(payload).encode(),
            timeout=5,
        )
        answer: dict[str, Any] = json.loads(reply.data)
        assert "error" not in answer, answer
        return answer

    async def count_ready(self) -> int:
        """Return how many jobs are in the work queue, delivered or not."""
        return int((await self.call(f"STREAM.INFO.{self.ready}"))["state"]["messages"])

    async def keys(self, place: str) -> list[str]:
        """Return the keys of the bucket below `later` or `done`, claims and markers included."""
        info = await self.call(
            f"STREAM.INFO.{self.bucket}", {"subjects_filter": f"$KV.{self.bucket[3:]}.{place}.>"}
        )
        return [subject.split(".", 2)[2] for subject in info["state"].get("subjects") or {}]

    async def nothing_is_left(self) -> None:
        """Wait until no job is ready, nor on its way to become so: no more can run.

        A job that moves is written where it goes before it is deleted where it was.
        """
        await until(lambda: self.keys("later"), lambda keys: keys == [])
        await until(self.count_ready, lambda count: count == 0)

    async def count_outcomes(self) -> Counter[str]:
        """Return how many outcomes there are of each kind."""
        return Counter(key.rpartition(".")[2] for key in await self.keys("done"))
