"""The methods of `Queue` that look: counts, single jobs, lists, waiting for a result."""

import logging
import math
from collections.abc import AsyncGenerator, Sequence
from typing import Any, Final

import anyio

from asyncmq_nats.backends.base import Signal
from asyncmq_nats.events import Event, read_event
from asyncmq_nats.exceptions import JobFailed, JobNotFound
from asyncmq_nats.jobs import Job
from asyncmq_nats.parameters import checked_number, checked_seconds
from asyncmq_nats.patience import LAG
from asyncmq_nats.queue_base import QueueBase
from asyncmq_nats.states import COUNT_BUCKETS, JOB_STATES, OUTCOMES, Bucket, State
from asyncmq_nats.subjects import encode_token

__all__ = ["QueueReads"]

logger = logging.getLogger(__name__)

EVENT_BUFFER: Final = 10_000
READ_AGAIN: Final = 5.0
COUNTED_AS_TO_DO: Final = (State.WAITING, State.DELAYED, State.WAITING_CHILDREN)


class QueueReads(QueueBase):
    """Counts, single jobs, lists, waiting for a result."""

    async def queue_stats(self) -> dict[str, int]:
        """Return how many jobs are in each state (AsyncMQ's three keys, and the others). Costs the same for any number of jobs."""
        return {str(state): count for state, count in (await self._inspection.count_by_state()).items()}

    async def get_job_counts(self, *types: str) -> dict[str, int]:
        """Return the number of jobs for each of the given states, by default AsyncMQ's eight; asking for `waiting` adds `paused`."""
        counts = await self.queue_stats()
        wanted = [str(name) for name in types] or [str(name) for name in COUNT_BUCKETS]
        if types and State.WAITING in wanted and Bucket.PAUSED not in wanted:
            wanted.append(Bucket.PAUSED)
        return {str(name): counts.get(name, 0) for name in wanted}

    async def get_job_count_by_types(self, *types: str) -> int:
        """Return the number of jobs in the given states together."""
        return sum((await self.get_job_counts(*types)).values())

    async def count(self) -> int:
        """Return the number of jobs that are still to be started: waiting, delayed, or waiting for others."""
        counts = await self._inspection.count_by_state()
        return sum(counts[state] for state in COUNTED_AS_TO_DO)

    async def get_job(self, job_id: str) -> dict[str, Any] | None:
        """Return the job as a dict with AsyncMQ's keys, and ours beside them, or `None`."""
        job = await self._inspection.find(job_id)
        return None if job is None else job.to_dict()

    async def get_job_state(self, job_id: str) -> str | None:
        """Return the state of the job, or `None` if there is no such job."""
        job = await self._inspection.find(job_id)
        return None if job is None else str(job.status)

    async def get_job_result(self, job_id: str) -> Any:
        """Return the result of a completed job, or `None`; does not wait. See `wait_for`."""
        job = await self._inspection.find(job_id)
        return None if job is None else job.result

    async def list_jobs(self, state: str, *, limit: int | None = None) -> list[dict[str, Any]]:
        """Return the jobs in a state, oldest first: all of them, or the first `limit`. An unknown state has none (as AsyncMQ)."""
        last = -1 if limit is None else checked_number(limit, "limit") - 1
        return await self.get_jobs([state], end=last, asc=True) if limit != 0 else []

    async def get_jobs(
        self, types: Sequence[str] | str | None = None, *, start: int = 0, end: int = -1, asc: bool = False
    ) -> list[dict[str, Any]]:
        """Return the jobs from index `start` to `end` (included; -1: to the last) of the given states, newest first unless `asc`.

        States are joined one after the other. Only the pages that are needed are read.
        """
        names = [types] if isinstance(types, str) else JOB_STATES if types is None else types
        states = [State(name) for name in names if name in set(State)]
        return [job.to_dict() for job in await self._inspection.slice(states, start, end, ascending=asc)]

    async def get_waiting(self, *, start: int = 0, end: int = -1, asc: bool = False) -> list[dict[str, Any]]:
        """Return the jobs that wait to be run; see `get_jobs`."""
        return await self.get_jobs([State.WAITING], start=start, end=end, asc=asc)

    async def get_active(self, *, start: int = 0, end: int = -1, asc: bool = False) -> list[dict[str, Any]]:
        """Return the jobs that workers have; see `get_jobs`."""
        return await self.get_jobs([State.ACTIVE], start=start, end=end, asc=asc)

    async def get_completed(self, *, start: int = 0, end: int = -1, asc: bool = False) -> list[dict[str, Any]]:
        """Return the completed jobs; see `get_jobs`."""
        return await self.get_jobs([State.COMPLETED], start=start, end=end, asc=asc)

    async def get_failed(self, *, start: int = 0, end: int = -1, asc: bool = False) -> list[dict[str, Any]]:
        """Return the failed jobs; see `get_jobs`."""
        return await self.get_jobs([State.FAILED], start=start, end=end, asc=asc)

    async def get_delayed(self, *, start: int = 0, end: int = -1, asc: bool = False) -> list[dict[str, Any]]:
        """Return the delayed jobs; see `get_jobs`."""
        return await self.get_jobs([State.DELAYED], start=start, end=end, asc=asc)

    async def get_waiting_children(self, *, start: int = 0, end: int = -1, asc: bool = False) -> list[dict[str, Any]]:
        """Return the jobs that wait for others; see `get_jobs`."""
        return await self.get_jobs([State.WAITING_CHILDREN], start=start, end=end, asc=asc)

    async def get_paused(self, *, start: int = 0, end: int = -1, asc: bool = False) -> list[dict[str, Any]]:
        """Return nothing: jobs of a paused queue are `waiting` (the name is AsyncMQ's)."""
        return await self.get_jobs([Bucket.PAUSED], start=start, end=end, asc=asc)

    async def get_prioritized(self, *, start: int = 0, end: int = -1, asc: bool = False) -> list[dict[str, Any]]:
        """Return nothing: jobs of every priority are `waiting` (the name is AsyncMQ's)."""
        return await self.get_jobs([Bucket.PRIORITIZED], start=start, end=end, asc=asc)

    async def events(self, *names: str) -> AsyncGenerator[Event, None]:
        """Yield what happens to the jobs of this queue from now on, in whatever process; with names, only such events (see `Event`).

        At most once: while the connection is down, or this reader is 10,000 events behind, events are lost.
        """
        send, receive = anyio.create_memory_object_stream[Event](EVENT_BUFFER)

        def hear(signal: Signal) -> None:
            event = read_event(self.name, signal.subject, signal.body)
            if event is not None and (not names or event.name in names):
                try:
                    send.send_nowait(event)
                except anyio.WouldBlock:
                    logger.warning("queue %s: a reader of events is too slow, %s of job %s is lost", self.name, event.name, event.job_id)

        with send, receive:
            subscription = await self.backend.subscribe(self._subjects.event("*", "*"), hear)
            try:
                async for event in receive:
                    yield event
            finally:
                with anyio.CancelScope(shield=True):
                    await subscription.unsubscribe()

    async def wait_for(self, job_id: str, timeout: float | None = None) -> Any:
        """Wait until the job ends and return its result.

        Raises:
            JobFailed: it ended as failed, expired or cancelled.
            JobNotFound: there is no such job.
            TimeoutError: it has not ended within `timeout` seconds; with 0 or less: it has not ended.
        """
        if timeout not in (None, math.inf) and checked_seconds(timeout, "timeout") <= 0:
            job = await self._look_at_end(job_id)
            if job.status in OUTCOMES:
                return _result_of(job)
        else:
            with anyio.move_on_after(timeout):
                return await self._wait_for(job_id)
        raise TimeoutError(f"job {job_id!r} has not ended within {timeout:g} s")

    async def _wait_for(self, job_id: str) -> Any:
        ended = anyio.Event()

        def hear(signal: Signal) -> None:
            if signal.subject.split(".")[-2] in OUTCOMES:
                ended.set()

        # Listen, then look, then wait: an outcome is either seen or heard. Events may be lost, so look again now and then.
        subscription = await self.backend.subscribe(self._subjects.event("*", encode_token(job_id)), hear)
        try:
            while True:
                heard = ended.is_set()
                job = await self._look_at_end(job_id, LAG if heard else ())
                if job.status in OUTCOMES:
                    return _result_of(job)
                if heard:  # it has been retried by hand since
                    ended = anyio.Event()
                with anyio.move_on_after(READ_AGAIN):
                    await ended.wait()
        finally:
            with anyio.CancelScope(shield=True):
                await subscription.unsubscribe()

    async def _look_at_end(self, job_id: str, pauses: Sequence[float] = ()) -> Job:
        """Return the job as it is; or, if it has not ended, as it is after each of the pauses, until it has."""
        for pause in (*pauses, None):
            job = await self._inspection.find(job_id)
            if job is None:
                raise JobNotFound(self.name, job_id)
            if pause is None or job.status in OUTCOMES:
                return job
            await anyio.sleep(pause)
        raise AssertionError("the last pause is None")


def _result_of(job: Job) -> Any:
    """Return what a job that has ended came to."""
    if job.status is not State.COMPLETED:
        raise JobFailed(job.job_id, job.status, job.last_error)
    return job.result
