"""Worker programs as processes that tests start, stop, pause and kill."""

import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from asyncmq_nats.backends.nats.embedded.server import EmbeddedServer
from tests.receiver import PATIENCE, holds
from tests.receiver import until as eventually

__all__ = [
    "PATIENCE",
    "PROGRAM",
    "Fleet",
    "MakeServer",
    "Program",
    "Watched",
    "eventually",
    "freeze",
    "holds",
]

MakeServer = Callable[[str], EmbeddedServer]
"""Starts a server with that configuration."""
PROGRAM: Final = Path(__file__).parent / "programs" / "worker.py"
RUNS_QUEUE: Final = " runs queue "
"""The log line of a worker that takes jobs."""


def alive(pid: int) -> bool:
    """Return whether the process runs.

    A zombie does not: it has ended, and its parent has not waited for it.
    """
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def freeze(pid: int) -> None:
    """Stop this child process until it is sent SIGCONT.

    Its threads stand still when this returns: the signal alone only asks for it.
    """
    os.kill(pid, signal.SIGSTOP)
    os.waitid(os.P_PID, pid, os.WSTOPPED)


class Program:
    """A program in a process of its own."""

    def __init__(self, name: str, environment: dict[str, str], log: Path) -> None:
        self.name = name
        self.log_path = log
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, str(PROGRAM)],
                env={**os.environ, **environment},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )

    @property
    def log(self) -> str:
        return self.log_path.read_text()

    @property
    def ended(self) -> bool:
        return self._process.poll() is not None

    @property
    def pid(self) -> int:
        return self._process.pid

    def send(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def freeze(self) -> None:
        """Stop it until it is sent SIGCONT."""
        freeze(self.pid)

    def kill(self) -> None:
        """End it as a crash would."""
        self._process.kill()
        self._process.wait()

    async def logged(self, text: str) -> None:
        """Wait until it has logged the text."""
        await holds(lambda: text in self.log)

    async def wait(self) -> int:
        """Wait until it has ended and return its exit status."""
        await holds(lambda: self.ended)
        return self._process.returncode


@dataclass
class Watched:
    """The notes of a fleet's tasks."""

    notes: Path

    def runs(self, name: str) -> list[str]:
        """Return the names of the workers that have begun the body of this name, in order."""
        path = self.notes / f"{name}.runs"
        return path.read_text().split() if path.exists() else []

    def stamps(self, name: str) -> list[tuple[float, int]]:
        """Return the time and the process of each start of the body of this name, in order."""
        path = self.notes / f"{name}.stamps"
        lines = path.read_text().splitlines() if path.exists() else []
        return sorted((float(at), int(pid)) for at, pid in (line.split() for line in lines))

    async def stamped(self, name: str, times: int = 1) -> list[tuple[float, int]]:
        """Wait until this many bodies have begun, and return their stamps."""
        await holds(lambda: len(self.stamps(name)) >= times)
        return self.stamps(name)

    def count_runs(self) -> Counter[str]:
        """Return how often each body has begun."""
        return Counter(
            {path.stem: len(path.read_text().splitlines()) for path in self.notes.glob("*.runs")}
        )

    def say(self, word: str) -> None:
        """Let the tasks go on that wait for this word."""
        (self.notes / word).touch()

    async def begun(self, name: str, times: int = 1) -> None:
        """Wait until the body has begun this many times."""
        await holds(lambda: len(self.runs(name)) >= times)


@dataclass
class Fleet:
    """Worker programs of one queue on one server, and what they noted down.

    All are dead after `stop`.
    """

    url: str
    directory: Path
    queue: str = "fleet"
    environment: dict[str, str] = field(default_factory=dict)
    programs: list[Program] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        (self.directory / "notes").mkdir(exist_ok=True)
        self.watched = Watched(self.directory / "notes")

    def launch(self, name: str, **environment: Any) -> Program:
        """Start a worker of that name and return at once.

        Keyword arguments are added to its environment, in capitals.
        """
        own = {
            "ASYNCMQ_NATS_SERVERS": self.url,
            "QUEUE": self.queue,
            "WORKER": name,
            "NOTES": str(self.watched.notes),
        }
        own |= self.environment | {key.upper(): str(value) for key, value in environment.items()}
        program = Program(name, own, self.directory / f"{name}-{len(self.programs)}.log")
        self.programs.append(program)
        return program

    async def start(self, name: str, **environment: Any) -> Program:
        """Start a worker and wait until it takes jobs."""
        program = self.launch(name, **environment)
        await program.logged(RUNS_QUEUE)
        return program

    async def start_all(self, *names: str, **environment: Any) -> list[Program]:
        """Start workers at the same time and wait until all take jobs."""
        programs = [self.launch(name, **environment) for name in names]
        for program in programs:
            await program.logged(RUNS_QUEUE)
        return programs

    def stop(self) -> None:
        """Kill what still runs."""
        for program in self.programs:
            program.kill()
