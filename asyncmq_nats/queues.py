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
from asyncmq_nats.bulk import add_many, build_entries, check_entries
from asyncmq_nats.deduplication import parse_window
from asyncmq_nats.exceptions import BulkAddFailed
from asyncmq_nats.jobs import Backoff, Job
from asyncmq_nats.parameters import build_job, checked_mapping, checked_seconds, job_of_payload
from asyncmq_nats.queue_admin import QueueAdmin, list_queues
from asyncmq_nats.queue_controls import QueueControls
from asyncmq_nats.queue_delays import QueueDelays
from asyncmq_nats.queue_reads import QueueReads
from asyncmq_nats.rate_limiter import Limit
from asyncmq_nats.runner import Runner
from asyncmq_nats.serving import import_tasks, run_program, run_until_signalled

__all__ = ["Queue", "list_queues"]


class Queue(QueueReads, QueueDelays, QueueControls, QueueAdmin):
    """A named queue of jobs: add jobs, look at them, run them. Making one does no I/O.

    Args:
        name: 1 to 64 letters, digits, `_` or `-`.
        backend: where the jobs are; by default a `NATSBackend` of the settings, shared by this process.
        concurrency: how many jobs `run()` runs at a time.
        scan_interval: kept from AsyncMQ. Nothing is polled, so it changes nothing. The fallback cadence, at which a worker looks for what
            a lost signal left unseen (a new priority, the end of a pause), is 30 s.
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
        deduplication: Mapping[str, Any] | None = None,
        debounce: Mapping[str, Any] | None = None,
        *,
        depends_on: Sequence[str] | None = None,
        on_parent_failure: str = "wait",
        timeout: float | None = None,
        repeat_every: float | str | None = None,
    ) -> str:
        """Add one job and return its id (AsyncMQ `Queue.add`).

        Args:
            task_id: what to run: `module.function` of a `@task`, or its name.
            args: for the task; anything JSON can hold, dates, UUIDs, enums, dataclasses and pydantic models too.
            kwargs: for the task, likewise.
            retries: attempts that may follow a failed one.
            ttl: seconds after which a job that has not started expires.
            backoff: a number *b* waits `b ** n` seconds before the n-th retry; or a `Backoff`; `None`: as the task's backoff function says,
                if `@task(backoff=…)` was given one, otherwise at once. A number that was given there is for `enqueue` of the task only.
            priority: any integer; lower runs first.
            delay: seconds until the job may run; 0 or less is now.
            job_id: an id of your own. If a job with that id exists, in any state, its id is returned and nothing is added, so an `add` that
                raised `Unconfirmed` can be repeated safely.
            deduplication: `{"id", "ttl", "extend", "replace"}`: while a job added under that id has not ended, or for `ttl` seconds,
                no other one is added: its id is returned. With `replace`, one that is still delayed gets the new task, arguments, delay.
                With `extend`, each call starts the `ttl` anew.
            debounce: AsyncMQ's older name for `deduplication`.
            depends_on: ids of jobs of this queue that must complete first; their results are in `current_job().parent_results()`.
            on_parent_failure: when one of them fails for good, `"wait"` (it may be retried by hand), `"fail"`, or `"run"` all the same.
            timeout: how long one attempt may run, in seconds; then the task is cancelled and the attempt has failed.
            repeat_every: add the job again so many seconds, or a text such as `"5m"`, after each success.

        Raises:
            JobNotFound: a job that it depends on is not in this queue.
            NotSerializable: an argument is not JSON; the message names it.
            PayloadTooLarge: the job does not fit into a message.
            InvalidArgument: a value is of the wrong kind; the message names it.
            TypeError, InvalidJobId: the job_id is outside AsyncMQ's rules.
            ValueError: `repeat_every` is no interval, or shorter than 0.05 s.
            Unconfirmed: no confirmation within `publish_timeout`; the job may or may not have been added.
        """
        await self.backend.connect()
        job = build_job(
            self.backend.now(),
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
            depends_on=depends_on,
            on_parent_failure=on_parent_failure,
            repeat_every=repeat_every,
        )
        given = deduplication if deduplication is not None else debounce
        window = None if given is None else parse_window(given)
        job.encode()  # nothing is declared for what cannot be sent
        await self._assets.declare()
        return await (self._additions.add(job) if window is None else self._deduplicator.add(job, window))

    async def add_bulk(self, jobs: Iterable[Mapping[str, Any]]) -> list[str]:
        """Add many jobs and return their ids in order (AsyncMQ `Queue.add_bulk`).

        Each is a mapping with `task_id` and any of the other parameters of `add`. Up to 1,000 writes (a job is one, and so is each
        dependency) are all or none; more go in such batches. Entries with a deduplication window are added one by one, after the others.

        Raises:
            ValueError, TypeError: an entry is malformed; nothing was added.
            BulkAddFailed: of more than 1,000, some were added and some were not; it says which.
        """
        await self.backend.connect()
        built, windows = build_entries(self.backend.now(), jobs)
        check_entries(self._additions, built)
        ids, plain = [job.job_id for job in built], [index for index in range(len(built)) if index not in windows]
        await self._assets.declare()
        try:
            await add_many(self._additions, [built[index] for index in plain])
        except BulkAddFailed as failed:
            errors = {plain[index]: error for index, error in failed.errors.items()} | dict.fromkeys(windows, failed)
            raise BulkAddFailed({plain[index]: job_id for index, job_id in failed.added.items()}, errors) from None
        for index, window in windows.items():
            ids[index] = await self._deduplicator.add(built[index], window)
        return ids

    async def enqueue(self, payload: Mapping[str, Any]) -> str:
        """Add a job given as a dict, of `Job.to_dict` or with `task_id` and what `Job` takes, and return its id (AsyncMQ `Queue.enqueue`).

        With an `id` it is idempotent, like `add` with a `job_id`.

        Raises:
            InvalidArgument: it is no dict, has no task, or a value of the wrong kind.
            InvalidJobId: no record can be kept under its id.
        """
        await self.backend.connect()
        job = job_of_payload(payload, self.backend.now())
        job.encode()
        await self._assets.declare()
        return await self._additions.add(job)

    async def send(self, payload: Mapping[str, Any]) -> str:
        """Same as `enqueue`."""
        return await self.enqueue(payload)

    async def enqueue_delayed(self, payload: Mapping[str, Any], run_at: float) -> str:
        """Add a job given as a dict that runs at `run_at`, in Unix seconds (AsyncMQ `Queue.enqueue_delayed`)."""
        return await self.enqueue(checked_mapping(payload, "a job") | {"delay_until": checked_seconds(run_at, "run_at")})

    async def delay(self, payload: Mapping[str, Any], run_at: float | None = None) -> str:
        """`enqueue`, or with a `run_at` `enqueue_delayed`."""
        return await self.enqueue(payload) if run_at is None else await self.enqueue_delayed(payload, run_at)

    async def add_linked(self, jobs: Sequence[Job]) -> None:
        """Add jobs that depend on each other, each after its `children`; see `FlowProducer.add_flow`."""
        await self._assets.declare()
        await self._additions.add_linked(jobs)

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
