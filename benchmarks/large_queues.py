"""How long it takes to look into a queue with many outcomes, and to clean it.

python benchmarks/large_queues.py [--outcomes 1000000] [--clean 100000]
"""

import argparse
import statistics
import time
import uuid
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import anyio

from asyncmq_nats import NATSBackend, Queue
from asyncmq_nats.backends.base import Settled, Write
from asyncmq_nats.runtime.program import run_program
from asyncmq_nats.wire.codec import dump_json

UNDER_WAY = 5_000


async def fill(backend: NATSBackend, name: str, count: int) -> None:
    """Write outcomes as workers do, as fast as they go: pipelined, a bounded number under way."""
    settled, room = 0, anyio.Event()

    def settle(result: Settled) -> None:
        nonlocal settled
        if not isinstance(result, int):
            raise result
        settled += 1
        room.set()

    key = f"$KV.amq_{name}_scheduler.done."
    for number in range(count):
        now = time.time()
        job = {
            "v": 1,
            "id": str(uuid.uuid4()),
            "task": "tasks.send",
            "args": [number],
            "kwargs": {},
            "created_at": now,
        }
        job |= {
            "retries": 0,
            "max_retries": 0,
            "priority": 5,
            "status": "completed",
            "result": number,
            "finished_at": now,
        }
        backend.send(
            f"KV_amq_{name}_scheduler",
            Write(f"{key}{job['id']}.completed", dump_json(job), ttl=86_400),
            settle,
        )
        while number - settled > UNDER_WAY:
            room = anyio.Event()
            await room.wait()
    while settled < count:
        room = anyio.Event()
        await room.wait()


async def measure(call: Callable[[], Awaitable[Any]], times: int = 11) -> tuple[float, float]:
    """Return the first time and the median of the others, in milliseconds."""
    taken = []
    for _ in range(times):
        started = time.perf_counter()
        await call()
        taken.append((time.perf_counter() - started) * 1000)
    return taken[0], statistics.median(taken[1:] or taken)


async def look(queue: Queue, count: int) -> None:
    first = await queue.get_completed(end=0, asc=True)
    calls: dict[str, Callable[[], Awaitable[Any]]] = {
        "queue_stats()": queue.queue_stats,
        "get_job(id), the oldest": partial(queue.get_job, first[0]["id"]),
        "get_completed(end=49), newest first": partial(queue.get_completed, end=49),
        "get_completed(end=49, asc=True)": partial(queue.get_completed, end=49, asc=True),
        "get_completed(1000…1049), newest first": partial(
            queue.get_completed, start=1000, end=1049
        ),
    }
    for name, call in calls.items():
        once, median = await measure(call)
        print(f"{count:>11,}  {name:<40} {once:>10.1f} {median:>10.1f}")


async def clean(backend: NATSBackend, count: int) -> None:
    for name, older_than in (("clean_all", None), ("clean_half", 0.0)):
        queue = Queue(name, backend)
        await queue._assets.declare_all()
        await fill(backend, name, count // 2)
        if older_than is not None:
            older_than = backend.now()
        await fill(backend, name, count - count // 2)
        once, _ = await measure(partial(queue.clean, "completed", older_than), times=1)
        left = (await queue.queue_stats())["completed"]
        call = (
            "clean('completed')"
            if older_than is None
            else "clean('completed', older_than=…), a half"
        )
        print(f"{count:>11,}  {call:<40} {once:>10.1f} {'':>10}  {left:,} left")


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--outcomes", type=int, default=1_000_000)
    parser.add_argument("--clean", type=int, default=100_000)
    arguments = parser.parse_args()
    backend = NATSBackend.embedded()
    try:
        await backend.connect()
        print(f"{'outcomes':>11}  {'call':<40} {'first ms':>10} {'median ms':>10}")
        await clean(backend, arguments.clean)
        filled = 0
        for count in (1_000, arguments.outcomes):
            queue = Queue(f"look_{count}", backend)
            await queue._assets.declare_all()
            started = time.perf_counter()
            await fill(backend, queue.name, count)
            filled = count / (time.perf_counter() - started)
            await look(queue, count)
        print(f"(filled at {filled:,.0f} outcomes a second)")
    finally:
        await backend.close()


if __name__ == "__main__":
    run_program(main)
