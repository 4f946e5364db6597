"""The relay: takes rows out of the outbox and adds their jobs to the queues, each exactly once.

One step is take → publish → finish. If a relay dies in between, the rows are taken again when their
lease is over, and the queue refuses the ids that it has. So no step has to be undone, and relays
need not know of each other.
"""

import json
import os
import socket
from collections.abc import Mapping, Sequence
from typing import Any, Final
from uuid import uuid4

import anyio
import psycopg
from anyio.abc import TaskStatus
from sqlalchemy import URL
from sqlalchemy.exc import SQLAlchemyError

from asyncmq_nats._concurrency import open_task_group
from asyncmq_nats.backends import default_backend
from asyncmq_nats.backends.base import Backend
from asyncmq_nats.contrib.outbox.store import Counts, Key, OutboxStore, Row
from asyncmq_nats.exceptions import AsyncMQError, InvalidArgument, JobNotFound
from asyncmq_nats.queues import Queue
from asyncmq_nats.tasks import TaskRegistry
from asyncmq_nats.telemetry.logs import get_logger

__all__ = ["Relay"]

logger = get_logger(__name__)

BATCH_LIMIT: Final = 1000
"""The most rows in one step: the most messages in a batch of the server."""
RETRY_DELAY: Final = 1.0
"""Seconds before a row or a database that could not be reached is tried again."""
CONCURRENT_KEYS: Final = 32
"""How many order keys are published at the same time."""
TIDY_INTERVAL: Final = 60.0
"""Seconds between searches for order keys whose last job has ended, and their least age."""
RELEASE_TIMEOUT: Final = 2.0
"""How long a relay that stops tries to give back what it has, in seconds."""
ENDED_STATES: Final = (None, "completed", "failed", "expired", "cancelled")


class Relay:
    """Publishes the rows of one outbox. Any number of them may run.

    Args:
        database: the address, as SQLAlchemy writes it: PostgreSQL or SQLite, with whatever driver;
            a relay uses psycopg and aiosqlite.
        backend: of the queues; by default that of the settings.
        batch_size: how many rows are taken at a time, at most 1,000.
        poll_interval: how often it looks for rows, in seconds. On PostgreSQL it is told of new
            ones, and looks for those that another relay has left.
        lease: after this many seconds, the rows of a relay that was lost are taken by another one.

    Raises:
        InvalidArgument: the database is neither, or a number is out of range.
    """

    def __init__(
        self,
        database: str | URL,
        backend: Backend | None = None,
        *,
        batch_size: int = 500,
        poll_interval: float = 1.0,
        lease: float = 10.0,
    ) -> None:
        if not 1 <= batch_size <= BATCH_LIMIT:
            raise InvalidArgument(f"batch_size must be from 1 to {BATCH_LIMIT}", batch_size)
        for name, value in (("poll_interval", poll_interval), ("lease", lease)):
            if not value > 0:
                raise InvalidArgument(f"{name} must be above 0 s", value)
        self.id = f"{socket.gethostname()[:40]}-{os.getpid()}-{uuid4().hex[:8]}"
        self._store = OutboxStore(database, self.id)
        self._backend = default_backend() if backend is None else backend
        self._batch_size = batch_size
        self._poll_interval = poll_interval
        self._lease = lease
        self._registry = TaskRegistry()  # the arguments in a row are written already
        self._queues: dict[str, Queue] = {}
        self._has_news = anyio.Event()
        self._next_tidying = 0.0

    async def run(self, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        """Publish rows until cancelled. `started()` is called after the first step.

        While the database or the queues cannot be reached, it tries again.
        """
        try:
            async with open_task_group() as group:
                if self._store.can_listen:
                    group.start_soon(self._listen)
                started = False
                while True:
                    has_more = await self._step()
                    if not started:
                        task_status.started()
                        started = True
                    if not has_more:
                        await self._wait_for_rows()
        finally:
            await self._leave()

    async def run_once(self) -> int:
        """Publish the rows that are there to take, up to `batch_size`, and return their number.

        Raises:
            AsyncMQError: a queue could not be reached; its rows can be taken again after a second.
            SQLAlchemyError: the database could not be.
        """
        rows = await self._store.take(self._batch_size, self._lease)
        by_queue: dict[str, list[Row]] = {}
        for row in rows:
            by_queue.setdefault(row.queue, []).append(row)
        failure: AsyncMQError | None = None
        count = 0
        for name, group in by_queue.items():
            try:
                count += await self._publish(name, group)
            except AsyncMQError as error:
                failure = error
                await self._store.release(group, RETRY_DELAY)
        if failure is not None:
            raise failure
        return count

    async def count(self) -> Counts:
        """Return the number of rows that wait, of those that no queue takes, and the oldest age."""
        return await self._store.count()

    async def close(self) -> None:
        """Close the connections to the database; `run` does so itself."""
        await self._store.close()

    # -- the loop

    async def _step(self) -> bool:
        """Take one step. Return whether there may be more rows."""
        self._has_news = anyio.Event()  # before the look, so that nothing told meanwhile is missed
        try:
            if await self.run_once():
                return True
            await self._tidy()
        except (AsyncMQError, SQLAlchemyError, OSError) as error:
            logger.warning("outbox relay %s: trying again, since %s", self.id, _describe(error))
            await anyio.sleep(RETRY_DELAY)
        return False

    async def _wait_for_rows(self) -> None:
        with anyio.move_on_after(self._poll_interval):
            await self._has_news.wait()

    async def _listen(self) -> None:
        while True:
            try:
                await self._store.listen(lambda: self._has_news.set())
            except (psycopg.Error, OSError) as error:
                text = "outbox relay %s: looks every %g s, since it cannot listen: %s"
                logger.warning(text, self.id, self._poll_interval, _describe(error))
            await anyio.sleep(RETRY_DELAY)

    async def _leave(self) -> None:
        with anyio.move_on_after(RELEASE_TIMEOUT, shield=True):
            try:
                await self._store.release()
            except (SQLAlchemyError, OSError) as error:
                text = "outbox relay %s: its rows are free when their lease is over: %s"
                logger.warning(text, self.id, _describe(error))
            await self._store.close()

    async def _tidy(self) -> None:
        """Forget the order keys whose last job has ended, now and then."""
        if anyio.current_time() < self._next_tidying:
            return
        self._next_tidying = anyio.current_time() + TIDY_INTERVAL
        await self.tidy(TIDY_INTERVAL)

    async def tidy(self, age: float = TIDY_INTERVAL) -> int:
        """Forget order keys whose last job was published `age` seconds ago and has ended.

        Return how many.
        """
        ended = [
            tail
            for tail in await self._store.idle_tails(age)
            if await self._queue(tail.queue).get_job_state(tail.job_id) in ENDED_STATES
        ]
        if ended:
            await self._store.remove_tails(ended)
        return len(ended)

    # -- publishing

    def _queue(self, name: str) -> Queue:
        if name not in self._queues:
            self._queues[name] = Queue(name, self._backend, registry=self._registry)
        return self._queues[name]

    async def _publish(self, name: str, rows: Sequence[Row]) -> int:
        """Add the jobs of rows of one queue, and return how many were added."""
        jobs = await self._read(rows)
        plain = [row for row in jobs if row.order_key is None]
        by_key: dict[Key, list[Row]] = {}
        for row in jobs:
            if row.order_key is not None:
                by_key.setdefault((name, row.order_key), []).append(row)
        done = await self._add_plain({row: jobs[row] for row in plain}) if plain else []
        if by_key:
            done += await self._add_keyed(by_key, jobs)
        if done:
            await self._store.finish(done)
        return len(done)

    async def _read(self, rows: Sequence[Row]) -> dict[Row, dict[str, Any]]:
        """Return the jobs of the rows; a row that has none is refused."""
        jobs: dict[Row, dict[str, Any]] = {}
        for row in rows:
            try:
                self._queue(row.queue)
                job = json.loads(row.body)
                if not isinstance(job, dict):
                    raise ValueError("the body is no JSON object")
                jobs[row] = job | {"id": row.job_id}
            except (ValueError, TypeError) as error:
                await self._refuse(row, error)
        return jobs

    async def _add_plain(self, jobs: Mapping[Row, Mapping[str, Any]]) -> list[Row]:
        rows = list(jobs)
        try:
            await self._queue(rows[0].queue).enqueue_bulk(jobs.values())
        except (ValueError, TypeError):  # one of them is not valid: add them one by one
            return [row for row in rows if await self._add(row, jobs[row])]
        return rows

    async def _add_keyed(
        self, by_key: Mapping[Key, Sequence[Row]], jobs: Mapping[Row, Mapping[str, Any]]
    ) -> list[Row]:
        """Add the jobs of order keys, each of them waiting for the one before."""
        tails = await self._store.read_tails(by_key)
        done: list[Row] = []
        failures: list[AsyncMQError] = []
        limit = anyio.CapacityLimiter(CONCURRENT_KEYS)

        async def add_in_order(key: Key, rows: Sequence[Row]) -> None:
            async with limit:
                before = tails.get(key)
                try:
                    for row in rows:
                        if await self._add(row, jobs[row], after=before):
                            done.append(row)
                            before = row.job_id
                except AsyncMQError as error:
                    failures.append(error)

        async with open_task_group() as group:
            for key, rows in by_key.items():
                group.start_soon(add_in_order, key, rows)
        if failures:
            await self._store.finish(done)
            raise failures[0]
        return done

    async def _add(self, row: Row, job: Mapping[str, Any], after: str | None = None) -> bool:
        """Add one job and return whether its queue took it.

        `after`: the id of the job that it waits for.
        """
        queue = self._queue(row.queue)
        waiting = dict(job)
        if after is not None and after != row.job_id:
            waiting |= {"depends_on": [after], "on_parent_failure": "run"}
        try:
            try:
                await queue.enqueue(waiting)
            except JobNotFound:  # it ended so long ago that its outcome is gone
                await queue.enqueue(job)
        except (ValueError, TypeError) as error:
            await self._refuse(row, error)
            return False
        return True

    async def _refuse(self, row: Row, error: Exception) -> None:
        reason = _describe(error)
        text = "outbox row %s: queue %r does not take job %r, so the row stays: %s"
        logger.error(text, row.number, row.queue, row.job_id, reason)
        await self._store.refuse(row, reason)


def _describe(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
