"""Facts about a server, its streams, and the permissions of this login. Nothing is changed."""

import time
from collections.abc import Mapping, Sequence
from typing import Any, Final

from asyncmq_nats.backends.base import LogState, Peer, ServerFacts
from asyncmq_nats.backends.nats.connection import Connection, parse_time
from asyncmq_nats.exceptions import PermissionRefused

__all__ = ["describe_server", "find_refused", "read_log_state"]

NO_REQUEST: Final = b"{"
"""Body of a probe: broken JSON, which the JetStream API refuses.

Not another text: PURGE and PAUSE take one for no options, and purge all, or resume.
"""
NO_PURGE: Final = b'{"filter":"$none","seq":1,"keep":1}'
"""Body of a probe of PURGE: it is refused as a contradiction, and its filter matches nothing."""
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
        clock_offset=time.time() - connection.server_clock.now() if account else None,
        stored_bytes=account.get("storage"),
        max_stored_bytes=largest if largest > 0 else None,
    )


def read_log_state(info: Mapping[str, Any]) -> LogState:
    """Return what the answer to `STREAM.INFO` tells of a stream."""
    state, config, cluster = info["state"], info["config"], info.get("cluster") or {}
    limit = int(config.get("max_bytes") or -1)
    peers = tuple(_read_peer(each, info) for each in cluster.get("replicas") or ())
    return LogState(
        records=int(state["messages"]),
        bytes=int(state["bytes"]),
        last_sequence=int(state["last_seq"]),
        replicas=int(config.get("num_replicas") or 1),
        replicas_behind=sum(peer.is_offline or not peer.is_current for peer in peers),
        storage=str(config.get("storage") or "file"),
        max_bytes=None if limit < 0 else limit,
        has_leader=not cluster or bool(cluster.get("leader")),
        peers=peers,
    )


def _read_peer(peer: Mapping[str, Any], info: Mapping[str, Any]) -> Peer:
    silent = int(peer.get("active") or 0) / 1e9
    since = info["cluster"].get("leader_since")
    if not silent and since:
        # A new leader forgets when it heard of the others: 0 is never (nats-server 2.15). The
        # server that led before, and was killed, is not offline for two and a half minutes.
        silent = max(0.0, parse_time(info["ts"]) - parse_time(since))
    return Peer(
        name=str(peer.get("name", "?")),
        is_offline=bool(peer.get("offline")),
        is_current=bool(peer.get("current")),
        lag=int(peer.get("lag", 0)),
        silent_seconds=silent,
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
            body = NO_PURGE if ".STREAM.PURGE." in subject else NO_REQUEST
            connection.post(subject, body, headers=headers)
        numbers += [await connection.client.listen(subject, _drop) for subject in subscribe]
        await connection.client.barrier()
    finally:
        await connection.client.stop_listening(*numbers)
        connection.is_probing = False
        connection.on_refusal.remove(note)
    return [each for each in (*publish, *subscribe) if each.lower() in refused]


def _drop(*_: object) -> None:
    """Take a message that a probe got by chance."""
