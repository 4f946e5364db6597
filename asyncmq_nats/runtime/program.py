"""A worker as a program: signals, task modules, the event loop."""

import gc
import importlib
import importlib.util
import logging
import os
import pkgutil
import signal
import sys
import threading
from collections.abc import Awaitable, Callable, Iterable
from types import ModuleType
from typing import Final, Protocol

import anyio

from asyncmq_nats._concurrency import open_task_group
from asyncmq_nats._logging import get_logger
from asyncmq_nats.exceptions import TaskModuleError
from asyncmq_nats.runtime.supervisor import parent_is_gone

__all__ = ["Runnable", "import_tasks", "run_program", "run_until_signalled"]

logger = get_logger(__name__)

TASK_THREAD: Final = "AnyIO worker thread"
GC_THRESHOLD: Final = 5_000
"""New objects after which the garbage collector looks for cycles, instead of 700."""
THREAD_END_TIMEOUT: Final = 0.2
"""How long a thread that is told to end may take to do so, in seconds."""


def import_tasks(modules: Iterable[str]) -> None:
    """Import the modules that register tasks (AsyncMQ `autodiscover_tasks`).

    A package stands for every module in it.

    Raises:
        TaskModuleError: one cannot be imported.
    """
    for name in modules:
        module = _import_module(name)
        for path in getattr(module, "__path__", ()):
            _import_all_in(path, name)


def _import_all_in(path: str, package: str) -> None:
    for found in pkgutil.iter_modules([path], f"{package}."):
        if found.name.endswith(".__main__"):  # a program
            continue
        module = _import_module(found.name)
        for inner in getattr(module, "__path__", ()):
            _import_all_in(inner, found.name)


def _import_module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except Exception as problem:
        raise TaskModuleError(name, problem) from problem


class Runnable(Protocol):
    """A runner or a crew, which runs until it is told to stop."""

    async def run(self) -> None:
        """Run until `stop`."""

    def stop(self) -> None:
        """Begin to stop."""


def run_program(main: Callable[[], Awaitable[int | None]]) -> None:
    """Run the coroutine function to its end, on uvloop where it is installed.

    The garbage collector is set for many short-lived objects. A result other than 0 is the exit
    code of the program.

    If then a task still runs in a thread, which nothing can cancel, the process ends: its job was
    handed back, and another worker runs it.
    """
    # Imported objects stay: checking them again and again is most of the collector's cost (a tenth
    # of a small job).
    gc.freeze()
    gc.set_threshold(GC_THRESHOLD)
    fast = sys.platform != "win32" and importlib.util.find_spec("uvloop") is not None
    code = anyio.run(main, backend_options={"use_uvloop": fast}) or 0
    _end_with_stuck_threads(code)
    if code:
        sys.exit(code)


def _end_with_stuck_threads(code: int) -> None:
    stuck = [thread for thread in threading.enumerate() if thread.name == TASK_THREAD]
    for thread in stuck:
        thread.join(THREAD_END_TIMEOUT)
    if any(thread.is_alive() for thread in stuck):
        logger.warning("a task that was handed back still runs in a thread: ending the process")
        logging.shutdown()
        sys.stdout.flush()
        os._exit(code)  # at a normal exit, Python would wait for the thread


async def run_until_signalled(runner: Runnable) -> None:
    """Run a worker until SIGINT or SIGTERM, then let it stop in order.

    A second signal ends the process at once.
    """
    async with open_task_group() as group:
        group.start_soon(_stop_on_signal, runner)
        group.start_soon(_stop_when_orphaned, runner)
        await runner.run()
        group.cancel_scope.cancel()


async def _stop_when_orphaned(runner: Runnable) -> None:
    await parent_is_gone()
    logger.warning("the process that started this worker is gone: stopping")
    runner.stop()


async def _stop_on_signal(runner: Runnable) -> None:
    with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        stopping = False
        async for number in signals:
            if stopping:
                logger.warning("second signal: ending at once; running jobs will be redelivered")
                os._exit(128 + number)
            stopping = True
            logger.info("signal %s: stopping", signal.Signals(number).name)
            runner.stop()
