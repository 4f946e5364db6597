"""Order, pause, cancel and the list of workers, as a user of one process sees them.

The tests run on both backends.
"""

import random
import threading
from typing import Any

import anyio
import pytest

from asyncmq_nats.backends.base import Backend
from asyncmq_nats.context import current_job
from asyncmq_nats.exceptions import JobFailed, TooManyPriorities
from asyncmq_nats.queues import Queue
from asyncmq_nats.settings import Settings
from asyncmq_nats.store.topology import MAX_TIERS
from asyncmq_nats.wire.keys import tier_name
from tests.receiver import Receiver, holds, until
from tests.running import (
    PATIENCE,
    has,
    make_queue,
    only,
    outcome,
    round_trips,
    run_jobs,
    running,
    wait_until_done,
)


@pytest.fixture
def settings() -> Settings:
    """A lease so long that only a hand-back explains a second delivery.

    Heartbeats in which a missed signal is made up for.
    """
    return Settings(
        stalled_after=600, publish_timeout=10, shutdown_timeout=0.1, heartbeat_interval=0.5
    )


class Gate:
    """A task that tells that it runs, and ends when it may."""

    def __init__(self) -> None:
        self.names: list[Any] = []
        self.opened = anyio.Event()
        self._changed = anyio.Event()

    async def enter(self, name: Any = None) -> Any:
        self.names.append(name)
        self._changed.set()
        self._changed = anyio.Event()
        await self.opened.wait()
        return name

    async def entered(self, count: int = 1) -> None:
        with anyio.fail_after(PATIENCE):
            while len(self.names) < count:
                await self._changed.wait()


def noting() -> tuple[list[Any], Any]:
    ran: list[Any] = []

    async def note(*what: Any) -> None:
        ran.append(what)

    return ran, note


# -- priorities


async def test_jobs_run_by_priority_and_then_in_the_order_of_adding(backend: Backend) -> None:
    ran, note = noting()
    queue = make_queue(backend, concurrency=1, note=note)
    priorities = [-3, 0, 5, 5, 9, 1000] * 20
    random.Random(4).shuffle(priorities)
    await queue.add_bulk(
        [
            {"task_id": "note", "args": [priority, number], "priority": priority}
            for number, priority in enumerate(priorities)
        ]
    )
    await run_jobs(queue)
    assert len(ran) == 120
    assert ran == sorted(ran)


@pytest.mark.parametrize("priorities", [[2**70, 0, -(2**70)], [10**100, -(10**100)], [-1, -2, -10]])
async def test_any_integer_is_a_priority(backend: Backend, priorities: list[int]) -> None:
    ran, note = noting()
    queue = make_queue(backend, concurrency=1, note=note)
    for priority in priorities:
        job_id = await queue.add("note", [priority], priority=priority)
        job = await queue.get_job(job_id)
        assert job is not None
        assert job["priority"] == priority
    await run_jobs(queue)
    assert [priority for (priority,) in ran] == sorted(priorities)


async def test_a_running_worker_finds_a_new_priority_at_once(
    backend: Backend, twin: Backend
) -> None:
    queue, producer = make_queue(backend, work=lambda: None), make_queue(twin)
    async with running(queue):
        for priority in (7, -7, 10**20, 1 - 10**200):
            job_id = await producer.add("work", priority=priority)
            await producer.wait_for(job_id, timeout=PATIENCE)


async def test_a_priority_that_returns_is_found_as_well(backend: Backend) -> None:
    queue = make_queue(backend, work=lambda: None)
    job_id = await queue.add("work", priority=-7)
    await run_jobs(queue)
    async with running(queue):
        for priority in (-7, 3, -7):
            job_id = await queue.add("work", priority=priority)
            await queue.wait_for(job_id, timeout=PATIENCE)


@pytest.mark.slow
async def test_a_queue_has_256_priorities_at_most(backend: Backend, twin: Backend) -> None:
    queue, other = make_queue(backend, work=lambda: None), make_queue(twin, work=lambda: None)
    for priority in range(MAX_TIERS):
        await queue.add("work", priority=priority)
    for each in (queue, other):
        with pytest.raises(TooManyPriorities, match="256"):
            await each.add("work", priority=-1)
    await other.add("work", priority=0)
    with anyio.fail_after(PATIENCE):
        await run_jobs(queue)
    await has(queue, MAX_TIERS + 1, "completed")


async def test_an_urgent_job_is_the_next_to_start(backend: Backend) -> None:
    """Again and again: neither the tier's age nor what is known of it matters."""
    queue: Queue
    ran: list[str] = []
    gates: list[Gate] = []

    async def work(name: str) -> None:
        ran.append(name)
        if name == "gate":
            await gates[-1].enter()

    queue = make_queue(backend, concurrency=1, work=work)
    async with running(queue):
        for _ in range(15):
            ran.clear()
            gates.append(Gate())
            await queue.add("work", ["gate"])
            await gates[-1].entered()
            await queue.add_bulk([{"task_id": "work", "args": ["later"]}] * 3)
            await queue.add("work", ["urgent"], priority=0)
            await round_trips(backend, "amq_work")  # the worker hears of it
            gates[-1].opened.set()
            await wait_until_done(queue)
            assert ran == ["gate", "urgent", "later", "later", "later"]


# -- who gets a job


async def test_a_busy_worker_leaves_a_job_to_a_free_one(backend: Backend, twin: Backend) -> None:
    """Although it once asked for jobs of that priority, and has not got any since."""
    gate = Gate()
    busy, free = (
        make_queue(backend, concurrency=2, enter=gate.enter),
        make_queue(twin, concurrency=2, enter=gate.enter),
    )
    await busy.add("enter", priority=0)
    async with running(busy):
        await gate.entered()
        await busy.add("enter", priority=5)
        await gate.entered(2)
        async with running(free):
            for number, priority in enumerate([0, 5], start=3):
                await busy.add("enter", priority=priority)
                with anyio.fail_after(PATIENCE):
                    await gate.entered(number)
            gate.opened.set()
            await wait_until_done(busy)
    assert {job["stalls"] for job in await busy.list_jobs("completed")} == {0}


async def test_jobs_in_hand_go_back_when_a_long_job_takes_the_slot(
    backend: Backend, twin: Backend
) -> None:
    gate = Gate()

    async def brief() -> None:
        return None

    first, second = (
        make_queue(handle, concurrency=1, enter=gate.enter, brief=brief)
        for handle in (backend, twin)
    )
    await first.add_bulk(
        [{"task_id": "brief"}] * 200 + [{"task_id": "enter"}] + [{"task_id": "brief"}] * 50
    )
    async with running(first):
        await gate.entered()
        async with running(second):
            await until(first.queue_stats, lambda stats: stats["completed"] == 250)
            gate.opened.set()
            await wait_until_done(first)
    jobs = await first.list_jobs("completed")
    assert len(jobs) == 251
    assert {job["stalls"] for job in jobs} == {0}


async def test_jobs_without_a_slot_do_not_go_to_and_fro(backend: Backend) -> None:
    gate = Gate()

    async def brief() -> None:
        return None

    queue = make_queue(backend, concurrency=1, enter=gate.enter, brief=brief)
    ids = await queue.add_bulk(
        [{"task_id": "brief"}] * 200 + [{"task_id": "enter"}] + [{"task_id": "brief"}] * 50
    )
    bucket, claims = queue._subjects.bucket_log, queue._subjects.claim("*")
    async with running(queue):
        await gate.entered()
        # What is given back is claimed at once; what runs, after a second.
        [claim] = await until(lambda: backend.last(bucket, claims), bool)
        assert claim.subject == queue._subjects.claim(ids[200])
        gate.opened.set()
        await wait_until_done(queue)
    assert {job["stalls"] for job in await queue.list_jobs("completed")} == {0}


# -- pause


async def test_nothing_starts_after_pause_has_returned(backend: Backend, twin: Backend) -> None:
    starts = 0

    async def count() -> None:
        nonlocal starts
        starts += 1
        await anyio.sleep(0.001)

    queues = [make_queue(handle, concurrency=5, count=count) for handle in (backend, twin)]
    await queues[0].add_bulk(
        [{"task_id": "count", "priority": number % 3} for number in range(600)]
    )
    async with running(queues[0]), running(queues[1]):
        for _ in range(5):
            goal = min(starts + 30, 600)
            await holds(lambda: starts >= goal)  # noqa: B023
            await queues[0].pause()
            assert await queues[1].is_paused()
            before = starts
            await anyio.sleep(0.1)
            assert starts == before
            await queues[1].resume()
            assert not await queues[0].is_paused()
        await wait_until_done(queues[0])
    assert starts == 600


async def test_jobs_that_run_go_on_during_a_pause(backend: Backend) -> None:
    gate = Gate()
    queue = make_queue(backend, enter=gate.enter)
    async with running(queue):
        job_id = await queue.add("enter", ["done"])
        await gate.entered()
        await queue.pause()
        gate.opened.set()
        assert await queue.wait_for(job_id, timeout=PATIENCE) == "done"
        await queue.resume()


async def test_after_resume_the_next_job_starts_at_once(backend: Backend, twin: Backend) -> None:
    ran, note = noting()
    queue, other = make_queue(backend, note=note), make_queue(twin)
    async with running(queue):
        for priority in (5, 5, 0, 5):
            await other.pause()
            job_id = await other.add("note", priority=priority)
            assert await other.get_job_state(job_id) == "waiting"
            await other.resume()
            await other.wait_for(job_id, timeout=PATIENCE)
    assert len(ran) == 4


async def test_a_pause_is_of_all_priorities_also_of_new_ones(
    backend: Backend, twin: Backend
) -> None:
    ran, note = noting()
    queue, other = make_queue(backend, note=note), make_queue(twin, note=note)
    await queue.add("note", [0], priority=0)
    await other.pause()
    await queue.add("note", [-9], priority=-9)
    await other.add("note", [99], priority=99)
    receiver = Receiver(twin, queue._subjects.ready_log)
    for priority in (0, -9, 99):
        assert await receiver.pull_rest(tier_name(priority)) == []
    await receiver.puller.close()
    async with running(queue):
        await queue.add("note", [-10], priority=-10)
        assert ran == []
        await other.resume()
        await wait_until_done(queue)
    assert sorted(ran) == [(-10,), (-9,), (0,), (99,)]


async def test_a_pause_until_a_time_ends_by_itself(backend: Backend) -> None:
    ran, note = noting()
    queue = make_queue(backend, note=note)
    async with running(queue):
        end = backend.now() + 2.0  # long enough for what is looked at before
        await queue.pause(until=end)
        await queue.add("note")
        await queue.add("note", priority=-1)
        assert await queue.is_paused()
        assert ran == []
        await until(queue.queue_stats, lambda stats: stats["completed"] == 2)
        assert end - 0.05 < backend.now()
        assert not await queue.is_paused()


async def test_a_worker_that_starts_during_a_pause_goes_on_when_it_ends(backend: Backend) -> None:
    _, note = noting()
    queue = make_queue(backend, note=note)
    await queue.add("note")
    end = backend.now() + 0.6
    await queue.pause(until=end)
    async with running(queue):
        await until(queue.queue_stats, lambda stats: stats["completed"] == 1)
        assert end - 0.05 < backend.now()


async def test_a_limited_queue_goes_on_when_its_pause_ends(backend: Backend) -> None:
    _, note = noting()
    queue = make_queue(backend, note=note)
    queue.rate_limit = 100
    await queue.add("note")
    end = backend.now() + 0.6
    await queue.pause(until=end)
    async with running(queue):
        await until(queue.queue_stats, lambda stats: stats["completed"] == 1)
        assert end - 0.05 < backend.now()


async def test_a_second_pause_counts(backend: Backend) -> None:
    ran, note = noting()
    queue = make_queue(backend, note=note)
    async with running(queue):
        await queue.pause(until=backend.now() + 0.3)
        await queue.pause()
        await queue.add("note")
        await anyio.sleep(0.5)
        assert await queue.is_paused()
        assert ran == []
        await queue.resume()
        await wait_until_done(queue)


async def test_pausing_and_resuming_twice_is_harmless(backend: Backend) -> None:
    _, note = noting()
    queue = make_queue(backend, note=note)
    await queue.resume()
    assert not await queue.is_paused()
    for _ in range(2):
        await queue.pause()
    for _ in range(2):
        await queue.resume()
    await queue.add("note")
    await run_jobs(queue)


async def test_a_worker_that_missed_the_resume_goes_on(backend: Backend, twin: Backend) -> None:
    """Signals may be lost: here the queue is resumed by another program, consumer by consumer."""
    _, note = noting()
    queue = make_queue(backend, note=note)
    async with running(queue):
        await queue.pause()
        job_id = await queue.add("note")
        await twin.resume(queue._subjects.ready_log, tier_name(5))
        await queue.wait_for(job_id, timeout=PATIENCE)
        assert not await queue.is_paused()


async def test_a_queue_that_was_paused_by_another_program_is_paused(
    backend: Backend, twin: Backend
) -> None:
    ran, note = noting()
    queue = make_queue(backend, note=note)
    async with running(queue):
        await twin.pause(queue._subjects.ready_log, tier_name(5), backend.now() + 600)
        assert await queue.is_paused()
        job_id = await queue.add("note")
        await anyio.sleep(0.1)
        assert ran == []
        await queue.resume()
        await queue.wait_for(job_id, timeout=PATIENCE)


# -- cancel


async def test_a_waiting_job_that_is_cancelled_does_not_run(backend: Backend) -> None:
    ran, note = noting()
    queue = make_queue(backend, concurrency=1, note=note)
    jobs = [await queue.add("note", [number]) for number in range(3)]
    assert await queue.cancel_job(jobs[1]) is True
    assert await queue.get_job_state(jobs[1]) == "cancelled"
    assert await queue.is_job_cancelled(jobs[1])
    assert not await queue.is_job_cancelled(jobs[0])
    await run_jobs(queue)
    assert ran == [(0,), (2,)]
    await only(queue, completed=2, cancelled=1)
    with pytest.raises(JobFailed, match="cancelled"):
        await queue.wait_for(jobs[1], timeout=PATIENCE)


async def test_a_delayed_job_that_is_cancelled_does_not_run(backend: Backend) -> None:
    ran, note = noting()
    queue = make_queue(backend, note=note)
    cancelled = await queue.add("note", [1], delay=0.5)
    other = await queue.add("note", [2], delay=0.6)
    assert await queue.cancel_job(cancelled) is True
    async with running(queue):
        await queue.wait_for(other, timeout=PATIENCE)
    assert ran == [(2,)]
    assert await queue.get_job_state(cancelled) == "cancelled"
    assert await queue.list_delayed() == []


async def test_a_job_that_waits_for_its_retry_can_be_cancelled(backend: Backend) -> None:
    runs = 0

    async def fail() -> None:
        nonlocal runs
        runs += 1
        raise RuntimeError("no")

    queue = make_queue(backend, fail=fail)
    job_id = await queue.add("fail", retries=3, backoff=30)
    async with running(queue):
        await until(lambda: queue.get_job_state(job_id), lambda state: state == "delayed")
        assert await queue.cancel_job(job_id) is True
        assert await queue.get_job_state(job_id) == "cancelled"
    assert runs == 1


async def test_a_running_job_is_cancelled_within_a_second(backend: Backend, twin: Backend) -> None:
    gate = Gate()
    ended: list[str] = []

    async def work() -> None:
        try:
            await gate.enter()
        except BaseException as error:
            ended.append(type(error).__name__)
            raise

    queue, other = (
        make_queue(backend, concurrency=1, work=work, brief=lambda: "next"),
        make_queue(twin),
    )
    job_id = await queue.add("work", retries=3)
    async with running(queue):
        await gate.entered()
        later = await queue.add("brief")
        with anyio.fail_after(PATIENCE):
            assert await other.cancel_job(job_id) is True
            assert await queue.wait_for(later) == "next"  # its slot is free again
        assert ended == ["CancelledError"]
        assert await queue.get_job_state(job_id) == "cancelled"
    await only(queue, cancelled=1, completed=1)


async def test_a_cancel_that_was_not_heard_is_seen_at_the_next_heartbeat(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate()
    queue = make_queue(backend, concurrency=1, enter=gate.enter, brief=lambda: "next")

    async def lose_signal(_: str) -> None:
        return None

    monkeypatch.setattr(queue._controls, "signal_cancel", lose_signal)
    job_id = await queue.add("enter")
    async with running(queue):
        await gate.entered()
        assert await queue.cancel_job(job_id) is True
        assert await queue.wait_for(await queue.add("brief"), timeout=PATIENCE) == "next"
    assert await queue.is_job_cancelled(job_id)


async def test_a_sync_task_is_told_that_it_was_cancelled(backend: Backend) -> None:
    """Nothing can interrupt a thread.

    Its job is cancelled and its slot free, and the task may look.
    """
    started, finished, told = threading.Event(), threading.Event(), threading.Event()

    def work() -> str:
        job = current_job()
        started.set()
        while not job.cancel_requested and not finished.wait(0.005):
            pass
        if job.cancel_requested:
            told.set()
        return "result"

    queue = make_queue(backend, concurrency=1, work=work, brief=lambda: "next")
    job_id = await queue.add("work")
    try:
        async with running(queue):
            assert await anyio.to_thread.run_sync(started.wait, PATIENCE)
            assert await queue.cancel_job(job_id) is True
            assert await anyio.to_thread.run_sync(told.wait, 1)
            assert await queue.wait_for(await queue.add("brief"), timeout=PATIENCE) == "next"
        assert await queue.get_job_state(job_id) == "cancelled"
    finally:
        finished.set()


async def test_a_job_that_has_ended_cannot_be_cancelled(backend: Backend) -> None:
    async def fail() -> None:
        raise RuntimeError("no")

    queue = make_queue(backend, work=lambda: None, fail=fail)
    completed, failed = await queue.add("work"), await queue.add("fail")
    await run_jobs(queue)
    for job_id, state in ((completed, "completed"), (failed, "failed")):
        assert await queue.cancel_job(job_id) is False
        assert await queue.is_job_cancelled(job_id) is False
        assert await queue.get_job_state(job_id) == state


async def test_a_job_that_does_not_exist_cannot_be_cancelled(backend: Backend) -> None:
    queue = make_queue(backend)
    assert await queue.cancel_job("nothing") is False
    assert await queue.is_job_cancelled("nothing") is False


async def test_a_job_can_be_cancelled_once(backend: Backend) -> None:
    queue = make_queue(backend)
    job_id = await queue.add("work")
    assert [await queue.cancel_job(job_id) for _ in range(2)] == [True, False]


async def test_of_an_end_and_a_cancel_the_first_wins(backend: Backend, twin: Backend) -> None:
    """Whatever happens first: what `cancel_job` returns is what the job's state says."""

    async def work() -> None:
        await anyio.sleep(0.001)

    queue, other = make_queue(backend, concurrency=5, work=work), make_queue(twin)
    answers: dict[str, bool] = {}

    async def cancel(job_id: str) -> None:
        answers[job_id] = await other.cancel_job(job_id)

    async with running(queue), anyio.create_task_group() as group:
        for number in range(60):
            job_id = await queue.add("work")
            await anyio.sleep(number % 8 / 2000)
            group.start_soon(cancel, job_id)
    await run_jobs(queue)
    for job_id, cancelled in answers.items():
        assert (await queue.get_job_state(job_id) == "cancelled") is cancelled
    ended = sum(answers.values())
    await only(queue, cancelled=ended, completed=60 - ended)
    print(f"{ended} of 60 were cancelled")


async def test_a_cancelled_job_can_be_run_again_by_hand(backend: Backend) -> None:
    queue = make_queue(backend, work=lambda: "done")
    job_id = await queue.add("work")
    await queue.cancel_job(job_id)
    assert await queue.retry_job(job_id)
    async with running(queue):
        assert await queue.wait_for(job_id, timeout=PATIENCE) == "done"
        assert not await queue.is_job_cancelled(job_id)


async def test_job_ids_of_any_kind_can_be_cancelled(backend: Backend) -> None:
    gate = Gate()
    queue = make_queue(backend, concurrency=1, enter=gate.enter)
    job_id = await queue.add("enter", job_id="a b.*>% ü")
    async with running(queue):
        await gate.entered()
        assert await queue.cancel_job(job_id) is True
        with anyio.fail_after(PATIENCE):
            await outcome(queue, job_id)
        await until(queue.queue_stats, lambda stats: stats["active"] == 0)
    assert await queue.is_job_cancelled(job_id)
