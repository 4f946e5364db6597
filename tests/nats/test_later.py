"""Delayed jobs and repeatables with real processes.

Workers that are killed, servers that restart, clocks that are wrong.
"""

import itertools
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import anyio
import pytest
from anyio import to_thread

from asyncmq_nats.backends.nats.embedded.server import EmbeddedServer
from asyncmq_nats.queues import Queue
from asyncmq_nats.settings import Settings
from tests.nats.processes import PATIENCE, Fleet, Program, eventually, holds
from tests.nats.streams import Streams, plain_client

TICKS_FOR = float(os.environ.get("TICKS_FOR", "8"))
"""How many seconds a series is watched while workers are killed."""
COARSE = 0.02
"""The kernel's tick bounds the times of files, a round trip what is known of server clocks."""


@pytest.fixture
def settings() -> Settings:
    return Settings(stalled_after=1.5, shutdown_timeout=2.0)


async def planned_ticks(queue: Queue) -> list[int]:
    """Return the planned times of the jobs that a series has made, in milliseconds and in order.

    Their ids have them. A job that moves may be listed at both ends, so each counts once.
    """
    return sorted({int(job["id"].rpartition("-")[2]) for job in await queue.get_jobs()})


async def ended_ticks(queue: Queue) -> list[int]:
    """Wait until all jobs of a series that is paused have completed; return `planned_ticks`."""

    async def read() -> tuple[list[int], dict[str, int]]:
        return await planned_ticks(queue), await queue.queue_stats()

    ticks, _ = await eventually(
        read,
        lambda found: found[1] == dict.fromkeys(found[1], 0) | {"completed": len(found[0])},
    )
    return ticks


async def wait_until(moment: float) -> None:
    """Wait for a time of day, which no event announces."""
    while time.time() < moment:  # noqa: ASYNC110
        await anyio.sleep(0.02)


def started_at(fleet: Fleet, name: str) -> float:
    """Return when the body of this name ran last, by the clock of the file system.

    No program can shift that.
    """
    return (fleet.watched.notes / f"{name}.runs").stat().st_mtime


# -- visible


async def test_delayed_jobs_are_entries_of_a_kv_bucket(
    queue: Queue, server: EmbeddedServer
) -> None:
    job_id = await queue.add("brief", [1], delay=3600, job_id="order-1")
    async with plain_client(server.url) as client:
        bucket = await client.jetstream().key_value("amq_fleet_scheduler")
        watcher = await bucket.watchall()
        # `None` is nats-py's word for "that was all", which it may say too early: also in `keys`.
        while (entry := await watcher.updates()) is None or entry.key == "queue.ballast":
            pass
        assert entry.key == "later.order-1.delayed"
        assert (await bucket.get(entry.key)).revision == entry.revision
    stored = json.loads(entry.value or b"")
    assert (stored["id"], stored["task"], stored["args"]) == (job_id, "brief", [1])
    assert stored["delay_until"] == pytest.approx(time.time() + 3600, abs=10)


# -- workers that die


@pytest.mark.slow
@pytest.mark.timeout(480)
async def test_each_tick_makes_one_job_while_a_worker_is_killed_again_and_again(
    fleet: Fleet, queue: Queue
) -> None:
    with anyio.fail_after(4 * PATIENCE):
        victim, _ = await fleet.start_all("victim", "survivor")
        first = await queue.upsert_repeatable("brief", every=0.5, args=[7], name="series")
        kills = 0
        while time.time() < first + TICKS_FOR:
            await anyio.sleep(random.uniform(0.0, 0.5))  # at any moment of a tick
            victim.kill()
            kills += 1
            victim = await fleet.start("victim")
        assert await queue.pause_repeatable("series")
        ticks = await ended_ticks(queue)
    assert ticks[0] == round(first * 1000)
    steps = [later - earlier for earlier, later in itertools.pairwise(ticks)]
    assert [step for step in steps if abs(step - 500) > 1] == []
    assert len(ticks) == round((ticks[-1] - ticks[0]) / 500) + 1 >= TICKS_FOR / 0.5 - 5
    runs = len(fleet.watched.runs("7"))
    print(
        f"{kills} kills, {len(ticks)} ticks in {(ticks[-1] - ticks[0]) / 1000:.1f} s, "
        f"none doubled or lost; bodies ran {runs} times"
    )
    assert runs >= len(ticks)


async def test_a_job_in_the_hands_of_a_killed_worker_still_becomes_ready(
    fleet: Fleet, queue: Queue, server: EmbeddedServer
) -> None:
    with anyio.fail_after(2 * PATIENCE):
        holder = await fleet.start("holder")
        holder.freeze()
        job_id = await queue.add("brief", [1], delay=0.3)
        async with plain_client(server.url) as client:
            streams = Streams(client)
            await eventually(
                lambda: streams.call(f"CONSUMER.INFO.{streams.bucket}.promoter"),
                lambda promoter: int(promoter["num_ack_pending"]) == 1,
            )
        holder.kill()
        await fleet.start("other")
        assert await queue.wait_for(job_id) == 1
    assert fleet.watched.runs("1") == ["other"]


# -- servers that stop


async def test_a_server_that_is_killed_forgets_no_delayed_job(
    fleet: Fleet, queue: Queue, server: EmbeddedServer
) -> None:
    delays = [0.3 + number * 0.05 for number in range(60)]
    with anyio.fail_after(2 * PATIENCE):
        await fleet.start("first")
        due = {}
        for number, delay in enumerate(delays):
            before = time.time()
            await queue.add("brief", [number], delay=delay + 1.0)
            due[number] = before + delay + 1.0
        await to_thread.run_sync(server.kill)
        await wait_until(due[20])  # the time of some comes meanwhile
        await to_thread.run_sync(server.start)
        await eventually(queue.queue_stats, lambda stats: stats["completed"] == len(delays))
    assert fleet.watched.count_runs() == {str(number): 1 for number in due}
    late = [started_at(fleet, str(number)) - at for number, at in due.items()]
    print(
        f"earliest {min(late):.3f} s, "
        f"those due after the restart at most {max(late[30:]):.3f} s late"
    )
    assert min(late) > -COARSE


async def none_in_hand(queue: Queue) -> None:
    """Wait until no promoter has a tick: what it has when it is lost is made up for.

    A tick that is less than 0.6 s ahead has no timer: of such a series one is always in hand.
    """

    async def read() -> list[bool]:
        fires = await queue.backend.last(queue._subjects.bucket_log, queue._subjects.fire("*"))
        return [fire.marker for fire in fires]

    await eventually(read, all)


async def test_a_tick_missed_in_an_outage_fires_once_and_the_series_goes_on(
    fleet: Fleet, queue: Queue, server: EmbeddedServer
) -> None:
    with anyio.fail_after(2 * PATIENCE):
        await fleet.start("first")
        await queue.upsert_repeatable("brief", every=1.0, args=[7])
        await fleet.watched.begun("7", times=2)
        await none_in_hand(queue)
        await to_thread.run_sync(server.kill)
        began = time.time()
        await wait_until(began + 4.2)
        await to_thread.run_sync(server.start)
        known = len(fleet.watched.runs("7"))
        await fleet.watched.begun("7", times=known + 4)
    ticks = await planned_ticks(queue)
    missed = [at for at in ticks if began * 1000 + 500 < at < (began + 3.5) * 1000]
    steps = [later - earlier for earlier, later in itertools.pairwise(ticks)]
    print("steps", steps)
    assert len(missed) <= 1
    assert len([step for step in steps if step > 1001]) == 1
    assert all(step % 1000 in (0, 1, 999) for step in steps)


# -- many


@pytest.fixture
def many() -> int:
    return int(os.environ.get("DELAYED_JOBS", "100000"))


def cpu_seconds(program: Program) -> float:
    fields = Path(f"/proc/{program._process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@pytest.mark.slow
@pytest.mark.timeout(480)
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
async def test_a_hundred_thousand_delayed_jobs_cost_nothing(
    fleet: Fleet, queue: Queue, many: int
) -> None:
    with anyio.fail_after(4 * PATIENCE):
        started = time.perf_counter()
        ids: list[str] = []
        for start in range(0, many, 20_000):
            ids += await queue.add_bulk(
                [
                    {"task_id": "brief", "args": [number], "delay": 3600}
                    for number in range(start, start + 20_000)
                ]
            )
        print(f"{len(ids)} jobs delayed in {time.perf_counter() - started:.1f} s")
        worker = await fleet.start("idle")
        await settled(worker)
        used, watched = cpu_seconds(worker), time.perf_counter()
        await anyio.sleep(3)  # what it takes to see nothing happen
        share = (cpu_seconds(worker) - used) / (time.perf_counter() - watched)
        removals = [await seconds(queue.remove_delayed(job_id)) for job_id in random.sample(ids, 9)]
        pages = [await seconds(queue.list_delayed(limit=50)) for _ in range(9)]
        counts = await queue.queue_stats()
    print(
        f"idle worker: {share:.2%} of a processor; remove_delayed {min(removals) * 1000:.1f} ms, ",
        end="",
    )
    print(f"list_delayed(limit=50) {min(pages) * 1000:.1f} ms")
    assert counts["delayed"] == many - 9
    assert share < 0.05
    assert min(removals) < 0.2
    assert min(pages) < 0.2


async def settled(worker: Program) -> None:
    """Wait until a worker that has begun has nothing more to do."""
    used = -1.0
    while used != (used := cpu_seconds(worker)):  # noqa: ASYNC110
        await anyio.sleep(0.5)


async def seconds(call: Any) -> float:
    started = time.perf_counter()
    assert await call
    return time.perf_counter() - started


# -- clocks that are wrong


SHIFT = (
    "import os, time\nright, by = time.time, float(os.environ['CLOCK_SHIFT'])\n"
    "time.time = lambda: right() + by\n"
)
PRODUCER = """
import anyio, json, sys, time
from asyncmq_nats.backends.nats.backend import NATSBackend
from asyncmq_nats.queues import Queue

async def main(first):
    async with NATSBackend() as backend:
        queue, due = Queue("fleet", backend), {}
        await queue._assets.declare_all()
        for number, delay in enumerate([0.05, 0.2, 0.5, 0.8, 1.1, 1.5], first):
            before = time.clock_gettime(time.CLOCK_REALTIME)
            await queue.add("brief", [number], delay=delay)
            due[number] = before + delay, time.clock_gettime(time.CLOCK_REALTIME) + delay
        print(json.dumps(due))

anyio.run(main, int(sys.argv[1]))
"""


@pytest.fixture
def shifted(tmp_path: Path) -> str:
    """Directory of a module that Python imports at its start, and that shifts its clock."""
    directory = tmp_path / "shifted"
    directory.mkdir()
    (directory / "sitecustomize.py").write_text(SHIFT)
    return str(directory)


def produce(fleet: Fleet, shifted: str, shift: float, first: int) -> dict[str, Sequence[float]]:
    """Run a producer whose clock is wrong.

    Return between which times each job is due, by the right clock.
    """
    environment = {
        **os.environ,
        "ASYNCMQ_NATS_SERVERS": fleet.url,
        "PYTHONPATH": shifted,
        "CLOCK_SHIFT": str(shift),
    }
    done = subprocess.run(
        [sys.executable, "-c", PRODUCER, str(first)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.returncode == 0, done.stderr
    due: dict[str, Sequence[float]] = json.loads(done.stdout)
    return due


@pytest.mark.parametrize(("worker", "producer"), [(2, -2), (-2, 2), (-2, -2)])
async def test_clocks_that_are_wrong_make_nothing_early_or_late(
    fleet: Fleet, queue: Queue, shifted: str, worker: int, producer: int
) -> None:
    with anyio.fail_after(2 * PATIENCE):
        await fleet.start("wrong", pythonpath=shifted, clock_shift=worker)
        due = await to_thread.run_sync(produce, fleet, shifted, producer, 100)
        await eventually(queue.queue_stats, lambda stats: stats["completed"] == len(due))
    late = {
        number: (started_at(fleet, number) - latest, started_at(fleet, number) - earliest)
        for number, (earliest, latest) in due.items()
    }
    print({number: f"{low:.3f} to {high:.3f} s late" for number, (low, high) in late.items()})
    assert all(high > -COARSE for _, high in late.values())
    # A wrong clock would make all of them late; a busy machine spares one.
    assert min(low for low, _ in late.values()) < 1.0


async def test_a_series_keeps_time_with_a_wrong_clock(
    fleet: Fleet, queue: Queue, shifted: str
) -> None:
    with anyio.fail_after(2 * PATIENCE):
        await fleet.start_all("ahead", pythonpath=shifted, clock_shift=2)
        await fleet.start_all("behind", pythonpath=shifted, clock_shift=-2)
        first = await queue.upsert_repeatable("brief", every=0.4, args=[7], name="series")
        await holds(lambda: len(fleet.watched.runs("7")) >= 6)
        assert await queue.pause_repeatable("series")
        ticks = await ended_ticks(queue)
    assert ticks[0] == round(first * 1000)
    assert [later - earlier for earlier, later in itertools.pairwise(ticks)] == [
        pytest.approx(400, abs=1)
    ] * (len(ticks) - 1)
    assert len(fleet.watched.runs("7")) == len(ticks)
    assert -COARSE <= started_at(fleet, "7") - ticks[-1] / 1000 <= 0.5
