"""Fetches jobs for a worker's slots: asks the server for jobs of each tier, orders the starts.

The numbers are decided in `prefetch`, from the counts of `tiers` and the buffer.
"""

import asyncio
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final

import anyio
from anyio.abc import TaskGroup

from asyncmq_nats._logging import get_logger
from asyncmq_nats.backends.base import Delivery, Signal
from asyncmq_nats.exceptions import AsyncMQError
from asyncmq_nats.runtime.buffer import Buffer
from asyncmq_nats.runtime.handback import HandBack
from asyncmq_nats.runtime.prefetch import Throughput, starts_late, tiers_to_ask
from asyncmq_nats.runtime.rate_limiter import LEASE_SECONDS, RateLimiter
from asyncmq_nats.runtime.slot_group import Member, SlotGroup
from asyncmq_nats.runtime.tiers import FRESH_SECONDS, Tiers
from asyncmq_nats.store.queue_store import QueueStore
from asyncmq_nats.store.topology import TIER_SIGNAL
from asyncmq_nats.transitions.finish import Lifecycle
from asyncmq_nats.wire.keys import tier_name

__all__ = ["Fetcher"]

logger = get_logger(__name__)

PULL_SECONDS: Final = 30.0
TIER_SEARCH_INTERVAL: Final = 30.0
"""Seconds between two searches for tiers whose signal was lost."""
BUFFER_CHECK_INTERVAL: Final = 0.05
MEASURE_INTERVAL: Final = 0.005
UNSETTLED_PER_SLOT: Final = 4
UNSETTLED_RESERVE: Final = 256
LONGEST_PRIORITY: Final = 255
"""Digits: a tier's name is that of a consumer."""


class Fetcher:
    """Asks the server for as many jobs as this worker can start, and passes them on in order."""

    def __init__(
        self,
        store: QueueStore,
        lifecycle: Lifecycle,
        *,
        concurrency: int,
        limiter: RateLimiter | None = None,
        adopt: Callable[[Delivery], bool] = lambda _: False,
        on_startable: Callable[[], None] = lambda: None,
        pending: Callable[[], int] = lambda: 0,
        group: SlotGroup | None = None,
    ) -> None:
        """Fetch for one worker.

        Args:
            store: of the queue.
            lifecycle: of the worker.
            concurrency: slots of the worker.
            limiter: of starts in the whole queue.
            adopt: asked whether a redelivered job runs here already: then it needs no slot.
            on_startable: called when a job may start.
            pending: returns how many attempts have started whose end is not confirmed.
            group: of the queues of the worker, if there are several.
        """
        self._store = store
        self._backend = backend = store.backend
        self._keys = store.keys
        self._assets = store.assets
        self._concurrency = concurrency
        self._limiter = limiter
        self._adopt = adopt
        self._on_startable = on_startable
        self._pending = pending
        self._group = group
        self._paused_until = 0.0
        self._pause_signals = 0
        self._pause_doubtful = False
        self._buffer = Buffer()
        self._hand_back = HandBack(store, lifecycle, self._buffer)
        self._throughput = Throughput()
        self._new_tiers: set[int] = set()
        self._tier_heard = anyio.Event()
        self._refill = asyncio.Event()
        self._refill_due = False
        self._held = anyio.Event()
        self._held_watched = False
        self._asked_at = 0.0
        self._clock = backend.clock
        self._monotonic = backend.clock.monotonic
        self._freed_at = self._measured_at = self._monotonic()
        self._measured_started = 0
        self._early = 0
        """Jobs in slots whose time is to come."""
        self._open = False
        self._stopped = False
        self.busy = 0
        """Slots that run a job."""
        self.member: Member | None = None
        """The slots of this queue in its group."""
        self._group_started = 0
        self.started = 0
        """How many jobs have started."""

    async def start(self, group: TaskGroup) -> None:
        """Begin to ask for jobs; the loops run in the group."""
        self._puller = self._backend.puller(self._keys.ready_log, self._on_delivery, self._on_lapse)
        self._tiers = Tiers(self._puller.outstanding)
        self._tier_signals = await self._backend.subscribe(
            self._keys.control(TIER_SIGNAL), self._on_tier
        )
        self._open = True
        await self._assets.find_orphans()
        await self._find_tiers()
        await self.refresh_pause()
        self.refill()
        group.start_soon(self._ask_when_needed)
        group.start_soon(self._watch_buffer)
        group.start_soon(self._keep_tiers)

    async def stop(self) -> None:
        """Ask for nothing more, and give back what has not started. Does nothing when repeated."""
        if not self._open:
            return
        self._open = False
        try:
            await self._puller.close()
            await self._tier_signals.unsubscribe()
            await self._hand_back.give_back_all()
            if self._limiter is not None and self._limiter.permits:
                await self._limiter.acquire(-self._limiter.permits)
        except AsyncMQError as error:
            logger.warning(
                "queue %s: fetched jobs are redelivered when their lease is over: %s",
                self._keys.queue,
                error,
            )
        finally:
            self._stopped = True
            self._hand_back.abandon_all()

    # -- pause

    def pause(self, until: float) -> None:
        """Start nothing until then (Unix seconds by the server's clock); give back the buffer."""
        self._pause_signals += 1
        self._paused_until = until
        self._held.set()
        self.refill()

    def resume(self) -> None:
        """Start jobs again."""
        self._pause_signals += 1
        self._paused_until = 0.0
        self._tell_startable()
        self.refill()

    async def refresh_pause(self) -> None:
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

    @property
    def silent_for(self) -> float:
        """For how many seconds the server has not answered a pull; 0 if it has."""
        return self._puller.silent_for if self._open else 0.0

    # -- for the slots

    def take(self) -> Delivery | None:
        """Return the next job to run, if one may start and a slot is free: the slot is taken."""
        if not self._buffer.heap or self.busy >= self._concurrency or not self._may_start:
            return None
        if self._group is not None and self._group.limit(1) < 1:
            return None
        self.occupy()
        if self._limiter is not None:
            self._limiter.use()
            self.refill()
        return self._buffer.pop()

    @property
    def has_free_slot(self) -> bool:
        """Whether a slot is free."""
        return self._free_slots > 0

    @property
    def _free_slots(self) -> int:
        free = self._concurrency - self.busy
        return free if self._group is None else self._group.limit(free)

    def occupy(self) -> None:
        """Take a slot."""
        self.busy += 1
        self.started += 1
        if self._group is not None:
            self._group.occupy()

    @property
    def expects_jobs(self) -> bool:
        """Whether jobs wait at the server that may start here, as far as is known."""
        permitted = self._limiter is None or self._limiter.permits > 0
        if not self._open or not permitted or self.is_paused:
            return False
        return self._tiers.may_have_jobs(self._monotonic())

    def note_free_slot(self) -> None:
        """Decide again how much to ask for: a slot is free that other queues have, too."""
        self._freed_at = self._monotonic()
        self.refill()

    @property
    def is_idle(self) -> bool:
        """Whether nothing runs here and nothing was fetched."""
        return not self.busy and not self._buffer.heap

    @property
    def _may_start(self) -> bool:
        return (
            self._open
            and (self._limiter is None or self._limiter.permits > 0)
            and not (self._paused_until and self.is_paused)
            and not (len(self._tiers.known) > 1 and self._better_may_come)
        )

    @property
    def _better_may_come(self) -> bool:
        """Whether jobs of a higher tier are asked for, and there are some or may be."""
        return self._tiers.better_may_come(self._buffer.heap[0][0], self._monotonic())

    def _tell_startable(self) -> None:
        if self._buffer.heap and self.busy < self._concurrency:
            self._on_startable()

    async def hold(self, seconds: float) -> None:
        """Keep a slot for a job that came early. As many more jobs are fetched meanwhile."""
        self._early += 1
        self.refill()
        try:
            await self._clock.sleep(seconds)
        finally:
            self._early -= 1

    def release(self) -> None:
        """Note that a slot is free again."""
        self.busy -= 1
        if self._group is not None and self.member is not None:
            self._group.release(self.member)
        self.note_free_slot()

    # -- tiers

    async def _find_tiers(self) -> None:
        for priority in await self._assets.list_tiers():
            await self._assets.declare_tier(priority)
            if priority not in self._tiers.known:
                state = await self._store.look_up_tier(priority)
                pending = state.pending if state is not None else 0
                self._tiers.add(priority, pending, self._monotonic())

    def _on_tier(self, signal: Signal) -> None:
        body = signal.body
        if body.removeprefix(b"-").isdigit() and len(body) <= LONGEST_PRIORITY:
            # Known at once, with a job on its way: nothing of a lower tier must start before it.
            self._tiers.add(int(body), 1, self._monotonic())
            self._new_tiers.add(int(body))
            self._tier_heard.set()

    async def _keep_tiers(self) -> None:
        """Declare tiers that a signal names; every 30 s look for those of which none was heard."""
        search_at = self._monotonic() + TIER_SEARCH_INTERVAL
        while True:
            with self._clock.move_on_after(search_at - self._monotonic(), upkeep=True):
                await self._tier_heard.wait()
            self._tier_heard = anyio.Event()
            while self._new_tiers:
                await self._add_tier(self._new_tiers.pop())
            if self._monotonic() >= search_at:
                await self._search_tiers()
                search_at = self._monotonic() + TIER_SEARCH_INTERVAL
            self.refill()

    async def _add_tier(self, priority: int) -> None:
        try:
            await self._assets.declare_tier(priority)
        except AsyncMQError as error:
            logger.warning(
                "queue %s: no tier for priority %d: %s", self._keys.queue, priority, error
            )
            self._tiers.known.pop(priority, None)

    async def _search_tiers(self) -> None:
        try:
            await self._assets.find_orphans()
            await self._find_tiers()
            await self.refresh_pause()
        except AsyncMQError as error:
            logger.warning("queue %s: could not list its tiers: %s", self._keys.queue, error)

    # -- credit

    def refill(self) -> None:
        """Have the loop decide soon whether to ask for more. Called several times a job."""
        if not self._refill_due:
            self._refill_due = True
            self._refill.set()

    async def _ask_when_needed(self) -> None:
        wait: float | None = None
        while True:
            if wait is None:
                await self._refill.wait()
            else:
                with self._clock.move_on_after(wait, upkeep=self.is_paused):
                    await self._refill.wait()
            self._refill.clear()
            self._refill_due = False
            self._tell_startable()
            wait = FRESH_SECONDS if self._tiers.may_become_stale else None
            if self._group is not None and self._group.slots is not None:
                self._on_startable()  # other queues wait for what is known of this one
                wait = FRESH_SECONDS if self.expects_jobs else wait
            if self.is_paused:
                wait = min(self._paused_until - self._backend.now(), TIER_SEARCH_INTERVAL)
            if not self._open:
                continue
            if self._limiter is None:  # also during a pause: the server is the one that resumes
                self._measure(self._monotonic())
                prefetch = self._throughput.decide_prefetch(self._concurrency)
                await self._ask(self.busy + self._free_slots + prefetch + self._early)
            elif not self._limiter.blocks and not self.is_paused:
                wait = await self._ask_within_limit(self._limiter) or wait

    def _measure(self, now: float) -> None:
        """Tell the throughput what has started since the last time."""
        if now - self._measured_at >= MEASURE_INTERVAL:
            started = self.started - self._measured_started
            if self._group is not None and self._group.slots is not None:
                # The slots are shared: each start in them makes room for a job of this queue, too.
                started = self._group.started - self._group_started
                self._group_started = self._group.started
            self._throughput.learn_starts(
                started, now - self._measured_at, full=not self.has_free_slot
            )
            self._measured_started, self._measured_at = self.started, now

    async def _ask_within_limit(self, limiter: RateLimiter) -> float | None:
        """Ask for as many jobs as there are permits; return how long to wait for more permits."""
        try:
            wanted = self._concurrency - self.busy - limiter.permits
            if self._group is not None:  # a permit is kept while other queues have the slots
                wanted = max(0, self._free_slots - limiter.permits)
            wait = await limiter.acquire(wanted)
        except AsyncMQError as error:
            logger.warning(
                "queue %s: could not lease permits of its rate limit: %s",
                self._keys.queue,
                error,
            )
            return 1.0
        self._tell_startable()
        if limiter.permits:
            await self._ask(self.busy + limiter.permits)
        return wait or None

    async def _ask(self, capacity: int) -> None:
        """Ask for jobs, up to `capacity` with those that run and those in the buffer."""
        room = capacity - self.busy
        if (
            room <= 0
            or self._pending() > UNSETTLED_PER_SLOT * self._concurrency + UNSETTLED_RESERVE
        ):
            return
        now = self._monotonic()
        tiers = self._tiers.view(now, self._buffer.counts)
        pulls = tiers_to_ask(tiers, room, capacity)
        lowest = max(
            [priority for priority, _ in pulls]
            + [tier.priority for tier in tiers if tier.outstanding],
            default=0,
        )
        queues_wait = (
            self._group is not None
            and self._group.is_strict
            and self.member is not None
            and not self._group.is_last(self.member)
        )
        for priority, count in pulls:
            tier = self._tiers.known[priority]
            wait = PULL_SECONDS if self._limiter is None else LEASE_SECONDS / 2
            if not self._tiers.credit(priority):
                tier.heard = now
                # Tiers answer in any order, and a job of a lower one must know whether a higher
                # one has jobs: so look first, by a pull that does not wait.
                # So must a job of a queue that comes after this one.
                if (priority < lowest or queues_wait) and tier.empty < self._freed_at:
                    tier.looked, wait = now, 0.0
            if tier.pending and not self._asked_at:
                self._asked_at = now
            await self._puller.request(tier_name(priority), count, wait=wait)

    def _on_lapse(self, consumer: str) -> None:
        self._asked_at = 0.0
        tier = self._tiers.known.get(self._tiers.priority_of(consumer))
        if tier is not None:
            tier.on_lapse(self._monotonic())
        self.refill()

    def _on_delivery(self, delivery: Delivery) -> None:
        if self._stopped:  # closing the puller was cut short
            delivery.abandon()
            return
        priority = self._tiers.priority_of(delivery.consumer)
        now = self._monotonic()
        if self._asked_at:
            self._throughput.learn_refill(now - self._asked_at)
            self._asked_at = 0.0
        tier = self._tiers.known.get(priority)
        if tier is None:
            tier = self._tiers.add(priority, 0, now)
        tier.on_delivery(now, delivery.pending)
        if not delivery.first and self._adopt(delivery):
            self.refill()
            return
        self._buffer.push(priority, delivery, now)
        self._tell_startable()
        if not self._held_watched:
            self._held_watched = True
            self._held.set()
        if self.is_paused:  # it was on its way, or another program has resumed the consumer
            self._pause_doubtful = True
            self._held.set()
        if not delivery.pending:
            self.refill()

    # -- giving back

    async def give_back(self, deliveries: Sequence[Delivery]) -> None:
        """Give these back to the queue: they have not started."""
        await self._hand_back.give_back(deliveries)

    async def _watch_buffer(self) -> None:
        """Give back what is in the buffer during a pause, and what starts late here."""
        while True:
            self._held_watched = bool(self._buffer.heap)
            wait = BUFFER_CHECK_INTERVAL if self._held_watched else None
            with self._clock.move_on_after(wait, upkeep=True):
                await self._held.wait()
            self._held = anyio.Event()
            try:
                if self.is_paused:
                    await self._give_back_paused()
                elif self._buffer.heap:
                    await self._share()
            except AsyncMQError as error:
                logger.warning(
                    "queue %s: could not check whether other workers wait: %s",
                    self._keys.queue,
                    error,
                )

    async def _give_back_paused(self) -> None:
        await self._hand_back.give_back_all()
        if self._pause_doubtful:
            self._pause_doubtful = False
            await self.refresh_pause()

    async def _share(self) -> None:
        self._measure(self._monotonic())
        free = self._free_slots
        rate = self._throughput.expected_rate(self._concurrency)
        is_late = partial(_is_late, free, rate)
        if await self._hand_back.share(is_late, self._tiers, self._puller):
            self.refill()


def _is_late(free: int, rate: float, place: int, held_seconds: float, deliveries: int) -> bool:
    return starts_late(place - free, held_seconds, deliveries, rate)
