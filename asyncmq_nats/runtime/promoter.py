"""Released jobs become ready: each worker runs one promoter, none of them leads, and any number gives the same result.

A released record is delivered by the server's timer, or at once. The promoter waits the last fraction of a second, writes the job to its
tier expecting nothing there, and removes the record. What is repeated changes nothing: the message id is that of the record.
"""

import heapq
import itertools
import math
import time
from contextlib import suppress
from typing import Final

import anyio
import anyio.lowlevel
from anyio.abc import TaskStatus

from asyncmq_nats._concurrency import open_task_group
from asyncmq_nats._logging import get_logger
from asyncmq_nats.backends.base import Backend, Delivery, Expect, Record, Write
from asyncmq_nats.exceptions import AsyncMQError, InvalidJob, WriteRefused
from asyncmq_nats.jobs import Job
from asyncmq_nats.states import Place
from asyncmq_nats.store.commit import FAREWELL
from asyncmq_nats.store.topology import DEFAULT_PRIORITY, QueueAssets
from asyncmq_nats.transitions.release import Dependencies
from asyncmq_nats.transitions.repeat import Repeatables
from asyncmq_nats.wire.codec import dump_json, load_json
from asyncmq_nats.wire.keys import PROMOTER, QueueSubjects, decode_token, fit_token, is_token

__all__ = ["Promoter"]

logger = get_logger(__name__)

CREDIT: Final = 512
PULL: Final = 30.0
HANDS: Final = 64
"""Promotions under way at a time."""
HELD_TOO_LONG: Final = 2.0
REMEMBERED: Final = 60.0
"""A record that was released so long ago may have been promoted more than two minutes ago: its message id may be forgotten."""
LONGEST_WAIT: Final = 0.7
"""No fresh delivery waits longer than this: timers are set up to 0.4 s early, and a tick without a timer is due within 0.6 s."""


class Promoter:
    """Moves what was released to where it can be run."""

    def __init__(self, backend: Backend, subjects: QueueSubjects, assets: QueueAssets) -> None:
        self._backend = backend
        self._subjects = subjects
        self._assets = assets
        self._repeatables = Repeatables(backend, subjects, assets)
        self._dependencies = Dependencies(backend, subjects)
        self._due: list[tuple[float, int, float, Delivery]] = []
        self._order = itertools.count()
        self._wake = anyio.Event()
        self._lapsed = anyio.Event()
        self._hands: list[anyio.CancelScope] = []
        self._idle_hands: list[anyio.Event] = []
        self._stopping = False

    async def run(self, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        """Promote until cancelled. Started when the first pull is out."""
        puller = self._backend.puller(self._subjects.bucket_log, self._on_delivery, self._on_lapse)
        try:
            async with open_task_group() as group:
                try:
                    for _ in range(HANDS):
                        group.start_soon(self._promote_due)
                    group.start_soon(self._watch_time)
                    await puller.request(PROMOTER, CREDIT, wait=PULL)
                    task_status.started()
                    while True:
                        self._lapsed = anyio.Event()
                        missing = CREDIT - puller.outstanding(PROMOTER) - len(self._due)
                        if missing > CREDIT // 2 or (
                            missing > 0 and puller.outstanding(PROMOTER) == 0
                        ):
                            await puller.request(PROMOTER, missing, wait=PULL)
                        await self._lapsed.wait()
                finally:
                    self._stopping = True
                    for hand in self._hands:
                        hand.deadline = anyio.current_time() + FAREWELL
                    for idle in self._idle_hands:
                        idle.set()
        finally:
            with anyio.CancelScope(shield=True):
                await puller.close()
                for _, _, _, delivery in self._due:
                    delivery.nak()

    # -- what arrives

    def _on_lapse(self, _: str) -> None:
        self._lapsed.set()

    def _on_delivery(self, delivery: Delivery) -> None:
        arrived = time.monotonic()
        heapq.heappush(
            self._due, (arrived + self._wait(delivery), next(self._order), arrived, delivery)
        )
        self._lapsed.set()
        self._wake.set()

    def _wait(self, delivery: Delivery) -> float:
        """Return how long the job must still wait.

        Only the server's clock matters: the record's time stamp is that of the moment in which it was released. A record that was delivered
        to another promoter before, or that nobody fetched for a while, has spent some of its time since.
        """
        try:
            data = load_json(delivery.body) if delivery.body else {}
        except InvalidJob:
            return 0.0
        run_at = data.get("at" if self._subjects.is_fire(delivery.subject) else "delay_until")
        if not isinstance(run_at, int | float) or math.isnan(run_at):
            return 0.0
        now = self._backend.now()
        fresh = delivery.deliveries == 1 and now - delivery.time <= LONGEST_WAIT
        return min(max(run_at - (delivery.time if fresh else now), 0.0), LONGEST_WAIT)

    async def _watch_time(self) -> None:
        """Wake one hand for each record whose time has come."""
        while True:
            self._wake = anyio.Event()
            now = time.monotonic()
            ready = sum(entry[0] <= now for entry in heapq.nsmallest(HANDS, self._due))
            for _ in range(min(ready, len(self._idle_hands))):
                self._idle_hands.pop().set()
            timeout = self._due[0][0] - now if self._due and not ready else None
            if ready:
                await anyio.lowlevel.checkpoint()
            with anyio.move_on_after(timeout):
                await self._wake.wait()

    async def _promote_due(self) -> None:
        """One hand: one promotion after the other, until stopped.

        Shielded for a while: stopping a worker does not tear a promotion, unless the server is gone. Then another promoter repeats it.
        """
        with anyio.CancelScope(shield=True) as hand:
            self._hands.append(hand)
            while not self._stopping:
                if not self._due or self._due[0][0] > time.monotonic():
                    idle = anyio.Event()
                    self._idle_hands.append(idle)
                    await idle.wait()
                    continue
                due, _, arrived, delivery = heapq.heappop(self._due)
                self._wake.set()  # the watch is now for the one after it
                kept = due > arrived or time.monotonic() - arrived > HELD_TOO_LONG
                try:
                    await self._promote_guarded(delivery, kept=kept)
                except anyio.get_cancelled_exc_class():
                    delivery.abandon()  # otherwise its lease would be extended
                    raise
                self._lapsed.set()

    async def _promote_guarded(self, delivery: Delivery, *, kept: bool) -> None:
        try:
            try:
                if self._subjects.is_fire(delivery.subject):
                    await self._fire(delivery)
                else:
                    await self._promote(delivery, kept=kept)
            except InvalidJob as problem:
                logger.error("%.200r: %s", delivery.subject, problem)
                await self._pass_on(delivery)
        except AsyncMQError as error:
            logger.warning("%.200r: not promoted now, tried again: %s", delivery.subject, error)
            delivery.nak(1.0)

    async def _fire(self, delivery: Delivery) -> None:
        if not delivery.body or await self._repeatables.fire(delivery):
            delivery.ack()
        else:
            delivery.nak(0.05)

    # -- one record

    async def _promote(self, delivery: Delivery, *, kept: bool) -> None:
        """Make a job ready. `kept`: the record was in hand for a while, in which anything may have become of it."""
        if not delivery.body:  # a delete marker
            delivery.ack()
            return
        token = self._subjects.token(delivery.subject)
        if not is_token(token):
            raise InvalidJob("its key has no token that can be an id")
        job = Job.decode(delivery.body, job_id=decode_token(token), created_at=delivery.time)
        old = self._backend.now() - delivery.time > REMEMBERED
        doubtful = kept or old or delivery.deliveries > 1 or job.order > (0, 0) or job.custom_id
        if doubtful and not await self._is_current(delivery, token):
            return
        await self._assets.declare_tier(job.priority)
        subject, body = self._subjects.ready(job.priority, token), _ready_body(delivery.body, job)
        write = Write(
            subject, body, Expect(self._subjects.ready_any(token)), message_id=_message_id(delivery)
        )
        sequence = 0
        try:
            sequence = await self._backend.write(self._subjects.ready_log, write)
        except WriteRefused:
            if await self._older_attempt_is_there(token, job):
                delivery.nak(
                    min(0.01 * 2 ** min(delivery.deliveries, 10), 1.0)
                )  # its ack is on the way
                return
        if not await self._remove(delivery) and sequence:
            await self._take_back(token, sequence)

    async def _take_back(self, token: str, sequence: int) -> None:
        """Remove what was made ready, if the job was cancelled before it was: somebody had removed the record by then."""
        records = await self._backend.last(self._subjects.bucket_log, self._subjects.ends(token))
        if any(
            not record.marker and self._subjects.outcome_state(record.subject) for record in records
        ):
            await self._backend.delete(self._subjects.ready_log, sequence)

    async def _pass_on(self, delivery: Delivery) -> None:
        """Make ready what is not a job, for a worker to record as failed, so that it is not lost. A tick that is malformed goes."""
        if not self._subjects.is_fire(delivery.subject):
            token = fit_token(self._subjects.token(delivery.subject))
            subject = self._subjects.ready(DEFAULT_PRIORITY, token)
            write = Write(
                subject,
                delivery.body,
                Expect(self._subjects.ready_any(token)),
                message_id=_message_id(delivery),
            )
            with suppress(WriteRefused):  # it was passed on before
                await self._backend.write(self._subjects.ready_log, write)
        await self._remove(delivery)

    async def _is_current(self, delivery: Delivery, token: str) -> bool:
        """Return whether the record is still there, and the job has not ended or gone on; if not, let go of the record."""
        subjects = self._subjects
        records = await self._backend.last(
            subjects.bucket_log, subjects.later_all(token), subjects.done_all(token)
        )
        live = [record for record in records if not record.marker]
        ended = any(subjects.outcome_state(record.subject) for record in live)
        superseded = any(
            record.subject == delivery.subject and record.sequence > delivery.sequence
            for record in records
        )
        if ended or superseded or any(self._is_later_attempt(record, delivery) for record in live):
            if ended:  # whoever ended it may not have come to this
                await self._dependencies.release(token)
            await self._remove(delivery)
            return False
        if not any(record.sequence == delivery.sequence for record in live):
            # Promoted, removed or cancelled: it cannot be delivered again. Or a replica was asked that has yet to hear of it: then it is.
            delivery.nak(0.05)
            return False
        return True

    def _is_later_attempt(self, record: Record, delivery: Delivery) -> bool:
        delayed = self._subjects.is_later(record.subject, Place.DELAYED)
        return delayed and Job.decode(record.body).order > Job.decode(delivery.body).order

    async def _older_attempt_is_there(self, token: str, job: Job) -> bool:
        records = await self._backend.last(
            self._subjects.ready_log, self._subjects.ready_any(token)
        )
        if not records:
            return True
        there = Job.decode(records[-1].body)
        return (
            there.order < job.order or there.delay_until is not None
        )  # a foreign job that was put off: we leave no time in ready jobs

    async def _remove(self, delivery: Delivery) -> bool:
        """Remove the record. Return whether it was there."""
        was_there = await self._backend.delete(self._subjects.bucket_log, delivery.sequence)
        delivery.ack()
        return was_there


def _message_id(delivery: Delivery) -> str:
    """Return an id for the promotion of this record: another promoter may have made it ready, and the job may have ended since."""
    return f"released.{delivery.sequence}.{delivery.time}"


def _ready_body(body: bytes, job: Job) -> bytes:
    """Return the body for the ready message: without the time that has come, which would only be looked at again."""
    if job.delay_until is None:
        return body
    data = load_json(body)
    data.pop("delay_until", None)
    return dump_json(data)
