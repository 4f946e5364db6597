"""Reads of a stream's messages: direct gets (ADR-31), from any replica, without a consumer."""

import asyncio
import itertools
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from asyncmq_nats.backends.base import Record
from asyncmq_nats.backends.filters import compile_filter, is_key
from asyncmq_nats.backends.nats.connection import (
    ANSWER_SIZE,
    Connection,
    Reply,
    format_time,
    parse_time,
    patience_with,
)
from asyncmq_nats.exceptions import AssetMissing, BackendError, Unconfirmed

__all__ = ["READ_LIMIT", "Reader"]

FIRST_READ_LIMIT: Final = 48
"""Records that are read at first."""
READ_LIMIT: Final = 500
"""Records that are read at once."""
SCAN_LIMIT: Final = 2_000
"""Records that are passed over before the server is asked where the next match is."""
SCAN_LIMIT_AFTER_HOP: Final = 250
INDEX_GAP: Final = 48
"""Records of other programs that may lie between an index entry and its record."""
SPAN_GROWTH: Final = 8
"""Factor by which each step of a backward search grows."""
MOST_LAST: Final = 1024
"""The server's own limit for the last records of several subjects."""
READS_AT_ONCE: Final = 32
CLOCK_STEP: Final = 2e-6
"""Seconds to which a time of the server is known here."""
SUBJECT: Final = b"\r\nNats-Subject: "
OPERATION: Final = b"KV-Operation"


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

    async def count(self, log: str, filter: str) -> int:
        """See `Backend.count`. The server says with a record how many more there are."""
        replies = await self._ask(log, {"seq": 1, "next_by_subj": filter, "batch": 1}, _is_status)
        end = replies[-1]
        return 0 if end.status == "404" else int(end.headers["Nats-Num-Pending"]) + 1

    async def _all(self, log: str, filter: str) -> list[Record]:
        records: list[Record] = []
        while page := await self.page(
            log, filter, from_sequence=records[-1].sequence + 1 if records else 1, limit=1000
        ):
            records += page
        return records

    async def page(
        self,
        log: str,
        filter: str,
        *,
        from_sequence: int,
        limit: int,
        mostly: bool = False,
        index: str | None = None,
    ) -> list[Record]:
        """See `Backend.page`.

        For a filter with wildcards, the server counts all matches before it sends the first record:
        half a second at a million. It does not when everything is asked for, so where most records
        may match, all are read and the others are passed over here.
        """
        at = max(1, from_sequence)
        if not mostly:
            payload = {"seq": at, "next_by_subj": filter, "batch": limit}
            return await self._get(log, payload) or []
        found: list[Record] = []
        match, vain, patience, width = compile_filter(filter).match, 0, SCAN_LIMIT, FIRST_READ_LIMIT
        if at == 1:
            at = await self._first_from(log, ">", 1) or 1
        while True:
            window = await self._run(log, at, at + width)
            matching = [record for record in window if match(record.subject)]
            found += matching
            if len(found) >= limit:
                return found[:limit]
            at += width
            vain = 0 if 2 * len(matching) >= len(window) else vain + len(window)
            hop: int | None = at
            if not window:
                hop = await self._first_from(log, ">", at)
            elif vain >= patience:
                # The record of an entry that was read already may still come.
                start = at if index is None else max(1, at - INDEX_GAP)
                hop = await self._first_from(log, index or filter, start)
                vain, patience = 0, SCAN_LIMIT_AFTER_HOP
            if hop is None:
                return found
            at, width = max(at, hop), _next_width(limit - len(found), window, matching)

    async def read_on(
        self, log: str, filter: str | None, *, from_sequence: int | None, after: float
    ) -> list[Record]:
        """Return up to `READ_LIMIT` of the records that follow, those that match a filter, or all.

        `from_sequence`: the first one to read; `None` begins at the time `after`, or just before.
        """
        payload: dict[str, Any] = {"batch": READ_LIMIT}
        if from_sequence is None:
            payload["start_time"] = format_time(after - CLOCK_STEP)
        else:
            payload["seq"] = from_sequence
        if filter is not None:
            payload["next_by_subj"] = filter
        return await self._get(log, payload) or []

    async def page_back(
        self,
        log: str,
        filter: str,
        *,
        before: int,
        limit: int,
        index: str | None = None,
    ) -> list[Record]:
        """See `Backend.page_back`.

        The server reads forwards only: windows of sequences are read, from the end.
        """
        found: list[Record] = []
        match, end, vain, span = (
            compile_filter(filter).match,
            before,
            0,
            min(limit, FIRST_READ_LIMIT),
        )
        patience = SCAN_LIMIT
        while end > 1 and len(found) < limit:
            start = max(1, end - span)
            window = await self._run(log, start, end)
            matching = [record for record in reversed(window) if match(record.subject)]
            found += matching
            end = start
            vain = 0 if 2 * len(matching) >= len(window) else vain + len(window)
            if not window:
                end = await self._end_of_matches(log, ">", end)
            elif vain >= patience and end > 1 and len(found) < limit:
                # The record of an index entry comes after it.
                end = min(end, INDEX_GAP + await self._end_of_matches(log, index or filter, end))
                vain, patience = 0, SCAN_LIMIT_AFTER_HOP
            span = _next_width(limit - len(found), window, matching)
        return found[:limit]

    async def _run(self, log: str, start: int, end: int) -> list[Record]:
        """Return the records from sequence `start` to below `end`.

        Each is asked for by its number: for a batch, the server counts what comes after it, half a
        second at a million, unless it is in the newer half of the log, or nothing was ever removed.
        """
        requests = [b'{"seq":%d}' % sequence for sequence in range(start, end)]
        replies = await self._ask(log, requests, lambda replies: len(replies) == len(requests))
        found = [_record(reply) for reply in replies if not reply.status]
        return sorted(found, key=lambda record: record.sequence)

    async def _first_from(self, log: str, filter: str, sequence: int) -> int | None:
        """Return the sequence of the first match from `sequence` on."""
        records = await self._get(log, {"seq": sequence, "next_by_subj": filter})
        return records[0].sequence if records else None

    async def _end_of_matches(self, log: str, filter: str, before: int) -> int:
        """Return a sequence just above the last match below `before`; 1 if there is none.

        Gallops, then halves.
        """
        end, step = before, SCAN_LIMIT
        while True:
            start = max(1, end - step)
            first = await self._first_from(log, filter, start)
            if first is not None and first < end:
                break
            if start == 1:
                return 1
            end, step = start, step * SPAN_GROWTH
        while end - first > FIRST_READ_LIMIT:
            middle = (first + end) // 2
            found = await self._first_from(log, filter, middle)
            if found is None or found >= end:
                end = middle
            else:
                first = found
        return end

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
            payload.pop("start_time", None)

    async def _ask(
        self,
        log: str,
        requests: Mapping[str, Any] | Sequence[bytes],
        finished: Callable[[list[Reply]], bool],
    ) -> list[Reply]:
        """Return the replies to one direct get, or to several, once `finished` says so."""
        connection = self._connection
        subject = f"{connection.api_prefix}DIRECT.GET.{log}"
        body = json.dumps(requests).encode() if isinstance(requests, Mapping) else requests
        deadline = time.monotonic() + self._timeout
        for attempt in itertools.count(1):
            left = deadline - time.monotonic()
            try:
                async with self._turns:
                    replies = await connection.collect(
                        subject,
                        body,
                        timeout=min(patience_with(attempt - 1), max(left, 0.1)),
                        finished=lambda replies: replies[-1].status == "503" or finished(replies),
                    )
            except TimeoutError:
                if time.monotonic() >= deadline:
                    raise Unconfirmed(f"the reading of {log}", self._timeout, read=True) from None
                continue
            if replies[-1].status != "503":
                return replies
            # No such stream, or none of its servers takes reads yet: it was just made, or has no
            # leader.
            if "error" in await connection.call(f"STREAM.INFO.{log}") and attempt > 1:
                raise AssetMissing(f"stream {log}")
            if time.monotonic() >= deadline:
                break
            await asyncio.sleep(min(0.01 * attempt, 0.2))
        raise BackendError(
            f"stream {log} does not answer direct gets at {connection.servers}: "
            "is it healthy, and is allow_direct on?"
        )


def _next_width(missing: int, window: Sequence[Record], matching: Sequence[Record]) -> int:
    """Return how many sequences to read next.

    They are enough for the `missing` matches, by the density of the last ones. Their size is a
    bound as well: the server disconnects a client for which 64 MiB wait.
    """
    if not window:
        return FIRST_READ_LIMIT
    share = max(len(matching) / len(window), 0.1)
    size = max(len(record.body) for record in window) + 500
    return max(
        8, min(READ_LIMIT, ANSWER_SIZE // size, max(FIRST_READ_LIMIT, math.ceil(missing / share)))
    )


def _is_status(replies: list[Reply]) -> bool:
    return bool(replies[-1].status)


def _record(reply: Reply) -> Record:
    raw = reply.raw_headers or b""
    # The server's own come last, in this order: to make a dict of all takes twice as long.
    _, subject, sequence, stamp, *_ = raw[raw.rfind(SUBJECT) :].split(b"\r\n", 4)
    name = subject[len(SUBJECT) - 2 :].decode("utf-8", "replace")
    return Record(
        name,
        reply.body,
        int(sequence.removeprefix(b"Nats-Sequence: ")),
        parse_time(stamp.removeprefix(b"Nats-Time-Stamp: ").decode()),
        # Any producer may put the header on a ready job, which is never a delete marker.
        OPERATION in raw and is_key(name) and "KV-Operation" in reply.headers,
    )
