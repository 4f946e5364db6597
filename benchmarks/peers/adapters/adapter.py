"""The interface of an adapter, and the program around it.

Runs in the library's own environment: standard library and uvloop only. The harness starts an
adapter's file in one of two ways:

    python adapters/<file>.py produce   reads commands from stdin, answers each with a line
    python adapters/<file>.py work      runs the jobs of PEER_QUEUE until it is killed

PEER_URL is the server and PEER_SERVER its process, PEER_CONCURRENCY how many jobs run at a time,
PEER_JOBS how many there are. Lines for the harness begin with `@` and are JSON; everything else on
stdout is the library's.
"""

import asyncio
import importlib.metadata
import json
import os
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import ClassVar

import uvloop

URL = os.environ.get("PEER_URL", "")
SERVER = int(os.environ.get("PEER_SERVER", "0"))
QUEUE = os.environ.get("PEER_QUEUE", "")
CONCURRENCY = int(os.environ.get("PEER_CONCURRENCY", "1"))
JOBS = int(os.environ.get("PEER_JOBS", "0"))
SECONDS = float(os.environ.get("PEER_SECONDS", "inf"))
"""A slow worker is measured for this long instead of for all its jobs."""

PRODUCERS = 100
WARM_UP = -1
"""The number of a job that is not counted: it opens connections, and shows that a worker runs."""


class NoWay(Exception):
    """The library has no call for this. The text says why."""


class Adapter(ABC):
    """How an application uses one library. A job is `no_operation(number, due)`.

    It returns its number and calls `meter.note(number, due)`; `due` is 0 for a job that runs now.
    Every call returns when the server has confirmed what it stored.
    """

    packages: ClassVar[tuple[str, ...]]
    """The distributions whose versions the table shows; the library itself first."""

    @abstractmethod
    async def connect(self) -> None:
        """Open connections, and make what the library needs on its server."""

    @abstractmethod
    async def add(self, queue: str, number: int) -> None:
        """Add one job that runs now."""

    async def add_100_at_once(self, queue: str, jobs: Iterator[int]) -> int:
        """Add these jobs from 100 tasks, each of which waits for its own; return how many."""
        return await at_once(lambda number: self.add(queue, number), jobs)

    async def add_bulk(self, queue: str, jobs: int) -> None:
        """Add this many jobs by the library's call for many.

        Raises:
            NoWay: it has none.
        """
        raise NoWay("no call adds many jobs")

    @abstractmethod
    async def add_due(self, queue: str, jobs: int, due: float) -> None:
        """Add jobs that become due at this time, in seconds since 1970.

        Raises:
            NoWay: it has no delayed jobs.
        """

    @abstractmethod
    def work(self) -> None:
        """Run `QUEUE` in one process, `CONCURRENCY` jobs at a time, as the library's program does.

        Returns never.
        """

    def versions(self) -> dict[str, str]:
        """Return the versions of `packages`."""
        return {name: importlib.metadata.version(name) for name in self.packages}


# -- the worker's side


def tell(**line: object) -> None:
    """Say something to the harness."""
    print(f"@{json.dumps(line)}", file=sys.__stdout__, flush=True)  # Celery replaces `sys.stdout`


def cpu_seconds(process: int) -> float:
    """Return the CPU time of the process and of all below it, so far. Linux only."""
    used = 0.0
    for thread in Path(f"/proc/{process}/task").glob("[0-9]*"):
        try:
            used += int((thread / "schedstat").read_text().split()[0]) / 1e9
            children = (thread / "children").read_text().split()
        except (FileNotFoundError, ProcessLookupError):  # it has just ended
            continue
        used += sum(cpu_seconds(int(child)) for child in children)
    return used


class Meter:
    """Counts the jobs that a worker runs, and tells the harness what they took.

    The clocks run from the `2 × CONCURRENCY`th job, when the worker has its full rate, to the last
    one, or to the first that comes after `SECONDS`.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._left = set(range(JOBS))
        self._warm = JOBS - min(2 * CONCURRENCY, JOBS // 2)
        self._begun = 0.0
        self._used: tuple[float, float] = 0.0, 0.0
        self._late: list[float] = []
        self._over = False

    def note(self, number: int, due: float = 0.0) -> int:
        """Note that this job runs; return its number."""
        now = time.time()
        with self._lock:
            if number == WARM_UP:
                tell(event="ready")
            elif not self._over and number in self._left:
                self._left.discard(number)
                self._note(now, due)
        return number

    def _note(self, now: float, due: float) -> None:
        if due:
            self._late.append(now - due)
        if len(self._left) == self._warm:
            self._used = self._read_cpu()
            self._begun = time.perf_counter()
        elif self._begun and (not self._left or time.perf_counter() - self._begun > SECONDS):
            self._end(time.perf_counter() - self._begun)

    def _end(self, seconds: float) -> None:
        self._over = True
        (worker, server), before = self._read_cpu(), self._used
        tell(
            event="over",
            jobs=self._warm - len(self._left),
            seconds=seconds,
            worker=worker - before[0],
            server=server - before[1],
            late=self._late,
        )

    def _read_cpu(self) -> tuple[float, float]:
        """Return the CPU time of the worker, all its processes, and of the server."""
        return cpu_seconds(os.getsid(0)), cpu_seconds(SERVER)


meter = Meter()


def become(*command: str) -> None:
    """Become the library's worker program, of this environment, which can import the adapter."""
    program = str(Path(sys.executable).with_name(command[0]))
    os.chdir(Path(__file__).parent)
    os.execve(program, command, os.environ | {"PYTHONPATH": str(Path(__file__).parent)})


# -- the producer's side


def numbers(jobs: int, seconds: float) -> Iterator[int]:
    """Return the numbers of `jobs` jobs, or of those whose turn comes within `seconds`."""
    end = time.perf_counter() + seconds
    for number in range(jobs):
        if time.perf_counter() > end:
            return
        yield number


async def at_once(add: Callable[[int], Awaitable[None]], jobs: Iterator[int]) -> int:
    """Have 100 tasks add jobs, each of which waits for its own. Return how many were added."""
    added = 0

    async def produce() -> None:
        nonlocal added
        for number in jobs:
            await add(number)
            added += 1

    async with asyncio.TaskGroup() as group:
        for _ in range(PRODUCERS):
            group.create_task(produce())
    return added


async def add_one_by_one(adapter: Adapter, queue: str, jobs: Iterator[int]) -> int:
    """Add jobs, each when the one before is confirmed; return how many."""
    added = 0
    for number in jobs:
        await adapter.add(queue, number)
        added += 1
    return added


async def obey(
    adapter: Adapter, what: str, queue: str, *, jobs: int, seconds: float, due: float
) -> int:
    """Do what a command says, and return how many jobs were added."""
    if what == "add_one_by_one":
        return await add_one_by_one(adapter, queue, numbers(jobs, seconds))
    if what == "add_100_at_once":
        return await adapter.add_100_at_once(queue, numbers(jobs, seconds))
    if what == "add_bulk":
        await adapter.add_bulk(queue, jobs)
    elif what == "add_due":
        await adapter.add_due(queue, jobs, due)
    else:
        await adapter.add(queue, WARM_UP)
    return jobs


async def produce(adapter: Adapter) -> None:
    """Obey one command a line until there are no more."""
    await adapter.connect()
    tell(versions=adapter.versions())
    while line := await asyncio.to_thread(sys.stdin.readline):
        command = json.loads(line)
        begun = time.perf_counter()
        try:
            jobs = await obey(adapter, **command)
            tell(jobs=jobs, seconds=time.perf_counter() - begun)
        except NoWay as reason:
            tell(no_way=str(reason))


def main(adapter: Adapter) -> None:
    """Be what the command line says.

    A producer is on uvloop, whatever its library. A worker is if the library's own program would be
    where uvloop is installed, as it is in all environments.
    """
    if sys.argv[1:] == ["work"]:
        adapter.work()
    else:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(produce(adapter))
