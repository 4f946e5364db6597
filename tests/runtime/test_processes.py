"""Tasks with `process=True`: what they write and log, how they die, how they are stopped."""

import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import anyio
import pytest

from asyncmq_nats.backends.base import Backend
from asyncmq_nats.exceptions import InvalidArgument, JobFailed
from asyncmq_nats.queues import Queue
from asyncmq_nats.runtime.registry import TaskRegistry
from asyncmq_nats.tasks import task
from tests.nats.processes import alive
from tests.receiver import holds
from tests.running import PATIENCE, outcome, running

REGISTRY = TaskRegistry()
SLOW = 60.0
"""A process starts a Python; on a busy machine that takes a while."""


@task("work", process=True, registry=REGISTRY)
def write(times: int) -> int:
    for number in range(times):
        print("printed", number)
    print("an error", file=sys.stderr)
    subprocess.run(["echo", "of a subprocess"], check=True)
    os.system("echo of a shell")
    os.write(1, b"unfinished")
    logging.getLogger("tests.of.a.task").warning("logged %s", "here")
    logging.getLogger("tests.of.a.task").debug("not logged")
    return os.getpid()


@task("work", process=True, registry=REGISTRY)
def read() -> str:
    return (
        sys.stdin.read() + subprocess.run(["cat"], capture_output=True, check=True).stdout.decode()
    )


@task("work", process=True, registry=REGISTRY)
def die(how: str) -> None:
    print("about to die", flush=True)
    if how.startswith("SIG"):
        os.kill(os.getpid(), signal.Signals[how])
        time.sleep(PATIENCE)
    os._exit(int(how))


@task("work", process=True, registry=REGISTRY)
def close_outputs() -> str:
    os.close(1)
    os.close(2)
    return "closed"


@task("work", process=True, registry=REGISTRY)
def wait_for_ever(path: Path) -> None:
    child = subprocess.Popen(["sleep", "1000"])
    path.write_text(f"{os.getpid()} {child.pid}")
    time.sleep(1000)


@task("work", process=True, registry=REGISTRY)
def return_awaitable() -> Any:
    async def inner() -> str:
        await anyio.lowlevel.checkpoint()
        return "awaited"

    return inner()


def twice(function: Any) -> Any:
    import functools

    @functools.wraps(function)
    def wrapper(*args: Any) -> Any:
        return [function(*args), function(*args)]

    return wrapper


@twice
def decorated(number: int) -> int:
    return number + 1


REGISTRY.register(decorated, queue="work", process=True)


@pytest.fixture
def queue(backend: Backend) -> Queue:
    return Queue("work", backend, concurrency=2, registry=REGISTRY)


async def test_what_a_task_writes_belongs_to_the_workers_output(
    queue: Queue, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    async with running(queue):
        ids = [await write.enqueue(2, backend=queue.backend) for _ in range(2)]
        pids = [await queue.wait_for(job_id, timeout=SLOW) for job_id in ids]
    assert os.getpid() not in pids
    out, err = capfd.readouterr()
    for job_id in ids:
        assert [line for line in out.splitlines() if job_id in line] == [
            f"[job {job_id}] {line}"
            for line in (
                "printed 0",
                "printed 1",
                "of a subprocess",
                "of a shell",
                "unfinished",
            )
        ]
        assert f"[job {job_id}] an error\n" in err
        [record] = [r for r in caplog.records if getattr(r, "job_id", None) == job_id]
        assert record.getMessage() == f"[job {job_id}] logged here"
        assert (record.name, record.levelname) == ("tests.of.a.task", "WARNING")


async def test_a_task_that_reads_its_input_finds_nothing(queue: Queue) -> None:
    async with running(queue):
        job_id = await read.enqueue(backend=queue.backend)
        assert await queue.wait_for(job_id, timeout=SLOW) == ""


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ("SIGKILL", r"killed by SIGKILL.*memory|memory ran out"),
        ("SIGSEGV", "killed by SIGSEGV"),
        ("SIGTERM", "killed by SIGTERM"),
        ("7", "exit code 7"),
        ("0", "exit code 0"),
    ],
)
async def test_the_cause_of_a_death_is_in_the_error(
    queue: Queue, capfd: pytest.CaptureFixture[str], how: str, told: str
) -> None:
    async with running(queue):
        job_id = await die.enqueue(how, backend=queue.backend)
        with pytest.raises(JobFailed, match=rf"ProcessDied.*\.die .*({told})"):
            await queue.wait_for(job_id, timeout=SLOW)
        job_id = await return_awaitable.enqueue(backend=queue.backend)
        assert await queue.wait_for(job_id, timeout=SLOW) == "awaited"
    assert "about to die" in capfd.readouterr().out


async def test_a_task_that_closes_its_outputs_spoils_no_other(queue: Queue) -> None:
    async with running(queue):
        for _ in range(2):
            job_id = await close_outputs.enqueue(backend=queue.backend)
            assert await queue.wait_for(job_id, timeout=SLOW) == "closed"


async def test_a_cancelled_task_is_killed_with_what_it_started(
    queue: Queue, tmp_path: Path
) -> None:
    path = tmp_path / "pids"
    async with running(queue):
        job_id = await wait_for_ever.enqueue(path, backend=queue.backend)
        await holds(lambda: path.exists() and " " in path.read_text(), SLOW)
        pids = [int(pid) for pid in path.read_text().split()]
        assert await queue.cancel_job(job_id)
        assert (await outcome(queue, job_id))["status"] == "cancelled"
        await holds(lambda: not any(alive(pid) for pid in pids), SLOW)


async def test_a_stopped_worker_leaves_no_process(queue: Queue) -> None:
    async with running(queue):
        pid = await queue.wait_for(await write.enqueue(0, backend=queue.backend), timeout=SLOW)
        assert alive(pid)  # it is kept for the next task
        assert pid == await queue.wait_for(
            await write.enqueue(0, backend=queue.backend), timeout=SLOW
        )
    assert not alive(pid)


async def test_the_function_that_was_registered_is_the_one_that_runs(queue: Queue) -> None:
    async with running(queue):
        job_id = await queue.add(f"{__name__}.decorated", ["1"])
        assert await queue.wait_for(job_id, timeout=SLOW) == [2, 2]


def test_a_function_that_its_process_could_not_find_is_refused() -> None:
    def local() -> None: ...

    with pytest.raises(InvalidArgument, match="must be a function of a module"):
        TaskRegistry().register(local, queue="work", process=True)
