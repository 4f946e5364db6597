"""A rate limit holds for the whole queue, over all its workers.

The arithmetic of permits, and the workers that live by it.
"""

import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import anyio
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from asyncmq_nats.backends.base import Backend, Write
from asyncmq_nats.queues import Queue
from asyncmq_nats.runtime.rate_limiter import (
    LEASE_SECONDS,
    Bucket,
    Limit,
    RateLimiter,
    lease,
)
from asyncmq_nats.store.queue_store import QueueStore
from asyncmq_nats.wire.keys import QueueSubjects
from tests.receiver import until
from tests.running import PATIENCE, make_queue, only, outcome, running

NOW = 1_800_000_000.0

# -- permits: a function of values


@dataclass
class Hand:
    """A worker as the bucket sees it.

    How many permits it has, and when the bucket takes them back.
    """

    held: int = 0
    ends: float = 0.0


@dataclass
class World:
    """A queue's bucket, its workers and its clock, and when jobs started."""

    limit: Limit
    now: float = NOW
    bucket: Bucket | None = None
    hands: dict[str, Hand] = field(default_factory=dict)
    starts: list[float] = field(default_factory=list)

    def act(self, worker: str, wanted: int, use: int, pause: float) -> None:
        """Let time pass.

        Then a worker asks for permits, and starts jobs with some of those it has.
        """
        self.now += pause
        hand = self.hands.setdefault(worker, Hand())
        if self.now >= hand.ends:
            hand.held = 0
        self.bucket, granted, wait = lease(
            self.bucket, self.limit, worker, hand.held, max(wanted, -hand.held), self.now
        )
        assert (granted < wanted) == (wait > 0) or wanted < 0
        hand.held += granted
        hand.ends = self.now + LEASE_SECONDS
        self.start(worker, use)

    def start(self, worker: str, count: int) -> None:
        hand = self.hands[worker]
        count = min(count, hand.held)
        hand.held -= count
        self.starts += [self.now] * count

    def lose(self, worker: str) -> None:
        self.hands.pop(worker, None)


ACTIONS = st.lists(
    st.tuples(
        st.sampled_from("abc"),
        st.integers(-5, 60),
        st.integers(0, 60),
        st.floats(0, 2) | st.floats(0, 3 * LEASE_SECONDS),
        st.booleans(),
    ),
    max_size=60,
)
LIMITS = st.builds(Limit, st.integers(1, 50), st.floats(0.05, 20))


def windows(starts: Sequence[float]) -> Iterator[tuple[float, int]]:
    """Yield the length of each span from one start to another, and its number of starts."""
    for first, begin in enumerate(starts):
        for last in range(first, len(starts)):
            yield starts[last] - begin, last - first + 1


@given(LIMITS, ACTIONS)
@example(Limit(5, 1.0), [("a", 5, 5, 0.0, False), ("b", 5, 5, 1.0, False), ("c", 5, 5, 0.0, False)])
def test_no_window_has_more_starts_than_the_limit_and_one_burst(
    limit: Limit, actions: list[tuple[str, int, int, float, bool]]
) -> None:
    world = World(limit)
    for worker, wanted, use, pause, dies in actions:
        world.act(worker, wanted, use, pause)
        if dies:
            world.lose(worker)
    instants = sorted(set(world.starts))
    for first, begin in enumerate(instants):
        for end in instants[first:]:
            count = sum(begin <= at <= end for at in world.starts)
            assert count <= limit.starts + limit.per_second * (end - begin) + 1e-3


@given(LIMITS, ACTIONS)
def test_no_permit_is_held_that_the_bucket_does_not_count(
    limit: Limit, actions: list[tuple[str, int, int, float, bool]]
) -> None:
    world = World(limit)
    for worker, wanted, use, pause, _ in actions:
        world.act(worker, wanted, use, pause)
        held = sum(hand.held for hand in world.hands.values() if world.now < hand.ends)
        assert world.bucket is not None
        assert world.bucket.tokens >= 0
        assert held + world.bucket.tokens <= limit.starts + 1e-6


@given(
    st.builds(Limit, st.integers(2, 50), st.floats(0.05, 20)), st.integers(1, 20), st.floats(0, 0.4)
)
def test_who_asks_again_after_the_wait_gets_the_whole_allowance(
    limit: Limit, slots: int, late: float
) -> None:
    """Even if each time it is late, by a share of the interval.

    What came meanwhile is in the bucket.
    """
    world = World(limit)
    while world.now < NOW + 20 * limit.interval:
        world.bucket, granted, wait = lease(world.bucket, limit, "a", 0, slots, world.now)
        world.starts += [world.now] * granted
        world.now += wait + late * limit.interval if granted < slots else 1e-4
    allowance = limit.starts + limit.per_second * (world.starts[-1] - NOW)
    assert len(world.starts) >= 0.95 * allowance - limit.starts


def test_a_new_bucket_is_full() -> None:
    bucket, granted, wait = lease(None, Limit(10, 1.0), "a", 0, 25, NOW)
    assert (granted, bucket.tokens) == (10, 0)
    assert 0 < wait <= 0.2


def test_permits_come_evenly() -> None:
    limit = Limit(10, 1.0)
    bucket, *_ = lease(None, limit, "a", 0, 10, NOW)
    got = []
    for step in range(1, 11):
        bucket, granted, _ = lease(bucket, limit, "a", 0, 10, NOW + step / 10 + 1e-6)
        got.append(granted)
    assert got == [1] * 10


def test_idle_workers_do_not_save_up_a_burst() -> None:
    limit = Limit(10, 1.0)
    bucket, first, _ = lease(None, limit, "a", 0, 6, NOW)
    bucket, second, _ = lease(bucket, limit, "b", 0, 10, NOW + 9)
    assert (first, second) == (6, 4)


def test_permits_of_a_silent_worker_are_taken_back() -> None:
    limit = Limit(10, 1.0)
    bucket, first, _ = lease(None, limit, "a", 0, 10, NOW)
    _, early, _ = lease(bucket, limit, "b", 0, 10, NOW + LEASE_SECONDS - 0.1)
    _, late, _ = lease(bucket, limit, "b", 0, 10, NOW + LEASE_SECONDS + 0.1)
    assert (first, early, late) == (10, 0, 10)


def test_permits_that_were_given_back_are_there_for_others() -> None:
    limit = Limit(10, 60.0)
    bucket, *_ = lease(None, limit, "a", 0, 10, NOW)
    bucket, returned, wait = lease(bucket, limit, "a", 10, -10, NOW)
    assert (returned, wait, bucket.leased) == (-10, 0.0, {})
    assert lease(bucket, limit, "b", 0, 10, NOW)[1] == 10


def test_a_clock_that_goes_back_gives_nothing() -> None:
    limit = Limit(10, 1.0)
    bucket, *_ = lease(None, limit, "a", 0, 10, NOW)
    bucket, granted, _ = lease(bucket, limit, "b", 0, 10, NOW - 5)
    assert (granted, bucket.at) == (0, NOW)


@given(LIMITS, ACTIONS)
def test_a_bucket_survives_its_record(
    limit: Limit, actions: list[tuple[str, int, int, float, bool]]
) -> None:
    world = World(limit)
    for worker, wanted, use, pause, _ in actions:
        world.act(worker, wanted, use, pause)
    if world.bucket is not None:
        assert Bucket.decode(world.bucket.encode()) == world.bucket


# -- the permits of one worker


def limiter(backend: Backend, worker: str, limit: Limit) -> RateLimiter:
    return RateLimiter(QueueStore.of(backend, "work"), limit, worker)


async def test_workers_share_the_permits(backend: Backend, twin: Backend) -> None:
    await make_queue(backend)._assets.declare_all()
    limit = Limit(10, 60.0)
    one, other = limiter(backend, "one", limit), limiter(twin, "other", limit)
    assert await one.acquire(6) == 0
    assert await other.acquire(6) > 0
    assert (one.permits, other.permits) == (6, 4)
    await one.acquire(-6)
    assert await other.acquire(6) == 0
    assert (one.permits, other.permits) == (0, 10)


async def test_workers_that_race_get_no_permit_twice(backend: Backend, twin: Backend) -> None:
    await make_queue(backend)._assets.declare_all()
    limiters = [
        limiter(handle, f"worker {number}", Limit(10, 600.0))
        for number, handle in enumerate([backend, twin] * 4)
    ]
    async with anyio.create_task_group() as group:
        for each in limiters:
            group.start_soon(each.acquire, 3)
    assert sum(each.permits for each in limiters) == 10


async def test_a_busy_worker_says_that_its_permits_were_used(
    backend: Backend, twin: Backend
) -> None:
    await make_queue(backend)._assets.declare_all()
    limit = Limit(5, 0.05)
    one, other = limiter(backend, "one", limit), limiter(twin, "other", limit)
    await one.acquire(5)
    for _ in range(5):
        one.use()
    await one.acquire(
        0
    )  # all its slots are taken for a long time: what it had leased is no longer kept from others
    with anyio.fail_after(LEASE_SECONDS / 2):
        while other.permits < 5:  # noqa: ASYNC110
            await anyio.sleep(await other.acquire(5 - other.permits))


async def test_a_worker_that_was_silent_has_no_permits(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    await make_queue(backend)._assets.declare_all()
    one = limiter(backend, "one", Limit(5, 1.0))
    await one.acquire(5)
    later = backend.now() + LEASE_SECONDS
    monkeypatch.setattr(backend, "now", lambda: later)
    assert one.permits == 0


# -- workers


@dataclass
class Lag:
    """How long the event loop was late, in all."""

    seconds: float = 0.0


@asynccontextmanager
async def measured_lag() -> AsyncIterator[Lag]:
    """Measure how late the event loop is: another program has the core meanwhile."""
    lag, step = Lag(), 0.005

    async def watch() -> None:
        while True:
            begun = time.monotonic()
            await anyio.sleep(step)
            lag.seconds += max(0.0, time.monotonic() - begun - 2 * step)

    async with anyio.create_task_group() as group:
        group.start_soon(watch)
        yield lag
        group.cancel_scope.cancel()


def limited(backend: Backend, limit: int | None, interval: float, concurrency: int = 10, **tasks):
    queue = make_queue(backend, concurrency=concurrency, **tasks)
    queue.rate_limit, queue.rate_interval = limit, interval
    return queue


@pytest.mark.parametrize(("limit", "interval"), [(-1, 1.0), (5, 0.0), (5, -1.0)])
async def test_a_limit_that_makes_no_sense_is_refused(
    backend: Backend, limit: int, interval: float
) -> None:
    with pytest.raises(ValueError, match="rate_"):
        Queue("work", backend, rate_limit=limit, rate_interval=interval)


async def test_workers_together_keep_to_the_limit_and_use_it(
    backend: Backend, twin: Backend
) -> None:
    starts: list[float] = []

    async def note() -> None:
        starts.append(backend.now())

    limit = Limit(10, 0.2)
    queues = [
        limited(handle, limit.starts, limit.interval, note=note) for handle in (backend, twin)
    ]
    await queues[0].add_bulk([{"task_id": "note"}] * 80)
    async with running(queues[0]), running(queues[1]), measured_lag() as lag:
        with anyio.fail_after(PATIENCE):
            await until(queues[0].queue_stats, lambda stats: stats["completed"] == 80)
    assert len(starts) == 80
    for length, count in windows(starts):
        # A permit is leased a moment before its job starts: longer before if that had no core.
        assert count <= limit.starts + limit.per_second * (length + 0.05 + lag.seconds)
    # Generous, and without the time in which this process had no core.
    seconds = starts[-1] - starts[0] - lag.seconds
    assert (len(starts) - limit.starts) / seconds > 0.7 * limit.per_second


async def test_a_worker_whose_slots_are_taken_leaves_the_allowance_to_others(
    backend: Backend, twin: Backend
) -> None:
    opened = anyio.Event()
    where: list[str] = []

    async def hold(name: str) -> None:
        where.append(name)
        await opened.wait()

    first = limited(backend, 4, 0.2, 4, work=lambda: None, hold=hold)
    second = limited(twin, 4, 0.2, 50, work=lambda: None, hold=hold)
    await first.add_bulk([{"task_id": "hold", "args": ["first"]}] * 4)
    async with running(first):
        await until(first.queue_stats, lambda stats: stats["active"] == 4)
        async with running(second):
            await first.add_bulk([{"task_id": "work"}] * 20)
            with anyio.fail_after(LEASE_SECONDS / 2):
                await until(first.queue_stats, lambda stats: stats["completed"] == 20)
            opened.set()


async def test_a_limit_of_zero_starts_nothing_and_stops_at_once(backend: Backend) -> None:
    queue = limited(backend, 0, 1.0, work=lambda: None)
    job_id = await queue.add("work")
    with anyio.fail_after(PATIENCE):
        async with running(queue):
            await until(queue.list_workers, bool)
            await only(queue, waiting=1)
    assert await queue.get_job_state(job_id) == "waiting"
    queue.rate_limit = None
    async with running(queue):
        assert (await outcome(queue, job_id))["status"] == "completed"


async def test_workers_that_wait_for_permits_hold_no_jobs(backend: Backend) -> None:
    async def nothing() -> None:
        return None

    queue = limited(backend, 5, 600.0, nothing=nothing)
    await queue.add_bulk([{"task_id": "nothing"}] * 30)
    async with running(queue):
        await only(queue, waiting=25, completed=5)
        for _ in range(20):
            stats = await queue.queue_stats()
            assert (stats["waiting"], stats["active"], stats["completed"]) == (25, 0, 5)


async def test_a_worker_that_waits_for_permits_stops_at_once(backend: Backend) -> None:
    queue = limited(backend, 1, 600.0, work=lambda: None)
    await queue.add_bulk([{"task_id": "work"}] * 3)
    with anyio.fail_after(PATIENCE):
        async with running(queue):
            await until(queue.queue_stats, lambda stats: stats["completed"] == 1)


async def test_permits_that_a_worker_did_not_use_outlast_it(
    backend: Backend, twin: Backend
) -> None:
    queue, other = (
        limited(backend, 5, 600.0, work=lambda: None),
        limited(twin, 5, 600.0, work=lambda: None),
    )
    async with running(queue):
        await until(queue.list_workers, bool)
    await queue.add_bulk([{"task_id": "work"}] * 5)
    async with running(other):
        with anyio.fail_after(LEASE_SECONDS / 2):
            await until(queue.queue_stats, lambda stats: stats["completed"] == 5)


async def test_limits_are_told_with_what_is_left_of_them(backend: Backend, twin: Backend) -> None:
    first = limited(backend, 5, 600.0, 2, work=lambda: None)
    second = limited(twin, 40, 1.0, 2, work=lambda: None)

    async def left() -> tuple[int, float, int]:
        (limit,) = await second.list_rate_limits()
        return limit.limit, limit.interval, limit.free + limit.leased

    assert await first.list_rate_limits() == []
    async with running(first):
        assert await left() == (5, 600.0, 5)
        await first.add_bulk([{"task_id": "work"}] * 3)
        await only(first, completed=3)
        await until(left, lambda found: found == (5, 600.0, 2))
        async with running(second):
            limits = await first.list_rate_limits()
            assert [(each.limit, each.interval) for each in limits] == [(5, 600.0), (40, 1.0)]
        log, key = first._subjects.bucket_log, first._subjects.rate_limit
        await backend.write(log, Write(key, b"junk"))
        assert await left() == (5, 600.0, 5)


async def test_a_queue_without_a_limit_has_no_bucket(backend: Backend) -> None:
    queue = limited(backend, None, 1.0, work=lambda: None)
    job_id = await queue.add("work")
    async with running(queue):
        await outcome(queue, job_id)
    subjects = QueueSubjects(backend.settings.prefix, "work")
    assert await backend.last(subjects.bucket_log, subjects.rate_limit) == []
