"""Maps the errors of nats-py and of the JetStream API to those of this library."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

import nats.errors

from asyncmq_nats.exceptions import (
    AssetMissing,
    AssetOffline,
    BackendError,
    ConnectionFailed,
    ConnectionLost,
    ServerUnsuitable,
    StorageFull,
    WriteRefused,
)

__all__ = [
    "CONSUMER_EXISTS",
    "CONSUMER_MISSING",
    "NO_JETSTREAM",
    "NO_PEERS",
    "STREAM_EXISTS",
    "STREAM_MISSING",
    "api_error",
    "is_full",
    "is_out_of_batches",
    "is_transient",
    "mapped_errors",
    "write_error",
]

# Codes of the JetStream API, from nats-server's errors.json (2.15).
WRONG_LAST_SEQUENCE: Final = (10071, 10164)
DUPLICATE_IN_BATCH: Final = 10201
DUPLICATE_UNDER_WAY: Final = 10158
STREAM_EXISTS: Final = 10058
STREAM_MISSING: Final = 10059
CONSUMER_EXISTS: Final = (10013, 10105, 10148)
CONSUMER_MISSING: Final = 10014
NO_JETSTREAM: Final = (10039, 10076)
TOO_MANY_CONSUMERS: Final = 10026
BATCH_INCOMPLETE: Final = 10176
TOO_MANY_BATCHES: Final = (10210, 10211)
REMOVES_REFUSED: Final = 10212
TOO_MANY_REQUESTS: Final = 10167
STORE_FAILED: Final = 10077
NO_RESOURCES: Final = 10023
FULL_CODES: Final = (10002, 10028, 10047)
"""An account or a server has as much in its memory or file store as it may."""
MAX_BYTES_REQUIRED: Final = 10113
NO_PEERS: Final = 10005
NO_CLUSTER: Final = 10074
OFFLINE: Final = (10118, 10119)
"""All servers of a stream or a consumer are lost. For the first minutes there is no answer."""


@contextmanager
def mapped_errors(servers: str) -> Iterator[None]:
    """Map the errors that nats-py raises inside the block to those of this library."""
    try:
        yield
    except (nats.errors.ConnectionClosedError, nats.errors.ConnectionDrainingError) as error:
        raise ConnectionLost(servers) from error
    except nats.errors.OutboundBufferLimitError as error:
        raise ConnectionFailed(
            servers, "disconnected, and the buffer for unsent messages is full"
        ) from error


def api_error(subject: str, error: Mapping[str, Any]) -> BackendError:
    """Return the error of an API answer as ours."""
    code, text = error.get("err_code", 0), str(error.get("description", error))
    if code in (STREAM_MISSING, CONSUMER_MISSING):
        return AssetMissing(f"{text}: {subject.rpartition('.')[2]}")
    if code in OFFLINE:
        return AssetOffline(subject, text)
    if code in NO_JETSTREAM:
        return ServerUnsuitable(
            "JetStream is not enabled",
            "start nats-server with -js, or enable JetStream for this account",
        )
    if code in (NO_PEERS, NO_CLUSTER):
        return ServerUnsuitable(
            f"{subject}: {text}",
            "set ASYNCMQ_NATS_REPLICAS to no more than the servers of the cluster, "
            "and start them all",
        )
    if code in WRONG_LAST_SEQUENCE:
        return WriteRefused(subject, text)
    if code == MAX_BYTES_REQUIRED:
        return BackendError(
            f"{subject}: {text}; "
            "set ASYNCMQ_NATS_READY_MAX_BYTES and ASYNCMQ_NATS_BUCKET_MAX_BYTES "
            "(docs/outages.md says to what)"
        )
    if is_full(error):
        return StorageFull(subject, f"{text} (code {code})")
    return BackendError(f"{subject}: {text} (code {code})")


def write_error(log: str, error: Mapping[str, Any]) -> BackendError:
    """Return the error of a PubAck as ours."""
    code, text = error.get("err_code", 0), str(error.get("description", error))
    if code in WRONG_LAST_SEQUENCE or code in (REMOVES_REFUSED, DUPLICATE_IN_BATCH):
        return WriteRefused(log, text)
    return api_error(log, error)


def is_full(error: Mapping[str, Any]) -> bool:
    """Return whether a store, an account or a stream has no room (nats-server 2.12 to 2.15).

    `insufficient resources` is the word for a full store too. A stream at its limit says which one.
    """
    code, text = error.get("err_code"), str(error.get("description", ""))
    return (
        code in FULL_CODES
        or code == NO_RESOURCES
        or (code == STORE_FAILED and ("maximum" in text or "limits" in text or "space" in text))
    )


def is_out_of_batches(error: Mapping[str, Any]) -> bool:
    """Return whether the stream, or the server, may have too many open batches.

    The refusal of a batch's first message has no reply; its commit is answered with "incomplete".
    """
    return error.get("err_code") in (BATCH_INCOMPLETE, *TOO_MANY_BATCHES)


def is_transient(error: Mapping[str, Any]) -> bool:
    """Return whether the same write may succeed a moment later.

    There is no leader yet, there are too many open batches or writes, a reconnect has torn a batch,
    or its first sending is on its way to the replicas.
    """
    return error.get("code") == 503 or error.get("err_code") in (
        BATCH_INCOMPLETE,
        DUPLICATE_UNDER_WAY,
        TOO_MANY_REQUESTS,
        *TOO_MANY_BATCHES,
    )
