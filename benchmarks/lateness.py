"""How late delayed jobs start, and what a promotion costs.

    python benchmarks/lateness.py [alone spread burst many promote workers] [--rounds 5]

alone: one job at a time. spread: random delays on an idle worker. burst, many: 200 and `--burst`
jobs that are due at one instant. promote: as many promoted and not run, as their queue is paused.
workers: `--backlog` jobs that are due within ten seconds, with one worker process and with two.
CPU time tells more than the clock on a machine that does other work.
"""

import argparse
import random
import statistics
import time

import anyio
from measuring import Cost, cpu_seconds, launch, quantile, run_worker, server_pid

from asyncmq_nats import NATSBackend, Queue, Settings
from asyncmq_nats.runtime.program import run_program
from asyncmq_nats.runtime.registry import TaskRegistry

KINDS = ("alone", "spread", "burst", "many", "promote", "workers")
registry = TaskRegistry()
started: list[float] = []


async def note_start(due: float) -> None:
    started.append(time.time() - due)


registry.register(note_start, queue="bench", name="note_start")


def lateness() -> str:
    late = [seconds * 1000 for seconds in started]
    text = f"late by p50 {quantile(late, 0.5):.1f} ms, p95 {quantile(late, 0.95):.1f} ms"
    return f"{text}, max {max(late):.1f} ms; early: {sum(value < -0.5 for value in late)}"


def make_queue(name: str, backend: NATSBackend, concurrency: int = 100) -> Queue:
    return Queue(name, backend, concurrency=concurrency, registry=registry, any_task=True)


async def add_due(queue: Queue, jobs: int, due: float, within: float = 0.0) -> None:
    """Add jobs that are due at one instant, or evenly in the seconds after it."""
    for start in range(0, jobs, 1000):
        now = time.time()
        times = [due + within * number / jobs for number in range(start, min(start + 1000, jobs))]
        entries = [{"task_id": "note_start", "args": [at], "delay": at - now} for at in times]
        await queue.add_bulk(entries)


async def wait_started(jobs: int) -> None:
    while len(started) < jobs:  # noqa: ASYNC110  to wake for each job would be in its way
        await anyio.sleep(0.01)


async def alone(backend: NATSBackend, jobs: int) -> None:
    """One job at a time, on a worker that does nothing else."""
    started.clear()
    queue = make_queue("alone", backend, 10)
    async with anyio.create_task_group() as group:
        await group.start(queue.run)
        for number in range(jobs):
            delay = random.uniform(0.02, 0.8)
            await queue.add("note_start", [time.time() + delay], delay=delay)
            await wait_started(number + 1)
        group.cancel_scope.cancel()
    print(f"{jobs} jobs, one at a time: {lateness()}", flush=True)


async def spread(backend: NATSBackend, jobs: int) -> None:
    """Random delays between 0.05 and 3 s."""
    started.clear()
    queue = make_queue("spread", backend, 10)
    async with anyio.create_task_group() as group:
        await group.start(queue.run)
        for _ in range(jobs):
            delay = random.uniform(0.05, 3.0)
            await queue.add("note_start", [time.time() + delay], delay=delay)
        await wait_started(jobs)
        group.cancel_scope.cancel()
    print(f"{jobs} jobs with delays of 0.05 to 3 s: {lateness()}", flush=True)


async def burst(backend: NATSBackend, jobs: int, number: int) -> float:
    """All due at one instant, which is long enough ahead for all of them to be added."""
    started.clear()
    queue = make_queue(f"burst-{jobs}-{number}", backend)
    due, cost = time.time() + 2 + jobs / 4000, Cost()
    await add_due(queue, jobs, due)
    async with anyio.create_task_group() as group:
        await group.start(queue.run)
        await anyio.sleep(max(0.0, due - 0.05 - time.time()))
        with cost.measure():
            await wait_started(jobs)
            taken = time.time() - due
        group.cancel_scope.cancel()
    print(
        f"{jobs:,} jobs due at one instant: {jobs / taken:,.0f} jobs/s; {lateness()}; "
        f"{cost.of(jobs)}",
        flush=True,
    )
    return jobs / taken


async def promote(backend: NATSBackend, jobs: int, number: int) -> None:
    """Jobs that become ready and are not run: their queue is paused."""
    queue, cost = make_queue(f"promote-{number}", backend), Cost()
    await queue.pause()
    due = time.time() + 1 + jobs / 4000
    await add_due(queue, jobs, due)
    bucket = f"KV_amq_{queue.name}_scheduler"
    async with anyio.create_task_group() as group:
        await group.start(queue.run)
        await anyio.sleep(max(0.0, due - 0.05 - time.time()))
        with cost.measure():
            # No event says so. A worker has some records of its own.
            while await backend.count(bucket) > 10:  # noqa: ASYNC110
                await anyio.sleep(0.02)
            taken = time.time() - due
        group.cancel_scope.cancel()
    print(f"{jobs:,} promotions: {jobs / taken:,.0f}/s; {cost.of(jobs)}", flush=True)


async def workers(backend: NATSBackend, url: str, jobs: int, count: int, within: float) -> None:
    """Jobs due within some seconds, run by some worker processes."""
    queue = make_queue(f"workers-{count}-{time.time_ns()}", backend)
    await queue.queue_stats()
    due = time.time() + 5 + jobs / 4000
    await add_due(queue, jobs, due, within)
    processes = await anyio.to_thread.run_sync(
        lambda: launch(__file__, count, be="worker", url=url, queue=queue.name)
    )
    pid = server_pid()
    try:
        for each in processes:
            each.go()
        for each in processes:
            await each.wait_started()
        await anyio.sleep(max(0.0, due - 0.5 - time.time()))
        server, own = cpu_seconds(pid), [each.cpu() for each in processes]
        while (await queue.queue_stats())["completed"] < jobs:  # noqa: ASYNC110
            await anyio.sleep(0.2)
        taken = time.time() - due
        server = (cpu_seconds(pid) - server) / jobs * 1e6
        used = sum(each.cpu() - before for each, before in zip(processes, own, strict=True))
        print(
            f"{jobs:,} jobs due within {within:.0f} s, {count} workers: all ended after "
            f"{taken:.1f} s, {jobs / taken:,.0f} jobs/s; {used / jobs * 1e6:.0f} µs of the "
            f"workers, {server:.0f} µs of the server each",
            flush=True,
        )
    finally:
        for each in processes:
            each.stop()


async def measure(kind: str, backend: NATSBackend, arguments: argparse.Namespace) -> None:
    rounds = range(arguments.rounds)
    if kind == "alone":
        await alone(backend, 50)
    elif kind == "spread":
        await spread(backend, 200)
    elif kind == "workers":
        for count in (1, 2):
            await workers(backend, backend.url, arguments.backlog, count, 10.0)
    elif kind == "promote":
        for number in rounds:
            await promote(backend, arguments.burst, number)
    else:
        jobs = 200 if kind == "burst" else arguments.burst
        rates = [await burst(backend, jobs, number) for number in rounds]
        print(f"median: {statistics.median(rates):,.0f} jobs/s", flush=True)


async def main(arguments: argparse.Namespace) -> None:
    backend = NATSBackend.embedded()
    try:
        await backend.connect()
        for kind in arguments.kinds:
            await measure(kind, backend, arguments)
    finally:
        await backend.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kinds", nargs="*", default=KINDS, metavar="|".join(KINDS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--burst", type=int, default=20_000)
    parser.add_argument("--backlog", type=int, default=100_000)
    parser.add_argument("--be", help=argparse.SUPPRESS)
    parser.add_argument("--url", help=argparse.SUPPRESS)
    parser.add_argument("--queue", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if unknown := set(arguments.kinds) - set(KINDS):
        parser.error(f"there is no {' '.join(unknown)}")
    if arguments.be == "worker":
        run_worker(arguments.url, arguments.queue, 100, registry, Settings())
    else:
        run_program(lambda: main(arguments))
