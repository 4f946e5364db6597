"""Who gets which job, and when: order, urgent jobs, sharing, rate limit, pause, shutdown.

Workers are processes of their own. python benchmarks/flow.py [order urgent free share limit pause
stop]

A row is a promise, what was measured and the target. Run it on a machine that has nothing else to
do.
"""

import argparse
import logging
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import anyio
from measuring import quantile

from asyncmq_nats import NATSBackend, Queue
from asyncmq_nats.runtime.program import run_program
from asyncmq_nats.runtime.registry import TaskRegistry
from asyncmq_nats.settings import Settings
from asyncmq_nats.workers import Worker

registry = TaskRegistry()
PATIENCE = 60.0


async def work(seconds: float = 0.0) -> tuple[float, int]:
    """Return when this job started and in which process."""
    started = time.time()
    if seconds:
        await anyio.sleep(seconds)
    return started, os.getpid()


registry.register(work, queue="bench", name="work")

# -- workers


def run_worker(arguments: argparse.Namespace) -> None:
    logging.basicConfig(level=logging.WARNING)
    settings = Settings(shutdown_timeout=arguments.shutdown_timeout)
    backend = NATSBackend(arguments.worker, settings=settings)
    queue = Queue(
        arguments.queue, backend, arguments.concurrency, arguments.limit, registry=registry
    )
    Worker(queue).start()


def launch(
    queue: Queue, concurrency: int, *, limit: int | None = None, shutdown_timeout: float = 30.0
) -> subprocess.Popen[bytes]:
    """Start a worker process and return at once."""
    assert isinstance(queue.backend, NATSBackend)
    command = [
        sys.executable,
        __file__,
        "--worker",
        queue.backend.url,
        "--queue",
        queue.name,
        "--concurrency",
        str(concurrency),
    ]
    command += ["--shutdown-timeout", str(shutdown_timeout)] + (
        [] if limit is None else ["--limit", str(limit)]
    )
    return subprocess.Popen(command)


@asynccontextmanager
async def workers(
    queue: Queue, count: int, concurrency: int, **options: Any
) -> AsyncIterator[list[subprocess.Popen[bytes]]]:
    """Run worker processes and stop them afterwards."""
    processes = [launch(queue, concurrency, **options) for _ in range(count)]
    try:
        await until(queue.list_workers, lambda found: len(found) == count)
        yield processes
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            await anyio.to_thread.run_sync(process.wait)


async def until(read: Callable[[], Awaitable[Any]], condition: Callable[[Any], bool]) -> Any:
    with anyio.fail_after(PATIENCE):
        # No event tells of what other processes do.
        while not condition(value := await read()):  # noqa: ASYNC110
            await anyio.sleep(0.01)
    return value


async def completed(queue: Queue, count: int) -> list[tuple[float, int]]:
    """Wait until `count` jobs have completed and return their starts, in order."""
    await until(queue.queue_stats, lambda stats: stats["completed"] >= count)
    return sorted(
        (started, pid)
        for started, pid in [job["result"] for job in await queue.get_jobs("completed")]
    )


def jobs(count: int, seconds: float = 0.0, priority: int = 5) -> list[dict[str, Any]]:
    return [{"task_id": "work", "args": [seconds], "priority": priority} for _ in range(count)]


def row(promise: str, measured: str, target: str) -> None:
    print(f"{promise:46} {measured:72} {target}", flush=True)


def milliseconds(values: Sequence[float]) -> str:
    return (
        f"p50 {statistics.median(values) * 1000:.1f}, "
        f"p95 {quantile(values, 0.95) * 1000:.1f}, max {max(values) * 1000:.1f} ms"
    )


# -- what is measured


async def order(backend: NATSBackend) -> None:
    queue = Queue("order", backend)
    priorities = [-3, 0, 5, 5, 9, 1000] * 50
    random.shuffle(priorities)
    ids = await queue.add_bulk([jobs(1, priority=priority)[0] for priority in priorities])
    async with workers(queue, 1, 1):
        await completed(queue, 300)
    starts = {job["id"]: job["result"][0] for job in await queue.get_jobs("completed")}
    wanted = sorted(range(300), key=lambda number: (priorities[number], number))
    ran = sorted(range(300), key=lambda number: starts[ids[number]])
    wrong = sum(one != other for one, other in zip(wanted, ran, strict=True))
    row("300 jobs, 5 priorities, concurrency 1", f"{wrong} out of place", "0")


async def urgent(backend: NATSBackend) -> None:
    late: list[float] = []
    for number in range(2):
        queue = Queue(f"urgent{number}", backend)
        await queue.add_bulk(jobs(5000, 0.01, priority=9))
        async with workers(queue, 1, 10):
            await until(queue.queue_stats, lambda stats: stats["completed"] > 300)
            for _ in range(20):
                added = time.time()
                started, _ = await queue.wait_for(
                    await queue.add("work", [0.01], priority=0), timeout=PATIENCE
                )
                late.append(started - added)
                await anyio.sleep(random.uniform(0.02, 0.15))
            left = (await queue.queue_stats())["waiting"]
    row(
        "urgent job in a backlog of 5,000 of 10 ms",
        f"{milliseconds(late)} ({len(late)} times; {left} still waited)",
        "p95 30 ms",
    )


async def free(backend: NATSBackend) -> None:
    idle: list[float] = []
    late: list[float] = []
    for number in range(5):
        queue = Queue(f"free{number}", backend)
        async with workers(queue, 2, 2):
            await queue.add("work", [0.1], priority=0)  # both tiers have been asked
            await until(queue.queue_stats, lambda stats: stats["completed"] == 1)
            short = await queue.add("work", [2.0])
            await queue.add_bulk(jobs(3, 5.0))
            await until(queue.queue_stats, lambda stats: stats["active"] == 4)
            fifth = await queue.add("work", [0.0], priority=(0, 5)[number % 2])
            started, _ = await queue.wait_for(short, timeout=PATIENCE)
            late.append((await queue.wait_for(fifth, timeout=PATIENCE))[0] - started - 2.0)
            added = time.time()
            idle.append(
                (
                    await queue.wait_for(
                        await queue.add("work", [0.0], priority=0), timeout=PATIENCE
                    )
                )[0]
                - added
            )
    row("2×2 slots, 4 long jobs: a fifth, after a slot", milliseconds(late), "at once")
    row("a sixth, while one slot of four is free", milliseconds(idle), "at once")


async def share(backend: NATSBackend) -> None:
    queue = Queue("share", backend)
    await queue.add_bulk(jobs(100, 1.0))
    async with workers(queue, 1, 50) as (first,):
        await anyio.sleep(0.2)
        async with workers(queue, 1, 50):
            starts = await completed(queue, 100)
    pids = Counter(pid for _, pid in starts)
    seconds = starts[-1][0] - starts[0][0]
    measured = (
        f"{pids[first.pid]} + {100 - pids[first.pid]} jobs, "
        f"last start {seconds:.2f} s after the first"
    )
    row("100 jobs of 1 s, a second worker 0.2 s later", measured, "50 + 50")


async def limit(backend: NATSBackend) -> None:
    queue = Queue("limit", backend)
    await queue.add_bulk(jobs(600))
    async with workers(queue, 3, 20, limit=50):
        starts = await completed(queue, 600)
    times = [started - starts[0][0] for started, _ in starts]
    by_second = Counter(int(at) for at in times)
    print("  starts by second:", *(by_second[second] for second in range(int(times[-1]) + 1)))
    print("  starts by worker:", *sorted(Counter(pid for _, pid in starts).values()))
    most = {
        span: max(sum(begin <= at < begin + span for at in times) for begin in times)
        for span in (0.1, 1.0, 3.0)
    }
    used = (600 - 50) / (50 * times[-1])
    row(
        "limit 50 a second, 3 workers, 600 jobs",
        f"{used * 100:.1f} % of the allowance used",
        "95 %",
    )
    row(
        "  most starts within 0.1 / 1 / 3 s",
        f"{most[0.1]} / {most[1.0]} / {most[3.0]}",
        "55 / 100 / 200 (limit and one burst)",
    )


async def pause(backend: NATSBackend) -> None:
    queue = Queue("pause", backend)
    await queue.add_bulk(jobs(20_000, 0.01))
    calls: list[float] = []
    windows: list[tuple[float, float]] = []
    async with workers(queue, 2, 10):
        for _ in range(20):
            await anyio.sleep(0.1)
            begun = time.time()
            await queue.pause()
            paused = time.time()
            calls.append(paused - begun)
            await anyio.sleep(0.1)
            resumed = time.time()
            await queue.resume()
            windows.append((paused, resumed))
        await anyio.sleep(0.1)
    times = [started for started, _ in await completed(queue, 1)]
    inside = sum(paused < at < resumed for at in times for paused, resumed in windows)
    first = [min(at for at in times if at > resumed) - resumed for _, resumed in windows]
    row(
        "pause() under load", f"{milliseconds(calls)}; {inside} starts during 20 pauses", "0 starts"
    )
    row("resume() to the first start", milliseconds(first), "at once")


async def stop(backend: NATSBackend) -> None:
    queue = Queue("stop", backend)
    await queue.add_bulk(jobs(40, 2.0))
    process = launch(queue, 20)
    await until(queue.queue_stats, lambda stats: stats["active"] == 20)
    signalled = time.time()
    process.send_signal(signal.SIGTERM)
    code = await anyio.to_thread.run_sync(process.wait)
    took, stats = time.time() - signalled, await queue.queue_stats()
    stalls = sum(job["stalls"] for job in await queue.get_jobs("completed"))
    left = stats["waiting"] + stats["active"]
    measured = (
        f"{stats['completed']} completed, {left} left, "
        f"exit {code} after {took:.2f} s, {stalls} stalls"
    )
    row("SIGTERM, 20 running jobs of 2 s, 20 waiting", measured, "20, 20, 0, 0")

    queue = Queue("again", backend)
    ids = await queue.add_bulk(jobs(20, 2.0))
    process = launch(queue, 20, shutdown_timeout=0.5)
    await until(queue.queue_stats, lambda stats: stats["active"] == 20)
    async with workers(queue, 1, 20):
        signalled = time.time()
        process.send_signal(signal.SIGTERM)
        results = [await queue.wait_for(job_id, timeout=PATIENCE) for job_id in ids]
        code = await anyio.to_thread.run_sync(process.wait)
        stalls = sum(job["stalls"] for job in await queue.get_jobs("completed"))
    again = [started - signalled - 0.5 for started, _ in results]
    row(
        "the same with shutdown_timeout 0.5: run again",
        f"{milliseconds(again)} after it; exit {code}, {stalls} stalls",
        "at once, 0, 0",
    )


ALL = {each.__name__: each for each in (order, urgent, free, share, limit, pause, stop)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", nargs="*", choices=[[], *ALL], default=[])
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--queue", help=argparse.SUPPRESS)
    parser.add_argument("--concurrency", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--limit", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--shutdown-timeout", type=float, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        run_worker(arguments)
        return

    async def measure() -> None:
        backend = NATSBackend.embedded()
        try:
            for name in arguments.what or ALL:
                await ALL[name](backend)
        finally:
            await backend.close()

    run_program(measure)


if __name__ == "__main__":
    main()
