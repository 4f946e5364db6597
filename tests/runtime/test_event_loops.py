"""The API works on every event loop, however it was started.

Beside `sniffio` (a dev dependency for this reason), anyio finds no event loop in a plain callback,
unless `anyio.run` started it.
"""

import asyncio
import importlib.util
import logging
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import anyio.from_thread
import pytest

from asyncmq_nats._concurrency import Spawner
from asyncmq_nats.backends.base import Backend
from asyncmq_nats.context import current_job
from asyncmq_nats.events import event_emitter
from asyncmq_nats.exceptions import Retry, TaskTimeout
from asyncmq_nats.flow import FlowProducer
from asyncmq_nats.jobs import Job
from asyncmq_nats.queues import Queue
from tests.receiver import until
from tests.running import PATIENCE, has, make_queue, outcome, running

Scenario = Callable[[Backend], Awaitable[None]]
Main = Callable[[], Awaitable[None]]


def run_until_complete(main: Main) -> None:
    """Run as a framework does: the loop is its own."""
    loop = asyncio.new_event_loop()
    try:
        loop.run_until_complete(main())
    finally:
        loop.close()


def run_on_uvloop(main: Any) -> None:
    import uvloop

    uvloop.run(main())


NO_UVLOOP = importlib.util.find_spec("uvloop") is None
RUNS = [
    pytest.param(lambda main: asyncio.run(main()), id="asyncio"),
    pytest.param(run_until_complete, id="framework"),
    pytest.param(
        run_on_uvloop,
        id="uvloop",
        marks=pytest.mark.skipif(NO_UVLOOP, reason="uvloop is not installed"),
    ),
    pytest.param(anyio.run, id="anyio"),
]


async def double(value: int) -> int:
    return 2 * value


def double_in_thread(value: int) -> int:
    assert threading.current_thread() is not threading.main_thread()
    return 2 * value


async def total() -> int:
    return sum((await current_job().parent_results()).values())


def work(backend: Backend, *, concurrency: int = 3, **tasks: Callable[..., Any]) -> Queue:
    tasks |= {"double": double, "total": total}
    return make_queue(backend, "work", concurrency=concurrency, **tasks)


# -- scenarios


async def jobs_run(backend: Backend) -> None:
    queue = work(backend, in_thread=double_in_thread)
    async with running(queue):
        ids = await queue.add_bulk([{"task_id": "double", "args": [n]} for n in range(20)])
        assert [await queue.wait_for(job_id) for job_id in ids] == [2 * n for n in range(20)]
        assert await queue.wait_for(await queue.add("in_thread", [4])) == 8
        again = await queue.add("double", [5], job_id="mine")
        assert await queue.wait_for(again) == 10
        assert await queue.add("double", [6], job_id="mine") == "mine"


async def children_run_after_their_parents(backend: Backend) -> None:
    queue = work(backend)
    async with running(queue):
        parents = [await queue.add("double", [n]) for n in range(3)]
        child = await queue.add("total", depends_on=parents)
        assert await queue.wait_for(child) == 6
        first, second = Job("double", [4]), Job("double", [5])
        last = Job("total", depends_on=[first.job_id, second.job_id])
        await FlowProducer(backend).add_flow("work", [first, second, last])
        assert await queue.wait_for(last.job_id) == 18


async def a_new_priority_runs(backend: Backend) -> None:
    queue = work(backend)
    async with running(queue):
        assert await queue.wait_for(await queue.add("double", [1])) == 2
        for priority in (9, 1, -3):
            assert await queue.wait_for(await queue.add("double", [3], priority=priority)) == 6


async def a_pause_is_answered(backend: Backend) -> None:
    started, ends = anyio.Event(), anyio.Event()

    async def hold() -> None:
        started.set()
        await ends.wait()

    queue = work(backend, concurrency=1, hold=hold)
    async with running(queue):
        held = await queue.add("hold")
        await started.wait()
        waiting = [await queue.add("double", [n]) for n in range(5)]
        await queue.pause()
        ends.set()
        await queue.wait_for(held)
        await has(queue, 1, "completed")
        await queue.resume()
        assert [await queue.wait_for(job_id) for job_id in waiting] == [0, 2, 4, 6, 8]


async def jobs_come_later_and_again(backend: Backend) -> None:
    async def stumble() -> int:
        if current_job().attempt == 1:
            raise Retry(delay=0.05)
        return current_job().attempt

    async def sleep() -> None:
        await anyio.sleep_forever()

    ticks = iter(range(2))
    ticked = anyio.Event()

    async def tick() -> None:
        if next(ticks, 1) == 1:
            ticked.set()

    queue = work(backend, stumble=stumble, sleep=sleep, tick=tick)
    queue.add_repeatable("tick", every=0.3)
    async with running(queue):
        assert await queue.wait_for(await queue.add("double", [1], delay=0.1)) == 2
        assert await queue.wait_for(await queue.add("stumble", retries=1)) == 2
        late = await outcome(queue, await queue.add("sleep", timeout=0.05))
        assert TaskTimeout.__name__ in late["last_error"]
        await ticked.wait()


async def a_job_is_cancelled_and_run_again(backend: Backend) -> None:
    started = anyio.Event()

    async def stop_once() -> int:
        if not started.is_set():
            started.set()
            await anyio.sleep_forever()
        return 7

    queue = work(backend, stop_once=stop_once)
    async with running(queue):
        job_id = await queue.add("stop_once")
        await started.wait()
        assert await queue.cancel_job(job_id)
        assert (await outcome(queue, job_id))["status"] == "cancelled"
        assert await queue.retry_job(job_id)
        assert await queue.wait_for(job_id) == 7


async def what_happens_is_told(backend: Backend) -> None:
    queue = work(backend)
    started, done = anyio.Event(), anyio.Event()

    def hear(data: dict[str, Any]) -> None:  # in a thread
        if data["status"] == "active":
            anyio.from_thread.run_sync(started.set)

    async def hear_end(data: dict[str, Any]) -> None:
        if data["status"] == "completed":
            done.set()

    event_emitter.on("job:started", hear)
    event_emitter.on("job:completed", hear_end)
    try:
        async with running(queue):
            job_id = await queue.add("double", [1])
            await started.wait()
            await done.wait()
            events = queue.events("job:completed")
            async with anyio.create_task_group() as group:
                group.start_soon(add_until_cancelled, queue)
                assert (await anext(events)).queue == "work"
                group.cancel_scope.cancel()
            await events.aclose()
    finally:
        event_emitter.off("job:started", hear)
        event_emitter.off("job:completed", hear_end)
    assert await queue.get_job_state(job_id) == "completed"


async def add_until_cancelled(queue: Queue) -> None:
    while True:
        await queue.add("double", [1])
        await anyio.sleep(0.05)


async def starts_are_limited(backend: Backend) -> None:
    queue = work(backend)
    limited = Queue("work", backend, rate_limit=20, rate_interval=0.5, registry=queue._registry)
    async with running(limited) as worker:
        ids = [await queue.add("double", [n]) for n in range(25)]
        assert [await queue.wait_for(job_id) for job_id in ids] == [2 * n for n in range(25)]
        assert worker is not None
        await until(queue.list_workers, lambda found: len(found) == 1)


SCENARIOS = [
    jobs_run,
    children_run_after_their_parents,
    a_new_priority_runs,
    a_pause_is_answered,
    jobs_come_later_and_again,
    a_job_is_cancelled_and_run_again,
    what_happens_is_told,
    starts_are_limited,
]


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_on_each_event_loop(
    scenario: Scenario,
    run: Callable[[Main], None],
    make_backend: Callable[[], Backend],
    caplog: pytest.LogCaptureFixture,
) -> None:
    backend = make_backend()
    broken: list[dict[str, Any]] = []

    async def main() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: broken.append(context))
        with anyio.fail_after(PATIENCE):
            async with backend:
                await scenario(backend)

    run(main)
    assert broken == []  # no callback of the loop has failed
    warnings = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert not [record for record in warnings if "no answer" in record.getMessage()]


def test_a_plain_callback_can_start_a_task() -> None:
    async def main() -> None:
        spawner, done = Spawner(), anyio.Event()

        async def note(heard: list[int], value: int) -> None:
            heard.append(value)
            if value == 2:
                done.set()

        heard: list[int] = []
        spawner.spawn(note, heard, 0)  # kept until it is served
        async with anyio.create_task_group() as group:
            group.start_soon(spawner.serve, group)
            asyncio.get_running_loop().call_soon(spawner.spawn, note, heard, 1)
            asyncio.get_running_loop().call_later(0, spawner.spawn, note, heard, 2)
            with anyio.fail_after(PATIENCE):
                await done.wait()
            group.cancel_scope.cancel()
        assert heard == [0, 1, 2]

    asyncio.run(main())
