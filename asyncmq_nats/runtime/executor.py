"""One run of a task: its time limit, how it is interrupted, and its end."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import anyio

from asyncmq_nats._clock import Clock
from asyncmq_nats.backends.base import Backend
from asyncmq_nats.context import JobContext
from asyncmq_nats.exceptions import TaskTimeout
from asyncmq_nats.middleware import Chain
from asyncmq_nats.retries import Failure
from asyncmq_nats.runtime.registry import RegisteredTask
from asyncmq_nats.transitions.claim import Attempt

__all__ = ["Running", "execute"]


@dataclass(slots=True, eq=False)
class Running:
    """A job that runs.

    `slot`: the task that it runs in. `interrupted`: it was told to end; `cancelled`: by a user,
    not by the end of the worker; `gave_in`: it ended because of that.
    """

    attempt: Attempt
    context: JobContext
    slot: "asyncio.Task[Any]"
    interrupted: bool = False
    cancelled: bool = False
    gave_in: bool = False

    def cancel(self) -> None:
        """Interrupt it; a thread is only told."""
        self.context.cancel_requested = True
        if not self.interrupted:
            self.interrupted = True
            # Not a cancel scope around each job: entering and leaving one costs a sixth of a small
            # job. The slot waits inside the task's code whenever this is called, so that is where
            # the cancellation arrives.
            self.slot.cancel()


async def execute(
    running: Running,
    entry: RegisteredTask,
    threads: anyio.CapacityLimiter,
    backend: Backend,
    is_ending: Callable[[], bool],
    middleware: Chain,
) -> tuple[Any, Failure | None]:
    """Run the task of a job, and return its result or what went wrong.

    Neither if it gave in to an interruption. A cancellation while the worker `is_ending`, because
    one of its loops has failed, goes through.
    """
    head = running.attempt.head
    try:
        if head.timeout is None:
            if not middleware.runs:
                return await entry.run(head, threads, running.context), None
            return await _start(entry, running, threads, middleware), None
        return await _execute_in_time(entry, running, threads, backend.clock, middleware), None
    except anyio.get_cancelled_exc_class() as error:
        if is_ending():
            raise
        running.gave_in = running.interrupted
        return None, None if running.interrupted else Failure.of(
            error, backend.now()
        )  # otherwise the task has cancelled itself
    except BaseException as error:  # also `sys.exit()`, or a panic in an extension: the task's end
        if _ends_worker(error):
            raise
        return None, Failure.of(error, backend.now())
    finally:
        while (
            running.slot.cancelling() and not is_ending()
        ):  # the next job in this slot was not cancelled
            running.slot.uncancel()


def _ends_worker(error: BaseException) -> bool:
    """Return whether an exception is not the task's own.

    Ctrl-C, or a coroutine that is closed with its event loop.
    """
    if not isinstance(error, GeneratorExit):
        return isinstance(error, KeyboardInterrupt)
    try:
        return asyncio.current_task() is None
    except RuntimeError:  # no event loop runs
        return True


def _start(
    entry: RegisteredTask, running: Running, threads: anyio.CapacityLimiter, middleware: Chain
) -> Awaitable[Any]:
    run = partial(entry.run, running.attempt.head, threads, running.context)
    return middleware.run(running.context, run)


async def _execute_in_time(
    entry: RegisteredTask,
    running: Running,
    threads: anyio.CapacityLimiter,
    clock: Clock,
    middleware: Chain,
) -> Any:
    timeout = running.attempt.head.timeout or 0.0
    with clock.move_on_after(timeout) as scope:
        result = await _start(entry, running, threads, middleware)
        if not scope.cancel_called:  # else it went on in spite of it
            return result
    running.context.cancel_requested = True
    raise TaskTimeout(entry.id, timeout, in_thread=not entry.is_async)
