"""Events of jobs: of a whole queue from any process, and of the jobs that this process runs.

The server sends them by itself whenever a record is written (`docs/protocol.md`); only starts,
progress and what leaves no record are sent by producers and workers. They are at most once: nothing
is built on them alone.
"""

import json
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeVar, overload

from asyncmq_nats._concurrency import call_either
from asyncmq_nats._logging import get_logger
from asyncmq_nats.exceptions import InvalidJob
from asyncmq_nats.jobs import Job
from asyncmq_nats.states import OUTCOMES, Place, State
from asyncmq_nats.wire.codec import load_json
from asyncmq_nats.wire.keys import decode_token, split_event

__all__ = [
    "ANNOUNCED",
    "DEBOUNCED",
    "DEDUPLICATED",
    "DUPLICATED",
    "PREFIX",
    "PROGRESS",
    "READY",
    "STALLED",
    "STARTED",
    "Event",
    "EventEmitter",
    "event_emitter",
    "event_of",
    "read_event",
]

logger = get_logger(__name__)

STARTED: Final = "started"
PROGRESS: Final = "progress"
READY: Final = "ready"
STALLED: Final = "stalled"
DUPLICATED: Final = "duplicated"
DEDUPLICATED: Final = "deduplicated"
DEBOUNCED: Final = "debounced"
ANNOUNCED: Final = (STARTED, PROGRESS, READY, STALLED, DUPLICATED, DEDUPLICATED, DEBOUNCED)
PREFIX: Final = "job:"
RETRYING: Final = "job:retrying"
HISTORY_LIMIT: Final = 2_000
"""Events that the emitter remembers."""
STATE_OF_RECORD: Final = {
    State.WAITING: State.WAITING,
    Place.RELEASED: State.WAITING,
    STARTED: State.ACTIVE,
    Place.DELAYED: State.DELAYED,
    Place.PARKED: State.WAITING_CHILDREN,
}
"""The states of jobs in records that do not tell them, whatever else a stranger wrote there."""

Listener = Callable[[dict[str, Any]], Any]
"""A function, sync or async, or an object that is called like one. It is given the job's dict."""
L = TypeVar("L", bound=Listener)


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that happened to a job.

    `name`: `job:waiting`, `job:delayed`, `job:waiting-children`, `job:started`, `job:progress`,
    `job:retrying`, `job:completed`, `job:failed`, `job:expired` or `job:cancelled`; or one that
    leaves no record: `job:ready` (its last parent is done), `job:stalled` (its worker was lost;
    `stalls`), `job:duplicated` (its id was there), `job:deduplicated` (`deduplication_id`, and as
    `deduplicated_job_id` the id of the job that was not added) and, with each of these,
    `job:debounced` (`debounce_id`).

    `data`: the job with the keys of `Job.to_dict` and those of the wire, and `queue`; progress has
    `id`, `progress` and `data`.

    `at`: when it happened, in Unix seconds; `None`: just now.
    """

    name: str
    job_id: str
    queue: str
    data: dict[str, Any]
    at: float | None = None


def read_event(queue: str, subject: str, body: bytes) -> Event | None:
    """Return the event of a message on an event subject, `None` if it is none for users."""
    what, token = split_event(subject)
    if not body:  # a record was removed
        return None
    try:
        data = load_json(body)
    except InvalidJob:
        data = {}
    return event_of(queue, what, token, data)


def event_of(queue: str, what: str, token: str, data: dict[str, Any]) -> Event | None:
    """Return the event that a record tells of, `None` if it is none for users.

    `what`: the word in the event's subject; `token`: of the job; `data`: what the record says.
    """
    name = _name(what, data)
    if name is None:
        return None
    job_id = decode_token(token)
    given = {"id": job_id, "queue": queue}
    return Event(name, job_id, queue, _complete(data | given, what))


def _complete(data: dict[str, Any], what: str) -> dict[str, Any]:
    """Return a job's record with all keys of `Job.to_dict`: AsyncMQ has them in its events.

    A record that is no job stays as it is.
    """
    if "task" not in data:
        return data
    state = STATE_OF_RECORD.get(what)
    known = data if state is None else data | {"status": state}
    try:
        return Job.from_dict(known).to_dict() | known
    except InvalidJob:
        return known


def _name(what: str, data: Mapping[str, Any]) -> str | None:
    retried = bool(data.get("retries"))
    if what == Place.RELEASED:  # a retry without a delay; all others are heard of before or after
        again = retried and data.get("delay_until") is None and not data.get("snoozes")
        return RETRYING if again else None
    if what == Place.DELAYED:
        again = retried and not data.get("snoozes")
        return RETRYING if again else PREFIX + State.DELAYED
    if what == Place.PARKED:  # written twice: while its edges are being written, and after that
        return None if data.get("linking") else PREFIX + State.WAITING_CHILDREN
    return PREFIX + what if what in (State.WAITING, *OUTCOMES, *ANNOUNCED) else None


class EventEmitter:
    """Calls functions of this process on the events of its workers' jobs (AsyncMQ `event_emitter`).

    Args:
        history_limit: how many events `list_history` returns at most; older ones are forgotten.
    """

    def __init__(self, *, history_limit: int = HISTORY_LIMIT) -> None:
        self._listeners: dict[str, list[Listener]] = {}
        self._history: deque[dict[str, Any]] = deque(maxlen=max(1, history_limit))
        self._keeps_history = False

    @overload
    def on(self, event: str, callback: None = None) -> Callable[[L], L]: ...
    @overload
    def on(self, event: str, callback: L) -> L: ...

    def on(self, event: str, callback: L | None = None) -> L | Callable[[L], L]:
        """Call a function, sync (in a thread) or async, with the job's dict on each such event.

        Without a callback, a decorator.
        """

        def register(listener: L) -> L:
            self._listeners.setdefault(event, []).append(listener)
            return listener

        return register if callback is None else register(callback)

    def off(self, event: str, callback: Listener) -> None:
        """Remove a callback."""
        if callback in self._listeners.get(event, ()):
            self._listeners[event].remove(callback)
        if not self._listeners.get(event):
            self._listeners.pop(event, None)

    def listens(self, event: str | None = None) -> bool:
        """Return whether there is a listener, for this event or for any."""
        if self._keeps_history:
            return True
        return bool(self._listeners if event is None else self._listeners.get(event))

    async def emit(self, event: str, data: Mapping[str, Any]) -> None:
        """Call all listeners. Exceptions of a callback are logged."""
        self._history.appendleft({"timestamp": time.time(), "event": event, "data": dict(data)})
        for callback in tuple(self._listeners.get(event, ())):
            try:
                await call_either(callback, dict(data))
            except Exception:
                logger.exception("a callback of %s failed", event)

    def list_history(
        self,
        *,
        limit: int = 200,
        event: str | None = None,
        queue: str | None = None,
        q: str | None = None,
    ) -> list[dict[str, Any]]:
        """Return the last events of this process, newest first (AsyncMQ `list_history`).

        Each is a dict of `timestamp` (Unix seconds), `event` and `data`. The first call begins to
        keep the events of jobs to which nothing listens: a history that is unread slows no worker.

        Args:
            limit: how many at most.
            event: only those of this name.
            queue: only those of this queue.
            q: only those whose name or data contain this text, in upper or lower case.
        """
        self._keeps_history = True
        found = [
            record
            for record in list(self._history)
            if event in (None, "", record["event"])
            and queue in (None, "", record["data"].get("queue"))
            and _contains(record, (q or "").strip().lower())
        ]
        return [dict(record) for record in found[: max(1, limit)]]

    def clear_history(self) -> None:
        """Forget the events so far; listeners stay (AsyncMQ `clear_history`)."""
        self._history.clear()


def _contains(record: Mapping[str, Any], text: str) -> bool:
    if not text:
        return True
    data = json.dumps(record["data"], sort_keys=True, default=str)
    return text in f"{record['event']} {data}".lower()


event_emitter = EventEmitter()
"""The emitter of this process's workers."""
