"""The two logs of a queue and their consumers: which there are, and that they exist."""

from dataclasses import replace
from typing import Final

from asyncmq_nats._concurrency import Turns, deadline, open_task_group
from asyncmq_nats._logging import get_logger
from asyncmq_nats.backends.base import Backend, Consumer, Difference, Log, Write
from asyncmq_nats.exceptions import AssetMissing, AssetOffline, TooManyPriorities, Unconfirmed
from asyncmq_nats.states import OUTCOMES, Place
from asyncmq_nats.wire.keys import (
    INDEXED,
    PROMOTER,
    QueueSubjects,
    counter_name,
    tier_name,
    tier_priority,
)

__all__ = [
    "COUNTER_PATIENCE",
    "DEFAULT_PRIORITY",
    "LATEST_PAUSE",
    "MAX_TIERS",
    "TIER_SIGNAL",
    "QueueAssets",
]

logger = get_logger(__name__)

DEFAULT_PRIORITY: Final = 5
MAX_TIERS: Final = 256
PROMOTER_LEASE: Final = 2.0
"""Seconds after which another promoter takes over what a dead one had in hand."""
COUNTER_PATIENCE: Final = 2.0
"""Seconds for the answer of counters. They have one replica: its server may be lost."""
SHORTEST_LIVE_LEASE: Final = 2.0
"""A queue in use is given no shorter lease: running workers extend theirs every 0.7 s."""
TIER_SEARCH_LIMIT: Final = 50_000
"""Ready jobs whose priority is looked at each time."""
TIER_SEARCH_PAGE: Final = 1_000
LATEST_PAUSE: Final = 32_503_680_000.0
"""The year 3000: a pause without an end."""
TIER_SIGNAL: Final = "tier"
"""Control signal: a tier was made, or is wanted; the body is its priority."""


class QueueAssets:
    """Declares the assets of one queue on one backend, each once per process."""

    def __init__(self, backend: Backend, keys: QueueSubjects) -> None:
        self._backend = backend
        self._keys = keys
        self.settings = backend.settings
        """The settings of the process, overridden by those of the queue: see `configuration`."""
        self._tiers: set[int] = set()
        self._logs_declared = False
        self._counters_declared = False
        self._looked_at = 0
        """Sequence of the last ready job whose priority was looked at."""
        self._seen_priorities: set[int] = set()
        self._told_of_too_many = False
        self._incarnation = ""
        self._lock = Turns()

    async def declare(self) -> None:
        """Make sure that the logs and the default tier exist: what a producer needs."""
        if self._logs_declared:
            return
        async with self._lock:
            if self._logs_declared:
                return
            await self._backend.declare_log(self.ready_log)
            await self._backend.declare_log(self.bucket_log)
            await self._backend.declare_consumer(self._keys.ready_log, self._tier(DEFAULT_PRIORITY))
            self._tiers.add(DEFAULT_PRIORITY)
            self._logs_declared = True

    async def declare_all(self) -> None:
        """Make sure that the counters and the promoter exist as well.

        Workers and readers need them.
        """
        await self.declare()
        if not self._counters_declared:
            await self.declare_counters()
            self._counters_declared = True

    async def declare_counters(self) -> None:
        """Make sure that the bucket, which is there, has its counters and the promoter's consumer.

        Reads make no log. Nothing waits for counters on a lost server: their records are searched.
        """
        log, silent = self._keys.bucket_log, []
        await self._backend.declare_consumer(log, self._promoter)

        async def declare(counter: Consumer) -> None:
            try:
                with deadline(COUNTER_PATIENCE):
                    await self._backend.declare_consumer(log, counter)
            except (AssetOffline, Unconfirmed):
                silent.append(counter.name)

        async with open_task_group() as group:
            for word, filter in self.counters.items():
                group.start_soon(declare, Consumer(counter_name(word), (filter,)))
        if silent:
            text = "queue %s: counters that do not answer, is each server up? %s"
            logger.warning(text, self._keys.queue, ", ".join(sorted(silent)))

    @property
    def counters(self) -> dict[str, str]:
        """The counters of the bucket: by word, the filter of the records that each counts."""
        keys = self._keys
        return {
            **{f"later_{place}": keys.place(place) for place in Place},
            **{f"done_{state}": keys.outcomes(state) for state in OUTCOMES},
            **{f"index_{state}": keys.indexed(state) for state in INDEXED},
        }

    @property
    def _promoter(self) -> Consumer:
        lease = min(PROMOTER_LEASE, self.settings.stalled_after)
        places = self._keys.place(Place.RELEASED), self._keys.fire("*")
        return Consumer(PROMOTER, places, lease=lease)

    async def declare_tier(self, priority: int) -> None:
        """Make sure that a priority has its consumer, and tell the running workers of a new one.

        It is born paused while the queue is.

        Raises:
            TooManyPriorities: the queue has 256 already.
        """
        if priority in self._tiers:
            return
        if not self._backend.may_declare:
            self._tiers.add(priority)
            await self._backend.publish(
                self._keys.control(TIER_SIGNAL), str(priority).encode()
            )  # a worker declares it
            return
        async with self._lock:
            if priority not in self._tiers:
                existing = await self.list_tiers()
                if priority not in existing:
                    if len(existing) >= MAX_TIERS:
                        raise TooManyPriorities(self._keys.queue, MAX_TIERS)
                    await self._declare_tier(priority)
                    await self._backend.publish(
                        self._keys.control(TIER_SIGNAL), str(priority).encode()
                    )
                self._tiers.add(priority)

    def is_declared(self, priority: int) -> bool:
        """Return whether this process knows that the logs, and the priority's consumer, exist."""
        return self._logs_declared and priority in self._tiers

    def _tier(self, priority: int, paused_until: float | None = None) -> Consumer:
        lease = self.settings.stalled_after
        return Consumer(
            tier_name(priority),
            (self._keys.tier(priority),),
            lease=lease,
            paused_until=paused_until,
        )

    async def _declare_tier(self, priority: int) -> None:
        paused = await self.read_pause()
        await self._backend.declare_consumer(self._keys.ready_log, self._tier(priority, paused))
        # A pause or its end may have missed this tier. One after the last read finds it.
        while (until := await self.read_pause()) != paused:
            if until is None:
                await self._backend.resume(self._keys.ready_log, tier_name(priority))
            else:
                await self._backend.pause(self._keys.ready_log, tier_name(priority), until)
            paused = until

    # -- the pause, of which a tier must know when it is made

    async def read_pause(self) -> float | None:
        """Return until when the queue is paused (Unix seconds), `None` if it is not.

        The server's word counts, which is the default tier's state: another program may have
        resumed the consumers.
        """
        try:
            records = await self._backend.last(self._keys.bucket_log, self._keys.pause)
        except AssetMissing:
            return None
        if not records or records[0].marker:
            return None
        try:
            until = float(records[0].body[:100])
        except ValueError:
            text = "queue %s: its pause record is malformed; ignoring it: %.100r"
            logger.warning(text, self._keys.queue, records[0].body[:100])
            return None
        until = min(until, LATEST_PAUSE)  # the server takes no later time
        return until if until > self._backend.now() and await self.is_paused() else None

    async def is_paused(self) -> bool:
        """Return whether the server holds the default tier's jobs back."""
        try:
            state = await self._backend.look_up(self._keys.ready_log, tier_name(DEFAULT_PRIORITY))
        except AssetMissing:
            return False
        return state is not None and state.paused

    async def write_pause(self, until: float | None) -> None:
        """Store until when the queue is paused; `None`: it is not."""
        await self.declare()
        if until is None:
            await self._backend.purge(self._keys.bucket_log, self._keys.pause)
        else:
            await self._backend.write(
                self._keys.bucket_log, Write(self._keys.pause, str(until).encode())
            )

    async def find_orphans(self, *, declare: bool = True) -> list[int]:
        """Declare the tiers of ready jobs that have none, and return their priorities.

        Without a tier, no worker would ever see the job. `declare=False` only returns them.

        They come from producers that may not declare consumers. The search runs only when the log
        holds more records than its tiers count. It reads those since the last search,
        `TIER_SEARCH_LIMIT` at most: any producer may add jobs of invalid priorities.
        """
        log = self._keys.ready_log
        before = await self._backend.count(log)
        known = 0
        for priority in await self.list_tiers():
            state = await self._backend.look_up(log, tier_name(priority))
            known += 0 if state is None else state.pending + state.leased
        # Counted before and after: jobs come and go while the tiers are asked.
        if min(before, await self._backend.count(log)) <= known:
            return []
        await self._read_priorities()
        tiers = await self.list_tiers()
        room = MAX_TIERS - len(tiers)
        missing = sorted(self._seen_priorities - set(tiers))
        if not declare:
            self._looked_at = 0
        for priority in missing[:room] if declare else ():
            await self.declare_tier(priority)
        if len(missing) > room:
            self._warn_of_too_many(missing[room])
        self._seen_priorities.clear()
        return missing[:room]

    async def _read_priorities(self) -> None:
        """Note the priorities of the ready jobs that were not looked at before."""
        log = self._keys.ready_log
        if await self._backend.last_sequence(log) < self._looked_at:
            self._looked_at = 0  # the log was lost, and made again
        for _ in range(TIER_SEARCH_LIMIT // TIER_SEARCH_PAGE):
            page = await self._backend.page(
                log,
                self._keys.all_ready,
                from_sequence=self._looked_at + 1,
                limit=TIER_SEARCH_PAGE,
                mostly=True,
            )
            tiers = {self._keys.tier_of(record.subject) for record in page}
            self._seen_priorities |= {tier for tier in tiers if tier is not None}
            if page:
                self._looked_at = page[-1].sequence
            if len(page) < TIER_SEARCH_PAGE:
                break

    def _warn_of_too_many(self, priority: int) -> None:
        if not self._told_of_too_many:
            self._told_of_too_many = True
            logger.warning(
                "queue %s has jobs of more than %d priorities: "
                "those of priority %d, and of each later one that has no "
                "tier, are not run",
                self._keys.queue,
                MAX_TIERS,
                priority,
            )

    async def list_tiers(self) -> list[int]:
        """Return the priorities that have a consumer, the first to run first."""
        try:
            names = await self._backend.list_consumers(self._keys.ready_log)
        except AssetMissing:
            return []
        return sorted(priority for name in names if (priority := tier_priority(name)) is not None)

    async def restore_lost(self) -> bool:
        """Declare missing assets again, as after a server came back without its store.

        Return whether the bucket has lost all it had since the last call.
        """
        logs = (self._keys.ready_log, self._keys.bucket_log)
        found = [await self._backend.incarnation(log) for log in logs]
        lost = self._incarnation not in ("", found[1])
        if lost or None in found:
            logger.error("queue %s: its streams were gone and are made again", self._keys.queue)
            self.forget()
            await self.declare_all()
            found = [await self._backend.incarnation(log) for log in logs]
        self._incarnation = found[1] or ""
        return lost

    async def compare(self) -> list[Difference]:
        """Return how the queue's assets differ from the settings in force."""
        tiers = [self._tier(priority) for priority in await self.list_tiers()]
        found = [
            *await self._backend.compare(self.ready_log, tiers, self.settings),
            *await self._backend.compare(self.bucket_log, [self._promoter], self.settings),
        ]
        if self.settings.stalled_after < SHORTEST_LIVE_LEASE:
            leases = "ack_wait", "lease"
            return [replace(d, can_change=d.can_change and d.key not in leases) for d in found]
        return found

    async def change(self) -> list[Difference]:
        """Apply the differences of the queue's assets that can be changed; return them."""
        is_safe = self.settings.stalled_after >= SHORTEST_LIVE_LEASE
        priorities = await self.list_tiers() if is_safe else []
        tiers = [self._tier(priority) for priority in priorities]
        return [
            *await self._backend.change(self.ready_log, tiers, self.settings),
            *await self._backend.change(
                self.bucket_log, [self._promoter] if is_safe else [], self.settings
            ),
        ]

    def forget(self) -> None:
        """Declare everything again when next asked: something is missing."""
        self._logs_declared = self._counters_declared = False
        self._tiers.clear()
        self._looked_at = 0

    @property
    def ready_log(self) -> Log:
        """The log of the jobs that can be run."""
        return Log(
            self._keys.ready_log,
            (self._keys.all_ready,),
            work_queue=True,
            republish=self._keys.republish_ready if self.settings.waiting_events else None,
        )

    @property
    def bucket_log(self) -> Log:
        """The log of all other jobs: the scheduler bucket."""
        return Log(
            self._keys.bucket_log,
            (self._keys.all_bucket,),
            timers=True,
            republish=self._keys.republish_bucket,
            ballast=self._keys.ballast,
            max_bytes=self.settings.bucket_max_bytes,
        )
