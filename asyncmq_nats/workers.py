"""`Worker` and `run_worker`: a queue's jobs run in this process, with AsyncMQ's names."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import anyio
from anyio.abc import TaskStatus

from asyncmq_nats._arguments import checked_number, checked_seconds
from asyncmq_nats._concurrency import open_task_group
from asyncmq_nats.backends.base import Backend
from asyncmq_nats.exceptions import InvalidArgument
from asyncmq_nats.middleware import Hook
from asyncmq_nats.queues import Queue
from asyncmq_nats.runtime.control import WorkerInfo, list_workers, new_worker_id, stop_worker
from asyncmq_nats.runtime.crew import Crew, Ending, Limits
from asyncmq_nats.runtime.program import import_tasks, run_program, run_until_signalled
from asyncmq_nats.runtime.runner import Runner
from asyncmq_nats.runtime.slot_group import SlotGroup
from asyncmq_nats.runtime.supervisor import (
    FINISHED_EXIT_CODE,
    RECYCLED_EXIT_CODE,
    is_child,
    supervise,
)

__all__ = [
    "Worker",
    "WorkerInfo",
    "autodiscover_tasks",
    "import_tasks",
    "list_workers",
    "run_worker",
    "start_processes",
    "stop_worker",
]

H = TypeVar("H", bound=Hook)


def autodiscover_tasks(backend: Backend) -> None:
    """Import the task modules of the settings (AsyncMQ `autodiscover_tasks`).

    Every way to run a worker does so.
    """
    import_tasks(backend.settings.tasks)


class Worker:
    """Runs the jobs of one queue or of several in this process (AsyncMQ `Worker`).

    With several queues, one connection and one process serve all of them.

    Args:
        queue: a `Queue`, or the name of one on the default backend; or several of them, which then
            have one backend.
        concurrency: how many jobs run at a time. A number is for one queue instead of the queue's
            own, and for several queues together; a mapping, such as `{"mail": 20, "reports": 2}`,
            is for each by itself. By default each queue has its own.
        processes: `start()` runs that many worker processes, each with `concurrency` slots, and
            starts one again that dies. Each of them runs this program again. Needs servers that
            are there: an embedded one would be one per process.
        weights: shares of the starts for queues that share their slots and have jobs waiting:
            with `{"mail": 3, "reports": 1}` three of four are of mail. By default all are equal.
        strict: queues that share their slots are served in the order in which they are listed: no
            job starts while one of an earlier queue is known to wait.
        burst: end when no job waits in any of the queues and none runs here. Delayed jobs and those
            of paused queues do not count.
        max_jobs: end when that many jobs have been started, and finish these.
        max_memory: end when the process uses more than that many megabytes (10⁶ bytes), and finish
            what runs. With one of these two, `start()` runs a parent that starts the next process.
        reload: `start()` starts the program again when a Python file changes: one below the current
            directory, or below the given directories. Jobs that run finish in the old process.
            Needs the extra `reload`.

    Raises:
        ValueError: a number is less than 1, or these options do not go together.
    """

    def __init__(
        self,
        queue: Queue | str | Sequence[Queue | str],
        *,
        concurrency: int | Mapping[str, int] | None = None,
        processes: int = 1,
        weights: Mapping[str, float] | None = None,
        strict: bool = False,
        burst: bool = False,
        max_jobs: int | None = None,
        max_memory: float | None = None,
        reload: bool | Iterable[str] = False,
    ) -> None:
        if processes < 1:
            raise ValueError(f"processes must be at least 1, not {processes}")
        self._processes = processes
        self.queues = _read_queues(queue)
        self.queue = self.queues[0]
        self._slots = _set_concurrency(self.queues, concurrency)
        self._weights = _read_weights(self.queues, weights)
        self._strict = strict
        if (weights or strict) and self._slots is None:
            raise InvalidArgument(
                "weights and strict order are for queues that share their slots: "
                "give several queues and a number as concurrency",
                concurrency,
            )
        if weights and strict:
            raise InvalidArgument("strict order knows no weights: leave one of both out", weights)
        if max_jobs is not None:
            checked_number(max_jobs, "max_jobs", 1)
        if max_memory is not None and checked_seconds(max_memory, "max_memory") <= 0:
            raise InvalidArgument("max_memory must be above 0 megabytes", max_memory)
        memory = None if max_memory is None else int(max_memory * 1_000_000)
        self._limits = Limits(burst, max_jobs, memory)
        self._watched = _read_watched(reload)
        self._id: str | None = None
        self._crew: Crew | None = None
        self._runner: Runner | None = None
        self._ended: anyio.Event | None = None

    @property
    def id(self) -> str | None:
        """The id that this worker's outcomes carry; `None` before it runs."""
        return self._id

    def on_startup(self, hook: H) -> H:
        """Like `Queue.on_startup`, once per worker. With several queues it is given the first."""
        return self.queue.on_startup(hook)

    def on_shutdown(self, hook: H) -> H:
        """Like `Queue.on_shutdown`, once per worker."""
        return self.queue.on_shutdown(hook)

    async def run(self, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        """Run jobs until `stop`, a limit, or cancellation.

        `started()` is called when the first jobs are asked for.
        """
        crew, self._ended = self._make_crew(), anyio.Event()
        try:
            await crew.run(task_status=task_status)
        finally:
            self._ended.set()

    def start(self) -> None:
        """Run jobs in this thread, or in processes, until SIGINT or SIGTERM, or until a limit."""
        recycles = self._limits.max_jobs is not None or self._limits.max_memory is not None
        if (self._processes > 1 or recycles or self._watched) and not is_child():
            run_program(self._supervise)
        else:
            run_program(self._run_as_program)

    async def _supervise(self) -> int:
        return await supervise(self._processes, self._watched)

    async def _run_as_program(self) -> int:
        crew = self._make_crew()
        try:
            await run_until_signalled(crew)
        finally:
            await self.queue.backend.close()
        if not is_child():
            return 0
        return (
            FINISHED_EXIT_CODE
            if crew.ending.is_final
            else RECYCLED_EXIT_CODE
            if crew.ending.is_recycling
            else 0
        )

    def _make_crew(self) -> Crew:
        self._id = new_worker_id()
        group = self._make_group()
        options: dict[str, Any] = {
            "worker": self._id,
            "group": group,
            "has_siblings": len(self.queues) > 1,
            "on_stop_signal": self._stop_remotely,
        }
        runners = [queue.runner(**options) for queue in self.queues]
        if group is not None:
            for runner in runners:
                group.join(runner.slots, self._weights.get(runner.queue, 1.0))
        self._runner = runners[0]
        self._crew = Crew(runners, self._limits, group)
        return self._crew

    def _stop_remotely(self) -> None:
        if self._crew is not None:
            self._crew.stop(Ending.REMOTE)

    def _make_group(self) -> SlotGroup | None:
        if len(self.queues) == 1 and self._limits.max_jobs is None:
            return None
        return SlotGroup(self._slots, is_strict=self._strict, jobs_left=self._limits.max_jobs)

    def stop(self) -> None:
        """Begin to stop.

        No more jobs are started, those that run may finish for `shutdown_timeout` seconds, the rest
        is handed back.
        """
        if self._crew is not None:
            self._crew.stop()

    async def drain(self) -> None:
        """Stop, and wait until `run` has ended (AsyncMQ `Worker.drain`)."""
        self.stop()
        if self._ended is not None:
            await self._ended.wait()


def _read_queues(given: Queue | str | Sequence[Queue | str]) -> list[Queue]:
    if isinstance(given, Queue):
        return [given]
    names = [given] if isinstance(given, str) else list(given)
    backend = next((each.backend for each in names if isinstance(each, Queue)), None)
    queues = [each if isinstance(each, Queue) else Queue(each, backend) for each in names]
    if not queues:
        raise InvalidArgument("a worker needs at least one queue", given)
    if len({queue.name for queue in queues}) < len(queues):
        raise InvalidArgument("each queue can be given once", [queue.name for queue in queues])
    if any(queue.backend is not queues[0].backend for queue in queues):
        raise InvalidArgument(
            "the queues of a worker share one backend: give all of them the same one",
            [queue.name for queue in queues],
        )
    return queues


def _set_concurrency(
    queues: Sequence[Queue], concurrency: int | Mapping[str, int] | None
) -> int | None:
    """Give each queue its slots. Return how many they share, `None` if each has its own."""
    if concurrency is None:
        return None
    if isinstance(concurrency, Mapping):
        _check_names(queues, concurrency, "concurrency")
        for queue in queues:
            slots = concurrency.get(queue.name, queue.concurrency)
            queue.concurrency = checked_number(slots, f"concurrency of {queue.name}", 1)
        return None
    for queue in queues:
        queue.concurrency = checked_number(concurrency, "concurrency", 1)
    return concurrency if len(queues) > 1 else None


def _read_weights(
    queues: Sequence[Queue], weights: Mapping[str, float] | None
) -> Mapping[str, float]:
    _check_names(queues, weights or {}, "weights")
    for name, weight in (weights or {}).items():
        if checked_seconds(weight, f"the weight of {name}") <= 0:
            raise InvalidArgument(f"the weight of {name} must be above 0", weight)
    return weights or {}


def _check_names(queues: Sequence[Queue], given: Mapping[str, Any], what: str) -> None:
    names = [queue.name for queue in queues]
    if unknown := [name for name in given if name not in names]:
        raise InvalidArgument(f"{what} may name the queues {', '.join(names)}", unknown[0])


def _read_watched(reload: bool | Iterable[str]) -> list[Path]:
    if isinstance(reload, bool):
        return [Path.cwd()] if reload else []
    return [Path(path) for path in reload]


def start_processes(processes: int = 1, *, reload: bool | Iterable[str] = False) -> bool:
    """Run this program in that many processes until SIGTERM, as `Worker.start` does.

    Return `False` at once in such a process: go on there. Otherwise return `True` when all have
    ended, or end the program with their exit code. Call it before all other imports: then it also
    starts code again that cannot be imported.
    """
    if is_child():
        return False
    watched = _read_watched(reload)

    async def run() -> int:
        return await supervise(processes, watched)

    run_program(run)
    return True


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
