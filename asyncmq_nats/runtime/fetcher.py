"""What comes into a worker: credit, the jobs in hand that have no slot yet, and giving back those for which none comes."""

import time
from collections.abc import Callable, Sequence
from typing import Final

import anyio
from anyio.abc import TaskGroup

from asyncmq_nats._concurrency import open_task_group
from asyncmq_nats._logging import get_logger
from asyncmq_nats.backends.base import Backend, Delivery, Signal
from asyncmq_nats.exceptions import AsyncMQError, InvalidJob
from asyncmq_nats.runtime.buffer import FRESH, Held, Tier
from asyncmq_nats.runtime.prefetch import (
    Pace,
    TierView,
    prefetch_target,
    slots_are_rare,
    tiers_to_ask,
)
from asyncmq_nats.runtime.rate_limiter import LEASE, RateLimiter
from asyncmq_nats.store.topology import TIER_SIGNAL, QueueAssets
from asyncmq_nats.transitions.claim import Attempt, Verdict, leave
from asyncmq_nats.transitions.finish import Lifecycle
from asyncmq_nats.wire.keys import QueueSubjects, tier_name, tier_priority

__all__ = ["Intake"]

logger = get_logger(__name__)

PULL: Final = 30.0
LOOK_AGAIN: Final = 30.0
"""Cadence of the safety net for tiers that were made unheard."""
HELD_CHECK: Final = 0.05
UNSETTLED_PER_SLOT: Final = 4
UNSETTLED: Final = 256


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
        adopt: Callable[[Delivery], bool] = lambda _: False,
    ) -> None:
        """`adopt` is asked whether a job that comes again is one that runs here: then it needs no slot."""
        self._backend = backend
        self._subjects = subjects
        self._assets = assets
        self._lifecycle = lifecycle
        self._concurrency = concurrency
        self._limiter = limiter
        self._adopt = adopt
        self._paused_until = 0.0
        self._held = Held()
        self._pace = Pace()
        self._tiers: dict[int, Tier] = {}
        self._priorities: dict[str, int] = {}
        self._idle: list[anyio.Event] = []
        self._waking = False
        self._refill = anyio.Event()
        self._looks = False
        self._asked_at = 0.0
        self._freed_at = self._filled_at = time.monotonic()
        self._pause_signals = 0
        self._started = 0
        self._open = False
        self.busy = 0
        """Slots that run a job."""
        self.unsettled = 0
        """Jobs that have started and whose end is not confirmed."""

    async def start(self, group: TaskGroup) -> None:
        """Begin to ask for jobs; the loops run in the group."""
        self._puller = self._backend.puller(
            self._subjects.ready_log, self._on_delivery, self._on_lapse
        )
        self._tier_signals = await self._backend.subscribe(
            self._subjects.control(TIER_SIGNAL), self._on_tier
        )
        self._open = True
        self._group = group
        await self._assets.find_orphans()
        await self._find_tiers()
        await self.look_at_pause()
        self._look()
        group.start_soon(self._ask_when_needed)
        group.start_soon(self._watch_held)
        group.start_soon(self._look_for_tiers)

    async def stop(self) -> None:
        """Ask for nothing more, and give back what has not started. Does nothing the second time."""
        if not self._open:
            return
        self._open = False
        await self._puller.close()
        try:
            await self._tier_signals.unsubscribe()
            await self._hand_back_all()
            if self._limiter is not None and self._limiter.permits:
                await self._limiter.acquire(-self._limiter.permits)
        except AsyncMQError as error:
            logger.warning(
                "queue %s: what was in hand comes back when its lease is over: %s",
                self._subjects.queue,
                error,
            )

    # -- pause

    def pause(self, until: float) -> None:
        """Start nothing more until then (Unix seconds by the server's clock); what is held and has not started goes back."""
        self._pause_signals += 1
        self._paused_until = until
        self._group.start_soon(self._hand_back_all)
        self._look()

    def resume(self) -> None:
        """Start jobs again."""
        self._pause_signals += 1
        self._paused_until = 0.0
        self._wake_slot()
        self._look()

    async def look_at_pause(self) -> None:
        """Learn whether the queue is paused from what is stored: signals may be missed."""
        signals = self._pause_signals
        until = await self._assets.read_pause() or 0.0
        if signals != self._pause_signals or until == self._paused_until:
            return
        if until:
            self.pause(until)
        else:
            self.resume()

    @property
    def is_paused(self) -> bool:
        """Whether nothing may start now."""
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
        self._started += 1
        if self.busy == self._concurrency:
            self._filled_at = time.monotonic()
        if self._limiter is not None:
            self._limiter.use()
            self._look()
        delivery = self._held.pop()
        self._wake_slot()
        return delivery

    @property
    def _may_start(self) -> bool:
        permitted = self._limiter is None or self._limiter.permits > 0
        return (
            bool(self._held.heap)
            and self._open
            and permitted
            and not self.is_paused
            and not self._better_is_coming
        )

    @property
    def _better_is_coming(self) -> bool:
        """Whether jobs of a higher tier than those in hand wait at the server, or may do so: they are asked for, and come first."""
        if len(self._tiers) == 1:
            return False
        best, now = self._held.heap[0][0], time.monotonic()
        return any(
            priority < best
            and tier.may_have_jobs(now, self._puller.outstanding(tier_name(priority)))
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
        self._freed_at = time.monotonic()
        self._look()

    def learn_job(self, seconds: float) -> None:
        """Note how long a job took."""
        self._pace.learn_job(seconds)

    def settled(self) -> None:
        """Note that one more end was confirmed."""
        self.unsettled -= 1
        self._look()

    # -- credit

    def _look(self) -> None:
        """Have it looked at soon whether more jobs should be asked for. Called several times a job: an event is set once a turn only."""
        if not self._looks:
            self._looks = True
            self._refill.set()

    async def _find_tiers(self) -> None:
        for priority in await self._assets.list_tiers():
            await self._assets.declare_tier(priority)
            if priority not in self._tiers:
                state = await self._backend.look_up(self._subjects.ready_log, tier_name(priority))
                self._tiers[priority] = Tier(
                    state.pending if state is not None else 0, time.monotonic()
                )

    def _on_tier(self, signal: Signal) -> None:
        if signal.body.removeprefix(b"-").isdigit():
            # Known at once, with a job on its way: nothing of a lower tier must start before it.
            self._tiers.setdefault(int(signal.body), Tier(1, time.monotonic()))
            self._group.start_soon(self._add_tier, int(signal.body))

    async def _add_tier(self, priority: int) -> None:
        try:
            await self._assets.declare_tier(priority)
        except AsyncMQError as error:
            logger.warning(
                "queue %s: no tier for priority %d: %s", self._subjects.queue, priority, error
            )
            self._tiers.pop(priority, None)
        self._look()

    async def _look_for_tiers(self) -> None:
        while True:
            await anyio.sleep(LOOK_AGAIN)
            try:
                await self._assets.find_orphans()
                await self._find_tiers()
                await self.look_at_pause()
            except AsyncMQError as error:
                logger.warning("queue %s: tiers not looked up: %s", self._subjects.queue, error)
            self._look()

    async def _ask_when_needed(self) -> None:
        wait: float | None = None
        while True:
            with anyio.move_on_after(wait):
                await self._refill.wait()
            self._refill, self._looks = anyio.Event(), False
            self._wake_slot()
            # With several tiers, what is known of one may become stale while nothing happens.
            wait = (
                FRESH
                if len(self._tiers) > 1
                and any(tier.pending or tier.looked for tier in self._tiers.values())
                else None
            )
            if self.is_paused:
                wait = min(self._paused_until - self._backend.now(), LOOK_AGAIN)
            if not self._open:
                continue
            if self._limiter is None:  # also during a pause: the server is the one that resumes
                await self._ask(
                    self._concurrency + prefetch_target(self._concurrency, self._pace, self._quiet)
                )
            elif not self._limiter.blocks and not self.is_paused:
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
        tiers = self._view_tiers(now)
        pulls = tiers_to_ask(tiers, room, capacity)
        lowest = max(
            [priority for priority, _ in pulls]
            + [tier.priority for tier in tiers if tier.outstanding],
            default=0,
        )
        for priority, count in pulls:
            tier, wait = self._tiers[priority], PULL if self._limiter is None else LEASE / 2
            if not self._puller.outstanding(tier_name(priority)):
                tier.heard = now
                # Tiers answer in any order. What comes from a lower one has to know whether a higher one has jobs, so first only look.
                if priority < lowest and tier.empty < self._freed_at:
                    tier.looked, wait = now, 0.0
            if tier.pending and not self._asked_at:
                self._asked_at = now
            await self._puller.request(tier_name(priority), count, wait=wait)

    def _view_tiers(self, now: float) -> list[TierView]:
        views: list[TierView] = []
        held = 0
        for priority in sorted(self._tiers):
            outstanding = self._puller.outstanding(tier_name(priority))
            held += self._held.counts[priority]
            views.append(
                TierView(
                    priority,
                    outstanding,
                    self._tiers[priority].known_pending(now, outstanding),
                    held,
                )
            )
        return views

    @property
    def _quiet(self) -> float:
        """For how long all slots have been taken and none became free."""
        return (
            time.monotonic() - max(self._freed_at, self._filled_at)
            if self.busy >= self._concurrency
            else 0.0
        )

    def _on_lapse(self, consumer: str) -> None:
        self._asked_at = 0.0
        tier = self._tiers.get(self._priority_of(consumer))
        if tier is not None:
            tier.hear_lapse(time.monotonic())
        self._look()

    def _priority_of(self, consumer: str) -> int:
        priority = self._priorities.get(consumer)
        if priority is None:
            priority = self._priorities[consumer] = tier_priority(consumer) or 0
        return priority

    def _on_delivery(self, delivery: Delivery) -> None:
        priority = self._priority_of(delivery.consumer)
        now = time.monotonic()
        if self._asked_at:
            self._pace.learn_refill(now - self._asked_at)
            self._asked_at = 0.0
        tier = self._tiers.setdefault(priority, Tier())
        tier.hear(now, delivery.pending)
        if delivery.deliveries > 1 and self._adopt(delivery):
            self._look()
            return
        self._held.push(priority, delivery)
        if self.is_paused:
            self._group.start_soon(self._hand_back_paused)
        elif (
            len(self._tiers) > 1
            and self.busy >= self._concurrency
            and slots_are_rare(self._concurrency, self._pace, self._quiet)
        ):
            self._group.start_soon(self._hand_back_stuck)
        elif not self._waking:
            self._wake_slot()
        if not delivery.pending:
            self._look()

    # -- giving back

    async def _hand_back_paused(self) -> None:
        """Give back what comes during a pause: it was on its way, or the consumer was resumed by another program."""
        await self._hand_back_all()
        try:
            await self.look_at_pause()
        except AsyncMQError as error:
            logger.warning(
                "queue %s: not known whether it is paused: %s", self._subjects.queue, error
            )

    async def _hand_back_all(self) -> None:
        await self._give_back(self._held.pop_all())

    async def _give_back(self, deliveries: Sequence[Delivery]) -> None:
        async with open_task_group() as group:
            for delivery in deliveries:
                group.start_soon(self._hand_back, delivery)

    async def _watch_held(self) -> None:
        started, then = self._started, time.monotonic()
        while True:
            await anyio.sleep(HELD_CHECK)
            now = time.monotonic()
            self._pace.learn_starts(self._started - started, now - then, len(self._held.heap))
            started, then = self._started, now
            if self._held.heap:
                await self._hand_back_stuck()

    async def _hand_back_stuck(self) -> None:
        stuck = self._held.pop_stuck(self._pace, self._concurrency, self._quiet)
        if stuck and any(self._puller.outstanding(tier_name(priority)) for priority in self._tiers):
            await self._puller.withdraw()  # or what is given back comes right back
            stuck += self._held.pop_stuck(self._pace, self._concurrency, self._quiet)
        await self._give_back(stuck)
        if stuck:
            self._look()

    async def _hand_back(self, delivery: Delivery) -> None:
        try:
            attempt: Attempt | Verdict = self._lifecycle.open(delivery)
            if isinstance(attempt, Attempt) and delivery.deliveries > 1:
                # The lease may have lapsed while this process was stopped. The server takes a late NAK for one of whoever has the job now.
                attempt = await self._lifecycle.verify(attempt)
            if isinstance(attempt, Attempt):
                await self._lifecycle.hand_back(attempt)
            else:
                leave(delivery, attempt)
        except InvalidJob:  # so says whoever has a slot for it
            delivery.nak()
        except AsyncMQError as error:
            logger.warning(
                "%s: not handed back, it comes back when its lease is over: %s",
                delivery.subject,
                error,
            )
            delivery.abandon()
