"""`Queue`: the public API, with the names, defaults and return types of AsyncMQ's `Queue`."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import anyio
from anyio.abc import TaskStatus

from asyncmq_nats.assets import DEFAULT_PRIORITY, QueueAssets
from asyncmq_nats.backends import default_backend
from asyncmq_nats.backends.base import Backend
from asyncmq_nats.bulk import add_many, checked_entry
from asyncmq_nats.exceptions import JobFailed, JobNotFound
from asyncmq_nats.inspection import Inspection
from asyncmq_nats.jobs import Job, new_job, new_job_id, validate_custom_job_id
from asyncmq_nats.lifecycle import Lifecycle
from asyncmq_nats.registry import TASK_REGISTRY, TaskRegistry
from asyncmq_nats.runner import Runner, new_worker_id
from asyncmq_nats.serving import import_tasks, run_program, run_until_signalled
from asyncmq_nats.states import COUNT_BUCKETS, JOB_STATES, OUTCOMES, Bucket, State
from asyncmq_nats.subjects import QueueSubjects, encode_token

__all__ = ["Queue"]

READ_AGAIN: Final = 5.0
COUNTED_AS_TO_DO: Final = (State.WAITING, State.DELAYED, State.WAITING_CHILDREN)


class Queue:
    """A named queue of jobs: add jobs, look at them, run them. Making one does no I/O.

    Args:
        name: 1 to 64 letters, digits, `_` or `-`.
        backend: where the jobs are; by default a `NATSBackend` of the settings, shared by this process.
        concurrency: how many jobs `run()` runs at a time.
        scan_interval: kept from AsyncMQ. Nothing is polled, and it changes nothing here.
        registry: the tasks that `run()` knows; by default those of `@task`.

    Raises:
        InvalidQueueName: the name cannot be part of a stream's name.
    """

    def __init__(
        self,
        name: str,
        backend: Backend | None = None,
        concurrency: int = 3,
        rate_limit: int | None = None,
        rate_interval: float = 1.0,
        scan_interval: float | None = None,
        *,
        registry: TaskRegistry = TASK_REGISTRY,
    ) -> None:
        self.name = name
        self.backend = backend if backend is not None else default_backend()
        self.concurrency = concurrency
        self.rate_limit = rate_limit
        self.rate_interval = rate_interval
        self.scan_interval = self.backend.settings.scan_interval if scan_interval is None else scan_interval
        self._subjects = QueueSubjects(self.backend.settings.prefix, name)
        self._assets = QueueAssets(self.backend, self._subjects)
        self._lifecycle = Lifecycle(self.backend, self._subjects, self._assets)
        self._inspection = Inspection(self.backend, self._subjects, self._assets)
        self._registry = registry

    # -- add

    async def add(
        self,
        task_id: str,
        args: Sequence[Any] | None = None,
        kwargs: Mapping[str, Any] | None = None,
        retries: int = 0,
        ttl: float | None = None,
        backoff: float | None = None,
        priority: int = DEFAULT_PRIORITY,
        delay: float | None = None,
        job_id: str | None = None,
    ) -> str:
        """Add one job and return its id (AsyncMQ `Queue.add`).

        Args:
            task_id: what to run: `module.function` of a `@task`, or its name.
            args: for the task; anything JSON can hold, dates, UUIDs, enums, dataclasses and pydantic models too.
            kwargs: for the task, likewise.
            retries: attempts that may follow a failed one.
            ttl: seconds after which a job that has not started expires.
            backoff: seconds to the power of the attempt's number between attempts; `None`: at once.
            priority: any integer; lower runs first.
            delay: seconds until the job may run; 0 or less is now.
            job_id: an id of your own. If a job with that id exists, in any state, its id is returned and nothing is added, so an `add` that
                raised `Unconfirmed` can be repeated safely.

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

    def _new_job(
        self,
        *,
        task_id: str,
        args: Sequence[Any] | None = None,
        kwargs: Mapping[str, Any] | None = None,
        retries: int = 0,
        ttl: float | None = None,
        backoff: float | None = None,
        priority: int = DEFAULT_PRIORITY,
        delay: float | None = None,
        job_id: str | None = None,
    ) -> Job:
        now = self.backend.now()
        return new_job(
            task_id=task_id,
            args=list(args or ()),
            kwargs=dict(kwargs or {}),
            max_retries=retries,
            backoff=backoff,
            ttl=ttl,
            job_id=new_job_id() if job_id is None else validate_custom_job_id(job_id),
            created_at=now,
            priority=priority,
            delay_until=now + delay if delay is not None and delay > 0 else None,
            custom_id=job_id is not None,
        )

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
            worker=new_worker_id(),
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

    # -- look

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
        return await self.get_jobs([state], end=-1 if limit is None else limit - 1, asc=True) if limit != 0 else []

    async def get_jobs(
        self, types: Sequence[str] | str | None = None, *, start: int = 0, end: int = -1, asc: bool = False
    ) -> list[dict[str, Any]]:
        """Return the jobs from index `start` to `end` (included; -1: to the last) of the given states, newest first unless `asc`.

        States are joined one after the other. Only the pages that are needed are read.
        """
        names = [types] if isinstance(types, str) else JOB_STATES if types is None else types
        states = [State(name) for name in names if name in set(State)]
        return [job.to_dict() for job in await self._inspection.slice(states, start, end, ascending=asc)]

    async def wait_for(self, job_id: str, timeout: float | None = None) -> Any:
        """Wait until the job ends and return its result.

        Raises:
            JobFailed: it ended as failed, expired or cancelled.
            JobNotFound: there is no such job.
            TimeoutError: it has not ended within `timeout` seconds.
        """
        with anyio.fail_after(timeout):
            return await self._wait_for(job_id)

    async def _wait_for(self, job_id: str) -> Any:
        ended = anyio.Event()
        # Listen, then look, then wait: an outcome is either seen or heard. Events may be lost, so look again now and then.
        subscription = await self.backend.subscribe(self._subjects.event("*", encode_token(job_id)), lambda _: ended.set())
        try:
            while True:
                job = await self._inspection.find(job_id)
                if job is None:
                    raise JobNotFound(self.name, job_id)
                if job.status is State.COMPLETED:
                    return job.result
                if job.status in OUTCOMES:
                    raise JobFailed(job_id, job.status, job.last_error)
                with anyio.move_on_after(READ_AGAIN):
                    await ended.wait()
                ended = anyio.Event()
        finally:
            with anyio.CancelScope(shield=True):
                await subscription.unsubscribe()
