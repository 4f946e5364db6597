"""Facts about a server, its streams, and the permissions of this login. Nothing is changed."""

import time
from collections.abc import Sequence
from typing import Any, Final

from asyncmq_nats.backends.base import LogFacts, Peer, ServerFacts
from asyncmq_nats.backends.nats.connection import Connection
from asyncmq_nats.backends.nats.errors import STREAM_MISSING, api_error
from asyncmq_nats.exceptions import PermissionRefused

__all__ = ["describe_server", "examine_log", "find_refused"]

NO_REQUEST: Final = b"?"
"""Body of a probe: no request of the JetStream API, so it is answered with an error."""
NO_WRITE: Final = b"NATS/1.0\r\nNats-Expected-Last-Sequence: 9007199254740991\r\n\r\n"
"""Headers of a probe: no stream has that many records, so none stores it."""


async def describe_server(connection: Connection) -> ServerFacts:
    """Return facts about the server and the account.

    Raises:
        ServerUnsuitable: there is no JetStream.
    """
    client = connection.client
    version = client.connected_server_version
    try:
        account: dict[str, Any] = await connection.require("INFO")
    except PermissionRefused:
        account = {}
    limits = account.get("limits") or {}
    largest = limits.get("max_storage", -1)
    return ServerFacts(
        version=f"{version.major}.{version.minor}.{version.patch}",
        servers=connection.servers,
        is_clustered=client.is_clustered,
        mixes_up_expectations=connection.mixes_up_expectations,
        max_body=client.max_payload,
        clock_offset=time.time() - connection.now() if account else None,
        stored_bytes=account.get("storage"),
        max_stored_bytes=largest if largest > 0 else None,
    )


async def examine_log(connection: Connection, name: str) -> LogFacts | None:
    """Return facts about a stream; `None` if there is none."""
    info = await connection.call(f"STREAM.INFO.{name}")
    if "error" in info:
        if info["error"].get("err_code") == STREAM_MISSING:
            return None
        raise api_error(name, info["error"])
    config, cluster = info["config"], info.get("cluster") or {}
    peers = [
        Peer(
            str(peer.get("name", "?")),
            bool(peer.get("offline")),
            bool(peer.get("current")),
            int(peer.get("lag", 0)),
            int(peer.get("active", 0)) / 1e9,
        )
        for peer in cluster.get("replicas") or ()
    ]
    return LogFacts(
        name,
        int(info["state"]["messages"]),
        int(info["state"]["bytes"]),
        config["max_bytes"] if config.get("max_bytes", -1) > 0 else None,
        int(config.get("num_replicas", 1)),
        cluster.get("leader") if cluster else name,
        tuple(peers),
    )


async def find_refused(
    connection: Connection, publish: Sequence[str], subscribe: Sequence[str]
) -> list[str]:
    """Return those subjects that this login may not publish or subscribe to.

    Each is tried without an effect: the server sends its refusals before it answers a PING.
    """
    refused: set[str] = set()
    numbers: list[int] = []

    def note(subject: str, _: str) -> None:
        refused.add(subject)

    connection.on_refusal.append(note)
    connection.is_probing = True
    try:
        for subject in publish:
            # What could be stored is sent with an expectation that does not hold.
            headers = b"" if subject.startswith("$JS.") else NO_WRITE
            connection.post(subject, NO_REQUEST, headers=headers)
        numbers += [await connection.client.listen(subject, _drop) for subject in subscribe]
        await connection.client.barrier()
    finally:
        await connection.client.stop_listening(*numbers)
        connection.is_probing = False
        connection.on_refusal.remove(note)
    return [each for each in (*publish, *subscribe) if each.lower() in refused]


def _drop(*_: object) -> None:
    """Take a message that a probe got by chance."""
