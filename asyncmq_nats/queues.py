"""`Queue`: the public API, with the names, defaults and return types of AsyncMQ's `Queue`.

A class with sixty methods, since AsyncMQ's is one. It is put together from its concerns, which share `QueueBase`; each method is a few
lines over one call below.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import anyio
from anyio.abc import TaskStatus

from asyncmq_nats.assets import DEFAULT_PRIORITY
from asyncmq_nats.bulk import add_many, checked_entry
from asyncmq_nats.jobs import Backoff, Job, new_job, new_job_id, validate_custom_job_id
from asyncmq_nats.queue_controls import QueueControls
from asyncmq_nats.queue_delays import QueueDelays
from asyncmq_nats.queue_reads import QueueReads
from asyncmq_nats.rate_limiter import Limit
from asyncmq_nats.runner import Runner
from asyncmq_nats.serving import import_tasks, run_program, run_until_signalled
from asyncmq_nats.states import State

__all__ = ["Queue"]


class Queue(QueueReads, QueueDelays, QueueControls):
    """A named queue of jobs: add jobs, look at them, run them. Making one does no I/O.

    Args:
        name: 1 to 64 letters, digits, `_` or `-`.
        backend: where the jobs are; by default a `NATSBackend` of the settings, shared by this process.
        concurrency: how many jobs `run()` runs at a time.
        scan_interval: kept from AsyncMQ. Nothing is polled, and it changes nothing here.
        rate_limit: how many jobs the whole queue may start per `rate_interval`, over all its workers; 0 starts none, `None` is no limit.
        rate_interval: in seconds.
        registry: the tasks that `run()` knows; by default those of `@task`.

    Raises:
        InvalidQueueName: the name cannot be part of a stream's name.
    """

    # -- add

    async def add(
        self,
        task_id: str,
        args: Sequence[Any] | None = None,
        kwargs: Mapping[str, Any] | None = None,
        retries: int = 0,
        ttl: float | None = None,
        backoff: float | Backoff | None = None,
        priority: int = DEFAULT_PRIORITY,
        delay: float | None = None,
        job_id: str | None = None,
        *,
        timeout: float | None = None,
    ) -> str:
        """Add one job and return its id (AsyncMQ `Queue.add`).

        Args:
            task_id: what to run: `module.function` of a `@task`, or its name.
            args: for the task; anything JSON can hold, dates, UUIDs, enums, dataclasses and pydantic models too.
            kwargs: for the task, likewise.
            retries: attempts that may follow a failed one.
            ttl: seconds after which a job that has not started expires.
            backoff: a number *b* waits `b ** n` seconds before the n-th retry; or a `Backoff`; `None`: at once.
            priority: any integer; lower runs first.
            delay: seconds until the job may run; 0 or less is now.
            job_id: an id of your own. If a job with that id exists, in any state, its id is returned and nothing is added, so an `add` that
                raised `Unconfirmed` can be repeated safely.
            timeout: how long one attempt may run, in seconds; then the task is cancelled and the attempt has failed.

        Raises:
            NotSerializable: an argument is not JSON; the message names it.
            PayloadTooLarge: the job does not fit into a message.
            InvalidJob: a value is of the wrong kind.
            TypeError, InvalidJobId: the job_id is outside AsyncMQ's rules.
            Unconfirmed: no confirmation within `publish_timeout`; the job may or may not have been added.
        """
        await self._assets.declare()
        job = self._new_job(
            task_id=task_id,
            args=args,
            kwargs=kwargs,
            retries=retries,
            ttl=ttl,
            backoff=backoff,
            priority=priority,
            delay=delay,
            job_id=job_id,
            timeout=timeout,
        )
        return await self._lifecycle.add(job)

    async def add_bulk(self, jobs: Iterable[Mapping[str, Any]]) -> list[str]:
        """Add many jobs and return their ids in order (AsyncMQ `Queue.add_bulk`).

        Each is a mapping with `task_id` and any of the other parameters of `add`. Up to 1,000 jobs are added all or none; more go in
        batches of 1,000, each all or none.

        Raises:
            ValueError, TypeError: an entry is malformed; nothing was added.
            BulkAddFailed: of more than 1,000, some were added and some were not; it says which.
        """
        await self._assets.declare()
        return await add_many(self._lifecycle, [self._new_job(**checked_entry(entry, index)) for index, entry in enumerate(jobs)])

    async def enqueue(self, payload: Mapping[str, Any]) -> str:
        """Add a job given as a dict, of `Job.to_dict` or with `task_id` and what `Job` takes, and return its id (AsyncMQ `Queue.enqueue`).

        With an `id` it is idempotent, like `add` with a `job_id`.

        Raises:
            InvalidJob: the dict has no task, or a value of the wrong kind.
        """
        await self._assets.declare()
        fields = {"max_retries": payload.get("retries", 0), "backoff": None, "created_at": self.backend.now()} | dict(payload)
        fields |= {"retries": 0, "status": State.WAITING, "custom_id": payload.get("id", payload.get("job_id")) is not None}
        return await self._lifecycle.add(Job.from_dict(fields))

    async def send(self, payload: Mapping[str, Any]) -> str:
        """Same as `enqueue`."""
        return await self.enqueue(payload)

    async def enqueue_delayed(self, payload: Mapping[str, Any], run_at: float) -> str:
        """Add a job given as a dict that runs at `run_at`, in Unix seconds (AsyncMQ `Queue.enqueue_delayed`)."""
        return await self.enqueue(dict(payload) | {"delay_until": run_at})

    async def delay(self, payload: Mapping[str, Any], run_at: float | None = None) -> str:
        """`enqueue`, or with a `run_at` `enqueue_delayed`."""
        return await self.enqueue(payload) if run_at is None else await self.enqueue_delayed(payload, run_at)

    def _new_job(
        self,
        *,
        task_id: str,
        args: Sequence[Any] | None = None,
        kwargs: Mapping[str, Any] | None = None,
        retries: int = 0,
        ttl: float | None = None,
        backoff: float | Backoff | None = None,
        priority: int = DEFAULT_PRIORITY,
        delay: float | None = None,
        job_id: str | None = None,
        timeout: float | None = None,
    ) -> Job:
        now = self.backend.now()
        return new_job(
            task_id=task_id,
            args=list(args or ()),
            kwargs=dict(kwargs or {}),
            max_retries=retries,
            backoff=backoff,
            ttl=ttl,
            timeout=timeout,
            job_id=new_job_id() if job_id is None else validate_custom_job_id(job_id),
            created_at=now,
            priority=priority,
            delay_until=now + delay if delay is not None and delay > 0 else None,
            custom_id=job_id is not None,
        )

    async def _store_repeatables(self) -> None:
        for definition in self._local_repeatables:
            await self._repeatables.upsert(definition)

    # -- run

    def runner(self) -> Runner:
        """Return a worker for this queue that is not yet running."""
        import_tasks(self.backend.settings.tasks)
        return Runner(
            self.backend,
            self._subjects,
            self._assets,
            registry=self._registry,
            concurrency=self.concurrency,
            limit=None if self.rate_limit is None else Limit(self.rate_limit, self.rate_interval),
            hooks=replace(self._hooks, on_startup=[self._store_repeatables, *self._hooks.on_startup]),
        )

    async def run(self, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        """Run this queue's jobs until cancelled (AsyncMQ `Queue.run`).

        When cancelled, jobs that run may finish for `shutdown_timeout` seconds; the others are handed back to other workers.
        `started()` is called when the first jobs are asked for.
        """
        await self.runner().run(task_status=task_status)

    def start(self) -> None:
        """Run this queue's jobs in this thread until SIGINT or SIGTERM (AsyncMQ `Queue.start`)."""
        run_program(self._run_as_program)

    async def _run_as_program(self) -> None:
        try:
            await run_until_signalled(self.runner())
        finally:
            await self.backend.close()
