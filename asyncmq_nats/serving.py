"""A worker as a program: signals, task modules, the event loop."""

import importlib
import importlib.util
import logging
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Iterable

import anyio

from asyncmq_nats.runner import Runner

__all__ = ["import_tasks", "run_program", "run_until_signalled"]

logger = logging.getLogger(__name__)


def import_tasks(modules: Iterable[str]) -> None:
    """Import the modules that register tasks (AsyncMQ `autodiscover_tasks`). One that fails is logged, and the others are imported."""
    for module in modules:
        try:
            importlib.import_module(module)
        except Exception:
            logger.exception("task module %s could not be imported: its tasks are unknown to this worker", module)


def run_program(main: Callable[[], Awaitable[None]]) -> None:
    """Run the coroutine function to its end, on uvloop where it is installed."""
    fast = sys.platform != "win32" and importlib.util.find_spec("uvloop") is not None
    anyio.run(main, backend_options={"use_uvloop": fast})


async def run_until_signalled(runner: Runner) -> None:
    """Run a worker until SIGINT or SIGTERM, then let it stop in order. A second signal ends the process at once."""
    async with anyio.create_task_group() as group:
        group.start_soon(_stop_on_signal, runner)
        await runner.run()
        group.cancel_scope.cancel()


async def _stop_on_signal(runner: Runner) -> None:
    with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        stopping = False
        async for number in signals:
            if stopping:
                logger.warning("second signal: ending at once; what runs will run again")
                os._exit(128 + number)
            stopping = True
            logger.info("signal %s: stopping", signal.Signals(number).name)
            runner.stop()
