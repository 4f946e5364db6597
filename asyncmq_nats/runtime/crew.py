"""The runners of one worker, one per queue.

They start and stop together, and may end by themselves.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from typing import Final

import anyio
from anyio.abc import TaskStatus

from asyncmq_nats._concurrency import open_task_group
from asyncmq_nats._logging import get_logger
from asyncmq_nats.exceptions import AsyncMQError
from asyncmq_nats.runtime.control import measure_memory
from asyncmq_nats.runtime.runner import Runner
from asyncmq_nats.runtime.slot_group import SlotGroup

__all__ = ["Crew", "Ending", "Limits"]

logger = get_logger(__name__)

EMPTY_CHECK_INTERVAL: Final = 0.1
EMPTY_CHECKS: Final = 2
"""Checks in a row that must find no work: the server's counts lag by some milliseconds."""
MEMORY_CHECK_INTERVAL: Final = 1.0


class Ending(StrEnum):
    """Why a worker has ended."""

    ASKED = "asked to stop"
    REMOTE = "asked to stop by another program"
    EMPTY = "its queues are empty"
    MAX_JOBS = "it has run its number of jobs"
    MAX_MEMORY = "it uses too much memory"

    @property
    def is_final(self) -> bool:
        """Whether a supervisor starts no other process in its place."""
        return self in (Ending.REMOTE, Ending.EMPTY)

    @property
    def is_recycling(self) -> bool:
        """Whether a supervisor starts another process at once."""
        return self in (Ending.MAX_JOBS, Ending.MAX_MEMORY)


@dataclass(frozen=True, slots=True)
class Limits:
    """When a worker ends by itself. `max_memory`: bytes."""

    burst: bool = False
    max_jobs: int | None = None
    max_memory: int | None = None


class Crew:
    """Runs the runners until `stop`, a limit, or cancellation.

    Args:
        runners: one per queue.
        limits: when to end.
        group: of the runners, if they have one.
    """

    def __init__(
        self, runners: Sequence[Runner], limits: Limits, group: SlotGroup | None = None
    ) -> None:
        self._runners = runners
        self._limits = limits
        self._is_stopping = False
        self.ending = Ending.ASKED
        if group is not None:
            group.on_last = partial(self.stop, Ending.MAX_JOBS)

    def stop(self, ending: Ending = Ending.ASKED) -> None:
        """Begin to stop all. The first reason counts."""
        if not self._is_stopping:
            self._is_stopping, self.ending = True, ending
            if ending is not Ending.ASKED:
                logger.info("worker %s stops: %s", self._runners[0].worker, ending)
        for runner in self._runners:
            runner.stop()

    async def run(self, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        """Run jobs of all queues. `started()` is called when the first ones are asked for."""
        async with open_task_group() as group:
            if self._limits.burst:
                group.start_soon(self._end_when_empty)
            if self._limits.max_memory is not None:
                group.start_soon(self._end_when_large, self._limits.max_memory)
            await self._run_all(task_status)
            group.cancel_scope.cancel()

    async def _run_all(self, task_status: TaskStatus[None]) -> None:
        if len(self._runners) == 1:
            await self._runners[0].run(task_status=task_status)
            return
        waiting = len(self._runners)

        class Status:
            """Tells the caller when the last runner has started."""

            def started(self, value: None = None) -> None:
                nonlocal waiting
                waiting -= 1
                if waiting == 0:
                    task_status.started()

        async with open_task_group() as group:
            for runner in self._runners:
                group.start_soon(partial(runner.run, task_status=Status()))

    async def _end_when_empty(self) -> None:
        empty, started = 0, -1
        while True:
            await anyio.sleep(EMPTY_CHECK_INTERVAL)
            now_started = sum(runner.started for runner in self._runners)
            try:
                is_busy = [await runner.has_work() for runner in self._runners]
            except AsyncMQError as error:
                logger.warning("could not check whether jobs wait: %s", error)
                is_busy = [True]
            quiet = not any(is_busy) and started == now_started
            empty, started = empty + 1 if quiet else 0, now_started
            if empty >= EMPTY_CHECKS:
                self.stop(Ending.EMPTY)
                return

    async def _end_when_large(self, limit: int) -> None:
        while (memory := measure_memory()) is not None:
            if memory > limit:
                logger.warning(
                    "worker %s uses %d MB, its limit is %d MB",
                    self._runners[0].worker,
                    memory // 1_000_000,
                    limit // 1_000_000,
                )
                self.stop(Ending.MAX_MEMORY)
                return
            await anyio.sleep(MEMORY_CHECK_INTERVAL)
