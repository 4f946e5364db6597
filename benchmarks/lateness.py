"""How late delayed jobs start, and what a promotion costs.

Jobs with random delays on an idle worker, 200 and then many jobs that are due at one instant, and
the same number promoted without being run: the worker's CPU per promotion.

python benchmarks/lateness.py [--jobs 200] [--burst 20000]
"""

import argparse
import random
import time

import anyio

from asyncmq_nats import NATSBackend, Queue
from asyncmq_nats.runtime.program import run_program
from asyncmq_nats.runtime.registry import TaskRegistry

registry = TaskRegistry()
started: list[float] = []


async def note_start(due: float) -> None:
    started.append(time.time() - due)


registry.register(note_start, queue="bench", name="note_start")


def quantile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


async def spread(backend: NATSBackend, jobs: int) -> None:
    """Random delays between 0.05 and 3 s."""
    queue = Queue("spread", backend, concurrency=10, registry=registry, any_task=True)
    async with anyio.create_task_group() as group:
        await group.start(queue.run)
        for _ in range(jobs):
            delay = random.uniform(0.05, 3.0)
            await queue.add("note_start", [time.time() + delay], delay=delay)
        while len(started) < jobs:  # noqa: ASYNC110  to wake for each job would be in its way
            await anyio.sleep(0.05)
        group.cancel_scope.cancel()
    late = [seconds * 1000 for seconds in started]
    print(
        f"{jobs} jobs with delays of 0.05 to 3 s: "
        f"late by p50 {quantile(late, 0.5):.1f} ms, p95 {quantile(late, 0.95):.1f} ms, ",
        end="",
    )
    print(
        f"max {max(late):.1f} ms; "
        f"early: {sum(value < -0.5 for value in late)} (earliest {min(late):.2f} ms)"
    )


async def burst(backend: NATSBackend, jobs: int) -> None:
    """All due at one instant, which is long enough ahead for all of them to be added."""
    started.clear()
    queue = Queue(f"burst-{jobs}", backend, concurrency=100, registry=registry, any_task=True)
    due = time.time() + 3 + jobs / 5000
    for start in range(0, jobs, 1000):
        now = time.time()
        count = min(1000, jobs - start)
        await queue.add_bulk(
            [{"task_id": "note_start", "args": [due], "delay": due - now} for _ in range(count)]
        )
    async with anyio.create_task_group() as group:
        await group.start(queue.run)
        await anyio.sleep(max(0.0, due - time.time()))
        while len(started) < jobs:  # noqa: ASYNC110  to wake for each job would be in its way
            await anyio.sleep(0.01)
        taken = time.time() - due
        group.cancel_scope.cancel()
    late = [seconds * 1000 for seconds in started]
    print(
        f"{jobs:,} jobs due at one instant: "
        f"all started within {taken:.2f} s, {jobs / taken:,.0f} jobs/s; "
        f"late by p50 {quantile(late, 0.5):.1f} ms, p95 {quantile(late, 0.95):.1f} ms; early: ",
        end="",
    )
    print(sum(value < -0.0005 for value in started))


async def promote(backend: NATSBackend, jobs: int) -> None:
    """Jobs that become ready and are not run: their queue is paused."""
    queue = Queue("promote", backend, registry=registry, any_task=True)
    await queue.pause()
    due = time.time() + 1 + jobs / 5000
    for start in range(0, jobs, 1000):
        count, now = min(1000, jobs - start), time.time()
        await queue.add_bulk(
            [{"task_id": "note_start", "args": [due], "delay": due - now} for _ in range(count)]
        )
    async with anyio.create_task_group() as group:
        await group.start(queue.run)
        await anyio.sleep(max(0.0, due - 0.6 - time.time()))
        used = time.process_time()
        # Until there are only the pause and the secret. No event says so.
        while await backend.count("KV_amq_promote_scheduler") > 2:  # noqa: ASYNC110
            await anyio.sleep(0.05)
        each = (time.process_time() - used) / jobs * 1e6
        group.cancel_scope.cancel()
    print(f"{jobs:,} promotions: {each:.0f} µs of the worker's CPU each")


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=200)
    parser.add_argument("--burst", type=int, default=20_000)
    arguments = parser.parse_args()
    backend = NATSBackend.embedded()
    try:
        await spread(backend, arguments.jobs)
        await burst(backend, 200)
        await burst(backend, arguments.burst)
        await promote(backend, arguments.burst)
    finally:
        await backend.close()


if __name__ == "__main__":
    run_program(main)
