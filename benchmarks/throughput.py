"""Jobs per second, and CPU time of this process per job.

Adding one by one, concurrently and in bulk, and running no-op jobs, each beside plain nats-py doing
the same traffic. python benchmarks/throughput.py [--jobs 10000] [--rounds 3] [--only-adds]
[--before <another checkout>]

With `--before`, rounds of that code and of this one take turns, each in a process of its own.

Every figure is compared within a round, so that a noisy machine shifts both sides; the table shows
medians. The raw loop is the least that any queue on JetStream must do: pull requests into one
callback, parse, publish one record through a reply inbox of its own, ack. The start and the stop
of a worker, some 40 ms, are in its rows: a tenth of them with 10,000 jobs, little with 30,000.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import anyio
import nats
from nats.aio.client import Client
from nats.aio.msg import Msg

from asyncmq_nats import NATSBackend, Queue
from asyncmq_nats.runtime.program import run_program
from asyncmq_nats.runtime.registry import TaskRegistry

registry = TaskRegistry()


class Countdown:
    """How many jobs are still to run."""

    def __init__(self) -> None:
        self.left = 0
        self.over = anyio.Event()

    def start(self, jobs: int) -> None:
        self.left, self.over = jobs, anyio.Event()

    def note(self) -> None:
        self.left -= 1
        if self.left == 0:
            self.over.set()


countdown = Countdown()


async def no_operation(number: int) -> int:
    countdown.note()
    return number


registry.register(no_operation, queue="bench", name="no_operation")


@dataclass
class Figures:
    """Jobs per second, and microseconds of CPU time per job, by row, a value a round."""

    rows: dict[str, list[float]] = field(default_factory=dict)
    cpu: dict[str, list[float]] = field(default_factory=dict)

    def note(self, row: str, jobs: int, spent: "Spent") -> None:
        self.rows.setdefault(row, []).append(jobs / spent.seconds)
        self.cpu.setdefault(row, []).append(spent.cpu * 1e6 / jobs)

    def add(self, other: "Figures") -> None:
        for mine, theirs in ((self.rows, other.rows), (self.cpu, other.cpu)):
            for row, values in theirs.items():
                mine.setdefault(row, []).extend(values)


class Spent(NamedTuple):
    """The seconds that a piece of work took."""

    seconds: float
    cpu: float


def median_ratio(ones: list[float], others: list[float]) -> float:
    return statistics.median(one / other for one, other in zip(ones, others, strict=True))


async def timed(work: Callable[[], Awaitable[object]]) -> Spent:
    started, cpu = time.perf_counter(), time.process_time()
    await work()
    return Spent(time.perf_counter() - started, time.process_time() - cpu)


# -- plain nats-py


class Raw:
    """A stream like a queue's two, used by hand."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.js = client.jetstream()
        self.tokens = itertools.count()

    async def api(self, subject: str, payload: dict[str, object]) -> None:
        reply = json.loads(
            (
                await self.client.request(
                    f"$JS.API.{subject}", json.dumps(payload).encode(), timeout=5
                )
            ).data
        )
        if "error" in reply:
            raise RuntimeError(f"{subject}: {reply['error']}")

    async def prepare(self) -> None:
        base = {
            "storage": "file",
            "max_msgs_per_subject": 1,
            "discard": "old",
            "allow_direct": True,
        }
        await self.api(
            "STREAM.CREATE.raw",
            base | {"name": "raw", "subjects": ["raw.ready.*"], "retention": "workqueue"},
        )
        await self.api(
            "STREAM.CREATE.rawdone", base | {"name": "rawdone", "subjects": ["raw.done.>"]}
        )
        config = {
            "name": "c",
            "durable_name": "c",
            "ack_policy": "explicit",
            "max_ack_pending": -1,
            "filter_subject": "raw.ready.*",
        }
        await self.api(
            "CONSUMER.CREATE.raw.c.raw.ready.*", {"stream_name": "raw", "config": config}
        )

    @staticmethod
    def body(number: int) -> bytes:
        job = {
            "id": str(uuid.uuid4()),
            "task": "no_operation",
            "args": [number],
            "kwargs": {},
            "created_at": time.time(),
        }
        return json.dumps(job).encode()

    async def add(self, number: int) -> None:
        await self.js.publish(f"raw.ready.{uuid.uuid4()}", self.body(number), timeout=10)

    async def fill(self, jobs: int) -> None:
        for start in range(0, jobs, 500):
            async with anyio.create_task_group() as group:
                for number in range(start, min(start + 500, jobs)):
                    group.start_soon(self.add, number)

    # One loop of callbacks over one state.
    async def process(self, jobs: int, in_hand: int) -> None:  # noqa: C901
        """Pull, parse, publish a record, ack when it is confirmed.

        Until `jobs` are acknowledged.
        """
        finished = anyio.Event()
        acks: dict[str, str] = {}
        state = {"left": jobs, "asked": 0}
        inbox, replies = self.client.new_inbox(), self.client.new_inbox()

        async def ask(count: int) -> None:
            state["asked"] += count
            body = json.dumps({"batch": count, "expires": 30_000_000_000}).encode()
            await self.client.publish("$JS.API.CONSUMER.MSG.NEXT.raw.c", body, reply=inbox)

        async def on_job(msg: Msg) -> None:
            if not msg.reply:  # the end of a pull
                return
            job = json.loads(msg.data)
            record = json.dumps({**job, "status": "completed", "result": job["args"][0]}).encode()
            token = str(next(self.tokens))
            acks[token] = msg.reply
            await self.client.publish(f"raw.done.{job['id']}", record, reply=f"{replies}.{token}")

        async def on_confirmation(msg: Msg) -> None:
            if b'"error"' in msg.data:
                raise RuntimeError(msg.data)
            await self.client.publish(acks.pop(msg.subject.rpartition(".")[2]))
            state["left"] -= 1
            state["asked"] -= 1
            if state["asked"] <= in_hand // 2:
                await ask(in_hand - state["asked"])
            if not state["left"]:
                finished.set()

        subscriptions = [
            await self.client.subscribe(inbox, cb=on_job),
            await self.client.subscribe(f"{replies}.*", cb=on_confirmation),
        ]
        await ask(in_hand)
        with anyio.fail_after(60):
            await finished.wait()
        for subscription in subscriptions:
            await subscription.unsubscribe()


# -- the queue


async def add_sequentially(queue: Queue, jobs: int) -> None:
    for number in range(jobs):
        await queue.add("no_operation", [number])


async def raw_sequentially(raw: Raw, jobs: int) -> None:
    for number in range(jobs):
        await raw.add(number)


async def add_concurrently(
    add: Callable[[int], Awaitable[object]], jobs: int, producers: int
) -> None:
    async def produce(first: int) -> None:
        for number in range(first, jobs, producers):
            await add(number)

    async with anyio.create_task_group() as group:
        for first in range(producers):
            group.start_soon(produce, first)


async def process(queue: Queue, jobs: int) -> None:
    """Start a worker in this process, run the backlog, and stop the worker.

    Then every outcome is confirmed, and every job acknowledged.
    """
    runner = queue.runner()
    countdown.start(jobs)
    async with anyio.create_task_group() as group:
        await group.start(runner.run)
        await countdown.over.wait()
        runner.stop()


async def one_round(figures: Figures, jobs: int, *, only_adds: bool) -> None:
    backend = NATSBackend.embedded()
    await backend.connect()
    client = await nats.connect(backend.url)
    raw = Raw(client)
    await raw.prepare()
    try:
        await measure_adds(figures, backend, raw, jobs)
        for concurrency in () if only_adds else (100, 10):
            await measure_processing(figures, backend, raw, jobs, concurrency)
    finally:
        await client.close()
        await backend.close()


async def measure_adds(figures: Figures, backend: NATSBackend, raw: Raw, jobs: int) -> None:
    queue = Queue("adds", backend)
    await queue.add("no_operation", [0])
    few = jobs // 4
    figures.note("add one by one", few, await timed(lambda: add_sequentially(queue, few)))
    figures.note("raw js.publish one by one", few, await timed(lambda: raw_sequentially(raw, few)))
    figures.note(
        "add by 100 producers",
        jobs,
        await timed(lambda: add_concurrently(lambda n: queue.add("no_operation", [n]), jobs, 100)),
    )
    figures.note(
        "raw js.publish by 100 producers",
        jobs,
        await timed(lambda: add_concurrently(raw.add, jobs, 100)),
    )
    thousand = [{"task_id": "no_operation", "args": [number]} for number in range(1000)]
    figures.note("add_bulk of 1,000", 1000, await timed(lambda: queue.add_bulk(thousand)))
    all_jobs = [{"task_id": "no_operation", "args": [number]} for number in range(jobs)]
    figures.note(f"add_bulk of {jobs:,}", jobs, await timed(lambda: queue.add_bulk(all_jobs)))
    await raw.client.jetstream().purge_stream("raw")


async def measure_processing(
    figures: Figures, backend: NATSBackend, raw: Raw, jobs: int, concurrency: int
) -> None:
    queue = Queue(
        f"bench{concurrency}", backend, concurrency=concurrency, registry=registry, any_task=True
    )
    await add_concurrently(lambda number: queue.add("no_operation", [number]), jobs, 100)
    figures.note(f"run, concurrency {concurrency}", jobs, await timed(lambda: process(queue, jobs)))
    await check_results(queue, jobs)
    await raw.fill(jobs)
    figures.note(
        f"raw loop, {concurrency} in hand",
        jobs,
        await timed(lambda: raw.process(jobs, concurrency)),
    )


async def check_results(queue: Queue, jobs: int) -> None:
    """Make sure that each job has ended, and that nothing of it is left.

    Acknowledgements are not confirmed.
    """
    stats: dict[str, int] = {}
    with anyio.fail_after(5):
        while stats != dict.fromkeys(stats, 0) | {"completed": jobs}:
            stats = await queue.queue_stats()


PAIRS = (
    ("add one by one", "raw js.publish one by one"),
    ("add by 100 producers", "raw js.publish by 100 producers"),
    ("run, concurrency 100", "raw loop, 100 in hand"),
    ("run, concurrency 10", "raw loop, 10 in hand"),
)


def show(figures: Figures) -> None:
    raw_of = dict(PAIRS)
    print(f"{'':34}{'jobs/s':>10}{'CPU, µs':>10}{'ratio to raw':>14}{'of CPU':>8}")
    for row, rates in figures.rows.items():
        ratios = ""
        if row in raw_of:
            rate = median_ratio(rates, figures.rows[raw_of[row]])
            cpu = median_ratio(figures.cpu[raw_of[row]], figures.cpu[row])
            ratios = f"{rate:14.2f}{cpu:8.2f}"
        print(
            f"{row:34}{statistics.median(rates):10,.0f}"
            f"{statistics.median(figures.cpu[row]):10.1f}{ratios}"
        )


def compare(before: Figures, now: Figures) -> None:
    print(
        f"{'':34}{'jobs/s before':>14}{'now':>9}{'times':>7}{'CPU, µs':>10}{'now':>7}{'times':>7}"
    )
    for row, rates in now.rows.items():
        old, cpu, old_cpu = before.rows[row], now.cpu[row], before.cpu[row]
        print(
            f"{row:34}{statistics.median(old):14,.0f}{statistics.median(rates):9,.0f}"
            f"{median_ratio(rates, old):7.2f}{statistics.median(old_cpu):10.1f}"
            f"{statistics.median(cpu):7.1f}{median_ratio(old_cpu, cpu):7.2f}"
        )


def in_turns(checkout: str, options: Sequence[str], rounds: int) -> None:
    """Measure another checkout and this one in turns, and show both."""
    figures = {checkout: Figures(), str(Path(__file__).parents[1]): Figures()}
    for number in range(rounds):
        print(f"round {number + 1} of {rounds}", flush=True)
        for path in list(figures)[:: 1 if number % 2 else -1]:  # each is the first in turn
            command = [sys.executable, __file__, *options, "--rounds", "1", "--json"]
            environment = os.environ | {"PYTHONPATH": path}
            run = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
            figures[path].add(Figures(**json.loads(run.stdout)))
    compare(*figures.values())


async def main(arguments: argparse.Namespace) -> None:
    figures = Figures()
    for number in range(arguments.rounds):
        if not arguments.json:
            print(f"round {number + 1} of {arguments.rounds}", flush=True)
        await one_round(figures, arguments.jobs, only_adds=arguments.only_adds)
    if arguments.json:
        print(json.dumps({"rows": figures.rows, "cpu": figures.cpu}))
    else:
        show(figures)


def measure() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only-adds", action="store_true")
    parser.add_argument("--before", metavar="CHECKOUT", help="code to compare this one with")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if arguments.before is None:
        run_program(partial(main, arguments))
    else:
        options = ["--jobs", str(arguments.jobs), *["--only-adds"] * arguments.only_adds]
        in_turns(arguments.before, options, arguments.rounds)


if __name__ == "__main__":
    measure()
