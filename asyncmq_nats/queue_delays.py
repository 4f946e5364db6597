"""The methods of `Queue` about later: delayed jobs, retries by hand, repeatables."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from asyncmq_nats.assets import DEFAULT_PRIORITY
from asyncmq_nats.inspection import DelayedInfo
from asyncmq_nats.jobs import Backoff
from asyncmq_nats.parameters import checked_number
from asyncmq_nats.patience import look_for
from asyncmq_nats.queue_base import QueueBase
from asyncmq_nats.repeatables import RepeatableInfo, make_definition, repeatable_id
from asyncmq_nats.states import State

__all__ = ["QueueDelays"]


class QueueDelays(QueueBase):
    """Delayed jobs, retries by hand, repeatables."""

    # -- delayed jobs

    async def list_delayed(self, *, limit: int | None = None) -> list[DelayedInfo]:
        """Return the delayed jobs, in the order in which they were delayed: all of them, or the first `limit`."""
        last = -1 if limit is None else checked_number(limit, "limit") - 1
        jobs = await self._inspection.slice([State.DELAYED], 0, last, ascending=True) if limit != 0 else []
        return [DelayedInfo(job.job_id, job.delay_until or job.created_at, job.to_dict()) for job in jobs]

    async def remove_delayed(self, job_id: str) -> bool:
        """Remove a delayed job. Return whether it was still delayed."""
        await self._assets.declare()
        return await look_for(partial(self._administration.remove_delayed, job_id))

    async def get_due_delayed(self) -> list[dict[str, Any]]:
        """Take out and return the jobs whose time has come and that no worker has made ready yet: they are the caller's now.

        While workers run there are none, for milliseconds at most. One that a worker is making ready at this moment may run as well.
        """
        return [job.to_dict() for job in await self._administration.take_due([job async for job in self._inspection.read_due()])]

    async def retry_job(self, job_id: str) -> bool:
        """Run a failed, expired, cancelled or delayed job again, or now, with all its retries and its time to live anew.

        Return whether it was in one of these states.
        """
        await self._assets.declare()
        return await look_for(partial(self._administration.rerun, job_id))

    # -- repeatables

    def add_repeatable(
        self,
        task_id: str,
        every: float | str | None = None,
        cron: str | None = None,
        args: Sequence[Any] | None = None,
        kwargs: Mapping[str, Any] | None = None,
        retries: int = 0,
        ttl: float | None = None,
        priority: int = DEFAULT_PRIORITY,
        backoff: float | Backoff | None = None,
        *,
        name: str | None = None,
        timezone: str | None = None,
        timeout: float | None = None,
    ) -> None:
        """Have this queue's workers repeat a job (AsyncMQ `Queue.add_repeatable`). Stored when `run()` starts; see `upsert_repeatable`.

        Raises:
            ValueError: the schedule is malformed; the message shows where.
        """
        job = {"retries": retries, "ttl": ttl, "priority": priority, "backoff": backoff, "timeout": timeout}
        self._local_repeatables.append(make_definition(task_id, args, kwargs, job, every=every, cron=cron, timezone=timezone, name=name))

    async def upsert_repeatable(
        self,
        task_id: str,
        every: float | str | None = None,
        cron: str | None = None,
        args: Sequence[Any] | None = None,
        kwargs: Mapping[str, Any] | None = None,
        retries: int = 0,
        ttl: float | None = None,
        priority: int = DEFAULT_PRIORITY,
        backoff: float | Backoff | None = None,
        *,
        name: str | None = None,
        timezone: str | None = None,
        timeout: float | None = None,
    ) -> float:
        """Store a repeated job, or change the one of that name, and return its next run in Unix seconds (AsyncMQ `upsert_repeatable`).

        Each tick adds exactly one job, however many workers run. After an outage the missed ticks are one, late, and the series goes on.

        Args:
            task_id: as for `add`, and so are args, kwargs, retries, ttl, priority, backoff and timeout.
            every: seconds, or a text such as `"5m"`; the first run is one interval from now, and the series does not drift.
            cron: five fields, or six with the seconds last, by the clock of `timezone`.
            args: see `add`.
            kwargs: see `add`.
            retries: see `add`.
            ttl: see `add`.
            priority: see `add`.
            backoff: see `add`.
            name: what it is known by. Without one the definition itself is: a changed definition is then another repeatable.
            timezone: an IANA name; UTC by default. What the clock skips in spring runs an hour later, what it shows twice runs once.
            timeout: see `add`.

        Raises:
            ValueError: the schedule is malformed; the message shows where.
        """
        job = {"retries": retries, "ttl": ttl, "priority": priority, "backoff": backoff, "timeout": timeout}
        definition = make_definition(task_id, args, kwargs, job, every=every, cron=cron, timezone=timezone, name=name)
        await self._assets.declare()
        return await self._repeatables.upsert(definition)

    async def list_repeatables(self) -> list[RepeatableInfo]:
        """Return the stored repeatables with their next runs (AsyncMQ `Queue.list_repeatables`)."""
        await self._assets.declare()
        return await self._repeatables.read_all()

    async def remove_repeatable(self, job_def: Mapping[str, Any] | str) -> bool:
        """Remove a repeatable, given as its `job_def` or by name. Return whether it was there. Jobs it has added stay."""
        rid = repeatable_id(job_def)
        await self._assets.declare()
        return await self._repeatables.remove(rid)

    async def pause_repeatable(self, job_def: Mapping[str, Any] | str) -> bool:
        """Have a repeatable add no more jobs. Return whether it was there."""
        rid = repeatable_id(job_def)
        await self._assets.declare()
        return await self._repeatables.pause(rid)

    async def resume_repeatable(self, job_def: Mapping[str, Any] | str) -> float:
        """Let a paused repeatable go on, and return its next run in Unix seconds.

        Raises:
            KeyError: there is no such repeatable (as AsyncMQ).
        """
        rid = repeatable_id(job_def)
        await self._assets.declare()
        return await self._repeatables.resume(rid)
