"""Consumers, leases and pullers of the in-memory backend.

The log keeps the records. No callback runs inside a method of the backend: every delivery and every
lapse goes through `call_soon`.
"""

import asyncio
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from asyncmq_nats._clock import NANOSECONDS
from asyncmq_nats._logging import get_logger
from asyncmq_nats.backends.base import Consumer, ConsumerState, Delivery, Record
from asyncmq_nats.backends.filters import matches
from asyncmq_nats.backends.inmemory.timers import Agenda, Alarm
from asyncmq_nats.exceptions import AssetMissing

__all__ = ["Counter", "Cursor", "InMemoryPuller"]

logger = get_logger(__name__)


class Counter:
    """A consumer without a lease: how many records match."""

    def __init__(self, declaration: Consumer, agenda: Agenda) -> None:
        self.declaration = declaration
        self._agenda = agenda
        self.paused_until = declaration.paused_until or 0.0
        self._count = 0

    def add(self, record: Record) -> None:
        """Count a record that was stored."""
        if matches(self.declaration.filters, record.subject):
            self._count += 1

    def remove(self, record: Record) -> None:
        """Count a record that went."""
        if matches(self.declaration.filters, record.subject):
            self._count -= 1

    def state(self) -> ConsumerState:
        """Return its counts."""
        return ConsumerState(
            pending=self._count,
            leased=0,
            delivered_sequence=0,
            paused=self.paused_until > self._agenda.now(),
        )

    def pause(self, until: float) -> None:
        """Do nothing: a counter delivers nothing."""
        self.paused_until = until


class Lease:
    """A record that was delivered and is not settled.

    `alarm`: when the delay of its NAK is over.
    """

    __slots__ = ("alarm", "deliveries", "record")

    def __init__(self, record: Record) -> None:
        self.record = record
        self.deliveries = 1
        self.alarm: Alarm | None = None


class Request:
    """Credit of one puller: `count` deliveries, until the alarm rings."""

    __slots__ = ("alarm", "count", "puller")

    def __init__(self, puller: "InMemoryPuller", count: int) -> None:
        self.puller = puller
        self.count = count
        self.alarm: Alarm | None = None


class Cursor:
    """A consumer with a lease. Every operation costs the same for ten records and for a million.

    A leased record is in one of four places: in hand and extended (in none of the collections), in
    hand and running out (`_deadlines`, in order, since all leases are equally long), given back
    with a delay (its alarm), or about to be delivered again (`_returned`).
    """

    def __init__(
        self, declaration: Consumer, lease: float, agenda: Agenda, on_ack: Callable[[int], None]
    ) -> None:
        self.declaration = declaration
        self.paused_until = 0.0
        self._lease = lease
        self._agenda = agenda
        self._on_ack = on_ack
        self.lock = agenda.lock
        # Not dicts: to find the first item of one whose first items were removed takes longer and
        # longer.
        self._undelivered: OrderedDict[int, Record] = OrderedDict()
        self._returned: OrderedDict[int, None] = OrderedDict()
        self._deadlines: OrderedDict[int, float] = OrderedDict()
        self._leases: dict[int, Lease] = {}
        self._waiting: deque[Request] = deque()
        self._immediate: list[Request] = []
        self._delivered_sequence = 0
        self._serving_soon = False
        self._expiry: Alarm | None = None
        self._resumption: Alarm | None = None
        if declaration.paused_until is not None:
            self.pause(declaration.paused_until)

    def add(self, record: Record) -> None:
        """Take note of a record that was stored."""
        if matches(self.declaration.filters, record.subject):
            self._undelivered[record.sequence] = record
            self._wake()

    def remove(self, record: Record) -> None:
        """Forget a record that went."""
        if self._undelivered.pop(record.sequence, None) is None:
            self._release(record.sequence)

    def state(self) -> ConsumerState:
        """Return its counts."""
        return ConsumerState(
            pending=len(self._undelivered),
            leased=len(self._leases),
            delivered_sequence=self._delivered_sequence,
            paused=self.paused_until > self._agenda.now(),
            waiting_pulls=len(self._waiting),
        )

    def change_lease(self, lease: float) -> None:
        """Have leases last so long from now on, also those that run out."""
        difference, self._lease = lease - self._lease, lease
        self.declaration = replace(self.declaration, lease=lease)
        for sequence in self._deadlines:
            self._deadlines[sequence] += difference
        self._agenda.cancel(self._expiry)
        self._expiry = None
        self._watch()

    def pause(self, until: float) -> None:
        """Deliver nothing until then; an `until` of 0 resumes.

        Waiting requests are served when the pause is over.
        """
        self.paused_until = until
        self._agenda.cancel(self._resumption)
        self._resumption = (
            self._agenda.at(until, self._wake) if until > self._agenda.now() else None
        )
        self._wake()

    def request(self, request: Request, wait: float) -> None:
        """Serve the request as records come, for so long."""
        self._waiting.append(request)
        if wait > 0:
            end = self._agenda.now() + wait
            request.alarm = self._agenda.at(end, partial(self._lapse, request), upkeep=True)
        else:
            self._immediate.append(request)
        self._wake()

    def withdraw(self, puller: "InMemoryPuller") -> None:
        """Drop the requests of a puller."""
        for request in self._waiting:
            if request.puller is puller:
                self._agenda.cancel(request.alarm)
        self._waiting = deque(request for request in self._waiting if request.puller is not puller)
        self._immediate = [request for request in self._immediate if request.puller is not puller]

    def lapse_all(self) -> None:
        """Give up every request: the consumer goes."""
        for request in tuple(self._waiting):
            self._agenda.cancel(request.alarm)
            self._lapse(request)
        self._agenda.cancel(self._expiry)
        self._agenda.cancel(self._resumption)
        for sequence in tuple(self._leases):
            self._release(sequence)

    def stop_extending(self) -> None:
        """Let all leases run out: their holders are gone, and so are all pullers."""
        self._serving_soon = False
        for sequence in self._leases:
            self._let_run_out(sequence)

    def ack(self, sequence: int) -> None:
        """Settle a delivery, also one whose lease ran out or that is in other hands by now."""
        self._release(sequence)
        self._on_ack(sequence)

    def nak(self, sequence: int, delay: float) -> None:
        """Have a record delivered again."""
        lease = self._leases.get(sequence)
        if lease is None or sequence in self._returned:
            return
        self._deadlines.pop(sequence, None)
        self._agenda.cancel(lease.alarm)
        if delay > 0:
            lease.alarm = self._agenda.at(
                self._agenda.now() + delay, partial(self._return, sequence)
            )
        else:
            self._return(sequence)

    def abandon(self, sequence: int, deliveries: int) -> None:
        """Let the lease run out, if it is still that of this delivery."""
        lease = self._leases.get(sequence)
        if lease is not None and lease.deliveries == deliveries:
            self._let_run_out(sequence)

    def _release(self, sequence: int) -> None:
        lease = self._leases.pop(sequence, None)
        if lease is not None:
            self._agenda.cancel(lease.alarm)
            self._deadlines.pop(sequence, None)
            self._returned.pop(sequence, None)

    def _return(self, sequence: int) -> None:
        self._leases[sequence].alarm = None
        self._returned[sequence] = None
        self._wake()

    def _let_run_out(self, sequence: int) -> None:
        if (
            sequence in self._returned
            or sequence in self._deadlines
            or self._leases[sequence].alarm is not None
        ):
            return
        self._deadlines[sequence] = self._agenda.now() + self._lease
        self._watch()

    def _watch(self) -> None:
        if self._expiry is None and self._deadlines:
            self._expiry = self._agenda.at(next(iter(self._deadlines.values())), self._expire)

    def _expire(self) -> None:
        self._expiry = None
        now = self._agenda.now()
        while self._deadlines and next(iter(self._deadlines.values())) <= now:
            self._return(self._deadlines.popitem(last=False)[0])
        self._watch()

    def _wake(self) -> None:
        if self._waiting and not self._serving_soon:
            self._serving_soon = self._agenda.soon(self._serve)

    def _serve(self) -> None:
        self._serving_soon = False
        if self.paused_until <= self._agenda.now():
            while self._waiting and (lease := self._take()) is not None:
                request = self._waiting.popleft()
                request.count -= 1
                if request.count:
                    self._waiting.append(request)
                else:
                    self._agenda.cancel(request.alarm)
                self._deliver(lease, request.puller)
        immediate, self._immediate = self._immediate, []
        for request in immediate:
            if request.count:
                self._lapse(request)

    def _take(self) -> Lease | None:
        """Return the next record to deliver, leased: first those that come again."""
        if self._returned:
            lease = self._leases[self._returned.popitem(last=False)[0]]
            lease.deliveries += 1
            return lease
        if not self._undelivered:
            return None
        sequence, record = self._undelivered.popitem(last=False)
        self._delivered_sequence = sequence
        lease = self._leases[sequence] = Lease(record)
        return lease

    def _deliver(self, lease: Lease, puller: "InMemoryPuller") -> None:
        if not puller.extend:
            self._let_run_out(lease.record.sequence)
        delivery = InMemoryDelivery(self, lease.record, lease.deliveries, len(self._undelivered))
        self._agenda.soon(puller.arrive, delivery, loop=puller.loop)

    def _lapse(self, request: Request) -> None:
        self._waiting.remove(request)
        puller = request.puller
        self._agenda.soon(puller.lapse, self.declaration.name, request.count, loop=puller.loop)


class InMemoryDelivery:
    """A `Delivery`."""

    __slots__ = (
        "_cursor",
        "body",
        "consumer",
        "deliveries",
        "pending",
        "sequence",
        "subject",
        "time",
    )

    def __init__(self, cursor: Cursor, record: Record, deliveries: int, pending: int) -> None:
        self._cursor = cursor
        self.subject = record.subject
        self.body = record.body
        self.sequence = record.sequence
        self.time = record.time
        self.deliveries = deliveries
        self.consumer = cursor.declaration.name
        self.pending = pending

    @property
    def first(self) -> bool:
        """See `Delivery`."""
        return self.deliveries == 1

    @property
    def stamp(self) -> int:
        """See `Delivery`."""
        return round(self.time * NANOSECONDS)

    def ack(self) -> None:
        """See `Delivery`."""
        with self._cursor.lock:
            self._cursor.ack(self.sequence)

    def nak(self, delay: float = 0.0) -> None:
        """See `Delivery`."""
        with self._cursor.lock:
            self._cursor.nak(self.sequence, delay)

    def abandon(self) -> None:
        """See `Delivery`."""
        with self._cursor.lock:
            self._cursor.abandon(self.sequence, self.deliveries)


class InMemoryPuller:
    """A `Puller`.

    `find` returns the consumer of a name, declared again if it vanished, or raises `AssetMissing`.
    """

    def __init__(
        self,
        find: Callable[[str], Cursor],
        on_delivery: Callable[[Delivery], None],
        on_lapse: Callable[[str], None],
        *,
        extend: bool,
    ) -> None:
        self.extend = extend
        self.loop = asyncio.get_running_loop()
        self._find = find
        self._on_delivery = on_delivery
        self._on_lapse = on_lapse
        self._outstanding: dict[str, int] = {}
        self._cursors: dict[str, Cursor] = {}
        self._closed = False

    @property
    def silent_for(self) -> float:
        """See `Puller`."""
        return 0.0

    def outstanding(self, consumer: str) -> int:
        """See `Puller`."""
        return self._outstanding.get(consumer, 0)

    async def request(self, consumer: str, count: int, *, wait: float) -> None:
        """See `Puller`."""
        if self._closed or count < 1:
            return
        self._outstanding[consumer] = self.outstanding(consumer) + count
        try:
            cursor = self._cursors[consumer] = self._find(consumer)
        except (
            AssetMissing
        ) as error:  # a server does not say so at once either, but by voiding the credit
            logger.warning("consumer %s: no deliveries: %s", consumer, error)
            asyncio.get_running_loop().call_soon(self.lapse, consumer, count)
        else:
            with cursor.lock:
                cursor.request(Request(self, count), wait)

    async def close(self) -> None:
        """See `Puller`. Scheduled deliveries still arrive."""
        await self.withdraw()
        self.stop()

    async def withdraw(self) -> None:
        """See `Puller`."""
        for cursor in self._cursors.values():
            with cursor.lock:
                cursor.withdraw(self)
        for _ in range(2):  # turns of the event loop in which scheduled deliveries arrive
            await asyncio.sleep(0)
        self._outstanding.clear()

    def stop(self) -> None:
        """Do what `close` does, where nothing can be awaited."""
        self._closed = True
        self._outstanding.clear()
        for cursor in self._cursors.values():
            with cursor.lock:
                cursor.withdraw(self)

    def arrive(self, delivery: InMemoryDelivery) -> None:
        """Take a delivery."""
        if self._closed:
            delivery.nak()
            return
        self._outstanding[delivery.consumer] = max(0, self.outstanding(delivery.consumer) - 1)
        self._on_delivery(delivery)

    def lapse(self, consumer: str, count: int) -> None:
        """Take note that so much credit is void."""
        if not self._closed:
            self._outstanding[consumer] = max(
                0, self.outstanding(consumer) - count
            )  # it may have been withdrawn
            self._on_lapse(consumer)
