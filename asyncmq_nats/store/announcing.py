"""Events: sent at most once for changes without a record, and passed to listeners here."""

import math
from typing import Any, Final, Protocol

from asyncmq_nats._concurrency import Spawner
from asyncmq_nats.backends.base import Delivery, Write
from asyncmq_nats.events import PREFIX, PROGRESS, STARTED, event_emitter, read_event
from asyncmq_nats.exceptions import InvalidJob
from asyncmq_nats.jobs import Job
from asyncmq_nats.states import State
from asyncmq_nats.store.queue_store import QueueStore
from asyncmq_nats.wire.codec import dump_json, dump_number, load_json, splice
from asyncmq_nats.wire.keys import encode_token

__all__ = [
    "LISTEN",
    "LISTENING_TIME",
    "READY_MESSAGE",
    "START_MEMBERS",
    "WorkerEvents",
    "announce",
    "without_large",
]

TRUNCATED: Final = {"truncated": True}
LISTEN: Final = "listen"
"""Control signal: a reader of events has come, or is still there."""
LISTENING_TIME: Final = 3.0
"""Seconds after this signal for which workers tell of starts, heard or not."""
READY_MESSAGE: Final = "ready_message"
"""Member of the start on a first delivery: the message's sequence, and its time in nanoseconds."""
START_MEMBERS: Final = ("active_since", "worker")
"""What a start says of the attempt, besides."""
JOB_STARTED: Final = PREFIX + STARTED
READY_MEMBER: Final = b'"ready_message":[%d,%d]'
BEGUN: Final = "worker"
"""Event, of a worker and not of a job: it begins to run jobs."""
ASKING_INTERVAL: Final = 1.0
"""Seconds after which a worker finds out again whether anyone hears of starts."""
ANSWER_TIME: Final = 0.1
"""Seconds after which a start that was not answered was heard. Until then, one tells for all."""


async def announce(store: QueueStore, what: str, job_id: str, **data: Any) -> None:
    """Tell that something happened to a job. `what`: one of the words in `events.ANNOUNCED`."""
    fields = {"id": job_id, "job_id": job_id, **data}
    body = dump_json(fields)
    if len(body) > store.backend.max_body:
        body = without_large(body, store.backend.max_body)
    store.backend.signal(store.keys.event(what, encode_token(job_id)), body)
    await event_emitter.emit(PREFIX + what, fields | {"queue": store.keys.queue})


def without_large(body: bytes, limit: int) -> bytes:
    """Return the event without its largest members, so that it has `limit` bytes at most."""
    try:
        members = load_json(body)
    except InvalidJob:
        return b'{"truncated":true}'
    sizes = {name: len(dump_json(value)) for name, value in members.items()}
    size = len(body)
    for name in sorted(sizes, key=sizes.__getitem__, reverse=True):
        if size + 64 <= limit:
            break
        size -= sizes[name]
        del members[name]
    return dump_json(members | TRUNCATED)


class Begun(Protocol):
    """An attempt that has begun. `body`: the job as it came, `job`: all of it, read when asked."""

    token: str
    body: bytes
    started_at: float
    delivery: Delivery

    @property
    def job(self) -> Job: ...


class WorkerEvents:
    """The events of one worker's jobs. They are on the path of every job."""

    def __init__(self, store: QueueStore, worker: str) -> None:
        self._backend = store.backend
        self._keys = store.keys
        self._start = b'"active_since":%b,"worker":' + dump_json(worker).replace(b"%", b"%%")
        self._worker = worker
        self._heard_from = 0.0
        """When starts began to be heard, as far as is known; infinity: they are not."""
        self._ask_at = self._expected_until = 0.0

    def begin(self) -> None:
        """Tell that the worker begins, and so find out whether anyone hears of its jobs."""
        subject = self._keys.event(BEGUN, encode_token(self._worker))
        body = dump_json({"worker": self._worker})
        self._backend.signal(subject, body, self._stop_telling)

    def expect_listener(self) -> None:
        """Tell of starts for some seconds: a reader of events has come, or is still there."""
        self._heard_from = 0.0
        self._expected_until = self._backend.now() + LISTENING_TIME

    def tell_start(self, spawner: Spawner, attempt: Begun) -> None:
        """Tell that an attempt began, if anyone hears it; once a second, find that out."""
        at = attempt.started_at
        asks = at >= self._ask_at
        if asks or at >= self._heard_from:
            # The job's own bytes, with the new members spliced in: no second encoding.
            data, delivery = splice(attempt.body, self._start % dump_number(at)), attempt.delivery
            if delivery.deliveries == 1:
                data = splice(data, READY_MEMBER % (delivery.sequence, int(delivery.stamp)))
            if len(data) > self._backend.max_body:
                data = without_large(data, self._backend.max_body)
            if asks:
                self._ask_at = at + ASKING_INTERVAL
                self._heard_from = min(self._heard_from, at + ANSWER_TIME)
            on_unheard = self._stop_telling if asks else None
            self._backend.signal(self._keys.event(STARTED, attempt.token), data, on_unheard)
        if event_emitter.listens(JOB_STARTED):
            fields = attempt.job.to_dict() | {"queue": self._keys.queue, "status": State.ACTIVE}
            spawner.spawn(event_emitter.emit, JOB_STARTED, fields)

    def _stop_telling(self) -> None:
        if self._backend.now() >= self._expected_until:
            self._heard_from = math.inf

    def tell_progress(self, spawner: Spawner, data: dict[str, Any]) -> None:
        """Pass the progress of a job to this process's listeners; a signal reaches all others."""
        if event_emitter.listens(PREFIX + PROGRESS):
            told = data | {"queue": self._keys.queue}
            spawner.spawn(event_emitter.emit, PREFIX + PROGRESS, told)

    def tell_end(self, spawner: Spawner, token: str, write: Write) -> None:
        """Pass the end of an attempt to the listeners of this process.

        The server sends it to all others.
        """
        if not event_emitter.listens():
            return
        event = read_event(
            self._keys.queue,
            self._keys.event_of(write.subject, token),
            write.body,
        )
        if event is not None and event_emitter.listens(event.name):
            spawner.spawn(event_emitter.emit, event.name, event.data)
