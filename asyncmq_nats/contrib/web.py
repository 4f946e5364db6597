"""Queues in the lifespan of a web application: connected when it starts, closed when it ends.

For FastAPI, Starlette and Litestar, whose applications take a function that returns an async
context manager. It imports none of them.
"""

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, Final

import anyio
from anyio.abc import TaskStatus

from asyncmq_nats import Queue, Worker
from asyncmq_nats._concurrency import open_task_group
from asyncmq_nats.exceptions import InvalidArgument
from asyncmq_nats.telemetry.logs import get_logger

__all__ = ["lifespan"]

logger = get_logger(__name__)

RESTART_DELAY: Final = 5.0
"""How long after a failure a worker starts again, in seconds."""


def lifespan(
    *queues: Queue, worker: Worker | None = None
) -> Callable[[Any], AbstractAsyncContextManager[None]]:
    """Return a lifespan for a web application.

    `FastAPI(lifespan=lifespan(queue))`, `Litestar(lifespan=[lifespan(queue)])`. The application
    starts when the queues' server is connected, and not without it. When it ends, jobs that the
    worker runs may finish for `shutdown_timeout` seconds; the rest is handed back. A
    worker that fails is logged and starts again: requests are served meanwhile.

    Args:
        queues: whose connections are opened and closed; those of the worker are, too.
        worker: runs in this process beside the requests. Each process of the web server has one.

    Raises:
        InvalidArgument: there is neither a queue nor a worker.
    """
    found = [*queues, *(worker.queues if worker is not None else ())]
    if not found:
        raise InvalidArgument("a lifespan needs a queue or a worker", None)
    backends = list({id(queue.backend): queue.backend for queue in found}.values())

    @asynccontextmanager
    async def hold(_app: Any = None) -> AsyncIterator[None]:
        try:
            for backend in backends:
                await backend.connect()
            if worker is None:
                yield
            else:
                async with _running(worker):
                    yield
        finally:
            with anyio.CancelScope(shield=True):
                for backend in backends:
                    await backend.close()

    return hold


@asynccontextmanager
async def _running(worker: Worker) -> AsyncIterator[None]:
    failure: Exception | None = None
    stopping = anyio.Event()
    async with open_task_group() as group:
        try:
            await group.start(_keep_running, worker, stopping)
            yield
        except Exception as error:  # raised below: here it would become a group of one
            failure = error
        finally:
            stopping.set()
            with anyio.CancelScope(shield=True):
                await worker.drain()
            group.cancel_scope.cancel()
    if failure is not None:
        raise failure


async def _keep_running(
    worker: Worker,
    stopping: anyio.Event,
    *,
    task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED,
) -> None:
    ready = _Ready(task_status)
    while True:
        try:
            await worker.run(task_status=ready)
        except Exception:
            if not ready.is_ready:
                raise  # the application is starting, and hears of it
            text = "worker %s has failed; it starts again in %g s"
            logger.exception(text, worker.id, RESTART_DELAY)
        else:
            if stopping.is_set():
                return
            text = "worker %s has ended; it starts again in %g s"
            logger.warning(text, worker.id, RESTART_DELAY)
        await anyio.sleep(RESTART_DELAY)


class _Ready(TaskStatus[None]):
    """Passes `started()` on, and remembers it."""

    def __init__(self, status: TaskStatus[None]) -> None:
        self._status = status
        self.is_ready = False

    def started(self, value: None = None) -> None:
        """The worker asks for jobs, perhaps once more."""
        if not self.is_ready:
            self.is_ready = True
            self._status.started()
