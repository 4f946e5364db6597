"""Flows while workers and producers are killed.

Jobs run after their parents and end once, and a flow is there as a whole or not at all.
"""

import os
import random
import signal
import subprocess
import sys
from collections import Counter

import anyio
import pytest

from asyncmq_nats.backends.nats.backend import NATSBackend
from asyncmq_nats.backends.nats.embedded.server import EmbeddedServer
from asyncmq_nats.flow import FlowProducer
from asyncmq_nats.jobs import Job
from asyncmq_nats.queues import Queue
from asyncmq_nats.settings import Settings
from tests.nats.processes import PATIENCE, PROGRAM, Fleet, eventually, holds
from tests.running import only, wait_until_done

SEEDS = [11, 12, 13]
GRAPHS = 4
RETRIES = 2
FLOW = 12


@pytest.fixture
def settings() -> Settings:
    return Settings(stalled_after=1.3, max_stalls=50)


class Graph:
    """A random graph of jobs, some of which fail, and what must become of it."""

    def __init__(self, chance: random.Random, first: int) -> None:
        self.failures: dict[int, int] = {}
        self.parents: dict[int, list[int]] = {}
        self.jobs: list[Job] = []
        for number in range(first, first + chance.randint(20, 50)):
            self.parents[number] = chance.sample(
                list(self.parents), min(len(self.parents), chance.choice([0, 1, 1, 2, 3, 6]))
            )
            self.failures[number] = chance.choices([0, 1, 2, RETRIES + 1], [80, 10, 5, 5])[0]
            args = [number, self.failures[number], chance.uniform(0, 0.05)]
            depends_on = [f"node-{parent}" for parent in self.parents[number]] or None
            backoff = chance.choice([None, 0.1])
            self.jobs.append(
                Job(
                    task_id="node",
                    job_id=f"node-{number}",
                    args=args,
                    depends_on=depends_on or [],
                    max_retries=RETRIES,
                    backoff=backoff,
                )
            )

    def expect(self) -> dict[int, str]:
        """Return the state in which each job ends."""
        states: dict[int, str] = {}
        for number, parents in self.parents.items():
            if any(states[parent] != "completed" for parent in parents):
                states[number] = "waiting-children"
            else:
                states[number] = "failed" if self.failures[number] > RETRIES else "completed"
        return states


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
async def test_random_graphs_run_in_order_while_workers_are_killed(
    seed: int, fleet: Fleet, queue: Queue, nats_backend: NATSBackend
) -> None:
    chance = random.Random(seed)
    graphs = [Graph(chance, 1000 * number) for number in range(GRAPHS)]
    expected = {
        f"node-{number}": state for graph in graphs for number, state in graph.expect().items()
    }
    ends: Counter[str] = Counter()
    for word in ("completed", "failed"):
        await nats_backend.subscribe(
            f"amq.fleet.event.{word}.*",
            lambda signal: ends.update([signal.subject.rpartition(".")[2]]),
        )
    with anyio.fail_after(2 * PATIENCE):
        workers = await fleet.start_all("a", "b", "c", asyncmq_nats_tasks="graph_tasks")
        losses = 0
        for graph in graphs:
            await FlowProducer(nats_backend).add_flow(
                "fleet", chance.sample(graph.jobs, len(graph.jobs))
            )
            await anyio.sleep(chance.uniform(0.05, 0.4))
            lost = chance.randrange(3)
            workers[lost].kill()
            workers[lost] = fleet.launch(workers[lost].name, asyncmq_nats_tasks="graph_tasks")
            losses += 1

        async def ended() -> int:
            stats = await queue.queue_stats()
            return stats["completed"] + stats["failed"]

        await eventually(
            ended,
            lambda count: count == sum(state != "waiting-children" for state in expected.values()),
            within=30,
        )
        # A job whose worker was lost after it had ended is delivered once more, and nothing comes
        # of it.
        await eventually(
            lambda: queue.get_job_count_by_types("waiting", "active", "delayed"),
            lambda count: count == 0,
        )
    assert {job["id"]: job["status"] for job in await queue.get_jobs()} == expected
    unfinished = list(expected.values()).count("waiting-children")
    await holds(lambda: ends.total() >= len(expected) - unfinished)
    assert ends == Counter(
        [job_id for job_id, state in expected.items() if state != "waiting-children"]
    )
    runs = check_order(
        (fleet.watched.notes / "trace").read_text().splitlines(),
        {k: v for graph in graphs for k, v in graph.parents.items()},
    )
    stalls = sum(job["stalls"] > 0 for job in await queue.get_jobs())
    print(
        f"seed {seed}: {len(expected)} jobs, {Counter(expected.values())}, "
        f"{losses} workers killed: {runs} runs, {stalls} stalled"
    )


def check_order(lines: list[str], parents: dict[int, list[int]]) -> int:
    """Check that every run began after all parents had completed; return the number of runs."""
    ended: set[int] = set()
    runs = 0
    for line in lines:
        word, number = line.split()[0], int(line.split()[1])
        if word == "end":
            ended.add(number)
        else:
            runs += 1
            assert set(parents[number]) <= ended, number
    return runs


MESSAGES = (0, 1, FLOW // 2, FLOW + 1)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["flow", "add"])
async def test_of_what_a_killed_producer_adds_all_runs_or_nothing_is_there(
    way: str, server: EmbeddedServer, nats_backend: NATSBackend, fleet: Fleet
) -> None:
    """The producer dies after 0, 1, 2, … messages; workers finish what it began."""
    with anyio.fail_after(2 * PATIENCE):
        for number in MESSAGES:
            await Queue(f"flow_{number}", nats_backend)._assets.declare()
        producers = [start_producer(server.url, number, way) for number in MESSAGES]
        for producer in producers:
            assert await anyio.to_thread.run_sync(producer.wait, 40) == -signal.SIGKILL
        for number in MESSAGES:
            fleet.queue = f"flow_{number}"
            fleet.launch(f"worker-{number}")
        for number in MESSAGES:
            queue = Queue(f"flow_{number}", nats_backend)
            before = FLOW - 1 if way == "add" else 0
            expected = before + (FLOW - before if number else 0)
            await only(queue, completed=expected, within=45)


def start_producer(url: str, kill_after: int, way: str) -> "subprocess.Popen[bytes]":
    settings = {
        "ASYNCMQ_NATS_SERVERS": url,
        "QUEUE": f"flow_{kill_after}",
        "JOBS": str(FLOW),
        "KILL_AFTER": str(kill_after),
        "WAY": way,
    }
    return subprocess.Popen(
        [sys.executable, str(PROGRAM.with_name("dying_producer.py"))], env=os.environ | settings
    )


async def test_a_killed_attempt_adds_no_follow_up(fleet: Fleet, queue: Queue) -> None:
    """The first worker is killed after it has added a follow-up, the second completes.

    There is one follow-up, and not two.
    """
    job_id = await queue.add("follow", ["word"])
    with anyio.fail_after(2 * PATIENCE):
        first = await fleet.start("first", asyncmq_nats_tasks="follow_tasks")
        await fleet.watched.begun("follow")
        first.kill()
        await only(queue, active=1)
        await fleet.start("second", asyncmq_nats_tasks="follow_tasks")
        await fleet.watched.begun("follow", 2)
        fleet.watched.say("word")
        assert await queue.wait_for(job_id, timeout=PATIENCE) == "second"
        await wait_until_done(queue)
    await only(queue, completed=2)
