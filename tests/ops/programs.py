"""Worker programs that a test writes, starts and ends."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.receiver import PATIENCE, holds

ROOT = Path(__file__).parents[2]


@dataclass
class Program:
    """A process and what it has written."""

    process: "subprocess.Popen[bytes]"
    log_path: Path

    @property
    def log(self) -> str:
        return self.log_path.read_text()

    async def logged(self, text: str, times: int = 1) -> None:
        """Wait until it has written the text this many times."""
        await holds(lambda: self.log.count(text) >= times)

    async def wait(self) -> int:
        """Wait until it has ended and return its exit code."""
        await holds(lambda: self.process.poll() is not None)
        return self.process.returncode

    def stop(self) -> int:
        """Ask it to stop and return its exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(PATIENCE)


@contextmanager
def started(command: list[str], directory: Path, **environment: str) -> Iterator[Program]:
    """Run a command while the block does."""
    directory.mkdir(exist_ok=True)
    log_path = directory / f"{len(list(directory.glob('*.log')))}.log"
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            command,
            cwd=directory,
            env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", **environment},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
    try:
        yield Program(process, log_path)
    except BaseException:
        print(log_path.read_text())
        raise
    finally:
        process.kill()  # its children notice, and end
        process.wait()


def python(program: Path) -> list[str]:
    return [sys.executable, str(program)]
