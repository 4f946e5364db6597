"""What happens to jobs, as events: those of a whole queue from any process, and those of the jobs that this process runs.

The server sends them by itself whenever a record is written (`docs/protocol.md`); only starts, progress and what leaves no record are sent
by producers and workers. They are at most once: nothing is built on them alone.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeVar, overload

from anyio import to_thread

from asyncmq_nats._logging import get_logger
from asyncmq_nats.exceptions import InvalidJob
from asyncmq_nats.states import OUTCOMES, Place, State
from asyncmq_nats.wire.codec import load_json
from asyncmq_nats.wire.keys import decode_token

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

Listener = Callable[[dict[str, Any]], Any]
"""A function, or a coroutine function, that is given the job's dict."""
L = TypeVar("L", bound=Listener)


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that happened to a job.

    `name`: `job:waiting`, `job:delayed`, `job:waiting-children`, `job:started`, `job:progress`, `job:retrying`, `job:completed`,
    `job:failed`, `job:expired` or `job:cancelled`. `data`: the job as it is on the wire, and `queue`; of progress `progress` and `data`.
    And those that leave no record: `job:ready` (its last parent is done), `job:stalled` (its worker was lost; `stalls`), `job:duplicated`
    (its id was there), `job:deduplicated` (`deduplication_id`, and as `deduplicated_job_id` the id of the job that was not added) and, with
    each of these, `job:debounced` (`debounce_id`).
    """

    name: str
    job_id: str
    queue: str
    data: dict[str, Any]


def read_event(queue: str, subject: str, body: bytes) -> Event | None:
    """Return the event of a message on an event subject, `None` if it is of no interest to a user."""
    what, token = subject.split(".")[-2:]
    if not body:  # a record was removed
        return None
    try:
        data = load_json(body)
    except InvalidJob:
        data = {}
    name = _name(what, data)
    return (
        None if name is None else Event(name, decode_token(token), queue, data | {"queue": queue})
    )


def _name(what: str, data: Mapping[str, Any]) -> str | None:
    retried = bool(data.get("retries"))
    if what == Place.RELEASED:  # a retry without a delay; all others are heard of before or after
        return RETRYING if retried and data.get("delay_until") is None else None
    if what == Place.DELAYED:
        return RETRYING if retried else PREFIX + State.DELAYED
    if what == Place.PARKED:
        return PREFIX + State.WAITING_CHILDREN
    return PREFIX + what if what in (State.WAITING, *OUTCOMES, *ANNOUNCED) else None


class EventEmitter:
    """Calls functions of this process on events of the jobs that its workers run (AsyncMQ `event_emitter`)."""

    def __init__(self) -> None:
        self._callbacks: dict[str, list[Listener]] = {}

    @overload
    def on(self, event: str, callback: None = None) -> Callable[[L], L]: ...
    @overload
    def on(self, event: str, callback: L) -> L: ...

    def on(self, event: str, callback: L | None = None) -> L | Callable[[L], L]:
        """Call a function, sync (in a thread) or async, with the job's dict on each such event; without a callback, a decorator."""

        def register(listener: L) -> L:
            self._callbacks.setdefault(event, []).append(listener)
            return listener

        return register if callback is None else register(callback)

    def off(self, event: str, callback: Listener) -> None:
        """Call it no more."""
        if callback in self._callbacks.get(event, ()):
            self._callbacks[event].remove(callback)
        if not self._callbacks.get(event):
            self._callbacks.pop(event, None)

    def listens(self, event: str | None = None) -> bool:
        """Return whether anyone wants to know, of this event or of any."""
        return bool(self._callbacks if event is None else self._callbacks.get(event))

    async def emit(self, event: str, data: Mapping[str, Any]) -> None:
        """Call everyone who wants to know. What a callback raises is logged."""
        for callback in tuple(self._callbacks.get(event, ())):
            try:
                if inspect.iscoroutinefunction(callback):
                    await callback(dict(data))
                else:
                    await to_thread.run_sync(callback, dict(data))
            except Exception:
                logger.exception("a callback of %s failed", event)


event_emitter = EventEmitter()
"""The emitter of this process's workers."""
