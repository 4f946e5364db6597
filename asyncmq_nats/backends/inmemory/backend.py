"""A backend without a server: a twin of what we use of JetStream, for tests and first steps.

One process, one event loop at a time, one store per instance. Where the twin and the server
disagree, the twin is wrong (`tests/contract`). Records outlast `close` and end with
the object.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import fields
from functools import partial
from itertools import count
from typing import Any, Self
from weakref import WeakSet

import anyio

from asyncmq_nats._clock import SYSTEM_CLOCK, Clock
from asyncmq_nats._concurrency import Home
from asyncmq_nats._logging import Throttle, get_logger
from asyncmq_nats.backends.base import (
    Consumer,
    ConsumerState,
    Delivery,
    Difference,
    Log,
    LogState,
    Puller,
    Record,
    ServerFacts,
    Settle,
    Settled,
    Signal,
    Staged,
    Subscription,
    Watching,
    Write,
)
from asyncmq_nats.backends.filters import compile_filter
from asyncmq_nats.backends.inmemory.consumers import Counter, Cursor, InMemoryPuller
from asyncmq_nats.backends.inmemory.log import MAX_BODY, StoredLog
from asyncmq_nats.backends.inmemory.timers import Agenda
from asyncmq_nats.exceptions import AssetMissing, AsyncMQError, BackendError, PayloadTooLarge
from asyncmq_nats.settings import Settings
from asyncmq_nats.settings import settings as environment

__all__ = ["InMemoryBackend"]

logger = get_logger(__name__)


class InMemoryStaged:
    """A `Staged`."""

    def __init__(self, write: Callable[..., Awaitable[int]]) -> None:
        """`write`: `Backend.write` to its log."""
        self._write = write
        self._writes: list[Write] = []

    async def add(self, *writes: Write) -> None:
        """See `Staged`."""
        self._writes += writes
        await asyncio.sleep(0)

    async def commit(self) -> int:
        """See `Staged`."""
        return await self._write(*self._writes)

    def drop(self) -> None:
        """See `Staged`."""
        self._writes.clear()


class InMemorySubscription:
    """A `Subscription` to signals, or a `Watching` of the records of a log."""

    def __init__(
        self,
        subject: str,
        on_arrival: Callable[[Any], None],
        leave: Callable[["InMemorySubscription"], None],
        log: str | None = None,
        begin: int = 0,
    ) -> None:
        """`log`: whose records; signals if `None`. `begin`: its last sequence."""
        self.log = log
        self._begin = begin
        self.match = compile_filter(subject).match
        self._on_arrival = on_arrival
        self._leave = leave
        self.loop = asyncio.get_running_loop()
        self.active = True

    async def unsubscribe(self) -> None:
        """See `Subscription`."""
        self.active = False
        self._leave(self)

    def covers(self, sequence: int, time: float) -> bool:
        """See `Watching`."""
        return sequence > self._begin

    def arrive(self, what: Signal | Record) -> None:
        """Take a signal or a record."""
        if self.active:
            try:
                self._on_arrival(what)
            except Exception:  # a malformed one must not end the subscription
                logger.exception("a callback for signals on %.200s failed", what.subject)


class InMemoryBackend:
    """A `Backend` in the memory of this process.

    Where a server would have to answer, a method first yields to other tasks, then works at once:
    if it is cancelled, it has done nothing.
    """

    def __init__(self, settings: Settings | None = None, *, clock: Clock = SYSTEM_CLOCK) -> None:
        self.settings = settings or environment
        self.clock = clock
        self.may_declare = True
        self._home = Home()
        self._agenda = Agenda(clock)
        self._logs: dict[str, StoredLog] = {}
        self._declared: dict[tuple[str, str], Consumer] = {}
        self._pullers: WeakSet[InMemoryPuller] = WeakSet()
        self._subscriptions: list[InMemorySubscription] = []
        self._inboxes = count(1)
        self._dropped_signals = Throttle()

    async def connect(self) -> None:
        """See `Backend`."""
        self._open()

    async def close(self) -> None:
        """See `Backend`."""
        self._home.move()
        self._let_go()
        self._home.leave()

    async def __aenter__(self) -> Self:
        """See `Backend`."""
        await self.connect()
        return self

    async def __aexit__(self, *_: object) -> None:
        """See `Backend`."""
        await self.close()

    async def ping(self) -> float:
        """See `Backend`."""
        begun = time.monotonic()
        await self._give_way()
        return time.monotonic() - begun

    @property
    def is_full(self) -> bool:
        """See `Backend`."""
        return False

    @property
    def reconnects(self) -> int:
        """See `Backend`."""
        return 0

    @property
    def is_connected(self) -> bool:
        """See `Backend`."""
        return self._home.loop is not None

    def now(self) -> float:
        """See `Backend`."""
        return self._agenda.now()

    def now_at_least(self) -> float:
        """See `Backend`."""
        return self._agenda.now()

    def now_at_most(self) -> float:
        """See `Backend`."""
        return self._agenda.now()

    @property
    def reads_may_lag(self) -> bool:
        """See `Backend`."""
        return False

    @property
    def timers_lag(self) -> bool:
        """See `Backend`."""
        return False

    @property
    def max_body(self) -> int:
        """See `Backend`."""
        return MAX_BODY

    async def declare_log(self, log: Log) -> None:
        """See `Backend`."""
        await self._give_way()
        existing = self._logs.get(log.name)
        if existing is None:
            told = partial(self._tell, log.name)
            self._logs[log.name] = StoredLog(log, self._agenda, self._send_signal, told)
        else:
            warn_of_difference("log", existing.declaration, log)

    async def describe_server(self) -> ServerFacts | None:
        """See `Backend`."""
        await self._give_way()
        return None

    async def find_refused(self, publish: Sequence[str], subscribe: Sequence[str]) -> list[str]:
        """See `Backend`."""
        await self._give_way()
        return []

    async def compare(
        self, log: Log, consumers: Sequence[Consumer], settings: Settings
    ) -> list[Difference]:
        """See `Backend`."""
        await self._give_way()
        stored = self._logs.get(log.name)
        found = [] if stored is None else [(c, stored.consumers.get(c.name)) for c in consumers]
        return [
            Difference(
                f"consumer {wanted.name} of {log.name}",
                "lease",
                cursor.declaration.lease,
                wanted.lease,
                True,
            )
            for wanted, cursor in found
            if cursor is not None and cursor.declaration.lease != wanted.lease
        ]

    async def change(
        self, log: Log, consumers: Sequence[Consumer], settings: Settings
    ) -> list[Difference]:
        """See `Backend`."""
        differences = await self.compare(log, consumers, settings)
        for wanted in consumers if differences else ():
            cursor = self._find_log(log.name).consumers.get(wanted.name)
            if isinstance(cursor, Cursor) and wanted.lease is not None:
                cursor.change_lease(wanted.lease)
        return differences

    async def incarnation(self, name: str) -> str | None:
        """See `Backend`."""
        await self._give_way()
        log = self._logs.get(name)
        return None if log is None else log.incarnation

    async def delete_log(self, name: str) -> bool:
        """See `Backend`."""
        await self._give_way()
        log = self._logs.pop(name, None)
        if log is not None:
            log.clear()
        return log is not None

    async def list_logs(self, prefix: str) -> list[str]:
        """See `Backend`."""
        await self._give_way()
        return sorted(name for name in self._logs if name.startswith(prefix))

    async def declare_consumer(self, log: str, consumer: Consumer) -> None:
        """See `Backend`."""
        await self._give_way()
        stored = self._find_log(log)
        existing = stored.consumers.get(consumer.name)
        if existing is None:
            stored.add_consumer(consumer)
            self._declared[log, consumer.name] = consumer
        else:
            warn_of_difference("consumer", existing.declaration, consumer)

    async def list_consumers(self, log: str) -> list[str]:
        """See `Backend`."""
        await self._give_way()
        return sorted(self._find_log(log).consumers)

    async def look_up(self, log: str, consumer: str) -> ConsumerState | None:
        """See `Backend`."""
        await self._give_way()
        found = self._find_log(log).consumers.get(consumer)
        return None if found is None else found.state()

    async def pause(self, log: str, consumer: str, until: float) -> None:
        """See `Backend`."""
        await self._give_way()
        self._find_consumer(log, consumer).pause(until)

    async def resume(self, log: str, consumer: str) -> None:
        """See `Backend`."""
        await self._give_way()
        self._find_consumer(log, consumer).pause(0.0)

    async def write(self, log: str, *writes: Write) -> int:
        """See `Backend`."""
        await self._give_way()
        return self._find_log(log).write(writes)

    async def write_each(self, log: str, writes: Sequence[Write]) -> list[int | AsyncMQError]:
        """See `Backend`."""
        results: list[int | AsyncMQError] = []
        for write in writes:
            try:
                results.append(await self.write(log, write))
            except AsyncMQError as error:
                results.append(error)
        return results

    def stage(self, log: str) -> Staged:
        """See `Backend`."""
        return InMemoryStaged(partial(self.write, log))

    def send(self, log: str, write: Write, settle: Settle, *, timeout: float | None = None) -> None:
        """See `Backend`."""
        settled: Settled
        try:
            settled = self._find_log(log).write((write,))
        except BackendError as error:
            settled = error
        asyncio.get_running_loop().call_soon(_settle, settle, settled)

    async def last(self, log: str, *filters: str) -> list[Record]:
        """See `Backend`."""
        await self._give_way()
        return self._find_log(log).find(*filters)

    async def latest(self, log: str, filter: str) -> Record | None:
        """See `Backend`."""
        found = await self.last(log, filter)
        return found[-1] if found else None

    async def page(
        self,
        log: str,
        filter: str,
        *,
        from_sequence: int = 1,
        limit: int = 100,
        mostly: bool = False,
        index: str | None = None,
    ) -> list[Record]:
        """See `Backend`."""
        await self._give_way()
        return self._find_log(log).page(filter, from_sequence, limit)

    async def page_back(
        self,
        log: str,
        filter: str,
        *,
        before: int | None = None,
        limit: int = 100,
        index: str | None = None,
    ) -> list[Record]:
        """See `Backend`."""
        await self._give_way()
        return self._find_log(log).page_back(filter, before, limit)

    async def count(self, log: str, filter: str | None = None) -> int:
        """See `Backend`."""
        await self._give_way()
        found = self._find_log(log)
        return len(found) if filter is None else len(found.find(filter))

    async def describe_log(self, log: str) -> LogState | None:
        """See `Backend`."""
        await self._give_way()
        found = self._logs.get(log)
        if found is None:
            return None
        return LogState(len(found), found.size, found.sequence)

    async def list_subjects(self, log: str, filter: str) -> list[str]:
        """See `Backend`."""
        return [record.subject for record in await self.last(log, filter)]

    async def last_sequence(self, log: str) -> int:
        """See `Backend`."""
        await self._give_way()
        return self._find_log(log).sequence

    async def delete(self, log: str, sequence: int) -> bool:
        """See `Backend`."""
        await self._give_way()
        return self._find_log(log).delete(sequence)

    def discard(self, log: str, sequence: int) -> None:
        """See `Backend`."""
        with suppress(BackendError):
            self._find_log(log).delete(sequence)

    async def delete_many(self, log: str, sequences: Sequence[int]) -> list[int]:
        """See `Backend`."""
        await self._give_way()
        stored = self._find_log(log)
        return [sequence for sequence in sequences if stored.delete(sequence)]

    async def purge(
        self, log: str, filter: str, *, before: int | None = None, keep: int | None = None
    ) -> int:
        """See `Backend`."""
        await self._give_way()
        return self._find_log(log).purge(filter, before, keep)

    def puller(
        self,
        log: str,
        on_delivery: Callable[[Delivery], None],
        on_lapse: Callable[[str], None],
        *,
        extend: bool = True,
    ) -> Puller:
        """See `Backend`."""
        puller = InMemoryPuller(
            partial(self._find_cursor, log), on_delivery, on_lapse, extend=extend
        )
        self._pullers.add(puller)
        return puller

    async def publish(self, subject: str, body: bytes = b"") -> None:
        """See `Backend`."""
        await self._give_way()
        self._post(subject, body)

    def signal(
        self, subject: str, body: bytes = b"", on_unheard: Callable[[], None] | None = None
    ) -> None:
        """See `Backend`."""
        try:
            if not self._post(subject, body) and on_unheard is not None:
                self._agenda.soon(on_unheard)
        except PayloadTooLarge as error:
            if times := self._dropped_signals.note():
                logger.warning("%d signals were not sent: %s", times, error)

    async def subscribe(self, subject: str, on_signal: Callable[[Signal], None]) -> Subscription:
        """See `Backend`."""
        await self._give_way()
        subscription = InMemorySubscription(subject, on_signal, self._leave)
        self._subscriptions.append(subscription)
        return subscription

    async def watch(self, log: str, filter: str, on_record: Callable[[Record], None]) -> Watching:
        """See `Backend`."""
        await self._give_way()
        stored = self._logs.get(log)
        begin = 0 if stored is None else stored.sequence
        subscription = InMemorySubscription(filter, on_record, self._leave, log, begin)
        self._subscriptions.append(subscription)
        return subscription

    async def request(
        self, subject: str, body: bytes = b"", *, timeout: float = 1.0
    ) -> bytes | None:
        """See `Backend`."""
        inbox = f"_INBOX.memory.{next(self._inboxes)}"
        answers: list[bytes] = []
        answered = anyio.Event()

        def take(signal: Signal) -> None:
            answers.append(signal.body)
            answered.set()

        subscription = await self.subscribe(inbox, take)
        try:
            if self._post(subject, body, inbox):
                with anyio.move_on_after(timeout):
                    await answered.wait()
        finally:
            await subscription.unsubscribe()
        return answers[0] if answers else None

    async def _give_way(self) -> None:
        await asyncio.sleep(0)
        self._open()

    def _open(self) -> None:
        loop = asyncio.get_running_loop()
        if self._agenda.loop is not loop:
            if self._home.move():  # left behind by an event loop that ended without `close`
                self._let_go()
            self._agenda.start(loop)

    def _let_go(self) -> None:
        for puller in tuple(self._pullers):
            puller.stop()
        self._pullers.clear()
        for subscription in self._subscriptions:
            subscription.active = False
        self._subscriptions.clear()
        self._agenda.stop()
        for log in self._logs.values():
            for consumer in log.consumers.values():
                if isinstance(consumer, Cursor):
                    consumer.stop_extending()

    def _find_log(self, name: str) -> StoredLog:
        log = self._logs.get(name)
        if log is None:
            raise AssetMissing(f"log {name!r}")
        return log

    def _find_consumer(self, log: str, name: str) -> Counter | Cursor:
        """Return the consumer, declared again if it went with a log that is back."""
        stored = self._find_log(log)
        if name not in stored.consumers:
            if (log, name) not in self._declared:
                raise AssetMissing(f"consumer {name!r} of log {log!r}")
            stored.add_consumer(self._declared[log, name])
        return stored.consumers[name]

    def _find_cursor(self, log: str, name: str) -> Cursor:
        self._open()
        consumer = self._find_consumer(log, name)
        if not isinstance(consumer, Cursor):
            raise BackendError(
                f"consumer {name!r} of log {log!r} only counts: "
                "declare it with a lease to pull from it"
            )
        return consumer

    def _post(self, subject: str, body: bytes, reply: str = "") -> bool:
        if len(body) > MAX_BODY:
            raise PayloadTooLarge(f"the message for {subject:.100}", len(body), MAX_BODY)
        return self._send_signal(subject, body, reply)

    def _send_signal(self, subject: str, body: bytes, reply: str = "") -> bool:
        """Hand a signal to everyone who listens now, soon. Return whether anyone does."""
        return self._hand_out(None, Signal(subject, body, reply))

    def _tell(self, log: str, record: Record) -> None:
        self._hand_out(log, record)

    def _hand_out(self, log: str | None, what: Signal | Record) -> bool:
        sent = [
            self._agenda.soon(each.arrive, what, loop=each.loop)
            for each in self._subscriptions
            if each.log == log and each.match(what.subject)
        ]
        return any(sent)

    def _leave(self, subscription: InMemorySubscription) -> None:
        if subscription in self._subscriptions:
            self._subscriptions.remove(subscription)


def _settle(settle: Settle, settled: Settled) -> None:
    try:
        settle(settled)
    except Exception:
        # The caller's code: it must not end the event loop's turn for others.
        logger.exception("a callback of send() failed on %r", settled)


def warn_of_difference(kind: str, existing: Log | Consumer, wanted: Log | Consumer) -> None:
    """Log how what exists differs from what was declared. A pause is no difference."""
    names = [field.name for field in fields(wanted) if field.name != "paused_until"]
    differences = [
        f"{name}: {getattr(existing, name)!r} instead of {getattr(wanted, name)!r}"
        for name in names
        if getattr(existing, name) != getattr(wanted, name)
    ]
    if differences:
        logger.warning(
            "%s %s exists with other settings and stays as it is: %s",
            kind,
            wanted.name,
            "; ".join(differences),
        )
