"""Three nats-servers as a cluster on the loopback interface."""

import json
import socket
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

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

    async def leader(self, stream: str) -> EmbeddedServer:
        """Return the server that leads a stream, once there is one."""
        async with plain_client(self.urls) as client:
            with anyio.fail_after(PATIENCE):
                while True:
                    with suppress(TimeoutError, AssertionError):
                        leader = (await Streams(client).call(f"STREAM.INFO.{stream}"))[
                            "cluster"
                        ].get("leader")
                        if leader:
                            return self.servers[int(leader.rpartition("-")[2])]
                    await anyio.sleep(0.05)


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
