"""`@task`: what a function gets when a worker runs it, and what `enqueue` and its like do."""

from __future__ import annotations

import functools
import gc
import inspect
import threading
import weakref
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal
from uuid import UUID

import anyio
import pytest
from pydantic import BaseModel, Field

from asyncmq_nats.backends import set_default_backend
from asyncmq_nats.backends.base import Backend
from asyncmq_nats.backends.inmemory import InMemoryBackend
from asyncmq_nats.exceptions import InvalidArgument, InvalidCall, JobFailed
from asyncmq_nats.queues import Queue
from asyncmq_nats.runtime.registry import TASK_REGISTRY, TaskRegistry
from asyncmq_nats.tasks import OUR_KEYWORDS, QUEUES, TaskWrapper, list_tasks, task
from tests.running import PATIENCE, has, run_jobs, running


class Colour(Enum):
    RED = "red"
    BLUE = "blue"


Positive = Annotated[int, Field(gt=0)]


@dataclass
class Point:
    x: int
    y: int


class Person(BaseModel):
    name: str
    born: date
    nicknames: list[str] = []


@pytest.fixture
def registry() -> TaskRegistry:
    return TaskRegistry()


async def run(
    backend: Backend,
    registry: TaskRegistry,
    function: TaskWrapper[Any, Any],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Enqueue the task, run it in a worker, and return its result."""
    queue = Queue("work", backend, registry=registry)
    job_id = await function.enqueue(*args, backend=backend, **kwargs)
    await run_jobs(queue)
    return await queue.wait_for(job_id, timeout=PATIENCE)


# -- the decorator


async def double(number: int) -> int:
    """Twice as much."""
    return 2 * number


def test_a_task_is_named_after_its_function(registry: TaskRegistry) -> None:
    wrapped = task("work", registry=registry)(double)
    assert wrapped.task_id == f"{__name__}.double"
    assert wrapped.__doc__ == "Twice as much."
    assert wrapped.__module__ == __name__


def test_a_task_may_have_another_name(registry: TaskRegistry) -> None:
    assert task("work", name="twice", registry=registry)(double).task_id == "twice"


def test_two_tasks_of_one_name_are_refused(registry: TaskRegistry) -> None:
    task("work", name="same", registry=registry)(double)
    with pytest.raises(ValueError, match="'same' is registered already"):

        @task("work", name="same", registry=registry)
        def other() -> None: ...


def test_a_queue_is_required() -> None:
    with pytest.raises(TypeError):
        task()  # type: ignore[call-overload]


def test_the_default_registry_is_listed() -> None:
    @task("work", name="tests.listed", retries=2, ttl=60)
    def listed() -> None: ...

    entry = list_tasks()["tests.listed"]
    assert (entry.queue, entry.retries, entry.ttl) == ("work", 2, 60)
    assert list_tasks() is not TASK_REGISTRY
    assert list_tasks() == dict(TASK_REGISTRY)


# -- calling it here


async def test_calling_a_task_runs_it_here(registry: TaskRegistry) -> None:
    @task("work", registry=registry)
    def thread() -> str:
        return threading.current_thread().name

    assert await task("work", registry=registry)(double)(4) == 8
    assert await thread() != threading.current_thread().name


async def test_calling_a_task_raises_what_it_raises(registry: TaskRegistry) -> None:
    @task("work", registry=registry)
    async def fail() -> None:
        raise KeyError("here")

    with pytest.raises(KeyError, match="here"):
        await fail()


# -- enqueue and its like


@pytest.mark.parametrize("method", ["enqueue", "delay", "send"])
async def test_enqueue_returns_the_id_of_a_job_that_runs(
    backend: Backend, registry: TaskRegistry, method: str
) -> None:
    wrapped = task("work", registry=registry)(double)
    queue = Queue("work", backend, registry=registry)
    job_id = await getattr(wrapped, method)(4, backend=backend)
    async with running(queue):
        assert await queue.wait_for(job_id, timeout=PATIENCE) == 8


async def test_enqueue_says_of_the_job_what_the_task_says(
    backend: Backend, registry: TaskRegistry
) -> None:
    wrapped = task("work", 2, 60, backoff=3, registry=registry)(double)
    job = await Queue("work", backend).get_job(
        await wrapped.enqueue(4, backend=backend, priority=1)
    )
    assert job is not None
    assert (job["task"], job["args"], job["kwargs"]) == (wrapped.task_id, [4], {})
    assert (job["max_retries"], job["ttl"], job["backoff"], job["priority"]) == (2, 60, 3, 1)


async def test_enqueue_later_returns_the_id_too(backend: Backend, registry: TaskRegistry) -> None:
    wrapped = task("work", registry=registry)(double)
    job_id = await wrapped.enqueue(number=4, backend=backend, delay=3600)
    assert await Queue("work", backend).get_job_state(job_id) == "delayed"


async def test_enqueue_with_an_id_is_idempotent(backend: Backend, registry: TaskRegistry) -> None:
    wrapped = task("work", registry=registry)(double)
    assert [await wrapped.enqueue(4, backend=backend, job_id="a") for _ in range(2)] == ["a", "a"]
    await has(Queue("work", backend), 1)


async def test_enqueue_goes_to_the_default_backend(registry: TaskRegistry) -> None:
    backend = InMemoryBackend()
    set_default_backend(backend)
    try:
        job_id = await task("work", registry=registry)(double).enqueue(4)
    finally:
        set_default_backend(None)
    assert await Queue("work", backend).get_job_state(job_id) == "waiting"


async def test_a_worker_knows_its_own_registry_only(
    backend: Backend, registry: TaskRegistry
) -> None:
    wrapped = task("work", name="only there", registry=registry)(double)
    queue = Queue("work", backend, registry=TaskRegistry())
    job_id = await wrapped.enqueue(4, backend=backend)
    async with running(queue):
        with pytest.raises(JobFailed, match="'only there'"):
            await queue.wait_for(job_id, timeout=PATIENCE)


# -- arguments


@pytest.mark.parametrize(
    ("annotation", "value"),
    [
        (datetime, datetime(2026, 1, 2, 3, 4, 5, 678, tzinfo=UTC)),
        (date, date(2026, 1, 2)),
        (timedelta, timedelta(days=1, seconds=2)),
        (UUID, UUID(int=7)),
        (Decimal, Decimal("12345678901234567890.10")),
        (Colour, Colour.BLUE),
        (Point, Point(1, 2)),
        (Person, Person(name="Ada", born=date(1815, 12, 10), nicknames=["Countess"])),
        (tuple[int, str], (1, "a")),
        (set[int], {3}),
        (frozenset[str], frozenset({"a"})),
        (bytes, b"text"),
        (Path, Path("a/b")),
        (Literal["a", "b"], "a"),
        (int, 2**80),
        (float, 0.1),
        (dict[int, Point], {7: Point(1, 2)}),
        (list[Person | Point], [Point(1, 2), Person(name="Ada", born=date(1815, 12, 10))]),
        (date | None, None),
        (date | None, date(2026, 1, 2)),
        (Any, {"as": ["it", "is"]}),
    ],
    ids=repr,
)
async def test_an_argument_arrives_as_its_annotation_says(
    backend: Backend, registry: TaskRegistry, annotation: Any, value: Any
) -> None:
    async def compare(argument: Any, *, named: Any) -> bool:
        return all(type(each) is type(value) and each == value for each in (argument, named))

    compare.__annotations__ = {"argument": annotation, "named": annotation, "return": "bool"}
    wrapped = task("work", registry=registry)(compare)
    assert await run(backend, registry, wrapped, value, named=value) is True


async def test_annotations_that_are_strings_are_read(
    backend: Backend, registry: TaskRegistry
) -> None:
    @task("work", registry=registry)
    def age(
        person: Person,
        on: date | None = None,
        *,
        colours: set[Colour] = frozenset(),  # type: ignore[assignment]
    ) -> list[Any]:
        assert isinstance(on, date)
        return [on.year - person.born.year, sorted(colour.name for colour in colours)]

    person = Person(name="Ada", born=date(1815, 12, 10))
    assert await run(backend, registry, age, person, date(1852, 1, 1), colours={Colour.RED}) == [
        37,
        ["RED"],
    ]
    assert await run(
        backend, registry, age, {"name": "Ada", "born": "1815-12-10"}, on="1852-01-01"
    ) == [37, []]


async def test_defaults_stand_in_for_what_is_missing(
    backend: Backend, registry: TaskRegistry
) -> None:
    @task("work", registry=registry)
    async def order(item: str, count: int = 1, *, note: str | None = None) -> list[Any]:
        return [item, count, note]

    assert await run(backend, registry, order, "tea") == ["tea", 1, None]
    assert await run(backend, registry, order, item="tea", note="hot") == ["tea", 1, "hot"]


async def test_any_number_of_arguments_is_passed_on(
    backend: Backend, registry: TaskRegistry
) -> None:
    @task("work", registry=registry)
    async def everything(*args: int, **kwargs: date) -> list[Any]:
        return [sum(args), {name: day.year for name, day in kwargs.items()}]

    assert await run(
        backend, registry, everything, 1, "2", 3, first=date(2026, 1, 1), last="2027-01-01"
    ) == [
        6,
        {"first": 2026, "last": 2027},
    ]


@pytest.mark.parametrize(
    ("args", "kwargs", "told"),
    [
        (["x"], {}, "number.*valid integer"),
        ([], {"number": "x"}, "number.*valid integer"),
        ([1], {"when": "soon"}, "when.*valid date"),
        ([1, "soon"], {}, "when.*valid date"),
        ([], {}, "number.*[Mm]issing"),
        ([1], {"unknown": 1}, "unknown.*[Uu]nexpected"),
        ([1, None, None, 4], {}, "[Uu]nexpected"),
        ([1], {"point": {"x": 1}}, r"point\.y"),
        ([0], {}, "number.*greater than 0"),
    ],
)
async def test_an_argument_of_the_wrong_kind_is_refused_or_fails_the_job_by_name(
    backend: Backend, registry: TaskRegistry, args: list[Any], kwargs: dict[str, Any], told: str
) -> None:
    ran: list[int] = []

    @task("work", registry=registry)
    async def careful(
        number: Positive, when: date | None = None, point: Point | None = None
    ) -> None:
        ran.append(number)

    with pytest.raises(InvalidCall, match=told):
        await careful.enqueue(*args, **kwargs, backend=backend)
    unchecked = careful.options(backend=backend, validate=False)
    job_id = await unchecked.enqueue(*args, **kwargs)
    async with running(Queue("work", backend, registry=registry)):
        with pytest.raises(JobFailed, match=told):
            await job_id.result(PATIENCE)
    assert ran == []


async def test_an_error_of_pydantic_in_the_task_is_the_tasks_own(
    backend: Backend, registry: TaskRegistry
) -> None:
    @task("work", registry=registry)
    async def careless() -> None:
        Person.model_validate({"name": "Ada"})

    with pytest.raises(JobFailed, match=r"Person.*born"):
        await run(backend, registry, careless)


# -- async is told from what is returned


def plain_decorator(function: Any) -> Any:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return wrapper


class Delayed:
    def __init__(self, value: int) -> None:
        self.value = value

    def __await__(self) -> Any:
        yield from anyio.lowlevel.checkpoint().__await__()
        return self.value


@plain_decorator
async def decorated_async(number: int) -> int:
    await anyio.lowlevel.checkpoint()
    return 2 * number


def returns_coroutine(number: int) -> Any:
    return double(number)


def returns_awaitable(number: int) -> Any:
    return Delayed(2 * number)


@pytest.mark.parametrize("function", [decorated_async, returns_coroutine, returns_awaitable])
async def test_what_a_function_returns_is_awaited(
    backend: Backend, registry: TaskRegistry, function: Any
) -> None:
    wrapped = task("work", registry=registry)(function)
    assert await run(backend, registry, wrapped, "4") == 8
    assert await wrapped(4) == 8


# -- the names of enqueue


@pytest.mark.parametrize("name", sorted(OUR_KEYWORDS))
async def test_a_parameter_of_a_task_may_have_the_name_of_one_of_enqueue(
    backend: Backend, registry: TaskRegistry, name: str
) -> None:
    scope: dict[str, Any] = {}
    exec(f"async def remind(user, {name}='mine'): return [user, {name}]", scope)
    remind = task("work", name="remind", registry=registry)(scope["remind"])
    set_default_backend(backend)
    try:
        ids = [
            await remind.enqueue("ada", **{name: "yours"}),
            await remind.options(backend=backend, priority=4).enqueue("ada", **{name: "yours"}),
            await remind.enqueue("ada"),
        ]
        async with running(Queue("work", backend, registry=registry)):
            results = [await job_id.result(PATIENCE) for job_id in ids]
    finally:
        set_default_backend(None)
    assert results == [["ada", "yours"], ["ada", "yours"], ["ada", "mine"]]


def test_the_keywords_are_those_of_enqueue() -> None:
    parameters = inspect.signature(TaskWrapper.enqueue).parameters
    assert {*parameters} - {"self", "args", "kwargs"} == OUR_KEYWORDS
    assert {
        "backend",
        "delay",
        "depends_on",
        "job_id",
        "on_parent_failure",
        "priority",
        "repeat_every",
    } == OUR_KEYWORDS


# -- a backend for each request


async def test_a_backend_that_was_used_for_one_request_is_freed(registry: TaskRegistry) -> None:
    wrapped = task("work", registry=registry)(double)
    alive: weakref.WeakSet[InMemoryBackend] = weakref.WeakSet()

    async def handle_request() -> None:
        backend = InMemoryBackend()
        alive.add(backend)
        await wrapped.enqueue(4, backend=backend)
        await backend.close()

    for _ in range(10):
        await handle_request()
    gc.collect()
    assert len(alive) == 0


async def test_a_backend_keeps_its_queues(backend: Backend, registry: TaskRegistry) -> None:
    """So that each is declared once."""
    wrapped = task("work", registry=registry)(double)
    ids = [await wrapped.enqueue(number, backend=backend) for number in range(3)]
    assert len(set(ids)) == 3
    assert len(vars(backend)[QUEUES]) == 1


@pytest.mark.parametrize("value", ["smtp", 5, object()])
async def test_what_is_no_backend_is_told(registry: TaskRegistry, value: Any) -> None:
    with pytest.raises(InvalidArgument, match="backend must be a backend"):
        await task("work", registry=registry)(double).enqueue(4, backend=value)


# -- what a task raises is its own


@pytest.mark.parametrize("error", [GeneratorExit, SystemExit, StopAsyncIteration, BaseException])
@pytest.mark.parametrize("in_thread", [True, False])
async def test_no_exception_of_a_task_ends_the_worker(
    backend: Backend, registry: TaskRegistry, error: type[BaseException], in_thread: bool
) -> None:
    async def fail() -> None:
        raise error("of the task")

    def fail_in_thread() -> None:
        raise error("of the task")

    registry.register(fail_in_thread if in_thread else fail, queue="work", name="fail")
    registry.register(double, queue="work", name="double")
    queue = Queue("work", backend, registry=registry)
    async with running(queue):
        with pytest.raises(JobFailed, match=f"{error.__name__}: of the task"):
            await queue.wait_for(await queue.add("fail"), timeout=PATIENCE)
        assert await queue.wait_for(await queue.add("double", [4]), timeout=PATIENCE) == 8
