"""Two programs act on one job at a time, in every interleaving, on both backends."""

import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import anyio
import pytest

from asyncmq_nats._arguments import build_addition
from asyncmq_nats.backends.base import Backend, Consumer, Record, Settle, Settled, Write
from asyncmq_nats.exceptions import WriteRefused
from asyncmq_nats.jobs import Job
from asyncmq_nats.queues import Queue
from asyncmq_nats.retries import Failure
from asyncmq_nats.runtime.promoter import Promoter
from asyncmq_nats.settings import Settings
from asyncmq_nats.states import Place
from asyncmq_nats.store.snapshot import Snapshot
from asyncmq_nats.transitions.claim import Attempt, Claim, Disposition
from asyncmq_nats.transitions.finish import Lifecycle
from asyncmq_nats.transitions.promote import Released
from asyncmq_nats.wire.codec import dump_json, load_json
from asyncmq_nats.wire.keys import encode_token
from tests.passing import pass_time
from tests.receiver import Receiver, holds, until
from tests.running import PATIENCE, make_queue, outcome, result, run_jobs, running, wait_until_done

VIRTUAL_TIME = True

BUCKET = "KV_amq_work_scheduler"
READY = "amq_work"
Finish = Callable[[Snapshot, int], Awaitable[None]]


@pytest.fixture
def settings() -> Settings:
    return Settings(stalled_after=1.0, publish_timeout=10, shutdown_timeout=5)


async def echo(value: Any = None) -> Any:
    return value


async def fail() -> None:
    raise ValueError("no")


@pytest.fixture
def queue(backend: Backend) -> Queue:
    return make_queue(backend, echo=echo, fail=fail)


async def live(queue: Queue, pattern: str) -> list[Record]:
    return [record for record in await queue.backend.last(BUCKET, pattern) if not record.marker]


# -- a tier is made while the queue is paused or resumed


@pytest.mark.parametrize("paused_before", [True, False])
async def test_a_tier_that_is_made_while_a_pause_begins_or_ends(
    paused_before: bool, queue: Queue, twin: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = make_queue(twin)
    await other._assets.declare_all()
    if paused_before:
        await other.pause()
    real = queue.backend.declare_consumer

    async def declare(log: str, consumer: Consumer) -> None:
        if consumer.name == "tier_7":
            await (other.resume() if paused_before else other.pause())
        await real(log, consumer)

    monkeypatch.setattr(queue.backend, "declare_consumer", declare)
    job_id = await queue.add("echo", ["ran"], priority=7)
    state = await twin.look_up(READY, "tier_7")
    assert state is not None
    assert state.paused is not paused_before
    if not paused_before:
        await other.resume()
    async with running(queue):
        assert await result(queue, job_id) == "ran"


# -- a cancellation is not over yet when the job is retried by hand


def retry_before_the_end_of_cancellation(queue: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    finish: Finish = queue._administration._finish_cancellation

    async def retried_first(snapshot: Snapshot, reruns: int) -> None:
        monkeypatch.setattr(queue._administration, "_finish_cancellation", finish)
        assert await queue.retry_job(snapshot.token)
        await finish(snapshot, reruns)

    monkeypatch.setattr(queue._administration, "_finish_cancellation", retried_first)


@pytest.mark.parametrize("fields", [{}, {"delay": 3600}, {"job_id": "mine"}])
@pytest.mark.parametrize("awaited", [False, True])
async def test_a_retry_by_hand_outlives_the_end_of_the_cancellation(
    fields: dict[str, Any], awaited: bool, queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = await queue.add("echo", ["ran"], **fields)
    child = await queue.add("echo", ["child"], depends_on=[job_id]) if awaited else None
    retry_before_the_end_of_cancellation(queue, monkeypatch)
    assert await queue.cancel_job(job_id)
    async with running(queue):
        assert await result(queue, job_id) == "ran"
        if child is not None:
            assert await result(queue, child) == "child"


async def test_a_run_after_a_retry_by_hand_is_not_ended_by_the_signal_of_the_cancellation(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[anyio.Event] = [anyio.Event(), anyio.Event()]
    opened, runs = anyio.Event(), list[int]()

    async def work() -> str:
        runs.append(len(runs))
        started[min(len(runs), 2) - 1].set()
        await opened.wait()
        return "ran"

    queue = make_queue(backend, work=work)
    job_id = await queue.add("work")
    signal = queue._controls.signal_cancel

    async def late(job_id: str) -> None:
        """Tell the workers twice: the second time, the retry is running."""
        await signal(job_id)
        assert await queue.retry_job(job_id)
        with anyio.fail_after(PATIENCE):
            await started[1].wait()
        await signal(job_id)

    monkeypatch.setattr(queue._controls, "signal_cancel", late)
    async with running(queue):
        with anyio.fail_after(PATIENCE):
            await started[0].wait()
        assert await queue.cancel_job(job_id)
        opened.set()
        assert await result(queue, job_id) == "ran"


@pytest.mark.parametrize("fields", [{}, {"delay": 3600}])
async def test_a_cancellation_whose_confirmation_was_lost_is_one(
    fields: dict[str, Any], queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = await queue.add("echo", **fields)
    real, lost = queue.backend.write, list[str]()

    async def write(log: str, *writes: Write) -> int:
        sequence = await real(log, *writes)
        if not lost:
            lost.append(log)
            raise WriteRefused(log, "the repetition of what was stored")
        return sequence

    monkeypatch.setattr(queue.backend, "write", write)
    assert await queue.cancel_job(job_id)
    assert lost
    assert await queue.get_job_state(job_id) == "cancelled"
    assert await queue.backend.last(READY, "amq.work.ready.*.*") == []
    assert await live(queue, "$KV.amq_work_scheduler.later.>") == []
    assert await queue.cancel_job(job_id) is False


async def test_a_job_that_is_made_ready_while_it_is_cancelled_does_not_run(
    backend: Backend, twin: Backend
) -> None:
    """The promoter has it in hand, and does not look again."""
    runs: list[int] = []
    queue, canceller = make_queue(backend, note=lambda: runs.append(1)), make_queue(twin)
    real, caught = backend.send, list[Callable[[], None]]()
    promoting = anyio.Event()

    def send(log: str, write: Write, settle: Settle, *, timeout: float | None = None) -> None:
        if log == READY and not caught:
            caught.append(partial(real, log, write, settle, timeout=timeout))
            promoting.set()
        else:
            real(log, write, settle, timeout=timeout)

    job_id = await queue.add("note", delay=0.01)
    await queue.pause()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "send", send)
        async with running(queue):
            await holds(promoting.is_set)
            assert await canceller.cancel_job(job_id)
            caught[0]()
            await until(lambda: queue.get_job_state(job_id), lambda state: state == "cancelled")
            await until(lambda: backend.last_sequence(READY), lambda sequence: sequence > 0)
            await until(lambda: backend.last(READY, "amq.work.ready.*.*"), lambda ready: not ready)
            await queue.resume()
            assert await result(queue, await queue.add("note")) is None
    assert runs == [1]


# -- a worker was frozen while another one took its job over


@dataclass
class Frozen:
    """An attempt that another worker has taken over, and its worker."""

    lifecycle: Lifecycle
    attempt: Attempt

    async def says(self, what: str) -> Disposition | None:
        """Have it end in that way now; return what it is told, `None` if it stored its end."""
        told: list[tuple[Attempt, Write, Settled]] = []
        self.lifecycle.on_settled = lambda *end: told.append(end)
        failure = Failure("ValueError: frozen", "", time.time())
        if what == "hands back":
            await self.lifecycle.hand_back(self.attempt)
            return None
        if what == "succeeds":
            self.lifecycle.complete(self.attempt, "frozen")
        elif what == "fails":
            await self.lifecycle.fail(self.attempt, failure)
        else:
            await self.lifecycle.retry(self.attempt, failure, 3600.0)
        await holds(lambda: bool(told))  # the backend calls back
        ((_, write, result),) = told
        return (
            await self.lifecycle.settled(self.attempt, write, result)
            if isinstance(result, WriteRefused)
            else None
        )


async def taken_over(queue: Queue) -> tuple[Frozen, Lifecycle, Attempt]:
    """Have a job's lease run out at one worker, and return that one and the one that has it now."""
    first, second = Receiver(queue.backend, READY, extend=False), Receiver(queue.backend, READY)
    [delivery] = await first.pull("tier_5")
    [again] = await second.pull("tier_5")
    assert again.deliveries == 2
    frozen = Lifecycle(queue._store, "frozen")
    other = Lifecycle(queue._store, "other")
    attempt = await other.verify(other.open(again))
    assert isinstance(attempt, Attempt)
    return Frozen(frozen, frozen.open(delivery)), other, attempt


WORDS = ["succeeds", "fails", "asks for a retry", "hands back"]


@pytest.mark.parametrize("what", WORDS)
async def test_a_frozen_worker_has_no_say_after_a_retry(what: str, queue: Queue) -> None:
    job_id = await queue.add("echo", ["ran"], retries=3)
    frozen, other, attempt = await taken_over(queue)
    await other.retry(attempt, Failure("ValueError: no", "", time.time()), 0.6)
    attempt.delivery.ack()
    assert await frozen.says(what) in (Disposition.ABANDON, None)
    async with running(queue):
        assert await result(queue, job_id) == "ran"
        await wait_until_done(queue)
    job = await queue.get_job(job_id)
    assert job is not None
    assert (len(job["errors"]), job["errors"][0]["error"], job["stalls"]) == (
        1,
        "ValueError: no",
        0,
    )
    assert await live(queue, queue._subjects.claim(encode_token(job_id))) == []


@pytest.mark.parametrize("what", WORDS)
async def test_a_frozen_worker_has_no_say_after_a_retry_by_hand(what: str, queue: Queue) -> None:
    job_id = await queue.add("echo", ["ran"])
    frozen, other, attempt = await taken_over(queue)
    await other.fail(attempt, Failure("ValueError: no", "", time.time()))
    attempt.delivery.ack()
    assert await queue.retry_job(job_id)
    assert await frozen.says(what) in (Disposition.ACK, None)
    async with running(queue):
        assert await result(queue, job_id) == "ran"
        await wait_until_done(queue)
    assert await live(queue, queue._subjects.claim(encode_token(job_id))) == []


async def test_an_outcome_that_is_sent_again_does_not_undo_a_retry_by_hand(queue: Queue) -> None:
    job_id = await queue.add("echo", ["ran"])
    [delivery] = await Receiver(queue.backend, READY).pull("tier_5")
    lifecycle = Lifecycle(queue._store, "worker")
    attempt = lifecycle.open(delivery)
    sent: list[Write] = []
    lifecycle.on_settled = lambda _, write, __: sent.append(write)
    await lifecycle.fail(attempt, Failure("ValueError: no", "", time.time()))
    assert await queue.retry_job(job_id)
    with pytest.raises(WriteRefused) as refused:  # its confirmation was lost
        await queue.backend.write(BUCKET, sent[0])
    assert await lifecycle.settled(attempt, sent[0], refused.value) is Disposition.ACK, (
        "its message may go: the job has begun again"
    )
    delivery.ack()
    async with running(queue):
        assert await result(queue, job_id) == "ran"


async def test_a_job_that_was_retried_by_hand_is_handed_back_at_once(queue: Queue) -> None:
    """The claim that a retry leaves is void for the new message."""
    job_id = await queue.add("fail")
    await run_jobs(queue)
    assert await queue.retry_job(job_id)
    async with running(queue):
        await wait_until_done(queue)
    assert await queue.retry_job(job_id)
    async with anyio.create_task_group() as group:
        promoter = queue.runner()
        await group.start(promoter.run)
        await outcome(queue, job_id)
        promoter.stop()
    job = await queue.get_job(job_id)
    assert job is not None
    assert (job["status"], job["stalls"]) == ("failed", 0)


# -- what is left behind


@pytest.mark.parametrize("end", ["hand-back", "retry", "retry by hand"])
async def test_a_claim_that_outlasts_its_attempt_goes_in_time(
    end: str, queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("transitions.cancel", "transitions.deliver"):
        monkeypatch.setattr(f"asyncmq_nats.{module}.CLAIM_TTL", 1.0)
    job_id, failure = await queue.add("fail"), Failure("ValueError: no", "", time.time())
    if end == "retry by hand":
        await run_jobs(queue)
        assert await queue.retry_job(job_id)
    else:
        _, other, attempt = await taken_over(queue)
        if end == "retry":
            await other.retry(attempt, failure, 3600.0)
        else:
            await other.hand_back(attempt)
    assert await live(queue, queue._subjects.claim(job_id)) != []
    await until(lambda: live(queue, queue._subjects.claim(job_id)), lambda found: not found)


@pytest.mark.parametrize("released", [True, False])
async def test_a_claim_without_its_job_is_no_job(released: bool, queue: Queue) -> None:
    await queue._assets.declare_all()
    await queue.backend.write(
        BUCKET, Write(queue._subjects.claim("mine"), Claim("gone", 0, 1, 0, released).encode())
    )
    assert await queue.remove_job("mine") is False
    await queue.backend.write(
        BUCKET, Write(queue._subjects.claim("mine"), Claim("gone", 0, 1, 0, released).encode())
    )
    assert await queue.add("echo", ["ran"], job_id="mine") == "mine"
    async with running(queue):
        assert await result(queue, "mine") == "ran"


@pytest.mark.parametrize("left", ["edge", "claim", "both"])
async def test_what_is_not_a_job_ends_as_failed_whatever_is_there(left: str, queue: Queue) -> None:
    await queue._assets.declare_all()
    subjects = queue._subjects
    if left != "claim":
        child = build_addition(
            queue.backend.now(),
            task_id="echo",
            args=["child"],
            depends_on=["bad"],
            on_parent_failure="run",
            job_id="child",
        )
        await queue.backend.write(BUCKET, Write(subjects.edge("bad", "child"), b"{}"))
        await queue.backend.write(
            BUCKET, Write("$KV.amq_work_scheduler.later.child.parked", _with_parent(child.encode()))
        )
    if left != "edge":
        await queue.backend.write(
            BUCKET, Write(subjects.claim("bad"), Claim("gone", 1, 1, 0).encode())
        )
    await queue.backend.write(READY, Write("amq.work.ready.5.bad", b"no job"))
    async with running(queue):
        job = await outcome(queue, "bad")
        if left != "claim":
            assert await result(queue, "child") == "child"
    assert job["status"] == "failed"
    assert "not a job of the wire format" in job["last_error"]
    assert await queue.backend.last(READY, "amq.work.ready.*.*") == []
    assert await live(queue, subjects.claim("bad")) == []


def _with_parent(body: bytes) -> bytes:
    return body[:-1] + b',"parents":["bad"]}'


async def test_a_job_that_fails_at_once_does_not_end_one_that_has_ended(
    queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two producers with one id.

    What the slower one would write was made before the faster one's job ran.
    """
    parent = await queue.add("fail")
    await run_jobs(queue)
    links = queue._additions.plans.links
    real = links.park
    faster = make_queue(queue.backend, echo=echo)

    async def slow(job: Job, last: int) -> int:
        monkeypatch.setattr(links, "park", real)
        assert await faster.add("echo", ["ran"], job_id="mine") == "mine"
        await run_jobs(faster)
        return await real(job, last)

    monkeypatch.setattr(links, "park", slow)
    assert (
        await queue.add("echo", job_id="mine", depends_on=[parent], on_parent_failure="fail")
        == "mine"
    )
    records = await live(queue, "$KV.amq_work_scheduler.done.mine.>")
    assert [record.subject.rpartition(".")[2] for record in records] == ["completed"]


# -- removing and cleaning


async def test_a_job_that_is_made_ready_while_it_is_removed_is_removed(
    queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = await queue.add("echo", job_id="mine")  # released, and no worker that makes it ready
    real = queue.backend.delete

    async def delete(log: str, sequence: int) -> bool:
        if log == BUCKET:
            monkeypatch.setattr(queue.backend, "delete", real)
            (record,) = await queue.backend.last(BUCKET, f"$KV.amq_work_scheduler.later.{job_id}.>")
            await queue.backend.write(READY, Write(f"amq.work.ready.5.{job_id}", record.body))
        return await real(log, sequence)

    monkeypatch.setattr(queue.backend, "delete", delete)
    assert await queue.remove_job(job_id) is True
    assert await queue.get_job(job_id) is None
    assert await queue.backend.last(READY, "amq.work.ready.*.*") == []


async def test_an_outcome_that_comes_while_old_ones_are_cleaned_stays(
    queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = await queue.add("echo")
    await run_jobs(queue)
    real = queue.backend.purge

    async def purge(log: str, filter: str, *, before: int | None = None) -> int:
        if not await queue.get_job("young"):
            await queue.add("echo", job_id="young")
            await run_jobs(queue)
        return await real(log, filter, before=before)

    monkeypatch.setattr(queue.backend, "purge", purge)
    await pass_time(0.02)
    await queue.clean("completed", queue.backend.now())
    assert await queue.get_job(old) is None
    assert await queue.get_job_state("young") == "completed"
    await until(queue.queue_stats, lambda stats: stats["completed"] == 1)


async def test_junk_beside_a_job_that_is_delivered_again_does_not_end_it(queue: Queue) -> None:
    job_id = await queue.add("echo", ["ran"])
    first = Receiver(queue.backend, READY, extend=False)
    await first.pull("tier_5")
    await queue.backend.write(
        BUCKET, Write(f"$KV.amq_work_scheduler.later.{job_id}.delayed", b"junk")
    )
    async with running(queue):
        assert await result(queue, job_id) == "ran"


async def test_a_job_that_was_put_off_outlives_the_message_from_which_it_was(
    queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its worker was lost before the ack: a redelivery tells, as the promoter finds the message."""
    await queue._assets.declare_all()
    job_id = await queue.add("echo", ["still here"])
    (delivery,) = await Receiver(queue.backend, READY).pull("tier_5")
    put_off = dump_json(load_json(delivery.body) | {"put_offs": 1})
    released = queue._subjects.later(encode_token(job_id), Place.RELEASED)
    await queue.backend.write(BUCKET, Write(released, put_off))
    judged: list[bool] = []
    judge = Promoter._is_older_there

    async def note(self: Promoter, released: Released) -> bool:
        judged.append(await judge(self, released))
        return judged[-1]

    monkeypatch.setattr(Promoter, "_is_older_there", note)
    async with running(queue):
        await holds(lambda: bool(judged))
        delivery.ack()
        assert await result(queue, job_id) == "still here"
    assert judged[0]
