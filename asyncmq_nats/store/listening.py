"""The events of a queue that a reader has yet to read, from all their sources.

Most are signals. That a job begins to wait is read from the ready log (`Backend.watch`), or seen by
its start if that comes first: then the record may be gone before it is read.
"""

from collections.abc import AsyncIterator, Collection
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Final

import anyio

from asyncmq_nats._logging import Throttle, get_logger
from asyncmq_nats.backends.base import Record, Signal, Subscription, Watching
from asyncmq_nats.events import PREFIX, STARTED, Event, event_of, read_event
from asyncmq_nats.exceptions import InvalidJob
from asyncmq_nats.states import State
from asyncmq_nats.store.announcing import LISTEN, LISTENING_TIME, READY_MESSAGE, START_MEMBERS
from asyncmq_nats.store.queue_store import QueueStore
from asyncmq_nats.wire.codec import load_json
from asyncmq_nats.wire.keys import encode_token, last_token, split_event

__all__ = ["Inbox"]

logger = get_logger(__name__)

EVENT_BUFFER: Final = 10_000
"""Events that a slow reader may be behind."""
REMEMBERED: Final = 20_000
"""Ready messages of which is known that the reader was told: those that are near the end."""


class Inbox:
    """The events that a reader has yet to read.

    Args:
        store: of the queue.
        names: only these; none means all.
        job_id: only those of this job; `None` means of all.
    """

    def __init__(self, store: QueueStore, names: Collection[str], job_id: str | None) -> None:
        self._store = store
        self._keys = store.keys
        self._names = frozenset(names)
        self._token = None if job_id is None else encode_token(job_id)
        self._told: dict[int, None] = {}
        self._watching: Watching | None = None
        self._losses = Throttle()
        self._send, self._receive = anyio.create_memory_object_stream[Event](EVENT_BUFFER)

    @asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        """Listen while the block runs, from its first line on."""
        backend, keys, token = self._store.backend, self._keys, self._token
        async with AsyncExitStack() as stack:
            stack.enter_context(self._send)
            stack.enter_context(self._receive)
            stack.callback(lambda: self._warn_of_losses(self._losses.take()))

            def keep(subscription: Subscription) -> None:
                stack.push_async_callback(_unsubscribe, subscription)

            keep(await backend.subscribe(keys.event("*", token or "*"), self._hear))
            self._call_out()
            if self._wants(State.WAITING):
                filter = keys.all_ready if token is None else keys.ready_any(token)
                self._watching = await backend.watch(keys.ready_log, filter, self._see)
                keep(self._watching)
            yield

    async def next(self, timeout: float | None) -> Event | None:
        """Return the next event; `None` if there is none within `timeout` seconds."""
        with anyio.move_on_after(timeout):
            while True:
                with anyio.move_on_after(None if self._token is None else LISTENING_TIME / 2):
                    return await self._receive.receive()
                self._call_out()
        return None

    def _call_out(self) -> None:
        """Tell the workers that someone listens.

        They find a reader of all jobs by themselves, but not one of a single job.
        """
        backend = self._store.backend
        if backend.may_declare and (self._wants(STARTED) or self._wants(State.WAITING)):
            backend.signal(self._keys.control(LISTEN))

    def _wants(self, what: str) -> bool:
        return not self._names or PREFIX + what in self._names

    def _see(self, record: Record) -> None:
        """Tell of a ready message, unless its start was heard first."""
        if record.sequence not in self._told:
            self._remember(record.sequence)
            subject = self._keys.event(State.WAITING, last_token(record.subject))
            self._put(read_event(self._keys.queue, subject, record.body))

    def _hear(self, signal: Signal) -> None:
        what, token = split_event(signal.subject)
        if what == State.WAITING:  # from a server that sends them to others, too
            return
        if what == STARTED and READY_MESSAGE.encode() in signal.body:
            self._hear_start(token, signal.body)
        else:
            self._put(read_event(self._keys.queue, signal.subject, signal.body))

    def _hear_start(self, token: str, body: bytes) -> None:
        """Tell of a start, and before it that the job waited, if that was not heard."""
        try:
            data = load_json(body)
        except InvalidJob:
            data = {}
        match data.pop(READY_MESSAGE, None):
            case [int(sequence), int(stamp)] if (
                self._watching is not None
                and sequence not in self._told
                and self._watching.covers(sequence, stamp / 1e9)
            ):
                self._remember(sequence)
                record = {name: data[name] for name in data if name not in START_MEMBERS}
                self._put(event_of(self._keys.queue, State.WAITING, token, record))
        self._put(event_of(self._keys.queue, STARTED, token, data))

    def _remember(self, sequence: int) -> None:
        self._told[sequence] = None
        if len(self._told) > REMEMBERED:
            del self._told[next(iter(self._told))]

    def _put(self, event: Event | None) -> None:
        if event is not None and (not self._names or event.name in self._names):
            try:
                self._send.send_nowait(event)
            except anyio.WouldBlock:
                self._warn_of_losses(self._losses.note())

    def _warn_of_losses(self, count: int) -> None:
        if count:
            text = "queue %s: a reader of events is too slow, %d events are lost"
            logger.warning(text, self._keys.queue, count)


async def _unsubscribe(subscription: Subscription) -> None:
    with anyio.CancelScope(shield=True):
        await subscription.unsubscribe()
