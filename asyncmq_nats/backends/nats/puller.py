"""Pull requests of our own into one callback subscription, and the leases of what was delivered.

nats-py's `fetch` makes a uuid, a task and a timer per message; this makes one object.
"""

import asyncio
import itertools
import json
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Final

import nats.errors

from asyncmq_nats._clock import NANOSECONDS
from asyncmq_nats._logging import get_logger
from asyncmq_nats.backends.base import Delivery
from asyncmq_nats.backends.nats._client.client import parse_headers, status_of
from asyncmq_nats.backends.nats.connection import ANSWER_SIZE, Connection
from asyncmq_nats.backends.nats.lease_keeper import LeaseKeeper

__all__ = ["NATSPuller"]

logger = get_logger(__name__)

HEARTBEAT_INTERVAL: Final = 5.0
CLUSTER_HEARTBEAT_INTERVAL: Final = 1.0
"""Seconds between idle heartbeats in a cluster: the leader of a consumer may be lost in silence."""
LAPSE_DELAY: Final = 2.0
CLOSE_TIMEOUT: Final = 5.0
SUBJECT_BYTES: Final = 16 * 1024
"""Bytes that a message counts besides its body and headers: its subjects."""
CLUSTER_IDLE_SECONDS: Final = 0.05
"""Seconds after which a server of a cluster that has not used credit has nothing to send."""
IDLE_SECONDS: Final = 0.02
"""Likewise for a single server, in seconds since the pull was sent."""
RESTORE_DELAY: Final = 0.25
"""Seconds before a consumer that is missing is asked again.

The server answers at once: without a pause, pull and answer would chase each other.
"""
DOUBT_SECONDS: Final = 5.0
"""For this long after a restart of the server, it may deliver what it had delivered to others."""
NAK: Final = b"-NAK"

Declare = Callable[[str], Awaitable[None]]


class NATSDelivery:
    """A message on lease. See `base.Delivery`."""

    __slots__ = (
        "_puller",
        "_reply",
        "body",
        "consumer",
        "deliveries",
        "pending",
        "sequence",
        "stamp",
        "subject",
    )

    def __init__(self, subject: str, reply: bytes, body: bytes, puller: "NATSPuller") -> None:
        # $JS.ACK.<stream>.<consumer>.<deliveries>.<stream seq>.<consumer seq>.<time>.<pending>, or
        # with <domain>.<account> before the stream and a token at the end.
        tokens = reply.split(b".")
        first = 3 if len(tokens) == 9 else 5
        self.subject = subject
        self.body = body
        self.consumer = tokens[first].decode()
        self.deliveries = int(tokens[first + 1])
        self.sequence = int(tokens[first + 2])
        self.stamp = tokens[first + 4]
        self.pending = int(tokens[first + 5])
        self._reply = reply
        self._puller = puller

    @property
    def first(self) -> bool:
        return self.deliveries == 1 and not self._puller.may_be_forgotten(self)

    @property
    def time(self) -> float:
        return int(self.stamp) / NANOSECONDS

    def ack(self) -> None:
        self._puller.settle(self._reply, b"")

    def nak(self, delay: float = 0.0) -> None:
        self._puller.settle(
            self._reply, b'-NAK {"delay": %d}' % (delay * NANOSECONDS) if delay > 0 else NAK
        )

    def abandon(self) -> None:
        self._puller.abandon(self._reply)


@dataclass(slots=True)
class Look:
    """A pull that does not wait.

    `count`: deliveries that it may still bring, after the pulls before it have brought `behind`.
    """

    count: int
    behind: int


@dataclass(slots=True)
class Credit:
    """The credit of one consumer's pulls that the server has not used.

    `looks`: pulls that do not wait, by token. `newest`: the highest sequence that came.
    `newest_before_restart`: what it was when the server was last started again.
    """

    outstanding: int = 0
    lapses_at: float = 0.0
    heard_at: float = 0.0
    newest: int = 0
    newest_before_restart: int = 0
    looks: dict[str, Look] = field(default_factory=dict)

    def count_delivery(self) -> None:
        """Take note that one more has come. The server serves its pulls in order."""
        if self.outstanding > 0:
            self.outstanding -= 1
        if not self.looks:
            return
        for token, look in list(self.looks.items()):
            if look.behind > 0:
                look.behind -= 1
            elif look.count > 1:
                look.count -= 1
            else:
                del self.looks[token]

    def give_up(self, count: int | None = None) -> None:
        """Take note that this many, or all, will not come."""
        self.outstanding = 0 if count is None else max(0, self.outstanding - count)
        if not self.outstanding:
            self.looks.clear()


class NATSPuller:
    """See `base.Puller`."""

    def __init__(
        self,
        connection: Connection,
        log: str,
        callbacks: tuple[Callable[[Delivery], None], Callable[[str], None]],
        declare: Declare,
        keeper: LeaseKeeper | None,
    ) -> None:
        self._connection = connection
        self._log = log
        self._on_delivery, self._tell_lapse = callbacks
        self._declare = declare
        self._keeper = keeper
        self._held: dict[bytes, None] = {} if keeper is None else keeper.held
        self._credits: dict[str, Credit] = {}
        self._tokens = itertools.count(1)
        self._inbox = ""
        self._listening: int | None = None
        self._pauses: int | None = None
        self._closed = False
        self._withdrawing = False
        self._turn = asyncio.Lock()
        self._client = connection.client
        self._unanswered_since: float | None = None
        self._server_id = connection.client.server_id
        self._doubt_until: float | None = None
        connection.on_reconnect.append(self._on_reconnect)

    @property
    def silent_for(self) -> float:
        since = self._unanswered_since
        return 0.0 if since is None else time.monotonic() - since

    def outstanding(self, consumer: str) -> int:
        credit = self._credits.get(consumer)
        return credit.outstanding if credit is not None else 0

    async def request(self, consumer: str, count: int, *, wait: float) -> None:
        if self._closed or self._withdrawing:
            return
        if not self._inbox:
            await self._open()
        self._send_pull(consumer, count, wait)

    def _send_pull(self, consumer: str, count: int, wait: float) -> None:
        now = time.monotonic()
        credit = self._credits.setdefault(consumer, Credit())
        token = f"{next(self._tokens)}-{consumer}"
        payload: dict[str, int | bool] = {"batch": count}
        if count * self._client.max_payload > ANSWER_SIZE:
            payload["max_bytes"] = max(ANSWER_SIZE, self._client.max_payload + SUBJECT_BYTES)
        if wait > 0:
            payload["expires"] = int(wait * NANOSECONDS)
        else:  # answered at once, with a 404 if less is there than was asked for
            payload["no_wait"] = True
            credit.looks[token] = Look(count, credit.outstanding)
        credit.outstanding += count
        credit.lapses_at = max(credit.lapses_at, now + wait + LAPSE_DELAY)
        credit.heard_at = now
        if self._unanswered_since is None:
            self._unanswered_since = now
        if wait > 2 * self._heartbeat:
            payload["idle_heartbeat"] = int(self._heartbeat * NANOSECONDS)
        subject = f"{self._connection.api_prefix}CONSUMER.MSG.NEXT.{self._log}.{consumer}"
        try:
            self._client.post(
                subject.encode(), json.dumps(payload).encode(), (self._inbox + token).encode()
            )
        except nats.errors.Error as error:
            logger.warning("consumer %s: pull not sent: %r", consumer, error)

    @property
    def _heartbeat(self) -> float:
        return CLUSTER_HEARTBEAT_INTERVAL if self._client.is_clustered else HEARTBEAT_INTERVAL

    async def _open(self) -> None:
        self._inbox = self._client.new_inbox() + "."
        if self._keeper is not None:
            await self._keeper.start()
        self._listening = await self._client.listen(self._inbox + "*", self._on_message)
        self._pauses = await self._client.listen(
            f"$JS.EVENT.ADVISORY.CONSUMER.PAUSE.{self._log}.*", self._on_pause
        )
        self._connection.background.run(self._watch())

    async def withdraw(self) -> None:
        if (
            self._closed
            or self._withdrawing
            or self._listening is None
            or not self._client.is_connected
        ):
            return
        self._withdrawing = True
        try:
            async with self._turn:
                if self._closed:
                    return
                old, self._inbox = self._listening, self._client.new_inbox() + "."
                self._listening = await self._client.listen(self._inbox + "*", self._on_message)
                await self._stop_listening(old)
            for credit in self._credits.values():
                credit.give_up()
        finally:
            self._withdrawing = False

    async def close(self) -> None:
        self._closed = True
        if self._on_reconnect in self._connection.on_reconnect:
            self._connection.on_reconnect.remove(self._on_reconnect)
        async with self._turn:  # a withdrawal under way has more to deliver
            numbers = [each for each in (self._listening, self._pauses) if each is not None]
            await self._stop_listening(*numbers)
            self._listening = self._pauses = None
        self._credits.clear()

    async def _stop_listening(self, *numbers: int) -> None:
        """The server drops the pulls of an inbox without a subscriber.

        Its earlier messages arrive before its answer.
        """
        try:
            if numbers and self._client.is_connected:
                await self._wait_for_quiet(time.monotonic())
                async with asyncio.timeout(CLOSE_TIMEOUT):
                    await self._client.stop_listening(*numbers)
        except (nats.errors.Error, TimeoutError, OSError) as error:
            logger.warning(
                "%s: deliveries on their way are redelivered when their lease is over: %r",
                self._log,
                error,
            )
        finally:
            self._client.forget(*numbers)

    async def _wait_for_quiet(self, begun: float) -> None:
        """Wait until no credit is left, or none is being used.

        A message that the server is about to send when the subscription ends is delivered again,
        and counts as a redelivery. If another server of a cluster leads the consumer, the one we
        are connected to drops it: then it returns when its lease is over.
        """
        quiet, since = (
            (CLUSTER_IDLE_SECONDS, begun) if self._client.is_clustered else (IDLE_SECONDS, 0.0)
        )
        while any(credit.outstanding for credit in self._credits.values()):
            now = time.monotonic()
            if (
                now > max(since, *(credit.heard_at for credit in self._credits.values())) + quiet
                or now > begun + CLOSE_TIMEOUT
            ):
                break
            await asyncio.sleep(quiet / 10)

    # -- deliveries

    def _on_message(self, subject: bytes, reply: bytes, body: bytes, headers: bytes | None) -> None:
        self._unanswered_since = None
        if not reply.startswith(b"$JS.ACK."):
            self._on_status(subject.decode(), headers)
            return
        delivery = NATSDelivery(subject.decode("utf-8", "surrogateescape"), reply, body, self)
        credit = self._credits.get(delivery.consumer)
        if credit is not None:
            credit.count_delivery()
            credit.heard_at = time.monotonic()
            if delivery.sequence > credit.newest:
                credit.newest = delivery.sequence
        if self._listening is None:
            delivery.nak()
            return
        self._held[reply] = None
        self._on_delivery(delivery)

    def settle(self, reply: bytes, body: bytes) -> None:
        """Answer a delivery and let go of its lease."""
        self._held.pop(reply, None)
        try:
            self._client.post(reply, body)
        except nats.errors.Error as error:  # it will be delivered again, and found done
            logger.warning("delivery %s: not settled: %r", reply.decode(), error)

    def abandon(self, reply: bytes) -> None:
        """Let go of a lease without an answer."""
        self._held.pop(reply, None)

    # -- credit

    def _on_lapse(self, consumer: str) -> None:
        if not self._closed and not self._withdrawing:
            self._tell_lapse(consumer)

    def _on_status(self, subject: str, raw_headers: bytes | None) -> None:
        status, headers = status_of(raw_headers), parse_headers(raw_headers)
        token = subject[len(self._inbox) :]
        consumer = token.partition("-")[2]
        credit = self._credits.get(consumer)
        if credit is None:
            return
        credit.heard_at = time.monotonic()
        if status == "100":
            return
        pending = headers.get("Nats-Pending-Messages")
        if status == "404":
            look = credit.looks.pop(token, None)
            if look is not None:
                credit.give_up(look.count)
                self._on_lapse(consumer)
        elif status == "409" and pending is not None:
            if int(pending):  # otherwise it has brought all, and less than `max_bytes`
                self._pull_the_rest(credit, consumer, token, int(pending))
        elif status == "408" and pending is not None:
            credit.give_up(int(pending))
            self._on_lapse(consumer)
        else:
            self._lapse(
                consumer,
                f"{status} {headers.get('Description', '')}".strip(),
                gone=status in ("409", "503"),
            )

    def _pull_the_rest(self, credit: Credit, consumer: str, token: str, count: int) -> None:
        """Go on with a pull that the server has ended for the size of what it brought.

        All of that has been read by now.
        """
        look = credit.looks.pop(token, None)
        credit.give_up(count)
        if not self._closed and not self._withdrawing:
            self._send_pull(
                consumer,
                count,
                0.0
                if look is not None
                else max(1.0, credit.lapses_at - LAPSE_DELAY - time.monotonic()),
            )

    def _on_pause(self, subject: bytes, _: bytes, body: bytes, __: bytes | None) -> None:
        """A consumer was paused or resumed.

        The server wakes pulls that wait only when a new one comes, so send a small one.
        """
        consumer = subject.decode().rpartition(".")[2]
        if (
            not self._closed
            and b'"paused":false' in body.replace(b" ", b"")
            and self.outstanding(consumer)
        ):
            self._connection.background.run(self.request(consumer, 1, wait=0.0))

    def _lapse(self, consumer: str, reason: str, *, gone: bool) -> None:
        """Give up all credit of a consumer.

        When the consumer itself may be gone, declare it again first.
        """
        credit = self._credits.get(consumer)
        if credit is None or credit.outstanding == 0:
            return
        if gone:
            logger.warning("stream %s, consumer %s: pulls ended (%s)", self._log, consumer, reason)
            self._connection.background.run(self._restore(consumer, credit))
        else:
            credit.give_up()
            self._on_lapse(consumer)

    async def _restore(self, consumer: str, credit: Credit) -> None:
        try:
            await asyncio.sleep(RESTORE_DELAY)
            await self._declare(consumer)
        finally:
            credit.give_up()
            self._on_lapse(consumer)

    def may_be_forgotten(self, delivery: NATSDelivery) -> bool:
        """Return whether the server may have lost count of the deliveries of this record."""
        if self._doubt_until is None:
            return False
        credit = self._credits.get(delivery.consumer)
        return (
            credit is None
            or delivery.sequence <= credit.newest_before_restart
            or time.monotonic() < self._doubt_until
        )

    def _on_reconnect(self) -> None:
        if self._server_id != self._client.server_id:
            self._server_id = self._client.server_id
            self._doubt_until = time.monotonic() + DOUBT_SECONDS
            for credit in self._credits.values():
                credit.newest_before_restart = credit.newest
        for consumer, credit in self._credits.items():
            credit.give_up()
            self._on_lapse(consumer)

    async def _watch(self) -> None:
        """Find credit that was lost without a message.

        The server forgot the pull, or the consumer was deleted.
        """
        while not self._closed:
            await asyncio.sleep(1.0)
            now = time.monotonic()
            for consumer, credit in list(self._credits.items()):
                if not credit.outstanding or not self._client.is_connected:
                    continue
                if (
                    now > credit.lapses_at
                    or now > credit.heard_at + 2 * self._heartbeat + LAPSE_DELAY
                ):
                    self._lapse(consumer, "no heartbeat", gone=True)
                    credit.heard_at = now
