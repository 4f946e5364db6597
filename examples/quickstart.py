"""Every kind of job there is, added, run and shown: python examples/quickstart.py

Starts a nats-server of its own, or uses the one in ASYNCMQ_NATS_SERVERS, where others may run it
too. Ends with 0 if every job has the outcome that it should.
"""

import logging
import os
import signal
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import anyio
from anyio.abc import TaskStatus

from asyncmq_nats import NATSBackend, Queue, task
from asyncmq_nats.context import current_job
from asyncmq_nats.exceptions import AsyncMQError, JobFailed

QUEUE = "quickstart"
CONCURRENCY = 10
BULK = 200
# Longer than a lease: another worker may be killed with one of our jobs in hand.
PATIENCE = 45.0


# -- tasks: what a worker can run


@dataclass
class Order:
    item: str
    count: int


@task(queue=QUEUE, name="greet")
async def greet(name: str) -> str:
    await anyio.sleep(0.05)
    return f"Hello, {name}"


@task(queue=QUEUE, name="count_primes")
def count_primes(below: int) -> int:
    """A plain function: it runs in a thread, and holds nothing up."""
    return sum(
        all(number % divisor for divisor in range(2, int(number**0.5) + 1))
        for number in range(2, below)
    )


@task(queue=QUEUE, name="ship")
async def ship(order: Order, ordered: datetime) -> str:
    """The arguments are what the annotations say, though they travelled as JSON."""
    return f"{order.count} x {order.item} leave on {ordered + timedelta(days=1):%d %B}"


@task(queue=QUEUE, name="call_partner", retries=3, backoff=0.2)
async def call_partner(order: str) -> str:
    if current_job().attempt == 1:
        raise ConnectionError("the partner does not answer")
    return "accepted"


@task(queue=QUEUE, name="parse")
async def parse(text: str) -> int:
    return int(text)


@task(queue=QUEUE, name="square")
async def square(number: int) -> int:
    await anyio.sleep(0.01)
    return number * number


# -- what is shown


@dataclass
class Added:
    """A job, and what it should come to."""

    job_id: str
    shows: str
    state: str = "completed"


class Progress:
    """One line that is written again and again on a terminal.

    A few lines one after the other elsewhere.
    """

    def __init__(self, total: int) -> None:
        self.done = 0
        self._total = total
        self._live = sys.stdout.isatty()
        self._last_tenth = -1

    def show(self, stats: dict[str, int]) -> None:
        tenth = 4 * self.done // self._total
        if self._live:
            print(
                f"\r\x1b[K  {self._line(stats)}",
                end="\n" if self.done >= self._total else "",
                flush=True,
            )
        elif tenth != self._last_tenth:
            print(f"  {self._line(stats)}", flush=True)
        self._last_tenth = tenth

    def _line(self, stats: dict[str, int]) -> str:
        bar = "#" * (24 * self.done // self._total)
        counts = "  ".join(
            f"{state} {stats[state]:>3}" for state in ("waiting", "active", "delayed")
        )
        return f"[{bar:-<24}] {self.done:>3} of {self._total} done   {counts}"


async def watch(queue: Queue, job_ids: list[str]) -> None:
    """Show how many of these jobs have ended, until all of them have; the queue may have others."""
    progress = Progress(len(job_ids))

    async def follow(job_id: str) -> None:
        with suppress(JobFailed):
            await queue.wait_for(job_id)
        progress.done += 1

    async with anyio.create_task_group() as group:
        for job_id in job_ids:
            group.start_soon(follow, job_id)
        while progress.done < len(job_ids):
            progress.show(await queue.queue_stats())
            await anyio.sleep(0.05)
    progress.show(await queue.queue_stats())


# -- the run


async def add_jobs(queue: Queue) -> tuple[list[Added], list[str]]:
    """Add a job of each kind, and many at once; return them."""
    backend = queue.backend
    bulk = await queue.add_bulk({"task_id": "square", "args": [number]} for number in range(BULK))
    order = Order("tea", 3)
    added = [
        Added(await greet.enqueue("Ada", backend=backend), "an async function"),
        Added(await count_primes.enqueue(20_000, backend=backend), "a sync function, in a thread"),
        Added(
            await ship.enqueue(order, datetime(2030, 1, 31, 12), backend=backend), "typed arguments"
        ),
        Added(await call_partner.enqueue("order-7", backend=backend), "fails once, is retried"),
        Added(await parse.enqueue("twelve", backend=backend), "fails for good", "failed"),
        Added(await queue.add("greet", ["Grace"], delay=0.5), "delayed by 0.5 s"),
        Added(await queue.add("greet", ["Linus"], priority=1), "priority 1: overtakes"),
    ]
    return added, bulk


def describe(job: dict[str, Any], shows: str) -> str:
    done = job["status"] == "completed"
    runs = job["retries"] + (1 if done else 0)
    waited = job.get("active_since", job["finished_at"]) - job["created_at"]
    came_to = str(job["result"]) if done else job["last_error"]
    return (
        f"  {job['task']:<13} {shows:<29} {job['status']:<10} "
        f"{runs:>4} {waited:>8.3f}  {came_to[:44]}"
    )


async def summarise(queue: Queue, added: list[Added], bulk: list[str], seconds: float) -> bool:
    """Print what became of the jobs; return whether it is what should have."""
    print(f"\n  {'task':<13} {'what it shows':<29} {'state':<10} {'runs':>4} {'waited':>8}  result")
    print(f"  {'-' * 13} {'-' * 29} {'-' * 10} {'-' * 4} {'-' * 8}  {'-' * 30}")
    jobs = [await queue.get_job(entry.job_id) for entry in added]
    for job, entry in zip(jobs, added, strict=True):
        print(describe(job, entry.shows) if job else f"  {'?':<13} {entry.shows:<29} lost")
    squares = [await queue.get_job_result(job_id) for job_id in bulk]
    right = sum(result == number * number for number, result in enumerate(squares))
    state = "completed" if right == BULK else "incomplete"
    print(
        f"  {'square':<13} {f'{BULK} added in one call':<29} {state:<10} "
        f"{right:>4} {'':>8}  0, 1, 4, 9, 16, ..."
    )

    states = [job["status"] if job else "lost" for job in jobs]
    wrong = [
        entry.shows for entry, state in zip(added, states, strict=True) if state != entry.state
    ]
    if right < BULK:
        wrong.append(f"{BULK - right} of the squares")
    counts = f"{states.count('completed') + right} completed, {states.count('failed')} failed"
    verdict = f"not as it should be: {', '.join(wrong)}" if wrong else "as it should"
    print(f"\n{len(added) + BULK} jobs in {seconds:.2f} s: {counts}, {verdict}.")
    return not wrong


async def show() -> int:
    servers = os.environ.get("ASYNCMQ_NATS_SERVERS")
    # The context manager connects, and at the end disconnects and stops the embedded server.
    async with NATSBackend() if servers else NATSBackend.embedded() as backend:
        queue = Queue(QUEUE, backend, concurrency=CONCURRENCY)
        print(
            f"Queue {QUEUE!r} on {'the' if servers else 'an embedded'} nats-server at {backend.url}"
        )
        started = time.perf_counter()
        added, bulk = await add_jobs(queue)
        job_ids = [*(entry.job_id for entry in added), *bulk]
        print(
            f"{len(job_ids)} jobs added in {time.perf_counter() - started:.2f} s; "
            f"a worker runs them, {CONCURRENCY} at a time (active: fetched by it)\n"
        )
        started = time.perf_counter()
        async with anyio.create_task_group() as group:
            await group.start(queue.run)
            with anyio.fail_after(PATIENCE):
                await watch(queue, job_ids)
            seconds = time.perf_counter() - started
            group.cancel_scope.cancel()  # the worker finishes what it runs
        return 0 if await summarise(queue, added, bulk, seconds) else 1


async def run() -> int:
    """Run `show`; end it in order, the embedded server with it, on Ctrl-C and SIGTERM."""
    code = 1

    async def stop_on_signal(scope: anyio.CancelScope, *, task_status: TaskStatus[None]) -> None:
        nonlocal code
        with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
            task_status.started()
            async for (
                number
            ) in signals:  # it may come twice: from a terminal, and from a program around this one
                if not scope.cancel_called:
                    print(f"\nStopped by {number.name}.", file=sys.stderr)
                    code = 128 + number
                    scope.cancel()

    async with anyio.create_task_group() as group:
        with anyio.CancelScope() as scope:
            await group.start(stop_on_signal, scope)
            code = await show()
        group.cancel_scope.cancel()
    return code


def complain(errors: BaseExceptionGroup) -> None:
    """Print what is in the group, and in the groups in it."""
    for error in errors.exceptions:
        if isinstance(error, BaseExceptionGroup):
            complain(error)
        else:
            print(error, file=sys.stderr)


def main() -> int:
    logging.getLogger("asyncmq_nats").setLevel(logging.CRITICAL)  # that a job fails is no news here
    try:
        code = anyio.run(run)
        sys.stdout.flush()
    except* AsyncMQError as errors:
        complain(errors)
    except* BrokenPipeError:
        # The reader has gone, as with `| head`: drop what is still to be written.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except* TimeoutError:
        print(f"\nNot all jobs ended within {PATIENCE:g} s.", file=sys.stderr)
    else:
        return code
    return 1


if __name__ == "__main__":
    sys.exit(main())
