"""What a worker takes in: as much as it can start, in order, and nothing that others could start sooner. On both backends."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import anyio
import pytest

from asyncmq_nats.backends.base import Backend, ConsumerState, Delivery
from asyncmq_nats.queues import Queue
from asyncmq_nats.runtime.buffer import Held
from asyncmq_nats.runtime.fetcher import Intake
from asyncmq_nats.runtime.prefetch import MAX_PREFETCH, Pace
from asyncmq_nats.settings import Settings
from asyncmq_nats.store.topology import QueueAssets
from asyncmq_nats.transitions.claim import Attempt
from asyncmq_nats.transitions.finish import Lifecycle
from asyncmq_nats.wire.keys import QueueSubjects, tier_name
from tests.receiver import Receiver, until
from tests.running import PATIENCE, make_queue


@pytest.fixture
def settings() -> Settings:
    """A lease so long that only a hand-back explains a second delivery."""
    return Settings(stalled_after=60, publish_timeout=10)


@asynccontextmanager
async def taking_in(backend: Backend, concurrency: int) -> AsyncIterator[Intake]:
    """Run the intake of a worker without slots: the test takes the jobs."""
    subjects = QueueSubjects(backend.settings.prefix, "work")
    assets = QueueAssets(backend, subjects)
    await assets.declare_all()
    intake = Intake(
        backend,
        subjects,
        assets,
        Lifecycle(backend, subjects, assets, "worker"),
        concurrency=concurrency,
    )
    async with anyio.create_task_group() as group:
        await intake.start(group)
        yield intake
        await intake.stop()
        group.cancel_scope.cancel()


async def tier(backend: Backend, priority: int = 5) -> ConsumerState:
    state = await backend.look_up(
        QueueSubjects(backend.settings.prefix, "work").ready_log, tier_name(priority)
    )
    assert state is not None
    return state


async def take(intake: Intake, count: int) -> list[Delivery]:
    with anyio.fail_after(PATIENCE):
        return [await intake.next() for _ in range(count)]


async def add(queue: Queue, *priorities: int) -> list[str]:
    return await queue.add_bulk(
        [{"task_id": "work", "priority": priority} for priority in priorities]
    )


def ids(deliveries: Sequence[Delivery]) -> list[str]:
    return [delivery.subject.rpartition(".")[2] for delivery in deliveries]


async def test_no_more_is_taken_in_than_can_be_started(backend: Backend) -> None:
    jobs = await add(make_queue(backend), *[5] * 10)
    async with taking_in(backend, 3) as intake:
        assert ids(await take(intake, 3)) == jobs[:3]
        state = await until(lambda: tier(backend), lambda state: state.leased == 3)
        assert state.pending == 7
        intake.release()
        assert ids(await take(intake, 1)) == jobs[3:4]


async def test_jobs_come_in_order(backend: Backend) -> None:
    jobs = await add(make_queue(backend), 5, -1, 5, 9, -1)
    taken: list[str] = []
    async with taking_in(backend, 1) as intake:
        for _ in jobs:
            (delivery,) = await take(intake, 1)
            taken += ids([delivery])
            delivery.ack()
            intake.release()
    assert taken == [jobs[1], jobs[4], jobs[0], jobs[2], jobs[3]]


async def test_a_new_tier_is_taken_from_at_once(backend: Backend, twin: Backend) -> None:
    producer = make_queue(twin)
    async with taking_in(backend, 5) as intake:
        for priority in (5, -10, 2**40):
            (job_id,) = await add(producer, priority)
            with anyio.fail_after(PATIENCE):
                assert ids([await intake.next()]) == [job_id]


async def test_short_jobs_are_taken_in_ahead_within_bounds(backend: Backend) -> None:
    await add(make_queue(backend), *[5] * 900)
    async with taking_in(backend, 2) as intake:
        for _ in range(200):
            (delivery,) = await take(intake, 1)
            delivery.ack()
            intake.learn_job(1e-6)
            intake.release()
        await take(intake, 2)
        state = await until(lambda: tier(backend), lambda state: state.leased > 2)
        assert state.leased <= MAX_PREFETCH + 2


async def test_what_was_taken_in_ahead_goes_back_when_no_slot_becomes_free(
    backend: Backend, twin: Backend
) -> None:
    jobs = await add(make_queue(backend), *[5] * 100)
    async with taking_in(backend, 1) as intake:
        for _ in range(50):
            (delivery,) = await take(intake, 1)
            delivery.ack()
            intake.learn_job(1e-6)
            intake.release()
        (kept,) = await take(intake, 1)
        async with taking_in(twin, 100) as idle:
            rest = await take(idle, 49)
            assert sorted(ids([kept, *rest])) == sorted(jobs[50:])


async def test_a_job_that_was_handed_back_did_not_stall(backend: Backend, twin: Backend) -> None:
    (job_id,) = await add(make_queue(backend), 5)
    subjects = QueueSubjects(backend.settings.prefix, "work")
    async with taking_in(backend, 1):
        await until(lambda: tier(backend), lambda state: state.leased == 1)
    async with taking_in(twin, 1) as intake:
        (delivery,) = await take(intake, 1)
        assert ids([delivery]) == [job_id]
        lifecycle = Lifecycle(twin, subjects, QueueAssets(twin, subjects), "worker")
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
        """A process that was stopped beyond its leases has deliveries that are out of date: a NAK of one ends the newest."""
        await add(make_queue(backend), 5)
        subjects = QueueSubjects(backend.settings.prefix, "work")
        lost = Receiver(backend, subjects.ready_log, extend=False)
        await lost.pull(tier_name(5))
        late = Receiver(backend, subjects.ready_log, extend=False)
        (stale,) = await late.pull(tier_name(5))
        owner = Receiver(twin, subjects.ready_log)
        (delivery,) = await owner.pull(tier_name(5))
        assert (stale.deliveries, delivery.deliveries) == (2, 3)
        lifecycle = Lifecycle(twin, subjects, QueueAssets(twin, subjects), "owner")
        await lifecycle.verify(lifecycle.open(delivery))
        async with taking_in(backend, 1) as intake:
            await intake._hand_back(stale)
            with anyio.move_on_after(0.3):
                pytest.fail(f"delivered again: {await intake.next()}")
        delivery.ack()


async def test_nothing_is_asked_for_while_too_many_ends_are_not_confirmed(backend: Backend) -> None:
    await add(make_queue(backend), *[5] * 10)
    async with taking_in(backend, 1) as intake:
        await take(intake, 1)
        intake.unsettled = 1000
        intake.release()
        for _ in range(10):
            assert (await tier(backend)).leased == 1
        intake.unsettled = 2
        intake.settled()
        await take(intake, 1)


async def test_nothing_starts_during_a_pause_and_what_is_held_goes_back(
    backend: Backend, twin: Backend
) -> None:
    jobs = await add(make_queue(backend), *[5] * 3)
    async with taking_in(backend, 3) as intake:
        await until(lambda: tier(backend), lambda state: state.leased == 3)
        intake.pause(backend.now() + 600)
        async with taking_in(twin, 3) as other:
            assert sorted(ids(await take(other, 3))) == sorted(jobs)
        with anyio.move_on_after(0.05) as waited:
            await intake.next()
        assert waited.cancelled_caught


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
        self.consumer, self.pending = "", 0

    def ack(self) -> None: ...

    def nak(self, delay: float = 0.0) -> None: ...

    def abandon(self) -> None: ...


def held(*jobs: tuple[int, int]) -> Held:
    found = Held()
    for priority, sequence in jobs:
        found.push(priority, Job(sequence))
    return found


def test_held_jobs_leave_by_tier_and_then_by_age() -> None:
    jobs = held((5, 1), (0, 4), (-2, 9), (5, 3), (0, 2))
    assert [jobs.pop().sequence for _ in range(5)] == [9, 2, 4, 1, 3]
    assert jobs.counts.total() == 0


def test_held_jobs_are_counted_by_tier() -> None:
    jobs = held((5, 1), (0, 4), (5, 3))
    assert (jobs.counts[5], jobs.counts[0], jobs.counts[7]) == (2, 1, 0)
    jobs.pop()
    assert (jobs.counts[5], jobs.counts[0]) == (2, 0)
    assert len(jobs.pop_all()) == 2
    assert jobs.counts.total() == 0


def test_a_job_that_has_just_come_is_held() -> None:
    jobs = held((5, 1))
    assert jobs.pop_stuck(Pace(0.01), 1, 0.0) == []
    assert [job.sequence for job in jobs.pop_stuck(Pace(10.0), 1, 0.0)] == [1]
    assert jobs.counts.total() == 0
