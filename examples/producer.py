"""A producer.

Adds jobs at a steady pace, waits for their results and prints them, until SIGTERM or Ctrl-C.
ASYNCMQ_NATS_SERVERS   addresses of the NATS servers (nats://127.0.0.1:4222)
    INTERVAL               seconds between two jobs (0.5)
    JOBS                   end after this many (0: never)

When asked to stop, it adds no more and waits up to five seconds for the results that are
outstanding.
"""

import itertools
import os
import signal
import sys
import time
from collections import Counter
from datetime import date, timedelta

import anyio
import tasks

from asyncmq_nats import NATSBackend, Queue
from asyncmq_nats.exceptions import AsyncMQError, BackendError, JobFailed


def read_number(name: str, default: float) -> float:
    """Return a number from the environment; if it is none, end with a line that says so."""
    text = os.environ.get(name) or str(default)
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number < float("inf"):
        sys.exit(f"{name} must be a number, 0 or more, not {text!r}")
    return number


INTERVAL = read_number("INTERVAL", 0.5)
JOBS = int(read_number("JOBS", 0))
SHUTDOWN_TIMEOUT = 5.0

counts: Counter[str] = Counter()


async def add_job(number: int, backend: NATSBackend) -> str:
    """Add the next job: the three tasks in turn. `enqueue` takes the arguments of the task."""
    if number % 3 == 0:
        return await tasks.send_message.enqueue(
            f"reader-{number}@example.org", f"issue {number}", backend=backend
        )
    if number % 3 == 1:
        return await tasks.count_words.enqueue("a queue " * number, backend=backend)
    return await tasks.report.enqueue(date(2030, 1, 1) + timedelta(days=number), backend=backend)


async def follow(queue: Queue, backend: NATSBackend, number: int) -> None:
    """Add a job and print what it comes to."""
    started = time.perf_counter()
    try:
        job_id = await add_job(number, backend)
        counts["added"] += 1
        result = await queue.wait_for(job_id)
        came_to = repr(result)
        counts["completed"] += 1
    except JobFailed as failure:
        came_to = str(failure)
        counts["failed"] += 1
    except (
        AsyncMQError
    ) as error:  # an outage, say: the jobs that were added are safe, and the next ones may do
        came_to = f"not followed: {error}"
    print(f"job {number}: {came_to} ({(time.perf_counter() - started) * 1000:.0f} ms)", flush=True)


async def produce(backend: NATSBackend, stopping: anyio.Event) -> None:
    queue = Queue(tasks.QUEUE, backend)
    async with anyio.create_task_group() as group:
        for number in itertools.count() if JOBS == 0 else range(JOBS):
            group.start_soon(follow, queue, backend, number)
            with anyio.move_on_after(INTERVAL):
                await stopping.wait()
                break
        if stopping.is_set():
            group.cancel_scope.deadline = anyio.current_time() + SHUTDOWN_TIMEOUT


async def stop_on_signal(stopping: anyio.Event) -> None:
    with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async for _ in signals:
            stopping.set()


async def run() -> None:
    stopping = anyio.Event()
    async with NATSBackend() as backend, anyio.create_task_group() as group:
        group.start_soon(stop_on_signal, stopping)
        await produce(backend, stopping)
        group.cancel_scope.cancel()
    print(
        f"{counts['added']} added, {counts['completed']} completed, {counts['failed']} failed",
        flush=True,
    )


def main() -> int:
    try:
        anyio.run(run)
    except* BackendError as errors:  # no server, or not one that will do
        print(*errors.exceptions, sep="\n", file=sys.stderr)
    except* BrokenPipeError:
        # The reader has gone, as with `| head`: drop what is still to be written.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    else:
        return 0
    return 1


if __name__ == "__main__":
    sys.exit(main())
