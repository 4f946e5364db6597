"""Jobs for later: added, listed, removed, taken out, run by hand, and never early.

The tests run on both backends.
"""

import json
import math
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from types import SimpleNamespace
from typing import Any

import anyio
import pytest

from asyncmq_nats.backends.base import Backend, Delivery, Record, Settle, Write
from asyncmq_nats.backends.inmemory.consumers import InMemoryDelivery
from asyncmq_nats.backends.memory import InMemoryBackend
from asyncmq_nats.backends.nats.puller import NATSDelivery
from asyncmq_nats.calls import Call
from asyncmq_nats.context import current_job
from asyncmq_nats.exceptions import BackendError, InvalidArgument, Retry, Snooze, Unconfirmed
from asyncmq_nats.flow import FlowProducer
from asyncmq_nats.jobs import Job
from asyncmq_nats.queues import Queue
from asyncmq_nats.runtime import promoter
from asyncmq_nats.runtime.promoter import Promoter
from asyncmq_nats.settings import Settings
from asyncmq_nats.states import Place
from asyncmq_nats.store.queue_store import QueueStore
from asyncmq_nats.store.secret import QueueSecret
from asyncmq_nats.testing import VirtualBackend, VirtualClock
from asyncmq_nats.transitions.claim import Attempt
from asyncmq_nats.transitions.finish import Lifecycle
from asyncmq_nats.transitions.promote import promotion_id
from asyncmq_nats.transitions.release import Dependencies
from asyncmq_nats.wire.keys import encode_token
from tests.receiver import Receiver, holds, until
from tests.running import (
    PATIENCE,
    counted,
    has,
    make_queue,
    only,
    outcome,
    race,
    running,
    wait_until_done,
)

HOUR = 3600.0


@pytest.fixture
def settings() -> Settings:
    return Settings(stalled_after=600, publish_timeout=10, shutdown_timeout=0.1)


async def echo(value: Any = None) -> Any:
    return value


class Starts:
    """A task that notes when it starts, by the server's clock."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self.times: dict[Any, float] = {}
        self.runs = 0

    async def __call__(self, name: Any = None) -> None:
        self.times[name] = self._backend.now()
        self.runs += 1

    async def note(self, name: Any = None) -> None:
        await self(name)


@pytest.fixture
def starts(backend: Backend) -> Starts:
    return Starts(backend)


@pytest.fixture
def queue(backend: Backend, starts: Starts) -> Queue:
    return make_queue(backend, echo=echo, note=starts.note)


async def when_released(queue: Queue, job_id: str) -> None:
    """Wait until the server has released a delayed job, which it does a little early.

    A worker waits for the rest of its time. On a slow machine it may have run the job already.
    """
    key = f"$KV.amq_{queue.name}_scheduler"
    filters = f"{key}.later.{job_id}.released", f"{key}.done.{job_id}.completed"
    await until(lambda: queue.backend.last(f"KV_amq_{queue.name}_scheduler", *filters), bool)


# -- add


async def test_a_delayed_job_is_delayed_until_its_time(queue: Queue, backend: Backend) -> None:
    before = backend.now()
    job_id = await queue.add("echo", [1], delay=HOUR, retries=2, priority=3, ttl=7200)
    after = backend.now()
    assert await queue.get_job_state(job_id) == "delayed"
    job = await queue.get_job(job_id)
    assert job is not None
    assert before + HOUR <= job["delay_until"] <= after + HOUR
    assert (job["args"], job["max_retries"], job["priority"], job["ttl"]) == ([1], 2, 3, 7200)
    await counted(queue)
    assert await queue.get_job_counts("waiting", "delayed") == {
        "waiting": 0,
        "delayed": 1,
        "paused": 0,
    }


@pytest.mark.parametrize("delay", [0, 0.0, -3, -0.5, None])
async def test_no_delay_and_a_negative_one_run_now(queue: Queue, delay: float | None) -> None:
    job_id = await queue.add("echo", ["ran"], delay=delay)
    assert await queue.get_job_state(job_id) == "waiting"
    assert await queue.list_delayed() == []
    async with running(queue):
        assert await queue.wait_for(job_id, timeout=PATIENCE) == "ran"


@pytest.mark.parametrize("delay", [float("nan"), float("inf"), 1e300, "soon"])
async def test_a_delay_that_is_no_time_is_refused(queue: Queue, delay: Any) -> None:
    with pytest.raises(InvalidArgument):
        await queue.add("echo", delay=delay)
    await has(queue, 0)


@pytest.mark.parametrize("delays", [[0.01, 0.05, 0.2, 0.3], [0.4, 0.5, 0.65, 0.8]])
async def test_no_job_is_early_and_none_is_forgotten(
    queue: Queue, backend: Backend, starts: Starts, delays: list[float]
) -> None:
    due = {}
    async with running(queue):
        for delay in delays:
            now = backend.now()
            await queue.add("note", [delay], delay=delay)
            due[delay] = now + delay
        await wait_until_done(queue)
    assert starts.times.keys() == due.keys()
    # The clock of a server that is asked is exact to a part of a round trip.
    assert all(starts.times[delay] >= due[delay] - 0.01 for delay in delays)
    assert all(starts.times[delay] <= due[delay] + 2.0 for delay in delays)


async def test_a_job_whose_time_came_without_a_worker_runs_at_once(queue: Queue) -> None:
    job_id = await queue.add("echo", ["late"], delay=0.5)
    await until(lambda: queue.get_job_state(job_id), lambda state: state == "waiting")
    async with running(queue):
        assert await queue.wait_for(job_id, timeout=PATIENCE) == "late"


async def test_a_worker_that_stops_hands_on_what_is_not_due_yet(
    backend: Backend, twin: Backend
) -> None:
    starts = Starts(backend)
    queues = [make_queue(handle, note=starts.note) for handle in (backend, twin)]
    async with running(queues[0]):
        due = backend.now() + 0.6
        job_id = await queues[0].add("note", delay=0.6)
        await when_released(queues[0], job_id)
    async with running(queues[1]):
        await outcome(queues[1], job_id)
    assert starts.runs == 1
    assert starts.times[None] >= due - 0.01


async def test_delayed_jobs_run_by_time_and_not_by_age(queue: Queue, starts: Starts) -> None:
    async with running(queue):
        begun = queue.backend.now()
        for name, delay in (("third", 0.9), ("first", 0.5), ("second", 0.7)):
            await queue.add("note", [name], delay=delay)
        slow = queue.backend.now() > begun + 0.15  # the later ones may be due last
        await wait_until_done(queue)
    order = sorted(starts.times, key=starts.times.__getitem__)
    assert order == ["first", "second", "third"] or slow


async def test_a_time_to_live_counts_from_adding(queue: Queue) -> None:
    job_id = await queue.add("echo", delay=0.5, ttl=0.1)
    async with running(queue):
        assert (await outcome(queue, job_id))["status"] == "expired"


async def test_bulk_delays_many(queue: Queue, starts: Starts) -> None:
    ids = await queue.add_bulk(
        [{"task_id": "note", "args": [number], "delay": 0.6} for number in range(50)]
    )
    assert [info.job_id for info in await queue.list_delayed()] == ids
    async with running(queue):
        await wait_until_done(queue)
    assert starts.runs == len(starts.times) == 50


async def test_a_delayed_job_with_an_id_of_its_own_is_added_once(
    queue: Queue, starts: Starts
) -> None:
    for delay in (HOUR, 2 * HOUR, 0.5, None):
        assert await queue.add("note", job_id="report", delay=delay) == "report"
    await counted(queue)
    [info] = await queue.list_delayed()
    assert info.run_at < time.time() + 1.5 * HOUR
    await has(queue, 1)


# -- as dicts


async def test_a_payload_is_enqueued_for_a_time(queue: Queue, backend: Backend) -> None:
    payload, run_at = {"task_id": "echo", "args": ["p"], "id": "mine"}, backend.now() + HOUR
    assert await queue.enqueue_delayed(payload, run_at) == "mine"
    assert payload == {"task_id": "echo", "args": ["p"], "id": "mine"}
    await counted(queue)
    [info] = await queue.list_delayed()
    assert (info.job_id, info.payload["args"], info.payload["task"]) == ("mine", ["p"], "echo")
    assert info.run_at == pytest.approx(run_at)


async def test_a_payload_whose_time_is_past_runs(queue: Queue, backend: Backend) -> None:
    job_id = await queue.enqueue_delayed({"task_id": "echo", "args": ["p"]}, backend.now() - 5)
    async with running(queue):
        assert await queue.wait_for(job_id, timeout=PATIENCE) == "p"


async def test_delay_is_either_of_the_two(queue: Queue, backend: Backend) -> None:
    now = await queue.delay({"task_id": "echo"})
    later = await queue.delay({"task_id": "echo"}, backend.now() + HOUR)
    assert (await queue.get_job_state(now), await queue.get_job_state(later)) == (
        "waiting",
        "delayed",
    )


async def test_a_listed_payload_can_be_enqueued_again(queue: Queue) -> None:
    job_id = await queue.add("echo", ["again"], delay=HOUR)
    await counted(queue)
    [info] = await queue.list_delayed()
    assert await queue.remove_delayed(job_id)
    assert await queue.enqueue(info.payload | {"delay_until": None}) == job_id
    async with running(queue):
        assert await queue.wait_for(job_id, timeout=PATIENCE) == "again"


# -- look and remove


async def test_delayed_jobs_are_listed(queue: Queue, backend: Backend) -> None:
    assert await queue.list_delayed() == []
    before = backend.now()
    ids = [await queue.add("echo", [number], delay=HOUR * (number + 1)) for number in range(5)]
    await queue.add("echo")
    await counted(queue)
    listed = await queue.list_delayed()
    assert [info.job_id for info in listed] == ids
    assert [info.run_at for info in listed] == [
        pytest.approx(before + HOUR * (number + 1), abs=5) for number in range(5)
    ]
    assert [info.payload["args"] for info in listed] == [[number] for number in range(5)]
    assert all(info.payload["status"] == "delayed" for info in listed)
    assert [
        [info.job_id for info in await queue.list_delayed(limit=limit)] for limit in (0, 2, 99)
    ] == [[], ids[:2], ids]


async def test_a_job_that_waits_for_its_retry_is_listed(queue: Queue) -> None:
    job_id = await queue.add("note", [], {"unknown": 1}, retries=1, backoff=HOUR)
    async with running(queue):
        await until(lambda: queue.get_job_state(job_id), lambda state: state == "delayed")
    await counted(queue)
    [info] = await queue.list_delayed()
    assert info.payload["errors"][0]["error"].startswith("ValidationError")


async def test_a_delayed_job_is_removed_once_and_never_runs(queue: Queue, starts: Starts) -> None:
    due = queue.backend.now() + 0.6
    removed = await queue.add("note", ["removed"], delay=0.6)
    await queue.add("note", ["kept"], delay=0.7)
    gone = await queue.remove_delayed(removed)
    if queue.backend.now() >= due:
        return  # this machine was too slow: the job may not be delayed any more
    assert gone
    assert not await queue.remove_delayed(removed)
    assert await queue.get_job(removed) is None
    async with running(queue):
        await wait_until_done(queue)
    assert starts.times.keys() == {"kept"}


async def test_only_a_delayed_job_is_removed(queue: Queue) -> None:
    waiting = await queue.add("echo")
    assert not await queue.remove_delayed(waiting)
    assert not await queue.remove_delayed("missing")
    assert await queue.get_job_state(waiting) == "waiting"


# -- those that are due


async def test_due_jobs_are_taken_out(queue: Queue, backend: Backend, starts: Starts) -> None:
    at = backend.now() + 0.2
    due = await queue.add("note", ["due"], delay=0.2)
    longer = await queue.add("note", ["due, too"], delay=0.5)
    await queue.add("note", ["later"], delay=HOUR)
    taken = await queue.get_due_delayed()
    assert taken == [] or backend.now() >= at

    async def take() -> int:
        taken.extend(await queue.get_due_delayed())
        return len(taken)

    await until(take, lambda count: count == 2)
    assert [job["id"] for job in taken] == [due, longer]
    assert taken[0]["args"] == ["due"]
    assert all(job["delay_until"] <= backend.now() for job in taken)
    assert await queue.get_due_delayed() == []
    assert await queue.get_job(due) is None
    async with running(queue):
        marker = await queue.add("echo", ["on"])
        assert await queue.wait_for(marker, timeout=PATIENCE) == "on"
    assert starts.runs == 0


async def test_a_due_job_whose_removal_is_in_doubt_is_returned(
    queue: Queue, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("first", "second", "third"):
        await queue.add("note", [name], delay=0.1)
    due: list[dict[str, Any]] = []

    async def look() -> int:
        due[:] = [job.to_dict() async for job in queue._lists.read_due()]
        return len(due)

    await until(look, lambda count: count == 3)
    deleted: list[int] = []
    delete = backend.delete

    async def delete_unheard(log: str, sequence: int) -> bool:
        gone = await delete(log, sequence)
        deleted.append(sequence)
        if len(deleted) == 2:
            raise Unconfirmed("JetStream API", 0)
        return gone

    monkeypatch.setattr(backend, "delete", delete_unheard)
    assert [job["args"] for job in await queue.get_due_delayed()] == [["first"], ["second"]]
    assert [job["args"] for job in await queue.get_due_delayed()] == [["third"]]


async def test_a_job_without_a_time_is_never_due(queue: Queue) -> None:
    await queue.add("echo", job_id="mine")  # is released, too, until a worker makes it ready
    assert await queue.get_due_delayed() == []


# -- in its last moments a job is in the hands of a worker already, and yet delayed


@pytest.fixture(params=[0.3, 0.7])
async def nearly_due(request: pytest.FixtureRequest, queue: Queue) -> AsyncIterator[str]:
    """A job that a worker has in hand, and whose time is still to come."""
    async with running(queue):
        job_id = await queue.add("note", delay=request.param)
        await when_released(queue, job_id)
        yield job_id
        await queue.wait_for(await queue.add("echo", delay=request.param), timeout=PATIENCE)


async def test_a_job_that_is_nearly_due_is_delayed(queue: Queue, nearly_due: str) -> None:
    await counted(queue)
    states = [
        await queue.get_job_state(nearly_due),
        *(job["id"] for job in await queue.list_jobs("waiting")),
    ]
    listed, counts = await queue.list_delayed(), await queue.queue_stats()
    if (
        await queue.get_job_state(nearly_due) == "delayed"
    ):  # else this machine was too slow to ask in time
        assert states == ["delayed"]
        assert [info.job_id for info in listed] == [nearly_due]
        assert (counts["delayed"], counts["waiting"]) == (1, 0)


async def test_a_job_that_is_nearly_due_can_be_removed(
    queue: Queue, starts: Starts, nearly_due: str
) -> None:
    removed = await queue.remove_delayed(nearly_due)
    await queue.wait_for(await queue.add("echo", delay=0.8), timeout=PATIENCE)
    assert starts.runs == (0 if removed else 1)


async def test_a_job_that_is_nearly_due_can_be_cancelled(
    queue: Queue, starts: Starts, nearly_due: str
) -> None:
    state = await queue.get_job_state(nearly_due)
    assert await queue.cancel_job(nearly_due) or state != "delayed"
    await queue.wait_for(await queue.add("echo", delay=0.8), timeout=PATIENCE)
    assert starts.runs == 0 or state != "delayed"


async def test_a_job_that_is_nearly_due_can_be_run_now(
    queue: Queue, starts: Starts, nearly_due: str
) -> None:
    await queue.retry_job(nearly_due)
    assert (await outcome(queue, nearly_due))["status"] == "completed"
    await queue.wait_for(await queue.add("echo", delay=0.8), timeout=PATIENCE)
    assert starts.runs == 1


# -- run now


async def test_a_delayed_job_is_run_now_by_hand(queue: Queue, starts: Starts) -> None:
    job_id = await queue.add("note", ["now"], delay=HOUR)
    async with running(queue):
        assert await queue.retry_job(job_id)
        assert (await outcome(queue, job_id))["status"] == "completed"
    assert starts.runs == 1
    assert await queue.list_delayed() == []


# -- what is still where it comes from when its time comes


async def test_a_promoter_that_cannot_begin_says_so_and_ends(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue = make_queue(backend)
    await queue._assets.declare_all()

    class NoPuller:
        async def request(self, *_: Any, **__: Any) -> None:
            await anyio.sleep(0.01)
            raise BackendError("no pulls today")

        async def close(self) -> None:
            pass

    monkeypatch.setattr(backend, "puller", lambda *_, **__: NoPuller())
    with anyio.fail_after(PATIENCE), pytest.raises(BackendError, match="no pulls today"):
        await Promoter(queue._store).run()


@pytest.mark.parametrize("forgotten", [False, True])
async def test_what_reaches_a_promoter_late_is_not_made_ready_again(
    queue: Queue, backend: Backend, starts: Starts, monkeypatch: pytest.MonkeyPatch, forgotten: bool
) -> None:
    """It was on its way to a process that stood still, and is a first delivery to it.

    `forgotten`: for so long that no message id helps.
    """
    await queue._assets.declare_all()
    job_id = await queue.add("note", delay=0.01)
    (late,) = await Receiver(backend, "KV_amq_work_scheduler").pull("promoter")
    late.nak()
    if forgotten:
        monkeypatch.setattr(promoter, "TRUSTED_AGE", 0.0)
        monkeypatch.setattr(promoter, "promotion_id", lambda *_: None)
    async with running(queue):
        await queue.wait_for(job_id, timeout=PATIENCE)
        assert late.deliveries == 1
        other = Promoter(queue._store)
        async with anyio.create_task_group() as group:
            await group.start(other.run)
            other._on_delivery(late)
            await holds(lambda: not other._in_hand)
            group.cancel_scope.cancel()
        await wait_until_done(queue)
    assert starts.runs == 1


async def test_a_copy_of_a_job_that_ends_while_a_promoter_looks_at_it_is_not_made_ready(
    queue: Queue, backend: Backend
) -> None:
    """It was stored twice: its producer's first try came through after all."""
    await queue._assets.declare_all()
    looked, ended = anyio.Event(), anyio.Event()

    class SlowStore(QueueStore):
        async def last(self, *filters: str) -> list[Record]:
            found = await super().last(*filters)
            if filters[0].endswith("later.twice.released"):
                looked.set()
                await ended.wait()
            return found

    body = Job("note", job_id="twice", custom_id=True).encode()
    await backend.write("amq_work", Write("amq.work.ready.5.twice", body))
    lifecycle, attempt, delivery = await hold(queue)
    with anyio.fail_after(PATIENCE):
        async with anyio.create_task_group() as group:
            await group.start(Promoter(SlowStore.of(backend, "work")).run)
            key = "$KV.amq_work_scheduler.later.twice.released"
            await backend.write("KV_amq_work_scheduler", Write(key, body))
            await looked.wait()
            lifecycle.on_settled = lambda *_: delivery.ack()
            lifecycle.complete(attempt, None)
            await only(queue, completed=1, waiting=1)  # the record itself
            ended.set()
            await only(queue, completed=1)
            group.cancel_scope.cancel()
    assert await backend.last_sequence("amq_work") == 1


async def test_a_job_that_was_looked_at_is_made_ready_before_others_are_let_go_of(
    queue: Queue, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which takes a while: what was read would be out of date."""
    releasing, released = anyio.Event(), anyio.Event()

    async def release_slowly(*_: Any) -> None:
        releasing.set()
        await released.wait()

    async with running(queue):
        await queue.wait_for(await queue.add("note", job_id="ended"), timeout=PATIENCE)
        await wait_until_done(queue)
    monkeypatch.setattr(Dependencies, "release", release_slowly)
    jobs = [Job("note", job_id=job_id, custom_id=True) for job_id in ("ended", "fresh")]
    key = "$KV.amq_work_scheduler.later.{}.released"
    writes = [Write(key.format(job.job_id), job.encode()) for job in jobs]
    await backend.write("KV_amq_work_scheduler", *writes)
    with anyio.fail_after(PATIENCE):
        async with anyio.create_task_group() as group:
            await group.start(Promoter(queue._store).run)
            await releasing.wait()
            await until(
                lambda: backend.last("amq_work", "amq.work.ready.>"), lambda found: len(found) == 1
            )
            released.set()
            await only(queue, completed=1, waiting=1)
            group.cancel_scope.cancel()


async def test_a_record_that_was_perhaps_delivered_before_is_looked_at(
    queue: Queue, backend: Backend, starts: Starts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that was killed forgets deliveries, message ids, and now and then a removal."""
    async with running(queue):
        job_id = await queue.add("note", delay=0.01)
        await queue.wait_for(job_id, timeout=PATIENCE)
        await wait_until_done(queue)
        for kind in (InMemoryDelivery, NATSDelivery):
            monkeypatch.setattr(kind, "first", property(lambda _: False))
        body = Job("note", job_id=job_id).encode()
        key = f"$KV.amq_work_scheduler.later.{job_id}.released"
        await backend.write("KV_amq_work_scheduler", Write(key, body))
        await only(queue, completed=1)
    assert starts.runs == 1


async def test_a_promotion_that_is_not_answered_does_not_hold_up_a_stop(
    queue: Queue, backend: Backend, starts: Starts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is cut, and another promoter repeats it when the lease is over."""
    monkeypatch.setattr(promoter, "SHUTDOWN_STEP_TIMEOUT", 0.05)
    real, promoting = backend.send, anyio.Event()

    def send(log: str, write: Write, _: Settle, *, timeout: float | None = None) -> None:
        real(log, write, lambda _: promoting.set(), timeout=timeout)

    await queue._assets.declare_all()
    with anyio.fail_after(PATIENCE), monkeypatch.context() as patch:
        patch.setattr(backend, "send", send)
        async with anyio.create_task_group() as group:
            await group.start(Promoter(queue._store).run)
            await queue.add("note", delay=0.01)
            await promoting.wait()
            group.cancel_scope.cancel()
    async with running(queue):
        await until(
            lambda: backend.last("KV_amq_work_scheduler", "$KV.amq_work_scheduler.later.>"),
            lambda found: not found,
        )
        await wait_until_done(queue)
    assert starts.runs == 1


async def hold(queue: Queue) -> tuple[Lifecycle, Attempt, Delivery]:
    """Take the next job as a worker does whose acknowledgement will be slow."""
    receiver = Receiver(queue.backend, f"amq_{queue.name}")
    [delivery] = await receiver.pull("tier_5")
    lifecycle = Lifecycle(queue._store, "slow")
    attempt = lifecycle.open(delivery)
    return lifecycle, attempt, delivery


async def test_a_slow_acknowledgement_does_not_lose_a_job_that_was_put_off(
    queue: Queue, backend: Backend
) -> None:
    """A foreign producer's job whose time is near, and comes before its ready message is gone."""
    await queue._assets.declare_all()
    body = f'{{"task": "echo", "args": ["here"], "delay_until": {backend.now() + 0.2}}}'.encode()
    await backend.write("amq_work", Write("amq.work.ready.5.foreign", body))
    lifecycle, attempt, delivery = await hold(queue)
    await lifecycle.postpone(attempt)
    async with running(queue):
        with anyio.move_on_after(0.6):
            await until(
                lambda: backend.last(
                    "KV_amq_work_scheduler", "$KV.amq_work_scheduler.later.foreign.>"
                ),
                lambda found: not found,
            )
        delivery.ack()
        assert await queue.wait_for("foreign", timeout=PATIENCE) == "here"


# -- ids that a stranger must not guess


async def test_a_message_id_that_can_be_told_from_events_takes_no_job(
    queue: Queue, backend: Backend, starts: Starts
) -> None:
    """A write under the message id of a promotion makes the server drop that promotion."""
    await queue._assets.declare_all()
    ids = [await queue.add("note", [number], delay=0.6) for number in range(5)]
    for job_id in ids:
        await when_released(queue, job_id)
    released = await backend.last(
        "KV_amq_work_scheduler", "$KV.amq_work_scheduler.later.*.released"
    )
    for record in released:
        guess = f"released.{record.sequence}.{record.time}"
        await backend.write(
            "amq_work", Write(f"amq.work.ready.5.{record.sequence}", b"{}", message_id=guess)
        )
    async with running(queue):
        await wait_until_done(queue)
    assert starts.runs == 5


async def test_the_secret_of_a_queue_is_one_and_tells_nothing(
    backend: Backend, twin: Backend
) -> None:
    queue = make_queue(backend)
    await queue._assets.declare_all()
    told: list[str] = []
    subscription = await backend.subscribe("amq.>", lambda signal: told.append(signal.subject))
    secrets = [QueueSecret(QueueStore.of(handle, queue.name)) for handle in (backend, twin) * 3]
    values = await race(*(secret.get for secret in secrets))
    await subscription.unsubscribe()
    assert len(set(values)) == 1
    assert len(values[0]) >= 32
    assert [subject for subject in told if "secret" in subject] == []
    await queue.obliterate()
    assert await QueueSecret(QueueStore.of(twin, queue.name)).get() == values[0]


async def test_a_malformed_secret_is_replaced(backend: Backend) -> None:
    queue = make_queue(backend)
    await queue._assets.declare_all()
    await backend.write("KV_amq_work_scheduler", Write(queue._subjects.secret, b"1234"))
    first, second = (QueueSecret(QueueStore.of(backend, queue.name)) for _ in range(2))
    assert len(await first.get()) >= 32
    assert await second.get() == await first.get()


def test_a_promotion_id_depends_on_all_it_is_made_of() -> None:
    ids = {
        promotion_id(secret, sequence, at)
        for secret in (b"a" * 32, b"b" * 32)
        for sequence in (1, 2)
        for at in (1.0, 2.0)
    }
    assert len(ids) == 8
    assert promotion_id(b"a" * 32, 1, 1.0) in ids


# -- records that cannot be promoted


@pytest.mark.parametrize(
    "body",
    [
        b'{"v":1,"id":"',
        b"[]",
        b"null",
        b'{"task":"echo","delay_until":1e999}',
        b'{"task":"echo","priority":"urgent"}',
        b'{"task":"echo","priority":1e300}',
        b'{"task":"echo","retries":-1}',
        b'{"task":"echo","custom_id":[]}',
        b'{"task":"echo","args":[NaN],"delay_until":1}',
        b'{"task":"echo","args":' + b"[" * 195 + b"]" * 195 + b"}",
        b"\xff\xfe",
    ],
)
async def test_every_released_record_ends_in_an_outcome(
    queue: Queue, backend: Backend, body: bytes
) -> None:
    await queue._assets.declare_all()
    key = "$KV.amq_work_scheduler.later.bad.released"
    async with running(queue):
        await backend.write("KV_amq_work_scheduler", Write(key, body))
        ends = await until(
            lambda: backend.last("KV_amq_work_scheduler", "$KV.amq_work_scheduler.done.bad.*"),
            bool,
        )
        assert [record.subject.rpartition(".")[2] for record in ends] == ["failed"]
        await until(lambda: backend.last("KV_amq_work_scheduler", key), lambda found: not found)
        assert await queue.wait_for(await queue.add("echo", [1], delay=0.01)) == 1


async def test_a_job_of_one_priority_too_many_runs_all_the_same(
    queue: Queue, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    await queue._assets.declare_all()
    monkeypatch.setattr("asyncmq_nats.store.topology.MAX_TIERS", 1)
    body = b'{"task":"echo","args":["ran"],"priority":7}'
    async with running(queue):
        await backend.write(
            "KV_amq_work_scheduler", Write("$KV.amq_work_scheduler.later.one.released", body)
        )
        assert (await outcome(queue, "one"))["result"] == "ran"


@pytest.mark.parametrize(
    ("transit", "wait"), [(0.0, 0.3), (0.02, 0.28), (0.5, 0.25), (-0.1, 0.3), (-math.inf, 0.3)]
)
def test_the_time_in_transit_of_a_fresh_record_is_subtracted(
    monkeypatch: pytest.MonkeyPatch, settings: Settings, transit: float, wait: float
) -> None:
    """Only up to a bound: a longer one is a difference of clocks."""
    backend = InMemoryBackend(settings)
    released_at = backend.now() - 0.05
    monkeypatch.setattr(backend, "now_at_least", lambda: released_at + transit)
    delivery: Any = SimpleNamespace(deliveries=1, time=released_at)
    promoter = Promoter(make_queue(backend)._store)
    assert promoter._wait(delivery, released_at + 0.3) == pytest.approx(wait, abs=1e-4)


def test_a_record_that_was_delivered_before_waits_by_the_earliest_time(
    monkeypatch: pytest.MonkeyPatch, settings: Settings
) -> None:
    backend = InMemoryBackend(settings)
    released_at = backend.now() - 0.2
    monkeypatch.setattr(backend, "now_at_least", lambda: released_at + 0.1)
    delivery: Any = SimpleNamespace(deliveries=2, time=released_at)
    made = Promoter(make_queue(backend)._store)
    assert made._wait(delivery, released_at + 0.3) == pytest.approx(0.2, abs=1e-4)


def test_a_pause_while_a_record_is_looked_at_makes_no_job_early(
    monkeypatch: pytest.MonkeyPatch, settings: Settings
) -> None:
    """The time to wait counts from the moment for which it was found, or a later one."""
    passed = 0.0

    def read() -> float:
        nonlocal passed
        passed += 0.01  # another program has the processor
        return passed

    for name in ("now", "now_at_least"):
        monkeypatch.setattr(InMemoryBackend, name, lambda _: read())
    made = Promoter(make_queue(InMemoryBackend(settings))._store)
    monkeypatch.setattr(made, "_monotonic", read)
    body = Job("echo", delay_until=0.3).encode()
    key = made._keys.later("one", Place.RELEASED)
    delivery: Any = SimpleNamespace(
        subject=key, body=body, sequence=1, deliveries=1, first=True, time=0.0
    )
    made._on_delivery(delivery)
    [(_, _, held)] = made._waiting
    assert 0.3 <= held.due < 0.35


def echo_late(delay: float) -> str:
    """Add a job that runs later, as a task."""
    return current_job().add("echo", [1], delay=delay)


def fail() -> None:
    raise ValueError("no")


def snooze(seconds: float) -> None:
    raise Snooze(seconds)


def retry(seconds: float) -> None:
    raise Retry("later", after=seconds)


LATER: dict[str, Callable[[Queue], Awaitable[Any]]] = {
    "add": lambda queue: queue.add("echo", delay=60),
    "bulk": lambda queue: queue.add_bulk([{"task_id": "echo", "args": ["x", [1]], "delay": 60}]),
    "series": lambda queue: queue.add_bulk([{"task_id": "echo", "args": [1], "delay": 60}] * 2),
    "call": lambda queue: queue.add_call(call_of("echo", delay=60)),
    "calls": lambda queue: queue.add_bulk([call_of("echo", delay=60)]),
    "flow": lambda queue: FlowProducer(queue.backend).add_flow(
        queue.name, [call_of("echo", delay=60)]
    ),
    "follow-up": lambda queue: queue.add("echo_late", [60]),
    "retry": lambda queue: queue.add("retry", [60], retries=1),
    "backoff": lambda queue: queue.add("fail", retries=1, backoff=60),
    "snooze": lambda queue: queue.add("snooze", [60]),
    "again": lambda queue: queue.add("echo", repeat_every=60),
}


def call_of(name: str, **options: Any) -> Call[Any]:
    return Call(name, "work", (), {}, options)


@pytest.fixture
def behind(monkeypatch: pytest.MonkeyPatch, settings: Settings) -> InMemoryBackend:
    """A backend whose idea of the time may be five seconds behind the server's clock."""
    backend = InMemoryBackend(settings)
    monkeypatch.setattr(backend, "now_at_most", lambda: backend.now() + 5)
    return backend


@pytest.mark.parametrize("how", LATER)
async def test_a_delay_counts_from_the_latest_time_that_it_may_be(
    behind: InMemoryBackend, how: str
) -> None:
    queue = make_queue(
        behind, echo=lambda *_: 1, fail=fail, echo_late=echo_late, snooze=snooze, retry=retry
    )
    before = behind.now()
    await LATER[how](queue)
    async with running(queue):
        jobs = await until(queue.list_delayed, bool)
    assert all(65 <= job.run_at - before < 65 + PATIENCE for job in jobs)


async def test_so_does_the_time_until_an_unknown_task_is_looked_for_again(
    behind: InMemoryBackend,
) -> None:
    queue, before = make_queue(behind, echo=echo), behind.now()
    await queue.add("unknown")
    async with running(queue):
        [job] = await until(queue.list_delayed, bool)
    assert job.run_at - before >= 5


async def test_so_does_the_window_of_a_deduplication(behind: InMemoryBackend) -> None:
    queue, before = make_queue(behind, echo=echo), behind.now()
    await queue.add("echo", deduplication={"id": "key", "ttl": 60})
    key = queue._store.keys.deduplication(encode_token("key"))
    [record] = await behind.last("KV_amq_work_scheduler", key)
    assert 65 <= json.loads(record.body)["until"] - before < 65 + PATIENCE


async def test_the_time_that_the_server_has_reached_at_least_is_not_ahead_of_its_clock(
    backend: Backend,
) -> None:
    """The server of the tests has the clock of this machine."""
    await backend.connect()
    await make_queue(backend, echo=echo).add("echo")
    for _ in range(50):
        at_least = backend.now_at_least()
        assert time.time() - 5 < at_least <= time.time() + 0.001
        assert at_least <= backend.now()


class Burst:
    """Jobs that are due at one instant, and what a worker does with them, by a virtual clock."""

    def __init__(self, backend: VirtualBackend, clock: VirtualClock) -> None:
        self.clock, self.starts = clock, list[float]()
        self.ready, self.due = list[float](), clock.time() + 5
        self.queue = make_queue(backend, concurrency=4, note=self._note)
        self._send = backend.send
        backend.send = self._send_noted  # type: ignore[method-assign]

    async def _note(self) -> None:
        self.starts.append(self.clock.time())

    def _send_noted(self, log: str, write: Write, settle: Settle, **options: Any) -> None:
        if ".ready." in write.subject:
            self.ready.append(self.clock.time())
        self._send(log, write, settle, **options)

    async def add(self, count: int) -> list[str]:
        return await self.queue.add_bulk([{"task_id": "note", "delay": 5}] * count)


@pytest.mark.parametrize(("jobs", "lead"), [(15, 0.0), (40, 0.008), (400, 0.04)])
async def test_the_jobs_of_a_burst_are_made_ready_early_and_start_in_time(
    jobs: int, lead: float
) -> None:
    clock = VirtualClock(1_767_614_400)
    async with VirtualBackend(clock) as backend:
        burst = Burst(backend, clock)
        ids = await burst.add(jobs)
        async with running(burst.queue):
            await clock.advance(6)
        assert burst.due - min(burst.ready) == pytest.approx(lead, abs=1e-4)
        assert len(burst.starts) == jobs
        assert burst.due <= min(burst.starts) <= burst.due + 1e-4
        job = await burst.queue.get_job(ids[0])
        assert job is not None
        assert (job["delay_until"], job["status"]) == (None, "completed")


async def test_a_queue_with_a_rate_limit_makes_none_ready_early() -> None:
    """A start counts when the job is taken."""
    clock = VirtualClock(1_767_614_400)
    async with VirtualBackend(clock) as backend:
        burst = Burst(backend, clock)
        burst.queue.rate_limit = 40
        await burst.add(40)
        async with running(burst.queue):
            await clock.advance(8)
        assert min(burst.ready) >= burst.due
        assert len(burst.starts) == 40


async def test_while_jobs_wait_in_all_slots_as_many_more_are_fetched() -> None:
    clock = VirtualClock(1_767_614_400)
    async with VirtualBackend(clock) as backend:
        burst = Burst(backend, clock)
        await burst.add(40)
        async with running(burst.queue) as worker:
            await clock.advance(4.999)
            assert worker._runner is not None
            fetcher = worker._runner._fetcher
            assert (fetcher.busy, len(fetcher._buffer.heap), burst.starts) == (4, 4, [])
            await clock.advance(1)
            assert len(burst.starts) == 40


@pytest.mark.parametrize("what", ["cancel", "pause"])
async def test_a_job_that_waits_in_a_slot_for_its_time_can_be_cancelled_and_paused(
    what: str,
) -> None:
    clock = VirtualClock(1_767_614_400)
    async with VirtualBackend(clock) as backend:
        burst = Burst(backend, clock)
        ids = await burst.add(40)
        async with running(burst.queue) as worker:
            await clock.advance(4.999)
            assert worker._runner is not None
            [held, *_] = worker._runner._slots._early
            if what == "cancel":
                assert await burst.queue.cancel_job(held)
            else:
                await burst.queue.pause()
            await clock.advance(1)
            if what == "cancel":
                assert len(burst.starts) == 39
                assert await burst.queue.get_job_state(held) == "cancelled"
            else:
                assert burst.starts == []
                await burst.queue.resume()
                await clock.advance(1)
                assert len(burst.starts) == 40
        assert held in ids
        await only(
            burst.queue,
            **Counter(["completed"] * 39 + ["cancelled" if what == "cancel" else "completed"]),
        )


async def test_a_ready_job_whose_time_is_near_waits_in_its_slot(
    queue: Queue, backend: Backend, starts: Starts
) -> None:
    """Also one of a foreign producer."""
    await queue._assets.declare_all()
    run_at = backend.now_at_most() + 0.04
    body = f'{{"task": "note", "id": "near", "delay_until": {run_at}}}'.encode()
    await backend.write("amq_work", Write("amq.work.ready.5.near", body))
    async with running(queue):
        await queue.wait_for("near", timeout=PATIENCE)
    assert starts.times[None] >= run_at
    assert await backend.last_sequence("amq_work") == 1


@pytest.mark.parametrize(("jobs", "later"), [(3, 0.0), (40, 0.012)])
async def test_the_jobs_of_a_burst_start_before_their_records_are_removed(
    monkeypatch: pytest.MonkeyPatch, jobs: int, later: float
) -> None:
    clock = VirtualClock(1_767_614_400)
    async with VirtualBackend(clock) as backend:
        queue = make_queue(backend, echo=echo)
        removals, delete_many = list[tuple[float, int]](), backend.delete_many

        async def note(log: str, sequences: Sequence[int]) -> list[int]:
            removals.append((clock.time(), len(sequences)))
            return await delete_many(log, sequences)

        monkeypatch.setattr(backend, "delete_many", note)
        due = clock.time() + 5
        await queue.add_bulk([{"task_id": "echo", "delay": 5}] * jobs)
        async with running(queue):
            await clock.advance(6)
        assert [(round(at - due, 3), count) for at, count in removals] == [(later, jobs)]
