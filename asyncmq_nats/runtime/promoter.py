"""Released jobs become ready: each worker runs a promoter, and any number gives the same result.

The server's timers release jobs a little early, so a promoter waits out the rest. What is due is
written to its tier by callbacks; what has been written is removed, and what has to be looked at
first is read, many records at a time; the rest, such as ticks, is left to some tasks. The rule is
in `transitions/promote.py`.
"""

import heapq
import itertools
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Final

import anyio
import anyio.lowlevel
from anyio.abc import TaskStatus

from asyncmq_nats._concurrency import open_task_group
from asyncmq_nats._logging import get_logger
from asyncmq_nats.backends.base import Delivery, Record, Settled, Write
from asyncmq_nats.exceptions import (
    AsyncMQError,
    InvalidJob,
    PayloadTooLarge,
    TooManyPriorities,
    WriteRefused,
)
from asyncmq_nats.states import Place
from asyncmq_nats.store.commit import SHUTDOWN_STEP_TIMEOUT
from asyncmq_nats.store.queue_store import QueueStore
from asyncmq_nats.store.secret import QueueSecret
from asyncmq_nats.store.topology import DEFAULT_PRIORITY
from asyncmq_nats.transitions.add import Additions
from asyncmq_nats.transitions.promote import (
    Finding,
    Released,
    finish_rerun,
    is_older,
    judge,
    promotion,
    promotion_id,
    read_released,
    refusal_outcome,
)
from asyncmq_nats.transitions.tick import TickEnd, Ticker, read_fire
from asyncmq_nats.wire.keys import PROMOTER, Kind, fit_token

__all__ = ["Promoter"]

logger = get_logger(__name__)

PULL_WAIT: Final = 30.0
CREDIT_LIMITS: Final = (16, 512)
"""Fewest and most records that are in hand or asked for at a time."""
SLOW_PROMOTION: Final = 0.5
"""A due record that was in hand for this many seconds halves the credit."""
MAX_IN_FLIGHT: Final = 256
"""Promotions that are written and not yet confirmed."""
BEGIN_BATCH: Final = 64
"""Records that are begun with, or looked at, at a time: the server has these while the next are
written."""
REMOVE_BATCH: Final = 256
"""Records that are removed at a time."""
SMALL_REMOVAL: Final = 16
"""Records whose removal takes the server no time that starting jobs need."""
REMOVE_DELAY: Final = 0.02
"""Seconds that removals wait while more is being written, so that its jobs start sooner."""
MAX_WINDOWS: Final = 64
"""Windows whose records are counted; with more, those that are over are dropped."""
CONCURRENT_TASKS: Final = 32
"""The most concurrent tasks, for work that callbacks cannot do."""
CHECK_LEAD: Final = 0.03
"""A record that was in hand for a while is checked this many seconds before it is due."""
TRUSTED_SECONDS_IN_HAND: Final = 0.05
"""Time in hand, in seconds, in which anything may have become of a record."""
TRUSTED_AGE: Final = 60.0
"""Half of the time for which the server knows a message id: an older record is looked at."""
LONGEST_TRANSIT: Final = 0.05
"""The longest time in transit (seconds) that is subtracted for a fresh record. A longer one is a
difference of clocks: of the server that released the record and of the connected one."""
BURST_SIZE: Final = 16
"""The fewest records due in one window of time that are promoted early."""
BURST_WINDOW: Final = 0.02
"""The window, in seconds."""
LEAD_PER_RECORD: Final = 200e-6
"""Seconds by which a burst is promoted early, for each of its records."""
LONGEST_LEAD: Final = 0.04
"""The most, in seconds. Workers hold such a job in its slot: see `Slots`."""
LONGEST_WAIT: Final = 0.7
"""No fresh delivery waits longer: timers are set up to 0.4 s early, and a tick without a timer is
due within 0.6 s."""


class Held:
    """A record in hand.

    `released`: the record, parsed; `None` for a tick, or if it is malformed.
    """

    __slots__ = (
        "checked",
        "delivery",
        "due",
        "fire",
        "plan",
        "problem",
        "ready",
        "released",
        "window",
        "write",
    )

    def __init__(self, delivery: Delivery, *, fire: bool) -> None:
        self.delivery = delivery
        self.fire = fire
        self.plan = False
        """Whether it is a flow whose producer died."""
        self.released: Released | None = None
        self.problem: InvalidJob | None = None
        self.write: Write | None = None
        """What makes the job ready, if it was made while there was time."""
        self.due = 0.0
        """When it is to be promoted, by the monotonic clock."""
        self.window = 0
        """The number of the window in which it is due: see `BURST_WINDOW`. 0: it has no lead."""
        self.checked = True
        """Whether its job need not be read before it is promoted."""
        self.ready = 0
        """Sequence of the ready message."""

    @property
    def needs_no_check(self) -> bool:
        """Whether the transition reads the job itself."""
        return self.problem is not None or self.plan


class Promoter:
    """Moves released jobs to their tiers."""

    def __init__(self, store: QueueStore, *, leads: bool = True) -> None:
        """`leads`: bursts are promoted early. Not with a rate limit: it counts fetched jobs."""
        self._store = store
        self._leads = leads
        self._backend = store.backend
        self._keys = store.keys
        self._queue_secret = QueueSecret(store)
        self._additions = Additions(store)
        self._ticker = Ticker(store, self._queue_secret)
        self._secret = b""
        self._waiting: list[tuple[float, int, Held]] = []
        """A heap: when to begin with each record in hand that nothing is done with yet."""
        self._due_in = Counter[int]()
        """How many records that came early are due in each window."""
        self._order = itertools.count()
        self._monotonic = store.backend.clock.monotonic
        self._in_flight: set[Held] = set()
        """Records that something is done with, those of `_written` among them."""
        self._written: deque[Held] = deque()
        """Records that are to be removed, as all else is done."""
        self._being_removed = 0
        self._may_remove = anyio.Event()
        self._credit = CREDIT_LIMITS[1]
        self._halved_at = 0.0
        self._work: deque[tuple[Callable[[], Awaitable[None]], Sequence[Held]]] = deque()
        self._idle: list[anyio.Event] = []
        self._wake = anyio.Event()
        self._ask = anyio.Event()
        self._scopes: list[anyio.CancelScope] = []
        self._stopping = False

    async def run(self, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        """Promote until cancelled. Started when the first pull is out."""
        self._secret = await self._queue_secret.get()
        puller = self._backend.puller(
            self._keys.bucket_log, self._on_delivery, lambda _: self._ask.set()
        )
        try:
            async with open_task_group() as group:
                try:
                    for _ in range(CONCURRENT_TASKS):
                        group.start_soon(self._do_work)
                    group.start_soon(self._watch_time)
                    await puller.request(PROMOTER, self._credit, wait=PULL_WAIT)
                    task_status.started()
                    while True:
                        self._ask = anyio.Event()
                        outstanding = puller.outstanding(PROMOTER)
                        missing = self._credit - outstanding - self._in_hand
                        if missing > self._credit // 2 or (missing > 0 and outstanding == 0):
                            await puller.request(PROMOTER, missing, wait=PULL_WAIT)
                        await self._ask.wait()
                finally:
                    self._stop()
        finally:
            with anyio.CancelScope(shield=True):
                await puller.close()
                for _, _, held in self._waiting:
                    held.delivery.nak()
                for held in self._in_flight:  # otherwise their leases would be extended
                    held.delivery.abandon()

    @property
    def overdue(self) -> float:
        """For how many seconds the first record in hand waits whose time has come."""
        return max(0.0, self._monotonic() - self._waiting[0][0]) if self._waiting else 0.0

    @property
    def _has_room(self) -> bool:
        """Whether more may be begun: what is only to be removed does not count."""
        done = len(self._written) + self._being_removed
        return len(self._in_flight) - done < MAX_IN_FLIGHT

    @property
    def _in_hand(self) -> int:
        return len(self._waiting) + len(self._in_flight)

    def _stop(self) -> None:
        """Begin nothing more, and let the work under way end, unless the server is gone."""
        self._stopping = True
        for scope in self._scopes:
            scope.deadline = anyio.current_time() + SHUTDOWN_STEP_TIMEOUT
        self._wake_all()

    def _wake_all(self) -> None:
        while self._idle:
            self._idle.pop().set()

    # -- what arrives

    def _on_delivery(self, delivery: Delivery) -> None:
        if not delivery.body:  # a delete marker
            delivery.ack()
            return
        key = self._keys.parse(delivery.subject)
        held = Held(delivery, fire=key.kind is Kind.FIRE)
        run_at: float | None = None
        held.plan = key.kind is Kind.PLAN_DUE
        try:
            if held.plan:
                pass
            elif held.fire:
                run_at = read_fire(delivery.body).run_at
            else:
                released = read_released(key.token, delivery.body)
                held.released, run_at = released, released.run_at
        except InvalidJob as problem:
            held.problem = problem
        wait = self._wait(delivery, run_at)
        arrived = self._monotonic()  # read last: a pause in between makes it late, not early
        held.due = arrived + wait
        held.checked = held.needs_no_check or not self._is_doubtful(held, wait)
        if held.released is not None and wait > 0:
            held.write = self._promotion_of(held, held.released)
            if wait > LONGEST_LEAD and self._leads:
                held.window = int(held.due / BURST_WINDOW)
                self._due_in[held.window] += 1
        self._push(held.due if held.checked else max(arrived, held.due - CHECK_LEAD), held)

    def _wait(self, delivery: Delivery, run_at: float | None) -> float:
        """Return how many seconds the record must still wait.

        The server's clock decides: the record's time stamp is that of its release. The time in
        transit is subtracted: it is some milliseconds if many are released at once. If the record
        was delivered before, or no promoter fetched it for a while, only the time now is known.
        """
        if run_at is None:
            return 0.0
        now = self._backend.now_at_least()
        if delivery.deliveries == 1 and now - delivery.time <= LONGEST_WAIT:
            now = min(max(now, delivery.time), delivery.time + LONGEST_TRANSIT)
        return min(max(run_at - now, 0.0), LONGEST_WAIT)

    def _is_doubtful(self, held: Held, wait: float) -> bool:
        """Return whether to read a record or its job first.

        The ticker reads an old tick itself.
        """
        old = self._is_old(held)
        return (
            (wait > TRUSTED_SECONDS_IN_HAND and not old)
            if held.fire
            else (wait > TRUSTED_SECONDS_IN_HAND or old)
        )

    def _is_old(self, held: Held) -> bool:
        """Return whether its job may have gone on, or ended, although the record is there."""
        delivery, released = held.delivery, held.released
        return (
            not delivery.first
            or self._backend.now() - delivery.time > TRUSTED_AGE
            or (released is not None and (released.custom_id or released.order > (0, 0)))
        )

    def _push(self, at: float, held: Held) -> None:
        heapq.heappush(self._waiting, (at, next(self._order), held))
        self._wake.set()

    # -- what is due

    async def _watch_time(self) -> None:
        """Begin with each record when its time has come."""
        while True:
            self._wake = anyio.Event()
            self._begin_due()
            waits = self._waiting and self._has_room
            timeout = self._begins_at() - self._monotonic() if waits else None
            with self._backend.clock.move_on_after(timeout):
                await self._wake.wait()
            await anyio.lowlevel.checkpoint()

    def _begin_due(self) -> None:
        now, doubtful = self._monotonic(), list[Held]()
        if len(self._due_in) > MAX_WINDOWS:
            current = int(now / BURST_WINDOW)
            for window in [each for each in self._due_in if each < current]:
                del self._due_in[window]
        for _ in range(BEGIN_BATCH):
            due = self._waiting and self._begins_at() <= now
            if not due or self._stopping or not self._has_room:
                break
            _, _, held = heapq.heappop(self._waiting)
            self._in_flight.add(held)
            if held.checked:
                self._begin(held)
            else:
                doubtful.append(held)
        if doubtful:
            self._give(partial(self._check, doubtful), doubtful)

    def _begins_at(self) -> float:
        """Return when to begin with the next record: one of a burst is promoted early."""
        at, _, held = self._waiting[0]
        if not held.window or (count := self._due_in[held.window]) < BURST_SIZE:
            return at
        return at - min(count * LEAD_PER_RECORD, LONGEST_LEAD)

    def _begin(self, held: Held) -> None:
        if held.problem is not None:
            self._give(partial(self._pass_on, held), [held])
        elif held.plan:
            self._give(partial(self._carry_out_plan, held), [held])
        elif held.released is not None and held.released.waits:
            self._give(partial(self._link, held), [held])
        elif held.released is None:
            self._give(partial(self._fire, held), [held])
        elif not self._store.assets.is_declared(held.released.priority):
            self._give(partial(self._declare, held), [held])
        else:
            self._promote(held, held.released)

    async def _carry_out_plan(self, held: Held) -> None:
        """Add a flow whose producer died while it did so."""
        await self._additions.plans.carry_out_plan(held.delivery)
        self._discard(held)

    async def _link(self, held: Held) -> None:
        """Go on with a job whose producer died while it wrote the edges to its parents."""
        for ended in await self._additions.plans.links.link(held.delivery):
            await self._additions.dependencies.release(ended)
        held.delivery.ack()
        self._finish(held)

    def _promote(self, held: Held, released: Released) -> None:
        write = held.write or self._promotion_of(held, released)
        if held.due > self._monotonic():
            write.body = held.delivery.body  # which says when the job may start
        try:
            self._backend.send(
                self._keys.ready_log,
                write,
                partial(self._on_written, held),
                timeout=self._backend.settings.publish_timeout,
            )
        except AsyncMQError as error:
            self._give(partial(self._on_refused, held, released, error), [held])

    def _promotion_of(self, held: Held, released: Released) -> Write:
        message_id = promotion_id(self._secret, held.delivery.sequence, held.delivery.time)
        keys, body = self._keys, released.body
        write = promotion(keys, released.token, released.priority, body, message_id)
        write.once = True
        return write

    def _on_written(self, held: Held, result: Settled) -> None:
        if isinstance(result, int):
            held.ready = result
            self._discard(held)
        elif held.released is not None:
            self._give(partial(self._on_refused, held, held.released, result), [held])

    def _discard(self, held: Held) -> None:
        """Remove a record, soon: those that come meanwhile are removed together with it."""
        self._written.append(held)
        if len(self._written) == 1 and not self._being_removed:
            self._give(self._remove_written, ())
        elif self._removes_now:
            self._may_remove.set()
        if self._waiting:
            self._wake.set()

    @property
    def _removes_now(self) -> bool:
        """Whether few are under way, or as many wait as are removed at a time."""
        count = len(self._written)
        return count >= REMOVE_BATCH or (count == len(self._in_flight) and count <= SMALL_REMOVAL)

    async def _remove_written(self) -> None:
        while self._written:
            self._may_remove = anyio.Event()
            if not self._removes_now:
                with self._backend.clock.move_on_after(REMOVE_DELAY):
                    await self._may_remove.wait()
            count = min(len(self._written), REMOVE_BATCH)
            batch = [self._written.popleft() for _ in range(count)]
            self._being_removed = count
            try:
                await self._remove(batch)
            finally:
                self._being_removed = 0

    async def _remove(self, batch: Sequence[Held]) -> None:
        sequences = [held.delivery.sequence for held in batch]
        try:
            removed = set(await self._backend.delete_many(self._keys.bucket_log, sequences))
        except AsyncMQError as error:
            for held in batch:
                self._put_off(held, error)
            return
        for held in batch:
            if held.delivery.sequence in removed:
                held.delivery.abandon()  # its lease went with the record
                self._finish(held)
            else:
                self._give(partial(self._on_absent, held), [held])

    def _finish(self, held: Held) -> None:
        """Let go of a record that is taken care of."""
        self._in_flight.discard(held)
        now, (fewest, most) = self._monotonic(), CREDIT_LIMITS
        if now - held.due <= SLOW_PROMOTION:
            self._credit = min(self._credit + 1, most)
        elif now > self._halved_at + SLOW_PROMOTION:
            self._credit, self._halved_at = max(self._credit // 2, fewest), now
        if self._waiting:
            self._wake.set()
        if self._in_hand < self._credit // 2:
            self._ask.set()
        if self._stopping and not self._in_flight:
            self._wake_all()

    # -- what needs a task

    def _give(self, work: Callable[[], Awaitable[None]], records: Sequence[Held]) -> None:
        """Have a task do some work. May be called by the backend: it must not block."""
        self._work.append((work, records))
        if self._idle:
            self._idle.pop().set()

    async def _do_work(self) -> None:
        """Do one piece of work after the other, until stopped.

        Shielded for a while: stopping a worker does not tear a promotion, unless the server is
        gone. Then another promoter repeats it.
        """
        with anyio.CancelScope(shield=True) as scope:
            self._scopes.append(scope)
            while self._work or not self._stopping or self._in_flight:
                if not self._work:
                    idle = anyio.Event()
                    self._idle.append(idle)
                    await idle.wait()
                    continue
                work, records = self._work.popleft()
                try:
                    await work()
                except AsyncMQError as error:
                    for held in records:
                        self._put_off(held, error)

    def _put_off(self, held: Held, error: AsyncMQError) -> None:
        subject = held.delivery.subject
        logger.warning("record %.200r: not promoted, trying again: %s", subject, error)
        held.delivery.nak(1.0)
        self._finish(held)

    async def _check(self, batch: Sequence[Held]) -> None:
        """Read the jobs of some records; go on with the current records.

        The tiers are read first: a job that has left them has an outcome, which is read then. What
        is current is begun with at once: what was read of it is soon out of date.
        """
        ready, found = await self._read(batch)
        others: list[tuple[Held, Finding, list[Record]]] = []
        for held in batch:
            token = self._keys.token(held.delivery.subject)
            released, there = held.released, ready.get(token)
            if released is not None and there is not None and not is_older(there, released):
                self._discard(held)  # it was promoted before
                continue
            records = found.get((held.fire, token), [])
            finding = self._judge(held, records)
            if finding is Finding.CURRENT:
                self._go_on(held)
            else:
                others.append((held, finding, records))
        for held, finding, records in others:
            try:
                await self._act_on(held, finding, records)
            except AsyncMQError as error:
                self._put_off(held, error)

    async def _read(
        self, batch: Sequence[Held]
    ) -> tuple[dict[str, Record], dict[tuple[bool, str], list[Record]]]:
        """Return what is ready of some jobs, by token, and their records, by kind and token."""
        keys, filters, tiers = self._keys, list[str](), list[str]()
        for held in batch:
            filters.append(held.delivery.subject)
            if held.released is not None and self._is_old(held):
                token = held.released.token
                filters += [keys.later(token, Place.DELAYED), keys.ends(token)]
                tiers.append(keys.ready_any(token))
        ready = {keys.token(each.subject): each for each in await self._store.last_of_many(tiers)}
        found: dict[tuple[bool, str], list[Record]] = {}
        for record in await self._store.last(*filters):
            name = keys.is_fire(record.subject), keys.token(record.subject)
            found.setdefault(name, []).append(record)
        return ready, found

    def _judge(self, held: Held, records: Sequence[Record]) -> Finding:
        sequence = held.delivery.sequence
        if held.released is not None:
            return judge(self._keys, held.released, sequence, records)
        found = any(record.sequence == sequence for record in records)
        return Finding.CURRENT if found else Finding.GONE

    def _go_on(self, held: Held) -> None:
        """Begin with a record that was read, now or when it is due."""
        held.checked = True
        if held.due <= self._monotonic():
            self._begin(held)
        else:
            self._in_flight.discard(held)
            self._push(held.due, held)

    async def _act_on(self, held: Held, finding: Finding, records: Sequence[Record]) -> None:
        """Let go of a record, or finish first what a retry by hand has begun."""
        if finding is Finding.GONE:
            # It cannot be delivered again. Or a replica was asked that has yet to hear of it.
            held.delivery.nak(0.05)
            self._finish(held)
            return
        assert held.released is not None
        token = held.released.token
        if finding is Finding.RERUN:
            await finish_rerun(self._store, token, records)
            self._go_on(held)
            return
        if finding is Finding.ENDED:
            # The process that ended it may have died before it told the children.
            await self._additions.dependencies.release(token)
        self._discard(held)

    async def _declare(self, held: Held) -> None:
        """Promote to a priority that this process does not know yet."""
        released = held.released
        assert released is not None
        try:
            await self._store.assets.declare_tier(released.priority)
        except TooManyPriorities as error:
            logger.error(
                "job %s runs with priority %d instead of %d: %s",
                released.token,
                DEFAULT_PRIORITY,
                released.priority,
                error,
            )
            released.priority, held.write = DEFAULT_PRIORITY, None
        if self._is_old(held):
            await self._check([held])  # what was read before is out of date
        else:
            self._promote(held, released)

    async def _on_refused(self, held: Held, released: Released, error: AsyncMQError) -> None:
        if isinstance(error, PayloadTooLarge):
            await self._record_failure(released.token, error)
        elif not isinstance(error, WriteRefused):
            raise error
        elif await self._is_older_there(released):  # its acknowledgement is on the way
            held.delivery.nak(min(0.01 * 2 ** min(held.delivery.deliveries, 10), 1.0))
            self._finish(held)
            return
        self._discard(held)

    async def _is_older_there(self, released: Released) -> bool:
        """Return whether the record that refused a promotion is of an earlier attempt, or gone."""
        records = await self._store.last(self._keys.ready_any(released.token))
        return not records or is_older(records[-1], released)

    async def _on_absent(self, held: Held) -> None:
        """Let go of a record that was not there when it was to be removed."""
        if held.ready and held.released is not None:
            await self._take_back(held.released.token, held.ready)
        held.delivery.ack()
        self._finish(held)

    async def _take_back(self, token: str, sequence: int) -> None:
        """Remove what was made ready, if the job was cancelled before: its record had gone."""
        records = await self._store.last(self._keys.ends(token))
        if any(not r.marker and self._keys.outcome_state(r.subject) for r in records):
            await self._backend.delete(self._keys.ready_log, sequence)

    async def _pass_on(self, held: Held) -> None:
        """Make ready what is not a job, for a worker to record as failed. A malformed tick goes."""
        delivery = held.delivery
        logger.error("record %.200r is not a valid job: %s", delivery.subject, held.problem)
        if not held.fire:
            token = fit_token(self._keys.token(delivery.subject))
            message_id = promotion_id(self._secret, delivery.sequence, delivery.time)
            write = promotion(self._keys, token, DEFAULT_PRIORITY, delivery.body, message_id)
            try:
                await self._store.write(write)
            except PayloadTooLarge as error:
                await self._record_failure(token, error)
            except WriteRefused:  # the removal of its record is on the way
                logger.debug("record %.200r was promoted before", delivery.subject)
        self._discard(held)

    async def _record_failure(self, token: str, error: AsyncMQError) -> None:
        """Record a job as failed that no ready message can hold."""
        logger.error("job %s failed: %s", token, error)
        write = refusal_outcome(
            self._keys, token, str(error), self._store.now(), self._store.assets.settings.failed_ttl
        )
        with suppress(WriteRefused):  # it has ended, or another worker knows better
            await self._store.write(write)

    async def _fire(self, held: Held) -> None:
        delivery = held.delivery
        try:
            end = await self._ticker.fire(delivery, trusted=not self._is_old(held))
        except InvalidJob as problem:
            held.problem = problem
            await self._pass_on(held)
            return
        if end is TickEnd.REMOVE:
            self._discard(held)
            return
        if end is TickEnd.ACK:
            delivery.ack()
        else:
            delivery.nak(0.05)
        self._finish(held)
