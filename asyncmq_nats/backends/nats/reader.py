"""Reads of a stream's messages: direct gets (ADR-31), from any replica, without a consumer."""

import asyncio
import itertools
import json
import time
from collections.abc import Callable, Mapping
from typing import Any, Final

from asyncmq_nats.backends.base import Record
from asyncmq_nats.backends.filters import compile_filter
from asyncmq_nats.backends.nats.connection import (
    ANSWER_SIZE,
    Connection,
    Reply,
    parse_time,
    patience_with,
)
from asyncmq_nats.backends.nats.streams import format_time
from asyncmq_nats.exceptions import AssetMissing, BackendError, Unconfirmed

__all__ = ["Reader"]

PROBE: Final = 64
MOST_LAST: Final = 1024
"""The server's own limit for the last records of several subjects."""
READS_AT_ONCE: Final = 32


class Reader:
    """Reads over one connection. A read that gets no answer is repeated for `timeout` seconds."""

    def __init__(self, connection: Connection, timeout: float) -> None:
        self._connection = connection
        self._timeout = timeout
        self._turns = asyncio.Semaphore(READS_AT_ONCE)

    async def last(self, log: str, *filters: str) -> list[Record]:
        """See `Backend.last`."""
        records = await self._get(log, {"multi_last": list(filters), "batch": MOST_LAST})
        if records is None:  # more than the server puts into one answer
            found = [record for filter in filters for record in await self._all(log, filter)]
            records = list({record.sequence: record for record in found}.values())
        return sorted(records, key=lambda record: record.sequence)

    async def latest(self, log: str, filter: str) -> Record | None:
        """See `Backend.latest`."""
        records = await self._get(log, {"last_by_subj": filter})
        return records[0] if records else None

    async def _all(self, log: str, filter: str) -> list[Record]:
        records: list[Record] = []
        while page := await self.page(
            log, filter, from_sequence=records[-1].sequence + 1 if records else 1, limit=1000
        ):
            records += page
        return records

    async def page(
        self, log: str, filter: str, *, from_sequence: int, limit: int, mostly: bool = False
    ) -> list[Record]:
        """See `Backend.page`.

        For a filter with wildcards, the server counts what matches before it sends the first record: half a second at a million. It does
        not when everything is asked for. So where most records may match, everything is read as long as they do, and the others are passed
        over here.
        """
        found: list[Record] = []
        at, dense, width = max(1, from_sequence), mostly, min(limit, PROBE)
        match = compile_filter(filter).match
        while dense:
            window = await self._get(log, {"seq": at, "batch": width}) or []
            matching = [record for record in window if match(record.subject)]
            found += matching
            if len(window) < width or len(found) == limit:
                return found
            at, dense, width = (
                window[-1].sequence + 1,
                2 * len(matching) >= width,
                limit - len(found),
            )
        return found + (
            await self._get(log, {"seq": at, "next_by_subj": filter, "batch": limit - len(found)})
            or []
        )

    async def first_since(self, log: str, filter: str, time: float) -> int | None:
        """See `Backend.first_since`."""
        records = await self._get(log, {"start_time": format_time(time), "next_by_subj": filter})
        return records[0].sequence if records else None

    async def _get(self, log: str, payload: Mapping[str, Any]) -> list[Record] | None:
        """Return the records of a direct get; `None` if they are too many for one answer.

        Raises:
            Unconfirmed: no answer within the timeout.
        """
        if "batch" not in payload:
            return [
                _record(reply) for reply in await self._ask(log, payload, bool) if not reply.status
            ]
        records: list[Record] = []
        while True:
            wanted = payload["batch"] - len(records)
            most = max(ANSWER_SIZE, 4 * self._connection.client.max_payload)
            replies = await self._ask(
                log, {**payload, "batch": wanted, "max_bytes": most}, _is_status
            )
            end = replies[-1]
            if end.status == "413":
                return None
            found = [_record(reply) for reply in replies if not reply.status]
            records += found
            if (
                not found
                or len(found) == wanted
                or int(end.headers.get("Nats-Num-Pending", 0)) == 0
            ):
                return records
            payload = {**payload, "seq": found[-1].sequence + 1}  # it was cut off for its size

    async def _ask(
        self, log: str, payload: Mapping[str, Any], finished: Callable[[list[Reply]], bool]
    ) -> list[Reply]:
        connection = self._connection
        subject, body = f"{connection.api_prefix}DIRECT.GET.{log}", json.dumps(payload).encode()
        deadline = time.monotonic() + self._timeout
        for attempt in itertools.count(1):
            left = deadline - time.monotonic()
            try:
                async with self._turns:
                    replies = await connection.collect(
                        subject,
                        body,
                        timeout=min(patience_with(attempt - 1), max(left, 0.1)),
                        finished=finished,
                    )
            except TimeoutError:
                if time.monotonic() >= deadline:
                    raise Unconfirmed(f"the reading of {log}", self._timeout, read=True) from None
                continue
            if replies[-1].status != "503":
                return replies
            # No such stream, or none of its servers takes reads yet: it was just made, or has no leader.
            if "error" in await connection.call(f"STREAM.INFO.{log}") and attempt > 1:
                raise AssetMissing(f"stream {log}")
            if time.monotonic() >= deadline:
                break
            await asyncio.sleep(min(0.01 * attempt, 0.2))
        raise BackendError(
            f"stream {log} does not answer direct gets at {connection.servers}: is it healthy, and is allow_direct on?"
        )


def _is_status(replies: list[Reply]) -> bool:
    return bool(replies[-1].status)


def _record(reply: Reply) -> Record:
    headers = reply.headers
    return Record(
        headers["Nats-Subject"],
        reply.body,
        int(headers["Nats-Sequence"]),
        parse_time(headers["Nats-Time-Stamp"]),
        "KV-Operation" in headers and headers["Nats-Subject"].startswith("$KV."),
    )
