"""A worker's slots on one queue: run, report, stop.

What a job's end means is decided in `lifecycle`, what comes in is the business of `intake`.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, Final

import anyio
from anyio.abc import TaskGroup, TaskStatus
from anyio.lowlevel import checkpoint

from asyncmq_nats._concurrency import all_done_before, open_task_group, running_task
from asyncmq_nats._logging import get_logger
from asyncmq_nats.backends.base import Backend, Delivery, Settled, Write
from asyncmq_nats.context import JobContext, running_job
from asyncmq_nats.exceptions import (
    AsyncMQError,
    InvalidArgument,
    InvalidJob,
    JobNotFound,
    NotSerializable,
    PayloadTooLarge,
    TooManyPriorities,
)
from asyncmq_nats.jobs import Job
from asyncmq_nats.middleware import Hooks
from asyncmq_nats.retries import Failure, retry_delay
from asyncmq_nats.runtime.control import CANCEL, RESUME, WorkerRegistry, new_worker_id
from asyncmq_nats.runtime.executor import Running, execute
from asyncmq_nats.runtime.fetcher import Intake
from asyncmq_nats.runtime.heartbeat import Heartbeat
from asyncmq_nats.runtime.promoter import Promoter
from asyncmq_nats.runtime.rate_limiter import Limit, RateLimiter
from asyncmq_nats.runtime.registry import TaskRegistry
from asyncmq_nats.store.announcing import WorkerEvents
from asyncmq_nats.store.commit import FAREWELL, look_for
from asyncmq_nats.store.topology import QueueAssets
from asyncmq_nats.transitions.claim import Attempt, Verdict, leave
from asyncmq_nats.transitions.finish import Lifecycle, SettleEnd
from asyncmq_nats.transitions.make_room import make_room
from asyncmq_nats.wire.keys import QueueSubjects

__all__ = ["Runner"]

logger = get_logger(__name__)

UNSOUND: Final = (
    NotSerializable,
    PayloadTooLarge,
    JobNotFound,
    InvalidArgument,
    InvalidJob,
    TooManyPriorities,
)
"""What is wrong with a result or a follow-up."""
TURN: Final = 0.002
"""Slots whose jobs never wait yield to the event loop after so many seconds, counted for all of them: each yield wakes another slot."""


class Runner:
    """Runs the jobs of one queue in this process.

    Args:
        backend: connected or not.
        subjects: of the queue.
        assets: of the queue.
        registry: the tasks that can be run.
        concurrency: slots; never more jobs run at a time.
        limit: of starts in the whole queue.
        hooks: what else happens when it starts and stops.
        on_lost_store: called when a server came back without what the bucket held.
    """

    def __init__(
        self,
        backend: Backend,
        subjects: QueueSubjects,
        assets: QueueAssets,
        *,
        registry: TaskRegistry,
        concurrency: int,
        limit: Limit | None = None,
        hooks: Hooks | None = None,
        on_lost_store: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        if concurrency < 1:
            raise ValueError(f"concurrency must be at least 1, not {concurrency}")
        self.worker = new_worker_id()
        self._events = WorkerEvents(backend, subjects, self.worker)
        self._backend = backend
        self._subjects = subjects
        self._assets = assets
        self._registry = registry
        self._concurrency = concurrency
        self._hooks = hooks or Hooks()
        self._lifecycle = Lifecycle(backend, subjects, assets, self.worker)
        limiter = None if limit is None else RateLimiter(backend, subjects, limit, self.worker)
        self._intake = Intake(
            backend,
            subjects,
            assets,
            self._lifecycle,
            concurrency=concurrency,
            limiter=limiter,
            adopt=self._adopt,
        )
        self._entry = WorkerRegistry(backend, subjects, self.worker, concurrency, self._running_ids)
        self._on_lost_store = on_lost_store
        self._lost_store = False
        steps = (
            self._entry.beat,
            self._restore_lost,
            self._lifecycle.trim,
            partial(make_room, backend, subjects),
            self._look_for_cancelled,
        )
        self._heartbeat = Heartbeat(self.worker, backend.settings.heartbeat_interval, steps)
        self._threads = anyio.CapacityLimiter(concurrency)
        self._running: dict[Running, None] = {}
        self._progress = anyio.Event()
        self._draining = False
        self._over = False
        self._stop = anyio.Event()
        self._turn_ends = 0.0
        self._group: TaskGroup

    # -- life

    def stop(self) -> None:
        """Begin to stop: take no more jobs, finish what runs."""
        self._stop.set()

    async def run(self, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        """Run jobs until `stop` or cancellation; either way what runs may finish for `shutdown_timeout`, and the rest is handed back."""
        if not await all_done_before(
            self._stop, self._backend.connect, self._assets.declare_all
        ):  # the server may not be there yet
            task_status.started()  # so that nobody waits for it
            return
        await self._hooks.start(self.worker)
        serving, finished = anyio.Event(), anyio.Event()
        async with open_task_group() as group:
            # Not `group.start`: when that is cancelled, it waits for the end of what nobody would stop any more.
            group.start_soon(self._serve, serving, finished)
            try:
                await serving.wait()
                logger.info(
                    "worker %s runs queue %s with %d slots",
                    self.worker,
                    self._subjects.queue,
                    self._concurrency,
                )
                task_status.started()
                await self._stop.wait()
            finally:
                with anyio.CancelScope(shield=True):
                    self._stop.set()
                    await finished.wait()
                    await self._hooks.stop(self.worker)

    async def _serve(self, serving: anyio.Event, finished: anyio.Event) -> None:
        """All loops, shielded from the outside: they end in order, by `stop`."""
        self._host = running_task()
        self._lifecycle.progress.attach()
        try:
            with anyio.CancelScope(shield=True):
                try:
                    async with open_task_group() as self._group:
                        await self._group.start(
                            Promoter(self._backend, self._subjects, self._assets).run
                        )
                        await self._intake.start(self._group)
                        await self._enter_registry()
                        for _ in range(self._concurrency):
                            self._group.start_soon(self._slot)
                        serving.set()
                        await self._stop.wait()
                        await self._drain()
                        await self._leave_registry()
                        self._group.cancel_scope.cancel()
                finally:
                    self._over = True
                    with anyio.move_on_after(FAREWELL):
                        await self._intake.stop()  # once more: if a loop has failed, nobody has
        finally:
            finished.set()

    async def _drain(self) -> None:
        """Stop pulling, hand back what has not started, let the rest finish for a while, then cancel and hand back that too."""
        self._draining = True
        with anyio.move_on_after(FAREWELL):
            await self._intake.stop()
        timeout = self._backend.settings.shutdown_timeout
        with anyio.move_on_after(timeout):
            await self._wait_until_quiet()
        if self._running:
            logger.warning(
                "worker %s: %d jobs did not finish in %g s: handed back",
                self.worker,
                len(self._running),
                timeout,
            )
            for running in list(self._running):
                running.cancel()
        with anyio.move_on_after(FAREWELL):
            await self._wait_until_quiet()
        logger.info("worker %s has stopped", self.worker)

    async def _wait_until_quiet(self) -> None:
        while self._intake.busy or self._intake.unsettled:
            self._progress = anyio.Event()
            await self._progress.wait()

    # -- what others see and say

    async def _enter_registry(self) -> None:
        await self._entry.enter()
        await self._assets.restore_lost()  # to learn which streams these are
        await self._entry.listen_for_pause(self._intake.pause)
        await self._entry.listen(RESUME, lambda _: self._intake.resume())
        await self._entry.listen(CANCEL, self._on_cancel)
        await (
            self._intake.look_at_pause()
        )  # again: a signal may have gone by between the first look and now
        self._group.start_soon(self._heartbeat.run)

    async def _leave_registry(self) -> None:
        with anyio.move_on_after(FAREWELL) as scope:
            try:
                await self._entry.leave()
            except AsyncMQError as error:
                logger.warning(
                    "worker %s: its entry goes when it is out of date: %s", self.worker, error
                )
        if scope.cancelled_caught:
            logger.warning(
                "worker %s: its entry goes when it is out of date: no answer", self.worker
            )

    async def _restore_lost(self) -> None:
        self._lost_store |= await self._assets.restore_lost()
        if self._lost_store and self._on_lost_store is not None:
            await self._on_lost_store()
        self._lost_store = False

    async def _look_for_cancelled(self) -> None:
        for job_id in await self._lifecycle.cancelled_among(self._running_ids()):
            self._on_cancel(job_id)

    def _running_ids(self) -> list[str]:
        return [running.context.id for running in self._running]

    def _on_cancel(self, job_id: str) -> None:
        for running in [running for running in self._running if running.context.id == job_id]:
            logger.info("job %s was cancelled while it ran", job_id)
            running.cancelled = True
            running.cancel()

    def _adopt(self, delivery: Delivery) -> bool:
        """Take a delivery for the lease of a job that runs here, if it is one: its lease lapsed although this worker lives."""
        for running in self._running:
            attempt = running.attempt
            if attempt.delivery.sequence == delivery.sequence:
                logger.warning(
                    "job %s came again while it runs here: its lease had lapsed, and is renewed",
                    running.context.id,
                )
                attempt.delivery.abandon()
                attempt.delivery = delivery
                return True
        return False

    # -- run

    async def _slot(self) -> None:
        slot = running_task()
        while True:
            delivery = await self._intake.next()
            try:
                await self._execute(delivery, slot)
            except AsyncMQError as error:
                logger.error(
                    "%.200r: not run now, it will be delivered again: %s", delivery.subject, error
                )
                delivery.abandon()
            except anyio.get_cancelled_exc_class():  # the worker ends
                delivery.abandon()
                raise
            finally:
                self._intake.release()
                self._note_progress()
            if time.monotonic() > self._turn_ends:
                await checkpoint()
                self._turn_ends = time.monotonic() + TURN

    async def _execute(self, delivery: Delivery, slot: "asyncio.Task[Any]") -> None:
        try:
            attempt: Attempt | Verdict = self._lifecycle.open(delivery)
            if delivery.deliveries > 1 and isinstance(attempt, Attempt):
                attempt = await self._lifecycle.verify(attempt)
        except InvalidJob as problem:
            await self._reject(delivery, problem)
            return
        if isinstance(attempt, Verdict):
            leave(delivery, attempt)
        elif attempt.claimed and self._intake.is_paused:  # a claim takes a while
            await self._lifecycle.hand_back(attempt)
        else:
            await self._start(attempt, slot)

    async def _reject(self, delivery: Delivery, problem: InvalidJob) -> None:
        logger.error("%.200r: %s", delivery.subject, problem)
        await self._lifecycle.reject(delivery, problem)

    async def _start(self, attempt: Attempt, slot: "asyncio.Task[Any]") -> None:
        self._intake.unsettled += 1
        try:
            await self._run_or_end(attempt, partial(self._settle, attempt), slot)
        except InvalidJob as problem:  # what is malformed was not needed to run it
            await self._reject(attempt.delivery, problem)
            self._settled()
        except AsyncMQError:  # nobody will settle it
            attempt.delivery.abandon()  # it may be another one by now
            self._settled()
            raise

    async def _run_or_end(
        self, attempt: Attempt, settle: SettleEnd, slot: "asyncio.Task[Any]"
    ) -> None:
        job, now = attempt.head, self._backend.now()
        if job.stalls >= self._backend.settings.max_stalls:
            error = f"stalled: its worker was lost {job.stalls} times while it ran (the limit is max_stalls)"
            await self._lifecycle.fail(attempt, Failure(error, "", now), settle)
        elif job.is_expired(now):
            await self._lifecycle.expire(attempt, settle)
        elif job.delay_until is not None and job.delay_until > now:
            await self._lifecycle.postpone(attempt, settle)
        else:
            attempt.started_at = now
            await self._run(attempt, settle, slot)

    async def _run(self, attempt: Attempt, settle: SettleEnd, slot: "asyncio.Task[Any]") -> None:
        started = time.monotonic()
        context = JobContext(attempt.head.job_id, self._subjects.queue, attempt, self._lifecycle)
        running = Running(attempt, context, slot)
        self._running[running] = None
        running_job.set(context)
        self._events.tell_start(
            self._group, attempt.token, attempt.body, attempt.started_at, lambda: attempt.job
        )
        try:
            result, failure = await execute(
                running, self._registry, self._threads, self._backend.now, self._is_ending
            )
        except anyio.get_cancelled_exc_class():  # not the job's end, but the worker's
            with anyio.move_on_after(FAREWELL, shield=True), suppress(AsyncMQError):
                await self._give_up(attempt, cancelled=False)
            raise
        finally:
            del self._running[running]
        self._intake.learn_job(time.monotonic() - started)
        self._lifecycle.progress.finish(attempt.token)
        if running.gave_in:
            await self._give_up(attempt, cancelled=running.cancelled)
        elif failure is not None:
            await self._report_failure(attempt, failure, settle)
        else:
            await self._report_result(attempt, result, context.follow_ups, settle)

    def _is_ending(self) -> bool:
        return self._group.cancel_scope.cancel_called or bool(
            self._host.cancelling()
        )  # the second: `asyncio.run` cancels every task

    async def _give_up(self, attempt: Attempt, *, cancelled: bool) -> None:
        """Leave a job that was cancelled, unless this is its run after a retry by hand; or that did not finish in time."""
        if cancelled and await look_for(partial(self._lifecycle.is_cancelled, attempt.head.job_id)):
            attempt.delivery.ack()
        else:
            await self._lifecycle.hand_back(attempt)
        self._settled()

    # -- report

    async def _report_result(
        self, attempt: Attempt, result: Any, follow_ups: Sequence[Job], settle: SettleEnd
    ) -> None:
        try:
            if follow_ups or attempt.head.repeat_every is not None:
                await self._lifecycle.accompany(attempt, follow_ups, result)
            await self._lifecycle.complete(attempt, result, settle)
        except UNSOUND as error:  # another attempt would come to the same
            logger.warning(
                "job %s (%s) failed: %s", attempt.head.job_id, attempt.head.task_id, error
            )
            await self._lifecycle.fail(
                attempt,
                Failure(f"{type(error).__name__}: {error}", "", self._backend.now()),
                settle,
            )

    async def _report_failure(self, attempt: Attempt, failure: Failure, settle: SettleEnd) -> None:
        job = attempt.job
        task = self._registry.get(job.task_id)
        delay = retry_delay(job, failure, None if task is None else task.backoff_function)
        if delay is not None:
            logger.info(
                "job %s (%s) is retried in %g s: %s", job.job_id, job.task_id, delay, failure.error
            )
            try:
                await self._lifecycle.retry(attempt, failure, delay, settle)
            except (NotSerializable, PayloadTooLarge) as error:
                logger.warning("job %s (%s) cannot be retried: %s", job.job_id, job.task_id, error)
            else:
                return
        logger.warning("job %s (%s) failed: %s", job.job_id, job.task_id, failure.error)
        await self._lifecycle.fail(attempt, failure, settle)

    def _settle(self, attempt: Attempt, write: Write, result: Settled) -> None:
        """Learn that the end of an attempt was confirmed or refused. May be called from the backend: it must not block."""
        if isinstance(result, int) and not attempt.awaited and not attempt.head.children:
            attempt.delivery.ack()
            self._settled()
            self._events.tell_end(self._group, attempt.token, write)
        elif self._over:
            attempt.delivery.abandon()
        else:
            self._group.start_soon(self._resolve, attempt, write, result)

    async def _resolve(self, attempt: Attempt, write: Write, result: Settled) -> None:
        try:
            verdict = await self._lifecycle.settled(attempt, write, result)
            leave(attempt.delivery, verdict)
            if verdict is Verdict.DONE:
                self._events.tell_end(self._group, attempt.token, write)
        except AsyncMQError as error:
            logger.error("job %s: %s", attempt.head.job_id, error)
            attempt.delivery.abandon()
        finally:
            self._settled()

    def _settled(self) -> None:
        self._intake.settled()
        self._note_progress()

    def _note_progress(self) -> None:
        if self._draining:
            self._progress.set()
