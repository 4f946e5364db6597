"""The slots of a worker: each delivery runs in an asyncio task and a context of its own.

Takes deliveries while slots are free, runs them, and passes their ends to the completer.
"""

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from contextvars import Context, copy_context
from dataclasses import replace
from functools import partial
from typing import Any, Final

import anyio

from asyncmq_nats._clock import Cancellable
from asyncmq_nats._concurrency import Spawner, running_task
from asyncmq_nats._logging import get_logger
from asyncmq_nats.backends.base import Delivery
from asyncmq_nats.context import JobContext, running_job
from asyncmq_nats.exceptions import (
    AsyncMQError,
    InvalidArgument,
    InvalidJob,
    JobNotFound,
    NewerJob,
    NotSerializable,
    PayloadTooLarge,
    TaskNotFound,
    TooManyPriorities,
)
from asyncmq_nats.jobs import WIRE_VERSION, Job
from asyncmq_nats.middleware import Chain, Ending, EndState
from asyncmq_nats.retries import Failure, RetryLimits, judge, retry_delay, snooze_delay
from asyncmq_nats.runtime.completer import Completer
from asyncmq_nats.runtime.executor import Running, execute
from asyncmq_nats.runtime.fetcher import Fetcher
from asyncmq_nats.runtime.job_lines import JobLines
from asyncmq_nats.runtime.recorder import UNKNOWN_TASK, Recorder
from asyncmq_nats.runtime.registry import RegisteredTask, TaskRegistry
from asyncmq_nats.runtime.slot_group import SlotGroup
from asyncmq_nats.runtime.suspects import Suspects
from asyncmq_nats.store.announcing import WorkerEvents
from asyncmq_nats.store.commit import SHUTDOWN_STEP_TIMEOUT, look_for
from asyncmq_nats.store.queue_store import QueueStore
from asyncmq_nats.transitions.claim import Attempt, settle_delivery
from asyncmq_nats.transitions.finish import Lifecycle
from asyncmq_nats.transitions.promote import without_time

__all__ = ["Slots"]

logger = get_logger(__name__)

INVALID_RESULT: Final = (
    NotSerializable,
    PayloadTooLarge,
    JobNotFound,
    InvalidArgument,
    InvalidJob,
    TooManyPriorities,
)
"""Errors of a result or of a follow-up job: another attempt would end in the same way."""
LONGEST_HOLD: Final = 0.2
"""Seconds for which a slot is kept for a job that came early, by the lower bound of the clock."""
MARK_DELAY: Final = 1.0
"""Seconds after which a job that runs is claimed, so that the loss of its worker is a stall."""

Completed = tuple[Attempt, Any, JobContext]
"""A job that has run, and its result, of which nothing is written yet."""

METRIC_NAMES: Final = {"retrying": "retried", "snoozed": ""}
"""Ends of attempts whose name in the metrics (`metrics.ENDS`) is another; `""` for none."""


class Slots:
    """Runs the jobs of one worker. `on_change` is called when a job has ended."""

    def __init__(
        self,
        store: QueueStore,
        lifecycle: Lifecycle,
        registry: TaskRegistry,
        concurrency: int,
        events: WorkerEvents,
        spawner: Spawner,
        on_change: Callable[[], None],
        *,
        any_task: bool = False,
        group: SlotGroup | None = None,
        recorder: Recorder | None = None,
        middleware: Chain,
    ) -> None:
        self._backend = backend = store.backend
        self._queue = store.keys.queue
        self._lifecycle = lifecycle
        self._registry = registry
        self._group = group
        self._tasks_of = None if any_task else self._queue
        self._events = events
        self._spawner = spawner
        self._on_change = on_change
        self._recorder = recorder
        self._middleware = middleware
        settings = backend.settings
        self._lines = JobLines(self._queue, lifecycle.worker, settings.job_log_level, backend.now)
        self._limits = RetryLimits(settings.max_retries_limit, settings.min_retry_delay)
        self._concurrency = concurrency
        self._threads = anyio.CapacityLimiter(concurrency)
        self._suspects = Suspects(
            settings.max_stalls,
            lambda: not self.running if group is None else group.is_alone,
            backend.clock.monotonic,
            None if group is None else group.probation,
        )
        self._context: Context
        self._loop: asyncio.AbstractEventLoop
        self._tasks: set[asyncio.Task[Completed | None]] = set()
        self._timer: Cancellable | None = None
        self._is_open = False
        self._ending = False
        self._is_cancelled: Callable[[], int] = lambda: 0
        self.running: dict[Running, None] = {}
        self._early: dict[str, None] = {}
        """Ids of the jobs that wait in a slot for their time."""
        self.redelivered = 0
        """Deliveries of jobs that had been delivered before."""
        self.lost = 0
        """Those of them whose worker was lost."""
        self.telling = 0
        """Attempts whose end the middleware is handling."""
        self.state: Any = None
        """The value that the worker's lifespan yielded."""
        self.fetcher: Fetcher
        self.completer: Completer

    def open(self) -> None:
        """Begin to run fetched jobs. It is called in the task of the worker."""
        self._loop = asyncio.get_running_loop()
        self._context = copy_context()
        self._is_cancelled = running_task().cancelling
        self._is_open = True
        self._lifecycle.progress.attach()
        self._lifecycle.logs.attach()
        self.fill()

    # -- take

    def fill(self) -> None:
        """Start jobs while slots are free. May be called from any callback."""
        if self._group is not None:
            self._group.fill()
        elif self._is_open and self.redelivered:  # otherwise there is no suspect
            while self.start_next() and self.fetcher.busy < self._concurrency:
                pass
        elif self._is_open:
            while (delivery := self.fetcher.take()) is not None:
                self._spawn(self._run_delivery(delivery))

    def start_next(self) -> bool:
        """See `Member`. Suspects come first."""
        # Without a redelivery here or in another queue of the worker there is no suspect.
        if (self.redelivered or self._group is not None) and self._suspects.exist:
            if self._start_suspect():
                return True
            self._set_timer()
            if self._suspects.holds_others:
                return False
        if (delivery := self.fetcher.take()) is None:
            return False
        self._spawn(self._run_delivery(delivery))
        return True

    def _start_suspect(self) -> bool:
        if not self.fetcher.has_free_slot or (suspect := self._suspects.next()) is None:
            return False
        self.fetcher.occupy()
        self._spawn(self._run_suspect(suspect))
        return True

    def _set_timer(self) -> None:
        """See to it that `fill` is called when a suspect, or a job beside it, may start."""
        if self._timer is None and (wait := self._suspects.wait) is not None:
            self._timer = self._backend.clock.call_later(max(wait, 0.01), self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        self.fill()

    # -- as a member of a group

    @property
    def is_open(self) -> bool:
        """See `Member`."""
        return self._is_open

    @property
    def is_running(self) -> bool:
        """See `Member`."""
        return bool(self.running)

    @property
    def expects_jobs(self) -> bool:
        """See `Member`."""
        return self.fetcher.expects_jobs

    @property
    def waits_in_line(self) -> bool:
        """Whether a suspect waits for its turn."""
        return bool(self._suspects)

    def note_free_slot(self) -> None:
        """See `Member`."""
        self.fetcher.note_free_slot()

    def _spawn(self, work: Coroutine[Any, Any, Completed | None]) -> None:
        # A task and a context of its own: what a job leaves behind reaches no other job.
        task = self._loop.create_task(work, context=self._context.copy())
        self._tasks.add(task)
        task.add_done_callback(self._on_done)

    def _on_done(self, task: "asyncio.Task[Completed | None]") -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            if (error := task.exception()) is not None:
                logger.error(
                    "the worker itself failed on a delivery; the job will be redelivered",
                    exc_info=error,
                )
            # Not in the task: jobs that came together have all started by now.
            elif (completed := task.result()) is not None:
                attempt, _, context = completed
                if (problem := self._complete(*completed)) is not None:
                    self._spawn(self._end_without_result(attempt, context, problem))
                    return  # which keeps the slot
        self.fetcher.release()
        self.fill()
        self._on_change()

    # -- stop

    async def hand_back_suspects(self) -> None:
        """Return the suspects that wait in line to the queue."""
        await self.fetcher.give_back([attempt.delivery for attempt in self._suspects.clear()])

    def cancel(self, job_id: str) -> None:
        """Cancel a job, if it runs here or waits for its time."""
        self._early.pop(job_id, None)
        for running in [each for each in self.running if each.context.id == job_id]:
            logger.info("job %s was cancelled while it ran", job_id)
            running.cancelled = True
            running.cancel()

    def cancel_running(self) -> None:
        """Cancel the jobs that run; they are handed back."""
        for running in list(self.running):
            running.cancel()

    async def end(self, timeout: float) -> None:
        """Cancel every task that is left, and wait for their ends, `timeout` seconds at most."""
        self._is_open, self._ending = False, True
        if self._timer is not None:
            self._timer.cancel()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=timeout)
        for attempt in self._suspects.clear():
            attempt.delivery.abandon()

    def _is_ending(self) -> bool:
        # The second: `asyncio.run` cancels every task when its main function has ended.
        return self._ending or bool(self._is_cancelled())

    def mark_long_runs(self) -> None:
        """Claim the jobs that have run for a while: see `Deliveries.mark_running`."""
        latest = self._backend.now() - MARK_DELAY
        for running in self.running:
            attempt = running.attempt
            if attempt.started_at <= latest and not attempt.claim_sent:
                self._lifecycle.mark_running(attempt)

    # -- one delivery

    async def _run_delivery(self, delivery: Delivery) -> Completed | None:
        attempt: Attempt | None = None
        try:
            try:
                attempt = self._lifecycle.open(delivery)
                if delivery.first or await self._may_run_again(attempt):
                    return await self._start(attempt)
            except InvalidJob as problem:
                await self._reject(_lease_of(attempt, delivery), problem)
        except AsyncMQError as error:
            logger.error(
                "message %.200r: not run now; it will be redelivered: %s", delivery.subject, error
            )
            _lease_of(attempt, delivery).abandon()
        except BaseException:  # the worker ends, or has a fault: its lease must not be extended
            _lease_of(attempt, delivery).abandon()
            raise
        return None

    async def _may_run_again(self, attempt: Attempt) -> bool:
        """Check a redelivery. Return whether it is to be run now: a suspect waits in line."""
        self.redelivered += 1
        if self.completer.renew_lease(attempt.delivery):  # it has started here since it came
            return False
        self.completer.begin(attempt)  # what comes of the job from now on is a new lease of this
        may_run = False
        try:
            disposition = await self._lifecycle.inspect(attempt)
            if disposition is not None:
                settle_delivery(attempt.delivery, disposition)
                return False
            self.lost += attempt.lost
            if attempt.lost and not self._is_lost_for_good(attempt):
                self._suspects.enter(attempt)
                return False
            may_run = True
        finally:
            if not may_run:
                self.completer.finish(attempt)
        return True

    async def _run_suspect(self, attempt: Attempt) -> Completed | None:
        try:
            if not await self._lifecycle.claim(attempt):
                if await self._may_run_again(attempt):
                    return await self._start(attempt)
            elif self.fetcher.is_paused:  # a claim takes a while
                await self._lifecycle.hand_back(attempt)
            else:
                return await self._start(attempt)
        except InvalidJob as problem:
            await self._reject(attempt.delivery, problem)
        except AsyncMQError as error:
            logger.error(
                "job %s: not run now; it will be redelivered: %s", attempt.head.job_id, error
            )
            attempt.delivery.abandon()
        except BaseException:  # as above
            attempt.delivery.abandon()
            raise
        finally:
            self._suspects.leave(attempt)
        return None

    async def _reject(self, delivery: Delivery, problem: InvalidJob) -> None:
        logger.error("%.200r: %s", delivery.subject, problem)
        await self._lifecycle.reject(delivery, problem)
        if self._recorder is not None:
            self._recorder.note_end["failed"](UNKNOWN_TASK)

    async def _start(self, attempt: Attempt) -> Completed | None:
        self.completer.begin(attempt)
        try:
            try:
                head = attempt.head
                if head.delay_until is not None and not await self._hold(attempt, head.delay_until):
                    return None
                now = self._backend.now()
                if self._is_lost_for_good(attempt) or not head.may_run(now):
                    await self._end_without_run(attempt, now)
                    return None
                try:
                    if head.v > WIRE_VERSION:
                        raise NewerJob(head.v, WIRE_VERSION)
                    entry = self._registry.find(head.task_id, self._tasks_of)
                except (NewerJob, TaskNotFound) as problem:
                    await self._put_off(attempt, problem)
                    return None
                attempt.started_at = now
                return await self._run(attempt, entry)
            except InvalidJob as problem:  # the malformed part was not needed to run it
                await self._reject(attempt.delivery, problem)
                self.completer.finish(attempt)
        except Exception:  # it has no final write
            self.completer.finish(attempt)
            raise
        return None

    async def _hold(self, attempt: Attempt, run_at: float) -> bool:
        """Wait in a slot for the time of a job that was made ready a little early.

        Return whether to go on: it may have been cancelled, or the queue paused, meanwhile.
        """
        wait = run_at - self._backend.now_at_least()
        if wait > LONGEST_HOLD:
            return True
        attempt.body = without_time(attempt.body)
        if wait <= 0:
            return True
        job_id = attempt.head.job_id
        self._early[job_id] = None
        try:
            await self.fetcher.hold(wait)
            cancelled = job_id not in self._early
        finally:
            self._early.pop(job_id, None)
        if cancelled or self.fetcher.is_paused:
            await self._give_up(attempt, cancelled=cancelled)
            return False
        return True

    def _is_lost_for_good(self, attempt: Attempt) -> bool:
        return attempt.stalls > 0 and attempt.losses >= self._backend.settings.max_stalls

    async def _end_without_run(self, attempt: Attempt, now: float) -> None:
        """End an attempt at a job that was lost too often, has expired, or is not due yet."""
        if self._is_lost_for_good(attempt):
            error = (
                f"stalled: its worker was lost {attempt.losses} times while it ran "
                "(the limit is max_stalls)"
            )
            attempt.stalls, attempt.suspected = attempt.losses, False
            failure = Failure(error, "", now)
            self._lines.failed(attempt.job, failure)
            self._note_end(attempt, None, "failed", failure=failure)
            await self._lifecycle.fail(attempt, failure)
        elif attempt.head.is_expired(now):
            self._note_end(attempt, None, "expired")
            await self._lifecycle.expire(attempt)
        else:
            await self._lifecycle.postpone(attempt)

    async def _put_off(self, attempt: Attempt, problem: NewerJob | TaskNotFound) -> None:
        """Put off a job that this worker cannot run, for one that can; after a while it fails."""
        try:
            delay = await self._lifecycle.put_off(attempt, str(problem))
        except (NotSerializable, PayloadTooLarge):  # it cannot be written again as it came
            delay = None
        if delay is not None:
            logger.warning("job %s is put off for %.1f s: %s", attempt.head.job_id, delay, problem)
        elif isinstance(problem, NewerJob):
            raise problem  # to be recorded with its body
        else:
            failure = replace(Failure.of(problem, self._backend.now()), final=True)
            await self._report_failure(attempt, failure)

    async def _run(self, attempt: Attempt, entry: RegisteredTask) -> Completed | None:
        context = self._context_of(attempt)
        running = Running(attempt, context, running_task())
        self.running[running] = None
        running_job.set(context)
        self._lines.started(attempt)
        self._events.tell_start(self._spawner, attempt)
        try:
            result, failure = await execute(
                running,
                entry,
                self._threads,
                self._backend,
                self._is_ending,
                self._middleware,
            )
        except anyio.get_cancelled_exc_class():  # the worker ends, not the job
            with anyio.move_on_after(SHUTDOWN_STEP_TIMEOUT, shield=True), suppress(AsyncMQError):
                await self._give_up(attempt, cancelled=False)
            raise
        finally:
            del self.running[running]
            attempt.ended_at = now = self._backend.now()
            if self._recorder is not None:
                self._recorder.note_run(
                    attempt.head.task_id, attempt.delivery.stamp, attempt.started_at, now
                )
            self._lifecycle.logs.finish(attempt.token)
        self._lifecycle.progress.finish(attempt.token)
        if running.gave_in:
            self._note_end(attempt, context, "cancelled")
            await self._give_up(attempt, cancelled=running.cancelled)
            return None
        if failure is None and context.follow_ups and self._middleware.enqueues:
            failure = await self._pass_on_follow_ups(context)
        if failure is not None:
            await self._report_failure(attempt, failure, context)
        elif context.follow_ups or attempt.head.repeat_every is not None:
            await self._report_with_follow_ups(attempt, result, context)
        else:
            return attempt, result, context
        return None

    def _context_of(self, attempt: Attempt) -> JobContext:
        return JobContext(
            attempt.head.job_id,
            self._queue,
            attempt,
            self._lifecycle,
            worker=self._lifecycle.worker,
            state=self.state,
            _write=self._registry.write,
            origins=[] if self._middleware.enqueues else None,
        )

    # -- middleware

    async def _pass_on_follow_ups(self, context: JobContext) -> Failure | None:
        """Pass the jobs that a task added through the middleware. Return why that failed."""
        passed: list[Job] = []

        async def take(jobs: Sequence[Job]) -> list[str]:
            passed.extend(jobs)
            return [job.job_id for job in jobs]

        try:
            for job, origin in zip(context.follow_ups, context.origins or (), strict=True):
                adding = self._middleware.enqueue([job], take)
                await self._loop.create_task(adding, context=origin)
        except Exception as error:  # that of a middleware is the task's
            return Failure.of(error, self._backend.now())
        context.follow_ups = passed
        return None

    def _note_end(
        self,
        attempt: Attempt,
        context: JobContext | None,
        state: EndState,
        *,
        result: Any = None,
        failure: Failure | None = None,
        delay: float | None = None,
    ) -> None:
        """Note the end of an attempt: metrics and middleware get it once it is confirmed."""
        name = METRIC_NAMES.get(state, state)
        attempt.on_end = None if self._recorder is None else self._recorder.note_end.get(name)
        if not self._middleware.ends and not self._middleware.plain_ends:
            return
        ended_at = attempt.ended_at or self._backend.now()
        ending = Ending(state, attempt.started_at, ended_at, result, delay=delay)
        if failure is not None:
            ending = ending._replace(
                error=failure.error,
                error_type=failure.kind or None,
                traceback=failure.traceback,
                exception=failure.exception,
            )
        attempt.on_end = partial(
            self._on_end, attempt.on_end, context or self._context_of(attempt), ending
        )

    def _on_end(
        self,
        record: Callable[[str], None] | None,
        context: JobContext,
        ending: Ending,
        task: str,
    ) -> None:
        if record is not None:
            record(task)
        self._middleware.end_at_once(context, ending)
        if self._middleware.ends:
            self.telling += 1
            self._spawner.spawn(self._tell_end, context, ending)

    async def _tell_end(self, context: JobContext, ending: Ending) -> None:
        try:
            await self._middleware.end(context, ending)
        finally:
            self.telling -= 1
            self._on_change()

    # -- what became of an attempt

    async def _give_up(self, attempt: Attempt, *, cancelled: bool) -> None:
        """Leave a job that was cancelled or did not finish in time.

        A cancelled one that was retried by hand since is handed back.
        """
        is_cancelled = partial(self._lifecycle.is_cancelled, attempt.head.job_id)
        if cancelled and await look_for(is_cancelled):
            attempt.delivery.ack()
            if (on_end := attempt.on_end) is not None:
                attempt.on_end = None
                on_end(attempt.head.task_id)
        else:
            await self._lifecycle.hand_back(attempt)
        self.completer.finish(attempt)

    def _complete(self, attempt: Attempt, result: Any, context: JobContext) -> Exception | None:
        """Write a result. Return why that cannot be done."""
        try:
            self._note_end(attempt, context, "completed", result=result)
            self._lifecycle.complete(attempt, result)
            self._lines.completed(attempt)
        except Exception as error:
            return error
        return None

    async def _end_without_result(
        self, attempt: Attempt, context: JobContext, problem: Exception
    ) -> None:
        """End an attempt whose result could not be written."""
        try:
            try:
                if not isinstance(problem, INVALID_RESULT):
                    raise problem
                await self._report_invalid_result(attempt, context, problem)
            except InvalidJob as error:  # the malformed part was not needed to run it
                await self._reject(attempt.delivery, error)
                self.completer.finish(attempt)
        except BaseException as error:
            self.completer.finish(attempt)
            attempt.delivery.abandon()
            if not isinstance(error, AsyncMQError):
                raise
            text = "job %s: its result is not stored; it will be redelivered: %s"
            logger.error(text, attempt.head.job_id, error)

    async def _report_with_follow_ups(
        self, attempt: Attempt, result: Any, context: JobContext
    ) -> None:
        self._note_end(attempt, context, "completed", result=result)
        try:
            await self._lifecycle.accompany(attempt, context.follow_ups, result)
            await self._lifecycle.complete_with_follow_ups(attempt, result)
            self._lines.completed(attempt)
        except INVALID_RESULT as error:
            await self._report_invalid_result(attempt, context, error)

    async def _report_invalid_result(
        self, attempt: Attempt, context: JobContext, error: Exception
    ) -> None:
        failure = replace(Failure.of(error, self._backend.now()), traceback="")
        self._lines.failed(attempt.job, failure)
        self._note_end(attempt, context, "failed", failure=failure)
        await self._lifecycle.fail(attempt, failure)

    async def _report_failure(
        self,
        attempt: Attempt,
        failure: Failure,
        context: JobContext | None = None,
    ) -> None:
        job = attempt.job
        task = self._registry.get(job.task_id)
        if task is not None:
            failure = judge(failure, task.retry_on, task.give_up_on)
        if failure.end == "snoozed" and await self._snooze(attempt, failure, context):
            return
        if failure.end == "expired":
            logger.info("job %s (%s) has expired: %s", job.job_id, job.task_id, failure.error)
            self._note_end(attempt, context, "expired", failure=failure)
            await self._lifecycle.expire(attempt, failure)
            return
        function = None if task is None else task.backoff_function
        delay = retry_delay(job, failure, function, self._limits)
        if delay is not None:
            self._lines.retried(job, failure, delay)
            self._note_end(attempt, context, "retrying", failure=failure, delay=delay)
            try:
                await self._lifecycle.retry(attempt, failure, delay)
            except (NotSerializable, PayloadTooLarge) as error:
                logger.warning("job %s (%s) cannot be retried: %s", job.job_id, job.task_id, error)
            else:
                return
        self._lines.failed(job, failure)
        self._note_end(attempt, context, "failed", failure=failure)
        await self._lifecycle.fail(attempt, failure)

    async def _snooze(
        self,
        attempt: Attempt,
        failure: Failure,
        context: JobContext | None,
    ) -> bool:
        """Schedule a job again, as its task wishes. Return whether that could be written."""
        job = attempt.job
        delay = snooze_delay(job, failure, self._limits)
        logger.info("job %s (%s) is snoozed for %g s", job.job_id, job.task_id, delay)
        self._note_end(attempt, context, "snoozed", failure=failure, delay=delay)
        try:
            await self._lifecycle.snooze(attempt, delay)
        except (NotSerializable, PayloadTooLarge) as error:  # it cannot be written again as it came
            logger.warning("job %s (%s) cannot be snoozed: %s", job.job_id, job.task_id, error)
            return False
        return True


def _lease_of(attempt: Attempt | None, delivery: Delivery) -> Delivery:
    """Return the delivery that has the lease now: the job may have come again meanwhile."""
    return delivery if attempt is None else attempt.delivery
