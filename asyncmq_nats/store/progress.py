"""Progress reports of the jobs that run here: coalesced, so that one job cannot flood the server.

Only the last report of a job counts. The first few are sent at once, then one each
`REPORT_INTERVAL`, and the last one before the outcome. May be called from any thread.
"""

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final

__all__ = ["REPORT_INTERVAL", "ProgressReports"]

REPORT_INTERVAL: Final = 0.05
"""Seconds between two reports of a job that reports all the time."""
FIRST_REPORTS: Final = 10
"""Reports of a job that are sent at once."""

Send = Callable[[str, bytes], None]
"""Sends the report of a job, given by its token. Called in the event loop."""


@dataclass(slots=True)
class _Job:
    """The reports of one job. `pending`: the last one, if it was not sent yet."""

    at_once: int = FIRST_REPORTS
    pending: bytes | None = None
    is_timed: bool = False


class ProgressReports:
    """The reports of one worker's jobs."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._jobs: dict[str, _Job] = {}
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None

    def attach(self) -> None:
        """Serve the running event loop: reports from threads are sent by it."""
        self._loop = asyncio.get_running_loop()

    def report(self, token: str, body: bytes) -> None:
        """Send a report now or soon, unless a later one takes its place. `token`: of the job."""
        with self._lock:
            job = self._jobs.setdefault(token, _Job())
            if job.at_once > 0:
                job.at_once -= 1
                call: tuple[Any, ...] | None = (self._send, token, body)
            else:
                job.pending = body
                call = None if job.is_timed else (self._start_timer, token)
                job.is_timed = True
        if call is not None:
            self._call_in_loop(*call)

    def finish(self, token: str) -> None:
        """Send the last report of a job that has ended, if it was not sent.

        Call it before the outcome.
        """
        if not self._jobs:  # its own report, if any, came before its end
            return
        with self._lock:
            job = self._jobs.pop(token, None)
        if job is not None and job.pending is not None:
            self._send(token, job.pending)

    def _call_in_loop(self, function: Callable[..., None], *args: Any) -> None:
        try:
            asyncio.get_running_loop()
        except RuntimeError:  # in the thread of a sync task
            with suppress(RuntimeError):  # the worker has ended, and its thread goes on
                if self._loop is not None:
                    self._loop.call_soon_threadsafe(function, *args)
        else:
            function(*args)

    def _start_timer(self, token: str) -> None:
        asyncio.get_running_loop().call_later(REPORT_INTERVAL, self._send_pending, token)

    def _send_pending(self, token: str) -> None:
        with self._lock:
            job = self._jobs.get(token)
            if job is None:
                return
            body, job.pending = job.pending, None
            if body is None:  # nothing new within the interval
                job.is_timed = False
                return
        self._send(token, body)
        self._start_timer(token)
