"""Three nats-servers as a cluster on the loopback interface."""

import json
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import anyio

from asyncmq_nats.backends.nats.embedded.server import EmbeddedServer
from tests.nats.processes import PATIENCE
from tests.nats.streams import Streams, plain_client

__all__ = ["Cluster", "free_ports"]

SIZE = 3


class Cluster:
    """Servers that replicate what is stored.

    Each keeps its port and its store when it is killed and started again.
    """

    def __init__(self, directory: Path) -> None:
        routes = free_ports(SIZE)
        listed = ", ".join(f'"nats://127.0.0.1:{port}"' for port in routes)
        self.servers = [
            EmbeddedServer(
                directory / f"server-{number}",
                config=(
                    f"server_name: server-{number}\n"
                    f'cluster {{ name: test, listen: "127.0.0.1:{port}", routes: [{listed}] }}\n'
                ),
            )
            for number, port in enumerate(routes)
        ]

    @property
    def urls(self) -> list[str]:
        return [server.url for server in self.servers]

    def start(self) -> None:
        """Start all at the same time: one alone is not ready."""
        with ThreadPoolExecutor() as threads:
            list(threads.map(EmbeddedServer.start, self.servers))

    def stop(self) -> None:
        for server in self.servers:
            server.kill()
            server.stop()

    async def ready(self) -> None:
        """Wait until the servers have chosen a leader for their streams."""
        payload = json.dumps(
            {"name": "probe", "subjects": ["probe"], "num_replicas": SIZE}
        ).encode()
        async with plain_client(self.urls[0]) as client:
            with anyio.fail_after(PATIENCE):
                while True:
                    try:
                        answer = json.loads(
                            (
                                await client.request(
                                    "$JS.API.STREAM.CREATE.probe", payload, timeout=0.5
                                )
                            ).data
                        )
                    except TimeoutError:
                        continue
                    if "error" not in answer:
                        return
                    await anyio.sleep(0.05)

    async def leader(self, stream: str, consumer: str | None = None) -> EmbeddedServer:
        """Return the server that leads a stream, or a consumer of it, once there is one."""
        call = f"STREAM.INFO.{stream}" if consumer is None else f"CONSUMER.INFO.{stream}.{consumer}"
        leader = (await self._find(call, lambda _: True))["leader"]
        return self.servers[int(leader.rpartition("-")[2])]

    async def settle(self, stream: str) -> None:
        """Wait until a stream has a leader that has heard of all its replicas, all up to date."""

        def is_settled(cluster: dict[str, Any]) -> bool:
            replicas = cluster.get("replicas") or []
            return len(replicas) == SIZE - 1 and all(
                each.get("current") and each.get("active") and not each.get("offline")
                for each in replicas
            )

        await self._find(f"STREAM.INFO.{stream}", is_settled)

    async def _find(self, call: str, wanted: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """Return what the leader tells of the replicas, once there is one and it is as wanted."""
        async with plain_client(self.urls) as client:
            with anyio.fail_after(PATIENCE):
                while True:
                    with suppress(TimeoutError, AssertionError):
                        cluster: dict[str, Any] = (await Streams(client).call(call))["cluster"]
                        if cluster.get("leader") and wanted(cluster):
                            return cluster
                    await anyio.sleep(0.05)

    async def make_leader(self, server: EmbeddedServer, stream: str) -> None:
        """Have a server lead a stream: the others stand back until it does."""
        with anyio.fail_after(PATIENCE):
            while await self.leader(stream) is not server:
                async with plain_client(self.urls) as client:
                    name = f"server-{self.servers.index(server)}"
                    placement = {"placement": {"preferred": name}}
                    with suppress(TimeoutError, AssertionError):
                        await Streams(client).call(f"STREAM.LEADER.STEPDOWN.{stream}", placement)
                await anyio.sleep(0.1)


def free_ports(count: int) -> list[int]:
    """Return this many free ports."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()
