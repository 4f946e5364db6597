"""Several worker processes under one parent that starts a dead one again.

A child is this very program run again, with a variable in its environment that says so: what the program prepares, its children have too.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from typing import Final

import anyio
from anyio.abc import Process

from asyncmq_nats._concurrency import open_task_group
from asyncmq_nats._logging import get_logger
from asyncmq_nats.exceptions import InvalidArgument

__all__ = ["PROCESS_NUMBER", "is_child", "parent_is_gone", "supervise"]

logger = get_logger(__name__)

PARENT: Final = "ASYNCMQ_NATS_PARENT"
PROCESS_NUMBER: Final = "ASYNCMQ_NATS_PROCESS"
"""In the environment of a child its number, from 0: added to the ports of health and metrics."""
LIVED_LONG: Final = 5.0
LONGEST_DELAY: Final = 10.0
PARENT_CHECK: Final = 1.0


def is_child() -> bool:
    """Return whether this process was started by `supervise`."""
    return PARENT in os.environ


async def parent_is_gone() -> None:
    """Return when the process that started this one has ended; never, if this one is no child."""
    parent = os.environ.get(PARENT)
    while parent is None or os.getppid() == int(parent):  # noqa: ASYNC110  the system has no event for it
        await anyio.sleep(PARENT_CHECK if parent is not None else 3600)


async def supervise(processes: int) -> int:
    """Run this program so many times until SIGINT or SIGTERM, which is passed on; a second one kills. Return the exit code for the parent.

    A child that ends is started again, at once if it lived for some seconds, otherwise after a growing delay.

    Raises:
        InvalidArgument: the program was read from standard input or typed in, so it cannot be run again.
    """
    if not _can_run_again():
        raise InvalidArgument(
            "several processes run the program again, so it must be a file or a module: "
            "write it into a file, or use processes=1 with a program from standard input",
            processes,
        )
    supervisor = _Supervisor(
        [sys.executable, *sys.orig_argv[1:]], os.environ | {PARENT: str(os.getpid())}
    )
    async with open_task_group() as group:
        for number in range(processes):
            group.start_soon(supervisor.keep_running, number)
        group.start_soon(supervisor.pass_signals_on)
        await supervisor.wait(processes)
        group.cancel_scope.cancel()
    return supervisor.exit_code


def _can_run_again() -> bool:
    if sys.argv[:1] not in ([], [""], ["-"]):
        return True
    program = getattr(sys.modules["__main__"], "__file__", None)  # of standard input "<stdin>"
    return bool(program and os.path.isfile(program))


class _Supervisor:
    """The children, and whether they are to end."""

    def __init__(self, command: list[str], environment: Mapping[str, str]) -> None:
        self._command = command
        self._environment = environment
        self._children: dict[int, Process] = {}
        self._stopping = anyio.Event()
        self._ended = 0
        self._all_ended = anyio.Event()
        self.exit_code = 0

    async def wait(self, processes: int) -> None:
        """Return when all children have ended for good."""
        while self._ended < processes:
            await self._all_ended.wait()
            self._all_ended = anyio.Event()

    async def keep_running(self, number: int) -> None:
        """Start one child again and again."""
        delay = 0.0
        while not self._stopping.is_set():
            started = time.monotonic()
            # A session of its own: Ctrl-C in a terminal reaches the parent only, which passes it on once.
            async with await anyio.open_process(
                self._command,
                env={**self._environment, PROCESS_NUMBER: str(number)},
                stdin=subprocess.DEVNULL,
                stdout=None,
                stderr=None,
                start_new_session=True,
            ) as child:
                self._children[number] = child
                if self._stopping.is_set():  # the signal came while it was being started
                    child.send_signal(signal.SIGTERM)
                logger.info("worker process %d runs as %d", number, child.pid)
                code = await child.wait()
            del self._children[number]
            if self._stopping.is_set():
                # A child that had not come to handle the signal yet ended by it, as it should.
                self.exit_code = self.exit_code or int(code not in (0, -signal.SIGTERM))
                break
            delay = (
                0.0
                if time.monotonic() - started > LIVED_LONG
                else min(LONGEST_DELAY, max(0.1, delay * 2))
            )
            logger.warning(
                "worker process %d ended with %d: started again in %g s", number, code, delay
            )
            with anyio.move_on_after(delay):
                await self._stopping.wait()
        self._ended += 1
        self._all_ended.set()

    async def pass_signals_on(self) -> None:
        """Pass the first signal on to the children, and kill them at the second."""
        with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
            async for _ in signals:
                for child in list(self._children.values()):
                    child.send_signal(signal.SIGKILL if self._stopping.is_set() else signal.SIGTERM)
                self._stopping.set()
