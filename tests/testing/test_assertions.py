"""`assert_enqueued` and the like: what is found, and what they say when it is not."""

from datetime import UTC, date, datetime
from typing import Any

import pytest

from asyncmq_nats import InMemoryBackend, Queue, current_job, task
from asyncmq_nats.exceptions import InvalidArgument
from asyncmq_nats.runtime.registry import TaskRegistry
from asyncmq_nats.states import State
from asyncmq_nats.testing import (
    VirtualBackend,
    VirtualClock,
    assert_enqueued,
    enqueued,
    refute_enqueued,
    virtual_backend,
    worker,
)

registry = TaskRegistry()


@task(queue="mail", name="send", registry=registry)
async def send(to: str, text: str = "hi", *, on: date | None = None) -> str:
    return to


@task(queue="mail", name="fail", registry=registry, retries=1, backoff=60)
async def fail() -> None:
    raise ValueError("no")


@task(queue="mail", name="fan_out", registry=registry)
async def fan_out() -> None:
    current_job().add("send", ["child"], delay=10)


@pytest.fixture(autouse=True)
def default(clock: VirtualClock) -> Any:
    with virtual_backend(clock) as backend:
        yield backend


async def test_a_job_that_was_enqueued_is_found() -> None:
    job_id = await send.enqueue("ada")
    found = assert_enqueued(send, args=["ada"])
    assert (found.id, found.queue, found.task, found.args) == (job_id, "mail", "send", ["ada"])
    assert (found.state, found.delay, found.priority) == (State.WAITING, 0, 5)
    assert assert_enqueued("send") == found


@pytest.mark.parametrize(
    "wanted",
    [
        {"args": ["ada", "hello"]},
        {"args": ["ada"]},
        {"kwargs": {"text": "hello"}},
        {"kwargs": {"to": "ada", "text": "hello"}},
        {"args": ["ada"], "kwargs": {"on": date(2026, 1, 5)}},
        {"delay": 3600},
        {"delay": "1h"},
        {"delay": "50m", "within": "10m"},
        {"within": "1h"},
        {"queue": "mail", "priority": 2},
        {"count": 1},
        {},
    ],
    ids=str,
)
async def test_what_is_asked_for_is_compared(wanted: dict[str, Any]) -> None:
    await send.enqueue("ada", text="hello", on=date(2026, 1, 5), delay=3600, priority=2)
    assert_enqueued(send, **wanted)
    if "count" not in wanted:
        with pytest.raises(AssertionError, match="none should be"):
            refute_enqueued(send, **wanted)


@pytest.mark.parametrize(
    "wanted",
    [
        {"args": ["eve"]},
        {"args": ["ada", "bye"]},
        {"kwargs": {"text": "bye"}},
        {"kwargs": {"on": date(2026, 1, 6)}},
        {"delay": "2h"},
        {"delay": "50m"},
        {"within": "59m"},
        {"priority": 5},
        {"queue": "other"},
    ],
    ids=str,
)
async def test_what_differs_is_not_found(wanted: dict[str, Any]) -> None:
    await send.enqueue("ada", text="hello", on=date(2026, 1, 5), delay=3600, priority=2)
    refute_enqueued(send, **wanted)
    with pytest.raises(AssertionError, match="no job of task send"):
        assert_enqueued(send, **wanted)


async def test_the_error_tells_what_was_enqueued() -> None:
    await send.enqueue("ada", delay=60)
    with pytest.raises(AssertionError, match=r"(?s)args=\['eve'\].*send args=\['ada'\].*delay=60"):
        assert_enqueued(send, args=["eve"])
    with pytest.raises(AssertionError, match=r"(?s)enqueued at all:.*send args=\['ada'\]"):
        assert_enqueued(fail)


def test_the_error_tells_that_nothing_was_enqueued() -> None:
    with pytest.raises(AssertionError, match="nothing was enqueued"):
        assert_enqueued(send)
    refute_enqueued(send)


async def test_jobs_are_counted() -> None:
    for to in ("ada", "ada", "eve"):
        await send.enqueue(to)
    assert_enqueued(send, count=3)
    assert_enqueued(send, ["ada"], count=2)
    with pytest.raises(AssertionError, match="2 jobs instead of 1"):
        assert_enqueued(send, ["ada"], count=1)


async def test_a_job_that_has_run_was_enqueued(clock: VirtualClock) -> None:
    await send.enqueue("ada")
    await clock.run_until_idle()
    assert assert_enqueued(send).state is State.COMPLETED
    assert enqueued(send, state="waiting") == []
    assert [job.args for job in enqueued(send, state="completed")] == [["ada"]]


async def test_a_retry_is_the_same_job_and_its_delay_is_that_of_its_addition(
    clock: VirtualClock,
) -> None:
    await fail.enqueue()
    await clock.advance(30)
    (job,) = enqueued(fail)
    assert (job.state, job.delay, job.job.retries) == (State.DELAYED, 0, 1)
    assert job.due - clock.time() == 30
    assert_enqueued(fail, within=30)
    refute_enqueued(fail, within=29)


async def test_what_a_job_adds_is_found(clock: VirtualClock) -> None:
    await fan_out.enqueue()
    await clock.run_until_idle()
    assert_enqueued(send, args=["child"], delay=10)


async def test_a_cancelled_or_removed_job_is_not_enqueued() -> None:
    queue = Queue("mail", registry=registry)
    cancelled, removed = await send.enqueue("a", delay=60), await send.enqueue("b", delay=60)
    await queue.cancel_job(cancelled)
    await queue.remove_job(removed)
    refute_enqueued(send)
    assert [job.id for job in enqueued(send, state="cancelled")] == [cancelled]


async def test_jobs_are_listed_in_order_and_by_queue(default: VirtualBackend) -> None:
    await send.enqueue("first", delay=60)
    await Queue("other").add("send", ["second"], priority=1)
    await send.enqueue("third")
    assert [job.args for job in enqueued()] == [["first"], ["second"], ["third"]]
    assert [job.args for job in enqueued(queue="other")] == [["second"]]
    default.forget()
    assert enqueued() == []


@pytest.mark.parametrize("how", ["bulk", "job_id", "deduplication", "flow"])
async def test_every_way_to_add_a_job_is_seen(how: str) -> None:
    queue = Queue("mail", registry=registry)
    if how == "bulk":
        await queue.add_bulk([{"task_id": "send", "args": ["ada"]}])
    elif how == "job_id":
        await queue.add("send", ["ada"], job_id="one")
    elif how == "deduplication":
        await queue.add("send", ["ada"], deduplication={"id": "one", "ttl": 60})
        await queue.add("send", ["eve"], deduplication={"id": "one", "ttl": 60})
    else:
        parent = await queue.add("fail")
        await queue.add("send", ["ada"], depends_on=[parent])
    assert_enqueued(send, args=["ada"], count=1)
    assert_enqueued(send, count=1)


async def test_it_is_known_from_inside_a_running_worker(clock: VirtualClock) -> None:
    queue = Queue("mail", registry=registry)
    async with worker(queue):
        await send.enqueue("ada")
        assert_enqueued(send, args=["ada"])
        await clock.run_until_idle()
        assert_enqueued(send, args=["ada"], count=1)


def test_it_needs_a_virtual_backend() -> None:
    plain: Any = InMemoryBackend()
    with pytest.raises(InvalidArgument, match="amq_backend"):
        enqueued(backend=plain)
    with pytest.raises(InvalidArgument, match="what @task made"):
        assert_enqueued(print)  # type: ignore[arg-type]


def test_the_default_backend_is_the_one_before_after_the_block(clock: VirtualClock) -> None:
    from asyncmq_nats import default_backend

    outer = default_backend()
    with virtual_backend() as inner:
        assert default_backend() is inner
    assert default_backend() is outer
    assert clock.now() == datetime(2026, 1, 5, 12, tzinfo=UTC)
