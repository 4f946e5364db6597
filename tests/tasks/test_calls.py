"""Calls: options, calls as values, handles of jobs, on both backends."""

from __future__ import annotations

import copy
import functools
import json
import math
import pickle
from collections.abc import Awaitable, Coroutine
from dataclasses import dataclass
from datetime import date
from typing import Annotated, Any
from uuid import UUID

import anyio
import pytest
from pydantic import BaseModel, Field, Json

from asyncmq_nats import (
    Call,
    FlowProducer,
    InMemoryBackend,
    InvalidArgument,
    Job,
    JobFailed,
    JobHandle,
    JobNotFound,
    Queue,
    State,
    current_job,
)
from asyncmq_nats.backends.base import Backend
from asyncmq_nats.exceptions import InvalidCall, InvalidFlow, InvalidResult, NotSerializable
from asyncmq_nats.runtime.registry import TaskRegistry
from asyncmq_nats.tasks import TaskWrapper, task
from tests.receiver import holds
from tests.running import PATIENCE, has, only, running


class Person(BaseModel):
    name: str
    born: date


@dataclass
class Letter:
    to: Person
    on: date


registry = TaskRegistry()


@task("work", retries=2, backoff=3, ttl=60, timeout=30, registry=registry)
async def write(person: Person, on: date, *, copies: int = 1) -> list[Letter]:
    return [Letter(person, on) for _ in range(copies)]


@task("work", registry=registry)
def add_up(*numbers: int) -> int:
    return sum(numbers)


@task("work", registry=registry)
async def gather() -> dict[str, Any]:
    return await current_job().parent_results()


@task("work", registry=registry)
async def fail() -> None:
    raise ValueError("no")


ADA = Person(name="Ada", born=date(1815, 12, 10))
DAY = date(1852, 11, 27)


def queue_on(backend: Backend) -> Queue:
    return Queue("work", backend, registry=registry)


# -- options


async def test_the_options_are_those_of_the_job(backend: Backend) -> None:
    job_id = await write.options(
        backend=backend,
        delay=3600,
        priority=2,
        retries=7,
        backoff=None,
        ttl=None,
        timeout=5,
        job_id="letter-7",
        meta={"request": "r"},
    ).enqueue(ADA, on=DAY)
    job = await job_id.details()
    assert job is not None
    assert job_id == "letter-7"
    assert (job["priority"], job["max_retries"], job["backoff"]) == (2, 7, None)
    assert (job["ttl"], job["timeout"], job["meta"]) == (None, 5, {"request": "r"})
    assert job["delay_until"] == pytest.approx(job["created_at"] + 3600)
    assert job["args"] == [{"name": "Ada", "born": "1815-12-10"}]


async def test_what_no_option_says_is_that_of_the_task(backend: Backend) -> None:
    job_id = await write.options(backend=backend).enqueue(ADA, DAY)
    plain = await write.enqueue(ADA, DAY, backend=backend)
    for each in (job_id, plain):
        job = await each.details()
        assert job is not None
        assert (job["max_retries"], job["backoff"], job["ttl"], job["timeout"]) == (2, 3, 60, 30)


async def test_a_job_may_go_to_another_queue(backend: Backend) -> None:
    other = Queue("other", backend, registry=registry, any_task=True)
    by_name = await add_up.options(queue="other", backend=backend).enqueue(1, 2)
    by_queue = await add_up.options(queue=other).enqueue(3)
    assert (by_name.queue.name, by_queue.queue) == ("other", other)
    async with running(other):
        assert [await each.result(PATIENCE) for each in (by_name, by_queue)] == [3, 3]
    with pytest.raises(InvalidArgument, match="has a backend already"):
        add_up.options(queue=other, backend=InMemoryBackend())


async def test_a_window_is_an_option(backend: Backend) -> None:
    once = add_up.options(backend=backend, deduplication={"id": "sum", "ttl": 60})
    assert await once.enqueue(1) == await once.enqueue(2)
    await only(queue_on(backend), waiting=1)


# -- what the worker would refuse is refused here


@pytest.mark.parametrize(
    ("args", "kwargs", "told"),
    [
        ((ADA,), {}, "on: Missing required argument"),
        ((ADA, DAY, 3), {}, "2: Unexpected positional argument"),
        ((ADA, DAY), {"of": 1}, "of: Unexpected keyword argument"),
        ((ADA, "soon"), {}, "on: Input should be a valid date"),
        (({"name": "Ada"}, DAY), {}, r"person\.born: Field required"),
        ((ADA, DAY), {"copies": "many"}, "copies: Input should be a valid integer"),
    ],
)
async def test_a_call_that_the_task_would_refuse_is_refused(
    backend: Backend, args: Any, kwargs: Any, told: str
) -> None:
    queue = queue_on(backend)
    loose: Any = write
    for add in (
        functools.partial(loose.enqueue, *args, **kwargs, backend=backend),
        functools.partial(loose.options(backend=backend).enqueue, *args, **kwargs),
    ):
        with pytest.raises(InvalidCall, match=told):
            await add()
    with pytest.raises(InvalidCall, match=rf"task '{write.task_id}' would refuse.*{told}"):
        loose.call(*args, **kwargs)
    await has(queue, 0)
    loose.options(validate=False).call(*args, **kwargs)


async def test_what_the_worker_would_take_is_taken(backend: Backend) -> None:
    loose: Any = write
    job_id = await loose.enqueue(
        {"name": "Ada", "born": "1815-12-10"}, "1852-11-27", copies="2", backend=backend
    )
    async with running(queue_on(backend)):
        assert await job_id.result(PATIENCE) == [Letter(ADA, DAY)] * 2


def test_a_task_without_validation_takes_what_is_json() -> None:
    own = TaskRegistry()

    @task("work", validate=False, registry=own)
    async def loose(number: int) -> int:
        return number

    anything: Any = loose
    assert anything.call("seven").args == ["seven"]
    with pytest.raises(NotSerializable):
        anything.call(object())


async def test_a_refused_call_makes_no_connection(tmp_path: Any) -> None:
    loose: Any = add_up
    with pytest.raises(InvalidCall):  # and no ConnectionFailed: the default backend has no server
        await loose.enqueue("x")


# -- calls as values


async def test_a_bulk_takes_calls(backend: Backend) -> None:
    queue = queue_on(backend)
    ids = await queue.add_bulk(
        [
            add_up.call(1, 2),
            {"task_id": add_up.task_id, "args": [3]},
            add_up.options(job_id="four", meta={"n": "4"}).call(4),
            add_up.options(deduplication={"id": "five", "ttl": 60}).call(5),
        ]
    )
    async with running(queue):
        assert [await queue.wait_for(job_id, PATIENCE) for job_id in ids] == [3, 3, 4, 5]
    job = await queue.get_job("four")
    assert job is not None
    assert (ids[2], job["meta"]) == ("four", {"n": "4"})


async def test_a_call_is_added_as_often_as_wished(backend: Backend) -> None:
    queue, call = queue_on(backend), add_up.options(retries=1).call(1, 2)
    ids = {
        await queue.add_call(call),
        await queue.add_call(call),
        *await queue.add_bulk([call] * 2),
    }
    assert len(ids) == 4
    async with running(queue):
        assert {await queue.wait_for(job_id, PATIENCE) for job_id in ids} == {3}


async def test_a_flow_takes_calls_that_wait_for_each_other(backend: Backend) -> None:
    first, second = add_up.call(1), add_up.options(delay=0.01).call(2)
    job = Job(add_up.task_id, args=[3])
    last = gather.options(depends_on=[first, second, job.job_id]).call()
    ids = await FlowProducer(backend).add_flow("work", [last, second, job, first])
    again = await FlowProducer(backend).add_flow(
        "work", [first, gather.options(depends_on=[first, ids[1]]).call()]
    )
    queue = queue_on(backend)
    async with running(queue):
        found = await gather.handle(ids[0], queue).result(PATIENCE)
        assert sorted(found.values()) == [1, 2, 3]
        assert sorted((await queue.wait_for(again[1], PATIENCE)).values()) == [1, 2]
    assert len({*ids, *again}) == 6


async def test_a_flow_says_what_is_wrong_with_its_calls(backend: Backend) -> None:
    flow, call = FlowProducer(backend), add_up.call(1)
    with pytest.raises(InvalidFlow, match="twice in the flow"):
        await flow.add_flow("work", [call, call])
    with pytest.raises(InvalidArgument, match="must be in the flow"):
        await flow.add_flow("work", [gather.options(depends_on=[call]).call()])
    with pytest.raises(InvalidArgument, match="is for queue 'work'"):
        await flow.add_flow("other", [call])
    once = add_up.options(deduplication={"id": "a", "ttl": 1}).call()
    with pytest.raises(InvalidArgument, match="no deduplication"):
        await flow.add_flow("work", [once])
    with pytest.raises(InvalidArgument, match="only a call in a flow can wait for another call"):
        await gather.options(backend=backend, depends_on=[call]).enqueue()
    await has(queue_on(backend), 0)


@pytest.mark.parametrize("in_thread", [True, False])
async def test_a_task_adds_calls(backend: Backend, in_thread: bool) -> None:
    own = TaskRegistry()
    first: TaskWrapper[[], list[str]]

    @task("work", registry=own)
    async def second(day: date) -> dict[str, Any]:
        return {"year": day.year, "meta": dict(current_job().meta)}

    def add() -> list[str]:
        return [
            current_job().add(second.call(DAY)),
            current_job().add(second.options(meta={"own": "1"}, priority=1).call(DAY)),
        ]

    async def add_here() -> list[str]:
        return add()

    first = task("work", name="first", registry=own)(add if in_thread else add_here)
    queue = Queue("work", backend, registry=own)
    async with running(queue):
        job_id = await first.options(backend=backend, meta={"request": "r"}).enqueue()
        ids = await job_id.result(PATIENCE)
        results = [await queue.wait_for(each, PATIENCE) for each in ids]
    assert results == [
        {"year": 1852, "meta": {"request": "r"}},
        {"year": 1852, "meta": {"own": "1"}},
    ]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"job_id": "a"}, "takes no job_id"),
        ({"deduplication": {"id": "a"}}, "takes no deduplication"),
        ({"repeat_every": 60}, "takes no repeat_every"),
        ({"queue": "other"}, "is for queue 'other'"),
    ],
)
async def test_a_follow_up_that_cannot_be_is_refused(
    backend: Backend, options: Any, told: str
) -> None:
    async def first() -> None:
        current_job().add(add_up.options(**options).call(1))

    own = TaskRegistry()
    own.register(first, queue="work", name="first")
    queue = Queue("work", backend, registry=own)
    async with running(queue):
        with pytest.raises(JobFailed, match=told):
            await queue.wait_for(await queue.add("first"), PATIENCE)


async def test_the_arguments_of_a_call_are_written_once(backend: Backend) -> None:
    own = TaskRegistry()

    @task("work", registry=own)
    async def parse(data: Json[list[int]]) -> int:
        return len(data)

    text: Any = "[1, 2]"
    queue = Queue("work", backend, registry=own)
    (job_id,) = await queue.add_bulk([parse.call(text)])
    (other,) = await FlowProducer(backend).add_flow("work", [parse.call(text)])
    async with running(queue):
        assert [await queue.wait_for(each, PATIENCE) for each in (job_id, other)] == [2, 2]


async def test_a_call_for_another_queue_is_refused(backend: Backend) -> None:
    other, call = Queue("other", backend, registry=registry), add_up.call(1)
    with pytest.raises(InvalidArgument, match=r"is for queue 'work'.*options\(queue='other'\)"):
        await other.add_call(call)
    with pytest.raises(InvalidArgument, match="is for queue 'work'"):
        await other.add_bulk([call])
    assert isinstance(call, Call)


# -- handles


async def test_a_handle_is_the_id(backend: Backend) -> None:
    job_id = await add_up.enqueue(1, backend=backend)
    assert isinstance(job_id, str)
    assert str(UUID(job_id)) == job_id
    assert type(job_id.id) is str
    assert dict.fromkeys([str(job_id), job_id], 1) == {job_id.id: 1}
    assert json.loads(json.dumps({"id": job_id})) == {"id": job_id.id}
    for twin in (copy.copy(job_id), copy.deepcopy(job_id), pickle.loads(pickle.dumps(job_id))):
        assert twin == job_id
        assert type(twin) is str
    assert repr(job_id) == repr(job_id.id)
    assert str(await queue_on(backend).get_job_state(job_id)) == "waiting"


async def test_a_handle_can_be_an_argument_and_a_parent(backend: Backend) -> None:
    own = TaskRegistry()

    @task("work", registry=own)
    async def note(text: str, *others: Any) -> list[Any]:
        return [text, *others]

    queue = Queue("work", backend, registry=own)
    first = await note.enqueue("a", backend=backend)
    second = await note.options(backend=backend, depends_on=[first]).enqueue(first, first)
    third = await queue.add(note.task_id, [first], depends_on=[first], meta={"first": first})
    await Queue("work", backend).add("unknown", [first], {"id": first}, job_id=first + "x")
    async with running(queue):
        assert await second.result(PATIENCE) == [first, first]
        assert await queue.wait_for(third, PATIENCE) == [first]


async def test_a_result_is_what_the_annotation_says(backend: Backend) -> None:
    job_id = await write.enqueue(ADA, DAY, copies=2, backend=backend)
    async with running(queue_on(backend)):
        letters = await job_id.result(timeout=PATIENCE)
    assert letters == [Letter(ADA, DAY)] * 2
    assert isinstance(letters[0].to, Person)
    assert await job_id.state() is State.COMPLETED
    assert await write.handle(job_id.id, queue_on(backend)).result() == letters


async def test_a_handle_says_how_a_job_failed(backend: Backend) -> None:
    job_id = await fail.enqueue(backend=backend)
    assert await job_id.state() is State.WAITING
    with pytest.raises(TimeoutError):
        await job_id.result(0)
    async with running(queue_on(backend)):
        with pytest.raises(JobFailed, match="ValueError: no"):
            await job_id.result(PATIENCE)
    assert await job_id.retry()
    assert await job_id.state() in (State.WAITING, State.DELAYED)
    assert await job_id.cancel()
    assert await job_id.state() is State.CANCELLED
    missing = fail.handle("missing", queue_on(backend))
    assert await missing.state() is None
    assert await missing.details() is None
    assert not await missing.cancel()
    with pytest.raises(JobNotFound):
        await missing.result(0)


async def test_the_events_of_a_job_end_with_it(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, own = anyio.Event(), TaskRegistry()
    subscribe, subjects = backend.subscribe, list[str]()

    async def note(subject: str, *args: Any) -> Any:
        subscription = await subscribe(subject, *args)
        subjects.append(subject)
        return subscription

    @task("work", registry=own)
    async def work() -> None:
        await opened.wait()
        await current_job().report_progress(0.5)

    queue = Queue("work", backend, registry=own)
    job_id = await work.enqueue(backend=backend)
    other = await work.enqueue(backend=backend)
    names: list[str] = []
    completed: list[str] = []

    async def follow(found: list[str], *wanted: str) -> None:
        async for event in job_id.events(*wanted):
            assert event.job_id == job_id
            found.append(event.name)

    monkeypatch.setattr(backend, "subscribe", note)
    with anyio.fail_after(PATIENCE):
        async with running(queue), anyio.create_task_group() as group:
            group.start_soon(follow, names)
            group.start_soon(follow, completed, "job:completed")
            await holds(lambda: sum(job_id in subject for subject in subjects) == 2)
            opened.set()
            await work.handle(other, queue).result(PATIENCE)
    assert {*names} <= {"job:started", "job:progress", "job:completed"}
    assert (names[-1], completed) == ("job:completed", ["job:completed"])
    with anyio.fail_after(PATIENCE):  # it has ended: nothing comes, and nothing is waited for
        assert [event async for event in job_id.events()] == []


# -- results


def unannotated():
    return (1, 2)


def of_a_tuple() -> tuple[int, date]:
    return 1, DAY


def of_a_coroutine() -> Coroutine[Any, Any, set[int]]:
    async def give() -> set[int]:
        return {1, 2}

    return give()


def of_an_awaitable() -> Awaitable[Person]:
    async def give() -> Person:
        return ADA

    return give()


def constrained() -> Annotated[int, Field(gt=10)]:
    return 11


def nothing() -> None: ...


@functools.wraps(of_a_tuple)
def decorated(*args: Any, **kwargs: Any):
    return of_a_tuple(*args, **kwargs)


class Adder:
    async def __call__(self) -> Person:
        return ADA


RESULTS: list[tuple[Any, Any]] = [
    (unannotated, [1, 2]),
    (of_a_tuple, (1, DAY)),
    (of_a_coroutine, {1, 2}),
    (of_an_awaitable, ADA),
    (constrained, 11),
    (nothing, None),
    (decorated, (1, DAY)),
    (Adder(), ADA),
    (functools.partial(of_a_tuple), (1, DAY)),
    (math.pi.as_integer_ratio, list(math.pi.as_integer_ratio())),
]


@pytest.mark.parametrize(("function", "expected"), RESULTS)
async def test_results_of_every_kind_arrive(function: Any, expected: Any) -> None:
    own, backend = TaskRegistry(), InMemoryBackend()
    wrapped: TaskWrapper[[], Any] = task("work", name="given", registry=own)(function)
    job_id = await wrapped.enqueue(backend=backend)
    async with running(Queue("work", backend, registry=own)):
        assert await job_id.result(PATIENCE) == expected


async def test_a_result_that_is_not_what_was_said_is_told(backend: Backend) -> None:
    own = TaskRegistry()

    @task("work", registry=own)
    async def lie() -> date:
        return "soon"  # type: ignore[return-value]

    @task("work", registry=own, validate=False)
    async def shrug() -> date:
        return "soon"  # type: ignore[return-value]

    queue = Queue("work", backend, registry=own)
    lied, shrugged = await lie.enqueue(backend=backend), await shrug.enqueue(backend=backend)
    async with running(queue):
        with pytest.raises(
            InvalidResult, match=r"lie says that it returns: value: Input should be"
        ):
            await lied.result(PATIENCE)
        assert await queue.wait_for(lied) == "soon"
        assert str(await shrugged.result(PATIENCE)) == "soon"


def test_a_handle_needs_its_queue() -> None:
    queue = Queue("work", InMemoryBackend())
    assert write.handle("a", queue).queue is queue
    assert isinstance(write.handle("a", queue), JobHandle)
