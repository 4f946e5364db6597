"""The health and the counts of a worker, and the ports and the file that show them."""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import anyio
from anyio.abc import TaskStatus

from asyncmq_nats._concurrency import open_task_group
from asyncmq_nats._logging import get_logger
from asyncmq_nats.exceptions import InvalidArgument
from asyncmq_nats.runtime.control import list_workers
from asyncmq_nats.runtime.executor import Running
from asyncmq_nats.runtime.fetcher import Fetcher
from asyncmq_nats.runtime.health import WorkerHealth, judge_health
from asyncmq_nats.runtime.probes import Probe, keep_health_file, open_ports
from asyncmq_nats.runtime.promoter import Promoter
from asyncmq_nats.runtime.pulse import Pulse
from asyncmq_nats.runtime.recorder import Recorder
from asyncmq_nats.runtime.slots import Slots
from asyncmq_nats.runtime.supervisor import is_child
from asyncmq_nats.states import State
from asyncmq_nats.store.pages import JobLists
from asyncmq_nats.store.queue_store import QueueStore
from asyncmq_nats.store.reads import Inspection

__all__ = ["Vitals", "WorkerParts"]

logger = get_logger(__name__)

PORT_INTERVAL: Final = 0.5
"""Seconds between two tries to open a port that another process of this program has."""


@dataclass(frozen=True, slots=True)
class WorkerParts:
    """The parts of a worker that are checked."""

    slots: Slots
    fetcher: Fetcher
    promoter: Promoter
    recorder: Recorder | None


class Vitals:
    """The health and the counts of one worker.

    Args:
        store: of the queue.
        worker: its id.
        concurrency: its slots.
        parts: what is looked at.
    """

    def __init__(
        self,
        store: QueueStore,
        worker: str,
        concurrency: int,
        parts: WorkerParts,
    ) -> None:
        self._backend = store.backend
        self._queue = store.keys.queue
        self._assets = store.assets
        self._inspection = Inspection(store)
        self._lists = JobLists(store, self._inspection)
        self._worker = worker
        self._concurrency = concurrency
        self._parts = parts
        self._pulse = Pulse(worker, store.backend.settings.loop_block_warning, self._describe)
        self.taking = False
        """Whether the worker takes jobs: it has started, and does not stop."""

    def health(self) -> WorkerHealth:
        """Return the health of the worker now."""
        return judge_health(
            self._worker,
            self._queue,
            connected=self._backend.is_connected,
            taking=self.taking,
            silent_for=self._parts.fetcher.silent_for,
            overdue=self._parts.promoter.overdue,
            blocked_for=self._pulse.age,
        )

    async def run(self, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        """Show it until cancelled. Started when the ports are open.

        Raises:
            InvalidArgument: a port cannot be listened on, or the extra `prometheus` is missing.
        """
        settings = self._backend.settings
        async with open_task_group() as group:
            group.start_soon(self._pulse.run)
            if settings.health_file is not None:
                group.start_soon(keep_health_file, Path(settings.health_file), self.health)
            if settings.health_port is not None or settings.metrics_port is not None:
                await group.start(self._show, self._probe())
            task_status.started()

    async def _show(self, probe: Probe, *, task_status: TaskStatus[None]) -> None:
        """Show it at the ports until cancelled. Started when they are open."""
        settings = self._backend.settings
        try:
            leave = await open_ports(settings, probe)
        except InvalidArgument as problem:
            if not is_child():
                raise
            # The process that this one replaces has the port until it has finished its jobs.
            logger.info("worker %s: its port is in use, trying again: %s", self._worker, problem)
            task_status.started()
            leave = await self._open_later(probe)
        else:
            task_status.started()
        try:
            await anyio.sleep_forever()
        finally:
            leave()

    async def _open_later(self, probe: Probe) -> Callable[[], None]:
        while True:
            await anyio.sleep(PORT_INTERVAL)
            with suppress(InvalidArgument):
                return await open_ports(self._backend.settings, probe)

    def _describe(self, task: "asyncio.Task[Any] | None") -> str | None:
        """Return which job runs in a task of the loop.

        It is called in the thread that watches the loop.
        """
        running: Running | None = next(
            (each for each in list(self._parts.slots.running) if each.slot is task), None
        )
        if running is None:
            return None
        return f"task {running.attempt.head.task_id} (job {running.context.id})"

    # -- for Prometheus

    def _probe(self) -> Probe:
        if self._backend.settings.metrics_port is None:
            return Probe(self.health)
        try:
            from asyncmq_nats.telemetry import prometheus
        except ImportError:
            raise InvalidArgument(
                "metrics_port needs the extra: pip install 'asyncmq-nats[prometheus]'",
                self._backend.settings.metrics_port,
            ) from None

        async def read() -> tuple[prometheus.QueueGauges, prometheus.WorkerCounts]:
            return await self._read_queue(prometheus), self._counts(prometheus)

        def render(values: Any) -> bytes:
            queues = {gauges.queue: gauges for gauges, _ in values}
            return prometheus.render(list(queues.values()), [counts for _, counts in values])

        return Probe(self.health, read, render)

    async def _read_queue(self, prometheus: Any) -> Any:
        workers = await list_workers(self._backend, self._queue)
        counts = await self._inspection.count_by_state()
        oldest = await self._lists.oldest_waiting()
        return prometheus.QueueGauges(
            self._queue,
            {str(state): counts[state] for state in State},
            0.0 if oldest is None else max(0.0, self._backend.now() - oldest[1]),
            await self._assets.is_paused(),
            len(workers),
            sum(worker.concurrency for worker in workers),
        )

    def _counts(self, prometheus: Any) -> Any:
        recorder = self._parts.recorder
        return prometheus.WorkerCounts(
            self._queue,
            self._concurrency,
            len(self._parts.slots.running),
            {} if recorder is None else recorder.totals(),
            {} if recorder is None else recorder.incidents(),
        )
