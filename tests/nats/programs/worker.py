"""A worker program as a user would write one: tasks, and `queue.start()`.

The tests run it as a process of its own. `QUEUE`, `CONCURRENCY`, `PROCESSES` and `RATE_LIMIT`
(`<starts>/<seconds>`) say what to run, `WORKER` is its name, `NOTES` a directory in which tasks
leave traces and wait for each other. Everything else is the library's own environment.
"""

import logging
import os
import signal
import time
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import anyio

from asyncmq_nats.queues import Queue
from asyncmq_nats.tasks import task
from asyncmq_nats.workers import Worker

QUEUE = os.environ["QUEUE"]
WORKER = os.environ.get("WORKER", "")
NOTES = Path(os.environ["NOTES"])


def note(name: str) -> None:
    """Leave a trace of one run: a line in the file `<name>.runs`.

    Appending a short line is atomic.
    """
    with (NOTES / f"{name}.runs").open("a") as runs:
        runs.write(f"{WORKER}\n")


async def told(word: str) -> None:
    while not (NOTES / word).exists():  # noqa: ASYNC110  the test's word comes from another process
        await anyio.sleep(0.01)


@task(queue=QUEUE, name="brief")
async def brief(number: int, seconds: float = 0.0) -> int:
    note(str(number))
    await anyio.sleep(seconds)
    return number


@task(queue=QUEUE, name="unnoted")
async def unnoted() -> None:
    return None


@task(queue=QUEUE, name="block")
async def block(seconds: float) -> str:
    note("block")
    time.sleep(seconds)  # noqa: ASYNC251  what a careless user does
    return WORKER


@task(queue=QUEUE, name="last")
async def last(seconds: float) -> str:
    note("last")
    await anyio.sleep(seconds)
    return WORKER


@task(queue=QUEUE, name="last_in_thread")
def last_in_thread(seconds: float) -> str:
    note("last_in_thread")
    time.sleep(seconds)
    return WORKER


@task(queue=QUEUE, name="kill")
async def kill_own_process() -> None:
    note("kill")
    os.kill(os.getpid(), signal.SIGKILL)


@task(queue=QUEUE, name="wait")
async def wait(name: str, word: str) -> str:
    """Run until the test says the word."""
    note(name)
    await told(word)
    return WORKER


@task(queue=QUEUE, name="wait_in_thread")
def wait_in_thread(name: str, word: str) -> str:
    note(name)
    while not (NOTES / word).exists():
        time.sleep(0.01)
    return WORKER


@task(queue=QUEUE, name="disagree")
async def disagree(name: str, first_word: str, second_word: str, first_fails: bool) -> str:
    """Do one thing in the worker `first` and another in any other one, each when told so."""
    note(name)
    if WORKER != "first":
        await told(second_word)
        return WORKER
    await told(first_word)
    if first_fails:
        raise RuntimeError("the first worker fails")
    return WORKER


@task(queue=QUEUE, name="stamp")
async def stamp(name: str, seconds: float = 0.0) -> int:
    """Leave the time and the process in the file `<name>.stamps`."""
    with (NOTES / f"{name}.stamps").open("a") as stamps:
        stamps.write(f"{time.time()} {os.getpid()}\n")
    await anyio.sleep(seconds)
    return os.getpid()


@task(queue=QUEUE, name="add_days", process=True)
def add_days(day: date, days: int) -> tuple[str, int]:
    return (day + timedelta(days=days)).isoformat(), os.getpid()


@task(queue=QUEUE, name="fail_in_process", process=True)
def fail_in_process() -> None:
    raise ZeroDivisionError("in the process")


@task(queue=QUEUE, name="end_in_process", process=True)
def end_in_process() -> None:
    os._exit(7)


@task(queue=QUEUE, name="spin", process=True)
def spin(name: str) -> None:
    with (NOTES / f"{name}.stamps").open("a") as stamps:
        stamps.write(f"{time.time()} {os.getpid()}\n")
    while True:
        pass


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    starts, _, interval = os.environ.get("RATE_LIMIT", "").partition("/")
    limits: dict[str, Any] = (
        {"rate_limit": int(starts), "rate_interval": float(interval)} if starts else {}
    )
    queue = Queue(QUEUE, concurrency=int(os.environ.get("CONCURRENCY", "3")), **limits)
    Worker(queue, processes=int(os.environ.get("PROCESSES", "1"))).start()
