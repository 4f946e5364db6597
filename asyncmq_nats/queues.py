"""`Queue`: the public API, with the names, defaults and return types of AsyncMQ's `Queue`.

One class, since AsyncMQ's is one; each method is a few lines over one call below.
"""

import math
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    Awaitable,
    Callable,
    Collection,
    Coroutine,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from inspect import signature
from typing import Any, Final, TypeVar

import anyio
from anyio.abc import TaskStatus

from asyncmq_nats._arguments import (
    build_addition,
    checked_args,
    checked_call,
    checked_mapping,
    checked_meta,
    checked_number,
    checked_seconds,
    job_of_payload,
)
from asyncmq_nats._logging import get_logger
from asyncmq_nats._new_jobs import Addition, whole_job
from asyncmq_nats.backends import default_backend
from asyncmq_nats.backends.base import Backend, Difference, Staged
from asyncmq_nats.calls import Call, written
from asyncmq_nats.context import JobLogLine
from asyncmq_nats.events import PREFIX, Event
from asyncmq_nats.exceptions import (
    AssetMissing,
    BulkAddFailed,
    FailedAttempt,
    InvalidArgument,
    JobFailed,
    JobNotFound,
    QueueNotPaused,
)
from asyncmq_nats.jobs import LATEST_TIME, Backoff, DelayedInfo, Job, new_job_id
from asyncmq_nats.middleware import (
    Chain,
    Hook,
    Hooks,
    Lifespan,
    Middleware,
    checked_middleware,
    is_any_added,
)
from asyncmq_nats.runtime.control import Controls, WorkerInfo, list_workers
from asyncmq_nats.runtime.declarations import Declarations
from asyncmq_nats.runtime.program import import_tasks, run_program, run_until_signalled
from asyncmq_nats.runtime.rate_limiter import Limit, RateLimitInfo, read_rate_limit
from asyncmq_nats.runtime.registry import TASK_REGISTRY, TaskRegistry
from asyncmq_nats.runtime.runner import Runner
from asyncmq_nats.schedules import RepeatableInfo
from asyncmq_nats.search import JobFilter
from asyncmq_nats.states import COUNT_BUCKETS, JOB_STATES, OUTCOMES, Bucket, State
from asyncmq_nats.store.commit import REPLICA_LAG_DELAYS, look_for, looks
from asyncmq_nats.store.configuration import Configurations
from asyncmq_nats.store.flows import Flow, read_flow
from asyncmq_nats.store.job_logs import read_job_logs
from asyncmq_nats.store.listening import Inbox
from asyncmq_nats.store.overview import Overview, QueueInfo
from asyncmq_nats.store.pages import JobLists
from asyncmq_nats.store.past_events import read_past_events
from asyncmq_nats.store.queue_store import QueueStore
from asyncmq_nats.store.reads import PAGE_SIZE, Inspection, JobPage, WaitingJob
from asyncmq_nats.store.search import Found, Search
from asyncmq_nats.store.topology import DEFAULT_PRIORITY
from asyncmq_nats.store.waiters import Waiters
from asyncmq_nats.transitions.add import Additions
from asyncmq_nats.transitions.apply import (
    ACTION_STATES,
    JOBS_PER_PAGE,
    Action,
    ActOnFound,
    Applied,
    apply_to_ids,
    apply_to_matches,
)
from asyncmq_nats.transitions.archive import (
    FORMAT,
    Imported,
    Importer,
    export_jobs,
    split_line,
)
from asyncmq_nats.transitions.bulk import NONE_STAGED, Bulk, add_many, check_entries
from asyncmq_nats.transitions.cancel import Administration
from asyncmq_nats.transitions.clean import Cleanup, Progress
from asyncmq_nats.transitions.deduplicate import Deduplicator, Window, parse_window
from asyncmq_nats.transitions.definition import (
    CODE_OWNER,
    Definition,
    job_of,
    make_definition,
    repeatable_id,
)
from asyncmq_nats.transitions.edit import Edits
from asyncmq_nats.transitions.move import MOVABLE_STATES, Moved, Mover, Side
from asyncmq_nats.transitions.repeat import Repeatables
from asyncmq_nats.transitions.sweep import Sweep
from asyncmq_nats.wire.keys import encode_token

__all__ = ["Queue", "list_queues"]

logger = get_logger(__name__)

READS_OF_OUTCOME: Final = 5
"""Reads for an outcome after its event, if no replica lags: then the job must have been retried."""
RETRYABLE_STATES: Final = (State.FAILED, State.EXPIRED, State.CANCELLED, State.DELAYED)
"""States in which a job can be retried by hand."""
IMPORT_BATCH: Final = 500
EXPORT_ORDER: Final = (
    *OUTCOMES,
    State.DELAYED,
    State.WAITING,
    State.ACTIVE,
    State.WAITING_CHILDREN,
)
"""The jobs that others wait for come first."""
LAST_EVENTS: Final = frozenset(PREFIX + state for state in OUTCOMES)
"""The events that are the last one of a job."""
LAST_EVENT_TIMEOUT: Final = 0.5
"""Seconds that a reader of the events of one job waits for the last one if the job has ended."""
COUNTED_AS_TO_DO: Final = (State.WAITING, State.DELAYED, State.WAITING_CHILDREN)

H = TypeVar("H", bound=Hook)
R = TypeVar("R")
A = TypeVar("A", bound=Addition)


async def list_queues(backend: Backend) -> list[str]:
    """Return the names of the queues on a backend (AsyncMQ `list_queues`)."""
    prefix = f"{backend.settings.prefix}_"
    return [name.removeprefix(prefix) for name in await backend.list_logs(prefix)]


def _checked_state(state: str) -> State:
    if state not in set(State):
        raise InvalidArgument(f"state must be one of {', '.join(State)}", state)
    return State(state)


class Queue:
    """A named queue of jobs: add jobs, look at them, run them. Making one does no I/O.

    Args:
        name: 1 to 64 letters, digits, `_` or `-`.
        backend: where the jobs are; by default a `NATSBackend` of the settings, shared by this
            process.
        concurrency: how many jobs `run()` runs at a time.
        scan_interval: kept from AsyncMQ. Nothing is polled, so it changes nothing. Every 30 s a
            worker searches for the effects of lost signals (a new priority, the end of a pause).
        rate_limit: how many jobs the whole queue may start per `rate_interval`, over all its
            workers; 0 starts none, `None` is no limit.
        rate_interval: in seconds.
        registry: the tasks that `run()` knows; by default those of `@task`.
        any_task: whether `run()` runs all of them; by default those whose queue this is. `None`: as
            the settings say.
        middleware: called around the jobs that this object adds and runs, within those of
            `add_middleware`.
        lifespan: opened by each worker while it runs: a function that returns an async context
            manager, whose value its jobs have as `current_job().state`. It is given those of the
            keywords `backend`, `worker_id` and `queue` that it takes.

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
        any_task: bool | None = None,
        middleware: Sequence[Middleware] = (),
        lifespan: Lifespan | None = None,
    ) -> None:
        if backend is not None and not callable(getattr(backend, "declare_log", None)):
            raise InvalidArgument(
                "backend must be a backend, such as NATSBackend('nats://localhost:4222')", backend
            )
        if checked_seconds(rate_interval, "rate_interval") <= 0:
            raise InvalidArgument("rate_interval must be above 0 s", rate_interval)
        self.name = name
        self.backend = backend if backend is not None else default_backend()
        self.concurrency = checked_number(concurrency, "concurrency", 1)
        self.rate_limit = (
            rate_limit if rate_limit is None else checked_number(rate_limit, "rate_limit")
        )
        self.rate_interval = rate_interval
        self.scan_interval = (
            self.backend.settings.scan_interval if scan_interval is None else scan_interval
        )
        self._store = QueueStore.of(self.backend, name)
        self._subjects, self._assets = self._store.keys, self._store.assets
        self._additions = Additions(self._store)
        self._inspection = Inspection(self._store)
        self._administration = Administration(self._store)
        self._lists = JobLists(self._store, self._inspection)
        self._overview = Overview(self._store, self._inspection, self._lists)
        self._sweep = Sweep(
            self._store,
            self._administration,
            self._inspection,
            lambda job_id: self._controls.signal_cancel(job_id),
        )
        self._cleanup = Cleanup(self._store, self._inspection, self._lists)
        self._search = Search(self._lists)
        self._edits = Edits(self._store)
        self._deduplicator = Deduplicator(self._store, self._additions)
        self._repeatables = Repeatables(self._store)
        self._controls = Controls(self._store)
        self._hooks = Hooks({"backend": self.backend, "queue": name}, lifespan=lifespan)
        self._middleware = [checked_middleware(each) for each in middleware]
        self._local_repeatables: list[Definition] = []
        self._configurations = Configurations(self._store)
        self._waiters = Waiters(self._store)
        self._registry = registry
        note_queue = getattr(self.backend, "note_queue", None)
        if note_queue is not None:  # that of tests, which runs the jobs of its queues
            note_queue(self)
        self.any_task = self.backend.settings.any_task if any_task is None else any_task

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
        meta: Mapping[str, str] | None = None,
    ) -> str:
        """Add one job and return its id (AsyncMQ `Queue.add`).

        Args:
            task_id: what to run: `module.function` of a `@task`, or its name.
            args: for the task, written by its annotations: what would not arrive equal is refused
                (docs/arguments.md).
            kwargs: for the task, likewise.
            retries: attempts that may follow a failed one.
            ttl: seconds after which a job that has not started expires.
            backoff: a number *b* waits `b ** n` seconds before the n-th retry; or a `Backoff`;
                `None`: as the task's backoff function says, if `@task(backoff=…)` was given one,
                otherwise at once. A number that was given there is for `enqueue` of the task only.
            priority: any integer; lower runs first.
            delay: seconds until the job may run; 0 or less is now.
            job_id: an id of your own. If a job with that id exists, in any state, its id is
                returned and nothing is added, so an `add` that raised `Unconfirmed` can be repeated
                safely.
            deduplication: `{"id", "ttl", "extend", "replace"}`: while a job added under that id has
                not ended, or for `ttl` seconds, no other one is added: its id is returned. With
                `replace`, one that is still delayed gets the new task, arguments, delay. With
                `extend`, each call restarts the `ttl`.
            debounce: AsyncMQ's older name for `deduplication`.
            depends_on: ids of jobs of this queue that must complete first; their results are in
                `current_job().parent_results()`.
            on_parent_failure: when one of them fails for good, `"wait"` (it may be retried by
                hand), `"fail"`, or `"run"` all the same.
            timeout: how long one attempt may run, in seconds; then the task is cancelled and the
                attempt has failed.
            repeat_every: add the job again this many seconds, or a text such as `"5m"`, after each
                success.
            meta: strings that go with the job, 8,192 bytes at most, such as the id of a request:
                `current_job().meta`.

        Raises:
            JobNotFound: a job that it depends on is not in this queue.
            NotSerializable: an argument would not arrive equal; the message names it.
            PayloadTooLarge: the job does not fit into a message.
            InvalidArgument: a value is of the wrong kind; the message names it.
            TypeError, InvalidJobId: the job_id is outside AsyncMQ's rules.
            ValueError: `repeat_every` is no interval, or shorter than 0.05 s.
            Unconfirmed: no confirmation within `publish_timeout`; the job may or may not have been
                added.
        """
        await self.backend.connect()
        job = build_addition(
            self.backend.now(),
            None if delay is None else self.backend.now_at_most(),
            write=self._registry.write,
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
            meta=meta,
        )
        given = deduplication if deduplication is not None else debounce
        return await self._add(job, None if given is None else parse_window(given))

    async def add_call(self, call: Call[Any]) -> str:
        """Add one job, given as the `call` of a task, and return its id; see `add`.

        Raises:
            InvalidArgument: the call is for another queue.
        """
        call.require_queue(self.name)
        given = call.options.get("deduplication")
        window = None if given is None else parse_window(given)
        await self.backend.connect()
        now, latest = self.backend.now(), self.backend.now_at_most()
        job = build_addition(now, latest, write=written, **call.fields)
        return await self._add(job, window)

    def _add(self, job: Addition, window: Window | None = None) -> Coroutine[Any, Any, str]:
        job.encode()  # nothing is declared for what cannot be sent
        if not self._middleware and not is_any_added():
            return self._add_one(job, window)
        return self._pass_on(job, window)

    async def _pass_on(self, job: Addition, window: Window | None) -> str:
        """Add a job by way of the middleware."""
        chain, whole = Chain.of(self.name, self._middleware), whole_job(job)
        whole.encode()  # what a middleware changes in place does not count

        async def store(jobs: Sequence[Job]) -> list[str]:
            return [await self._add_one(job, window) for job in jobs]

        return (await chain.enqueue([whole], store))[0]

    def _add_one(self, job: Addition, window: Window | None) -> Coroutine[Any, Any, str]:
        if window is not None:
            return self._add_in_window(job, window)
        return self._additions.add(job)

    async def _add_in_window(self, job: Addition, window: Window) -> str:
        await self._assets.declare()
        return await self._deduplicator.add(whole_job(job), window)

    async def _add_all(
        self,
        jobs: Sequence[A],
        store: Callable[[Sequence[A | Job]], Awaitable[list[str]]],
    ) -> list[str]:
        chain = Chain.of(self.name, self._middleware)
        if not chain.enqueues or not jobs:
            return await store(jobs)
        return await chain.enqueue([whole_job(job) for job in jobs], store)

    async def add_bulk(self, jobs: Iterable[Mapping[str, Any] | Call[Any]]) -> list[str]:
        """Add many jobs and return their ids in order (AsyncMQ `Queue.add_bulk`).

        Each is a mapping with `task_id` and any of the other parameters of `add`, or the `call` of
        a task. Up to 1,000 writes (a job is one, and so is each dependency) are all or none; more
        go in such batches. Entries with a deduplication window are added one by one, after the
        others.

        Raises:
            ValueError, TypeError: an entry is malformed; nothing was added.
            BulkAddFailed: of more than 1,000, some were added and some were not; it says which.
        """
        await self.backend.connect()
        bulk = Bulk(
            self._additions,
            self._registry.write,
            self.name,
            classes_of=self._registry.plain_classes,
            early=not Chain.of(self.name, self._middleware).enqueues,
        )
        try:
            if not isinstance(jobs, Iterator):
                jobs = tuple(jobs)
                if ids := await bulk.add_series(jobs):
                    return ids
            await bulk.build(jobs)
            store = partial(
                self._store_bulk, windows=bulk.windows, checked=bulk.checked, staged=bulk.staged
            )
            return await self._add_all(bulk.jobs, store)
        finally:
            bulk.drop()

    async def _store_bulk(
        self,
        built: Sequence[Addition],
        *,
        windows: Mapping[int, Window],
        checked: int = 0,
        staged: Mapping[int, Staged] = NONE_STAGED,
    ) -> list[str]:
        check_entries(self._additions, built[checked:], checked)
        ids = [job.job_id for job in built]
        plain = [index for index in range(len(built)) if index not in windows]
        await self._assets.declare()
        try:
            await add_many(self._additions, [built[index] for index in plain], staged)
        except BulkAddFailed as failed:
            errors = {
                plain[index]: error for index, error in failed.errors.items()
            } | dict.fromkeys(windows, failed)
            raise BulkAddFailed(
                {plain[index]: job_id for index, job_id in failed.added.items()}, errors
            ) from None
        for index, window in windows.items():
            ids[index] = await self._deduplicator.add(whole_job(built[index]), window)
        return ids

    async def enqueue(self, payload: Mapping[str, Any]) -> str:
        """Add a job given as a dict and return its id (AsyncMQ `Queue.enqueue`).

        The dict is of `Job.to_dict`, or has `task_id` and what `Job` takes. With an `id` it is
        idempotent, like `add` with a `job_id`.

        Raises:
            InvalidArgument: it is no dict, has no task, or a value of the wrong kind.
            InvalidJobId: no record can be kept under its id.
        """
        await self.backend.connect()
        return await self._add(job_of_payload(payload, self.backend.now(), self._registry.write))

    async def enqueue_bulk(self, payloads: Iterable[Mapping[str, Any]]) -> list[str]:
        """Add many jobs given as dicts, each as by `enqueue`, and return their ids in order.

        They are added in batches, as by `add_bulk`.

        Raises:
            InvalidArgument, InvalidJobId, NotSerializable, PayloadTooLarge: one of them is refused;
                nothing was added.
            BulkAddFailed: of more than 1,000, some were added and some were not; it says which.
        """
        await self.backend.connect()
        now = self.backend.now()
        jobs = [job_of_payload(payload, now, self._registry.write) for payload in payloads]
        return await self._add_all(jobs, partial(self._store_bulk, windows={}))

    async def send(self, payload: Mapping[str, Any]) -> str:
        """Same as `enqueue`."""
        return await self.enqueue(payload)

    async def enqueue_delayed(self, payload: Mapping[str, Any], run_at: float) -> str:
        """Add a job given as a dict that runs at `run_at`, in Unix seconds (as AsyncMQ)."""
        return await self.enqueue(
            checked_mapping(payload, "a job") | {"delay_until": checked_seconds(run_at, "run_at")}
        )

    async def delay(self, payload: Mapping[str, Any], run_at: float | None = None) -> str:
        """`enqueue`, or with a `run_at` `enqueue_delayed`."""
        return (
            await self.enqueue(payload)
            if run_at is None
            else await self.enqueue_delayed(payload, run_at)
        )

    async def add_linked(self, jobs: Sequence[Job], *, plain: Collection[str] = ()) -> None:
        """Add jobs that depend on each other, each after its `children`.

        See `FlowProducer.add_flow`. `plain`: the ids of those whose arguments are plain data
        already.
        """

        async def store(jobs: Sequence[Job]) -> list[str]:
            await self._assets.declare()
            await self._additions.add_linked(jobs)
            return [job.job_id for job in jobs]

        given = [job if job.job_id in plain else self._written(job) for job in jobs]
        await self._add_all(given, store)

    def _written(self, job: Job) -> Job:
        args, kwargs = self._registry.write(job.task_id, job.args, job.kwargs)
        return replace(job, args=args, kwargs=kwargs, meta=checked_meta(job.meta))

    # -- run

    def runner(self, **options: Any) -> Runner:
        """Return a worker for this queue that is not yet running. `options`: of `Runner`."""
        import_tasks(self.backend.settings.tasks)
        return Runner(
            self._store,
            registry=self._registry,
            any_task=self.any_task,
            concurrency=self.concurrency,
            limit=None if self.rate_limit is None else Limit(self.rate_limit, self.rate_interval),
            hooks=self._hooks,
            middleware=Chain.of(self.name, self._middleware),
            declarations=Declarations(self._store, {d.rid: d for d in self._local_repeatables}),
            **options,
        )

    async def run(self, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        """Run this queue's jobs until cancelled (AsyncMQ `Queue.run`).

        When cancelled, jobs that run may finish for `shutdown_timeout` seconds; the others are
        handed back to other workers.
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

    # -- read

    async def queue_stats(self) -> dict[str, int]:
        """Return how many jobs are in each state (AsyncMQ's three keys, and the others).

        Costs the same for any number of jobs. The server counts some milliseconds after it stores.
        """
        return {
            str(state): count for state, count in (await self._inspection.count_by_state()).items()
        }

    async def info(self) -> QueueInfo | None:
        """Return an overview of the queue; `None` if it does not exist."""
        return await self._overview.read()

    async def rates(self, period: float = 60.0) -> dict[str, float]:
        """Return how many jobs a second ended in each way during the last `period` seconds.

        They are read from the outcomes, at most 5,000 of each; removed ones do not count.

        Raises:
            InvalidArgument: the period is not above 0.
        """
        if checked_seconds(period, "period") <= 0:
            raise InvalidArgument("period must be above 0 s", period)
        return await self._overview.rates(period)

    async def get_job_counts(self, *types: str) -> dict[str, int]:
        """Return the number of jobs for each of the given states, by default AsyncMQ's eight.

        Asking for `waiting` adds `paused`.
        """
        counts = await self.queue_stats()
        wanted = [str(name) for name in types] or [str(name) for name in COUNT_BUCKETS]
        if types and State.WAITING in wanted and Bucket.PAUSED not in wanted:
            wanted.append(Bucket.PAUSED)
        return {str(name): counts.get(name, 0) for name in wanted}

    async def get_job_count_by_types(self, *types: str) -> int:
        """Return the number of jobs in the given states together."""
        return sum((await self.get_job_counts(*types)).values())

    async def count(self) -> int:
        """Return how many jobs are to be started: they wait for a worker, a time, or others.

        The server counts a job some milliseconds after it has stored it.
        """
        counts = await self._inspection.count_by_state()
        return sum(counts[state] for state in COUNTED_AS_TO_DO)

    async def job_logs(self, job_id: str) -> list[JobLogLine]:
        """Return the lines that a job's attempts kept by `current_job().log`, in order.

        They are written twice a second while it runs. There are none if it kept none, they are too
        old (`Settings.job_log_ttl`), or there is no such job.
        """
        return await read_job_logs(self._store, job_id)

    async def get_job(self, job_id: str) -> dict[str, Any] | None:
        """Return the job as a dict with AsyncMQ's keys, and ours beside them, or `None`."""
        job = await self._inspection.find(job_id)
        return None if job is None else job.to_dict()

    async def get_flow(self, job_id: str, *, limit: int = 1000) -> Flow | None:
        """Return a job and those that it depends on, and these on, up to `limit` jobs.

        `None` if there is no such job.
        """
        most = checked_number(limit, "limit", 1)
        return await read_flow(self._store, self._inspection, job_id, most)

    async def get_job_state(self, job_id: str) -> str | None:
        """Return the state of the job, or `None` if there is no such job."""
        job = await self._inspection.find(job_id)
        return None if job is None else str(job.status)

    async def get_job_result(self, job_id: str) -> Any:
        """Return the result of a completed job, or `None`; does not wait. See `wait_for`."""
        job = await self._inspection.find(job_id)
        return None if job is None else job.result

    async def list_jobs(self, state: str, *, limit: int | None = None) -> list[dict[str, Any]]:
        """Return the jobs in a state, oldest first: all of them, or the first `limit`.

        An unknown state has none (as AsyncMQ).
        """
        jobs = await self._list_oldest([State(state)] if state in set(State) else [], limit)
        return [job.to_dict() for job in jobs]

    async def _list_oldest(self, states: Sequence[State], limit: int | None) -> list[Job]:
        last = -1 if limit is None else checked_number(limit, "limit") - 1
        return await self._lists.slice(states, 0, last, ascending=True) if limit != 0 else []

    async def get_jobs(
        self,
        types: Sequence[str] | str | None = None,
        *,
        start: int = 0,
        end: int = -1,
        asc: bool = False,
    ) -> list[dict[str, Any]]:
        """Return the jobs of the given states from index `start` to `end` (included; -1: the last).

        Newest first unless `asc`.

        States are joined one after the other. Jobs before `start` are read and skipped: in long
        lists, `list_page` goes on where the page before ended.
        """
        names = [types] if isinstance(types, str) else JOB_STATES if types is None else types
        states = [State(name) for name in names if name in set(State)]
        return [job.to_dict() for job in await self._lists.slice(states, start, end, ascending=asc)]

    async def list_page(
        self,
        state: str,
        after: str | None = None,
        *,
        limit: int = 100,
        newest_first: bool = True,
    ) -> JobPage:
        """Return a page of the jobs in a state.

        It costs the same in a queue of ten jobs and of a million, each next page too.

        Args:
            state: such as `failed`.
            after: the `cursor` of the page before, read in the same order; `None` for the first
                page.
            limit: how many jobs at most.
            newest_first: whether the jobs that reached the state last are first.

        Raises:
            InvalidArgument: there is no such state, or the cursor is none of this state.
        """
        jobs, cursor = await self._lists.read_page(
            _checked_state(state), after, checked_number(limit, "limit", 1), descending=newest_first
        )
        return JobPage([job.to_dict() for job in jobs], cursor)

    async def search(
        self,
        where: JobFilter | None = None,
        *,
        newest_first: bool = True,
        limit: int | None = None,
    ) -> AsyncGenerator[dict[str, Any], None]:
        """Yield the jobs that match, one state after the other, as dicts like those of `get_job`.

        The first ones come at once, and a queue of any size takes no memory. A job that moves
        meanwhile may be missed, or come twice.

        Args:
            where: see `JobFilter`; by default all jobs.
            newest_first: whether the jobs that reached their state last are first.
            limit: how many at most.
        """
        wanted = JobFilter() if where is None else where
        left = None if limit is None else checked_number(limit, "limit")
        async with aclosing(
            self._pages_of(wanted, wanted.states, descending=newest_first)
        ) as pages:
            async for page in pages:
                for found in page[:left]:
                    yield found.job.to_dict()
                if left is not None:
                    left -= len(page)
                    if left <= 0:
                        return

    async def _pages_of(
        self,
        where: JobFilter,
        states: Sequence[State],
        *,
        descending: bool,
        largest: int = PAGE_SIZE,
    ) -> AsyncGenerator[list[Found], None]:
        running: set[str] = set()
        if where.worker is not None and State.ACTIVE in states:
            workers = await self.list_workers()
            running = {
                job_id
                for worker in workers
                if where.fits_worker(worker.id)
                for job_id in worker.running
            }
        async for page in self._search.pages(
            where, states, descending=descending, running=running, largest=largest
        ):
            yield page

    async def oldest_waiting(self) -> WaitingJob | None:
        """Return the job that has waited longest to be run, and since when.

        `None` if none waits.
        """
        found = await self._lists.oldest_waiting()
        if found is None:
            return None
        job, since = found
        return WaitingJob(job.to_dict(), since, max(0.0, self.backend.now() - since))

    async def get_waiting(
        self, *, start: int = 0, end: int = -1, asc: bool = False
    ) -> list[dict[str, Any]]:
        """Return the jobs that wait to be run; see `get_jobs`."""
        return await self.get_jobs([State.WAITING], start=start, end=end, asc=asc)

    async def get_active(
        self, *, start: int = 0, end: int = -1, asc: bool = False
    ) -> list[dict[str, Any]]:
        """Return the jobs that workers have; see `get_jobs`."""
        return await self.get_jobs([State.ACTIVE], start=start, end=end, asc=asc)

    async def get_completed(
        self, *, start: int = 0, end: int = -1, asc: bool = False
    ) -> list[dict[str, Any]]:
        """Return the completed jobs; see `get_jobs`."""
        return await self.get_jobs([State.COMPLETED], start=start, end=end, asc=asc)

    async def get_failed(
        self, *, start: int = 0, end: int = -1, asc: bool = False
    ) -> list[dict[str, Any]]:
        """Return the failed jobs; see `get_jobs`."""
        return await self.get_jobs([State.FAILED], start=start, end=end, asc=asc)

    async def get_delayed(
        self, *, start: int = 0, end: int = -1, asc: bool = False
    ) -> list[dict[str, Any]]:
        """Return the delayed jobs; see `get_jobs`."""
        return await self.get_jobs([State.DELAYED], start=start, end=end, asc=asc)

    async def get_waiting_children(
        self, *, start: int = 0, end: int = -1, asc: bool = False
    ) -> list[dict[str, Any]]:
        """Return the jobs that wait for others; see `get_jobs`."""
        return await self.get_jobs([State.WAITING_CHILDREN], start=start, end=end, asc=asc)

    async def get_paused(
        self, *, start: int = 0, end: int = -1, asc: bool = False
    ) -> list[dict[str, Any]]:
        """Return nothing: jobs of a paused queue are `waiting` (the name is AsyncMQ's)."""
        return await self.get_jobs([Bucket.PAUSED], start=start, end=end, asc=asc)

    async def get_prioritized(
        self, *, start: int = 0, end: int = -1, asc: bool = False
    ) -> list[dict[str, Any]]:
        """Return nothing: jobs of every priority are `waiting` (the name is AsyncMQ's)."""
        return await self.get_jobs([Bucket.PRIORITIZED], start=start, end=end, asc=asc)

    async def events(self, *names: str, job_id: str | None = None) -> AsyncGenerator[Event, None]:
        """Yield what happens to the jobs of this queue from now on, in whatever process.

        With names, only such events (see `Event`). With a `job_id` only what happens to that job,
        until it has ended. At most once: while the connection is down, or this reader is 10,000
        events behind, events are lost.
        """
        last = frozenset() if job_id is None else LAST_EVENTS
        inbox = Inbox(self._store, frozenset(names) | last if names else (), job_id)
        await self.backend.connect()
        async with inbox.open():
            patience = None if job_id is None else await self._patience_for(job_id)
            while (event := await inbox.next(patience)) is not None:
                if not names or event.name in names:
                    yield event
                if event.name in last:
                    break

    async def past_events(self, limit: int = 100) -> list[Event]:
        """Return the latest events of this queue that its records still tell, the newest first.

        The last record of each job is kept, so these are ends, delays, and jobs that wait. Starts
        and progress leave none.
        """
        await self.backend.connect()
        return await read_past_events(self._store, checked_number(limit, "limit", 1))

    async def _patience_for(self, job_id: str) -> float | None:
        """Return how long to wait for each event of a job: for ever, unless it has ended."""
        job = await self._inspection.find(job_id)  # after listening: its end is heard or seen
        return None if job is not None and job.status not in OUTCOMES else LAST_EVENT_TIMEOUT

    async def wait_for(self, job_id: str, timeout: float | None = None) -> Any:
        """Wait until the job ends and return its result.

        Raises:
            JobFailed: it ended as failed, expired or cancelled.
            JobNotFound: there is no such job.
            TimeoutError: it has not ended within `timeout` seconds; with 0 or less: it has not
                ended.
        """
        if timeout not in (None, math.inf) and checked_seconds(timeout, "timeout") <= 0:
            job = await self._find_ended(job_id)
            if job is not None:
                return _result_of(job)
        else:
            with anyio.move_on_after(timeout):
                return await self._wait_for(job_id)
        raise TimeoutError(f"job {job_id!r} has not ended within {timeout:g} s")

    async def _wait_for(self, job_id: str) -> Any:
        # Listen, then look, then wait: an outcome is either seen or heard.
        async with self._waiters.join(encode_token(job_id)) as waiter:
            find = partial(self._find_ended, job_id)
            pauses = (
                REPLICA_LAG_DELAYS
                if self.backend.reads_may_lag
                else REPLICA_LAG_DELAYS[:READS_OF_OUTCOME]
            )
            job = await find()
            while job is None:
                heard = await self._waiters.wait(waiter)  # or it was retried by hand since
                job = await (look_for(find, pauses) if heard else find())
            return _result_of(job)

    async def _find_ended(self, job_id: str) -> Job | None:
        """Return the job if it has ended.

        Raises:
            JobNotFound: there is no such job.
        """
        job = await self._inspection.find(job_id)
        if job is None:
            raise JobNotFound(self.name, job_id)
        return job if job.status in OUTCOMES else None

    # -- control

    async def pause(self, until: float | None = None) -> None:
        """Pause the queue: when this returns, no worker starts another job (AsyncMQ `Queue.pause`).

        Jobs that run go on, and jobs can be added. The server enforces it, for programs without
        this library too; it outlasts restarts.

        Args:
            until: Unix seconds at which the queue goes on by itself.
        """
        await self._controls.pause(until if until is None else checked_seconds(until, "until"))

    async def resume(self) -> None:
        """Let a paused queue go on, at once (AsyncMQ `Queue.resume`)."""
        await self._controls.resume()

    async def is_paused(self) -> bool:
        """Return whether the queue is paused, by `pause` or by another program."""
        return await self._assets.is_paused()

    async def cancel_job(self, job_id: str) -> bool:
        """Cancel a job that has not ended: it becomes `cancelled` and does not run.

        If it runs, its task is cancelled. A sync task's thread cannot be interrupted: it goes on to
        its end unheeded, unless it looks at `current_job().cancel_requested`. Return whether there
        was such a job.
        """
        if not await self._find_and(self._administration.cancel, job_id):
            return False
        await self._controls.signal_cancel(job_id)
        return True

    async def _find_and(self, act: Callable[[str], Awaitable[bool]], job_id: str) -> bool:
        """Apply an action to a job that may be moving.

        Return whether it was done; nothing is declared for it.
        """
        found = look_for(partial(act, job_id), looks(self.backend))
        return await self._unless_missing(found, False)

    @staticmethod
    async def _unless_missing(action: Coroutine[Any, Any, R], nothing: R) -> R:
        """Return what an action returns, or `nothing` if there is no such queue.

        Only additions create a queue.
        """
        try:
            return await action
        except AssetMissing:
            return nothing

    async def is_job_cancelled(self, job_id: str) -> bool:
        """Return whether the job was cancelled."""
        job = await self._inspection.find(job_id)
        return job is not None and job.status is State.CANCELLED

    async def list_workers(self) -> list[WorkerInfo]:
        """Return the running workers of this queue."""
        return await list_workers(self.backend, self.name)

    async def list_rate_limits(self) -> list[RateLimitInfo]:
        """Return the rate limits that the running workers keep to: one, if they agree, or none."""
        workers = await self.list_workers()
        limits = sorted({each.rate_limit for each in workers if each.rate_limit is not None})
        return [await read_rate_limit(self._store, Limit(*limit)) for limit in limits]

    def on_startup(self, hook: H) -> H:
        """Have this queue's workers call a function, sync or async, before their first job.

        Usable as a decorator. It is given those of the keywords `backend`, `worker_id` and `queue`
        that it takes. An error ends the worker.
        """
        self._hooks.on_startup.append(hook)
        return hook

    def on_shutdown(self, hook: H) -> H:
        """Have this queue's workers call a function after their last job, in reverse order."""
        self._hooks.on_shutdown.append(hook)
        return hook

    # -- settings on the server

    async def configure(self, *, reset: Iterable[str] = (), **values: Any) -> list[Difference]:
        """Store settings of this queue on the server, and change there what they change.

        They win over the settings of all processes: running workers take them up at their next
        heartbeat. `None` for a time to live is for ever, for a size or a number no limit.

        Args:
            reset: names of settings that are the processes' matter again.
            values: `stalled_after`, `completed_ttl`, `failed_ttl`, `completed_keep`, `failed_keep`,
                `replicas`, `ready_max_bytes`, `bucket_max_bytes`, `compression`,
                `placement_cluster`, `placement_tags`, as in `Settings`.

        Returns:
            What was changed on the server.

        Raises:
            InvalidArgument: a value is none of that setting, or too small for what is stored.
            PermissionRefused: this login may not change the queue's assets.
        """
        return await self._configurations.store(values, reset)

    async def get_configuration(self) -> dict[str, Any]:
        """Return the settings that `configure` has stored; the others are those of each process."""
        return await self._configurations.read()

    async def apply_settings(self) -> list[Difference]:
        """Change on the server what differs from the settings in force. Return what was changed.

        These are the settings of this process and, instead of them, what `configure` has stored.
        What cannot be changed on a live server (`find_drift` tells) stays.

        Raises:
            InvalidArgument: a size is too small for what is stored.
            PermissionRefused: this login may not change the queue's assets.
        """
        return await self._configurations.apply()

    async def find_drift(self) -> list[Difference]:
        """Return how the queue on the server differs from the settings in force."""
        return await self._configurations.compare()

    async def find_orphan_priorities(self) -> list[int]:
        """Return the priorities of ready jobs that no worker sees: they have no consumer yet.

        Running workers look for such jobs every 30 s, and make the consumers.
        """
        return await self._unless_missing(self._assets.find_orphans(declare=False), [])

    async def declare_orphan_priorities(self) -> list[int]:
        """Make the consumers of such jobs at once, and return their priorities."""
        return await self._unless_missing(self._assets.find_orphans(), [])

    # -- delayed jobs

    async def list_delayed(self, *, limit: int | None = None) -> list[DelayedInfo]:
        """Return the delayed jobs, all or the first `limit`, in the order of being delayed."""
        return [
            DelayedInfo(job.job_id, job.delay_until or job.created_at, job.to_dict())
            for job in await self._list_oldest([State.DELAYED], limit)
        ]

    async def remove_delayed(self, job_id: str) -> bool:
        """Remove a delayed job. Return whether it was still delayed."""
        return await self._find_and(self._administration.remove_delayed, job_id)

    async def get_due_delayed(self) -> list[dict[str, Any]]:
        """Take out and return the jobs whose time has come and that no worker has made ready yet.

        The caller owns them. While workers run, there are such jobs for milliseconds at most. One
        that a worker is making ready at this moment may run as well.
        """
        return [
            job.to_dict()
            for job in await self._administration.take_due(
                [job async for job in self._lists.read_due()]
            )
        ]

    async def retry_job(self, job_id: str) -> bool:
        """Run a failed, expired, cancelled or delayed job again, or now.

        It has all its retries and a new time to live. Return whether it was in one of these states.
        """
        return await self._find_and(self._administration.rerun, job_id)

    async def promote(self, job_id: str) -> bool:
        """Let a delayed job run now, with the attempts that it has left.

        `retry_job` gives it all of them again. Return whether it was delayed.
        """
        return await self._find_and(self._edits.promote, job_id)

    async def reschedule(self, job_id: str, run_at: float) -> bool:
        """Let a delayed job run at another time, in Unix seconds; one that is over is now.

        Return whether it was delayed. One whose time is less than half a second away is left as it
        is, and not counted as delayed: the server may be releasing it.
        """
        at = checked_seconds(run_at, "run_at")
        if at > LATEST_TIME:
            raise InvalidArgument(f"run_at must be before {LATEST_TIME:.0f}", run_at)
        return await self._find_and(partial(self._edits.reschedule, run_at=at), job_id)

    async def edit(
        self,
        job_id: str,
        *,
        args: Sequence[Any] | None = None,
        kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        """Change the arguments of a job that has not started; `None` keeps what it has.

        A delayed job, one that is to be retried too, and one that waits for others can be changed
        at any time. One that waits to be run can while the queue is paused, and is then the last of
        its priority.

        Raises:
            JobNotFound: there is no such job.
            WrongState: it has started, or may be started at any moment since the queue is not
                paused.
            NotSerializable: an argument would not arrive equal; the message names it.
            PayloadTooLarge: the job would be too large.
        """

        def change(data: dict[str, Any]) -> dict[str, Any]:
            new_args = data.get("args") if args is None else args
            new_kwargs = data.get("kwargs") if kwargs is None else kwargs
            written = checked_call(self._registry.write, data.get("task"), new_args, new_kwargs)
            return data | {"args": written[0], "kwargs": written[1]}

        if not await self._find_and(partial(self._edits.edit, change=change), job_id):
            raise JobNotFound(self.name, job_id)

    async def apply(
        self,
        jobs: JobFilter | Iterable[str],
        action: str | Callable[[str], Awaitable[bool]],
        *,
        dry_run: bool = False,
        limit: int | None = None,
        progress: Progress | None = None,
    ) -> Applied:
        """Apply an action to all jobs that match a filter, or to those of some ids, many at a time.

        Each job is met once: what reaches a state after the call has begun is not. A job may have
        moved on since it was found; then the action does to it what it does in that state, and
        `remove` leaves it alone.

        After an interruption the same call goes on. So that it finds none that failed again since,
        give it the filter's `until`: the time of the first call, as `Applied.until` tells.

        Args:
            jobs: a filter, or ids. Without a state `retry` means failed and expired jobs, `promote`
                delayed ones, `cancel` those that have not ended, `remove` all but active ones.
            action: `retry`, `cancel`, `remove` or `promote`; or a function of an id that returns
                whether it did something, such as `partial(queue.reschedule, run_at=…)`.
            dry_run: only count the jobs.
            limit: how many jobs at most, the oldest first.
            progress: called now and then with the number of jobs so far.

        Raises:
            InvalidArgument: there is no such action, or it does nothing to jobs in that state.
        """
        most = None if limit is None else checked_number(limit, "limit", 1)
        act = self._action(action)
        if not isinstance(jobs, JobFilter):
            ids = list(checked_args(jobs, "jobs"))[:most]
            return await apply_to_ids(ids, act, dry_run=dry_run, progress=progress)
        await self.backend.connect()
        until = min(math.inf if jobs.until is None else jobs.until, self.backend.now())
        states = jobs.states
        if isinstance(action, str):
            possible = ACTION_STATES[action]
            states = possible if jobs.state is None else jobs.states
            if action == Action.RETRY and jobs.state is not None:
                possible = RETRYABLE_STATES
            if useless := [state for state in states if state not in possible]:
                raise InvalidArgument(
                    f"{action} is for jobs that are {', '.join(possible)}", useless[0]
                )
        async with aclosing(
            self._pages_of(
                replace(jobs, until=until), states, descending=False, largest=JOBS_PER_PAGE
            )
        ) as pages:
            return await apply_to_matches(
                pages,
                self._cleanup if action == Action.REMOVE else act,
                act_on_many=self._action_on_many(action),
                until=until,
                dry_run=dry_run,
                limit=most,
                progress=progress,
            )

    def _action(
        self, action: str | Callable[[str], Awaitable[bool]]
    ) -> Callable[[str], Awaitable[bool]]:
        if not isinstance(action, str):
            return action
        known: dict[str, Callable[[str], Awaitable[bool]]] = {
            Action.RETRY: self.retry_job,
            Action.CANCEL: self.cancel_job,
            Action.REMOVE: self.remove_job,
            Action.PROMOTE: self.promote,
        }
        if action not in known:
            raise InvalidArgument(
                f"action must be one of {', '.join(Action)}, or a function", action
            )
        return known[action]

    def _action_on_many(self, action: str | Callable[[str], Awaitable[bool]]) -> ActOnFound | None:
        if action == Action.RETRY:
            return self._sweep.retry
        return self._sweep.cancel if action == Action.CANCEL else None

    async def move(
        self,
        target: "Queue",
        where: JobFilter | None = None,
        *,
        dry_run: bool = False,
        progress: Progress | None = None,
    ) -> Moved:
        """Move jobs to another queue, on this or on another server.

        Each runs here or there, never in both. Pause this queue first if jobs wait in it. A job
        keeps its id, its arguments, its attempts and its time; one that has ended keeps its
        outcome, with a new time to live. Those that run, that wait for others, or that others wait
        for stay, and so do those whose id the other queue has. `wait_for` of a job that is moved
        says that it was cancelled. After an interruption the same call goes on.

        Args:
            target: the other queue.
            where: which jobs; by default all that can be moved.
            dry_run: only count the jobs, of which some may have to stay.
            progress: called now and then with the number of jobs so far.

        Raises:
            QueueNotPaused: jobs that wait are meant, and this queue is not paused.
            InvalidArgument: it is the same queue, or jobs in a state are meant in which none can be
                moved.
        """
        wanted = JobFilter() if where is None else where
        if target.name == self.name and target.backend is self.backend:
            raise InvalidArgument("target must be another queue", target.name)
        states = MOVABLE_STATES if wanted.state is None else wanted.states
        if fixed := [state for state in states if state not in MOVABLE_STATES]:
            raise InvalidArgument(
                f"only jobs that are {', '.join(MOVABLE_STATES)} can be moved", fixed[0]
            )
        pages = self._pages_of(wanted, states, descending=False)
        if dry_run:
            return Moved(sum([len(page) async for page in pages]), 0)
        waiting = (await self.queue_stats())[State.WAITING] if State.WAITING in states else 0
        if waiting and not await self.is_paused():
            raise QueueNotPaused(self.name, "moved")
        await target._assets.declare()
        held = JobFilter(state=State.DELAYED)
        mover = Mover(self._side(), target._side())
        return await mover.move(
            pages,
            target._pages_of(held, held.states, descending=False),
            progress or (lambda _: None),
        )

    def _side(self) -> Side:
        return Side(self._additions, self._administration)

    async def export(self) -> AsyncGenerator[dict[str, Any], None]:
        """Yield the queue as dicts that can be written as lines of JSON.

        Each job with all that is stored of it, and the repeatables. Pause the queue and let its
        workers finish for an exact copy: what moves meanwhile may come twice or not at all.
        """
        await self.backend.connect()
        yield {"format": FORMAT, "queue": self.name, "at": self.backend.now()}
        pages = self._pages_of(JobFilter(), EXPORT_ORDER, descending=False)
        async for line in export_jobs(pages):
            yield line
        for info in await self.list_repeatables():
            yield {"repeatable": info.job_def, "paused": info.paused}

    async def import_jobs(
        self,
        lines: Iterable[Mapping[str, Any]] | AsyncIterable[Mapping[str, Any]],
        *,
        progress: Progress | None = None,
    ) -> Imported:
        """Add what `export` yielded, of this queue or of another.

        Existing jobs stay, so the same call goes on after an interruption. Jobs that ran when they
        were exported run again; those that had ended keep their outcome, with a new time to live. A
        repeatable begins a new series.

        Raises:
            InvalidArgument: a line is none of an export.
        """
        await self._assets.declare()
        importer, batch = Importer(self._additions, progress), list[tuple[State, dict[str, Any]]]()
        async for line in _each(lines):
            entry = split_line(checked_mapping(line, "a line of an export"))
            if entry is not None:
                batch.append(entry)
            elif "repeatable" in line:
                await self._import_repeatable(line)
            if len(batch) >= IMPORT_BATCH:
                await importer.add(batch)
                batch = []
        await importer.add(batch)
        return await importer.finish()

    async def _import_repeatable(self, line: Mapping[str, Any]) -> None:
        given = checked_mapping(line["repeatable"], "the repeatable of an export")
        fields = {key: value for key, value in given.items() if key != "id"}
        try:
            signature(self.upsert_repeatable).bind(**fields)
        except TypeError as problem:
            raise InvalidArgument(f"a repeatable of an export: {problem}", given) from None
        await self.upsert_repeatable(**fields)
        if line.get("paused"):
            await self.pause_repeatable(given)

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
        start: float | None = None,
        end: float | None = None,
        limit: int | None = None,
        jitter: float | None = None,
        overlap: str = "allow",
        catch_up: str | None = None,
    ) -> None:
        """Have this queue's workers repeat a job (AsyncMQ `Queue.add_repeatable`).

        Stored when `run()` starts; the arguments are those of `upsert_repeatable`. It belongs to
        the code: once a worker runs that started later and does not declare it, and no worker
        that declares it runs any more, it is removed.

        Raises:
            ValueError: the schedule is malformed; the message shows where.
        """
        definition = self._define(
            task_id,
            args,
            kwargs,
            owner=CODE_OWNER,
            retries=retries,
            ttl=ttl,
            priority=priority,
            backoff=backoff,
            timeout=timeout,
            every=every,
            cron=cron,
            timezone=timezone,
            name=name,
            start=start,
            end=end,
            limit=limit,
            jitter=jitter,
            overlap=overlap,
            catch_up=catch_up,
        )
        self._local_repeatables.append(definition)

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
        start: float | None = None,
        end: float | None = None,
        limit: int | None = None,
        jitter: float | None = None,
        overlap: str = "allow",
        catch_up: str | None = None,
    ) -> float:
        """Store a repeated job, or change the one of that name (AsyncMQ `upsert_repeatable`).

        Each tick adds exactly one job, however many workers run. Return its next run in Unix
        seconds, `inf` if none is to come. A change does not end a pause, and a series whose
        schedule is the same goes on as it was planned.

        Args:
            task_id: as for `add`, and so are args, kwargs, retries, ttl, priority, backoff and
                timeout.
            every: seconds, or a text such as `"5m"`; the first run is one interval from now, and
                the series does not drift. Not below the setting `min_repeat_interval`.
            cron: five fields, or six with the seconds last, by the clock of `timezone`.
            args: see `add`.
            kwargs: see `add`.
            retries: see `add`.
            ttl: see `add`.
            priority: see `add`.
            backoff: see `add`.
            name: what it is known by. Without one the definition itself is: a changed definition
                is then another repeatable.
            timezone: an IANA name; UTC by default. A time that the clock skips in spring runs an
                hour later, one that it shows twice runs once.
            timeout: see `add`.
            start: Unix seconds before which it does not run; an interval counts from there.
            end: Unix seconds after which it does not run.
            limit: how many jobs it adds at most.
            jitter: each run is later by chance, by up to this many seconds, but before the next
                one.
            overlap: `"skip"` adds no job while the last one has not ended.
            catch_up: what becomes of the runs that were missed in an outage or a pause: `"one"` of
                them is made up for, or `"all"`, or `"none"`. By default one after an outage, and
                none after a pause: then the series starts again.

        Raises:
            ValueError: the schedule is malformed; the message shows where.
            InvalidArgument: an option has a value that it does not take.
        """
        definition = self._define(
            task_id,
            args,
            kwargs,
            retries=retries,
            ttl=ttl,
            priority=priority,
            backoff=backoff,
            timeout=timeout,
            every=every,
            cron=cron,
            timezone=timezone,
            name=name,
            start=start,
            end=end,
            limit=limit,
            jitter=jitter,
            overlap=overlap,
            catch_up=catch_up,
        )
        await self._assets.declare()
        return await self._repeatables.upsert(definition)

    def _define(
        self,
        task_id: str,
        args: Sequence[Any] | None,
        kwargs: Mapping[str, Any] | None,
        *,
        retries: int,
        ttl: float | None,
        priority: int,
        backoff: float | Backoff | None,
        timeout: float | None,
        **options: Any,
    ) -> Definition:
        job = {
            "retries": retries,
            "ttl": ttl,
            "priority": priority,
            "backoff": backoff,
            "timeout": timeout,
        }
        args, kwargs = checked_call(self._registry.write, task_id, args, kwargs)
        shortest = self.backend.settings.min_repeat_interval
        return make_definition(task_id, args, kwargs, job, shortest=shortest, **options)

    async def list_repeatables(self) -> list[RepeatableInfo]:
        """Return the stored repeatables with their next runs (AsyncMQ `Queue.list_repeatables`)."""
        return await self._unless_missing(self._repeatables.read_all(), [])

    async def run_repeatable(self, job_def: Mapping[str, Any] | str) -> str:
        """Add one job of a repeatable now, beside its series, which goes on as planned.

        Return the job's id.

        Raises:
            KeyError: there is no such repeatable.
        """
        await self.backend.connect()
        rid = repeatable_id(job_def, self._registry.write)
        definition = await self._unless_missing(self._repeatables.find(rid), None)
        if definition is None:
            raise KeyError(f"no repeatable {rid!r}")
        now = self.backend.now()
        return await self._add(replace(job_of(definition, now, now), job_id=new_job_id()))

    async def remove_repeatable(self, job_def: Mapping[str, Any] | str) -> bool:
        """Remove a repeatable, given as its `job_def` or by name. Return whether it was there.

        Jobs it has added stay.
        """
        return await self._unless_missing(
            self._repeatables.remove(repeatable_id(job_def, self._registry.write)), False
        )

    async def pause_repeatable(self, job_def: Mapping[str, Any] | str) -> bool:
        """Have a repeatable add no more jobs. Return whether it was there."""
        return await self._unless_missing(
            self._repeatables.pause(repeatable_id(job_def, self._registry.write)), False
        )

    async def resume_repeatable(self, job_def: Mapping[str, Any] | str) -> float:
        """Let a paused repeatable go on, as its `catch_up` says.

        Return its next run in Unix seconds, `inf` if none is to come.

        Raises:
            KeyError: there is no such repeatable (as AsyncMQ).
        """
        rid = repeatable_id(job_def, self._registry.write)
        try:
            return await self._repeatables.resume(rid)
        except AssetMissing:
            raise KeyError(f"no repeatable {rid!r}") from None

    # -- clean up

    async def clean(
        self,
        state: str,
        older_than: float | None = None,
        *,
        progress: Progress | None = None,
    ) -> None:
        """Remove the jobs in a state (AsyncMQ `Queue.clean`). Jobs that run stay.

        Args:
            state: such as `completed`.
            older_than: only those that reached that state before, in Unix seconds: for outcomes,
                that ended before.
            progress: called after each step with the number of jobs removed so far.

        Raises:
            InvalidArgument: there is no such state, or `older_than` is no number.
        """
        wanted = _checked_state(state)
        before = math.inf if older_than is None else checked_seconds(older_than, "older_than")
        await self._cleanup.clean(wanted, before, progress)

    async def clean_jobs(
        self,
        grace: float,
        limit: int = 0,
        state: str = State.COMPLETED,
        *,
        progress: Progress | None = None,
    ) -> list[str]:
        """Remove jobs that reached a state over `grace` seconds ago, and return their ids.

        Args:
            grace: in seconds.
            limit: how many at most, the oldest first; 0: all.
            state: such as `completed`.
            progress: see `clean`.
        """
        wanted, most = _checked_state(state), checked_number(limit, "limit")
        seconds = checked_seconds(grace, "grace")
        await self.backend.connect()
        before = self.backend.now() - seconds
        return await self._cleanup.clean_jobs(wanted, before, most, progress)

    async def remove_job(self, job_id: str) -> bool:
        """Remove a job in any state but `active`. Return whether it was removed.

        Jobs that depend on it go on waiting. A job that a stopping worker handed back is `active`
        until another worker fetches it; `cancel_job` ends it. One that a worker is making ready at
        this moment may run as well.
        """
        return await self._find_and(self._administration.remove, job_id)

    async def drain(
        self, include_delayed: bool = False, *, progress: Progress | None = None
    ) -> list[str]:
        """Remove the jobs that wait, and if wished those that are delayed; return their ids.

        Jobs that run stay. `progress`: called after each step with the number of jobs removed so
        far.
        """
        return await self._cleanup.drain(include_delayed=include_delayed, progress=progress)

    async def obliterate(self, *, force: bool = False) -> list[str]:
        """Remove everything: jobs in all states, repeatables, windows, a pause.

        Return the ids of the jobs. With `force`, jobs that run are cancelled first.

        Raises:
            RuntimeError: jobs are active, and not `force`: they run, or a stopping worker handed
                them back and no other has fetched them.
        """
        counts = await self._inspection.count_by_state()
        if counts[State.ACTIVE] and not force:
            raise RuntimeError(
                f"queue {self.name!r} has {counts[State.ACTIVE]} active jobs: "
                "wait for them, or pass force=True"
            )
        ids = await self._cleanup.read_ids()
        # A running job would store its next attempt after all else is gone.
        for job in await self.list_jobs(State.ACTIVE) if counts[State.ACTIVE] else ():
            await self.cancel_job(job["id"])
        if await self._cleanup.obliterate():
            await self._controls.resume()
        return ids

    async def get_deduplication_job_id(self, deduplication_id: str) -> str | None:
        """Return the id of the job that owns a deduplication window, or `None`."""
        return await self._unless_missing(self._deduplicator.owner(deduplication_id), None)

    async def get_debounce_job_id(self, deduplication_id: str) -> str | None:
        """Same as `get_deduplication_job_id`, under AsyncMQ's older name."""
        return await self.get_deduplication_job_id(deduplication_id)

    async def remove_deduplication_key(self, deduplication_id: str) -> bool:
        """End a deduplication window. Return whether there was one."""
        return await self._unless_missing(self._deduplicator.remove(deduplication_id), False)


async def _each(
    lines: Iterable[Mapping[str, Any]] | AsyncIterable[Mapping[str, Any]],
) -> AsyncIterator[Mapping[str, Any]]:
    if isinstance(lines, AsyncIterable):
        async for line in lines:
            yield line
    else:
        for line in lines:
            yield line


def _result_of(job: Job) -> Any:
    """Return the outcome of a job that has ended."""
    if job.status is not State.COMPLETED:
        attempts = [FailedAttempt.read(entry) for entry in job.errors]
        trace = job.error_traceback
        raise JobFailed(job.job_id, job.status, job.last_error, traceback=trace, attempts=attempts)
    return job.result
