"""Gives fetched jobs back to the queue: those that other workers wait for, or all of them.

A worker that is alone gives nothing back: a job that comes again costs more than one that waits.
"""

from collections.abc import Iterable, Sequence
from typing import Final

import anyio

from asyncmq_nats._concurrency import open_task_group
from asyncmq_nats._logging import get_logger
from asyncmq_nats.backends.base import Delivery, Puller
from asyncmq_nats.exceptions import AsyncMQError, InvalidJob
from asyncmq_nats.runtime.buffer import Buffer, Late
from asyncmq_nats.runtime.tiers import Tiers
from asyncmq_nats.store.queue_store import QueueStore
from asyncmq_nats.transitions.claim import settle_delivery
from asyncmq_nats.transitions.finish import Lifecycle

__all__ = ["HandBack"]

logger = get_logger(__name__)

LOOK_SECONDS: Final = 0.1
"""Time between two looks whether others wait; doubled while none does."""
MAX_LOOK_SECONDS: Final = 0.8
MAX_TIERS_PER_LOOK: Final = 8
GROWTH_FACTOR: Final = 2
"""Others may take many or one: give twice as many as before while they still wait."""


class HandBack:
    """Gives back what is in the buffer."""

    def __init__(self, store: QueueStore, lifecycle: Lifecycle, buffer: Buffer) -> None:
        self._store = store
        self._lifecycle = lifecycle
        self._buffer = buffer
        self._monotonic = store.backend.clock.monotonic
        self._look_at = 0.0
        self._pause = LOOK_SECONDS
        self._given: dict[int, int] = {}
        self._turn = 0

    async def share(self, is_late: Late, tiers: Tiers, puller: Puller) -> bool:
        """Give jobs that start late here to workers that wait. Return whether credit changed."""
        now = self._monotonic()
        late = self._buffer.count_late(is_late, now)
        if not late or now < self._look_at:
            if not late:
                self._calm_down()
            return False
        self._look_at = now + LOOK_SECONDS
        asked = self._choose(sorted(late))
        waiting = await self._count_waiting(asked, tiers)
        withdrawn = any(tiers.credit(priority) for priority in waiting)
        if withdrawn:
            # Our own pulls are among those that wait, and would bring back what is given back.
            await puller.withdraw()
            waiting = await self._count_waiting(asked, tiers)
        if not waiting:
            self._given.clear()
            self._look_at = now + self._pause
            self._pause = min(GROWTH_FACTOR * self._pause, MAX_LOOK_SECONDS)
            return withdrawn
        self._pause = LOOK_SECONDS
        limits = {
            priority: max(count, GROWTH_FACTOR * self._given.get(priority, 0))
            for priority, count in waiting.items()
        }
        self._given = limits
        await self.give_back(self._buffer.pop_late(is_late, self._monotonic(), limits))
        return True

    def _choose(self, priorities: list[int]) -> list[int]:
        """Return the next few of many tiers, so that a check costs the same for any number."""
        first = self._turn % len(priorities)
        self._turn = first + MAX_TIERS_PER_LOOK if len(priorities) > MAX_TIERS_PER_LOOK else 0
        return (priorities[first:] + priorities[:first])[:MAX_TIERS_PER_LOOK]

    def _calm_down(self) -> None:
        self._pause = LOOK_SECONDS
        self._given.clear()

    async def _count_waiting(self, priorities: Iterable[int], tiers: Tiers) -> dict[int, int]:
        """Return how many pulls of other workers wait, for each tier for which any does.

        Of ours, count one if there is credit: the server does not say which of them are served.
        """
        waiting: dict[int, int] = {}
        for priority in priorities:
            state = await self._store.look_up_tier(priority)
            if state is None or state.pending or state.paused:  # what waits there comes first
                continue
            others = state.waiting_pulls - (1 if tiers.credit(priority) else 0)
            if others > 0:
                waiting[priority] = others
        return waiting

    async def give_back_all(self) -> None:
        """Give back everything in the buffer."""
        await self.give_back(self._buffer.pop_all())

    def abandon_all(self) -> None:
        """Let the leases of everything in the buffer run out."""
        _abandon(self._buffer.pop_all())

    async def give_back(self, deliveries: Sequence[Delivery]) -> None:
        """Give these back."""
        try:
            async with open_task_group() as group:
                for delivery in deliveries:
                    group.start_soon(self._give_back_one, delivery)
        except anyio.get_cancelled_exc_class():
            _abandon(deliveries)  # those not settled; their leases would be extended for ever
            raise

    async def _give_back_one(self, delivery: Delivery) -> None:
        try:
            attempt = self._lifecycle.open(delivery)
            disposition = None
            if delivery.deliveries > 1:
                # The lease may have run out while this process stood still. The server takes a late
                # NAK for one of the worker that has the job now.
                disposition = await self._lifecycle.inspect(attempt)
            if disposition is None:
                await self._lifecycle.hand_back(attempt)
            else:
                settle_delivery(delivery, disposition)
        except InvalidJob:  # the worker that runs it records the failure
            delivery.nak()
        except AsyncMQError as error:
            logger.warning(
                "%s: not handed back; it is redelivered when its lease is over: %s",
                delivery.subject,
                error,
            )
            delivery.abandon()


def _abandon(deliveries: Iterable[Delivery]) -> None:
    for delivery in deliveries:
        delivery.abandon()
