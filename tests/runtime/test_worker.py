"""The promises of workers: slots, failures, retries, order, and a stop without losses.

The tests run on both backends.
"""

import asyncio
import re
import threading
from collections.abc import Callable
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from asyncmq_nats.backends import set_default_backend
from asyncmq_nats.backends.base import Backend, Settle, Write
from asyncmq_nats.exceptions import JobFailed, TaskModuleError, Unconfirmed
from asyncmq_nats.queues import Queue
from asyncmq_nats.runtime.registry import TASK_REGISTRY, TaskRegistry
from asyncmq_nats.settings import Settings
from asyncmq_nats.tasks import task
from asyncmq_nats.transitions.claim import Attempt, Disposition
from asyncmq_nats.transitions.finish import Lifecycle
from asyncmq_nats.workers import Worker, run_worker
from tests.receiver import holds, until
from tests.running import (
    PATIENCE,
    counted,
    has,
    lose_worker,
    make_queue,
    only,
    outcome,
    race,
    round_trips,
    run_jobs,
    running,
    wait_until_done,
)


@pytest.fixture
def settings() -> Settings:
    """A lease so long that only a hand-back explains a second run, and a short shutdown."""
    return Settings(stalled_after=600, publish_timeout=10, shutdown_timeout=0.1)


async def echo(value: Any = None) -> Any:
    return value


class Slots:
    """Tasks that count how many of them run at once; they end when enough have."""

    def __init__(self, expected: int) -> None:
        self.expected = expected
        self.now = 0
        self.most = 0
        self.full = anyio.Event()

    async def occupy(self) -> None:
        self.now += 1
        self.most = max(self.most, self.now)
        if self.now >= self.expected:
            self.full.set()
        await self.full.wait()
        await anyio.sleep(0.001)
        self.now -= 1


# -- slots


@pytest.mark.parametrize("concurrency", [1, 3, 20])
async def test_as_many_jobs_run_at_a_time_as_there_are_slots(
    backend: Backend, concurrency: int
) -> None:
    slots = Slots(concurrency)
    queue = make_queue(backend, concurrency=concurrency, occupy=slots.occupy)
    await queue.add_bulk(
        [{"task_id": "occupy", "priority": number % 2} for number in range(5 * concurrency + 10)]
    )
    await run_jobs(queue)
    assert slots.most == concurrency
    await has(queue, 5 * concurrency + 10, "completed")


async def test_jobs_that_arrive_one_by_one_do_not_overbook(backend: Backend) -> None:
    slots = Slots(2)
    queue = make_queue(backend, concurrency=2, occupy=slots.occupy)
    async with running(queue):
        for number in range(30):
            await queue.add("occupy", priority=number % 3)
        await wait_until_done(queue)
    assert slots.most == 2


async def test_workers_share_the_jobs(backend: Backend, twin: Backend) -> None:
    slots = Slots(4)
    queues = [make_queue(handle, concurrency=2, occupy=slots.occupy) for handle in (backend, twin)]
    async with running(queues[0]), running(queues[1]):
        await queues[0].add_bulk([{"task_id": "occupy"}] * 20)
        await wait_until_done(queues[0])
    assert slots.most == 4
    assert len({job["worker"] for job in await queues[0].list_jobs("completed")}) == 2


@pytest.mark.parametrize("concurrency", [0, -1])
async def test_a_worker_needs_a_slot(backend: Backend, concurrency: int) -> None:
    with pytest.raises(ValueError, match="concurrency"):
        await make_queue(backend, concurrency=concurrency).run()


async def test_sync_tasks_do_not_block_the_loop(backend: Backend) -> None:
    opened = threading.Event()

    def wait() -> bool:
        return opened.wait(PATIENCE)

    async def let_go() -> None:
        opened.set()

    queue = make_queue(backend, wait=wait, let_go=let_go)
    waiting = await queue.add("wait", priority=1)
    await queue.add("let_go", priority=2)
    async with running(queue):
        assert await queue.wait_for(waiting, timeout=PATIENCE) is True


async def test_sync_tasks_fill_all_slots(backend: Backend) -> None:
    meeting = threading.Barrier(5)
    queue = make_queue(backend, concurrency=5, meet=lambda: meeting.wait(PATIENCE) >= 0)
    await queue.add_bulk([{"task_id": "meet"}] * 10)
    await run_jobs(queue)
    assert [job["result"] for job in await queue.list_jobs("completed")] == [True] * 10


# -- failures


class Unprintable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


FAILURES: list[tuple[Callable[[], BaseException], str]] = [
    (lambda: ValueError("no"), "ValueError: no"),
    (lambda: SystemExit(3), "SystemExit: 3"),
    (lambda: ExceptionGroup("two", [ValueError("a"), TypeError("b")]), "ExceptionGroup: two"),
    (
        lambda: BaseExceptionGroup("two", [SystemExit(3), ValueError("a")]),
        "BaseExceptionGroup: two",
    ),
    (lambda: TimeoutError(), "TimeoutError"),
    (lambda: StopIteration(), "RuntimeError"),
    (lambda: AssertionError(), "AssertionError"),
    (lambda: Unprintable(), "Unprintable"),
    (lambda: ValueError("\ud800"), "ValueError"),
    (lambda: ValueError("x" * 3_000_000), "ValueError: x"),
    (lambda: ConnectionError("of the task, not ours"), "ConnectionError: of the task"),
]


@pytest.mark.parametrize(("make", "told"), FAILURES, ids=[told for _, told in FAILURES])
@pytest.mark.parametrize("kind", ["async", "sync"])
async def test_what_a_task_raises_fails_its_job_and_nothing_else(
    backend: Backend, make: Callable[[], BaseException], told: str, kind: str
) -> None:
    def fail() -> None:
        raise make()

    async def fail_async() -> None:
        fail()

    queue = make_queue(
        backend, concurrency=1, fail=fail_async if kind == "async" else fail, echo=echo
    )
    await _fails_and_goes_on(queue, told)


async def test_a_task_that_raises_cancelled_fails(backend: Backend) -> None:
    async def fail() -> None:
        raise asyncio.CancelledError("of my own")

    await _fails_and_goes_on(
        make_queue(backend, concurrency=1, fail=fail, echo=echo), "CancelledError: of my own"
    )


async def test_a_task_that_cancels_itself_fails(backend: Backend) -> None:
    async def fail() -> None:
        current = asyncio.current_task()
        assert current is not None
        current.cancel()
        await anyio.sleep_forever()

    async def use_timeouts() -> str:
        """Both kinds keep count of cancellations.

        One that is left over from the job before would confuse them.
        """
        with anyio.move_on_after(0.01) as scope:
            await anyio.sleep_forever()
        assert scope.cancelled_caught
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await asyncio.sleep(3600)
        async with asyncio.TaskGroup() as group:
            group.create_task(asyncio.sleep(0))
        current = asyncio.current_task()
        assert current is not None
        assert current.cancelling() == 0
        return "in time"

    queue = make_queue(backend, concurrency=1, fail=fail, echo=echo, timeouts=use_timeouts)
    await _fails_and_goes_on(queue, "CancelledError")
    job_id = await queue.add("fail")
    after = await queue.add("timeouts")
    async with running(queue):
        await outcome(queue, job_id)
        assert await queue.wait_for(after, timeout=PATIENCE) == "in time"


async def _fails_and_goes_on(queue: Queue, told: str) -> None:
    failing = await queue.add("fail")
    after = await queue.add("echo", ["on"])
    async with running(queue) as worker:
        with pytest.raises(JobFailed) as raised:
            await queue.wait_for(failing, timeout=PATIENCE)
        assert await queue.wait_for(after, timeout=PATIENCE) == "on"
        await counted(queue)
        assert {job["worker"] for job in await queue.get_jobs(["failed", "completed"])} == {
            worker.id
        }
        await wait_until_done(queue)
    assert (raised.value.error or "").startswith(told)
    assert raised.value.state == "failed"
    await has(queue, 1, "failed")


# -- retries


async def test_a_failing_job_runs_as_often_as_it_may(backend: Backend) -> None:
    runs: list[int] = []

    async def fail() -> None:
        runs.append(1)
        raise ValueError(f"attempt {len(runs)}")

    queue = make_queue(backend, fail=fail)
    job_id = await queue.add("fail", retries=2)
    async with running(queue):
        job = await outcome(queue, job_id)
        await wait_until_done(queue)
    assert len(runs) == 3
    assert (job["status"], job["retries"], job["max_retries"], job["last_error"]) == (
        "failed",
        3,
        2,
        "ValueError: attempt 3",
    )
    assert [(entry["attempt"], entry["error"]) for entry in job["errors"]] == [
        (n, f"ValueError: attempt {n}") for n in (1, 2, 3)
    ]
    assert all(
        "in fail" in entry["traceback"] and "Traceback" in entry["traceback"]
        for entry in job["errors"]
    )
    assert job["errors"][0]["at"] <= job["errors"][1]["at"] <= job["errors"][2]["at"]
    assert "attempt 3" in job["error_traceback"]


async def test_a_retry_may_succeed(backend: Backend) -> None:
    runs: list[int] = []

    async def flaky() -> str:
        runs.append(1)
        if len(runs) < 3:
            raise ValueError("not yet")
        return "done"

    queue = make_queue(backend, flaky=flaky)
    job_id = await queue.add("flaky", retries=5, job_id="mine", priority=1)
    async with running(queue):
        assert await queue.wait_for(job_id, timeout=PATIENCE) == "done"
        await wait_until_done(queue)
    job = await queue.get_job(job_id)
    assert job is not None
    assert (len(runs), job["retries"], len(job["errors"]), job["priority"]) == (3, 2, 2, 1)
    assert (job["last_error"], job["error_traceback"]) == (None, None)


async def test_a_retry_waits_for_its_backoff(backend: Backend) -> None:
    starts: list[float] = []

    async def fail() -> None:
        starts.append(backend.now())
        raise ValueError("no")

    queue = make_queue(backend, fail=fail)
    job_id = await queue.add("fail", retries=2, backoff=0.5)
    async with running(queue):
        await outcome(queue, job_id)
    assert len(starts) == 3
    assert starts[1] - starts[0] >= 0.5
    assert starts[2] - starts[1] >= 0.25


async def test_retries_of_a_large_job_with_long_errors_end(backend: Backend) -> None:
    async def fail(text: str) -> None:
        raise ValueError("😀" * 5_000)

    queue = make_queue(backend, fail=fail)
    room = backend.max_body - 64 * 1024 - 1_000
    job_id = await queue.add("fail", ["x" * room], retries=12)
    async with running(queue):
        job = await outcome(queue, job_id)
        await wait_until_done(queue)
    assert job["status"] == "failed"
    assert job["last_error"].startswith("ValueError: 😀")


# -- what is recorded


async def test_an_outcome_tells_who_ran_the_job_and_when(backend: Backend) -> None:
    queue = make_queue(backend, echo=echo)
    before = backend.now()
    job_id = await queue.add("echo", [1])
    async with running(queue) as worker:
        await queue.wait_for(job_id, timeout=PATIENCE)
        worker_id = worker.id
    job = await queue.get_job(job_id)
    assert job is not None
    assert job["worker"] == worker_id
    assert before <= job["created_at"] <= job["active_since"] <= job["finished_at"] <= backend.now()
    assert (job["retries"], job["errors"], job["stalls"], job["result"]) == (0, [], 0, 1)


async def test_every_worker_has_an_id_of_its_own(backend: Backend) -> None:
    queue = make_queue(backend)
    async with running(queue) as one, running(queue) as other:
        assert one.id
        assert one.id != other.id


# -- order


async def test_lower_priorities_run_first(backend: Backend) -> None:
    ran: list[tuple[int, int]] = []

    async def note(priority: int, number: int) -> None:
        ran.append((priority, number))

    queue = make_queue(backend, concurrency=1, note=note)
    priorities = [5, 1, 9, -3, 5, 0, 1, 1000, 5, -3]
    for number, priority in enumerate(priorities):
        await queue.add("note", [priority, number], priority=priority)
    await run_jobs(queue)
    assert ran == sorted(ran)
    assert len(ran) == len(priorities)


async def test_an_urgent_job_overtakes_those_that_wait(backend: Backend) -> None:
    ran: list[str] = []
    started, opened = anyio.Event(), anyio.Event()

    async def note(name: str) -> None:
        ran.append(name)
        if name == "first":
            started.set()
            await opened.wait()

    queue = make_queue(backend, concurrency=1, note=note)
    await queue.add(
        "note", ["warm-up"], priority=0
    )  # a worker hears of a priority that is new to the queue a moment after the producer
    await run_jobs(queue)
    async with running(queue):
        await queue.add("note", ["first"])
        with anyio.fail_after(PATIENCE):
            await started.wait()
        await queue.add_bulk(
            [{"task_id": "note", "args": [f"later {number}"]} for number in range(5)]
        )
        await queue.add("note", ["urgent"], priority=0)
        await round_trips(backend, "amq_work")  # the worker hears of it
        opened.set()
        await wait_until_done(queue)
    assert ran == ["warm-up", "first", "urgent", *[f"later {number}" for number in range(5)]]


async def test_jobs_of_a_new_priority_run_while_a_worker_runs(backend: Backend) -> None:
    queue = make_queue(backend, echo=echo)
    async with running(queue):
        for priority in (7, -1, 0, 2**40):
            assert (
                await queue.wait_for(
                    await queue.add("echo", [priority], priority=priority), timeout=PATIENCE
                )
                == priority
            )


# -- stopping


class Sleeper:
    """A task that says that it runs and ends only when cancelled, but the last time."""

    def __init__(self) -> None:
        self.started = anyio.Event()
        self.opened = anyio.Event()
        self.runs = 0

    async def sleep(self) -> str:
        self.runs += 1
        self.started.set()
        await self.opened.wait()
        return f"run {self.runs}"


async def test_a_worker_that_stops_lets_its_job_finish(backend: Backend) -> None:
    sleeper = Sleeper()
    queue = make_queue(backend, concurrency=1, sleep=sleeper.sleep)
    jobs = [await queue.add("sleep") for _ in range(3)]
    worker = Worker(queue)
    async with anyio.create_task_group() as group:
        await group.start(worker.run)
        with anyio.fail_after(PATIENCE):
            await sleeper.started.wait()
        worker.stop()
        sleeper.opened.set()
    assert sleeper.runs == 1
    assert await queue.get_job_result(jobs[0]) == "run 1"
    await run_jobs(queue)
    assert [await queue.get_job_result(job_id) for job_id in jobs] == ["run 1", "run 2", "run 3"]


async def test_a_cancelled_worker_hands_its_jobs_to_another(
    backend: Backend, twin: Backend
) -> None:
    sleeper = Sleeper()
    queue, other = make_queue(backend, sleep=sleeper.sleep), make_queue(twin, sleep=sleeper.sleep)
    jobs = [await queue.add("sleep") for _ in range(5)]
    async with anyio.create_task_group() as group:
        await group.start(queue.run)
        await until(queue.queue_stats, lambda stats: stats["active"] == 3)
        with anyio.fail_after(PATIENCE):
            await sleeper.started.wait()
        group.cancel_scope.cancel()
    assert sleeper.runs == 3
    sleeper.opened.set()
    await run_jobs(other)
    assert sleeper.runs == 8
    for job_id in jobs:
        job = await queue.get_job(job_id)
        assert job is not None
        assert (job["status"], job["stalls"], job["retries"], job["errors"]) == (
            "completed",
            0,
            0,
            [],
        )


async def test_a_worker_may_be_cancelled_by_asyncio(backend: Backend) -> None:
    sleeper = Sleeper()
    queue = make_queue(backend, sleep=sleeper.sleep)
    job_id = await queue.add("sleep")
    run = asyncio.create_task(queue.run())
    with anyio.fail_after(PATIENCE):
        await sleeper.started.wait()
        run.cancel()
        with pytest.raises(asyncio.CancelledError):
            await run
    sleeper.opened.set()
    await run_jobs(queue)
    assert await queue.get_job_result(job_id) == "run 2"


async def test_a_sync_task_is_handed_back_too(backend: Backend, twin: Backend) -> None:
    started, opened = threading.Event(), threading.Event()
    runs: list[int] = []

    def block() -> int:
        runs.append(1)
        started.set()
        opened.wait(PATIENCE)
        return len(runs)

    queue, other = make_queue(backend, block=block), make_queue(twin, block=block)
    job_id = await queue.add("block")
    async with anyio.create_task_group() as group:
        await group.start(queue.run)
        await anyio.to_thread.run_sync(started.wait, PATIENCE)
        group.cancel_scope.cancel()
    async with running(other):
        await until(lambda: _length_of(runs), lambda length: length == 2)
        opened.set()
        assert await other.wait_for(job_id, timeout=PATIENCE) == 2


async def _length_of(items: list[int]) -> int:
    return len(items)


async def test_jobs_added_after_a_worker_has_stopped_wait(backend: Backend) -> None:
    queue = make_queue(backend, echo=echo)
    await run_jobs(queue)
    jobs = [await queue.add("echo", [number]) for number in range(5)]
    await only(queue, waiting=5)
    await run_jobs(queue)
    for job_id in jobs:
        job = await queue.get_job(job_id)
        assert job is not None
        assert (job["status"], job["stalls"]) == ("completed", 0)


async def test_a_queue_may_be_run_again_and_again(backend: Backend) -> None:
    queue = make_queue(backend, echo=echo)
    for number in range(4):
        job_id = await queue.add("echo", [number])
        async with running(queue):
            assert await queue.wait_for(job_id, timeout=PATIENCE) == number


async def test_stopping_an_idle_worker_is_quick_and_harmless(backend: Backend) -> None:
    worker = Worker(make_queue(backend))
    worker.stop()
    async with anyio.create_task_group() as group:
        await group.start(worker.run)
        worker.stop()
        worker.stop()


async def test_nothing_is_lost_when_workers_come_and_go(backend: Backend, twin: Backend) -> None:
    async def work() -> None:
        await anyio.sleep(0.002)

    queues = [make_queue(handle, concurrency=4, work=work) for handle in (backend, twin)]
    await queues[0].add_bulk([{"task_id": "work"}] * 300)
    for number in range(4):
        async with anyio.create_task_group() as group:
            await group.start(queues[number % 2].run)
            await anyio.sleep(0.05)
            group.cancel_scope.cancel()
    await run_jobs(queues[0])
    jobs = await queues[0].list_jobs("completed")
    assert len(jobs) == 300
    assert {job["stalls"] for job in jobs} == {0}


# -- leases


class TestLeases:
    @pytest.fixture
    def settings(self) -> Settings:
        return Settings(stalled_after=1.0)

    async def test_a_job_longer_than_its_lease_runs_once(
        self, backend: Backend, twin: Backend
    ) -> None:
        runs: list[int] = []

        async def long() -> None:
            runs.append(1)
            await anyio.sleep(1.6)

        queue, other = make_queue(backend, long=long), make_queue(twin, long=long)
        job_id = await queue.add("long")
        async with running(queue), running(other):
            await queue.wait_for(job_id, timeout=PATIENCE)
            await wait_until_done(queue)
        assert len(runs) == 1

    async def test_a_job_whose_lease_lapses_while_its_worker_lives_is_not_run_beside_itself(
        self, backend: Backend
    ) -> None:
        """A stopped process, or one that got no time.

        The server takes the worker for lost and gives it its own job again.
        """
        runs: list[int] = []
        go = anyio.Event()

        async def wait() -> str:
            runs.append(1)
            await go.wait()
            return "once"

        queue = make_queue(backend, wait=wait, echo=echo)
        job_id = await queue.add("wait")
        async with running(queue) as worker:
            await holds(lambda: runs == [1])
            runner = worker._runner
            assert runner is not None
            [run] = runner._slots.running
            first = run.attempt.delivery
            first.abandon()  # its lease is not extended any more
            await holds(lambda: run.attempt.delivery is not first)
            assert await queue.wait_for(await queue.add("echo", ["on"]), timeout=PATIENCE) == "on"
            go.set()
            assert await queue.wait_for(job_id, timeout=PATIENCE) == "once"
            await wait_until_done(queue)
        job = await queue.get_job(job_id)
        assert job is not None
        assert (runs, job["stalls"]) == ([1], 0)

    async def test_a_job_whose_lease_lapses_while_its_end_is_confirmed_does_not_run_again(
        self, backend: Backend, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Not even if the outcome is not stored yet when it comes again."""
        runs: list[int] = []
        unsettled: list[Callable[[], None]] = []

        async def work() -> None:
            runs.append(1)

        def send(log: str, write: Write, settle: Settle, *, timeout: float | None = None) -> None:
            if ".done." in write.subject:
                unsettled.append(lambda: real(log, write, settle, timeout=timeout))
            else:
                real(log, write, settle, timeout=timeout)

        real = backend.send
        monkeypatch.setattr(backend, "send", send)
        queue = make_queue(backend, work=work)
        job_id = await queue.add("work")
        async with running(queue) as worker:
            await holds(lambda: len(unsettled) == 1)
            assert worker._runner is not None
            completer = worker._runner._completer
            [attempt] = completer._attempts.values()
            attempt.delivery.abandon()
            await holds(lambda: completer.leases_lost == 1)
            unsettled[0]()
            await queue.wait_for(job_id, timeout=PATIENCE)
            await only(queue, completed=1)
        assert runs == [1]

    @pytest.mark.parametrize("faults", [0, 1])
    async def test_a_job_that_comes_again_while_it_is_looked_at_runs_once(
        self, backend: Backend, monkeypatch: pytest.MonkeyPatch, faults: int
    ) -> None:
        """If the look fails, the lease that it got meanwhile runs out."""
        runs: list[int] = []
        looking, go = anyio.Event(), anyio.Event()
        inspect = Lifecycle.inspect

        async def look_slowly(self: Lifecycle, attempt: Attempt) -> Disposition | None:
            nonlocal faults
            looking.set()
            await go.wait()
            if faults:
                faults -= 1
                raise Unconfirmed("a look", 1.0, read=True)
            return await inspect(self, attempt)

        async def work() -> None:
            runs.append(1)

        monkeypatch.setattr(Lifecycle, "inspect", look_slowly)
        queue = make_queue(backend, work=work)
        job_id = await queue.add("work")
        await lose_worker(queue)
        with anyio.fail_after(PATIENCE):
            async with running(queue) as worker:
                await looking.wait()
                assert worker._runner is not None
                completer = worker._runner._completer
                [attempt] = completer._attempts.values()
                attempt.delivery.abandon()
                await holds(lambda: completer.leases_lost == 1)
                go.set()
                await queue.wait_for(job_id, timeout=PATIENCE)
                await only(queue, completed=1)
                assert completer.pending == 0
        assert runs == [1]

    async def test_a_job_whose_worker_is_lost_runs_again(self, backend: Backend) -> None:
        queue = make_queue(backend, echo=echo)
        job_id = await queue.add("echo", ["survived"])
        await lose_worker(queue)
        async with running(queue):
            assert await queue.wait_for(job_id, timeout=PATIENCE) == "survived"
        job = await queue.get_job(job_id)
        assert job is not None
        # It never ran: only the loss of a worker that ran it counts.
        assert (job["stalls"], job["retries"], job["errors"]) == (0, 0, [])

    async def test_a_job_whose_worker_is_lost_while_it_runs_has_stalled(
        self, backend: Backend
    ) -> None:
        queue = make_queue(backend, echo=echo)
        job_id = await queue.add("echo", ["survived"])
        await lose_worker(queue, runs=True)
        async with running(queue):
            assert await queue.wait_for(job_id, timeout=PATIENCE) == "survived"
        job = await queue.get_job(job_id)
        assert job is not None
        assert (job["stalls"], job["retries"], job["errors"]) == (1, 0, [])

    async def test_suspects_that_could_not_be_handed_back_in_time_come_back_after_their_lease(
        self, backend: Backend, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        go = anyio.Event()
        queue = make_queue(backend, wait=go.wait)
        jobs = [await queue.add("wait") for _ in range(3)]
        for _ in jobs:
            await lose_worker(queue, runs=True)
        async with running(queue) as worker:
            assert worker._runner is not None
            slots = worker._runner._slots
            await holds(lambda: len(slots._suspects) >= 1)
            with monkeypatch.context() as patch:
                patch.setattr(Lifecycle, "hand_back", lambda *_: anyio.sleep_forever())
                with anyio.move_on_after(0.05):
                    await slots.hand_back_suspects()
            go.set()
            for job_id in jobs:
                await queue.wait_for(job_id, timeout=PATIENCE)

    @pytest.mark.parametrize(
        ("fault", "line"),
        [
            (RuntimeError("a fault of ours"), "the worker itself failed on a delivery"),
            (Unconfirmed("a result", 1.0), "its result is not stored"),
        ],
    )
    async def test_a_fault_of_the_worker_itself_does_not_keep_its_job(
        self,
        fault: Exception,
        line: str,
        backend: Backend,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        complete, faults = Lifecycle.complete, [fault]

        def fail_once(self: Lifecycle, *args: Any) -> None:
            if faults:
                raise faults.pop()
            complete(self, *args)

        monkeypatch.setattr(Lifecycle, "complete", fail_once)
        queue = make_queue(backend, echo=echo)
        job_id = await queue.add("echo", ["again"])
        async with running(queue) as worker:
            assert await queue.wait_for(job_id, timeout=PATIENCE) == "again"
            assert re.search(f"{line}.* will be redelivered", caplog.text)
            assert worker._runner is not None
            runner = worker._runner
            await holds(lambda: runner._completer.pending == 0)

    async def test_jobs_that_came_together_start_before_the_first_result_is_written(
        self, backend: Backend, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        complete, steps = Lifecycle.complete, list[str]()

        async def note() -> None:
            steps.append("start")

        def note_result(self: Lifecycle, *args: Any) -> None:
            steps.append("result")
            complete(self, *args)

        monkeypatch.setattr(Lifecycle, "complete", note_result)
        queue = make_queue(backend, concurrency=3, note=note)
        async with running(queue) as worker:
            assert worker._runner is not None
            slots = worker._runner._slots
            slots._is_open = False  # until all of them are here
            jobs = await queue.add_bulk([{"task_id": "note"}] * 3)
            await holds(lambda: len(slots.fetcher._buffer.heap) == 3)
            slots._is_open = True
            slots.fill()
            for job_id in jobs:
                await queue.wait_for(job_id, timeout=PATIENCE)
        assert steps == ["start"] * 3 + ["result"] * 3

    async def test_an_attempt_whose_rejection_fails_is_not_waited_for(
        self, backend: Backend, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        reject, faults = Lifecycle.reject, [Unconfirmed("a rejection", 1.0)]

        async def fail_once(self: Lifecycle, *args: Any) -> None:
            if faults:
                raise faults.pop()
            await reject(self, *args)

        async def fail() -> None:
            raise ValueError("no")

        monkeypatch.setattr(Lifecycle, "reject", fail_once)
        queue = make_queue(backend, fail=fail)
        await queue._assets.declare_all()
        body = (
            b'{"v":1,"id":"x","task":"fail","args":[],"kwargs":{},'
            b'"created_at":1.0,"max_retries":"many"}'
        )
        await backend.write("amq_work", Write("amq.work.ready.5.x", body))
        async with running(queue) as worker:
            with pytest.raises(JobFailed, match="max_retries"):
                await queue.wait_for("x", timeout=PATIENCE)
            assert worker._runner is not None
            runner = worker._runner
            await holds(lambda: runner._fetcher.busy == 0)
            assert runner._completer.pending == 0


class TestStallLimit:
    @pytest.fixture
    def settings(self) -> Settings:
        return Settings(stalled_after=1.0, max_stalls=1)

    async def test_a_job_that_loses_its_workers_fails_at_the_limit(self, backend: Backend) -> None:
        runs: list[int] = []

        async def never() -> None:
            runs.append(1)

        queue = make_queue(backend, never=never, echo=echo)
        job_id = await queue.add("never", retries=5)
        await lose_worker(queue, runs=True)
        async with running(queue):
            with pytest.raises(JobFailed, match="stalled: its worker was lost"):
                await queue.wait_for(job_id, timeout=PATIENCE)
            assert await queue.wait_for(await queue.add("echo", ["on"]), timeout=PATIENCE) == "on"
        assert runs == []


# -- ways to run


async def test_a_worker_runs_with_its_queues_concurrency(backend: Backend) -> None:
    slots = Slots(2)
    queue = make_queue(backend, concurrency=2, occupy=slots.occupy)
    await queue.add_bulk([{"task_id": "occupy"}] * 6)
    async with anyio.create_task_group() as group:
        worker = Worker(queue)
        await group.start(worker.run)
        await wait_until_done(queue)
        worker.stop()
    assert slots.most == 2


async def test_a_worker_of_a_name_takes_the_default_backend(backend: Backend) -> None:
    set_default_backend(backend)
    try:
        worker = Worker("work", concurrency=7)
    finally:
        set_default_backend(None)
    assert worker.queue.backend is backend
    assert (worker.queue.name, worker.queue.concurrency, worker.id) == ("work", 7, None)


async def test_run_worker_runs_the_tasks_of_the_default_registry(backend: Backend) -> None:
    task("work", name="tests.run_worker")(echo)
    queue = Queue("work", backend)
    job_id = await queue.add("tests.run_worker", ["ran"])
    async with anyio.create_task_group() as group:
        group.start_soon(run_worker, "work", backend, 1)
        assert await queue.wait_for(job_id, timeout=PATIENCE) == "ran"
        group.cancel_scope.cancel()


class TestTaskModules:
    @pytest.fixture
    def settings(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
        (tmp_path / "amq_test_tasks.py").write_text(
            "from asyncmq_nats.tasks import task\n"
            "@task('work', name='tests.imported')\n"
            "async def imported():\n    return 'imported'\n"
        )
        monkeypatch.syspath_prepend(str(tmp_path))
        return Settings(tasks=("amq_test_tasks",), shutdown_timeout=0.1)

    async def test_task_modules_are_imported_before_a_worker_runs(self, backend: Backend) -> None:
        queue = Queue("work", backend)
        job_id = await queue.add("tests.imported")
        async with running(queue):
            assert await queue.wait_for(job_id, timeout=PATIENCE) == "imported"
        assert "tests.imported" in TASK_REGISTRY


class TestTaskPackages:
    @pytest.fixture
    def settings(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
        package = tmp_path / "amq_test_package"
        (package / "inner").mkdir(parents=True)
        for path in ("__init__", "first", "inner/__init__", "inner/second"):
            name = path.replace("/", ".")
            (package / f"{path}.py").write_text(
                "from asyncmq_nats.tasks import task\n"
                f"@task('work', name='tests.package.{name}')\n"
                f"async def run():\n    return '{name}'\n"
            )
        (package / "__main__.py").write_text("raise SystemExit('a program')")
        monkeypatch.syspath_prepend(str(tmp_path))
        return Settings(tasks=("amq_test_package",), shutdown_timeout=0.1)

    async def test_of_a_package_every_module_is_imported(self, backend: Backend) -> None:
        queue = Queue("work", backend)
        async with running(queue):
            for name in ("__init__", "first", "inner.__init__", "inner.second"):
                job_id = await queue.add(f"tests.package.{name}")
                assert await queue.wait_for(job_id, timeout=PATIENCE) == name


class TestBrokenTaskModules:
    @pytest.fixture(params=["amq_no_such_module", "amq_broken", "amq_broken_package"])
    def module(
        self, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> str:
        (tmp_path / "amq_broken.py").write_text("raise RuntimeError('no database')")
        (tmp_path / "amq_broken_package").mkdir()
        (tmp_path / "amq_broken_package" / "__init__.py").write_text("")
        (tmp_path / "amq_broken_package" / "inner.py").write_text("import amq_no_such_module")
        monkeypatch.syspath_prepend(str(tmp_path))
        return str(request.param)

    @pytest.fixture
    def settings(self, module: str) -> Settings:
        return Settings(tasks=(module,))

    async def test_a_worker_does_not_start_without_its_tasks(
        self, backend: Backend, module: str
    ) -> None:
        queue = Queue("work", backend)
        job_id = await queue.add("tests.imported")
        with pytest.raises(TaskModuleError, match=rf"'{module}.*does not start") as raised:
            await Worker(queue).run()
        assert raised.value.__cause__ is not None
        assert await queue.get_job_state(job_id) == "waiting"


async def test_two_queues_run_side_by_side(backend: Backend) -> None:
    registry = TaskRegistry()
    registry.register(echo, queue="any", name="echo")
    queues = [Queue(name, backend, registry=registry, any_task=True) for name in ("one", "two")]

    async def add_and_wait(queue: Queue) -> Any:
        return await queue.wait_for(await queue.add("echo", [queue.name]), timeout=PATIENCE)

    async with running(queues[0]), running(queues[1]):
        assert await race(lambda: add_and_wait(queues[0]), lambda: add_and_wait(queues[1])) == [
            "one",
            "two",
        ]


async def test_a_task_may_be_an_object_with_an_async_call(backend: Backend) -> None:
    class Adder:
        def __init__(self, offset: int) -> None:
            self.offset = offset

        async def __call__(self, value: int) -> int:
            await anyio.lowlevel.checkpoint()
            return value + self.offset

    queue = make_queue(backend, add=Adder(2))
    job_id = await queue.add("add", [40])
    async with running(queue):
        assert await queue.wait_for(job_id, timeout=PATIENCE) == 42


async def test_a_foreign_job_that_begins_like_ours_may_lack_what_has_a_default(
    backend: Backend,
) -> None:
    queue = make_queue(backend, echo=echo)
    await queue._assets.declare_all()  # the queue is there
    await backend.write(
        "amq_work",
        Write("amq.work.ready.5.x", b'{"v":1,"id":"x","task":"echo","args":["created_at"]}'),
    )
    async with running(queue):
        assert await queue.wait_for("x", timeout=PATIENCE) == "created_at"
    job = await queue.get_job("x")
    assert job is not None
    assert abs(job["created_at"] - backend.now()) < 60


async def test_a_field_that_only_a_failure_needs_may_be_malformed_and_then_fails_the_job(
    backend: Backend,
) -> None:
    async def fail() -> None:
        raise ValueError("no")

    queue = make_queue(backend, fail=fail, echo=echo)
    await queue._assets.declare_all()  # the queue is there
    for task_id in ("fail", "echo"):
        job = (
            b'{"v":1,"id":"%b","task":"%b","args":[],"kwargs":{},'
            b'"created_at":1.0,"max_retries":"many"}' % ((task_id.encode(),) * 2)
        )
        await backend.write("amq_work", Write(f"amq.work.ready.5.{task_id}", job))
    async with running(queue):
        with pytest.raises(JobFailed, match="max_retries"):
            await queue.wait_for("fail", timeout=PATIENCE)
        await wait_until_done(queue)
    await only(queue, completed=1, failed=1)


# -- a worker that ends otherwise than it should


class Panic(BaseException):
    """As a panic in an extension written in Rust arrives in Python."""


@pytest.mark.parametrize("threaded", [False, True])
async def test_more_than_an_exception_fails_the_job_and_not_the_worker(
    backend: Backend, threaded: bool
) -> None:
    async def panic() -> None:
        raise Panic("in an extension")

    def panic_in_thread() -> None:
        raise Panic("in an extension")

    queue = make_queue(backend, panic=panic_in_thread if threaded else panic, echo=echo)
    await _fails_and_goes_on_after(queue, "panic", "Panic: in an extension")


async def _fails_and_goes_on_after(queue: Queue, task_id: str, told: str) -> None:
    job_id = await queue.add(task_id)
    async with running(queue):
        with pytest.raises(JobFailed, match=told):
            await queue.wait_for(job_id, timeout=PATIENCE)
        assert await queue.wait_for(await queue.add("echo", ["on"]), timeout=PATIENCE) == "on"


@pytest.mark.parametrize("steps", [*range(1, 12), 15, 20, 30, 50])
async def test_a_worker_that_is_cancelled_while_it_starts_ends(
    backend: Backend, steps: int
) -> None:
    called: list[str] = []
    queue = make_queue(backend, echo=echo)
    queue.on_startup(lambda: called.append("start"))
    queue.on_shutdown(lambda: called.append("stop"))
    with anyio.fail_after(PATIENCE):
        async with anyio.create_task_group() as group:
            group.start_soon(queue.run)
            for _ in range(steps):
                await anyio.lowlevel.checkpoint()
            group.cancel_scope.cancel()
    assert called in ([], ["start", "stop"])
    await run_jobs(queue)


async def test_when_a_loop_of_a_worker_fails_its_jobs_run_elsewhere_at_once(
    backend: Backend, twin: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[str] = []
    go = anyio.Event()

    async def wait(worker: str) -> str:
        runs.append(worker)
        await go.wait()
        return worker

    async def fail(_: object) -> None:
        raise RuntimeError("a fault of ours")

    backend.settings = twin.settings = Settings(
        stalled_after=600, heartbeat_interval=0.5, shutdown_timeout=0.2
    )
    first = make_queue(backend, concurrency=2, wait=partial(wait, "first"))
    second = make_queue(twin, concurrency=5, wait=partial(wait, "second"))
    ids = [await first.add("wait") for _ in range(5)]
    with monkeypatch.context() as patch:
        patch.setattr("asyncmq_nats.transitions.finish.Lifecycle.trim", fail)
        with pytest.raises(RuntimeError, match="a fault of ours"):
            await first.run()
    assert runs == ["first"] * 2
    async with running(second):
        go.set()
        assert [await second.wait_for(job_id, timeout=PATIENCE) for job_id in ids] == ["second"] * 5
    await counted(second)
    assert {job["stalls"] for job in await second.get_completed()} == {0}


# -- each job in a task and a context of its own

tenant: ContextVar[str] = ContextVar("tenant", default="none")


async def test_a_context_variable_that_a_job_sets_reaches_no_other_job(backend: Backend) -> None:
    async def serve(name: str) -> str:
        seen = tenant.get()
        tenant.set(name)
        return seen

    def serve_in_thread(name: str) -> str:
        seen = tenant.get()
        tenant.set(name)
        return seen

    queue = make_queue(backend, concurrency=1, serve=serve, serve_in_thread=serve_in_thread)
    names = ["ada", "bob", "eve"]
    ids = [await queue.add(task, [name]) for task in ("serve", "serve_in_thread") for name in names]
    await run_jobs(queue)
    assert [await queue.get_job_result(job_id) for job_id in ids] == ["none"] * 6


async def test_each_job_has_an_asyncio_task_of_its_own(backend: Backend) -> None:
    tasks: list[object] = []

    async def note() -> None:
        tasks.append(asyncio.current_task())

    queue = make_queue(backend, concurrency=1, note=note)
    for _ in range(4):
        await queue.add("note")
    await run_jobs(queue)
    assert len({id(task) for task in tasks}) == 4


async def test_a_cancellation_that_a_job_left_behind_hits_no_other_job(backend: Backend) -> None:
    async def leave_a_bomb() -> str:
        task = asyncio.current_task()
        assert task is not None
        asyncio.get_running_loop().call_later(0.05, task.cancel)
        return "left"

    async def innocent() -> str:
        await anyio.sleep(0.2)
        return "unharmed"

    queue = make_queue(backend, concurrency=1, leave_a_bomb=leave_a_bomb, innocent=innocent)
    ids = [await queue.add("leave_a_bomb"), await queue.add("innocent")]
    await run_jobs(queue)
    results = [await queue.get_job_result(job_id) for job_id in ids]
    assert results == ["left", "unharmed"]
    assert [await queue.get_job_state(job_id) for job_id in ids] == ["completed"] * 2


@pytest.mark.parametrize("processes", [0, -1])
async def test_a_worker_has_a_process_at_least(backend: Backend, processes: int) -> None:
    with pytest.raises(ValueError, match=f"processes must be at least 1, not {processes}"):
        Worker(make_queue(backend), processes=processes)
