"""Faults of AsyncMQ 0.10.1 that this library must not have, on both backends."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from asyncmq_nats.backends.base import Backend, Delivery, Puller
from asyncmq_nats.exceptions import InvalidQueueName, JobFailed
from asyncmq_nats.queues import Queue
from asyncmq_nats.settings import Settings
from asyncmq_nats.workers import Worker
from tests.receiver import until
from tests.running import (
    PATIENCE,
    counted,
    has,
    lose_worker,
    make_queue,
    only,
    outcome,
    race,
    run_jobs,
    running,
    wait_until_done,
)


@pytest.fixture
def settings() -> Settings:
    return Settings(
        stalled_after=1.0,
        max_stalls=2,
        shutdown_timeout=0.1,
        publish_timeout=10,
        unknown_task_timeout=0,
    )


async def echo(value: Any = None) -> Any:
    return value


# -- lost, stuck or doubled jobs


async def test_a_lost_worker_does_not_keep_its_job(backend: Backend) -> None:
    queue = make_queue(backend, echo=echo)
    job_id = await queue.add("echo", ["recovered"])
    await lose_worker(queue)
    async with running(queue):
        assert await queue.wait_for(job_id, timeout=PATIENCE) == "recovered"


async def test_a_cancelled_worker_does_not_keep_its_job(backend: Backend) -> None:
    started, opened = anyio.Event(), anyio.Event()

    async def wait() -> str:
        started.set()
        await opened.wait()
        return "recovered"

    queue = make_queue(backend, wait=wait)
    job_id = await queue.add("wait")
    async with anyio.create_task_group() as group:
        await group.start(queue.run)
        with anyio.fail_after(PATIENCE):
            await started.wait()
        group.cancel_scope.cancel()
    opened.set()
    async with running(queue):
        assert await queue.wait_for(job_id, timeout=PATIENCE) == "recovered"


class TestMaxStalls:
    @pytest.fixture
    def settings(self) -> Settings:
        return Settings(stalled_after=1.0, max_stalls=1)

    async def test_a_job_that_kills_its_workers_is_not_run_for_ever(self, backend: Backend) -> None:
        queue = make_queue(backend, echo=echo)
        job_id = await queue.add("echo")
        await lose_worker(queue, runs=True)
        async with running(queue):
            with pytest.raises(JobFailed, match="stalled"):
                await queue.wait_for(job_id, timeout=PATIENCE)


async def test_a_delay_of_zero_is_now(backend: Backend) -> None:
    queue = make_queue(backend, echo=echo)
    job_id = await queue.add("echo", ["now"], delay=0)
    assert await queue.get_job_state(job_id) == "waiting"
    await run_jobs(queue)
    assert await queue.get_job_result(job_id) == "now"


@pytest.mark.parametrize("name", ["tenant:email", "a:b:c", ":", "queue:email"])
async def test_a_queue_name_with_a_colon_is_refused_and_not_cut(
    backend: Backend, name: str
) -> None:
    with pytest.raises(InvalidQueueName):
        Queue(name, backend)


async def test_a_worker_is_that_of_its_queue(backend: Backend) -> None:
    running_now: list[int] = []
    most: list[int] = []
    full = anyio.Event()

    async def fail_once_all_run() -> None:
        running_now.append(1)
        most.append(len(running_now))
        if len(running_now) == 4:
            full.set()
        await full.wait()
        await anyio.lowlevel.checkpoint()
        running_now.pop()

    runs: list[int] = []

    async def flaky() -> int:
        runs.append(1)
        if len(runs) < 2:
            raise ValueError("not yet")
        return len(runs)

    queue = make_queue(backend, concurrency=4, occupy=fail_once_all_run, flaky=flaky, echo=echo)
    worker = Worker(queue)
    async with anyio.create_task_group() as group:
        await group.start(worker.run)
        await queue.add_bulk([{"task_id": "occupy"}] * 9)
        await wait_until_done(queue)
        delayed = await queue.add("echo", ["delayed"], delay=0.3)
        retried = await queue.add("flaky", retries=1, backoff=0.3)
        assert await queue.wait_for(delayed, timeout=PATIENCE) == "delayed"
        assert await queue.wait_for(retried, timeout=PATIENCE) == 2
        worker.stop()
    assert max(most) == 4


async def test_a_job_that_is_retried_by_hand_has_all_its_retries(backend: Backend) -> None:
    runs: list[int] = []

    async def fail() -> None:
        runs.append(1)
        raise ValueError("no")

    queue = make_queue(backend, fail=fail, echo=echo)
    failed = await queue.add("fail", retries=2)
    expired = await queue.enqueue(
        {"task_id": "echo", "args": ["in time"], "ttl": 60, "created_at": backend.now() - 61}
    )
    async with running(queue):
        await outcome(queue, failed)
        assert len(runs) == 3
        assert await queue.retry_job(failed)
        await until(lambda: _count(runs), lambda count: count == 6)
        await outcome(queue, failed)
        assert (await outcome(queue, expired))["status"] == "expired"
        assert await queue.retry_job(expired)
        assert await queue.wait_for(expired, timeout=PATIENCE) == "in time"
    assert len(runs) == 6


async def _count(items: list[int]) -> int:
    return len(items)


async def test_two_producers_of_one_id_make_one_job(backend: Backend, twin: Backend) -> None:
    queues = [make_queue(handle, echo=echo) for handle in (backend, twin)]
    actions = [
        lambda number=number: queues[number % 2].add("echo", [number], job_id="order-7")
        for number in range(20)
    ]
    assert set(await race(*actions)) == {"order-7"}
    await has(queues[0], 1)
    await run_jobs(queues[0])
    await has(queues[0], 1, "completed")


# -- wrong data, crashes


async def test_a_cancelled_job_is_stopped(backend: Backend) -> None:
    started, stopped = anyio.Event(), anyio.Event()

    async def endless() -> None:
        started.set()
        try:
            await anyio.sleep_forever()
        finally:
            stopped.set()

    queue = make_queue(backend, endless=endless)
    job_id = await queue.add("endless", retries=3)
    async with running(queue):
        with anyio.fail_after(PATIENCE):
            await started.wait()
            assert await queue.cancel_job(job_id)
            await stopped.wait()
        assert await queue.get_job_state(job_id) == "cancelled"
        await wait_until_done(queue)


PAYLOADS = [
    [],
    {},
    [[], {}, [{}], {"a": []}],
    9007199254740993,
    12345678901234567890,
    -(2**200),
    1.0,
    0.1,
    1e22,
    "\u2028 \x00 \ud7ff 😀 \\u0041",
    {"": "", "1": 1, "a.b": None, "True": True},
    [None, True, False, 0, "", "0"],
]


@pytest.mark.parametrize("way", ["now", "delayed", "custom id", "bulk", "retried"])
async def test_payloads_are_not_damaged(backend: Backend, way: str) -> None:
    runs: list[int] = []

    async def give_back(value: Any, *, named: Any) -> Any:
        runs.append(1)
        if way == "retried" and len(runs) == 1:
            raise ValueError("once more")
        return [value, named]

    queue = make_queue(backend, give_back=give_back)
    fields: dict[str, Any] = {
        "task_id": "give_back",
        "args": [PAYLOADS],
        "kwargs": {"named": PAYLOADS},
    }
    special: dict[str, dict[str, Any]] = {
        "delayed": {"delay": 0.001},
        "custom id": {"job_id": "mine"},
        "retried": {"retries": 1},
    }
    fields |= special.get(way, {})
    job_id = (await queue.add_bulk([fields]))[0] if way == "bulk" else await queue.add(**fields)
    async with running(queue):
        result = await queue.wait_for(job_id, timeout=PATIENCE)
    job = await queue.get_job(job_id)
    assert job is not None
    assert repr(result) == repr([PAYLOADS, PAYLOADS])  # 1, 1.0 and True are equal, and not the same
    assert repr((job["args"], job["kwargs"], job["result"])) == repr(
        ([PAYLOADS], {"named": PAYLOADS}, [PAYLOADS, PAYLOADS])
    )


async def test_a_result_that_is_not_json_harms_no_other_job(backend: Backend) -> None:
    started, opened = anyio.Event(), anyio.Event()

    async def give_object() -> object:
        await started.wait()
        return object()

    async def wait() -> str:
        started.set()
        await opened.wait()
        return "unharmed"

    queue = make_queue(backend, give_object=give_object, wait=wait)
    other, bad = await queue.add("wait"), await queue.add("give_object", retries=2)
    async with running(queue) as worker:
        with pytest.raises(JobFailed, match="cannot be sent as JSON"):
            await queue.wait_for(bad, timeout=PATIENCE)
        assert await queue.get_job_state(other) == "active"
        opened.set()
        assert await queue.wait_for(other, timeout=PATIENCE) == "unharmed"
        job = await queue.get_job(other)
        assert job is not None
        assert job["worker"] == worker.id
        await wait_until_done(queue)


async def test_expired_jobs_are_not_failed_ones(backend: Backend) -> None:
    async def fail() -> None:
        raise ValueError("no")

    queue = make_queue(backend, echo=echo, fail=fail)
    await queue.add("fail")
    await queue.add_bulk([{"task_id": "echo", "ttl": 0}] * 2)
    await run_jobs(queue)
    await only(queue, failed=1, expired=2)
    stats = await queue.queue_stats()
    for state, count in stats.items():
        assert len(await queue.list_jobs(state)) == count


async def test_a_job_imports_nothing(
    backend: Backend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "amq_never_imported.py").write_text("async def main():\n    return 'ran'\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    queue = make_queue(backend, echo=echo)
    for task_id in (
        "amq_never_imported.main",
        "amq_never_imported",
        "os.getcwd",
        "builtins.print",
        "asyncmq_nats.queues.Queue",
        "echo.__call__",
    ):
        job_id = await queue.add(task_id)
        async with running(queue):
            with pytest.raises(JobFailed, match="is registered in this worker"):
                await queue.wait_for(job_id, timeout=PATIENCE)
    assert "amq_never_imported" not in sys.modules


# -- slow and growing


class CountingPuller:
    """A puller that tells of its requests."""

    def __init__(self, inner: Puller, requests: list[str]) -> None:
        self._inner = inner
        self._requests = requests

    @property
    def silent_for(self) -> float:
        return self._inner.silent_for

    def outstanding(self, consumer: str) -> int:
        return self._inner.outstanding(consumer)

    async def request(self, consumer: str, count: int, *, wait: float) -> None:
        self._requests.append(consumer)
        await self._inner.request(consumer, count, wait=wait)

    async def withdraw(self) -> None:
        await self._inner.withdraw()

    async def close(self) -> None:
        await self._inner.close()


READS = ("last", "page", "look_up", "list_consumers", "last_sequence", "list_logs")


def count_calls(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that grows with every read of the backend."""
    calls: list[str] = []

    def counted(name: str) -> Callable[..., Any]:
        real = getattr(backend, name)

        async def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            return await real(*args, **kwargs)

        return call

    for name in READS:
        monkeypatch.setattr(backend, name, counted(name))
    return calls


@pytest.mark.parametrize("delay", [None, 0.4])
async def test_an_idle_worker_is_told_of_a_job_and_does_not_poll(
    backend: Backend, monkeypatch: pytest.MonkeyPatch, delay: float | None
) -> None:
    asked: list[str] = []
    asked_at_delivery: list[int] = []
    real = backend.puller

    def puller(
        log: str,
        on_delivery: Callable[[Delivery], None],
        on_lapse: Callable[[str], None],
        *,
        extend: bool = True,
    ) -> Puller:
        def note(delivery: Delivery) -> None:
            asked_at_delivery.append(len(asked))
            on_delivery(delivery)

        return CountingPuller(real(log, note, on_lapse, extend=extend), asked)

    monkeypatch.setattr(backend, "puller", puller)
    started = anyio.Event()
    reads_at_start: list[int] = []

    async def note_reads() -> None:
        reads_at_start.append(len(reads))
        started.set()

    queue = make_queue(backend, note_reads=note_reads)
    async with running(queue):
        job_id = await queue.add("note_reads", delay=delay)
        reads = count_calls(backend, monkeypatch)
        before = len(asked)
        with anyio.fail_after(PATIENCE):
            await started.wait()
        assert await queue.wait_for(job_id, timeout=PATIENCE) is None
    assert asked_at_delivery[0] <= before
    assert reads_at_start[0] <= 1  # whether a job that was delayed has ended meanwhile


async def test_a_look_costs_the_same_for_any_number_of_jobs(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue = make_queue(backend, concurrency=50, echo=echo)
    entries: list[dict[str, Any]] = [{"task_id": "echo"}, {"task_id": "echo", "delay": 3600}]
    job_id = (await queue.add_bulk(entries))[0]
    looks: dict[str, Callable[[], Any]] = {
        "queue_stats": queue.queue_stats,
        "get_job_counts": queue.get_job_counts,
        "count": queue.count,
        "get_job": lambda: queue.get_job(job_id),
        "get_job_state": lambda: queue.get_job_state(job_id),
        "get_job_result": lambda: queue.get_job_result(job_id),
        "get_jobs": lambda: queue.get_jobs("waiting", end=0, asc=True),
    }
    for look in looks.values():  # whatever is looked up once is looked up
        await look()
    calls = count_calls(backend, monkeypatch)

    async def costs() -> dict[str, int]:
        found = {}
        for name, look in looks.items():
            calls.clear()
            await look()
            found[name] = len(calls)
        return found

    await counted(queue)
    few = await costs()
    await queue.add_bulk(entries * 400)
    await counted(queue)
    many = await costs()
    assert {name: cost for name, cost in many.items() if cost > few[name]} == {}
    assert max(many.values()) < 20


class TestTimes:
    @pytest.fixture
    def settings(self) -> Settings:
        return Settings(completed_ttl=1, unknown_task_timeout=0)

    async def test_outcomes_are_not_kept_for_ever(self, backend: Backend) -> None:
        queue = make_queue(backend, echo=echo)
        job_id = await queue.add("echo")
        failed = await queue.add("unknown")
        await run_jobs(queue)
        await until(lambda: queue.get_job(job_id), lambda job: job is None)
        await until(queue.queue_stats, lambda stats: stats["completed"] == 0)
        assert await queue.get_job_state(failed) == "failed"


async def test_nothing_looks_at_other_queues(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue = make_queue(backend, "mine", echo=echo)
    for number in range(5):
        await make_queue(backend, f"other_{number}").add("echo")
    touched: set[str] = set()
    for name in (*READS, "write", "delete", "purge"):
        real = getattr(backend, name)

        def watch(log: str, *args: Any, real: Any = real, **kwargs: Any) -> Any:
            touched.add(log)
            return real(log, *args, **kwargs)

        monkeypatch.setattr(backend, name, watch)
    job_ids = await queue.add_bulk([{"task_id": "echo", "delay": 3600}, {"task_id": "echo"}])
    assert await queue.remove_delayed(job_ids[0])
    await run_jobs(queue)
    await queue._assets.declare_all()
    await queue.get_jobs()
    assert {log for log in touched if "other" in log} == set()


async def test_a_task_may_have_a_time_limit(backend: Backend) -> None:
    async def endless() -> None:
        await anyio.sleep_forever()

    queue = make_queue(backend, concurrency=1, endless=endless, echo=echo)
    job_id = await queue.add("endless", timeout=0.05)
    after = await queue.add("echo", ["on"])
    async with running(queue):
        with pytest.raises(JobFailed, match="TaskTimeout"):
            await queue.wait_for(job_id, timeout=PATIENCE)
        assert await queue.wait_for(after, timeout=PATIENCE) == "on"


async def test_stopping_has_a_time_limit(backend: Backend) -> None:
    started = anyio.Event()

    async def endless() -> None:
        started.set()
        await anyio.sleep_forever()

    queue = make_queue(backend, endless=endless)
    job_id = await queue.add("endless")
    worker = Worker(queue)
    with anyio.fail_after(PATIENCE):
        async with anyio.create_task_group() as group:
            await group.start(worker.run)
            await started.wait()
            worker.stop()
    job = await queue.get_job(job_id)
    assert job is not None
    assert job["status"] in ("waiting", "active")
