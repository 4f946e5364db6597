"""A request handler gets an answer in the time that it allows, also while the server is away."""

import time
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import pytest

from asyncmq_nats._concurrency import deadline
from asyncmq_nats.backends.nats.backend import NATSBackend
from asyncmq_nats.backends.nats.embedded.server import EmbeddedServer
from asyncmq_nats.exceptions import ConnectionFailed, Unconfirmed
from asyncmq_nats.queues import Queue, list_queues
from asyncmq_nats.settings import Settings
from tests.nats.processes import eventually
from tests.running import counted, make_queue, running

ALLOWED = 0.3
MUCH_LATER = 8.0
"""An idle machine needs a tenth of it, and without a deadline a call takes 30 s."""

CALLS: dict[str, Callable[[Queue], Awaitable[Any]]] = {
    "add": lambda queue: queue.add("echo", [1]),
    "add_delayed": lambda queue: queue.add("echo", [1], delay=10),
    "add_bulk": lambda queue: queue.add_bulk([{"task_id": "echo"}] * 3),
    "get_job": lambda queue: queue.get_job("some"),
    "queue_stats": lambda queue: queue.queue_stats(),
    "list_jobs": lambda queue: queue.list_jobs("waiting"),
    "cancel_job": lambda queue: queue.cancel_job("some"),
    "wait_for": lambda queue: queue.wait_for("some"),
    "pause": lambda queue: queue.pause(),
    "list_workers": lambda queue: queue.list_workers(),
    "list_queues": lambda queue: list_queues(queue.backend),
    "ping": lambda queue: queue.backend.ping(),
}


@pytest.fixture
async def cut_off(server: EmbeddedServer, nats_backend: NATSBackend) -> Queue:
    """A queue whose server has gone."""
    queue = Queue("work", nats_backend)
    await queue._assets.declare_all()
    server.kill()
    return queue


@pytest.mark.parametrize("name", CALLS)
async def test_a_deadline_holds_for_every_call(name: str, cut_off: Queue) -> None:
    begun = time.monotonic()
    with pytest.raises((Unconfirmed, ConnectionFailed)), deadline(ALLOWED):
        await CALLS[name](cut_off)
    assert time.monotonic() - begun < MUCH_LATER


async def test_a_deadline_holds_before_the_first_connection() -> None:
    backend = NATSBackend("nats://127.0.0.1:1", settings=Settings(connect_timeout=60.0))
    begun = time.monotonic()
    with pytest.raises(TimeoutError, match=r"within 0\.3 s"), deadline(ALLOWED):
        await Queue("work", backend).add("echo", [1])
    assert time.monotonic() - begun < MUCH_LATER


async def test_the_nearest_of_two_deadlines_counts(cut_off: Queue) -> None:
    begun = time.monotonic()
    with pytest.raises(Unconfirmed), deadline(60.0), deadline(ALLOWED):
        await cut_off.get_job("some")
    with pytest.raises(Unconfirmed), deadline(ALLOWED), deadline(60.0):
        await cut_off.get_job("some")
    assert time.monotonic() - begun < MUCH_LATER


async def test_a_call_that_answers_in_time_is_not_touched(nats_backend: NATSBackend) -> None:
    queue = Queue("work", nats_backend)
    with deadline(20.0):
        job_id = await queue.add("echo", [1])
        assert await queue.get_job_state(job_id) == "waiting"


async def test_a_write_that_was_given_up_is_not_repeated(
    cut_off: Queue, server: EmbeddedServer
) -> None:
    with pytest.raises(Unconfirmed), deadline(ALLOWED):
        await cut_off.add("echo", [1])
    server.start()
    with anyio.fail_after(15):
        second = await cut_off.add("echo", [2])
    await counted(cut_off)
    jobs = await cut_off.list_jobs("waiting")
    # What was queued for the lost connection may be sent by the next one, once.
    assert second in [job["id"] for job in jobs]
    assert len(jobs) <= 2


async def test_the_setting_bounds_reads(server: EmbeddedServer) -> None:
    settings = Settings(request_timeout=ALLOWED)
    async with NATSBackend(server.url, settings=settings) as backend:
        queue = Queue("work", backend)
        await queue._assets.declare_all()
        server.kill()
        begun = time.monotonic()
        with pytest.raises(Unconfirmed, match=r"within 0\.3 s"):
            await queue.get_job("some")
        with pytest.raises(Unconfirmed, match=r"within 0\.3 s"):
            await queue.queue_stats()
        assert time.monotonic() - begun < MUCH_LATER


async def test_a_ping_says_whether_the_server_is_there(
    server: EmbeddedServer, nats_backend: NATSBackend
) -> None:
    assert 0 < await nats_backend.ping() < 5
    server.kill()
    with pytest.raises(Unconfirmed), deadline(ALLOWED):
        await nats_backend.ping()
    server.start()
    with anyio.fail_after(15):
        assert await nats_backend.ping() > 0


# -- a server that comes back without its store


async def test_what_is_declared_once_is_declared_again_on_a_server_that_comes_back_empty(
    server: EmbeddedServer,
) -> None:
    settings = Settings(storage="memory", heartbeat_interval=0.5, stalled_after=2.0)
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        ticks += 1

    async def count_ticks() -> int:
        return ticks

    async def echo(value: int) -> int:
        return value

    async def sleep() -> None:
        begun.set()
        await anyio.sleep(30)

    begun = anyio.Event()
    async with NATSBackend(server.url, settings=settings) as backend:
        queue = make_queue(backend, tick=tick, echo=echo, sleep=sleep)
        queue.add_repeatable("tick", every=0.5, name="ticking")
        async with running(queue):
            await eventually(count_ticks, lambda count: count > 0)
            server.kill()
            server.start()
            with anyio.fail_after(30):
                await backend.ping()
                job_id = await queue.add("echo", [5])
                assert await queue.wait_for(job_id, timeout=20) == 5
            await eventually(queue.list_workers, lambda workers: len(workers) == 1)
            seen = ticks
            await eventually(count_ticks, lambda count: count > seen + 1)
            assert [r.job_def["name"] for r in await queue.list_repeatables()] == ["ticking"]
            slow = await queue.add("sleep")
            with anyio.fail_after(15):
                await begun.wait()
            assert await queue.cancel_job(slow)
            await eventually(lambda: queue.get_job_state(slow), lambda s: s == "cancelled")
