"""Retries and failures of a job.

Attempts and their errors, backoffs, timeouts, and retries by hand; on both backends.
"""

import threading
import time
from collections.abc import Callable
from typing import Any

import anyio
import pytest

from asyncmq_nats.backends.base import Backend
from asyncmq_nats.exceptions import Fail, Retry
from asyncmq_nats.jobs import Backoff
from asyncmq_nats.queues import Queue
from asyncmq_nats.retries import BackoffFunction, Failure
from asyncmq_nats.runtime.registry import TaskRegistry
from asyncmq_nats.settings import Settings
from asyncmq_nats.tasks import task
from asyncmq_nats.transitions.finish import Lifecycle
from tests.receiver import Receiver, until
from tests.running import PATIENCE, has, make_queue, only, outcome, running, wait_until_done

HOUR = 3600.0
EARLY = 0.01
"""Seconds by which a client's idea of the server's time may be off."""


@pytest.fixture
def settings() -> Settings:
    return Settings(stalled_after=600, publish_timeout=10, shutdown_timeout=0.1)


class Flaky:
    """A task that fails the first `failures` times, and notes when each attempt starts."""

    def __init__(
        self,
        backend: Backend,
        failures: int = 1_000,
        error: Callable[[], Exception] = lambda: ValueError("no"),
    ) -> None:
        self._backend = backend
        self.failures = failures
        self.error = error
        self.starts: list[float] = []

    async def run(self) -> str:
        self.starts.append(self._backend.now())
        if len(self.starts) <= self.failures:
            raise self.error()
        return f"attempt {len(self.starts)}"

    @property
    def gaps(self) -> list[float]:
        return [
            later - earlier for earlier, later in zip(self.starts, self.starts[1:], strict=False)
        ]


@pytest.fixture
def flaky(backend: Backend) -> Flaky:
    return Flaky(backend)


@pytest.fixture
def queue(backend: Backend, flaky: Flaky) -> Queue:
    return make_queue(backend, flaky=flaky.run)


async def ended(queue: Queue, job_id: str) -> dict[str, Any]:
    """Run the queue's jobs until this one has ended, and return it."""
    async with running(queue):
        job = await outcome(queue, job_id)
        await wait_until_done(queue)
    return job


async def planned_delay(queue: Queue) -> float:
    """Run the queue's only job until it waits for its retry, and return how long it is to wait."""
    async with running(queue):
        [info] = await until(queue.list_delayed, lambda found: len(found) == 1)
    failed_at: float = info.payload["errors"][-1]["at"]
    return info.run_at - failed_at


# -- backoff


@pytest.mark.parametrize(
    ("backoff", "gaps"),
    [
        (None, [0.0, 0.0]),
        (0, [0.0, 0.0]),
        (0.6, [0.6, 0.36]),
        (Backoff("fixed", delay=0.2), [0.2, 0.2]),
        (Backoff("exponential", delay=0.1, factor=3), [0.1, 0.3]),
        (Backoff("exponential", delay=0.1, factor=100, maximum=0.3), [0.1, 0.3]),
        ({"kind": "fixed", "delay": 0.2}, [0.2, 0.2]),
    ],
)
async def test_an_attempt_waits_for_its_backoff(
    queue: Queue, flaky: Flaky, backoff: Any, gaps: list[float]
) -> None:
    job = await ended(queue, await queue.add("flaky", retries=2, backoff=backoff))
    assert job["status"] == "failed"
    assert len(flaky.gaps) == 2
    assert all(
        expected - EARLY <= gap <= expected + 2
        for gap, expected in zip(flaky.gaps, gaps, strict=True)
    )


@pytest.mark.parametrize(
    ("backoff", "lowest", "highest"),
    [
        (2, 2, 2),
        (60.0, 60, 60),
        (Backoff(), 1, 1),
        (Backoff("exponential", delay=50, maximum=40), 40, 40),
        (Backoff("fixed", delay=100, jitter=0.25), 75, 100),
        (Backoff("fixed", delay=1e300), 365 * 86_400, 365 * 86_400),
    ],
)
async def test_a_long_backoff_is_planned_as_described(
    queue: Queue, backoff: float | Backoff, lowest: float, highest: float
) -> None:
    await queue.add("flaky", retries=1, backoff=backoff)
    assert lowest - 0.1 <= await planned_delay(queue) <= highest + 0.5


async def test_jitter_parts_jobs_that_failed_together(queue: Queue) -> None:
    await queue.add_bulk(
        [
            {"task_id": "flaky", "retries": 1, "backoff": Backoff("fixed", delay=HOUR, jitter=1)}
            for _ in range(20)
        ]
    )
    async with running(queue):
        waiting = await until(queue.list_delayed, lambda found: len(found) == 20)
    assert len({round(info.run_at) for info in waiting}) > 10


@pytest.mark.parametrize("backoff", [-1, float("nan"), "soon", Backoff])
async def test_a_backoff_that_is_none_is_refused(queue: Queue, backoff: Any) -> None:
    with pytest.raises(ValueError, match="backoff"):
        await queue.add("flaky", retries=1, backoff=backoff)
    await has(queue, 0)


class TestOfTasks:
    """The options of `@task` for its jobs."""

    @pytest.fixture
    def registry(self) -> TaskRegistry:
        return TaskRegistry()

    @pytest.fixture
    def queue(self, backend: Backend, registry: TaskRegistry) -> Queue:
        return Queue("work", backend, registry=registry)

    @pytest.mark.parametrize(
        ("backoff", "planned"),
        [
            (lambda retry: 100.0 * retry, 100),
            (lambda: 7, 7),
            (Backoff("fixed", delay=50), 50),
            (30, 30),
        ],
        ids=["function", "function of nothing", "Backoff", "number"],
    )
    async def test_a_task_says_how_its_jobs_back_off(
        self,
        queue: Queue,
        backend: Backend,
        registry: TaskRegistry,
        backoff: float | Backoff | BackoffFunction,
        planned: float,
    ) -> None:
        @task("work", retries=1, backoff=backoff, registry=registry)
        async def fail() -> None:
            raise ValueError("no")

        await fail.enqueue(backend=backend)
        assert planned - 0.1 <= await planned_delay(queue) <= planned + 0.5

    async def test_a_function_is_given_the_number_of_the_retry(
        self, queue: Queue, backend: Backend, registry: TaskRegistry
    ) -> None:
        asked: list[int] = []

        def backoff(retry: int) -> float:
            asked.append(retry)
            return 0.0

        @task("work", retries=3, backoff=backoff, registry=registry)
        async def fail() -> None:
            raise ValueError("no")

        job = await ended(queue, await fail.enqueue(backend=backend))
        assert (job["status"], asked) == ("failed", [1, 2, 3])

    @pytest.mark.parametrize(
        "wrong",
        [
            lambda retry: 1 / 0,
            lambda retry: "soon",
            lambda retry: float("nan"),
            lambda one, two, three: 1.0,
        ],
    )
    async def test_a_function_that_fails_harms_nothing(
        self,
        queue: Queue,
        backend: Backend,
        registry: TaskRegistry,
        wrong: Any,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        @task("work", retries=1, backoff=wrong, registry=registry)
        async def fail() -> None:
            raise ValueError("no")

        await fail.enqueue(backend=backend)
        assert 1.4 <= await planned_delay(queue) <= 2.0
        assert "so the default backoff counts" in caplog.text

    async def test_a_jobs_own_backoff_comes_before_that_of_its_task(
        self, queue: Queue, backend: Backend, registry: TaskRegistry
    ) -> None:
        @task("work", name="fail", retries=1, backoff=lambda _: 500.0, registry=registry)
        async def fail() -> None:
            raise ValueError("no")

        await queue.add("fail", retries=1, backoff=20)
        assert 19.9 <= await planned_delay(queue) <= 20.5

    @pytest.mark.parametrize(
        ("of_task", "gap"), [(lambda _: 0.3, 0.3), (30, 0.0)], ids=["function", "number"]
    )
    async def test_a_job_without_a_backoff_takes_its_tasks_function_and_not_its_number(
        self,
        queue: Queue,
        backend: Backend,
        registry: TaskRegistry,
        flaky: Flaky,
        of_task: float | BackoffFunction,
        gap: float,
    ) -> None:
        task("work", name="flaky", backoff=of_task, registry=registry)(flaky.run)
        await ended(queue, await queue.add("flaky", retries=1))
        assert gap - EARLY <= flaky.gaps[0] <= gap + 2

    async def test_a_task_says_how_long_its_jobs_may_take(
        self, queue: Queue, backend: Backend, registry: TaskRegistry
    ) -> None:
        @task("work", timeout=0.05, registry=registry)
        async def sleep() -> None:
            await anyio.sleep_forever()

        job = await ended(queue, await sleep.enqueue(backend=backend))
        assert "timeout of 0.05 s" in job["last_error"]


# -- what the task wishes


@pytest.mark.parametrize(("delay", "lowest"), [(90, 90), (None, 30)])
async def test_a_task_asks_for_a_retry(
    queue: Queue, flaky: Flaky, delay: float | None, lowest: float
) -> None:
    flaky.error = lambda: Retry("busy", delay=delay)
    await queue.add("flaky", retries=1, backoff=30)
    assert lowest - 0.1 <= await planned_delay(queue) <= lowest + 0.5


async def test_a_retry_that_was_asked_for_counts(queue: Queue, flaky: Flaky) -> None:
    flaky.error = lambda: Retry("busy", delay=0)
    job = await ended(queue, await queue.add("flaky", retries=2, backoff=HOUR))
    assert (job["status"], job["last_error"], len(flaky.starts)) == ("failed", "Retry: busy", 3)


async def test_a_task_gives_up(queue: Queue, flaky: Flaky) -> None:
    flaky.error = lambda: Fail("hopeless")
    job = await ended(queue, await queue.add("flaky", retries=5))
    assert (job["status"], job["last_error"], len(flaky.starts), job["retries"]) == (
        "failed",
        "Fail: hopeless",
        1,
        1,
    )


def test_a_retry_is_not_asked_for_in_the_past() -> None:
    with pytest.raises(ValueError, match="delay must be 0 or more"):
        Retry(delay=-1)


# -- what is kept


async def test_errors_and_tracebacks_of_all_attempts_are_kept(
    queue: Queue, flaky: Flaky, backend: Backend
) -> None:
    flaky.failures = 2
    flaky.error = lambda: ValueError(f"no {len(flaky.starts)}")
    before = backend.now()
    job = await ended(queue, await queue.add("flaky", retries=3, backoff=0.05))
    assert (job["status"], job["result"], job["retries"]) == ("completed", "attempt 3", 2)
    assert [(entry["attempt"], entry["error"]) for entry in job["errors"]] == [
        (1, "ValueError: no 1"),
        (2, "ValueError: no 2"),
    ]
    assert all(
        entry["traceback"].startswith("Traceback") and "in run" in entry["traceback"]
        for entry in job["errors"]
    )
    assert before <= job["errors"][0]["at"] <= job["errors"][1]["at"] <= backend.now() + EARLY


async def test_errors_are_seen_between_attempts(queue: Queue) -> None:
    job_id = await queue.add("flaky", retries=1, backoff=HOUR)
    await planned_delay(queue)
    job = await queue.get_job(job_id)
    assert job is not None
    assert (job["status"], job["retries"], job["max_retries"]) == ("delayed", 1, 1)
    assert "Traceback" in job["errors"][0]["traceback"]


# -- timeouts


async def test_a_task_that_takes_too_long_is_cancelled(backend: Backend) -> None:
    cancelled = anyio.Event()

    async def sleep() -> None:
        try:
            await anyio.sleep_forever()
        finally:
            cancelled.set()

    queue = make_queue(backend, sleep=sleep)
    job = await ended(queue, await queue.add("sleep", timeout=0.05))
    assert cancelled.is_set()
    assert job["status"] == "failed"
    assert (
        job["last_error"]
        == "TaskTimeout: task 'sleep' did not finish within its timeout of 0.05 s and was cancelled"
    )


async def test_a_thread_that_takes_too_long_is_left_alone(backend: Backend) -> None:
    opened, finished = threading.Event(), threading.Event()

    def wait() -> str:
        opened.wait(PATIENCE)
        finished.set()
        return "unheeded"

    queue = make_queue(backend, concurrency=1, wait=wait)
    job_id = await queue.add("wait", timeout=0.5)  # the thread has started by then
    async with running(queue):
        job = await outcome(queue, job_id)
        opened.set()
        assert await anyio.to_thread.run_sync(finished.wait, PATIENCE)
    assert job["status"] == "failed"
    assert job["last_error"].endswith(
        "and was cancelled; its thread cannot be interrupted and goes on to its end unheeded"
    )
    assert (await queue.get_job(job_id) or {})["result"] is None


async def test_each_attempt_has_the_whole_timeout(backend: Backend) -> None:
    runs: list[int] = []

    async def slow_at_first() -> str:
        runs.append(1)
        if len(runs) < 3:
            await anyio.sleep_forever()
        return "in time"

    queue = make_queue(backend, slow=slow_at_first)
    job = await ended(queue, await queue.add("slow", timeout=0.1, retries=2))
    assert (job["status"], job["result"], len(runs)) == ("completed", "in time", 3)
    assert all(entry["error"].startswith("TaskTimeout") for entry in job["errors"])


async def test_a_timeout_that_is_not_reached_changes_nothing(backend: Backend) -> None:
    async def quick() -> str:
        return "in time"

    queue = make_queue(backend, quick=quick)
    job = await ended(queue, await queue.add("quick", timeout=30))
    assert (job["status"], job["result"], job["timeout"]) == ("completed", "in time", 30)


async def test_a_timeout_of_the_task_itself_is_its_own(backend: Backend) -> None:
    async def give_up() -> None:
        with anyio.fail_after(0.01):
            await anyio.sleep_forever()

    queue = make_queue(backend, give_up=give_up)
    job = await ended(queue, await queue.add("give_up", timeout=30))
    assert job["last_error"] == "TimeoutError"


@pytest.mark.parametrize("timeout", [0, -1, float("nan"), float("inf"), "long"])
async def test_a_timeout_that_is_none_is_refused(queue: Queue, timeout: Any) -> None:
    with pytest.raises(ValueError, match="timeout"):
        await queue.add("flaky", timeout=timeout)


# -- by hand


async def make(queue: Queue, state: str, flaky: Flaky, **fields: Any) -> str:
    """Make a job that is in that state."""
    flaky.failures = 0 if state == "completed" else 1_000
    job_id = await queue.add("flaky", delay=HOUR if state == "delayed" else None, **fields)
    if state in ("failed", "completed"):
        assert (await ended(queue, job_id))["status"] == state
    if state == "cancelled":
        assert await queue.cancel_job(job_id)
    assert await queue.get_job_state(job_id) == state
    flaky.starts.clear()
    flaky.failures = 0
    return job_id


@pytest.mark.parametrize("state", ["failed", "cancelled", "delayed"])
@pytest.mark.parametrize("job_id", [None, "mine"])
async def test_a_job_is_retried_by_hand(
    queue: Queue, flaky: Flaky, state: str, job_id: str | None
) -> None:
    job_id = await make(queue, state, flaky, job_id=job_id, priority=2)
    assert await queue.retry_job(job_id)
    assert await queue.get_job_state(job_id) == "waiting"
    await only(queue, waiting=1)
    job = await ended(queue, job_id)
    assert (job["status"], job["result"], job["priority"]) == ("completed", "attempt 1", 2)
    await only(queue, completed=1)


async def test_an_expired_job_does_not_expire_at_once_again(
    queue: Queue, flaky: Flaky, backend: Backend
) -> None:
    job_id = await queue.add("flaky", ttl=1.0)
    flaky.failures = 0
    job = await queue.get_job(job_id)
    assert job is not None
    assert await queue.remove_job(job_id)
    await queue.enqueue(job | {"created_at": backend.now() - 60})
    assert (await ended(queue, job_id))["status"] == "expired"
    async with running(queue):  # is there before, since its time to live is short
        assert await queue.retry_job(job_id)
        assert (await outcome(queue, job_id))["status"] == "completed"


async def test_a_job_that_is_retried_by_hand_has_all_its_retries_again(
    queue: Queue, flaky: Flaky
) -> None:
    job_id = await make(queue, "failed", flaky, retries=2)
    flaky.failures = 2
    assert await queue.retry_job(job_id)
    job = await ended(queue, job_id)
    assert (job["status"], job["result"], job["retries"]) == ("completed", "attempt 3", 2)
    assert [entry["attempt"] for entry in job["errors"]] == [1, 2, 3, 1, 2]


@pytest.mark.parametrize("state", ["completed", "waiting"])
async def test_other_jobs_are_not_retried(queue: Queue, flaky: Flaky, state: str) -> None:
    job_id = await make(queue, state, flaky)
    assert not await queue.retry_job(job_id)
    assert await queue.get_job_state(job_id) == state


async def test_a_job_that_runs_is_not_retried(backend: Backend) -> None:
    started, opened = anyio.Event(), anyio.Event()
    runs: list[int] = []

    async def wait() -> None:
        runs.append(1)
        started.set()
        await opened.wait()

    queue = make_queue(backend, wait=wait)
    job_id = await queue.add("wait")
    async with running(queue):
        with anyio.fail_after(PATIENCE):
            await started.wait()
        assert not await queue.retry_job(job_id)
        opened.set()
        await outcome(queue, job_id)
        await wait_until_done(queue)
    assert runs == [1]


async def test_a_job_that_is_not_there_is_not_retried(queue: Queue) -> None:
    assert not await queue.retry_job("missing")


async def test_a_job_that_waits_for_its_retry_is_run_now(queue: Queue, flaky: Flaky) -> None:
    job_id = await queue.add("flaky", retries=1, backoff=HOUR)
    await planned_delay(queue)
    flaky.failures = 0
    assert await queue.retry_job(job_id)
    job = await ended(queue, job_id)
    assert (job["status"], job["delay_until"], len(job["errors"])) == ("completed", None, 1)


async def test_racing_retries_by_hand_run_a_job_once(
    queue: Queue, twin: Backend, flaky: Flaky
) -> None:
    job_id = await make(queue, "failed", flaky)
    retried: list[bool] = []

    async def retry(handle: Backend) -> None:
        retried.append(await Queue("work", handle).retry_job(job_id))

    async with anyio.create_task_group() as group:
        for handle in (queue.backend, twin) * 5:
            group.start_soon(retry, handle)
    assert retried.count(True) == 1
    assert (await ended(queue, job_id))["status"] == "completed"
    assert len(flaky.starts) == 1


async def test_a_slow_acknowledgement_does_not_lose_a_job_that_is_retried(
    queue: Queue, flaky: Flaky
) -> None:
    """A worker may be busy between outcome and ack, and another one promote the retry meanwhile."""
    job_id = await queue.add("flaky")
    flaky.failures = 0
    receiver = Receiver(queue.backend, "amq_work")
    [delivery] = await receiver.pull("tier_5")
    lifecycle = Lifecycle(queue._store, "slow")
    attempt = lifecycle.open(delivery)
    await lifecycle.fail(attempt, Failure("ValueError: no", "", time.time()))
    assert await queue.retry_job(job_id)
    key = f"$KV.amq_work_scheduler.later.{job_id}.released"
    async with running(queue):
        with anyio.move_on_after(0.3):
            await until(
                lambda: queue.backend.last("KV_amq_work_scheduler", key), lambda found: not found
            )
        delivery.ack()
        assert await queue.wait_for(job_id, timeout=PATIENCE) == "attempt 1"
    assert len(flaky.starts) == 1
