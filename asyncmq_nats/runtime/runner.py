"""A worker on one queue: start, drain, stop. Its parts run jobs; this one owns their lifetimes."""

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Final

import anyio
from anyio.abc import TaskGroup, TaskStatus

from asyncmq_nats._concurrency import Spawner, all_done_before, open_task_group
from asyncmq_nats._logging import get_logger
from asyncmq_nats.exceptions import AsyncMQError, BackendError, InvalidArgument
from asyncmq_nats.middleware import Chain, Hooks
from asyncmq_nats.runtime.completer import Completer
from asyncmq_nats.runtime.control import CANCEL, RESUME, WorkerRegistry, new_worker_id
from asyncmq_nats.runtime.declarations import Declarations
from asyncmq_nats.runtime.fetcher import Fetcher
from asyncmq_nats.runtime.heartbeat import Heartbeat
from asyncmq_nats.runtime.processes import close_processes, hold_processes
from asyncmq_nats.runtime.promoter import Promoter
from asyncmq_nats.runtime.rate_limiter import Limit, RateLimiter
from asyncmq_nats.runtime.recorder import Recorder
from asyncmq_nats.runtime.registry import TaskRegistry
from asyncmq_nats.runtime.slot_group import SlotGroup
from asyncmq_nats.runtime.slots import Slots
from asyncmq_nats.runtime.vitals import Vitals, WorkerParts
from asyncmq_nats.states import State
from asyncmq_nats.store.announcing import LISTEN, WorkerEvents
from asyncmq_nats.store.commit import SHUTDOWN_STEP_TIMEOUT
from asyncmq_nats.store.configuration import Configurations
from asyncmq_nats.store.queue_store import QueueStore
from asyncmq_nats.store.reads import Inspection
from asyncmq_nats.transitions.finish import Lifecycle
from asyncmq_nats.transitions.make_room import make_room
from asyncmq_nats.wire.codec import load_json

__all__ = ["Runner"]

logger = get_logger(__name__)

MARK_INTERVAL: Final = 0.5
"""Seconds between two looks for jobs that have run for a while."""


class Runner:
    """Runs the jobs of one queue in this process.

    Args:
        store: of the queue; its backend is connected or not.
        registry: the tasks that can be run.
        any_task: whether all of them are, and not only those of the queue.
        concurrency: slots; never more jobs run at a time.
        limit: of starts in the whole queue.
        hooks: called at the start and at the stop.
        middleware: called around jobs.
        declarations: the repeatables that its code declares.
        worker: its id; that of the whole worker, if this is one of several queues.
        group: those queues.
        on_stop_signal: called when another program asks the worker to stop; by default `stop`.
    """

    def __init__(
        self,
        store: QueueStore,
        *,
        registry: TaskRegistry,
        concurrency: int,
        any_task: bool = False,
        limit: Limit | None = None,
        hooks: Hooks | None = None,
        middleware: Chain | None = None,
        declarations: Declarations | None = None,
        worker: str | None = None,
        group: SlotGroup | None = None,
        has_siblings: bool = False,
        on_stop_signal: Callable[[], None] | None = None,
    ) -> None:
        if concurrency < 1:
            raise ValueError(f"concurrency must be at least 1, not {concurrency}")
        self.worker = worker or new_worker_id()
        self._on_stop_signal = on_stop_signal or self.stop
        self._store = store
        self._backend = backend = store.backend
        self._assets = store.assets
        self._concurrency = concurrency
        self._hooks = hooks or Hooks()
        self._spawner = Spawner()
        self._lifecycle = Lifecycle(store, self.worker)
        self._events = events = WorkerEvents(store, self.worker)
        self._lifecycle.on_progress = lambda body: events.tell_progress(
            self._spawner, load_json(body)
        )
        self.recorder: Recorder | None = None
        if backend.settings.metrics:
            self.recorder = Recorder(
                backend,
                store.keys.queue,
                self.worker,
                concurrency,
                self._busy_seconds,
                self._incidents,
            )
        self._slots = Slots(
            store,
            self._lifecycle,
            registry,
            concurrency,
            events,
            self._spawner,
            self._note_progress,
            any_task=any_task,
            group=group,
            middleware=middleware or Chain(),
            recorder=self.recorder,
        )
        self._completer = Completer(self._lifecycle, events, self._spawner, self._on_settled)
        limiter = None if limit is None else RateLimiter(store, limit, self.worker)
        self._fetcher = Fetcher(
            store,
            self._lifecycle,
            concurrency=concurrency,
            limiter=limiter,
            adopt=self._completer.renew_lease,
            on_startable=self._slots.fill,
            pending=lambda: self._completer.pending,
            group=group,
        )
        self._slots.fetcher, self._slots.completer = self._fetcher, self._completer
        if group is not None:
            self._fetcher.member = self._slots
        self._configurations = Configurations(store)
        self._declarations = declarations or Declarations(store, {})
        self._entry = WorkerRegistry(
            store,
            self.worker,
            concurrency,
            self._starts,
            self._declarations.ids,
            rate_limit=None if limit is None else (limit.starts, limit.interval),
            is_stopping=self._stop_is_set,
            has_siblings=has_siblings,
        )
        self._lost_store = False
        steps = (
            self._entry.beat,
            self._restore_lost,
            self._lifecycle.trim,
            self._declarations.retire,
            partial(make_room, store),
            self._look_for_cancelled,
            self._configurations.refresh,
        )
        self._heartbeat = Heartbeat(
            self.worker, backend.settings.heartbeat_interval, steps, backend.clock
        )
        self._promoter = Promoter(store, leads=limit is None)
        parts = WorkerParts(self._slots, self._fetcher, self._promoter, self.recorder)
        self.vitals = Vitals(store, self.worker, concurrency, parts)
        self._progress = anyio.Event()
        self._draining = False
        self._stop = anyio.Event()
        self._group: TaskGroup

    # -- life

    def stop(self) -> None:
        """Begin to stop: take no more jobs, finish those that run."""
        self._stop.set()

    def _stop_is_set(self) -> bool:
        return self._stop.is_set()

    @property
    def slots(self) -> Slots:
        """The slots in which its jobs run."""
        return self._slots

    @property
    def queue(self) -> str:
        """The name of its queue."""
        return self._store.keys.queue

    @property
    def started(self) -> int:
        """How many jobs it has started."""
        return self._fetcher.started

    async def has_work(self) -> bool:
        """Return whether a job runs here, or waits to be run by any worker.

        Delayed jobs do not count, nor do those of a paused queue.
        """
        busy = not self._fetcher.is_idle or self._completer.pending or self._slots.waits_in_line
        if busy or self._fetcher.is_paused:
            return bool(busy)
        inspection = Inspection(self._store)
        return (await inspection.count_by_state())[State.WAITING] > 0

    async def run(self, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        """Run jobs until `stop` or cancellation.

        Either way, jobs that run may finish for `shutdown_timeout`; the rest is handed back.
        """
        # The server may not be there yet.
        configure = self._take_configuration
        steps = self._backend.connect, self._assets.declare_all, configure
        if not await all_done_before(self._stop, *steps):
            task_status.started()  # the caller waits for it
            return
        async with self._hooks.open_lifespan(self.worker) as self._slots.state:
            await self._hooks.start(self.worker)
            await self._run(task_status)

    async def _run(self, task_status: TaskStatus[None]) -> None:
        serving, finished = anyio.Event(), anyio.Event()
        async with open_task_group() as group:
            # Not `group.start()`: if cancelled, it waits for the child, and nothing would
            # stop the child.
            group.start_soon(self._serve, serving, finished)
            try:
                await serving.wait()
                logger.info(
                    "worker %s runs queue %s with %d slots",
                    self.worker,
                    self._store.keys.queue,
                    self._concurrency,
                )
                task_status.started()
                await self._stop.wait()
            finally:
                with anyio.CancelScope(shield=True):
                    self._stop.set()
                    await finished.wait()
                    await self._hooks.stop(self.worker)

    async def _take_configuration(self) -> None:
        """Use the settings that the queue keeps.

        Apply those in force to the server, if told to.
        """
        await self._configurations.refresh()
        if self._backend.settings.apply:
            try:
                await self._configurations.apply()
            except (BackendError, InvalidArgument) as error:
                text = "queue %s: its settings are not applied: %s"
                logger.warning(text, self._store.keys.queue, error)

    async def _serve(self, serving: anyio.Event, finished: anyio.Event) -> None:
        """Run all loops, shielded from outside cancellation: `stop` ends them in order."""
        hold_processes()
        try:
            with anyio.CancelScope(shield=True):
                try:
                    async with open_task_group() as self._group:
                        self._group.start_soon(self._spawner.serve, self._group)
                        await self._group.start(self.vitals.run)
                        await self._group.start(self._promoter.run)
                        await self._fetcher.start(self._group)
                        await self._enter_registry()
                        self._group.start_soon(self._mark_long_runs)
                        if self.recorder is not None:
                            self._group.start_soon(self.recorder.run, self._spawner)
                        self._slots.open()
                        self.vitals.taking = True
                        serving.set()
                        await self._stop.wait()
                        await self._drain()
                        await self._leave()
                        self._group.cancel_scope.cancel()
                finally:
                    self._completer.stop()
                    await self._slots.end(SHUTDOWN_STEP_TIMEOUT)
                    with anyio.move_on_after(SHUTDOWN_STEP_TIMEOUT):
                        await self._fetcher.stop()  # again: not done yet if a loop has failed
                    await close_processes()
        finally:
            finished.set()

    async def _drain(self) -> None:
        """Stop pulling, hand back what has not started, and let the rest finish for a while.

        Then cancel and hand back the rest as well.
        """
        self._draining, self.vitals.taking = True, False
        with anyio.move_on_after(SHUTDOWN_STEP_TIMEOUT):
            await self._fetcher.stop()
            await self._slots.hand_back_suspects()
        if self._slots.running:
            self._group.start_soon(self._show_stopping)
        timeout = self._backend.settings.shutdown_timeout
        with anyio.move_on_after(timeout):
            await self._wait_until_quiet()
        if self._slots.running:
            logger.warning(
                "worker %s: %d jobs did not finish in %g s: handed back",
                self.worker,
                len(self._slots.running),
                timeout,
            )
            self._slots.cancel_running()
        with anyio.move_on_after(SHUTDOWN_STEP_TIMEOUT):
            await self._wait_until_quiet()
        logger.info("worker %s has stopped", self.worker)

    async def _wait_until_quiet(self) -> None:
        while self._fetcher.busy or self._completer.pending or self._slots.telling:
            self._progress = anyio.Event()
            await self._progress.wait()

    def _on_settled(self) -> None:
        self._fetcher.refill()
        self._note_progress()

    def _note_progress(self) -> None:
        if self._draining:
            self._progress.set()

    # -- the list of workers, and signals

    async def _enter_registry(self) -> None:
        await self._entry.enter()
        await self._declarations.store(self._entry.since)
        await self._assets.restore_lost()  # to record the incarnation of the streams
        await self._entry.listen_for_pause(self._fetcher.pause)
        await self._entry.listen(RESUME, lambda _: self._fetcher.resume())
        await self._entry.listen(CANCEL, self._slots.cancel)
        await self._entry.listen(LISTEN, lambda _: self._events.expect_listener())
        self._events.begin()
        await self._entry.listen_for_stop(self._on_stop_signal)
        # Again: a signal may have come between the first read and now.
        await self._fetcher.refresh_pause()
        self._group.start_soon(self._heartbeat.run)

    async def _leave(self) -> None:
        async with open_task_group() as group:
            group.start_soon(self._leave_registry)
            if self.recorder is not None:
                group.start_soon(self._close_recorder, self.recorder)

    @staticmethod
    async def _close_recorder(recorder: Recorder) -> None:
        with anyio.move_on_after(SHUTDOWN_STEP_TIMEOUT):
            await recorder.close()

    def _busy_seconds(self) -> float:
        now = self._backend.now()
        return sum(now - running.attempt.started_at for running in self._slots.running)

    def _incidents(self) -> dict[str, int]:
        return {
            "redelivered": self._slots.redelivered,
            "lost": self._slots.lost,
            "handed_back": self._lifecycle.handed_back,
            "lease_lost": self._completer.leases_lost,
            "reconnected": self._backend.reconnects,
        }

    async def _leave_registry(self) -> None:
        with anyio.move_on_after(SHUTDOWN_STEP_TIMEOUT) as scope:
            try:
                await self._entry.leave()
            except AsyncMQError as error:
                self._log_leaving(str(error))
        if scope.cancelled_caught:
            self._log_leaving("no answer")

    async def _show_stopping(self) -> None:
        with suppress(AsyncMQError):  # the next heartbeat does so as well
            await self._entry.beat()

    def _log_leaving(self, reason: str) -> None:
        logger.warning(
            "worker %s: could not deregister (%s); its entry expires after three heartbeats",
            self.worker,
            reason,
        )

    async def _restore_lost(self) -> None:
        """Declare the assets again that a server lost with its store."""
        self._lost_store |= await self._assets.restore_lost()
        if self._lost_store:
            await self._declarations.store(self._entry.since)
        self._lost_store = False

    async def _look_for_cancelled(self) -> None:
        """Cancel the jobs whose cancellation was missed."""
        for job_id in await self._lifecycle.cancelled_among(list(self._starts())):
            self._slots.cancel(job_id)

    async def _mark_long_runs(self) -> None:
        while True:
            await self._backend.clock.sleep(MARK_INTERVAL, upkeep=True)
            self._slots.mark_long_runs()

    def _starts(self) -> dict[str, float]:
        """Return the jobs that run, and when each started."""
        return {each.context.id: each.attempt.started_at for each in self._slots.running}
