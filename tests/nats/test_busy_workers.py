"""Flow control with real servers and worker processes.

What the server enforces, what signals do, who gets which job.
"""

import os
import signal
import time
from collections import Counter
from collections.abc import Sequence

import anyio
import nats.errors
import pytest

from asyncmq_nats.backends.nats.embedded.server import EmbeddedServer
from asyncmq_nats.exceptions import JobFailed
from asyncmq_nats.queues import Queue
from asyncmq_nats.settings import Settings
from tests.nats.processes import PATIENCE, Fleet, Program, alive, eventually, holds
from tests.nats.streams import Streams, plain_client
from tests.running import counted, only

PAUSE = "CONSUMER.PAUSE.amq_fleet.tier_5"
TIER = "CONSUMER.INFO.amq_fleet.tier_5"


@pytest.fixture
def settings() -> Settings:
    # A lease longer than any test: a job that comes back earlier was handed back. One stall would
    # end it.
    return Settings(stalled_after=600, max_stalls=1, shutdown_timeout=60, heartbeat_interval=0.5)


def most_within(times: Sequence[float], span: float) -> int:
    """Return the largest number of starts in a window of that length."""
    return max(sum(begin <= at < begin + span for at in times) for begin in times)


# -- pause


async def test_a_foreign_client_gets_nothing_of_a_paused_queue(
    queue: Queue, server: EmbeddedServer
) -> None:
    job_id = await queue.add("brief", [1])
    await queue.pause()
    async with plain_client(server.url) as client:
        consumer = await client.jetstream().pull_subscribe_bind("tier_5", "amq_fleet")
        with pytest.raises(nats.errors.TimeoutError):
            await consumer.fetch(1, timeout=0.3)
        await queue.resume()
        (message,) = await consumer.fetch(1, timeout=PATIENCE)
        assert message.subject.endswith(job_id)


async def test_a_pause_survives_a_restart_of_the_server(
    fleet: Fleet, queue: Queue, server: EmbeddedServer
) -> None:
    with anyio.fail_after(2 * PATIENCE):
        worker = await fleet.start("first")
        await queue.pause()
        server.kill()
        server.start()
        await eventually(queue.is_paused, bool)
        job_id = await queue.add("brief", [1])
        await queue.add("brief", [2], priority=0)  # a new tier
        await fleet.start("second")  # asks for what there is before it says that it runs
        await anyio.sleep(0.3)
        assert not fleet.watched.count_runs()
        await queue.resume()
        assert await queue.wait_for(job_id, timeout=PATIENCE) == 1
        assert not worker.ended


async def test_a_foreign_pause_and_resume_count(
    fleet: Fleet, queue: Queue, server: EmbeddedServer
) -> None:
    await fleet.start("first")
    async with plain_client(server.url) as client:
        streams = Streams(client)
        for number in range(3):
            await streams.call(PAUSE, {"pause_until": "2100-01-01T00:00:00Z"})
            assert await queue.is_paused()
            job_id = await queue.add("brief", [number])
            await anyio.sleep(0.1)
            assert fleet.watched.runs(str(number)) == []
            await streams.call(PAUSE, {})
            assert await queue.wait_for(job_id, timeout=PATIENCE) == number
            assert not await queue.is_paused()


async def test_a_foreign_resume_ends_a_pause_of_ours(
    fleet: Fleet, queue: Queue, server: EmbeddedServer
) -> None:
    await fleet.start("first")
    async with plain_client(server.url) as client:
        for number in range(2):
            await queue.pause()
            job_id = await queue.add("brief", [number])
            await Streams(client).call(PAUSE, {})
            assert await queue.wait_for(job_id, timeout=PATIENCE) == number


# -- rate limit


async def test_worker_processes_together_keep_to_a_limit_also_when_one_dies(
    fleet: Fleet, queue: Queue, server: EmbeddedServer
) -> None:
    limit, interval, jobs = 20, 0.5, 120
    await queue.add_bulk([{"task_id": "stamp", "args": ["job"]}] * jobs)
    with anyio.fail_after(2 * PATIENCE):
        programs = await fleet.start_all(
            "a", "b", "c", concurrency=20, rate_limit=f"{limit}/{interval}"
        )
        await fleet.watched.stamped("job", jobs // 2)
        programs[0].kill()
        times = [at for at, _ in await fleet.watched.stamped("job", jobs - limit)]
    for span in (0.1, interval, 2 * interval):
        # A start is stamped a little later than its permit is used: the machine may be busy.
        assert most_within(times, span) <= limit + limit / interval * (span + 0.1)


async def test_workers_without_permits_hold_no_jobs(
    fleet: Fleet, queue: Queue, server: EmbeddedServer
) -> None:
    await queue.add_bulk([{"task_id": "stamp", "args": ["job"]}] * 50)
    await fleet.start_all("a", "b", concurrency=20, rate_limit="5/600")
    await only(queue, waiting=45, completed=5)
    async with plain_client(server.url) as client:
        streams = Streams(client)
        for _ in range(20):
            tier = await streams.call(TIER)
            assert (tier["num_ack_pending"], tier["num_pending"], tier["num_redelivered"]) == (
                0,
                45,
                0,
            )


# -- who gets a job


async def test_a_job_goes_to_the_worker_that_is_free(fleet: Fleet, queue: Queue) -> None:
    with anyio.fail_after(2 * PATIENCE):
        await fleet.start_all("a", "b", concurrency=2)
        for number in range(3):
            await queue.add("wait", [f"long {number}", "go"])
            await fleet.watched.begun(f"long {number}")
        for number in range(3):
            with anyio.fail_after(PATIENCE):
                assert await queue.wait_for(await queue.add("brief", [number])) == number
        fleet.watched.say("go")


async def test_a_worker_that_comes_later_gets_its_share(fleet: Fleet, queue: Queue) -> None:
    with anyio.fail_after(2 * PATIENCE):
        await fleet.start("first", concurrency=50)
        await queue.add_bulk([{"task_id": "wait", "args": ["job", "go"]}] * 100)
        await fleet.watched.begun("job", times=50)
        await fleet.start("second", concurrency=50)
        await fleet.watched.begun("job", times=100)
        fleet.watched.say("go")
    assert Counter(fleet.watched.runs("job")) == {"first": 50, "second": 50}


async def count_deliveries(server: EmbeddedServer) -> int:
    async with plain_client(server.url) as client:
        return int((await Streams(client).call(TIER))["delivered"]["consumer_seq"])


async def begin_a_long_job(fleet: Fleet, queue: Queue) -> None:
    """Have the only slot of a worker taken, among jobs that it has fetched ahead."""
    await queue.add_bulk(
        [{"task_id": "unnoted"}] * 300
        + [{"task_id": "wait", "args": ["long", "go"]}]
        + [{"task_id": "unnoted"}] * 100
    )
    await fleet.start("first", concurrency=1)
    await fleet.watched.begun("long")


async def test_jobs_that_one_worker_cannot_start_soon_go_to_another(
    fleet: Fleet, queue: Queue
) -> None:
    """A long job takes the only slot while short ones were fetched ahead."""
    await begin_a_long_job(fleet, queue)
    await fleet.start("second", concurrency=1)
    await eventually(queue.queue_stats, lambda stats: stats["completed"] == 400)
    fleet.watched.say("go")
    await eventually(queue.queue_stats, lambda stats: stats["completed"] == 401)
    assert {job["stalls"] for job in await queue.get_jobs("completed")} == {0}


async def test_a_worker_that_is_alone_gets_each_job_once(
    fleet: Fleet, queue: Queue, server: EmbeddedServer
) -> None:
    """Also when a long job takes its only slot: what it has fetched stays where it is."""
    await begin_a_long_job(fleet, queue)
    await anyio.sleep(1.0)  # time enough to give back what waits for the slot
    fleet.watched.say("go")
    await eventually(queue.queue_stats, lambda stats: stats["completed"] == 401)
    assert await count_deliveries(server) == 401


@pytest.mark.parametrize("concurrency", [1, 10, 100])
async def test_a_worker_held_to_a_fifth_of_a_core_gets_each_job_once(
    concurrency: int, fleet: Fleet, queue: Queue, server: EmbeddedServer
) -> None:
    """As a container with a limit is: it stands still for 80 ms of each 100."""
    await queue.add_bulk([{"task_id": "unnoted"}] * 1000)
    worker = await fleet.start("first", concurrency=concurrency)
    with anyio.fail_after(40):
        while (await queue.queue_stats())["completed"] < 1000:
            worker.freeze()
            await anyio.sleep(0.08)
            worker.send(signal.SIGCONT)
            await anyio.sleep(0.02)
    assert await count_deliveries(server) == 1000


async def test_an_urgent_job_starts_soon_in_a_backlog(fleet: Fleet, queue: Queue) -> None:
    await queue.add_bulk([{"task_id": "stamp", "args": ["backlog", 0.01], "priority": 9}] * 2000)
    before: list[int] = []
    slots = 10
    with anyio.fail_after(2 * PATIENCE):
        await fleet.start("first", concurrency=slots)
        await fleet.watched.stamped("backlog", 100)
        for number in range(10):
            added = time.time()
            await queue.wait_for(await queue.add("stamp", [f"urgent {number}"], priority=0))
            started = fleet.watched.stamps(f"urgent {number}")[0][0]
            before.append(sum(added < at < started for at, _ in fleet.watched.stamps("backlog")))
        assert (await queue.queue_stats())["waiting"] > 0
    print(f"jobs of the backlog that started before an urgent one: {before}")
    assert sorted(before)[5] <= 3 * slots


# -- stopping


async def test_twenty_jobs_finish_and_the_backlog_stays(fleet: Fleet, queue: Queue) -> None:
    jobs = await queue.add_bulk([{"task_id": "wait", "args": ["job", "go"]}] * 60)
    with anyio.fail_after(2 * PATIENCE):
        worker = await fleet.start("first", concurrency=20)
        await fleet.watched.begun("job", times=20)
        worker.send(signal.SIGTERM)
        await worker.logged("stopping")
        fleet.watched.say("go")
        assert await worker.wait() == 0
    assert fleet.watched.runs("job") == ["first"] * 20
    # "active": handed out, and back; or its acknowledgement is on its way.
    await eventually(
        queue.queue_stats,
        lambda stats: (
            (stats["completed"], stats["waiting"] + stats["active"], sum(stats.values()))
            == (20, 40, 60)
        ),
    )
    done = await queue.get_jobs("completed")
    assert {job["id"] for job in done} == set(jobs[:20])
    assert {(job["stalls"], job["retries"]) for job in done} == {(0, 0)}


async def test_twenty_jobs_that_do_not_finish_run_elsewhere_at_once(
    fleet: Fleet, queue: Queue
) -> None:
    jobs = await queue.add_bulk([{"task_id": "wait", "args": ["job", "go"]}] * 20)
    with anyio.fail_after(2 * PATIENCE):
        first = await fleet.start("first", concurrency=20, asyncmq_nats_shutdown_timeout=0.3)
        await fleet.watched.begun("job", times=20)
        await fleet.start("second", concurrency=20)
        first.send(signal.SIGTERM)
        await fleet.watched.begun("job", times=40)  # long before their leases end
        assert await first.wait() == 0
        fleet.watched.say("go")
        assert {await queue.wait_for(job_id) for job_id in jobs} == {"second"}
    await counted(queue)
    assert {job["stalls"] for job in await queue.get_jobs("completed")} == {0}


# -- tasks in processes


async def test_a_task_in_a_process_gets_what_its_annotations_say(
    fleet: Fleet, queue: Queue
) -> None:
    worker = await fleet.start("first", concurrency=2)
    results = [
        await queue.wait_for(
            await queue.add("add_days", ["2026-02-27", str(days)]), timeout=PATIENCE
        )
        for days in (1, 2)
    ]
    assert [day for day, _ in results] == ["2026-02-28", "2026-03-01"]
    assert worker.pid not in {pid for _, pid in results}
    assert results[0][1] == results[1][1], "processes are kept for the next job"


async def test_what_a_task_in_a_process_raises_fails_its_job(fleet: Fleet, queue: Queue) -> None:
    await fleet.start("first")
    for task, error in (
        ("fail_in_process", "ZeroDivisionError: in the process"),
        ("end_in_process", "ProcessDied: .* exit code 7"),
    ):
        job_id = await queue.add(task)
        with pytest.raises(JobFailed, match=error):
            await queue.wait_for(job_id, timeout=PATIENCE)
    bad = await queue.add("add_days", ["no day", 1])
    with pytest.raises(JobFailed, match="day"):
        await queue.wait_for(bad, timeout=PATIENCE)
    assert await queue.wait_for(await queue.add("brief", [1]), timeout=PATIENCE) == 1


@pytest.mark.parametrize("reason", ["cancelled", "timeout", "stopped"])
async def test_a_task_in_a_process_is_killed(reason: str, fleet: Fleet, queue: Queue) -> None:
    worker = await fleet.start("first", asyncmq_nats_shutdown_timeout=0.2)
    job_id = await queue.add("spin", ["job"], timeout=15 if reason == "timeout" else None)
    ((_, pid),) = await fleet.watched.stamped("job")
    assert alive(pid)
    if reason == "cancelled":
        assert await queue.cancel_job(job_id)
    elif reason == "stopped":
        worker.send(signal.SIGTERM)
    await holds(lambda: not alive(pid))
    if reason == "stopped":
        assert await worker.wait() == 0
        assert await queue.get_job_state(job_id) in ("waiting", "active")  # handed back
        return
    state = await eventually(lambda: queue.get_job_state(job_id), lambda state: state != "active")
    assert state == ("cancelled" if reason == "cancelled" else "failed")
    assert await queue.wait_for(await queue.add("brief", [1]), timeout=PATIENCE) == 1


# -- several processes


async def start_processes(
    fleet: Fleet, queue: Queue, **environment: object
) -> tuple[Program, set[int]]:
    """Start a parent with two worker processes and return it and their ids."""
    parent = fleet.launch("parent", processes=2, **environment)
    workers = await eventually(queue.list_workers, lambda workers: len(workers) == 2)
    return parent, {worker.pid for worker in workers}


async def test_worker_processes_share_the_jobs_and_stop_on_a_signal(
    fleet: Fleet, queue: Queue
) -> None:
    with anyio.fail_after(2 * PATIENCE):
        parent, pids = await start_processes(fleet, queue, concurrency=2)
        assert parent.pid not in pids
        jobs = await queue.add_bulk([{"task_id": "stamp", "args": ["job", 0.3]}] * 4)
        assert {await queue.wait_for(job_id) for job_id in jobs} == pids
        running = await queue.add("stamp", ["last", 0.5])
        await fleet.watched.stamped("last")
        parent.send(signal.SIGTERM)
        assert await parent.wait() == 0
    assert await queue.get_job_state(running) == "completed"
    assert not any(alive(pid) for pid in pids)
    assert await queue.list_workers() == []


async def test_a_worker_process_that_dies_is_started_again(fleet: Fleet, queue: Queue) -> None:
    with anyio.fail_after(2 * PATIENCE):
        parent, pids = await start_processes(fleet, queue)
        lost = min(pids)
        os.kill(lost, signal.SIGKILL)
        workers = await eventually(
            queue.list_workers,
            lambda workers: len({worker.pid for worker in workers} - {lost}) == 2,
        )
        assert len({worker.pid for worker in workers} & pids - {lost}) == 1
        parent.send(signal.SIGTERM)
        assert await parent.wait() == 0


async def test_worker_processes_stop_when_their_parent_is_gone(fleet: Fleet, queue: Queue) -> None:
    with anyio.fail_after(2 * PATIENCE):
        parent, pids = await start_processes(fleet, queue)
        parent.kill()
        await holds(lambda: not any(alive(pid) for pid in pids))
    assert await queue.list_workers() == []
    assert "the process that started this worker is gone" in parent.log


async def test_a_second_signal_ends_all_processes_at_once(fleet: Fleet, queue: Queue) -> None:
    with anyio.fail_after(2 * PATIENCE):
        parent, pids = await start_processes(fleet, queue)
        await queue.add("wait", ["job", "never"])
        await fleet.watched.begun("job")
        parent.send(signal.SIGTERM)
        await parent.logged("stopping")
        parent.send(signal.SIGTERM)
        with anyio.fail_after(PATIENCE / 2):  # half of what a stop waits for the job
            assert await parent.wait() != 0
        assert not any(alive(pid) for pid in pids)


@pytest.mark.parametrize("delay", [0.0, 0.2, 0.4, 0.6])
async def test_a_parent_that_is_told_to_stop_while_it_starts_stops(
    delay: float, fleet: Fleet, queue: Queue
) -> None:
    with anyio.fail_after(2 * PATIENCE):
        parent = fleet.launch("parent", processes=2)
        await anyio.sleep(delay)
        parent.send(signal.SIGTERM)
        assert await parent.wait() in (0, -signal.SIGTERM)
        await eventually(queue.list_workers, lambda workers: workers == [])


# -- the list of workers


async def test_a_worker_that_was_killed_is_not_listed_for_long(fleet: Fleet, queue: Queue) -> None:
    worker = await fleet.start("first", concurrency=4)
    (entry,) = await queue.list_workers()
    assert (entry.pid, entry.concurrency, entry.queue) == (worker.pid, 4, "fleet")
    worker.kill()
    await eventually(queue.list_workers, lambda workers: workers == [])
