"""The last lines of each attempt that tasks keep with their jobs: `current_job().log(…)`.

They are collected here and written together, soon, and at the latest before the outcome. Lines that
cannot be written are lost; no job waits for them. May be called from any thread.
"""

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from asyncmq_nats.context import JobLogLine
from asyncmq_nats.exceptions import AssetMissing, InvalidJob
from asyncmq_nats.store.queue_store import QueueStore
from asyncmq_nats.wire.codec import dump_json, load_json
from asyncmq_nats.wire.keys import encode_token

__all__ = ["JobLogs", "cut_line", "read_job_logs"]

WRITE_INTERVAL: Final = 0.5
"""Seconds between two writes of the lines of one job."""
LONGEST_LINE: Final = 2_000
MOST_BYTES: Final = 128 * 1024

Send = Callable[[str, int, bytes], None]
"""Writes the lines of an attempt: token of the job, number of the attempt, body."""


@dataclass(slots=True)
class _Lines:
    """The lines of the running attempt. `is_new`: some are not written yet."""

    attempt: int
    lines: deque[JobLogLine]
    count: int = 0
    is_new: bool = False
    is_timed: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)

    def encode(self, limit: int) -> bytes:
        """Return the record of these lines, at most `limit` bytes: the first ones are left out."""
        with self.lock:
            self.is_new = False
            shown, count = list(self.lines), self.count
        while True:
            lines = [asdict(line) for line in shown]
            body = dump_json({"v": 1, "count": count, "lines": lines})
            if len(body) <= limit or not shown:
                return body
            shown = shown[max(1, len(shown) // 4) :]


class JobLogs:
    """The lines of one worker's jobs.

    `most`: how many are kept of an attempt; 0 keeps none. `max_body`: returns how many bytes the
    server takes in one message.
    """

    def __init__(self, send: Send, most: int, max_body: Callable[[], int]) -> None:
        self._send = send
        self._most = most
        self._max_body = max_body
        self._jobs: dict[str, _Lines] = {}
        self._loop: asyncio.AbstractEventLoop | None = None

    def attach(self) -> None:
        """Serve the running event loop: what comes from threads is written by it."""
        self._loop = asyncio.get_running_loop()

    def add(self, token: str, line: JobLogLine) -> None:
        """Keep a line of the job with this token."""
        if not self._most:
            return
        job = self._jobs.get(token)
        if job is None:
            job = self._jobs.setdefault(token, _Lines(line.attempt, deque(maxlen=self._most)))
        with job.lock:
            job.lines.append(line)
            job.count += 1
            job.is_new, begins = True, not job.is_timed
            job.is_timed = True
        if begins:
            self._start_timer(token)

    def finish(self, token: str) -> None:
        """Write the last lines of a job that has ended; call it before the outcome."""
        if self._jobs and (job := self._jobs.pop(token, None)) is not None and job.is_new:
            self._send_lines(token, job)

    def _start_timer(self, token: str) -> None:
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:  # in the thread of a sync task
            with suppress(RuntimeError):  # the worker has ended, and its thread goes on
                if self._loop is not None:
                    self._loop.call_soon_threadsafe(self._start_timer, token)
        else:
            loop.call_later(WRITE_INTERVAL, self._write, token)

    def _write(self, token: str) -> None:
        job = self._jobs.get(token)
        if job is None:
            return
        with job.lock:
            job.is_timed = job.is_new
        if job.is_timed:
            self._send_lines(token, job)
            self._start_timer(token)

    def _send_lines(self, token: str, job: _Lines) -> None:
        self._send(token, job.attempt, job.encode(min(MOST_BYTES, self._max_body())))


def cut_line(text: str) -> str:
    """Return the text of a line as it is kept: without lone surrogates, and not too long."""
    text = text.encode("utf-8", "replace").decode()
    return text if len(text) <= LONGEST_LINE else text[:LONGEST_LINE] + "…"


async def read_job_logs(store: QueueStore, job_id: str) -> list[JobLogLine]:
    """Return the lines that were kept of a job's attempts, in order."""
    try:
        records = await store.last(store.keys.job_log(encode_token(job_id), "*"))
    except AssetMissing:
        return []
    found: list[JobLogLine] = []
    for record in records:
        with suppress(InvalidJob):
            lines = load_json(record.body).get("lines")
            found += [line for each in _list(lines) if (line := _parse(each)) is not None]
    return sorted(found, key=lambda line: (line.attempt, line.at))


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _parse(data: object) -> JobLogLine | None:
    """Return a line; `None` for what another program wrote."""
    if not isinstance(data, dict):
        return None
    at, attempt = data.get("at"), data.get("attempt")
    if not isinstance(at, int | float) or not isinstance(attempt, int):
        return None
    return JobLogLine(float(at), str(data.get("level")), str(data.get("message")), attempt)
