"""One event loop after another in one process.

`asyncio.run` for each script, request or test, with a backend of the module.
"""

import asyncio
import gc
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from asyncmq_nats._concurrency import Turns
from asyncmq_nats.backends.base import Backend, Signal
from asyncmq_nats.backends.nats.embedded.server import EmbeddedServer
from asyncmq_nats.exceptions import BackendError
from asyncmq_nats.queues import Queue
from asyncmq_nats.runtime import runner
from tests.running import PATIENCE, make_queue, outcome, run_jobs, running

if TYPE_CHECKING:
    from asyncmq_nats.backends.nats.backend import NATSBackend

MakeBackend = Callable[[], Backend]


async def echo(value: int) -> int:
    return value


def test_jobs_and_their_queue_outlive_the_event_loop(make_backend: MakeBackend) -> None:
    queue = make_queue(make_backend(), echo=echo)
    now = asyncio.run(queue.add("echo", [1]))
    later = asyncio.run(queue.add("echo", [2], delay=0.5))
    asyncio.run(run_jobs(queue))
    assert asyncio.run(queue.get_job_result(now)) == 1
    assert asyncio.run(queue.get_job_result(later)) == 2
    again = asyncio.run(queue.add("echo", [3]))
    asyncio.run(run_jobs(queue))
    assert asyncio.run(queue.get_job_result(again)) == 3
    asyncio.run(queue.backend.close())


def open_files() -> int:
    gc.collect()
    return len(os.listdir("/dev/fd"))


@pytest.mark.skipif(sys.platform == "win32", reason="no list of open files there")
@pytest.mark.parametrize("fast", [False, True])
def test_nothing_stays_open_when_an_event_loop_ends(fast: bool, make_backend: MakeBackend) -> None:
    queue = make_queue(make_backend(), echo=echo)
    run = pytest.importorskip("uvloop").run if fast else asyncio.run
    run(run_jobs(queue))  # uvloop keeps a pipe for all its loops
    threads, files = threading.active_count(), open_files()
    for number in range(25):
        run(queue.add("echo", [number]))
    run(run_jobs(queue))  # with the thread that extends leases
    assert (threading.active_count(), open_files()) == (threads, files)
    assert run(queue.queue_stats())["completed"] == 25


def test_what_was_sent_before_the_event_loop_ends_arrives(
    make_nats_backend: "Callable[[], NATSBackend]",
) -> None:
    sender = make_nats_backend()

    async def send() -> None:
        await sender.connect()
        sender.signal("news", b"last")

    async def hear() -> bytes:
        heard: asyncio.Queue[Signal] = asyncio.Queue()
        async with make_nats_backend() as backend:
            await backend.subscribe("news", heard.put_nowait)
            await asyncio.to_thread(asyncio.run, send())
            async with asyncio.timeout(PATIENCE):
                return (await heard.get()).body

    assert asyncio.run(hear()) == b"last"


def test_an_event_loop_that_stands_still_is_left_for_the_next(make_backend: MakeBackend) -> None:
    queue = make_queue(make_backend(), echo=echo)
    with asyncio.Runner() as first:
        first.run(queue.add("echo", [1]))
        asyncio.run(run_jobs(queue))
        assert first.run(queue.queue_stats())["completed"] == 1
        asyncio.run(queue.backend.close())


async def add_in_another_thread(queue: Queue) -> str:
    with ThreadPoolExecutor(1) as pool:
        return await asyncio.get_running_loop().run_in_executor(
            pool, asyncio.run, queue.add("echo", [2])
        )


async def test_a_second_event_loop_at_the_same_time_is_refused(backend: Backend) -> None:
    queue = make_queue(backend, echo=echo)
    job_id = await queue.add("echo", [1])
    with pytest.raises(BackendError, match="use one backend per event loop"):
        await add_in_another_thread(queue)
    await run_jobs(queue)  # as if nothing had been
    assert await queue.get_job_result(job_id) == 1
    await backend.close()  # it has none now
    assert await add_in_another_thread(queue) != job_id


def test_a_job_that_the_end_of_its_event_loop_interrupts_runs_again(
    make_backend: MakeBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "SHUTDOWN_STEP_TIMEOUT", 0.1)
    runs = 0
    begun = asyncio.Event()
    workers: list[asyncio.Task[None]] = []

    async def wait_once() -> str:
        nonlocal runs
        runs += 1
        if runs == 1:
            begun.set()
            await asyncio.sleep(PATIENCE)
        return "done"

    queue = make_queue(make_backend(), wait_once=wait_once)

    async def leave_it_running() -> str:
        job_id = await queue.add("wait_once")
        workers.append(asyncio.create_task(queue.run()))
        async with asyncio.timeout(PATIENCE):
            await begun.wait()
        return job_id

    async def wait_for_it(job_id: str) -> dict[str, object]:
        async with running(queue):
            return await outcome(queue, job_id)

    job = asyncio.run(wait_for_it(asyncio.run(leave_it_running())))
    assert (job["status"], job["result"], job["retries"]) == ("completed", "done", 0)
    asyncio.run(queue.backend.close())


def test_turns_taken_on_an_event_loop_that_ended_hold_up_no_other() -> None:
    turns = Turns()

    async def take() -> None:
        async with turns:
            await asyncio.sleep(0)

    left_behind = asyncio.new_event_loop()
    task = left_behind.create_task(take())
    left_behind.call_soon(left_behind.stop)
    left_behind.run_forever()
    asyncio.run(asyncio.wait_for(take(), PATIENCE))
    left_behind.run_until_complete(task)
    left_behind.close()


FORKING = """
import asyncio, os, sys
from asyncmq_nats.backends.nats.backend import NATSBackend
from asyncmq_nats.queues import Queue

queue = Queue("work", NATSBackend(sys.argv[1]))

async def main():
    await queue.add("parent")
    if (child := os.fork()) == 0:
        asyncio.events._set_running_loop(None)
        try:
            asyncio.run(queue.add("child"))
        finally:
            os._exit(0)
    await asyncio.to_thread(os.waitpid, child, 0)
    await queue.add("parent")
    while len(jobs := await queue.get_jobs("waiting")) < 3:  # the server counts them soon
        await asyncio.sleep(0.01)
    print(*sorted(job["task"] for job in jobs))

asyncio.run(main())
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork there")
def test_a_forked_process_has_a_connection_of_its_own(server: EmbeddedServer) -> None:
    command = [sys.executable, "-c", FORKING, server.url]
    ended = subprocess.run(command, check=True, capture_output=True, text=True, timeout=PATIENCE)
    assert (ended.stdout.split(), ended.stderr) == (["child", "parent", "parent"], "")
