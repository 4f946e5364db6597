"""An application that uses each typed call rightly, and misuses each of them.

It is never executed. mypy reads it in its normal run, pyright in `test_type_checkers.py`. Both
refuse a `type: ignore` without an error: so each misuse is reported, and no right use is.
"""

# pyright: standard, reportUnnecessaryTypeIgnoreComment=error

from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from datetime import date, timedelta
from typing import Any, assert_type

from asyncmq_nats import (
    Backoff,
    Call,
    Event,
    Expired,
    FlowProducer,
    InMemoryBackend,
    Job,
    JobContext,
    JobFailed,
    JobHandle,
    Middleware,
    Queue,
    Reject,
    Retry,
    Snooze,
    State,
    add_middleware,
    current_job,
    task,
)
from asyncmq_nats.exceptions import FailedAttempt
from asyncmq_nats.middleware import AddJobs, Ending, RunTask
from asyncmq_nats.tasks import TaskOptions, TaskWrapper

backend = InMemoryBackend()
queue = Queue("mail", backend)


@dataclass
class Receipt:
    address: str
    on: date


@task("mail", retries=3, retry_on=(ConnectionError, TimeoutError), give_up_on=ValueError)
async def send(address: str, *, text: str = "", on: date | None = None) -> Receipt:
    return Receipt(address, on or date.today())


@task("mail", process=True, backoff=lambda retry, error: float(retry))
def count(text: str, /, *words: int) -> int:
    return len(text) + sum(words)


@task("mail")
async def remind(user: str, delay: timedelta, priority: str = "high") -> None: ...


@task("mail", progress=True)
async def report(pages: int, report_progress: Callable[..., Awaitable[None]]) -> float:
    return 0.5


# -- here


async def call_here() -> None:
    assert_type(await send("ada", text="hi"), Receipt)
    assert_type(await count("three", 1), int)
    await send(7)  # type: ignore[arg-type]
    await send("ada", txt="hi")  # type: ignore[call-arg]
    await count(text="three")  # type: ignore[call-arg]


# -- enqueue


async def enqueue() -> None:
    assert_type(await send.enqueue("ada", text="hi"), JobHandle[Receipt])
    assert_type(await count.enqueue("three", 1, 2), JobHandle[int])
    assert_type(await remind.enqueue("ada", timedelta(1), priority="low"), JobHandle[None])
    assert_type(await report.enqueue(3), JobHandle[float])
    await send.enqueue()  # type: ignore[call-overload]
    await send.enqueue("ada", on="soon")  # type: ignore[call-overload]
    await count.enqueue("three", "four")  # type: ignore[call-overload]


async def enqueue_with_options() -> None:
    options = send.options(
        delay=3600,
        priority=1,
        retries=5,
        backoff=Backoff(delay=2),
        ttl=None,
        timeout=30,
        queue="mail",
        job_id="letter",
        meta={"request": "r-7"},
        deduplication={"id": "letter", "ttl": 60},
        on_parent_failure="run",
        validate=False,
    )
    assert_type(await options.enqueue("ada", text="hi", on=date(2030, 1, 1)), JobHandle[Receipt])
    assert_type(await count.options(backend=backend).enqueue("three", 4), JobHandle[int])
    assert_type(await remind.options(delay=1).enqueue("ada", timedelta(1)), JobHandle[None])
    assert_type(
        await send.options(queue=queue, depends_on=["a"]).enqueue("ada"), JobHandle[Receipt]
    )
    await options.enqueue(7)  # type: ignore[arg-type]
    await options.enqueue()  # type: ignore[call-arg]
    await options.enqueue("ada", "hi")  # type: ignore[call-arg]
    await options.enqueue("ada", on="soon")  # type: ignore[arg-type]
    await options.enqueue("ada", delay=5)  # type: ignore[call-arg]
    await remind.options(delay=1).enqueue("ada", delay=5)  # type: ignore[arg-type]
    await count.options().enqueue(text="three")  # type: ignore[call-arg]


def misuse_options() -> None:
    send.options(delay="soon")  # type: ignore[arg-type]
    send.options(delay=timedelta(1))  # type: ignore[arg-type]
    send.options(priority="high")  # type: ignore[arg-type]
    send.options(retries=1.5)  # type: ignore[arg-type]
    send.options(meta={"request": 7})  # type: ignore[dict-item]
    send.options(queue=backend)  # type: ignore[arg-type]
    send.options(on_parent_failure="explode")  # type: ignore[arg-type]
    send.options(dealy=5)  # type: ignore[call-arg]
    send.options(5)  # type: ignore[arg-type, call-arg]


# -- calls


async def pass_calls_on(flow: FlowProducer) -> None:
    first = send.call("ada", text="hi")
    second = count.options(depends_on=[first, "other"]).call("three")
    assert_type(first, Call[Receipt])
    assert_type(second, Call[int])
    assert_type(await queue.add_bulk([first, second, {"task_id": "other"}]), list[str])
    assert_type(await flow.add_flow("mail", [first, second, Job("other")]), list[str])
    assert_type(current_job().add(first), str)
    assert_type(await queue.add_call(first), str)
    take_calls([first, second], first)
    send.call(7)  # type: ignore[arg-type]
    send.call("ada", txt="hi")  # type: ignore[call-arg]
    send.options(delay=5).call()  # type: ignore[call-arg]
    await queue.add_bulk([send])  # type: ignore[list-item]
    await queue.add_bulk([send.call])  # type: ignore[list-item]
    await flow.add_flow("mail", ["ada"])  # type: ignore[list-item]
    current_job().add(first, ["ada"])  # type: ignore[call-overload]
    await queue.add_call("send")  # type: ignore[arg-type]
    take_calls([first], second)  # type: ignore[arg-type]


def take_calls(calls: Sequence[Call[Any]], call: Call[Receipt]) -> None: ...


# -- handles


async def use_handles() -> None:
    handle = await send.enqueue("ada")
    text: str = handle
    known: dict[str, int] = {handle: 1, text: 2}
    assert_type(await handle.result(timeout=5), Receipt)
    assert_type(await (await count.enqueue("three")).result(), int)
    assert_type(await handle.state(), State | None)
    assert_type(await handle.cancel(), bool)
    assert_type(await handle.retry(), bool)
    assert_type(await handle.details(), dict[str, Any] | None)
    assert_type(send.handle("a"), JobHandle[Receipt])
    assert_type(handle.id, str)
    async with aclosing(handle.events("job:completed")) as events:
        async for event in events:
            assert_type(event, Event)
    await queue.wait_for(handle)
    take_ids([handle, "b"])
    known[handle.id] = 3
    number: int = await handle.result()  # type: ignore[assignment]
    await handle.result(timeout="soon")  # type: ignore[arg-type]
    print(number, (await handle.result()).adress)  # type: ignore[attr-defined]


def take_ids(ids: list[str]) -> None: ...


def take_tasks(wrapper: TaskWrapper[[str], int], options: TaskOptions[..., Receipt]) -> None: ...


# -- outcomes


async def choose_outcomes() -> None:
    try:
        raise Retry("busy", after=5)
    except JobFailed as failed:
        assert_type(failed.attempts, tuple[FailedAttempt, ...])
        assert_type((failed.type, failed.message, failed.traceback), tuple[str, str, str])
        assert_type(failed.attempts[0].at, float)
    errors = [Retry(after=timedelta(hours=1)), Reject("no"), Snooze(60), Expired()]
    print(errors)
    Retry(after="soon")  # type: ignore[arg-type]
    Snooze()  # type: ignore[call-arg]
    Reject(7)  # type: ignore[arg-type]


@task("mail", retry_on="ValueError")  # type: ignore[arg-type]
async def retried_on_text() -> None: ...


@task("mail", give_up_on=[int])  # type: ignore[list-item]
async def given_up_on_numbers() -> None: ...


@task("mail", backoff=lambda one, two, three: 1.0)  # type: ignore[arg-type]
async def with_a_strange_backoff() -> None: ...


# -- middleware


class Log(Middleware):
    async def enqueue(self, queue: str, jobs: Sequence[Job], add: AddJobs) -> list[str]:
        ids = await add(jobs)
        assert_type(ids, list[str])
        return ids

    async def run(self, context: JobContext, call: RunTask) -> Any:
        return await call()

    async def end(self, context: JobContext, ending: Ending) -> None:
        assert_type(ending.error, str | None)


class Part(Middleware):
    async def end(self, context: JobContext, ending: Ending) -> None: ...


class Plain(Middleware):
    def end(self, context: JobContext, ending: Ending) -> None:
        assert_type(context.now(), float)


class Wrong(Middleware):
    async def run(self, context: JobContext) -> Any: ...  # type: ignore[override]


def use_middleware() -> None:
    add_middleware(Log())
    add_middleware(Part(), queue="mail")
    Queue("mail", backend, middleware=[Log(), Part(), Plain()])
    add_middleware(Log)  # type: ignore[arg-type]
    add_middleware(print)  # type: ignore[arg-type]
    Queue("mail", backend, middleware=Log())  # type: ignore[arg-type]
    Queue("mail", backend, lifespan=5)  # type: ignore[arg-type]
