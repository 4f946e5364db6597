"""Where the errors of nats-py and of the JetStream API become ours."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

import nats.errors

from asyncmq_nats.exceptions import (
    AssetMissing,
    BackendError,
    ConnectionFailed,
    ConnectionLost,
    PayloadTooLarge,
    ServerUnsuitable,
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
MESSAGE_TOO_LARGE: Final = 10054
NO_JETSTREAM: Final = (10039, 10076)
TOO_MANY_CONSUMERS: Final = 10026
BATCH_INCOMPLETE: Final = 10176
TOO_MANY_BATCHES: Final = (10210, 10211)
REMOVES_REFUSED: Final = 10212
NO_PEERS: Final = 10005
NO_CLUSTER: Final = 10074


@contextmanager
def mapped_errors(servers: str) -> Iterator[None]:
    """Turn what nats-py raises inside the block into our errors."""
    try:
        yield
    except nats.errors.MaxPayloadError as error:
        raise PayloadTooLarge("message", 0, 0) from error
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
    if code in NO_JETSTREAM:
        return ServerUnsuitable(
            "JetStream is not enabled",
            "start nats-server with -js, or enable JetStream for this account",
        )
    if code in (NO_PEERS, NO_CLUSTER):
        return ServerUnsuitable(
            f"{subject}: {text}",
            "set ASYNCMQ_NATS_REPLICAS to no more than the servers of the cluster, and start them all",
        )
    if code in WRONG_LAST_SEQUENCE:
        return WriteRefused(subject, text)
    return BackendError(f"{subject}: {text} (code {code})")


def write_error(log: str, error: Mapping[str, Any]) -> BackendError:
    """Return the error of a PubAck as ours."""
    code, text = error.get("err_code", 0), str(error.get("description", error))
    if code in WRONG_LAST_SEQUENCE or code in (REMOVES_REFUSED, DUPLICATE_IN_BATCH):
        return WriteRefused(log, text)
    return api_error(log, error)


def is_transient(error: Mapping[str, Any]) -> bool:
    """Return whether the same write may succeed a moment later.

    No leader yet, too many open batches, a batch torn by a reconnect, or its first sending is still on its way to the replicas.
    """
    return error.get("code") == 503 or error.get("err_code") in (
        BATCH_INCOMPLETE,
        DUPLICATE_UNDER_WAY,
        *TOO_MANY_BATCHES,
    )
