"""Counting costs the same, however many jobs there are."""

import statistics
import time
from functools import partial

import anyio
import pytest

from asyncmq_nats.backends.base import Settled, Write
from asyncmq_nats.backends.nats.backend import NATSBackend
from asyncmq_nats.queues import Queue
from tests.running import has

FEW_JOBS, MANY_JOBS = 10, 200_000
UNDER_WAY = 5_000


async def fill(backend: NATSBackend, first: int, last: int) -> None:
    """Publish jobs as fast as they go: pipelined, a bounded number under way."""
    settled, room = 0, anyio.Event()

    def settle(number: int, result: Settled) -> None:
        nonlocal settled
        assert isinstance(result, int), (number, result)
        settled += 1
        room.set()

    for number in range(first, last):
        backend.send(
            "amq_fleet",
            Write(f"amq.fleet.ready.5.{number}", b'{"task":"brief"}', message_id=str(number)),
            partial(settle, number),
        )
        while number - first - settled > UNDER_WAY:
            room = anyio.Event()
            await room.wait()
    while settled < last - first:
        room = anyio.Event()
        await room.wait()


async def measure(queue: Queue) -> float:
    """Return the median time of a count, in seconds."""
    times = []
    for _ in range(15):
        started = time.perf_counter()
        await queue._assets.declare_all()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


@pytest.mark.slow
async def test_queue_stats_cost_the_same_for_10_and_for_200_000_jobs(
    queue: Queue, nats_backend: NATSBackend
) -> None:
    with anyio.fail_after(50):
        await queue._assets.declare_all()
        await fill(nats_backend, 0, FEW_JOBS)
        few = await measure(queue)
        await fill(nats_backend, FEW_JOBS, MANY_JOBS)
        await has(queue, MANY_JOBS, "waiting")
        many = await measure(queue)
    print(
        f"queue_stats: {few * 1000:.2f} ms for {FEW_JOBS} jobs, "
        f"{many * 1000:.2f} ms for {MANY_JOBS:,}"
    )
    assert many < max(10 * few, 0.05)


@pytest.mark.parametrize("end", [9, 99])
async def test_first_page_of_a_long_list_is_read_alone(
    end: int, queue: Queue, nats_backend: NATSBackend
) -> None:
    with anyio.fail_after(30):
        await queue._assets.declare_all()
        await fill(nats_backend, 0, 20_000)
        for ascending in (True, False):
            seconds: list[float] = []
            order = range(end + 1) if ascending else range(19_999, 19_998 - end, -1)
            for _ in range(5):
                started = time.perf_counter()
                page = await queue.get_jobs("waiting", end=end, asc=ascending)
                seconds.append(time.perf_counter() - started)
                assert [job["id"] for job in page] == [str(number) for number in order]
            assert min(seconds) < 0.5  # a busy machine spares one
