"""A shell on a terminal of its own, into which a test types."""

import os
import re
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from tests.receiver import PATIENCE

SHELL: Final = (
    "import pty, sys;"
    "sys.exit(pty.spawn(['bash', '--norc', '--noprofile', '--noediting', '-i']) >> 8)"
)
CONTROLS: Final = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\r")


class Terminal:
    """An interactive bash."""

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", SHELL],
            cwd=folder,
            env=dict(environment),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        self._output = ""
        self._changed = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.type("stty -echo; PS1= PS2=\n")
        self.run("")

    def _read(self) -> None:
        assert self._process.stdout is not None
        while chunk := os.read(self._process.stdout.fileno(), 65536):
            with self._changed:
                self._output += CONTROLS.sub("", chunk.decode(errors="replace"))
                self._changed.notify_all()

    def type(self, keys: str) -> int:
        """Press the keys; return how much was printed before."""
        assert self._process.stdin is not None
        before = len(self._output)
        self._process.stdin.write(keys.encode())
        self._process.stdin.flush()
        return before

    def run(self, commands: str) -> str:
        """Type commands, wait until they have ended well, and return what they printed."""
        mark = f"[ended {len(self._output)}"
        typed = mark.replace("n", "n''", 1)  # so that its echo is another text
        before = self.type(f"{commands}\necho '{typed}' $?\n")
        self.wait_for(rf"{re.escape(mark)} \d+", before)
        output, _, code = self._output[before:].partition(mark)
        assert int(code.split()[0]) == 0, f"{commands}\n{output}"
        return output

    def wait_for(self, pattern: str, start: int = 0) -> None:
        """Wait until a text like this was printed after `start`."""
        with self._changed:
            found = self._changed.wait_for(
                lambda: re.search(pattern, self._output[start:], re.DOTALL), 2 * PATIENCE
            )
        assert found, f"not printed: {pattern}\n{self._output[start:]}"

    def close(self) -> None:
        """End what runs, by Ctrl-C, and the shell. A hang-up alone does not end a nats-server."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self.type("\x03\nexit\n")
        try:
            self._process.wait(PATIENCE)
        finally:
            self._process.kill()
        self._reader.join(PATIENCE)
        self._process.stdin.close()
        self._process.stdout.close()
