"""`Worker` and `run_worker`: a queue's jobs run in this process, with AsyncMQ's names."""

import sys
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import anyio
from anyio.abc import TaskStatus

from asyncmq_nats._concurrency import open_task_group
from asyncmq_nats.backends.base import Backend
from asyncmq_nats.exceptions import InvalidArgument
from asyncmq_nats.middleware import Hook
from asyncmq_nats.queues import Queue
from asyncmq_nats.runtime.control import WorkerInfo, list_workers
from asyncmq_nats.runtime.program import import_tasks, run_program, run_until_signalled
from asyncmq_nats.runtime.runner import Runner
from asyncmq_nats.runtime.supervisor import is_child, supervise

__all__ = ["Worker", "WorkerInfo", "autodiscover_tasks", "list_workers", "run_worker"]

H = TypeVar("H", bound=Hook)


def autodiscover_tasks(backend: Backend) -> None:
    """Import the task modules of the settings (AsyncMQ `autodiscover_tasks`). Every way to run a worker does so."""
    import_tasks(backend.settings.tasks)


class Worker:
    """Runs the jobs of a queue with its backend, concurrency and limits (AsyncMQ `Worker`).

    Args:
        queue: a `Queue`, or the name of one on the default backend.
        concurrency: instead of the queue's.
        processes: `start()` runs this many worker processes, each with `concurrency` slots, and starts one again that dies. Each of them is
            this program run again. Needs servers that are there: an embedded one would be one per process.

    Raises:
        ValueError: processes is less than 1.
    """

    def __init__(
        self, queue: Queue | str, *, concurrency: int | None = None, processes: int = 1
    ) -> None:
        if processes < 1:
            raise ValueError(f"processes must be at least 1, not {processes}")
        self._processes = processes
        self.queue = Queue(queue) if isinstance(queue, str) else queue
        if concurrency is not None:
            self.queue.concurrency = concurrency
        self._runner: Runner | None = None
        self._ended: anyio.Event | None = None

    @property
    def id(self) -> str | None:
        """The id that this worker's outcomes carry; `None` before it runs."""
        return None if self._runner is None else self._runner.worker

    def on_startup(self, hook: H) -> H:
        """As `Queue.on_startup`, of this worker's queue."""
        return self.queue.on_startup(hook)

    def on_shutdown(self, hook: H) -> H:
        """As `Queue.on_shutdown`, of this worker's queue."""
        return self.queue.on_shutdown(hook)

    async def run(self, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        """Run jobs until `stop` or cancellation. `started()` is called when the first jobs are asked for."""
        self._runner, self._ended = self.queue.runner(), anyio.Event()
        try:
            await self._runner.run(task_status=task_status)
        finally:
            self._ended.set()

    def start(self) -> None:
        """Run jobs in this thread, or in `processes`, until SIGINT or SIGTERM."""
        if self._processes > 1 and not is_child():
            run_program(self._supervise)
        else:
            run_program(self._run_as_program)

    async def _supervise(self) -> None:
        code = await supervise(self._processes)
        if code:
            sys.exit(code)

    async def _run_as_program(self) -> None:
        self._runner = self.queue.runner()
        try:
            await run_until_signalled(self._runner)
        finally:
            await self.queue.backend.close()

    def stop(self) -> None:
        """Begin to stop: no more jobs are started, those that run may finish for `shutdown_timeout` seconds, the rest is handed back."""
        if self._runner is not None:
            self._runner.stop()

    async def drain(self) -> None:
        """Stop, and wait until `run` has ended (AsyncMQ `Worker.drain`)."""
        self.stop()
        if self._ended is not None:
            await self._ended.wait()


async def run_worker(
    queue_name: str,
    backend: Backend | None = None,
    concurrency: int = 3,
    rate_limit: int | None = None,
    rate_interval: float = 1.0,
    repeatables: Iterable[Mapping[str, Any]] | None = None,
    scan_interval: float | None = None,
    drain_event: anyio.Event | None = None,
) -> None:
    """Run a queue's jobs until cancelled (AsyncMQ `run_worker`).

    Args:
        queue_name: see `Queue`.
        backend: see `Queue`.
        concurrency: see `Queue`.
        rate_limit: see `Queue`.
        rate_interval: see `Queue`.
        repeatables: jobs to repeat, each a dict of what `Queue.add_repeatable` takes.
        scan_interval: see `Queue`.
        drain_event: when it is set, the worker stops as by `Worker.stop`.

    Raises:
        InvalidArgument: a repeatable has an unknown key.
    """
    queue = Queue(queue_name, backend, concurrency, rate_limit, rate_interval, scan_interval)
    for definition in repeatables or ():
        _add_repeatable(queue, definition)
    if drain_event is None:
        await queue.run()
        return
    runner = queue.runner()

    async def stop_when_set(event: anyio.Event) -> None:
        await event.wait()
        runner.stop()

    async with open_task_group() as group:
        group.start_soon(stop_when_set, drain_event)
        await runner.run()
        group.cancel_scope.cancel()


def _add_repeatable(queue: Queue, definition: Mapping[str, Any]) -> None:
    try:
        queue.add_repeatable(**definition)
    except TypeError as error:
        raise InvalidArgument(f"repeatables: {error}", dict(definition)) from None
