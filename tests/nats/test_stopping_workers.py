"""A worker program that is told to stop.

What runs may finish, the rest goes to others at once, and nothing counts as stalled.
"""

import signal
import socket
from collections import Counter
from collections.abc import Iterator

import anyio
import pytest
from anyio import to_thread

from asyncmq_nats.backends.nats.backend import NATSBackend
from asyncmq_nats.backends.nats.embedded.server import EmbeddedServer
from asyncmq_nats.queues import Queue
from asyncmq_nats.runtime import runner
from asyncmq_nats.settings import Settings
from asyncmq_nats.workers import Worker
from tests.nats.processes import PATIENCE, Fleet, eventually
from tests.running import make_queue

STOPPED = "has stopped"
PROMPT = 30.0
"""Half of what a worker would wait for, were it not told to stop: for a job, or for a server."""


@pytest.fixture
def settings() -> Settings:
    # Longer than any test: a job that comes back earlier was handed back. One stall would end it.
    return Settings(stalled_after=600, max_stalls=1, shutdown_timeout=60)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_signalled_worker_finishes_what_runs_and_starts_nothing(
    number: signal.Signals, fleet: Fleet, queue: Queue
) -> None:
    with anyio.fail_after(2 * PATIENCE):
        worker = await fleet.start("first", concurrency=2)
        jobs = [await queue.add("wait", [f"job-{index}", "go"]) for index in range(2)]
        for index in range(2):
            await fleet.watched.begun(f"job-{index}")
        later = await queue.add("brief", [1])
        worker.send(number)
        await worker.logged("stopping")
        fleet.watched.say("go")
        assert await worker.wait() == 0
        assert [await queue.get_job_result(job_id) for job_id in jobs] == ["first", "first"]
        assert await queue.get_job_state(later) in (
            "waiting",
            "active",
        )  # "active": it had been handed out, and back
        assert fleet.watched.runs("1") == []
        await fleet.start("second")
        assert await queue.wait_for(later) == 1
    assert STOPPED in worker.log


@pytest.mark.slow
async def test_backlog_goes_on_elsewhere_at_once(fleet: Fleet, queue: Queue) -> None:
    count = 2000
    ids = await queue.add_bulk(
        [{"task_id": "brief", "args": [number, 0.002]} for number in range(count)]
    )
    with anyio.fail_after(2 * PATIENCE):
        first, _ = await fleet.start_all("first", "second", concurrency=2)
        await eventually(queue.queue_stats, lambda stats: stats["completed"] > count // 5)
        first.send(signal.SIGTERM)
        assert await first.wait() == 0
        assert (await queue.queue_stats())["completed"] < count
        await eventually(queue.queue_stats, lambda stats: stats["completed"] == count)
    jobs = await queue.get_jobs("completed")
    assert {job["id"] for job in jobs} == set(ids)
    assert {job["stalls"] for job in jobs} == {0}
    assert fleet.watched.count_runs() == {str(number): 1 for number in range(count)}
    workers = Counter(name for number in range(count) for name in fleet.watched.runs(str(number)))
    print(f"bodies by worker: {dict(workers)}")
    assert set(workers) == {"first", "second"}


@pytest.mark.parametrize("task", ["wait", "wait_in_thread"])
async def test_interrupted_job_runs_again_at_once_and_is_not_counted_as_stalled(
    task: str, fleet: Fleet, queue: Queue
) -> None:
    with anyio.fail_after(2 * PATIENCE):
        first = await fleet.start("first", asyncmq_nats_shutdown_timeout=0.2)
        job_id = await queue.add(task, ["job", "go"])
        await fleet.watched.begun("job")
        second = await fleet.start("second", asyncmq_nats_shutdown_timeout=0.2)
        first.send(signal.SIGTERM)
        with anyio.fail_after(PROMPT):
            await fleet.watched.begun("job", times=2)
        second.send(signal.SIGTERM)  # and once more
        await fleet.start("third")
        with anyio.fail_after(PROMPT):
            await fleet.watched.begun("job", times=3)
        with anyio.fail_after(PROMPT):
            assert await first.wait() == 0
            assert await second.wait() == 0
        fleet.watched.say("go")
        assert await queue.wait_for(job_id) == "third"
    job = await queue.get_job(job_id)
    assert job is not None
    assert (job["stalls"], job["retries"], job["errors"]) == (0, 0, [])
    assert fleet.watched.runs("job") == ["first", "second", "third"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_second_signal_ends_the_process_at_once(
    number: signal.Signals, fleet: Fleet, queue: Queue
) -> None:
    with anyio.fail_after(2 * PATIENCE):
        worker = await fleet.start("first")
        await queue.add("wait", ["job", "never"])
        await fleet.watched.begun("job")
        worker.send(number)
        await worker.logged("stopping")
        worker.send(number)
        with anyio.fail_after(PROMPT):
            assert await worker.wait() == 128 + number
    assert STOPPED not in worker.log


async def test_worker_stops_while_the_server_is_gone(
    fleet: Fleet, queue: Queue, server: EmbeddedServer
) -> None:
    with anyio.fail_after(2 * PATIENCE):
        worker = await fleet.start(
            "first", asyncmq_nats_shutdown_timeout=0.5, asyncmq_nats_publish_timeout=1
        )
        await queue.add("wait", ["job", "never"])
        await fleet.watched.begun("job")
        server.kill()
        worker.send(signal.SIGTERM)
        assert await worker.wait() == 0


@pytest.fixture
def silent_server() -> Iterator[socket.socket]:
    """A server that takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(PATIENCE)
        yield listener


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("processes", [1, 2])
async def test_worker_that_waits_for_its_server_stops_at_once(
    number: signal.Signals, processes: int, fleet: Fleet, silent_server: socket.socket
) -> None:
    fleet.url = f"nats://127.0.0.1:{silent_server.getsockname()[1]}"
    with anyio.fail_after(2 * PATIENCE):
        worker = fleet.launch("first", processes=processes, asyncmq_nats_connect_timeout=60)
        connections = [
            (await to_thread.run_sync(silent_server.accept))[0] for _ in range(processes)
        ]
        worker.send(number)
        with anyio.fail_after(PROMPT):
            assert await worker.wait() == 0
    for connection in connections:
        connection.close()
    assert "Traceback" not in worker.log
    assert "Error" not in worker.log


async def test_worker_may_be_stopped_before_there_is_a_server() -> None:
    backend = NATSBackend("nats://127.0.0.1:1", settings=Settings(connect_timeout=60))
    worker = Worker(make_queue(backend))
    worker.on_startup(lambda: pytest.fail("it does not start"))
    with anyio.fail_after(PROMPT):
        async with anyio.create_task_group() as group:
            group.start_soon(worker.run)
            await anyio.sleep(0.05)
            worker.stop()
        async with anyio.create_task_group() as group:
            group.start_soon(stop_soon, worker)
            await group.start(
                worker.run
            )  # to be told that it has started would be to wait for ever
    await backend.close()


async def stop_soon(worker: Worker) -> None:
    await anyio.sleep(0.05)
    worker.stop()


async def test_what_is_not_answered_does_not_hold_up_a_stop(
    queue: Queue, nats_backend: NATSBackend, server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every write is repeated for 30 s by default.

    A worker that has to stop does not wait for that.
    """
    monkeypatch.setattr(runner, "SHUTDOWN_STEP_TIMEOUT", 0.3)
    nats_backend.settings = Settings(shutdown_timeout=0.2)
    started = anyio.Event()

    async def never() -> None:
        started.set()
        await anyio.sleep_forever()

    busy = make_queue(nats_backend, "fleet", concurrency=1, never=never)
    busy.rate_limit = 100
    await queue.add_bulk([{"task_id": "never"}] * 5)
    worker = Worker(busy)
    with anyio.fail_after(PROMPT / 2):
        async with anyio.create_task_group() as group:
            await group.start(worker.run)
            await started.wait()
            server.kill()
            worker.stop()
