"""Looking into a queue, and cleaning it, with many outcomes.

`benchmarks/large_queues.py` measures more of them.
"""

import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import anyio

from asyncmq_nats.backends.base import Settled, Write
from asyncmq_nats.backends.nats.backend import NATSBackend
from asyncmq_nats.queues import Queue
from tests.running import has

FEW_JOBS, MANY_JOBS = 100, 20_000
UNDER_WAY = 5_000


async def fill(backend: NATSBackend, first: int, last: int) -> None:
    """Write outcomes as fast as they go: pipelined, a bounded number under way."""
    settled, room = 0, anyio.Event()

    def settle(result: Settled) -> None:
        nonlocal settled
        assert isinstance(result, int), result
        settled += 1
        room.set()

    for number in range(first, last):
        body = b'{"v":1,"id":"%d","task":"brief","status":"completed","result":%d}' % (
            number,
            number,
        )
        backend.send(
            "KV_amq_fleet_scheduler",
            Write(f"$KV.amq_fleet_scheduler.done.{number}.completed", body, ttl=3600),
            settle,
        )
        while number - first - settled > UNDER_WAY:
            room = anyio.Event()
            await room.wait()
    while settled < last - first:
        room = anyio.Event()
        await room.wait()


async def quickest(call: Callable[[], Awaitable[Any]]) -> float:
    """Return the shortest time of a few calls, in seconds."""
    times = []
    for _ in range(5):
        started = time.perf_counter()
        await call()
        times.append(time.perf_counter() - started)
    return min(times)


async def test_looking_costs_about_the_same_for_few_and_for_many_outcomes(
    queue: Queue, nats_backend: NATSBackend
) -> None:
    looks: dict[str, Callable[[], Awaitable[Any]]] = {
        "queue_stats": queue.queue_stats,
        "get_job": partial(queue.get_job, "1"),
        "newest": partial(queue.get_completed, end=49),
        "oldest": partial(queue.get_completed, end=49, asc=True),
    }
    with anyio.fail_after(50):
        await queue._assets.declare_all()
        await fill(nats_backend, 0, FEW_JOBS)
        few = {name: await quickest(look) for name, look in looks.items()}
        await fill(nats_backend, FEW_JOBS, MANY_JOBS)
        many = {name: await quickest(look) for name, look in looks.items()}
        assert [job["result"] for job in await queue.get_completed(end=49)] == list(
            range(MANY_JOBS - 1, MANY_JOBS - 51, -1)
        )
        assert [job["result"] for job in await queue.get_completed(end=49, asc=True)] == list(
            range(50)
        )
    for name in looks:
        print(
            f"{name}: {few[name] * 1000:.2f} ms for {FEW_JOBS}, "
            f"{many[name] * 1000:.2f} ms for {MANY_JOBS:,}"
        )
        assert many[name] < max(10 * few[name], 0.1), name


async def test_cleaning_removes_what_is_old_and_no_more(
    queue: Queue, nats_backend: NATSBackend
) -> None:
    with anyio.fail_after(50):
        await queue._assets.declare_all()
        await fill(nats_backend, 0, MANY_JOBS // 2)
        await anyio.sleep(0.05)
        between = nats_backend.now()
        await anyio.sleep(0.05)
        await fill(nats_backend, MANY_JOBS // 2, MANY_JOBS)
        taken = []
        for older_than, left in ((between, MANY_JOBS // 2), (None, 0)):
            started = time.perf_counter()
            await queue.clean("completed", older_than)
            taken.append(time.perf_counter() - started)
            await has(queue, left, "completed")
    print(
        f"clean of {MANY_JOBS // 2:,} outcomes: "
        f"{taken[0] * 1000:.0f} ms by age, {taken[1] * 1000:.0f} ms of all"
    )
