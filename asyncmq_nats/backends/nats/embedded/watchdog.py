"""A watchdog that ends a child process when this one dies, even of SIGKILL.

It is a shell that reads from a pipe until its end.
"""

import os
import shutil
import subprocess
import sys
from contextlib import suppress
from typing import Final

__all__ = ["Watchdog"]

SCRIPT: Final = 'read -r _ || kill "$0"'
"""The end of the pipe, rather than a line, is the end of the process that holds it."""


class Watchdog:
    """Sends SIGTERM to a child process when this process has died.

    `dismiss` it before the child is waited for: its id may be used again. Where there is no POSIX
    shell it does nothing.
    """

    def __init__(self, pid: int) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe = -1
        shell = None if sys.platform == "win32" else shutil.which("sh")
        if shell is None:
            return
        read_end, self._pipe = os.pipe()  # neither is inherited by programs that are started
        _held.add(self._pipe)
        try:
            # A session of its own: Ctrl-C in a terminal is not for it. It holds no file and no
            # directory of this process.
            self._process = subprocess.Popen(
                [shell, "-c", SCRIPT, str(pid)],
                stdin=read_end,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd="/",
                start_new_session=True,
            )
        except BaseException:
            self.dismiss()
            raise
        finally:
            os.close(read_end)

    def dismiss(self) -> None:
        """Have the watchdog end without a signal to the child, and wait for that."""
        pipe, self._pipe = self._pipe, -1
        if pipe in _held:
            with suppress(BrokenPipeError):  # it was killed
                os.write(pipe, b"\n")
            _held.discard(pipe)
            os.close(pipe)
        process, self._process = self._process, None
        if process is not None:
            process.wait()


_held: set[int] = set()
"""The ends of pipes that tell that this process lives."""


def _let_go() -> None:
    """Close them in a process that was forked from this one, and would outlive it."""
    for pipe in _held:
        os.close(pipe)
    _held.clear()


if sys.platform != "win32":
    os.register_at_fork(after_in_child=_let_go)
