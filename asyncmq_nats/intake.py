"""What comes into a worker: credit, the jobs in hand that have no slot yet, and giving back those for which none comes."""

import heapq
import logging
import time
from dataclasses import dataclass, field
from typing import Final

import anyio
from anyio.abc import TaskGroup

from asyncmq_nats.assets import TIER_SIGNAL, QueueAssets
from asyncmq_nats.backends.base import Backend, Delivery, Signal
from asyncmq_nats.exceptions import AsyncMQError
from asyncmq_nats.lifecycle import Attempt, Lifecycle
from asyncmq_nats.pull_policy import Pace, TierView, prefetch_target, should_hand_back, tiers_to_ask
from asyncmq_nats.rate_limiter import LEASE, RateLimiter
from asyncmq_nats.subjects import QueueSubjects, tier_name, tier_priority

__all__ = ["Intake"]

logger = logging.getLogger(__name__)

PULL: Final = 30.0
LOOK_AGAIN: Final = 30.0
"""Cadence of the safety net for tiers that were made unheard."""
HELD_CHECK: Final = 0.05
FRESH: Final = 0.05
"""What is known of a tier holds for so many seconds while credit for it brings nothing."""
UNSETTLED_PER_SLOT: Final = 4
UNSETTLED: Final = 256


@dataclass(slots=True)
class Held:
    """Jobs in hand that have no slot yet, the next to run first: by tier, then by age."""

    heap: list[tuple[int, int, int, float, Delivery]] = field(default_factory=list)

    def push(self, priority: int, delivery: Delivery) -> None:
        """Take one in."""
        heapq.heappush(self.heap, (priority, delivery.sequence, delivery.deliveries, time.monotonic(), delivery))

    def pop(self) -> Delivery:
        """Take out the next to run."""
        return heapq.heappop(self.heap)[4]

    def pop_stuck(self, pace: Pace, concurrency: int) -> list[Delivery]:
        """Take out those for which no slot will come soon."""
        now = time.monotonic()
        ordered = sorted(self.heap)
        stuck = {id(entry) for place, entry in enumerate(ordered) if should_hand_back(now - entry[3], pace, concurrency, place)}
        self.heap = [entry for entry in ordered if id(entry) not in stuck]
        return [entry[4] for entry in ordered if id(entry) in stuck]

    def pop_all(self) -> list[Delivery]:
        """Take out all."""
        entries, self.heap = self.heap, []
        return [entry[4] for entry in entries]


@dataclass(slots=True)
class Tier:
    """What is known of a tier: how many jobs waited behind its last delivery, and when that was heard (monotonic seconds)."""

    pending: int = 0
    heard: float = 0.0

    def known_pending(self, now: float, outstanding: int) -> int:
        """Return the number, unless credit has brought nothing for a while: then others have taken what was there."""
        return self.pending if not outstanding or now - self.heard < FRESH else 0


class Intake:
    """Asks the server for as many jobs as this worker can start, and passes them to its slots in order."""

    def __init__(
        self,
        backend: Backend,
        subjects: QueueSubjects,
        assets: QueueAssets,
        lifecycle: Lifecycle,
        *,
        concurrency: int,
        limiter: RateLimiter | None = None,
    ) -> None:
        self._backend = backend
        self._subjects = subjects
        self._assets = assets
        self._lifecycle = lifecycle
        self._concurrency = concurrency
        self._limiter = limiter
        self._paused_until = 0.0
        self._held = Held()
        self._pace = Pace()
        self._tiers: dict[int, Tier] = {}
        self._priorities: dict[str, int] = {}
        self._idle: list[anyio.Event] = []
        self._waking = False
        self._refill = anyio.Event()
        self._asked_at = 0.0
        self._open = False
        self.busy = 0
        """Slots that run a job."""
        self.unsettled = 0
        """Jobs that have started and whose end is not confirmed."""

    async def start(self, group: TaskGroup) -> None:
        """Begin to ask for jobs; the loops run in the group."""
        self._puller = self._backend.puller(self._subjects.ready_log, self._on_delivery, self._on_lapse)
        self._tier_signals = await self._backend.subscribe(self._subjects.control(TIER_SIGNAL), self._on_tier)
        self._open = True
        self._group = group
        await self._assets.find_orphans()
        await self._find_tiers()
        self._paused_until = await self._assets.read_pause() or 0.0
        self._refill.set()
        group.start_soon(self._ask_when_needed)
        group.start_soon(self._hand_back_stuck)
        group.start_soon(self._look_for_tiers)

    async def stop(self) -> None:
        """Ask for nothing more, and give back what has not started."""
        self._open = False
        await self._puller.close()
        await self._tier_signals.unsubscribe()
        await self._hand_back_all()
        if self._limiter is not None and self._limiter.permits:
            await self._limiter.acquire(-self._limiter.permits)

    # -- pause

    def pause(self, until: float) -> None:
        """Start nothing more until then (Unix seconds by the server's clock); what is held and has not started goes back."""
        self._paused_until = until
        self._group.start_soon(self._hand_back_all)
        self._group.start_soon(self._resume_at, until)

    def resume(self) -> None:
        """Start jobs again."""
        self._paused_until = 0.0
        self._wake_slot()
        self._refill.set()

    async def _resume_at(self, until: float) -> None:
        await anyio.sleep(max(0.0, until - self._backend.now()))
        if self._paused_until == until:
            self.resume()

    @property
    def _paused(self) -> bool:
        return self._paused_until > 0 and self._paused_until > self._backend.now()

    # -- for the slots

    async def next(self) -> Delivery:
        """Return the next job to run, as soon as there is one; the slot counts as busy from now on."""
        while not self._may_start:
            event = anyio.Event()
            self._idle.append(event)
            await event.wait()
            self._waking = False
        self.busy += 1
        if self._limiter is not None:
            self._limiter.use()
        delivery = self._held.pop()
        self._wake_slot()
        return delivery

    @property
    def _may_start(self) -> bool:
        permitted = self._limiter is None or self._limiter.permits > 0
        return bool(self._held.heap) and self._open and permitted and not self._paused and not self._better_is_coming

    @property
    def _better_is_coming(self) -> bool:
        """Whether jobs of a higher tier than those in hand are known to wait at the server: they are asked for, and come first."""
        if len(self._tiers) == 1:
            return False
        best, now = self._held.heap[0][0], time.monotonic()
        return any(
            priority < best and tier.known_pending(now, self._puller.outstanding(tier_name(priority)))
            for priority, tier in self._tiers.items()
        )

    def _wake_slot(self) -> None:
        """Wake one slot if there is a job for it; it wakes the next. So a slot whose jobs never wait takes many, and wakes few in vain."""
        if self._idle and self._held.heap and not self._waking:
            self._waking = True
            self._idle.pop().set()

    def release(self) -> None:
        """Note that a slot is free again."""
        self.busy -= 1
        self._refill.set()

    def learn_job(self, seconds: float) -> None:
        """Note how long a job took."""
        self._pace.learn_job(seconds)

    def settled(self) -> None:
        """Note that one more end was confirmed."""
        self.unsettled -= 1
        self._refill.set()

    # -- credit

    async def _find_tiers(self) -> None:
        for priority in await self._assets.list_tiers():
            await self._assets.declare_tier(priority)
            if priority not in self._tiers:
                state = await self._backend.look_up(self._subjects.ready_log, tier_name(priority))
                self._tiers[priority] = Tier(state.pending if state is not None else 0, time.monotonic())

    def _on_tier(self, signal: Signal) -> None:
        if signal.body.removeprefix(b"-").isdigit():
            # Known at once, with a job on its way: nothing of a lower tier must start before it.
            self._tiers.setdefault(int(signal.body), Tier(1, time.monotonic()))
            self._group.start_soon(self._add_tier, int(signal.body))

    async def _add_tier(self, priority: int) -> None:
        try:
            await self._assets.declare_tier(priority)
        except AsyncMQError as error:
            logger.warning("queue %s: no tier for priority %d: %s", self._subjects.queue, priority, error)
            self._tiers.pop(priority, None)
        self._refill.set()

    async def _look_for_tiers(self) -> None:
        while True:
            await anyio.sleep(LOOK_AGAIN)
            try:
                await self._assets.find_orphans()
                await self._find_tiers()
                if not self._paused_until:
                    self._paused_until = await self._assets.read_pause() or 0.0
            except AsyncMQError as error:
                logger.warning("queue %s: tiers not looked up: %s", self._subjects.queue, error)
            self._refill.set()

    async def _ask_when_needed(self) -> None:
        wait: float | None = None
        while True:
            with anyio.move_on_after(wait):
                await self._refill.wait()
            self._refill = anyio.Event()
            self._wake_slot()
            # With several tiers, what is known of one may become stale while nothing happens.
            wait = FRESH if len(self._tiers) > 1 and any(tier.pending for tier in self._tiers.values()) else None
            if not self._open or self._paused:
                continue
            if self._limiter is None:
                await self._ask(self._concurrency + prefetch_target(self._concurrency, self._pace))
            elif not self._limiter.blocks:
                wait = await self._ask_within_limit(self._limiter) or wait

    async def _ask_within_limit(self, limiter: RateLimiter) -> float | None:
        """Ask for as many jobs as there are permits; return how long to wait for more of these."""
        try:
            wait = await limiter.acquire(self._concurrency - self.busy - limiter.permits)
        except AsyncMQError as error:
            logger.warning("queue %s: no permits now: %s", self._subjects.queue, error)
            return 1.0
        self._wake_slot()
        if limiter.permits:
            await self._ask(self.busy + limiter.permits)
        return wait or None

    async def _ask(self, capacity: int) -> None:
        """Ask for jobs, up to `capacity` with those that run and those in hand."""
        room = capacity - self.busy
        if room <= 0 or self.unsettled > UNSETTLED_PER_SLOT * self._concurrency + UNSETTLED:
            return
        now = time.monotonic()
        tiers = [self._view(priority, now) for priority in sorted(self._tiers)]
        for priority, count in tiers_to_ask(tiers, room, capacity):
            tier = self._tiers[priority]
            if not self._puller.outstanding(tier_name(priority)):
                tier.heard = now
            if tier.pending and not self._asked_at:
                self._asked_at = now
            await self._puller.request(tier_name(priority), count, wait=PULL if self._limiter is None else LEASE / 2)

    def _view(self, priority: int, now: float) -> TierView:
        outstanding = self._puller.outstanding(tier_name(priority))
        held = len(self._held.heap) if len(self._tiers) == 1 else sum(entry[0] <= priority for entry in self._held.heap)
        return TierView(priority, outstanding, self._tiers[priority].known_pending(now, outstanding), held)

    def _on_lapse(self, _: str) -> None:
        self._asked_at = 0.0
        self._refill.set()

    def _on_delivery(self, delivery: Delivery) -> None:
        priority = self._priorities.get(delivery.consumer)
        if priority is None:
            priority = self._priorities[delivery.consumer] = tier_priority(delivery.consumer) or 0
        now = time.monotonic()
        if self._asked_at:
            self._pace.learn_refill(now - self._asked_at)
            self._asked_at = 0.0
        tier = self._tiers.setdefault(priority, Tier())
        tier.pending, tier.heard = delivery.pending, now
        self._held.push(priority, delivery)
        if self._paused:
            self._group.start_soon(self._hand_back_all)
        elif not self._waking:
            self._wake_slot()
        if not delivery.pending:
            self._refill.set()

    # -- giving back

    async def _hand_back_all(self) -> None:
        async with anyio.create_task_group() as group:
            for delivery in self._held.pop_all():
                group.start_soon(self._hand_back, delivery)

    async def _hand_back_stuck(self) -> None:
        while True:
            await anyio.sleep(HELD_CHECK)
            if self._held.heap:
                for delivery in self._held.pop_stuck(self._pace, self._concurrency):
                    await self._hand_back(delivery)

    async def _hand_back(self, delivery: Delivery) -> None:
        try:
            attempt = await self._lifecycle.begin(delivery) if delivery.deliveries == 1 else None
            if isinstance(attempt, Attempt):
                await self._lifecycle.hand_back(attempt)
            else:  # delivered before: its claim, or the lack of one, stays as it is
                delivery.nak()
        except AsyncMQError as error:
            logger.warning("%s: not handed back, it comes back when its lease is over: %s", delivery.subject, error)
            delivery.abandon()
