"""A relay to a server that can lose what passes it, and cut who is connected."""

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import anyio
from anyio.abc import SocketAttribute, SocketStream

from asyncmq_nats.backends.nats.embedded.server import EmbeddedServer


class Relay:
    """Passes everything on until it sees what it is to lose.

    Then it passes nothing on until it has cut off its clients, which connect again.
    """

    def __init__(self) -> None:
        self.url = ""
        self.lost = anyio.Event()
        self._pattern: re.Pattern[bytes] | None = None
        self._deaf = False
        self._clients: set[SocketStream] = set()

    def lose_answer(self, pattern: bytes) -> None:
        """Pass on what a client sends next that matches, and no answer to it."""
        self._lose(pattern, deaf=False)

    def lose_request(self, pattern: bytes) -> None:
        """Lose what a client sends next that matches."""
        self._lose(pattern, deaf=True)

    def _lose(self, pattern: bytes, *, deaf: bool) -> None:
        self.lost, self._pattern, self._deaf = anyio.Event(), re.compile(pattern), deaf

    async def cut(self) -> None:
        """End all connections. Those that are made from now on lose nothing."""
        self._pattern = None
        for client in list(self._clients):
            with suppress(anyio.BrokenResourceError, anyio.ClosedResourceError):
                await client.aclose()
        self.lost = anyio.Event()

    async def serve(self, server: EmbeddedServer, client: SocketStream) -> None:
        """Serve one client."""
        async with (
            client,
            await anyio.connect_tcp("127.0.0.1", server.port) as upstream,
            anyio.create_task_group() as group,
        ):
            self._clients.add(client)
            group.start_soon(self._pump_requests, client, upstream)
            with suppress(anyio.BrokenResourceError, anyio.ClosedResourceError):
                async for data in upstream:
                    if not self.lost.is_set():
                        await client.send(data)
            group.cancel_scope.cancel()
            self._clients.discard(client)

    async def _pump_requests(self, client: SocketStream, upstream: SocketStream) -> None:
        with suppress(anyio.BrokenResourceError, anyio.ClosedResourceError):
            async for data in client:
                if self._pattern is not None and self._pattern.search(data):
                    self.lost.set()
                if not (self.lost.is_set() and self._deaf):
                    await upstream.send(data)
        await upstream.aclose()


@asynccontextmanager
async def relaying(server: EmbeddedServer) -> AsyncIterator[Relay]:
    """A relay to the server, for as long as the block runs."""
    relay = Relay()

    async def serve(client: SocketStream) -> None:
        await relay.serve(server, client)

    listener = await anyio.create_tcp_listener(local_host="127.0.0.1")
    async with listener, anyio.create_task_group() as group:
        group.start_soon(listener.serve, serve)
        port = listener.extra(SocketAttribute.local_port)
        relay.url = server.url.replace(f":{server.port}", f":{port}")
        yield relay
        group.cancel_scope.cancel()
