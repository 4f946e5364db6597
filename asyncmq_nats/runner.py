"""A worker's loops on one queue: credit, run, report, stop.

What a job's end means is decided in `lifecycle`, how many jobs to ask for in `pull_policy`.
"""

import heapq
import logging
import os
import socket
import time
import uuid
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

import anyio
from anyio.abc import TaskGroup, TaskStatus
from anyio.lowlevel import checkpoint

from asyncmq_nats.assets import TIER_SIGNAL, QueueAssets
from asyncmq_nats.backends.base import Backend, Delivery, Puller, Settled, Signal, Write
from asyncmq_nats.exceptions import AsyncMQError, InvalidJob, NotSerializable, PayloadTooLarge
from asyncmq_nats.lifecycle import Attempt, Lifecycle, SettleEnd, Verdict
from asyncmq_nats.promoter import Promoter
from asyncmq_nats.pull_policy import Pace, TierView, prefetch_target, should_hand_back, tiers_to_ask
from asyncmq_nats.registry import TaskRegistry
from asyncmq_nats.retries import Failure, retry_delay
from asyncmq_nats.subjects import QueueSubjects, tier_name, tier_priority

__all__ = ["Runner", "new_worker_id"]

logger = logging.getLogger(__name__)

PULL: Final = 30.0
LOOK_AGAIN: Final = 30.0
"""Cadence of the safety nets: tiers that were made unheard, jobs held too long."""
HELD_CHECK: Final = 0.05
UNSETTLED_PER_SLOT: Final = 4
TURN: Final = 0.0005
"""A slot that runs jobs that never wait yields to the others after so many seconds."""


def new_worker_id() -> str:
    """Return a name for a worker: host, process, and something random."""
    return f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:6]}"


@dataclass(slots=True)
class Held:
    """Jobs in hand that have no slot yet, the next to run first: by tier, then by age."""

    heap: list[tuple[int, int, int, float, Delivery]] = field(default_factory=list)

    def push(self, priority: int, delivery: Delivery) -> None:
        """Take one in."""
        heapq.heappush(self.heap, (priority, delivery.sequence, delivery.deliveries, time.monotonic(), delivery))

    def pop(self) -> Delivery:
        """Take out the next to run."""
        return heapq.heappop(self.heap)[4]

    def pop_stuck(self, pace: Pace, concurrency: int) -> list[Delivery]:
        """Take out those for which no slot will come soon."""
        now = time.monotonic()
        ordered = sorted(self.heap)
        stuck = {id(entry) for place, entry in enumerate(ordered) if should_hand_back(now - entry[3], pace, concurrency, place)}
        self.heap = [entry for entry in ordered if id(entry) not in stuck]
        return [entry[4] for entry in ordered if id(entry) in stuck]

    def pop_all(self) -> list[Delivery]:
        """Take out all."""
        entries, self.heap = self.heap, []
        return [entry[4] for entry in entries]


class Runner:
    """Runs the jobs of one queue in this process.

    Args:
        backend: connected or not.
        subjects, assets: of the queue.
        registry: the tasks that can be run.
        concurrency: slots; never more jobs run at a time.
        worker: the id that its claims and outcomes carry.
    """

    def __init__(
        self, backend: Backend, subjects: QueueSubjects, assets: QueueAssets, *, registry: TaskRegistry, concurrency: int, worker: str
    ) -> None:
        if concurrency < 1:
            raise ValueError(f"concurrency must be at least 1, not {concurrency}")
        self.worker = worker
        self._backend = backend
        self._subjects = subjects
        self._assets = assets
        self._registry = registry
        self._concurrency = concurrency
        self._lifecycle = Lifecycle(backend, subjects, assets, worker)
        self._threads = anyio.CapacityLimiter(concurrency)
        self._pace = Pace()
        self._held = Held()
        self._pending: dict[int, int] = {}
        self._priorities: dict[str, int] = {}
        self._busy = 0
        self._unsettled = 0
        self._running: dict[str, anyio.CancelScope] = {}
        self._idle: list[anyio.Event] = []
        self._refill = anyio.Event()
        self._progress = anyio.Event()
        self._stop = anyio.Event()
        self._asked_at = 0.0
        self._puller: Puller

    # -- life

    def stop(self) -> None:
        """Begin to stop: take no more jobs, finish what runs."""
        self._stop.set()

    async def run(self, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        """Run jobs until `stop` or cancellation; either way what runs may finish for `shutdown_timeout`, and the rest is handed back."""
        await self._backend.connect()
        await self._assets.declare_all()
        async with anyio.create_task_group() as group:
            finished = anyio.Event()
            await group.start(self._serve, finished)
            logger.info("worker %s runs queue %s with %d slots", self.worker, self._subjects.queue, self._concurrency)
            task_status.started()
            try:
                await self._stop.wait()
            finally:
                with anyio.CancelScope(shield=True):
                    self._stop.set()
                    await finished.wait()

    async def _serve(self, finished: anyio.Event, *, task_status: TaskStatus[None]) -> None:
        """All loops, shielded from the outside: they end in order, by `stop`."""
        try:
            with anyio.CancelScope(shield=True):
                self._puller = self._backend.puller(self._subjects.ready_log, self._on_delivery, self._on_lapse)
                async with anyio.create_task_group() as group:
                    await self._start_loops(group)
                    task_status.started()
                    await self._stop.wait()
                    await self._drain()
                    group.cancel_scope.cancel()
        finally:
            finished.set()

    async def _start_loops(self, group: TaskGroup) -> None:
        tier_signals = await self._backend.subscribe(self._subjects.control(TIER_SIGNAL), self._on_tier)
        await self._find_tiers()
        await group.start(Promoter(self._backend, self._subjects, self._assets).run)
        self._group = group
        for _ in range(self._concurrency):
            group.start_soon(self._slot)
        group.start_soon(self._hand_back_stuck)
        group.start_soon(self._look_for_tiers)
        group.start_soon(self._ask_when_needed)
        group.start_soon(partial(_unsubscribe_at_end, tier_signals))
        await self._ask()

    async def _drain(self) -> None:
        """Stop pulling, hand back what has not started, let the rest finish for a while, then cancel and hand back that too."""
        await self._puller.close()
        async with anyio.create_task_group() as group:
            for delivery in self._held.pop_all():
                group.start_soon(self._hand_back, delivery)
        with anyio.move_on_after(self._backend.settings.shutdown_timeout):
            await self._wait_until_quiet()
        if self._running:
            logger.warning("worker %s: %d jobs did not finish in time: handed back", self.worker, len(self._running))
            for scope in list(self._running.values()):
                scope.cancel()
        with anyio.move_on_after(max(5.0, self._backend.settings.shutdown_timeout)):
            await self._wait_until_quiet()
        logger.info("worker %s has stopped", self.worker)

    async def _wait_until_quiet(self) -> None:
        while self._busy or self._unsettled:
            self._progress = anyio.Event()
            await self._progress.wait()

    # -- credit

    async def _find_tiers(self) -> None:
        for priority in await self._assets.list_tiers():
            await self._assets.declare_tier(priority)
            self._pending.setdefault(priority, 0)

    def _on_tier(self, signal: Signal) -> None:
        if signal.body.lstrip(b"-").isdigit():
            self._pending.setdefault(int(signal.body), 0)
            self._refill.set()

    async def _look_for_tiers(self) -> None:
        while True:
            await anyio.sleep(LOOK_AGAIN)
            try:
                await self._find_tiers()
            except AsyncMQError as error:
                logger.warning("worker %s: tiers not looked up: %s", self.worker, error)
            self._refill.set()

    async def _ask_when_needed(self) -> None:
        while True:
            await self._refill.wait()
            self._refill = anyio.Event()
            if not self._stop.is_set():
                await self._ask()

    async def _ask(self) -> None:
        capacity = self._concurrency + prefetch_target(self._concurrency, self._pace)
        wanted = capacity - self._busy - len(self._held.heap)
        if wanted <= 0 or self._unsettled > UNSETTLED_PER_SLOT * self._concurrency + 256:
            return
        tiers = [TierView(p, self._puller.outstanding(tier_name(p)), self._pending[p]) for p in sorted(self._pending)]
        for priority, count in tiers_to_ask(tiers, wanted, capacity):
            if self._pending[priority] and not self._asked_at:
                self._asked_at = time.monotonic()
            await self._puller.request(tier_name(priority), count, wait=PULL)

    def _on_lapse(self, _: str) -> None:
        self._asked_at = 0.0
        self._refill.set()

    def _on_delivery(self, delivery: Delivery) -> None:
        priority = self._priorities.get(delivery.consumer)
        if priority is None:
            priority = self._priorities[delivery.consumer] = tier_priority(delivery.consumer) or 0
        if self._asked_at:
            self._pace.learn_refill(time.monotonic() - self._asked_at)
            self._asked_at = 0.0
        self._pending[priority] = delivery.pending
        self._held.push(priority, delivery)
        if self._idle:
            self._idle.pop().set()
        if not delivery.pending:
            self._refill.set()

    async def _hand_back_stuck(self) -> None:
        while True:
            await anyio.sleep(HELD_CHECK)
            if self._held.heap:
                for delivery in self._held.pop_stuck(self._pace, self._concurrency):
                    await self._hand_back(delivery)

    async def _hand_back(self, delivery: Delivery) -> None:
        try:
            attempt = await self._lifecycle.begin(delivery) if delivery.deliveries == 1 else None
            if isinstance(attempt, Attempt):
                await self._lifecycle.hand_back(attempt)
            else:  # delivered before: its claim, or the lack of one, stays as it is
                delivery.nak()
        except AsyncMQError as error:
            logger.warning("%s: not handed back, it comes back when its lease is over: %s", delivery.subject, error)
            delivery.abandon()

    # -- run

    async def _slot(self) -> None:
        turn_ends = time.monotonic() + TURN
        while True:
            if not self._held.heap or self._stop.is_set():
                await self._wait_for_job()
                turn_ends = time.monotonic() + TURN
                continue
            delivery = self._held.pop()
            self._busy += 1
            try:
                await self._execute(delivery)
            except AsyncMQError as error:
                logger.error("%s: not run now, it will be delivered again: %s", delivery.subject, error)
                delivery.abandon()
            finally:
                self._busy -= 1
            self._progress.set()
            self._refill.set()
            if time.monotonic() > turn_ends:
                await checkpoint()
                turn_ends = time.monotonic() + TURN

    async def _wait_for_job(self) -> None:
        event = anyio.Event()
        self._idle.append(event)
        await event.wait()

    async def _execute(self, delivery: Delivery) -> None:
        try:
            attempt = await self._lifecycle.begin(delivery)
        except InvalidJob as problem:
            logger.error("%s: %s", delivery.subject, problem)
            await self._lifecycle.reject(delivery, problem)
            return
        if isinstance(attempt, Verdict):
            self._leave(delivery, attempt)
            return
        job, now = attempt.job, self._backend.now()
        settle = partial(self._settle, attempt)
        self._unsettled += 1
        if job.stalls >= self._backend.settings.max_stalls:
            error = f"stalled: its worker was lost {job.stalls} times while it ran (the limit is max_stalls)"
            await self._lifecycle.fail(attempt, Failure(error, "", now), settle)
        elif job.is_expired(now):
            await self._lifecycle.expire(attempt, settle)
        elif job.delay_until is not None and job.delay_until > now:
            await self._lifecycle.postpone(attempt, settle)
        else:
            attempt.started_at = now
            await self._run(attempt, settle)

    async def _run(self, attempt: Attempt, settle: SettleEnd) -> None:
        started = time.monotonic()
        failure: Failure | None = None
        result: Any = None
        with anyio.CancelScope() as scope:
            self._running[attempt.token] = scope
            try:
                result = await self._registry.find(attempt.job.task_id).run(attempt.job, self._threads)
            except (Exception, SystemExit) as error:
                failure = Failure.of(error, self._backend.now())
            except anyio.get_cancelled_exc_class() as error:
                if scope.cancel_called:
                    raise
                failure = Failure.of(error, self._backend.now())  # the task cancelled itself
            finally:
                del self._running[attempt.token]
        self._pace.learn_job(time.monotonic() - started)
        if scope.cancelled_caught:
            await self._lifecycle.hand_back(attempt)
            self._settled()
        elif failure is not None:
            await self._report_failure(attempt, failure, settle)
        else:
            await self._report_result(attempt, result, settle)

    # -- report

    async def _report_result(self, attempt: Attempt, result: Any, settle: SettleEnd) -> None:
        try:
            await self._lifecycle.complete(attempt, result, settle)
        except (NotSerializable, PayloadTooLarge) as error:  # another attempt would come to the same
            logger.warning("job %s (%s) failed: %s", attempt.job.job_id, attempt.job.task_id, error)
            await self._lifecycle.fail(attempt, Failure(f"{type(error).__name__}: {error}", "", self._backend.now()), settle)

    async def _report_failure(self, attempt: Attempt, failure: Failure, settle: SettleEnd) -> None:
        job = attempt.job
        delay = retry_delay(job)
        if delay is None:
            logger.warning("job %s (%s) failed: %s", job.job_id, job.task_id, failure.error)
            await self._lifecycle.fail(attempt, failure, settle)
        else:
            logger.info("job %s (%s) is retried in %g s: %s", job.job_id, job.task_id, delay, failure.error)
            await self._lifecycle.retry(attempt, failure, delay, settle)

    def _settle(self, attempt: Attempt, write: Write, result: Settled) -> None:
        """Learn that the end of an attempt was confirmed or refused. May be called from the backend: it must not wait for it."""
        if isinstance(result, int):
            attempt.delivery.ack()
            self._settled()
        else:
            self._group.start_soon(self._resolve, attempt, write, result)

    async def _resolve(self, attempt: Attempt, write: Write, result: Settled) -> None:
        try:
            self._leave(attempt.delivery, await self._lifecycle.settled(attempt, write, result))
        except AsyncMQError as error:
            logger.error("job %s: %s", attempt.job.job_id, error)
            attempt.delivery.abandon()
        finally:
            self._settled()

    def _settled(self) -> None:
        self._unsettled -= 1
        self._progress.set()
        self._refill.set()

    @staticmethod
    def _leave(delivery: Delivery, verdict: Verdict) -> None:
        if verdict is Verdict.DONE:
            delivery.ack()
        else:
            delivery.abandon()


async def _unsubscribe_at_end(subscription: Any) -> None:
    try:
        await anyio.sleep_forever()
    finally:
        with anyio.CancelScope(shield=True):
            await subscription.unsubscribe()
