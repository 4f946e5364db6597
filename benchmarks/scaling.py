"""What a job costs with more worker processes, and with more jobs in its queue.

    python benchmarks/scaling.py [processes sizes] [--jobs 20000] [--sizes 1000 100000 1000000]

processes: jobs that do nothing, and that compute for 1 ms, by `Worker(processes=N)`. sizes: 100
tasks add `--jobs` jobs to a queue in which 1,000 to 1,000,000 wait, and as many are run. Each
figure is CPU time: of workers or producer, and of the server. `on paper` is the rate of that many
cores if they do nothing else: cores ÷ CPU time of a job.
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import anyio
from measuring import Cost, cpu_seconds, launch, server_pid, wait_for_go

from asyncmq_nats import NATSBackend, Queue
from asyncmq_nats.runtime.program import run_program
from asyncmq_nats.runtime.supervisor import is_child
from asyncmq_nats.tasks import TaskRegistry
from asyncmq_nats.workers import Worker

SLOTS: Final = 100
PRODUCERS: Final = 100
ROUNDS: Final = 3
POLL_SECONDS: Final = 0.05

registry = TaskRegistry()
names = itertools.count(1)


async def work(seconds: float) -> int:
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        pass
    return 1


registry.register(work, queue="bench", name="work")


def make_queue(backend: NATSBackend) -> Queue:
    return Queue(f"bench-{next(names)}", backend, SLOTS, registry=registry, any_task=True)


async def fill(queue: Queue, jobs: int, seconds: float = 0.0) -> None:
    for start in range(0, jobs, 10_000):
        count = min(10_000, jobs - start)
        await queue.add_bulk([{"task_id": "work", "args": [seconds]}] * count)


def cpu_of_all(pid: int) -> float:
    """Return the CPU seconds of a process and of those that it has started."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return cpu_seconds(pid) + sum(cpu_of_all(int(child)) for child in children)


async def run(backend: NATSBackend, queue: Queue, jobs: int, processes: int) -> tuple[float, ...]:
    """Run jobs of a queue. Return their rate, and the CPU µs of workers and server for each."""
    (worker,) = launch(
        __file__, 1, be="worker", url=backend.url, queue=queue.name, processes=processes
    )
    server = server_pid()

    async def done() -> int:
        return int((await queue.queue_stats())["completed"])

    try:
        before = await done()
        worker.go()
        while (first := await done()) - before < jobs // 10:  # noqa: ASYNC110  all are at work
            await anyio.sleep(POLL_SECONDS)
        begun, cpu = time.monotonic(), (cpu_of_all(worker.process.pid), cpu_seconds(server))
        while (last := await done()) - before < jobs:  # noqa: ASYNC110
            await anyio.sleep(POLL_SECONDS)
        count, taken = last - first, time.monotonic() - begun
        used = cpu_of_all(worker.process.pid) - cpu[0], cpu_seconds(server) - cpu[1]
    finally:
        worker.stop()
    return count / taken, used[0] / count * 1e6, used[1] / count * 1e6


async def measure_processes(backend: NATSBackend, jobs: int) -> None:
    print("| jobs | processes | jobs/s | worker, µs | server, µs | on paper, 2 and 4 cores |")
    print("| --- | --- | --- | --- | --- | --- |")
    for what, seconds in (("do nothing", 0.0), ("compute for 1 ms", 0.001)):
        for processes in (1, 2):
            runs = []
            for _ in range(ROUNDS):
                queue, count = make_queue(backend), jobs if not seconds else jobs // 10
                # A tenth of them warms up, and the last are not waited for.
                await fill(queue, count * 3 // 2, seconds)
                runs.append(await run(backend, queue, count, processes))
                await queue.obliterate(force=True)
            rate, worker, server = (statistics.median(column) for column in zip(*runs, strict=True))
            paper = [cores / (worker + server) * 1e6 for cores in (2, 4)]
            print(
                f"| {what} | {processes} | {rate:,.0f} | {worker:.0f} | {server:.0f} "
                f"| {paper[0]:,.0f}, {paper[1]:,.0f} |",
                flush=True,
            )


async def add(queue: Queue, jobs: int) -> tuple[float, float]:
    """Add jobs by 100 tasks. Return the CPU µs of this process and of the server for each."""
    cost = Cost()

    async def produce() -> None:
        for _ in range(jobs // PRODUCERS):
            await queue.add("work", [0.0])

    with cost.measure():
        async with anyio.create_task_group() as group:
            for _ in range(PRODUCERS):
                group.start_soon(produce)
    return cost.own / jobs * 1e6, cost.server / jobs * 1e6


async def measure_sizes(backend: NATSBackend, jobs: int, sizes: Sequence[int]) -> None:
    print("| jobs that wait | add: producer, server, µs | run: worker, server, µs | both |")
    print("| --- | --- | --- | --- |")
    least = 0.0
    for size in sizes:
        rounds = []
        for _ in range(ROUNDS):
            queue = make_queue(backend)
            await fill(queue, size)
            added = await add(queue, jobs)
            _, *ran = await run(backend, queue, jobs, 1)
            rounds.append((*added, *ran))
            await queue.obliterate(force=True)
        median = [statistics.median(column) for column in zip(*rounds, strict=True)]
        least = least or sum(median)
        own, server, worker, run_server = median
        print(
            f"| {size:,} | {own:.0f} + {server:.0f} | {worker:.0f} + {run_server:.0f} "
            f"| {sum(median):.0f}, {sum(median) / least:.2f} × |",
            flush=True,
        )


async def main(arguments: argparse.Namespace) -> None:
    backend = NATSBackend.embedded()
    await backend.connect()
    try:
        if "processes" in arguments.kinds:
            await measure_processes(backend, arguments.jobs)
        if "sizes" in arguments.kinds:
            await measure_sizes(backend, arguments.jobs, arguments.sizes)
    finally:
        await backend.close()


def be_worker(url: str, queue: str, processes: int) -> None:
    if not is_child():  # the processes that it starts need not wait
        wait_for_go()
    made = Queue(queue, NATSBackend(url), SLOTS, registry=registry, any_task=True)
    Worker(made, processes=processes).start()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kinds", nargs="*", default=["processes", "sizes"])
    parser.add_argument("--jobs", type=int, default=20_000)
    parser.add_argument("--sizes", type=int, nargs="*", default=[1_000, 100_000, 1_000_000])
    parser.add_argument("--be", help=argparse.SUPPRESS)
    parser.add_argument("--url", help=argparse.SUPPRESS)
    parser.add_argument("--queue", help=argparse.SUPPRESS)
    parser.add_argument("--processes", type=int, default=1, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if unknown := set(given.kinds) - {"processes", "sizes"}:
        parser.error(f"there is no {' '.join(unknown)}")
    if given.be == "worker":
        be_worker(given.url, given.queue, given.processes)
    else:
        run_program(lambda: main(given))
