"""A worker fetches as much as it can start, in order, and nothing that others wait for.

The tests run on both backends.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import anyio
import pytest

from asyncmq_nats.backends.base import Backend, ConsumerState, Delivery
from asyncmq_nats.backends.inmemory import InMemoryBackend
from asyncmq_nats.exceptions import ConnectionLost
from asyncmq_nats.queues import Queue
from asyncmq_nats.runtime.buffer import Buffer
from asyncmq_nats.runtime.fetcher import Fetcher
from asyncmq_nats.runtime.handback import LOOK_SECONDS, MAX_LOOK_SECONDS
from asyncmq_nats.runtime.prefetch import MAX_PREFETCH, Throughput
from asyncmq_nats.settings import Settings
from asyncmq_nats.store.queue_store import QueueStore
from asyncmq_nats.transitions.claim import Attempt
from asyncmq_nats.transitions.finish import Lifecycle
from asyncmq_nats.wire.keys import QueueSubjects, tier_name
from tests.receiver import Receiver, holds, until
from tests.running import PATIENCE, make_queue


@pytest.fixture
def settings() -> Settings:
    """A lease so long that only a hand-back explains a second delivery."""
    return Settings(stalled_after=60, publish_timeout=10)


@asynccontextmanager
async def fetching(backend: Backend, concurrency: int) -> AsyncIterator[Fetcher]:
    """Run the fetcher of a worker without slots: the test takes the jobs."""
    store = QueueStore.of(backend, "work")
    await store.assets.declare_all()
    fetcher = Fetcher(
        store,
        Lifecycle(store, "worker"),
        concurrency=concurrency,
    )
    async with anyio.create_task_group() as group:
        await fetcher.start(group)
        yield fetcher
        await fetcher.stop()
        group.cancel_scope.cancel()


async def tier(backend: Backend, priority: int = 5) -> ConsumerState:
    state = await backend.look_up(
        QueueSubjects(backend.settings.prefix, "work").ready_log, tier_name(priority)
    )
    assert state is not None
    return state


async def take_next(fetcher: Fetcher) -> Delivery:
    while (delivery := fetcher.take()) is None:  # noqa: ASYNC110  the worker's slots are told
        await anyio.sleep(0.002)
    return delivery


async def take(fetcher: Fetcher, count: int) -> list[Delivery]:
    with anyio.fail_after(PATIENCE):
        return [await take_next(fetcher) for _ in range(count)]


async def add(queue: Queue, *priorities: int) -> list[str]:
    return await queue.add_bulk(
        [{"task_id": "work", "priority": priority} for priority in priorities]
    )


def ids(deliveries: Sequence[Delivery]) -> list[str]:
    return [delivery.subject.rpartition(".")[2] for delivery in deliveries]


async def test_no_more_is_taken_in_than_can_be_started(backend: Backend) -> None:
    jobs = await add(make_queue(backend), *[5] * 10)
    async with fetching(backend, 3) as fetcher:
        assert ids(await take(fetcher, 3)) == jobs[:3]
        await until(lambda: tier(backend), lambda state: (state.leased, state.pending) == (3, 7))
        fetcher.release()
        assert ids(await take(fetcher, 1)) == jobs[3:4]


async def test_jobs_come_in_order(backend: Backend) -> None:
    jobs = await add(make_queue(backend), 5, -1, 5, 9, -1)
    taken: list[str] = []
    async with fetching(backend, 1) as fetcher:
        for _ in jobs:
            (delivery,) = await take(fetcher, 1)
            taken += ids([delivery])
            delivery.ack()
            fetcher.release()
    assert taken == [jobs[1], jobs[4], jobs[0], jobs[2], jobs[3]]


async def test_a_new_tier_is_taken_from_at_once(backend: Backend, twin: Backend) -> None:
    producer = make_queue(twin)
    async with fetching(backend, 5) as fetcher:
        for priority in (5, -10, 2**40):
            (job_id,) = await add(producer, priority)
            with anyio.fail_after(PATIENCE):
                assert ids([await take_next(fetcher)]) == [job_id]


def seem_fast(fetcher: Fetcher) -> None:
    """Have a fetcher take its jobs for short ones."""
    fetcher._throughput = Throughput(1e6, 0.0, 0.1, prefetch=MAX_PREFETCH, may_grow=True)
    fetcher.started = 10_000
    fetcher.refill()


async def all_asked_for_is_here(fetcher: Fetcher) -> None:
    """Wait until the fetcher has decided, and all that it has asked for has come."""
    with anyio.fail_after(PATIENCE):
        while fetcher._refill_due or fetcher._puller.outstanding(tier_name(5)):  # noqa: ASYNC110
            await anyio.sleep(0.002)


async def hold(fetcher: Fetcher, backend: Backend, count: int) -> Delivery:
    """Have a fetcher with one slot run the first job and hold the others; return the first."""
    (first,) = await take(fetcher, 1)
    seem_fast(fetcher)
    await until(lambda: tier(backend), lambda state: state.leased == count)
    return first


async def looked_often(fetcher: Fetcher) -> None:
    """Wait until the fetcher has asked several times whether others wait."""
    hand_back = fetcher._hand_back
    await holds(lambda: hand_back._pause >= MAX_LOOK_SECONDS)


async def test_short_jobs_are_fetched_ahead_within_bounds(backend: Backend) -> None:
    await add(make_queue(backend), *[5] * 900)
    async with fetching(backend, 2) as fetcher:
        first, _ = await take(fetcher, 2)
        seem_fast(fetcher)
        first.ack()
        fetcher.release()
        await all_asked_for_is_here(fetcher)
        seem_fast(fetcher)
        await all_asked_for_is_here(fetcher)
        # The server counts the first job as leased until it has processed its ack.
        state = await until(
            lambda: tier(backend), lambda state: state.leased + state.pending == 899
        )
        assert state.leased == fetcher.busy + fetcher._buffer.counts[5] == MAX_PREFETCH + 2


async def test_starts_make_the_prefetch_grow(backend: Backend) -> None:
    await add(make_queue(backend), *[5] * 900)
    async with fetching(backend, 50) as fetcher:
        for _ in range(800):
            (delivery,) = await take(fetcher, 1)
            delivery.ack()
            fetcher.release()
        assert fetcher._throughput.rate > 0


async def test_a_worker_that_is_alone_gives_nothing_back(backend: Backend) -> None:
    """However long what it holds has to wait for a slot."""
    jobs = await add(make_queue(backend), *[5] * 50)
    async with fetching(backend, 1) as fetcher:
        first = await hold(fetcher, backend, 50)
        await looked_often(fetcher)
        assert (await tier(backend)).leased == 50
        taken = [first]
        for _ in jobs[1:]:
            taken[-1].ack()
            fetcher.release()
            taken += await take(fetcher, 1)
        assert ids(taken) == jobs
        assert {delivery.deliveries for delivery in taken} == {1}


async def test_a_worker_that_is_alone_with_credit_of_its_own_gives_nothing_back(
    backend: Backend,
) -> None:
    """Several pulls of its own wait at the server, which does not say whose they are."""
    jobs = await add(make_queue(backend), *[5] * 20)
    async with fetching(backend, 1) as fetcher:
        await hold(fetcher, backend, 20)
        for count in (3, 5):
            await fetcher._puller.request(tier_name(5), count, wait=PATIENCE)
        await until(lambda: tier(backend), lambda state: state.waiting_pulls > 1)
        await looked_often(fetcher)
        assert (await tier(backend)).leased == len(jobs)
        fetcher.release()
        (second,) = await take(fetcher, 1)
        assert (ids([second]), second.deliveries) == (jobs[1:2], 1)


async def test_jobs_that_start_late_go_to_a_worker_that_waits(
    backend: Backend, twin: Backend
) -> None:
    jobs = await add(make_queue(backend), *[5] * 50)
    async with fetching(backend, 1) as fetcher:
        first = await hold(fetcher, backend, 50)
        async with fetching(twin, 100) as idle:
            rest = await take(idle, 49)
            assert sorted(ids([first, *rest])) == sorted(jobs)


async def test_no_more_is_given_back_than_others_wait_for(backend: Backend, twin: Backend) -> None:
    """One job goes to the one free slot; the others stay where they are."""
    jobs = await add(make_queue(backend), *[5] * 50)
    async with fetching(backend, 1) as fetcher:
        await hold(fetcher, backend, 50)
        async with fetching(twin, 1) as other:
            (second,) = await take(other, 1)
            await looked_often(fetcher)
            state = await tier(backend)
            assert second.deliveries == 2
            assert fetcher._buffer.counts[5] + 2 == state.leased == len(jobs)


async def test_a_job_of_a_lower_tier_goes_to_a_worker_that_waits_for_it(
    backend: Backend, twin: Backend
) -> None:
    """While the tier above keeps the slot busy."""
    jobs = await add(make_queue(backend), 0, 9, 9)
    async with fetching(backend, 1) as fetcher:
        await take(fetcher, 1)
        await fetcher._puller.request(tier_name(9), 2, wait=PATIENCE)
        await until(lambda: tier(backend, 9), lambda state: state.leased == 2)
        async with fetching(twin, 2) as other:
            assert sorted(ids(await take(other, 2))) == sorted(jobs[1:])


async def test_two_workers_without_a_slot_do_not_pass_jobs_to_and_fro(
    backend: Backend, twin: Backend
) -> None:
    """Each has credit left from when it had a slot, and takes the other's for a free worker."""
    await add(make_queue(backend), *[5] * 12)
    async with fetching(backend, 1) as one, fetching(twin, 1) as other:
        await take(one, 1)
        await take(other, 1)
        for fetcher in (one, other):
            await fetcher._puller.request(tier_name(5), 20, wait=PATIENCE)

        def at_rest() -> bool:
            held = [fetcher for fetcher in (one, other) if fetcher._buffer.heap]
            return sum(len(fetcher._buffer.heap) for fetcher in held) == 10 and all(
                fetcher._hand_back._pause == MAX_LOOK_SECONDS for fetcher in held
            )

        await holds(at_rest)
        assert max(entry[2] for entry in one._buffer.heap + other._buffer.heap) <= 3


async def test_nothing_is_asked_while_nothing_is_held(backend: Backend) -> None:
    async with fetching(backend, 1) as fetcher:
        await add(make_queue(backend), *[5] * 5)
        await take(fetcher, 1)
        await anyio.sleep(3 * LOOK_SECONDS)
        assert fetcher._hand_back._look_at == 0.0


async def test_a_job_that_was_handed_back_did_not_stall(backend: Backend, twin: Backend) -> None:
    (job_id,) = await add(make_queue(backend), 5)
    async with fetching(backend, 1):
        await until(lambda: tier(backend), lambda state: state.leased == 1)
    async with fetching(twin, 1) as fetcher:
        (delivery,) = await take(fetcher, 1)
        assert ids([delivery]) == [job_id]
        lifecycle = Lifecycle(QueueStore.of(twin, "work"), "worker")
        attempt = await lifecycle.verify(lifecycle.open(delivery))
    assert isinstance(attempt, Attempt)
    assert (attempt.job.stalls, delivery.deliveries) == (0, 2)


class TestLateDeliveries:
    @pytest.fixture
    def settings(self) -> Settings:
        return Settings(stalled_after=0.5, publish_timeout=10)

    async def test_what_came_late_is_not_given_back_under_the_worker_that_has_it_now(
        self, backend: Backend, twin: Backend
    ) -> None:
        """A process that was stopped beyond its leases has deliveries that are out of date.

        A NAK of one ends the newest.
        """
        await add(make_queue(backend), 5)
        subjects = QueueSubjects(backend.settings.prefix, "work")
        lost = Receiver(backend, subjects.ready_log, extend=False)
        await lost.pull(tier_name(5))
        late = Receiver(backend, subjects.ready_log, extend=False)
        (stale,) = await late.pull(tier_name(5))
        owner = Receiver(twin, subjects.ready_log)
        (delivery,) = await owner.pull(tier_name(5))
        assert (stale.deliveries, delivery.deliveries) == (2, 3)
        lifecycle = Lifecycle(QueueStore.of(twin, "work"), "owner")
        await lifecycle.verify(lifecycle.open(delivery))
        async with fetching(backend, 1) as fetcher:
            await fetcher._hand_back.give_back([stale])
            with anyio.move_on_after(0.3):
                pytest.fail(f"delivered again: {await take_next(fetcher)}")
        delivery.ack()


class TestStopsThatAreCutShort:
    """The process lives on, and so does the thread that extends its leases."""

    @pytest.fixture
    def settings(self) -> Settings:
        return Settings(stalled_after=0.5, publish_timeout=10)

    async def test_what_a_stop_could_not_give_back_in_time_comes_back_after_its_lease(
        self, backend: Backend, twin: Backend, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        jobs = await add(make_queue(backend), *[5] * 3)
        async with fetching(backend, 3) as fetcher:
            await until(lambda: tier(backend), lambda state: state.leased == 3)
            monkeypatch.setattr(fetcher._puller, "close", anyio.sleep_forever)
            with anyio.move_on_after(0.05):
                await fetcher.stop()
        await _come_to_another(twin, jobs)

    async def test_what_comes_after_a_stop_was_cut_short_is_not_kept(
        self, backend: Backend, twin: Backend, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async with fetching(backend, 3) as fetcher:
            await until(lambda: tier(backend), lambda state: state.waiting_pulls > 0)
            monkeypatch.setattr(fetcher._puller, "close", anyio.sleep_forever)
            with anyio.move_on_after(0.05):
                await fetcher.stop()
            jobs = await add(make_queue(twin), *[5] * 3)
            await until(lambda: tier(backend), lambda state: state.leased == 3)
        await _come_to_another(twin, jobs)

    async def test_what_a_stop_without_a_connection_has_in_hand_comes_back_after_its_lease(
        self, backend: Backend, twin: Backend, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async def fail() -> None:
            raise ConnectionLost("nats://gone")

        jobs = await add(make_queue(backend), *[5] * 3)
        async with fetching(backend, 3) as fetcher:
            await until(lambda: tier(backend), lambda state: state.leased == 3)
            monkeypatch.setattr(fetcher._tier_signals, "unsubscribe", fail)
            await fetcher.stop()
        await _come_to_another(twin, jobs)


async def _come_to_another(twin: Backend, jobs: list[str]) -> None:
    async with fetching(twin, 3) as other:
        assert sorted(ids(await take(other, len(jobs)))) == sorted(jobs)


async def test_nothing_is_asked_for_while_too_many_ends_are_not_confirmed(backend: Backend) -> None:
    await add(make_queue(backend), *[5] * 10)
    async with fetching(backend, 1) as fetcher:
        await take(fetcher, 1)
        pending = 1000
        fetcher._pending = lambda: pending
        fetcher.release()
        for _ in range(10):
            assert (await tier(backend)).leased == 1
        pending = 2
        fetcher.refill()
        await take(fetcher, 1)


async def test_nothing_starts_during_a_pause_and_what_is_held_goes_back(
    backend: Backend, twin: Backend
) -> None:
    jobs = await add(make_queue(backend), *[5] * 3)
    async with fetching(backend, 3) as fetcher:
        await until(lambda: tier(backend), lambda state: state.leased == 3)
        fetcher.pause(backend.now() + 600)
        async with fetching(twin, 3) as other:
            assert sorted(ids(await take(other, 3))) == sorted(jobs)
        with anyio.move_on_after(0.05) as waited:
            await take_next(fetcher)
        assert waited.cancelled_caught


def test_it_works_under_asyncio_run(settings: Settings) -> None:
    """anyio 4.14 and later refuse to start a task from a callback that no task of theirs runs."""

    async def fetch() -> None:
        backend = InMemoryBackend(settings=settings)
        async with fetching(backend, 3) as fetcher:
            jobs = await add(make_queue(backend), 5, -7)
            assert sorted(ids(await take(fetcher, 2))) == sorted(jobs)
            (held,) = await add(make_queue(backend), 9)
            asyncio.get_running_loop().call_soon(fetcher.pause, backend.now() + 600)
            async with fetching(backend, 3) as other:
                assert ids(await take(other, 1)) == [held]

    asyncio.run(fetch())


# -- what is in hand


class Job:
    """A delivery without a server."""

    def __init__(self, sequence: int) -> None:
        self.subject, self.body, self.sequence, self.time, self.deliveries = (
            "",
            b"",
            sequence,
            0.0,
            1,
        )
        self.consumer, self.pending, self.stamp, self.first = "", 0, 0, True

    def ack(self) -> None: ...

    def nak(self, delay: float = 0.0) -> None: ...

    def abandon(self) -> None: ...


def buffer(*jobs: tuple[int, int]) -> Buffer:
    found = Buffer()
    for priority, sequence in jobs:
        found.push(priority, Job(sequence), 0.0)
    return found


def test_held_jobs_leave_by_tier_and_then_by_age() -> None:
    jobs = buffer((5, 1), (0, 4), (-2, 9), (5, 3), (0, 2))
    assert [jobs.pop().sequence for _ in range(5)] == [9, 2, 4, 1, 3]
    assert jobs.counts.total() == 0


def test_held_jobs_are_counted_by_tier() -> None:
    jobs = buffer((5, 1), (0, 4), (5, 3))
    assert (jobs.counts[5], jobs.counts[0], jobs.counts[7]) == (2, 1, 0)
    jobs.pop()
    assert (jobs.counts[5], jobs.counts[0]) == (2, 0)
    assert len(jobs.pop_all()) == 2
    assert jobs.counts.total() == 0


def test_the_first_late_jobs_of_each_tier_are_taken_out() -> None:
    jobs = buffer((5, 1), (0, 4), (5, 3), (5, 7), (0, 8), (5, 6))

    def is_late(place: int, held_seconds: float, deliveries: int) -> bool:
        return place >= 1

    assert jobs.count_late(is_late, 1.0) == {0: 1, 5: 4}
    taken = jobs.pop_late(is_late, 1.0, {5: 2, 7: 3})
    assert [job.sequence for job in taken] == [1, 3]
    assert jobs.counts == {0: 2, 5: 2}
    assert [jobs.pop().sequence for _ in range(4)] == [4, 8, 6, 7]
