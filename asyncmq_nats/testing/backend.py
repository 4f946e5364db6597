"""`VirtualBackend`: the in-memory backend on a virtual clock. It runs the jobs while time moves."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from functools import wraps
from inspect import signature
from typing import Any, Final

from anyio.abc import TaskGroup

from asyncmq_nats._concurrency import open_task_group
from asyncmq_nats.backends import set_default_backend
from asyncmq_nats.backends.base import ConsumerState, Log, Record, Settle, Write
from asyncmq_nats.backends.inmemory import InMemoryBackend
from asyncmq_nats.backends.inmemory.consumers import Cursor
from asyncmq_nats.backends.inmemory.timers import Agenda, Alarm
from asyncmq_nats.exceptions import InvalidJob, VirtualTimeStuck
from asyncmq_nats.queues import Queue
from asyncmq_nats.runtime.registry import TASK_REGISTRY
from asyncmq_nats.settings import Settings
from asyncmq_nats.settings import settings as environment
from asyncmq_nats.states import Place
from asyncmq_nats.store.records import without_markers
from asyncmq_nats.testing.clock import Due, VirtualClock, is_inside
from asyncmq_nats.transitions.promote import read_released
from asyncmq_nats.wire.codec import load_json
from asyncmq_nats.wire.keys import QueueSubjects, tier_name, workers_bucket
from asyncmq_nats.workers import Worker

__all__ = ["Addition", "VirtualBackend", "virtual_backend", "worker"]

HEARTBEAT_INTERVAL: Final = 3600.0
"""Seconds between two heartbeats of a worker, unless the settings are given: each is a stop."""
DEFAULT_CONCURRENCY: Final[int] = signature(Queue).parameters["concurrency"].default
ATOMIC_METHODS: Final = (
    "declare_log", "incarnation", "delete_log", "list_logs", "declare_consumer", "list_consumers",
    "look_up", "pause", "resume", "write", "last", "page", "page_back", "count", "last_sequence",
    "delete", "delete_many", "purge", "publish", "subscribe",
)  # fmt: skip
"""Methods that do their work at once after they gave way."""


@dataclass(frozen=True, slots=True)
class Addition:
    """The first record of a job. `at`: Unix seconds by the virtual clock."""

    queue: str
    token: str
    body: bytes
    at: float


class VirtualAlarm(Alarm):
    """An alarm on the virtual clock."""

    __slots__ = ("due",)

    def __init__(self, call: Callable[[], None]) -> None:
        super().__init__(call)
        self.due: Due | None = None

    def ring(self) -> None:
        """Make the call, unless it was taken back."""
        call, self.call = self.call, None
        if call is not None:
            call()


class VirtualAgenda(Agenda):
    """Alarms of the records, on the virtual clock: they ring where the time is moved."""

    def __init__(self, clock: VirtualClock) -> None:
        super().__init__(clock)
        self._virtual = clock
        self.lock = clock.lock

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Do nothing: every event loop is served."""

    def stop(self) -> None:
        """Do nothing: the alarms ring when the time is moved."""

    def at(self, when: float, call: Callable[[], None], *, upkeep: bool = False) -> Alarm:
        """See `Agenda`."""
        alarm = VirtualAlarm(call)
        alarm.due = self._virtual.at(when, alarm.ring, upkeep=upkeep)
        return alarm

    def cancel(self, alarm: Alarm | None) -> None:
        """See `Agenda`."""
        if alarm is not None:
            alarm.call = None
        if isinstance(alarm, VirtualAlarm) and alarm.due is not None:
            alarm.due.cancel()

    def soon(
        self, call: Callable[..., object], *args: Any, loop: asyncio.AbstractEventLoop | None = None
    ) -> bool:
        """See `Agenda`."""
        here = _running_loop()
        target = here if loop is None else loop
        if target is None or not target.is_running():
            return False
        self._virtual.note_loop(target)
        schedule = target.call_soon if target is here else target.call_soon_threadsafe
        if loop is None:
            schedule(self._run, call, *args)
        else:
            schedule(call, *args)
        return True

    def _run(self, call: Callable[..., object], *args: Any) -> None:
        with self.lock:
            call(*args)


class VirtualBackend(InMemoryBackend):
    """A backend in memory for tests, whose time stands still until it is moved.

    Any number of event loops and threads may use it at once: that of a test client and that of
    `asyncio.run`. `clock.advance` and `clock.run_until_idle` run the jobs of its queues by workers
    of their own, but for queues for which a worker runs already.

    Args:
        clock: the clock; by default a new one.
        inline: whether a job that is due is run before the call that adds it returns.
        workers: whether jobs are run while the time moves; `False`: by the test's own workers only.
        settings: by default those of the environment, with a heartbeat each hour.
    """

    clock: VirtualClock

    def __init__(
        self,
        clock: VirtualClock | None = None,
        *,
        inline: bool = False,
        workers: bool = True,
        settings: Settings | None = None,
    ) -> None:
        if settings is None:
            settings = environment.model_copy(update={"heartbeat_interval": HEARTBEAT_INTERVAL})
        clock = VirtualClock() if clock is None else clock
        super().__init__(settings, clock=clock)
        self._agenda = VirtualAgenda(clock)
        self.inline = inline
        self.workers = workers
        self.additions: dict[tuple[str, str], Addition] = {}
        """The jobs that were added, by queue and token, in order."""
        self.queues: dict[tuple[str, int], Queue] = {}
        """The queues that were made with this backend, by name and registry: the last of each."""
        self._made: dict[tuple[str, int], list[Queue]] = {}
        self._keys: dict[str, QueueSubjects] = {}
        self.clock.employ(self)

    async def close(self) -> None:
        """Do nothing: other event loops may use it still, and what was written stays."""

    def note_queue(self, queue: Queue) -> None:
        """Take note of a queue that was made: its jobs are run with its registry and limits."""
        key = queue.name, id(queue._registry)
        self.queues[key] = queue
        self._made.setdefault(key, []).append(queue)

    def find_queues_to_run(self) -> dict[tuple[str, int], Queue]:
        """Return the queues whose workers run, by name and registry.

        A queue may be made again to look at its jobs, and `enqueue` makes one: that takes away no
        schedule, hook or limit of the application's.
        """
        return {
            key: next((queue for queue in reversed(made) if _is_set_up(queue)), made[-1])
            for key, made in self._made.items()
        }

    def forget(self) -> None:
        """Start over: `enqueued` lists what is added from now on."""
        self.additions.clear()

    def reset(self) -> None:
        """Remove all jobs, schedules and windows, for the next test. The time stays."""
        with self._agenda.lock:
            for log in self._logs.values():
                log.purge(">", None, None)
            self.additions.clear()

    # -- writes

    def send(self, log: str, write: Write, settle: Settle, *, timeout: float | None = None) -> None:
        """See `Backend`."""
        with self._agenda.lock:
            super().send(log, write, settle, timeout=timeout)
            self._note(log, write)

    def discard(self, log: str, sequence: int) -> None:
        """See `Backend`."""
        with self._agenda.lock:
            super().discard(log, sequence)

    def _learn_log(self, log: Log) -> None:
        """Learn whether the log is the ready log of a queue."""
        prefix = f"{self.settings.prefix}_"
        if log.name.startswith(prefix):
            keys = self.keys_of(log.name.removeprefix(prefix))
            self._keys[keys.ready_log] = self._keys[keys.bucket_log] = keys

    def _note(self, log: str, write: Write) -> bool:
        """Take note of a job that is written. Return whether it is due."""
        keys = self._keys.get(log)
        if keys is None or write.marker:
            return False
        due = log == keys.ready_log
        if due:
            token = keys.split_ready(write.subject)[1]
        else:
            key = keys.parse(write.subject)
            if key.place is None:
                return False
            due, token = key.place is Place.RELEASED, key.token
        if (keys.queue, token) not in self.additions:
            added = Addition(keys.queue, token, write.body, self.now())
            self.additions[keys.queue, token] = added
        return due

    def find(self, log: str, *filters: str) -> list[Record]:
        """Return the last record of every subject that matches, at once; none without the log."""
        with self._agenda.lock:
            stored = self._logs.get(log)
            return [] if stored is None else stored.find(*filters)

    def tier_state(self, keys: QueueSubjects, priority: int) -> ConsumerState:
        """Return the state of a tier, at once."""
        with self._agenda.lock:
            stored = self._logs.get(keys.ready_log)
            tier = None if stored is None else stored.consumers.get(tier_name(priority))
            return ConsumerState(0, 0, 0) if tier is None else tier.state()

    def keys_of(self, queue: str) -> QueueSubjects:
        """Return the names of a queue's records."""
        return QueueSubjects(self.settings.prefix, queue)

    async def _give_way(self) -> None:
        """Do nothing: `ATOMIC_METHODS` methods give way before."""

    def _open(self) -> None:
        """Do nothing: every event loop is served."""

    # -- the jobs are run

    @asynccontextmanager
    async def crew(self) -> AsyncIterator["_Crew"]:
        """Have workers run inside the block that its clock can wait for."""
        async with open_task_group() as group:
            crew = _Crew(self, group)
            try:
                yield crew
            except BaseException:
                crew.dismiss()
                raise
            unfinished = crew.dismiss()
        if unfinished:
            raise VirtualTimeStuck(
                f"the time was moved, and {_tell(unfinished)} still waits: finish what it waits "
                "for, move the time further, or run a worker of the test's own around it, by "
                "`async with worker(queue):`"
            )

    def names(self) -> Iterator[str]:
        """Yield the queues that have logs."""
        prefix = f"{self.settings.prefix}_"
        yield from (name.removeprefix(prefix) for name in self._logs if name.startswith(prefix))

    def staffed(self) -> set[str]:
        """Return the queues for which a worker runs."""
        log, key = workers_bucket(self.settings.prefix)
        records = self.find(log, f"{key}*")
        return {load_json(record.body)["queue"] for record in without_markers(records)}

    def has_due_jobs(self, running: int) -> bool:
        """Return whether more jobs are due than those that run."""
        return sum(map(self._count_due, self.names())) > running

    def _count_due(self, queue: str) -> int:
        keys, now = self.keys_of(queue), self.now()
        ready = self._logs.get(keys.ready_log)
        due = 0
        if ready is not None:
            for consumer in ready.consumers.values():
                if isinstance(consumer, Cursor) and consumer.paused_until <= now:
                    state = consumer.state()
                    due += state.pending + state.leased
        for record in self.find(keys.bucket_log, keys.place(Place.RELEASED)):
            try:
                released = read_released(keys.token(record.subject), record.body)
            except InvalidJob:
                continue
            due += released.run_at is None or released.run_at <= now
        return due


class _Crew:
    """The workers of one move of the clock."""

    def __init__(self, backend: VirtualBackend, group: TaskGroup) -> None:
        self._backend = backend
        self._group = group
        self._workers: dict[tuple[str, int], Worker] = {}
        self._checked: tuple[int, int] = (-1, -1)

    async def start_missing(self) -> bool:
        """See `Crew`."""
        backend = self._backend
        if not backend.workers:
            return False
        seen = len(backend._logs), len(backend.queues)
        if seen == self._checked:
            return False
        named = set(backend.names())
        staffed = backend.staffed() - {name for name, _ in self._workers}
        for name in named - {queue for queue, _ in backend.queues}:
            Queue(name, backend)  # it is noted
        missing = [
            (key, queue)
            for key, queue in backend.find_queues_to_run().items()
            if key not in self._workers
            and queue.name not in staffed
            and (queue.name in named or queue._local_repeatables)
            and _has_tasks(queue)
            and not self._has_registry_of_its_own(queue)
        ]
        for key, queue in missing:
            self._workers[key] = Worker(queue)
            await self._group.start(self._workers[key].run)
        self._checked = len(backend._logs), len(backend.queues)
        return bool(missing)

    def _has_registry_of_its_own(self, queue: Queue) -> bool:
        """Return whether another queue of that name has one, and this one that of all.

        A worker with the wrong registry would put off the jobs of the other.
        """
        return queue._registry is TASK_REGISTRY and any(
            each.name == queue.name and each._registry is not TASK_REGISTRY and _has_tasks(each)
            for each in self._backend.queues.values()
        )

    def has_due_jobs(self, running: int) -> bool:
        """See `Crew`."""
        return self._backend.has_due_jobs(running)

    def dismiss(self) -> list[str]:
        """Tell the workers to end. Return the ids of the jobs that still ran: they are put back."""
        return [job_id for worker in self._workers.values() for job_id in _dismiss(worker)]


def _has_tasks(queue: Queue) -> bool:
    registry = queue._registry
    return queue.any_task or any(entry.queue == queue.name for entry in registry.values())


def _is_set_up(queue: Queue) -> bool:
    """Return whether a worker of this queue differs from that of one made by its name alone."""
    hooks = queue._hooks
    declared = queue._local_repeatables or queue._middleware
    hooked = hooks.on_startup or hooks.on_shutdown or hooks.lifespan
    limited = queue.rate_limit is not None or queue.concurrency != DEFAULT_CONCURRENCY
    return bool(declared or hooked or limited or queue.any_task != queue.backend.settings.any_task)


def _tell(job_ids: list[str]) -> str:
    return f"job {job_ids[0]}" + (f" (and {len(job_ids) - 1} more)" if len(job_ids) > 1 else "")


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


def _atomic(name: str) -> Callable[..., Any]:
    """Return the method of the in-memory backend, run while no other thread runs one."""
    method = getattr(InMemoryBackend, name)

    @wraps(method)
    async def call(self: VirtualBackend, *args: Any, **kwargs: Any) -> Any:
        await asyncio.sleep(0)
        with self._agenda.lock:
            result = _finish(method(self, *args, **kwargs))
            if name == "declare_log":
                self._learn_log(args[0])
            noted = [self._note(args[0], write) for write in args[1:]] if name == "write" else []
        due = any(noted)
        if due and self.inline and not is_inside.get():
            await self.clock.run_until_idle()
        return result

    return call


def _finish(coroutine: Any) -> Any:
    """Return the result of a coroutine that awaits nothing."""
    try:
        coroutine.send(None)
    except StopIteration as end:
        return end.value
    coroutine.close()
    raise AssertionError("an atomic method of the backend has waited")


for _name in ATOMIC_METHODS:
    setattr(VirtualBackend, _name, _atomic(_name))


@contextmanager
def virtual_backend(
    clock: VirtualClock | None = None, *, inline: bool = False, settings: Settings | None = None
) -> Iterator[VirtualBackend]:
    """Have queues and tasks that are given no backend take a new `VirtualBackend` in the block.

    A queue that was made before the block keeps the backend that it was made with.
    """
    before = environment.backend
    backend = VirtualBackend(clock, inline=inline, settings=settings)
    set_default_backend(backend)
    try:
        yield backend
    finally:
        set_default_backend(before)


@asynccontextmanager
async def worker(queue: Queue | str, *, concurrency: int | None = None) -> AsyncIterator[Worker]:
    """Run a worker of the queue while the block runs, for jobs that wait while the time is moved.

    At the end, jobs that run are cancelled and put back.
    """
    running = Worker(queue, concurrency=concurrency)
    async with open_task_group() as group:
        await group.start(running.run)
        try:
            yield running
        finally:
            _dismiss(running)


def _dismiss(worker: Worker) -> list[str]:
    """Tell a worker to end at once. Return the ids of the jobs that it puts back."""
    runner = worker._runner
    unfinished = [] if runner is None else list(runner._starts())
    if runner is not None:
        runner._slots.cancel_running()
    worker.stop()
    return unfinished
