"""The workload on one library: its adapter's processes, and what they take.

Each round has fresh servers. The producer is one process, and so is the worker. Both end by
SIGKILL: what they leave is thrown away with their server.
"""

import json
import math
import os
import queue
import signal
import subprocess
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Final

from benchmarks.peers.environments import adapter_command
from benchmarks.peers.library import Peer
from benchmarks.peers.servers import SERVERS, Server

__all__ = ["FULL", "TINY", "Round", "Size", "measure_round"]

ANSWER_TIMEOUT: Final = 60.0
LEAD: Final = 2.0
"""Seconds from the addition of the last job to the instant at which all are due, at least."""


@dataclass(frozen=True, slots=True)
class Size:
    """How many jobs of each kind, and after how many seconds a slow library is stopped."""

    one_by_one: int
    many: int
    due: int
    seconds: float


FULL: Final = Size(one_by_one=2_000, many=5_000, due=200, seconds=2.0)
TINY: Final = Size(one_by_one=20, many=300, due=5, seconds=2.0)


@dataclass(slots=True)
class Round:
    """The figures of one round by column, and for the other columns why there are none."""

    figures: dict[str, float] = field(default_factory=dict)
    no_way: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    server: str = ""


class Process:
    """A process of an adapter: lines for the harness begin with `@`."""

    def __init__(self, peer: Peer, role: str, url: str, log: IO[bytes], **given: object) -> None:
        command, variables = adapter_command(peer)
        variables |= {"PEER_URL": url}
        variables |= {f"PEER_{name.upper()}": str(value) for name, value in given.items()}
        self._process = subprocess.Popen(
            [*command, role],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=variables,
            start_new_session=True,  # one group, so that all of it can be ended
        )
        self._lines: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("@"):
                self._lines.put(json.loads(line[1:]))
        self._lines.put(None)

    def expect(self, event: str | None = None) -> dict[str, Any]:
        """Return the next line, or the next one of this event."""
        while True:
            try:
                line = self._lines.get(timeout=ANSWER_TIMEOUT)
            except queue.Empty:
                raise TimeoutError(f"no answer within {ANSWER_TIMEOUT:g} s") from None
            if line is None:
                raise RuntimeError(f"the adapter ended with {self._process.wait()}")
            if event is None or line.get("event") == event:
                return line

    def ask(self, what: str, queue: str, **given: float) -> dict[str, Any]:
        """Have a producer do something; return its answer."""
        assert self._process.stdin is not None
        command = {"what": what, "queue": queue, "jobs": 1, "seconds": 0.0, "due": 0.0} | given
        print(json.dumps(command), file=self._process.stdin, flush=True)
        return self.expect()

    def end(self) -> None:
        """End it and its children at once."""
        with suppress(ProcessLookupError):  # it has ended by itself
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._reader.join()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()


class Workload:
    """One library with its server and its producer. Each step measures one column or more."""

    def __init__(self, peer: Peer, server: Server, size: Size, log: IO[bytes]) -> None:
        self.peer = peer
        self.round = Round(server=server.version)
        self._server, self._size, self._log = server, size, log
        self._producer = self._start("produce")
        self._added = 0
        """How many jobs wait for the next worker."""

    def _start(self, role: str, **given: object) -> Process:
        server = self._server
        return Process(self.peer, role, server.url, self._log, server=server.pid, **given)

    @contextmanager
    def _worker(self, **given: object) -> Iterator[Process]:
        process = self._start("work", **given)
        try:
            yield process
        finally:
            process.end()

    def start(self) -> None:
        """Wait until the producer is connected."""
        self.round.versions = self._producer.expect()["versions"]

    def end(self) -> None:
        """End the producer."""
        self._producer.end()

    def add_one_by_one(self) -> None:
        """Add jobs, each when the one before is confirmed."""
        self._add("add_one_by_one", "one", self._size.one_by_one)

    def add_100_at_once(self) -> None:
        """Add jobs from 100 tasks, or threads."""
        self._add("add_100_at_once", "many", self._size.many)

    def run_100(self) -> None:
        """Run these jobs, 100 at a time."""
        self._run_jobs("many", 100)

    def add_bulk(self) -> None:
        """Add jobs by one call; where there is none, the next step has those of 100 tasks."""
        if not self._add("add_bulk", "bulk", self._size.many):
            self._added = self._ask("add_100_at_once", "bulk", self._size.many)["jobs"]

    def run_10(self) -> None:
        """Run these jobs, 10 at a time."""
        self._run_jobs("bulk", 10)

    def run_due(self) -> None:
        """Measure how late an idle worker starts jobs that are all due at one instant."""
        jobs = self._size.due
        self._producer.ask("warm_up", "due")
        with self._worker(queue="due", concurrency=100, jobs=jobs) as worker:
            worker.expect("ready")
            lead = LEAD + 2 * jobs / self.round.figures["add_one_by_one"]
            due = float(math.ceil(time.time() + lead))  # some libraries know full seconds only
            answer = self._producer.ask("add_due", "due", jobs=jobs, due=due)
            if "no_way" in answer:
                self.round.no_way |= dict.fromkeys(("late_p50", "late_p95"), answer["no_way"])
                return
            if time.time() > due:
                raise TimeoutError("the jobs were due before all of them were added")
            late = sorted(1000 * seconds for seconds in worker.expect("over")["late"])
        self.round.figures["late_p50"] = late[len(late) // 2]
        self.round.figures["late_p95"] = late[min(int(len(late) * 0.95), len(late) - 1)]

    def _ask(self, what: str, queue: str, jobs: int) -> dict[str, Any]:
        self._producer.ask("warm_up", queue)
        return self._producer.ask(what, queue, jobs=jobs, seconds=self._size.seconds)

    def _add(self, what: str, queue: str, jobs: int) -> bool:
        """Measure a way to add jobs. Return whether there is one."""
        answer = self._ask(what, queue, jobs)
        if "no_way" in answer:
            self.round.no_way[what] = answer["no_way"]
            return False
        self._added = answer["jobs"]
        self.round.figures[what] = answer["jobs"] / answer["seconds"]
        return True

    def _run_jobs(self, queue: str, concurrency: int) -> None:
        """Measure a worker that finds all that was added."""
        given = {"queue": queue, "concurrency": concurrency, "jobs": self._added}
        with self._worker(**given, seconds=self._size.seconds) as worker:
            found = worker.expect("over")
        figures = self.round.figures
        figures[f"process_{concurrency}"] = found["jobs"] / found["seconds"]
        figures[f"worker_cpu_{concurrency}"] = found["worker"] / found["jobs"] * 1e6
        figures[f"server_cpu_{concurrency}"] = found["server"] / found["jobs"] * 1e6


STEPS: Final = (
    Workload.start,
    Workload.add_one_by_one,
    Workload.add_100_at_once,
    Workload.run_100,
    Workload.add_bulk,
    Workload.run_10,
    Workload.run_due,
)


@contextmanager
def open_workload(peer: Peer, size: Size, log: IO[bytes]) -> Iterator[Workload]:
    """Start a server and a producer."""
    with SERVERS[peer.server]() as server:
        workload = Workload(peer, server, size, log)
        try:
            yield workload
        finally:
            workload.end()


def measure_round(
    peers: Sequence[Peer], size: Size, logs: Path, before_step: Callable[[str], None]
) -> dict[str, Round]:
    """Run the workload on all libraries: each step on one after the other.

    So that other load on the machine is much the same for all figures of a column. A library that
    fails is not among those returned; its log says why.
    """
    with ExitStack() as stack:
        workloads = []
        for peer in peers:
            log = stack.enter_context((logs / f"{Path(peer.adapter).stem}.log").open("wb"))
            with _reported(f"{peer.name}, its server"):
                workloads.append(stack.enter_context(open_workload(peer, size, log)))
        for step in STEPS:
            before_step(step.__name__)
            going, workloads = workloads, []
            for workload in going:
                with _reported(f"{workload.peer.name}, {step.__name__}"):
                    step(workload)
                    workloads.append(workload)
        return {workload.peer.name: workload.round for workload in workloads}


@contextmanager
def _reported(what: str) -> Iterator[None]:
    """Print an error of one library: the others go on."""
    try:
        yield
    except Exception:
        print(f"{what}:\n{traceback.format_exc()}", flush=True)
