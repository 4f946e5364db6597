"""The history of the workers: the place of its records, their time to live, their reads.

A worker writes one record each ten seconds, and rewrites those of the running minute and of the
running ten minutes. So a chart of any length reads few records. Nothing here decides anything about
a job, and no job waits for it.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from asyncmq_nats._concurrency import open_task_group
from asyncmq_nats.backends.base import Backend, Log, Record
from asyncmq_nats.exceptions import AssetMissing, InvalidJob
from asyncmq_nats.settings import Settings
from asyncmq_nats.wire.codec import load_json
from asyncmq_nats.wire.keys import decode_token, encode_token, metrics_bucket, split_metrics

__all__ = [
    "STEP_SECONDS",
    "HistoryRecord",
    "history_key",
    "history_log",
    "history_ttl",
    "read_history",
]

STEP_SECONDS: Final = (10, 60, 600)
"""Seconds that one record stands for."""
STEP_TTLS: Final = {10: 3 * 3600.0, 60: 2 * 86_400.0}
"""How long the records of a step stay, in seconds; the longest one as the settings say."""
RECORDS_PER_BLOCK: Final = 60
"""Records of one worker under one `<block>` of the keys: what one request reads."""
BLOCKS_AT_ONCE: Final = 8


@dataclass(frozen=True, slots=True)
class HistoryRecord:
    """One record, as it was written.

    `start`: Unix seconds by the server's clock; `data`: see docs/protocol.md.
    """

    queue: str
    worker: str
    start: int
    step: int
    data: dict[str, Any]


def history_log(settings: Settings) -> Log:
    """Return the log of the history, one for all queues."""
    name, key = metrics_bucket(settings.prefix)
    return Log(name, (f"{key}>",), timers=True, max_bytes=settings.metrics_max_bytes)


def history_key(prefix: str, queue: str, worker: str, start: int, step: int) -> str:
    """Return the key of a record."""
    _, key = metrics_bucket(prefix)
    return f"{key}{step}.{queue}.{_block(start, step)}.{start}.{encode_token(worker)}"


def history_ttl(step: int, settings: Settings) -> float:
    """Return how long a record stays, in seconds."""
    return min(STEP_TTLS.get(step, math.inf), settings.metrics_ttl)


async def read_history(
    backend: Backend, queue: str | None, since: float, until: float, step: int
) -> list[HistoryRecord]:
    """Return the records of a step that begin at `since` or later and before `until`.

    `queue`: `None` for all. Costs as much as there are workers and steps, however many jobs ran.
    """
    log, key = metrics_bucket(backend.settings.prefix)
    blocks = range(_block(math.ceil(since), step), _block(math.ceil(until) - 1, step) + 1)
    found: list[Record] = []

    async def read(some: Sequence[int]) -> None:
        filters = [f"{key}{step}.{queue or '*'}.{block}.*.*" for block in some]
        try:
            found.extend(await backend.last(log, *filters))
        except AssetMissing:  # no worker has written anything yet
            return

    async with open_task_group() as group:
        for first in range(blocks.start, blocks.stop, BLOCKS_AT_ONCE):
            group.start_soon(read, range(first, min(first + BLOCKS_AT_ONCE, blocks.stop)))
    return [each for each in _parse(found, len(key)) if since <= each.start < until]


def _block(start: int, step: int) -> int:
    return start // (step * RECORDS_PER_BLOCK)


def _parse(records: Iterable[Record], begin: int) -> Iterable[HistoryRecord]:
    for record in records:
        try:
            step, queue, start, worker = split_metrics(record.subject, begin)
            data = load_json(record.body)
            yield HistoryRecord(queue, decode_token(worker), int(start), int(step), data)
        except (ValueError, InvalidJob):  # written by another program
            continue
