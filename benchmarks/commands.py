"""The cost of the commands on a large queue.

Time of the whole process, its memory, and the search behind them. python benchmarks/commands.py
[--sizes 1000,100000,1000000]

Each size is a number of completed jobs, with 100 failed ones between them. `process` is all of
`python -m asyncmq_nats …`, of which `version` is the part that no queue has a share in.
"""

import argparse
import os
import subprocess
import sys
import time
from typing import Any

import anyio
from large_queues import fill_outcomes

from asyncmq_nats import JobFilter, NATSBackend, Queue

COMMANDS = (
    "version",
    "queue stats {name}",
    "queue info {name}",
    "job ls {name}",
    "job ls {name} --state failed --task tasks.send",
)


def run_command(line: str, url: str) -> tuple[float, float, float]:
    """Run a command as a process; return its seconds, its CPU time, and its most memory in MiB."""
    arguments = [sys.executable, "-m", "asyncmq_nats", *line.split()]
    env = os.environ | {"NATS_URL": url}
    began = time.perf_counter()
    with subprocess.Popen(
        arguments, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, line
    seconds, cpu = time.perf_counter() - began, usage.ru_utime + usage.ru_stime
    return seconds, cpu, usage.ru_maxrss / 1024


async def time_search(queue: Queue, where: JobFilter) -> tuple[float, float, int]:
    """Return the seconds until the first job and until the last, and how many there were."""
    began, first, count = time.perf_counter(), 0.0, 0
    async for _ in queue.search(where):
        count += 1
        first = first or time.perf_counter() - began
    return first, time.perf_counter() - began, count


async def measure(backend: NATSBackend, url: str, size: int) -> None:
    name = f"q{size}"
    queue = Queue(name, backend)
    await queue.add("tasks.send", delay=1e6)  # makes the queue
    await queue.queue_stats()
    await fill_outcomes(backend, name, size)
    print(f"\n{size:,} jobs")
    for line in COMMANDS:
        command = line.format(name=name)
        found = [await anyio.to_thread.run_sync(run_command, command, url) for _ in range(3)]
        seconds, cpu, memory = min(found)
        print(
            f"  amq {command:<52} {seconds * 1000:8.0f} ms, "
            f"CPU {cpu * 1000:6.0f} ms {memory:6.0f} MiB"
        )
    calls: dict[str, Any] = {"queue_stats": queue.queue_stats, "info": queue.info}
    for label, call in calls.items():
        best = float("inf")
        for _ in range(5):
            began = time.perf_counter()
            await call()
            best = min(best, time.perf_counter() - began)
        print(f"  Queue.{label:<50} {best * 1000:8.1f} ms")
    for label, where in {
        "a task that no job has": JobFilter(task="tasks.other"),
        "a task that all jobs have": JobFilter(task="tasks.send"),
        "a text that one job has": JobFilter(text=f"[{size - 1}]"),
    }.items():
        cpu = time.process_time()
        first, last, count = await time_search(queue, where)
        cpu = time.process_time() - cpu
        text = f"search {label}: {count:,} found"
        print(f"  {text:<56} first {first * 1000:7.1f} ms, all {last:6.2f} s, CPU {cpu:.2f} s")


async def main(sizes: list[int]) -> None:
    async with NATSBackend.embedded() as backend:
        url = str(backend._embedded.url)  # type: ignore[union-attr]
        for size in sizes:
            await measure(backend, url, size)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", default="1000,100000")
    given = parser.parse_args()
    anyio.run(main, [int(size) for size in given.sizes.split(",")])
