"""The headers of writes and batches, as on the wire."""

import os
from functools import lru_cache
from typing import Final

from asyncmq_nats.backends.base import Expect, Write
from asyncmq_nats.backends.filters import is_key
from asyncmq_nats.backends.nats.connection import format_time

__all__ = [
    "BATCH_LINES",
    "HEADER_ROOM",
    "batch_lines",
    "encode_headers",
    "has_headers",
    "new_message_id",
]

HEADER_ROOM: Final = 1024
"""The server counts headers as payload."""


def batch_lines(batch_id: str) -> str:
    """Return the lines that a batch adds to the headers of a write, but for its number."""
    return f"Nats-Batch-Id: {batch_id}\r\nNats-Batch-Sequence: "


BATCH_LINES: Final = batch_lines("x" * 60) + "1000\r\n"
"""A placeholder as long as the headers that a batch adds to a write."""


def _may_replace(write: Write) -> bool:
    """Return whether an older record may have to be replaced.

    There is none if the write expects none at its subject.
    """
    expect = write.expect
    if write.removes is not None:  # with a roll-up, servers before 2.14 do not remove the timer
        return False
    if expect is None or expect.sequence:
        return True
    return expect.filter != write.subject and not (
        expect.filter[-1] == ">" and write.subject.startswith(expect.filter[:-1])
    )


def _encode_expectation(expect: Expect, subject: str, indent: int) -> str:
    line = f"Nats-Expected-Last-Subject-Sequence: {expect.sequence}\r\n"
    if expect.filter == subject:
        return line
    return f"{line}Nats-Expected-Last-Subject-Sequence-Subject: {' ' * indent}{expect.filter}\r\n"


@lru_cache(maxsize=64)
def _encode_ttl(seconds: float) -> str:
    return f"Nats-TTL: {max(1, round(seconds))}s\r\n"


def has_headers(write: Write) -> bool:
    """Return whether `encode_headers` has more than `more` to say of the write."""
    return (
        write.message_id is not None
        or write.expect is not None
        or is_key(write.subject)
        or write.ttl is not None
        or write.timer is not None
        or write.removes is not None
        or write.marker
    )


def encode_headers(write: Write, more: str = "", indent: int = 0) -> bytes:
    """Return the headers of the write on the wire, followed by the lines `more`.

    `indent`: see `Connection.mixes_up_expectations`.
    """
    lines = "NATS/1.0\r\n"
    if write.message_id is not None:
        lines += f"Nats-Msg-Id: {write.message_id}\r\n"
    if write.expect is not None:
        lines += _encode_expectation(write.expect, write.subject, indent)
    if write.ttl is not None:
        lines += _encode_ttl(write.ttl)
    if write.timer is not None:
        lines += (
            f"Nats-Schedule: @at {format_time(write.timer.at)}\r\n"
            f"Nats-Schedule-Target: {write.timer.target}\r\n"
        )
    if write.removes is not None:
        lines += f"Nats-Schedule-Next: purge\r\nNats-Scheduler: {write.removes}\r\n"
    if write.marker:
        lines += "KV-Operation: DEL\r\n"
    if not write.beside and is_key(write.subject) and _may_replace(write):
        # A record that is replaced by the limit of one per subject comes back after a crash of the
        # server, once its successor is deleted.
        lines += "Nats-Rollup: sub\r\n"
    lines += more
    return f"{lines}\r\n".encode() if len(lines) > 10 else b""


def new_message_id() -> str:
    """Return an id for a write or a batch that no one can guess.

    Readers of events see the ids of what was stored: under the next one of a series, a stranger
    could write first, and the server would take our write for a repetition.
    """
    return os.urandom(12).hex()
