"""Every promise of `Queue` about adding jobs and looking at them, on both backends."""

import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, date, datetime
from decimal import Decimal
from enum import Enum
from functools import partial
from typing import Any
from uuid import UUID

import anyio
import pytest
from pydantic import BaseModel

from asyncmq_nats.backends import default_backend, set_default_backend
from asyncmq_nats.backends.base import Backend, Record, Signal, Write
from asyncmq_nats.backends.inmemory import InMemoryBackend
from asyncmq_nats.exceptions import (
    BulkAddFailed,
    InvalidArgument,
    InvalidJob,
    InvalidJobId,
    InvalidQueueName,
    JobFailed,
    JobNotFound,
    NotSerializable,
    PayloadTooLarge,
)
from asyncmq_nats.jobs import Job
from asyncmq_nats.queues import Queue
from asyncmq_nats.states import State
from tests.receiver import until
from tests.running import (
    PATIENCE,
    Unsent,
    counted,
    has,
    make_queue,
    only,
    outcome,
    race,
    run_jobs,
    running,
    wait_until_done,
)

EMPTY = {
    "waiting": 0,
    "active": 0,
    "delayed": 0,
    "waiting-children": 0,
    "completed": 0,
    "failed": 0,
    "expired": 0,
    "cancelled": 0,
}


async def echo(value: Any = None, **more: Any) -> Any:
    return {"value": value, **more} if more else value


async def fail(message: str = "no") -> None:
    raise ValueError(message)


class Gate:
    """A task that says when it has started and ends when it is let go."""

    def __init__(self) -> None:
        self.started = anyio.Event()
        self.opened = anyio.Event()
        self.runs = 0

    async def __call__(self) -> str:
        self.runs += 1
        self.started.set()
        await self.opened.wait()
        return "through"

    async def pass_through(self) -> str:
        return await self()


@pytest.fixture
def gate() -> Gate:
    return Gate()


@pytest.fixture
def queue(backend: Backend, gate: Gate) -> Queue:
    return make_queue(backend, echo=echo, fail=fail, gate=gate.pass_through)


async def add_foreign(queue: Queue, body: bytes, token: str = "foreign") -> None:
    """Add a job as a client without this library does."""
    await queue._assets.declare_all()  # declares what there is to declare
    await queue.backend.write(f"amq_{queue.name}", Write(f"amq.{queue.name}.ready.5.{token}", body))


# -- making one


def test_making_a_queue_does_no_io() -> None:
    queue = Queue("work", InMemoryBackend())
    assert (
        queue.name,
        queue.concurrency,
        queue.rate_limit,
        queue.rate_interval,
        queue.scan_interval,
    ) == ("work", 3, None, 1.0, 1.0)


@pytest.mark.parametrize("name", ["", "a.b", "a b", "a:b", "x" * 65, "*"])
def test_a_name_that_no_stream_can_have_is_refused(name: str) -> None:
    with pytest.raises(InvalidQueueName):
        Queue(name, InMemoryBackend())


def test_a_queue_without_a_backend_takes_the_default_one() -> None:
    backend = InMemoryBackend()
    set_default_backend(backend)
    try:
        assert Queue("work").backend is backend
        assert default_backend() is backend
    finally:
        set_default_backend(None)


async def test_queues_are_kept_apart(backend: Backend) -> None:
    one, other = make_queue(backend, "one", echo=echo), make_queue(backend, "one_more", echo=echo)
    job_id = await one.add("echo")
    assert await other.get_job(job_id) is None
    await only(other)
    await run_jobs(other)
    assert await one.get_job_state(job_id) == "waiting"


# -- add


async def test_a_job_that_was_added_runs(queue: Queue) -> None:
    job_id = await queue.add("echo", [1], {"more": 2})
    assert str(UUID(job_id)) == job_id
    async with running(queue):
        assert await queue.wait_for(job_id, timeout=PATIENCE) == {"value": 1, "more": 2}


async def test_a_job_keeps_what_it_was_added_with(queue: Queue) -> None:
    before = queue.backend.now()
    job_id = await queue.add("echo", (1, 2), {"a": []}, retries=2, ttl=60, backoff=1.5, priority=-7)
    job = await queue.get_job(job_id)
    assert job is not None
    assert {
        name: job[name]
        for name in (
            "id",
            "task",
            "args",
            "kwargs",
            "retries",
            "max_retries",
            "ttl",
            "backoff",
            "priority",
        )
    } == {
        "id": job_id,
        "task": "echo",
        "args": [1, 2],
        "kwargs": {"a": []},
        "retries": 0,
        "max_retries": 2,
        "ttl": 60,
        "backoff": 1.5,
        "priority": -7,
    }
    assert job["status"] == "waiting"
    assert before <= job["created_at"] <= queue.backend.now()


async def test_a_job_may_be_added_before_any_worker_has_run(queue: Queue, gate: Gate) -> None:
    gate.opened.set()
    job_ids = [await queue.add(task) for task in ("echo", "gate")]
    await run_jobs(queue)
    assert [await queue.get_job_result(job_id) for job_id in job_ids] == [None, "through"]


class Colour(Enum):
    RED = "red"


@dataclass
class Point:
    x: int
    y: int


class Person(BaseModel):
    name: str
    born: date


@pytest.mark.parametrize(
    ("result", "stored"),
    [
        (None, None),
        (True, True),
        (0, 0),
        (2**100, 2**100),
        (1.5, 1.5),
        ("ÿ日😀\u2028\x00", "ÿ日😀\u2028\x00"),
        ([], []),
        ({}, {}),
        ({"a": [[], {}, None]}, {"a": [[], {}, None]}),
        ((1, 2), [1, 2]),
        ({3}, [3]),
        (datetime(2026, 1, 2, tzinfo=UTC), "2026-01-02T00:00:00Z"),
        (Decimal("1.10"), "1.10"),
        (UUID(int=7), str(UUID(int=7))),
        (Colour.RED, "red"),
        (Point(1, 2), {"x": 1, "y": 2}),
        (Person(name="Ada", born=date(1815, 12, 10)), {"name": "Ada", "born": "1815-12-10"}),
        ('"status"', '"status"'),
        (
            {"status": "failed", "id": "x", "created_at": 0},
            {"status": "failed", "id": "x", "created_at": 0},
        ),
    ],
    ids=repr,
)
async def test_a_result_is_stored_as_json(backend: Backend, result: object, stored: object) -> None:
    queue = make_queue(backend, give=lambda: result)
    async with running(queue):
        job_id = await queue.add("give")
        assert await queue.wait_for(job_id, timeout=PATIENCE) == stored
    assert await queue.get_job_result(job_id) == stored


@pytest.mark.parametrize(
    "value",
    [object(), float("nan"), [float("inf")], "\ud800"],
    ids=["object", "nan", "inf", "lone surrogate"],
)
async def test_an_argument_that_is_not_json_is_refused_by_name(queue: Queue, value: object) -> None:
    with pytest.raises(NotSerializable, match="argument 1 of task 'echo'"):
        await queue.add("echo", [1, value])
    with pytest.raises(NotSerializable, match="argument 'body' of task 'echo'"):
        await queue.add("echo", kwargs={"body": value})
    with pytest.raises(NotSerializable, match="argument 'value' of task 'echo'"):
        await queue.add_bulk([{"task_id": "echo"}, {"task_id": "echo", "args": [value]}])
    await only(queue)


async def test_an_argument_that_is_too_large_is_refused(queue: Queue) -> None:
    large = "x" * queue.backend.max_body
    with pytest.raises(PayloadTooLarge, match="keep large data elsewhere"):
        await queue.add("echo", [large])
    with pytest.raises(PayloadTooLarge):
        await queue.add("echo", [large], delay=60, job_id="large")
    with pytest.raises(PayloadTooLarge):
        await queue.add_bulk([{"task_id": "echo"}, {"task_id": "echo", "args": [large]}])
    await only(queue)


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"retries": -1}, "retries"),
        ({"retries": "many"}, "retries"),
        ({"ttl": -1}, "ttl"),
        ({"ttl": float("nan")}, "ttl"),
        ({"backoff": -1}, "backoff"),
        ({"priority": "high"}, "priority"),
        ({"priority": 1.5}, "priority"),
        ({"task_id": ""}, "task"),
    ],
)
async def test_a_value_of_the_wrong_kind_is_refused_by_name(
    queue: Queue, fields: dict[str, Any], name: str
) -> None:
    with pytest.raises(InvalidArgument, match=name):
        await queue.add(**({"task_id": "echo"} | fields))
    await only(queue)


async def test_the_order_of_one_priority_is_that_of_adding(backend: Backend) -> None:
    ran: list[int] = []

    async def note(number: int) -> None:
        ran.append(number)

    queue = make_queue(backend, concurrency=1, note=note)
    for number in range(10):
        await queue.add("note", [number])
    await run_jobs(queue)
    assert ran == list(range(10))


@pytest.mark.parametrize("delay", [0, -5, 0.0])
async def test_a_delay_of_nothing_is_now(queue: Queue, delay: float) -> None:
    job_id = await queue.add("echo", delay=delay)
    assert await queue.get_job_state(job_id) == "waiting"


async def test_a_delayed_job_waits_and_then_runs(queue: Queue) -> None:
    async with running(queue):
        due = queue.backend.now() + 0.6
        later = await queue.add("echo", ["later"], delay=0.6)
        state = await queue.get_job_state(later)
        assert state == "delayed" or queue.backend.now() >= due
        now = await queue.add("echo", ["now"])
        assert await queue.wait_for(now, timeout=PATIENCE) == "now"
        assert await queue.wait_for(later, timeout=PATIENCE) == "later"
    job = await queue.get_job(later)
    assert job is not None
    assert job["active_since"] - job["created_at"] >= 0.6


# -- time to live


async def test_a_job_that_waited_too_long_expires(queue: Queue, gate: Gate) -> None:
    job_id = await queue.add("gate", ttl=0)
    async with running(queue):
        with pytest.raises(JobFailed, match=r"expired.*time to live") as raised:
            await queue.wait_for(job_id, timeout=PATIENCE)
    assert raised.value.state == "expired"
    assert gate.runs == 0
    await only(queue, expired=1)
    assert [job["id"] for job in await queue.list_jobs("expired")] == [job_id]


async def test_a_job_that_starts_in_time_does_not_expire(queue: Queue) -> None:
    job_id = await queue.add("echo", ["in time"], ttl=3600)
    async with running(queue):
        assert await queue.wait_for(job_id, timeout=PATIENCE) == "in time"


# -- custom ids


@pytest.mark.parametrize("job_id", ["", "  ", "123", "a:b", "x" * 201])
async def test_a_custom_id_outside_asyncmqs_rules_is_refused(queue: Queue, job_id: str) -> None:
    with pytest.raises(InvalidJobId):
        await queue.add("echo", job_id=job_id)
    await only(queue)


async def test_a_custom_id_that_is_no_text_is_refused(queue: Queue) -> None:
    with pytest.raises(TypeError, match="job_id"):
        await queue.add("echo", job_id=7)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "job_id", ["order-7", "a.b.c", "100%", "é 日", "*", ">", "a%2Eb", "x" * 200]
)
async def test_any_other_custom_id_is_taken_as_it_is(queue: Queue, job_id: str) -> None:
    assert await queue.add("echo", [job_id], job_id=job_id) == job_id
    async with running(queue):
        assert await queue.wait_for(job_id, timeout=PATIENCE) == job_id
    await counted(queue)
    assert [job["id"] for job in await queue.list_jobs("completed")] == [job_id]


async def test_ids_that_look_alike_are_different_jobs(queue: Queue) -> None:
    ids = ["a.b", "a%2Eb", "a b", "a-b"]
    for job_id in ids:
        await queue.add("echo", [job_id], job_id=job_id)
    await run_jobs(queue)
    assert [await queue.get_job_result(job_id) for job_id in ids] == ids


@pytest.mark.parametrize(
    "state", ["waiting", "delayed", "active", "completed", "failed", "expired"]
)
async def test_an_id_that_exists_in_any_state_adds_nothing(
    queue: Queue, gate: Gate, state: str
) -> None:
    first: dict[str, dict[str, Any]] = {
        "delayed": {"delay": 3600},
        "active": {"task_id": "gate"},
        "failed": {"task_id": "fail"},
        "expired": {"ttl": 0},
    }
    await queue.add(
        **(
            {"task_id": "echo", "args": [] if state == "active" else ["first"], "job_id": "a"}
            | first.get(state, {})
        )
    )
    if state not in ("waiting", "delayed"):
        async with running(queue):
            if state == "active":
                with anyio.fail_after(PATIENCE):
                    await gate.started.wait()
                await _add_again(queue, state)
                gate.opened.set()
            await outcome(queue, "a")
    if state != "active":
        await _add_again(queue, state)


async def _add_again(queue: Queue, state: str) -> None:
    before = await queue.get_job("a")
    assert await queue.add("echo", ["second"], job_id="a") == "a"
    assert await queue.add("echo", ["second"], job_id="a", delay=3600, priority=1) == "a"
    assert await queue.add_bulk([{"task_id": "echo", "args": ["second"], "job_id": "a"}]) == ["a"]
    assert await queue.get_job("a") == before
    assert before is not None
    assert before["status"] == state


async def test_an_id_belongs_to_its_queue(backend: Backend) -> None:
    one, other = make_queue(backend, "one", echo=echo), make_queue(backend, "two", echo=echo)
    for queue in (one, other):
        await queue.add("echo", [queue.name], job_id="a")
    await run_jobs(one)
    await run_jobs(other)
    assert (await one.get_job_result("a"), await other.get_job_result("a")) == ("one", "two")


async def test_racing_adds_of_one_id_make_one_job(backend: Backend, twin: Backend) -> None:
    runs: list[int] = []

    async def note(number: int) -> int:
        runs.append(number)
        return number

    queues = [make_queue(handle, note=note) for handle in (backend, twin)]
    async with running(queues[0]), running(queues[1]):
        ids = await race(*[_adding(queues[number % 2], number) for number in range(20)])
        assert ids == ["a"] * 20
        result = await queues[0].wait_for("a", timeout=PATIENCE)
        await wait_until_done(queues[0])
    assert runs == [result]
    await only(queues[0], completed=1)


def _adding(queue: Queue, number: int) -> Callable[[], Any]:
    return lambda: queue.add("note", [number], job_id="a")


# -- add_bulk


async def test_bulk_returns_ids_in_order(queue: Queue) -> None:
    entries: list[dict[str, Any]] = [
        {"task_id": "echo", "args": [0]},
        {"task_id": "echo", "args": (1,), "job_id": "mine"},
        {"task_id": "echo", "kwargs": {"value": 2}, "jobId": "alias", "priority": 9},
        {"task_id": "echo", "args": [3], "retries": 2, "ttl": 60, "backoff": 2.0, "delay": None},
    ]
    ids = await queue.add_bulk(entries)
    assert ids[1:3] == ["mine", "alias"]
    assert len(set(ids)) == 4
    await run_jobs(queue)
    assert [await queue.get_job_result(job_id) for job_id in ids] == [0, 1, 2, 3]


async def test_bulk_of_nothing_is_nothing(queue: Queue) -> None:
    assert await queue.add_bulk([]) == []
    await only(queue)


async def test_bulk_may_mix_jobs_for_now_and_for_later(queue: Queue) -> None:
    ids = await queue.add_bulk(
        [
            {"task_id": "echo"},
            {"task_id": "echo", "delay": 3600},
            {"task_id": "echo", "priority": -1},
        ]
    )
    assert [await queue.get_job_state(job_id) for job_id in ids] == [
        "waiting",
        "delayed",
        "waiting",
    ]
    await only(queue, waiting=2, delayed=1)


@pytest.mark.parametrize(
    ("bad", "error", "told"),
    [
        ({}, ValueError, "job 1 needs a task_id"),
        ({"task_id": 5}, ValueError, "job 1 needs a task_id"),
        ({"task_id": "echo", "dependson": []}, ValueError, "job 1 has unknown keys: dependson"),
        ({"task_id": "echo", "job_id": 5}, TypeError, "job_id"),
        ({"task_id": "echo", "jobId": 5}, TypeError, "job_id"),
        ({"task_id": "echo", "job_id": "1"}, InvalidJobId, "digits"),
        ({"task_id": "echo", "retries": -1}, InvalidArgument, "retries"),
        ({"task_id": "echo", "args": [object()]}, NotSerializable, "argument 'value'"),
        ("echo", TypeError, "job 1 must be a mapping"),
    ],
)
async def test_a_bad_entry_adds_nothing_at_all(
    queue: Queue, bad: Any, error: type[Exception], told: str
) -> None:
    with pytest.raises(error, match=told):
        await queue.add_bulk([{"task_id": "echo"}, bad, {"task_id": "echo"}])
    await only(queue)


async def test_bulk_leaves_existing_ids_alone(queue: Queue) -> None:
    await queue.add("echo", ["first"], job_id="a")
    ids = await queue.add_bulk(
        [{"task_id": "echo", "args": ["second"], "job_id": job_id} for job_id in ("a", "b", "b")]
    )
    assert ids == ["a", "b", "b"]
    await run_jobs(queue)
    assert await queue.get_job_result("a") == "first"
    await only(queue, completed=2)


async def test_bulk_of_more_than_a_batch(backend: Backend) -> None:
    ran: list[int] = []

    async def note(number: int) -> None:
        ran.append(number)

    queue = make_queue(backend, concurrency=50, note=note)
    ids = await queue.add_bulk({"task_id": "note", "args": [number]} for number in range(1500))
    assert len(set(ids)) == 1500
    await has(queue, 1500, "waiting")
    await run_jobs(queue)
    assert sorted(ran) == list(range(1500))


async def test_bulk_says_which_batches_were_added(
    queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = queue.backend.write

    async def write(log: str, *writes: Write) -> int:
        if any(b'"bad"' in each.body for each in writes):
            raise InvalidJob("the disk is full")
        return await real(log, *writes)

    monkeypatch.setattr(queue.backend, "write", write)
    monkeypatch.setattr(queue.backend, "stage", lambda log: Unsent(partial(write, log)))
    with pytest.raises(BulkAddFailed) as raised:
        await queue.add_bulk(
            [
                {"task_id": "echo", "args": ["bad" if number == 1200 else number]}
                for number in range(1500)
            ]
        )
    assert sorted(raised.value.added) == list(range(1000))
    assert sorted(raised.value.errors) == list(range(1000, 1500))
    assert {job["id"] for job in await queue.list_jobs("waiting")} == set(
        raised.value.added.values()
    )


# -- enqueue, send


async def test_a_job_dict_is_enqueued_as_it_is(queue: Queue) -> None:
    job = Job("echo", ["dict"], job_id="a", max_retries=1, priority=2, ttl=60)
    assert await queue.enqueue(job.to_dict()) == "a"
    stored = await queue.get_job("a")
    assert stored is not None
    assert {
        name: stored[name] for name in ("args", "max_retries", "priority", "ttl", "created_at")
    } == {
        "args": ["dict"],
        "max_retries": 1,
        "priority": 2,
        "ttl": 60,
        "created_at": job.created_at,
    }
    async with running(queue):
        assert await queue.wait_for("a", timeout=PATIENCE) == "dict"


async def test_a_dict_with_the_arguments_of_add_is_enqueued(queue: Queue) -> None:
    payload = {"task_id": "echo", "args": [1], "retries": 2}
    job_id = await queue.send(payload)
    job = await queue.get_job(job_id)
    assert job is not None
    assert (job["task"], job["args"], job["max_retries"], job["retries"], job["backoff"]) == (
        "echo",
        [1],
        2,
        0,
        None,
    )
    assert payload == {"task_id": "echo", "args": [1], "retries": 2}


async def test_enqueue_with_an_id_is_idempotent(queue: Queue) -> None:
    for value in ("first", "second"):
        assert await queue.enqueue({"id": "a", "task": "echo", "args": [value]}) == "a"
    await run_jobs(queue)
    assert await queue.get_job_result("a") == "first"
    await only(queue, completed=1)


async def test_a_dict_whose_time_is_to_come_is_delayed(queue: Queue) -> None:
    job_id = await queue.enqueue({"task_id": "echo", "delay_until": queue.backend.now() + 3600})
    assert await queue.get_job_state(job_id) == "delayed"


async def test_an_old_dict_has_expired(queue: Queue) -> None:
    job_id = await queue.enqueue(
        {"task_id": "echo", "ttl": 5, "created_at": queue.backend.now() - 6}
    )
    await run_jobs(queue)
    assert await queue.get_job_state(job_id) == "expired"


@pytest.mark.parametrize(
    "payload", [{}, {"args": [1]}, {"task_id": 5}, {"task_id": "echo", "args": "text"}]
)
async def test_a_dict_that_is_no_job_is_refused(queue: Queue, payload: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument):
        await queue.enqueue(payload)
    await only(queue)


async def test_a_dict_that_is_too_large_is_refused(queue: Queue) -> None:
    with pytest.raises(PayloadTooLarge):
        await queue.enqueue({"task_id": "echo", "args": ["x" * queue.backend.max_body]})


# -- failures without an exception of the task


async def test_an_unknown_task_is_a_failed_job(queue: Queue) -> None:
    unknown = await queue.add("os.system", ["true"])
    known = await queue.add("echo", ["fine"])
    async with running(queue):
        with pytest.raises(JobFailed, match=r"no task 'os\.system' is registered in this worker"):
            await queue.wait_for(unknown, timeout=PATIENCE)
        assert await queue.wait_for(known, timeout=PATIENCE) == "fine"


@pytest.mark.parametrize(
    "result",
    [object(), float("nan"), {"a": float("inf")}, "\ud800", "x" * 2_000_000],
    ids=lambda value: repr(value)[:20],
)
async def test_a_result_that_cannot_be_stored_fails_the_job_once(
    backend: Backend, result: object
) -> None:
    runs: list[int] = []

    async def give() -> object:
        runs.append(1)
        return result

    queue = make_queue(backend, concurrency=1, give=give, echo=echo)
    job_id = await queue.add("give", retries=3)
    async with running(queue):
        with pytest.raises(JobFailed, match="the result of task 'give'"):
            await queue.wait_for(job_id, timeout=PATIENCE)
        assert await queue.wait_for(await queue.add("echo", ["on"]), timeout=PATIENCE) == "on"
        await wait_until_done(queue)
    assert len(runs) == 1
    await only(queue, failed=1, completed=1)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"hello",
        b"[]",
        b"{}",
        b'{"task": "echo", "args": [NaN]}',
        b'{"task": "echo", "v": 99}',
        b"\xff",
    ],
)
async def test_a_message_that_is_no_job_fails_once(queue: Queue, body: bytes) -> None:
    await add_foreign(queue, body)
    async with running(queue):
        with pytest.raises(JobFailed, match="not a job of the wire format"):
            await queue.wait_for("foreign", timeout=PATIENCE)
        await wait_until_done(queue)
    await only(queue, failed=1)


@pytest.mark.parametrize("task", ["echo", "fail"])
async def test_a_number_too_large_for_json_fails_once(queue: Queue, task: str) -> None:
    await add_foreign(
        queue, b'{"task": "%s", "args": [1e999], "max_retries": 1, "backoff": null}' % task.encode()
    )
    async with running(queue):
        with pytest.raises(JobFailed):
            await queue.wait_for("foreign", timeout=PATIENCE)
        await wait_until_done(queue)
    await only(queue, failed=1)


async def test_the_least_a_foreign_producer_must_send_runs(queue: Queue) -> None:
    await add_foreign(queue, b'{"task": "echo", "args": ["hi"], "mine": 7}\n')
    async with running(queue):
        assert await queue.wait_for("foreign", timeout=PATIENCE) == "hi"


async def test_a_foreign_job_whose_time_is_to_come_is_delayed(queue: Queue) -> None:
    await add_foreign(queue, b'{"task": "echo", "delay_until": %d}' % (queue.backend.now() + 3600))
    async with running(queue):
        await until(lambda: queue.get_job_state("foreign"), lambda state: state == "delayed")
        await until(queue.queue_stats, lambda stats: stats == EMPTY | {"delayed": 1})


# -- one job


async def test_the_states_of_a_job_along_its_life(queue: Queue, gate: Gate) -> None:
    due = queue.backend.now() + 0.4
    job_id = await queue.add("gate", delay=0.4)
    state = await queue.get_job_state(job_id)
    assert state == "delayed" or queue.backend.now() >= due
    async with running(queue):
        with anyio.fail_after(PATIENCE):
            await gate.started.wait()
        assert await queue.get_job_state(job_id) == "active"
        assert await queue.get_job_result(job_id) is None
        waiting = [await queue.add("gate") for _ in range(3)][-1]
        assert await queue.get_job_state(waiting) == "waiting"
        gate.opened.set()
        await queue.wait_for(job_id, timeout=PATIENCE)
        assert await queue.get_job_state(job_id) == "completed"
        await wait_until_done(queue)


async def test_a_job_that_waits_for_its_retry_is_delayed(queue: Queue) -> None:
    job_id = await queue.add("fail", retries=1, backoff=3600)
    async with running(queue):
        await until(lambda: queue.get_job_state(job_id), lambda state: state == "delayed")
        await until(queue.queue_stats, lambda stats: stats == EMPTY | {"delayed": 1})
    job = await queue.get_job(job_id)
    assert job is not None
    assert job["retries"] == 1
    assert [entry["error"] for entry in job["errors"]] == ["ValueError: no"]


async def test_a_job_that_is_not_there_is_none(queue: Queue) -> None:
    assert await queue.get_job("missing") is None
    assert await queue.get_job_state("missing") is None
    assert await queue.get_job_result("missing") is None


async def test_a_failed_job_has_no_result_but_an_error(queue: Queue) -> None:
    job_id = await queue.add("fail", ["out of paper"])
    await run_jobs(queue)
    job = await queue.get_job(job_id)
    assert job is not None
    assert (job["status"], job["result"], job["last_error"]) == (
        "failed",
        None,
        "ValueError: out of paper",
    )
    assert "raise ValueError(message)" in job["error_traceback"]
    assert await queue.get_job_result(job_id) is None


# -- wait_for


async def test_wait_for_returns_at_once_what_is_there(queue: Queue) -> None:
    job_id = await queue.add("echo", [5])
    await run_jobs(queue)
    assert await queue.wait_for(job_id, timeout=PATIENCE) == 5
    assert await queue.wait_for(job_id) == 5


async def test_wait_for_raises_the_failure(queue: Queue) -> None:
    job_id = await queue.add("fail", ["out of paper"])
    async with running(queue):
        with pytest.raises(JobFailed, match="out of paper") as raised:
            await queue.wait_for(job_id, timeout=PATIENCE)
    assert (raised.value.job_id, raised.value.state, raised.value.error) == (
        job_id,
        "failed",
        "ValueError: out of paper",
    )


async def test_wait_for_no_job_raises(queue: Queue) -> None:
    with pytest.raises(JobNotFound, match="'missing'"):
        await queue.wait_for("missing", timeout=PATIENCE)


@pytest.mark.parametrize("timeout", [0.05, 0.001, 0, -1])
async def test_wait_for_gives_up_in_time_and_harms_no_other(queue: Queue, timeout: float) -> None:
    job_id = await queue.add("echo")
    for _ in range(10):
        with pytest.raises(TimeoutError):
            await queue.wait_for(job_id, timeout=timeout)
    with anyio.fail_after(PATIENCE):
        assert await queue.get_job_state(job_id) == "waiting"
        await run_jobs(queue)


async def test_a_wait_that_is_cancelled_anywhere_harms_no_other(queue: Queue) -> None:
    job_id = await queue.add("echo")
    for steps in range(1, 25):
        async with anyio.create_task_group() as group:
            group.start_soon(queue.wait_for, job_id)
            group.start_soon(queue.pause)
            for _ in range(steps):
                await anyio.lowlevel.checkpoint()
            group.cancel_scope.cancel()
    with anyio.fail_after(PATIENCE):
        await queue.resume()
        await run_jobs(queue)


async def test_wait_for_0_s_looks_at_what_is_there(queue: Queue) -> None:
    done, failed = await queue.add("echo", ["done"]), await queue.add("unknown")
    await run_jobs(queue)
    assert await queue.wait_for(done, timeout=0) == "done"
    with pytest.raises(JobFailed):
        await queue.wait_for(failed, timeout=0)
    with pytest.raises(JobNotFound):
        await queue.wait_for("unheard-of", timeout=0)


async def test_wait_for_waits_through_retries(backend: Backend) -> None:
    attempts: list[int] = []

    async def flaky() -> int:
        attempts.append(1)
        if len(attempts) < 3:
            raise ValueError("not yet")
        return len(attempts)

    queue = make_queue(backend, flaky=flaky)
    job_id = await queue.add("flaky", retries=2)
    async with running(queue):
        assert await queue.wait_for(job_id, timeout=PATIENCE) == 3


@pytest.fixture
def _no_second_look(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the look now and then, an event that is missed is missed for ever."""
    monkeypatch.setattr("asyncmq_nats.store.waiters.LOOK_INTERVAL", 3600)


@pytest.mark.usefixtures("_no_second_look")
async def test_wait_for_never_misses_the_end(queue: Queue, twin: Backend) -> None:
    other = make_queue(twin, echo=echo)

    async def add_and_wait(number: int) -> Any:
        return await other.wait_for(await queue.add("echo", [number]), timeout=PATIENCE)

    async with running(queue):
        assert await race(
            *[lambda number=number: add_and_wait(number) for number in range(100)]
        ) == list(range(100))


@pytest.mark.usefixtures("_no_second_look")
async def test_an_end_between_listening_and_waiting_is_heard(
    queue: Queue, twin: Backend, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = anyio.Event()

    def on_end(_: Signal) -> None:
        ended.set()

    subscription = await queue.backend.subscribe("amq.work.event.completed.*", on_end)
    real = twin.last

    async def last(log: str, *filters: str) -> list[Record]:
        """Read, and return what was read only when it is no longer true."""
        found = await real(log, *filters)
        if log == "amq_work":
            gate.opened.set()
            await ended.wait()
        return found

    async with running(queue):
        job_id = await queue.add("gate")
        with anyio.fail_after(PATIENCE):
            await gate.started.wait()
        monkeypatch.setattr(twin, "last", last)
        assert await make_queue(twin).wait_for(job_id, timeout=PATIENCE) == "through"
    await subscription.unsubscribe()


# -- counts


async def test_an_empty_queue_counts_nothing(queue: Queue) -> None:
    assert await queue.queue_stats() == EMPTY
    assert await queue.count() == 0
    assert await queue.get_jobs() == []
    assert await queue.get_job_counts() == dict.fromkeys(
        [
            "waiting",
            "active",
            "completed",
            "failed",
            "delayed",
            "waiting-children",
            "paused",
            "prioritized",
        ],
        0,
    )


@pytest.fixture
async def busy_queue(queue: Queue, gate: Gate) -> Queue:
    """A queue with 3 completed, 2 failed, 1 expired, 4 waiting and 2 delayed jobs."""
    await queue.add_bulk([{"task_id": "echo", "args": [number]} for number in range(3)])
    await queue.add_bulk([{"task_id": "fail"}, {"task_id": "fail"}, {"task_id": "echo", "ttl": 0}])
    await run_jobs(queue)
    await queue.add_bulk(
        [{"task_id": "echo", "args": [number], "priority": 5 + number % 2} for number in range(4)]
    )
    await queue.add_bulk([{"task_id": "echo", "delay": 3600}, {"task_id": "echo", "delay": 7200}])
    await counted(queue)
    return queue


async def test_every_count_is_exact(busy_queue: Queue) -> None:
    stats = EMPTY | {"waiting": 4, "delayed": 2, "completed": 3, "failed": 2, "expired": 1}
    assert await busy_queue.queue_stats() == stats
    assert await busy_queue.count() == 6
    assert await busy_queue.get_job_counts() == {
        "waiting": 4,
        "active": 0,
        "completed": 3,
        "failed": 2,
        "delayed": 2,
        "waiting-children": 0,
        "paused": 0,
        "prioritized": 0,
    }
    assert await busy_queue.get_job_counts("failed", "expired") == {"failed": 2, "expired": 1}
    assert await busy_queue.get_job_counts("waiting") == {"waiting": 4, "paused": 0}
    assert await busy_queue.get_job_counts(State.COMPLETED) == {"completed": 3}
    assert await busy_queue.get_job_counts("bogus") == {"bogus": 0}
    assert await busy_queue.get_job_count_by_types("waiting", "delayed") == 6


async def test_jobs_that_run_are_counted(queue: Queue, gate: Gate) -> None:
    await queue.add_bulk([{"task_id": "gate"}] * 5)
    async with running(queue):
        await until(queue.queue_stats, lambda stats: stats == EMPTY | {"active": 3, "waiting": 2})
        await has(queue, 2)
        assert [len(await queue.list_jobs(state)) for state in ("active", "waiting")] == [3, 2]
        gate.opened.set()
        await wait_until_done(queue)
    await only(queue, completed=5)


async def test_another_handle_counts_the_same(busy_queue: Queue, twin: Backend) -> None:
    assert await make_queue(twin).queue_stats() == await busy_queue.queue_stats()


# -- lists


async def test_jobs_are_listed_by_state(busy_queue: Queue) -> None:
    for state, count in (await busy_queue.queue_stats()).items():
        jobs = await busy_queue.list_jobs(state)
        assert [job["status"] for job in jobs] == [state] * count
    assert [job["result"] for job in await busy_queue.list_jobs(State.COMPLETED)] in (
        [0, 1, 2],
        [0, 2, 1],
        [1, 0, 2],
        [1, 2, 0],
        [2, 0, 1],
        [2, 1, 0],
    )
    assert await busy_queue.list_jobs("bogus") == []


@pytest.mark.parametrize(("limit", "count"), [(None, 4), (0, 0), (1, 1), (3, 3), (9, 4)])
async def test_a_list_may_be_short(busy_queue: Queue, limit: int | None, count: int) -> None:
    jobs = await busy_queue.list_jobs("waiting", limit=limit)
    assert jobs == (await busy_queue.list_jobs("waiting"))[:count]


@pytest.fixture
async def ten_jobs(queue: Queue) -> Queue:
    await queue.add_bulk([{"task_id": "echo", "args": [number]} for number in range(10)])
    await counted(queue)
    return queue


@pytest.mark.parametrize(
    ("start", "end", "numbers"),
    [
        (0, -1, range(10)),
        (0, 0, [0]),
        (0, 9, range(10)),
        (0, 99, range(10)),
        (3, 5, [3, 4, 5]),
        (9, 9, [9]),
        (9, -1, [9]),
        (10, -1, []),
        (5, 4, []),
    ],
)
async def test_a_slice_includes_both_ends(
    ten_jobs: Queue, start: int, end: int, numbers: list[int]
) -> None:
    jobs = await ten_jobs.get_jobs("waiting", start=start, end=end, asc=True)
    assert [job["args"][0] for job in jobs] == list(numbers)
    jobs = await ten_jobs.get_jobs(["waiting"], start=start, end=end)
    assert [job["args"][0] for job in jobs] == [9 - number for number in numbers]


async def test_states_are_joined_one_after_the_other(busy_queue: Queue) -> None:
    states = [
        job["status"]
        for job in await busy_queue.get_jobs(["failed", "delayed", "bogus", "completed"], asc=True)
    ]
    assert states == ["failed"] * 2 + ["delayed"] * 2 + ["completed"] * 3
    states = [
        job["status"]
        for job in await busy_queue.get_jobs(["failed", "delayed", "completed"], start=1, end=4)
    ]
    assert states == ["failed"] + ["delayed"] * 2 + ["completed"]


async def test_without_states_all_jobs_are_listed(busy_queue: Queue) -> None:
    jobs = await busy_queue.get_jobs()
    assert len({job["id"] for job in jobs}) == len(jobs) == 12


async def test_newest_first_is_the_reverse_of_oldest_first(busy_queue: Queue) -> None:
    for state in State:
        ascending = await busy_queue.get_jobs(state, asc=True)
        assert await busy_queue.get_jobs(state) == ascending[::-1]


@pytest.mark.parametrize("page", [1, 3, 7])
async def test_pages_make_no_difference(
    queue: Queue, monkeypatch: pytest.MonkeyPatch, page: int
) -> None:
    await queue.add_bulk(
        [{"task_id": "echo", "args": [number], "priority": number % 3} for number in range(20)]
    )
    await queue.add_bulk(
        [{"task_id": "echo", "args": [number], "delay": 3600} for number in range(20, 30)]
    )
    await counted(queue)
    expected = {order: await queue.get_jobs(asc=order) for order in (True, False)}
    for few in (0, 500):
        monkeypatch.setattr("asyncmq_nats.store.pages.PAGE_SIZE", page)
        monkeypatch.setattr("asyncmq_nats.store.pages.SMALL_LIST_LIMIT", few)
        for order, jobs in expected.items():
            assert len(jobs) == 30
            assert await queue.get_jobs(asc=order) == jobs
            assert await queue.get_jobs(asc=order, start=4, end=25) == jobs[4:26]


async def test_a_short_slice_reads_few_records(
    queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    await queue.add_bulk([{"task_id": "echo", "args": [number]} for number in range(900)])
    read: list[int] = []
    real = queue.backend.page, queue.backend.page_back

    async def page(*args: Any, **options: Any) -> list[Record]:
        records = await real[0](*args, **options)
        read.append(len(records))
        return records

    async def page_back(*args: Any, **options: Any) -> list[Record]:
        records = await real[1](*args, **options)
        read.append(len(records))
        return records

    monkeypatch.setattr(queue.backend, "page", page)
    monkeypatch.setattr(queue.backend, "page_back", page_back)
    for ascending in (True, False):
        read.clear()
        assert len(await queue.get_jobs("waiting", end=49, asc=ascending)) == 50
        assert 50 <= sum(read) <= 100


# -- start


def test_start_runs_until_a_signal(make_backend: Callable[[], Backend]) -> None:
    def end_process() -> str:
        os.kill(os.getpid(), signal.SIGTERM)
        return "ended"

    async def add() -> str:
        backend = make_backend()
        job_id = await make_queue(backend).add("end")
        await backend.close()
        return job_id

    async def read(job_id: str) -> Any:
        backend = make_backend()
        result = await make_queue(backend).get_job_result(job_id)
        await backend.close()
        return result

    job_id = anyio.run(add)
    make_queue(make_backend(), end=end_process).start()
    assert anyio.run(read, job_id) == "ended"
