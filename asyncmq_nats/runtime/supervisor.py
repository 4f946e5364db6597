"""Worker processes under a parent.

It starts a process again that dies, and all when the code changes. A child is this program run
again, with a variable in its environment that marks it as one.
"""

import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import anyio
from anyio.abc import Process, TaskGroup, TaskStatus

from asyncmq_nats._concurrency import open_task_group
from asyncmq_nats._logging import get_logger
from asyncmq_nats.exceptions import InvalidArgument

__all__ = [
    "FINISHED_EXIT_CODE",
    "PROCESS_NUMBER",
    "RECYCLED_EXIT_CODE",
    "is_child",
    "parent_is_gone",
    "supervise",
]

logger = get_logger(__name__)

PARENT: Final = "ASYNCMQ_NATS_PARENT"
PROCESS_NUMBER: Final = "ASYNCMQ_NATS_PROCESS"
"""In the environment of a child its number, from 0: added to the ports of health and metrics."""
FINISHED_EXIT_CODE: Final = 78
"""Exit code of a child that is not started again: its queues are empty, or it was stopped by id."""
RECYCLED_EXIT_CODE: Final = 79
"""Exit code of a child that is started again at once.

It has run its jobs, or has grown too large.
"""
LONG_LIFE_SECONDS: Final = 5.0
LONGEST_DELAY: Final = 10.0
PARENT_CHECK_INTERVAL: Final = 1.0


def is_child() -> bool:
    """Return whether this process was started by `supervise`."""
    return PARENT in os.environ


async def parent_is_gone() -> None:
    """Return when the process that started this one has ended; never, if this one is no child."""
    parent = os.environ.get(PARENT)
    while parent is None or os.getppid() == int(parent):  # noqa: ASYNC110  no event tells
        await anyio.sleep(PARENT_CHECK_INTERVAL if parent is not None else 3600)


async def supervise(processes: int, watched: Sequence[Path] = ()) -> int:
    """Run processes of this program until SIGINT or SIGTERM, which is passed on.

    A second one kills. A child that ends is started again, at once if it lived for some seconds,
    otherwise after a growing delay. When a Python file below `watched` changes, new children are
    started at once, and those of before finish what they run. Return the exit code for the parent.

    Raises:
        InvalidArgument: the program was read from standard input or typed in, so it cannot be run
            again; or files are to be watched, and the package for it is missing.
    """
    if not _can_run_again():
        raise InvalidArgument(
            "several processes run the program again, so it must be a file or a module: "
            "write it into a file, or use processes=1 with a program from standard input",
            processes,
        )
    if watched and importlib.util.find_spec("watchfiles") is None:
        raise InvalidArgument(
            "reload needs the package watchfiles: pip install 'asyncmq-nats[reload]'",
            [str(path) for path in watched],
        )
    supervisor = _Supervisor(
        [sys.executable, *sys.orig_argv[1:]], os.environ | {PARENT: str(os.getpid())}
    )
    async with open_task_group() as group:
        for number in range(processes):
            group.start_soon(supervisor.keep_running, number, group)
        group.start_soon(supervisor.pass_signals_on)
        if watched:
            group.start_soon(supervisor.reload_on_change, watched)
        await supervisor.wait(processes)
        group.cancel_scope.cancel()
    return supervisor.exit_code


def _can_run_again() -> bool:
    if sys.argv[:1] not in ([], [""], ["-"]):
        return True
    program = getattr(sys.modules["__main__"], "__file__", None)  # of standard input "<stdin>"
    return bool(program and os.path.isfile(program))


@dataclass(slots=True, eq=False)
class _Child:
    """A process. `turn` is set when it has ended, or when it is to be replaced."""

    process: Process
    started: float = field(default_factory=time.monotonic)
    turn: anyio.Event = field(default_factory=anyio.Event)
    code: int | None = None
    is_told: bool = False

    def end(self, number: signal.Signals = signal.SIGTERM) -> None:
        """Send the signal, but SIGTERM once only: the second one has a worker drop what it runs."""
        if self.code is None and not (self.is_told and number is signal.SIGTERM):
            self.is_told = True
            with suppress(ProcessLookupError):  # it has ended, and its code is not known yet
                self.process.send_signal(number)


class _Supervisor:
    """The children, and whether they are to end."""

    def __init__(self, command: list[str], environment: Mapping[str, str]) -> None:
        self._command = command
        self._environment = environment
        self._children: dict[_Child, None] = {}
        self._current: dict[int, _Child] = {}
        self._stopping = anyio.Event()
        self._changed = anyio.Event()
        self._ended = 0
        self._all_ended = anyio.Event()
        self.exit_code = 0

    async def wait(self, processes: int) -> None:
        """Return when all children have ended for good."""
        while self._ended < processes or self._children:
            await self._all_ended.wait()
            self._all_ended = anyio.Event()

    async def keep_running(self, number: int, group: TaskGroup) -> None:
        """Start one child again and again."""
        delay = 0.0
        while not self._stopping.is_set():
            changed = self._changed
            child = self._current[number] = await group.start(self._live, number)
            logger.info("worker process %d runs as %d", number, child.process.pid)
            if changed.is_set():  # while it was being started: it may have read the old code
                child.end()
                child.turn.set()
            await child.turn.wait()
            if child.code is None:  # it is replaced
                delay = 0.0
                continue
            if self._stopping.is_set() or child.code == FINISHED_EXIT_CODE:
                break
            delay = self._choose_delay(child, delay)
            logger.warning(
                "worker process %d ended with %d: started again in %g s", number, child.code, delay
            )
            await self._pause(delay, changed)
        self._current.pop(number, None)
        self._ended += 1
        self._all_ended.set()

    @staticmethod
    def _choose_delay(child: _Child, delay: float) -> float:
        if child.code == RECYCLED_EXIT_CODE or time.monotonic() - child.started > LONG_LIFE_SECONDS:
            return 0.0
        return min(LONGEST_DELAY, max(0.1, delay * 2))

    async def _pause(self, seconds: float, changed: anyio.Event) -> None:
        """Wait until a child may be started: a change of the code may have mended it."""
        with anyio.move_on_after(seconds):
            async with open_task_group() as group:
                for event in (self._stopping, changed):
                    group.start_soon(_cancel_when_set, event, group)

    async def _live(self, number: int, *, task_status: TaskStatus[_Child]) -> None:
        """Run one process to its end."""
        # A session of its own: Ctrl-C in a terminal reaches the parent only, which passes it on
        # once.
        async with await anyio.open_process(
            self._command,
            env={**self._environment, PROCESS_NUMBER: str(number)},
            stdin=subprocess.DEVNULL,
            stdout=None,
            stderr=None,
            start_new_session=True,
        ) as process:
            child = _Child(process)
            self._children[child] = None
            if self._stopping.is_set():  # the signal came while it was being started
                child.end()
            task_status.started(child)
            child.code = await process.wait()
        del self._children[child]
        if self._stopping.is_set():
            # A child that did not handle the signal yet was ended by it, as it should be.
            sound = (0, -signal.SIGTERM, FINISHED_EXIT_CODE, RECYCLED_EXIT_CODE)
            self.exit_code = self.exit_code or int(child.code not in sound)
        child.turn.set()
        self._all_ended.set()

    async def reload_on_change(self, watched: Sequence[Path]) -> None:
        """Replace all children whenever the code has changed."""
        from watchfiles import PythonFilter, awatch

        async for changes in awatch(*watched, watch_filter=PythonFilter()):
            if self._stopping.is_set():
                return
            paths = sorted({path for _, path in changes})
            logger.info(
                "code changed (%s); restarting the worker processes",
                ", ".join(map(os.path.relpath, paths[:5])),
            )
            self._changed.set()
            self._changed = anyio.Event()
            for child in self._current.values():
                child.end()
                child.turn.set()

    async def pass_signals_on(self) -> None:
        """Pass the first signal on to the children, and kill them at the second."""
        with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
            async for _ in signals:
                for child in list(self._children):
                    child.end(signal.SIGKILL if self._stopping.is_set() else signal.SIGTERM)
                self._stopping.set()


async def _cancel_when_set(event: anyio.Event, group: TaskGroup) -> None:
    await event.wait()
    group.cancel_scope.cancel()
