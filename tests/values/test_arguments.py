"""Arguments travel as JSON and arrive equal.

The tables of docs/arguments.md, and the promise that what is accepted arrives equal.
"""

import json
import re
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum, IntEnum, StrEnum
from functools import wraps
from pathlib import Path
from typing import Any, Literal, NamedTuple, Optional, Union
from uuid import UUID

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st
from pydantic import (
    Base64Bytes,  # noqa: F401  the page names it
    BaseModel,
    ConfigDict,
    Field,
    Json,
    PrivateAttr,
    SecretStr,
    TypeAdapter,
    ValidationError,
    computed_field,
)
from pydantic_core import from_json, to_json

from asyncmq_nats.backends.base import Backend
from asyncmq_nats.context import current_job
from asyncmq_nats.exceptions import JobFailed, NotSerializable
from asyncmq_nats.flow import FlowProducer
from asyncmq_nats.jobs import Job, new_job
from asyncmq_nats.queues import Queue
from asyncmq_nats.runtime.registry import TaskRegistry
from asyncmq_nats.tasks import TaskWrapper, task
from tests.running import PATIENCE, run_jobs

PAGE = Path(__file__).parents[2] / "docs" / "arguments.md"


class Colour(Enum):
    RED = "red"
    BLUE = "blue"


class Size(IntEnum):
    SMALL = 1
    LARGE = 2


class Word(StrEnum):
    YES = "yes"


@dataclass
class Point:
    x: int
    y: int


class Pair(NamedTuple):
    one: int
    two: int


class Person(BaseModel):
    name: str


class Area(BaseModel):
    model_config = ConfigDict(extra="forbid")
    side: int

    @computed_field  # type: ignore[prop-decorator]
    @property
    def size(self) -> int:
        return self.side**2


class Strict(BaseModel):
    model_config = ConfigDict(strict=True)
    day: date


class Aliased(BaseModel):
    name: str = Field(alias="fullName")


class TwoNames(BaseModel):
    name: str = Field(validation_alias="reading", serialization_alias="writing")


class Document(BaseModel):
    body: Json[list[int]]


class Account(BaseModel):
    password: SecretStr


class Animal(BaseModel):
    name: str


class Dog(Animal):
    tricks: int


class Noted(BaseModel):
    number: int
    _note: int = PrivateAttr(default=0)


def noted(number: int) -> Noted:
    value = Noted(number=number)
    value._note = 7
    return value


class Opaque:
    pass


def rows(heading: str) -> list[Any]:
    """Return annotation, value and last column of each row of a table, as they are written."""
    table = PAGE.read_text().split(f"## {heading}\n")[1].split("\n## ")[0]
    found = re.findall(r"^\| (?:`(.+?)`[^|]*?|(none)) \| `(.+?)` \| `?(.+?)`? \|$", table, re.M)
    assert len(found) == table.count("\n| ") - 1
    return [
        pytest.param(annotation or None, value, last, id=f"{annotation or none}={value}")
        for annotation, none, value, last in found
    ]


def meaning(text: str) -> Any:
    return eval(text, globals())  # the table of our own page


def echo_task(annotation: str | None, registry: TaskRegistry) -> TaskWrapper[Any, Any]:
    """Return a task that notes its argument."""

    async def echo(value):
        seen.append(value)

    seen: list[Any] = []
    echo.__annotations__ = {} if annotation is None else {"value": meaning(annotation)}
    echo.seen = seen  # type: ignore[attr-defined]
    return task("work", registry=registry, name="echo")(echo)


@pytest.mark.parametrize(("annotation", "text", "written"), rows("What is carried"))
async def test_what_the_page_says_is_carried_arrives_equal(
    backend: Backend, annotation: str | None, text: str, written: str
) -> None:
    registry = TaskRegistry()
    echo, value = echo_task(annotation, registry), meaning(text)
    queue = Queue("work", backend, registry=registry)
    ids = [
        await echo.enqueue(value, backend=backend),
        await queue.add("echo", [], {"value": value}),
    ]
    jobs = [await queue.get_job(job_id) for job_id in ids]
    assert [job["args"] or [job["kwargs"]["value"]] for job in jobs if job] == [
        [json.loads(written)]
    ] * 2
    await run_jobs(queue)
    [await queue.wait_for(job_id, timeout=PATIENCE) for job_id in ids]
    expected = value
    if annotation is not None and annotation != "Any":
        expected = registry["echo"].arguments.read([json.loads(written)], {})[0][0]
        if type(value) is type(expected) and annotation != "Base64Bytes":
            assert expected == value
    seen = echo.seen  # type: ignore[attr-defined]
    assert seen == [expected, expected]
    assert {type(each) for each in seen} == {type(expected)}


@pytest.mark.parametrize(("annotation", "text", "reason"), rows("What is refused"))
async def test_what_the_page_says_is_refused_is_refused_by_name(
    backend: Backend, annotation: str | None, text: str, reason: str
) -> None:
    registry = TaskRegistry()
    echo, value = echo_task(annotation, registry), meaning(text)
    queue = Queue("work", backend, registry=registry)
    with pytest.raises(NotSerializable, match="argument 'value' of task 'echo'"):
        await echo.enqueue(value, backend=backend)
    for add in (
        lambda: queue.add("echo", kwargs={"value": value}),
        lambda: queue.add_bulk([{"task_id": "echo", "args": [value]}]),
        lambda: queue.enqueue({"task": "echo", "args": [value]}),
        lambda: queue.upsert_repeatable("echo", every=60, args=[value]),
    ):
        with pytest.raises(NotSerializable, match="argument 'value' of task 'echo'"):
            await add()
    assert await queue.count() == 0
    assert reason


# -- more than one argument, and every way to add


async def test_flows_and_follow_ups_are_written_by_the_annotations(backend: Backend) -> None:
    registry = TaskRegistry()
    queue = Queue("work", backend, registry=registry)
    seen: list[Any] = []

    @task("work", registry=registry, name="area")
    async def area(value: Area, more: int = 0) -> None:
        seen.append(value)

    @task("work", registry=registry, name="parent")
    async def parent() -> None:
        current_job().add("area", [Area(side=3)])
        with pytest.raises(NotSerializable, match="'more'"):
            current_job().add("area", [Area(side=3)], {"more": float("nan")})

    await queue.add("parent")
    await queue.add_linked([new_job(task_id="area", args=[Area(side=4)])])
    await queue.enqueue({"task": "area", "kwargs": {"value": Area(side=5)}})
    await run_jobs(queue)
    assert sorted(each.side for each in seen) == [3, 4, 5]
    with pytest.raises(NotSerializable, match="'more'"):
        await queue.add_linked([new_job(task_id="area", args=[{"side": 1}, (1, 2)])])


async def test_a_flow_without_the_task_is_written_by_the_classes(backend: Backend) -> None:
    registry = TaskRegistry()
    seen: list[Any] = []

    async def days(first: date, points: set[int]) -> None:
        seen.append((first, points))

    registry.register(days, queue="work", name="days")
    job = Job(task_id="days", args=[date(2026, 1, 2)], kwargs={"points": {1}})
    await FlowProducer(backend).add_flow("work", [job])
    await run_jobs(Queue("work", backend, registry=registry))
    assert seen == [(date(2026, 1, 2), {1})]


@pytest.mark.parametrize(
    "value",
    [
        SecretStr("s"),
        [SecretStr("s")],
        {"a": Account(password=SecretStr("s"))},
        b"\xff",
        float("nan"),
        {"a": [float("inf")]},
        {1: "a", "1": "b"},
        [{True: 1, "true": 2}],
        Opaque(),
        noted(1),
        10**5000,
    ],
    ids=lambda value: type(value).__name__,
)
async def test_of_an_unknown_task_what_no_annotation_can_read_is_refused(
    backend: Backend, value: Any
) -> None:
    queue = Queue("work", backend, registry=TaskRegistry())
    with pytest.raises(NotSerializable, match="argument 0 of task 'elsewhere'"):
        await queue.add("elsewhere", [value])
    with pytest.raises(NotSerializable, match="argument 'named' of task 'elsewhere'"):
        await queue.add("elsewhere", kwargs={"named": value})


@pytest.mark.parametrize(
    ("value", "annotation"),
    [
        (Area(side=1), Area),
        (Strict(day=date(2026, 1, 2)), Strict),
        (Document(body="[1]"), Document),  # type: ignore[arg-type]
        (TwoNames(reading="Ada"), TwoNames),
        ([Aliased(fullName="Ada")], list[Aliased]),
        ({Colour.RED: {1, 2}}, dict[Colour, set[int]]),
        ((1, Point(1, 2)), tuple[int, Point]),
        (Pair(1, 2), Pair),
    ],
    ids=repr,
)
async def test_of_an_unknown_task_a_value_is_written_so_that_its_class_can_read_it(
    value: Any, annotation: Any
) -> None:
    args, _ = TaskRegistry().write("elsewhere", [value], {})
    registry = TaskRegistry()

    def there(value: Any) -> None: ...

    there.__annotations__ = {"value": annotation}
    registry.register(there, queue="work", name="there")
    read, _ = registry["there"].arguments.read(from_json(to_json(args)), {})
    assert read == [value]


# -- validation switched off, defaults


async def test_a_default_of_none_admits_none(backend: Backend) -> None:
    registry = TaskRegistry()
    seen: list[Any] = []

    @task("work", registry=registry, name="note")
    async def note(
        text: str = None,  # type: ignore[assignment]  # noqa: RUF013
        count: int = None,  # type: ignore[assignment]  # noqa: RUF013
    ) -> None:
        seen.append((text, count))

    await note.enqueue(None, count=None, backend=backend)
    await note.enqueue("a", count="7", backend=backend)
    await run_jobs(Queue("work", backend, registry=registry))
    assert sorted(seen, key=str) == [("a", 7), (None, None)]


async def test_validation_can_be_switched_off(backend: Backend) -> None:
    registry = TaskRegistry()
    seen: list[Any] = []

    @task("work", registry=registry, name="plain", validate=False)
    async def plain(number: int, when: date | None = None) -> None:
        seen.append((number, when))

    await plain.enqueue("x", when="soon", backend=backend)
    await run_jobs(Queue("work", backend, registry=registry))
    assert seen == [("x", "soon")]
    with pytest.raises(NotSerializable, match="'when'"):  # there is no annotation that counts
        await plain.enqueue(1, when=date(2026, 1, 2), backend=backend)


async def test_a_field_of_pydantic_may_be_the_default(backend: Backend) -> None:
    registry = TaskRegistry()
    seen: list[Any] = []

    @task("work", registry=registry, name="note")
    async def note(
        text: str = Field("none", max_length=4),
        *,
        tags: list[str] = Field(default_factory=list),  # noqa: B008
    ) -> None:
        seen.append((text, tags))

    queue = Queue("work", backend, registry=registry)
    await note.enqueue(backend=backend)
    await note.enqueue("a", tags=["b"], backend=backend)
    await run_jobs(queue)
    assert sorted(seen) == [("a", ["b"]), ("none", [])]
    job_id = await note.options(backend=backend, validate=False).enqueue("too long")
    await run_jobs(queue)
    with pytest.raises(JobFailed, match="text: String should have at most 4"):
        await queue.wait_for(job_id, timeout=PATIENCE)


async def test_what_can_be_iterated_once_is_refused_and_a_list_of_it_is_not(
    backend: Backend,
) -> None:
    registry = TaskRegistry()
    seen: list[Any] = []

    @task("work", registry=registry, name="total")
    async def total(numbers: Iterable[int]) -> None:
        seen.extend(numbers)

    with pytest.raises(NotSerializable, match="'numbers'"):
        await total.enqueue((number for number in (1, 2)), backend=backend)
    await total.enqueue([1, 2], backend=backend)
    await run_jobs(Queue("work", backend, registry=registry))
    assert seen == [1, 2]


# -- decorators


class Session:
    pass


def with_session(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    async def wrapper(*args: Any, **kwargs: Any) -> Any:
        return await function(Session(), *args, **kwargs)

    return wrapper


def with_named_session(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    async def wrapper(*args: Any, **kwargs: Any) -> Any:
        return await function(*args, session=Session(), **kwargs)

    return wrapper


def with_tenant(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    async def wrapper(tenant: str, *args: Any, **kwargs: Any) -> Any:
        return [tenant, await function(*args, **kwargs)]

    return wrapper


def taking_tenant(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    async def wrapper(*args: Any, **kwargs: Any) -> Any:
        tenant = kwargs.pop("tenant")
        return [tenant, await function(*args, **kwargs)]

    return wrapper


def logged(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return wrapper


@with_session
async def first_given(session: Session, user: UUID, day: date = date(2026, 1, 1)) -> list[Any]:
    assert isinstance(session, Session)
    assert isinstance(day, date)
    return [user.int, day.day]


@with_session
async def optional_given(
    session: Session | None = None, user: UUID | None = None, day: date = date(2026, 1, 1)
) -> list[Any]:
    assert isinstance(session, Session)
    assert user is not None
    return [user.int, day.day]


@with_named_session
async def last_given(user: UUID, day: date = date(2026, 1, 1), *, session: Session) -> list[Any]:
    assert isinstance(session, Session)
    return [user.int, day.day]


@logged
@with_session
@logged
async def layered(session: Session, user: UUID, day: date = date(2026, 1, 1)) -> list[Any]:
    return [user.int, day.day]


@pytest.mark.parametrize("function", [first_given, optional_given, last_given, layered])
@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ([UUID(int=7), date(2026, 1, 2)], {}),
        ([UUID(int=7)], {"day": date(2026, 1, 2)}),
        ([], {"user": UUID(int=7), "day": "2026-01-02"}),
    ],
)
async def test_a_decorator_may_supply_an_argument(
    backend: Backend, function: Callable[..., Any], args: list[Any], kwargs: dict[str, Any]
) -> None:
    registry = TaskRegistry()
    wrapped = task("work", registry=registry)(function)
    queue = Queue("work", backend, registry=registry)
    job_id = await wrapped.enqueue(*args, **kwargs, backend=backend)
    await run_jobs(queue)
    assert await queue.wait_for(job_id, timeout=PATIENCE) == [7, 2]
    assert await wrapped(UUID(int=7), date(2026, 1, 2)) == [7, 2]


@pytest.mark.parametrize(
    ("decorator", "args", "kwargs"),
    [
        (with_tenant, ["acme", date(2026, 1, 2)], {}),
        (with_tenant, ["acme"], {"day": date(2026, 1, 2)}),
        (with_tenant, [], {"tenant": "acme", "day": date(2026, 1, 2)}),
        (taking_tenant, [date(2026, 1, 2)], {"tenant": "acme"}),
        (taking_tenant, [], {"day": date(2026, 1, 2), "tenant": "acme"}),
    ],
)
async def test_a_decorator_may_have_an_argument_of_its_own(
    backend: Backend, decorator: Any, args: list[Any], kwargs: dict[str, Any]
) -> None:
    registry = TaskRegistry()

    async def day_of(day: date) -> int:
        return day.day

    wrapped = task("work", registry=registry)(decorator(day_of))
    queue = Queue("work", backend, registry=registry)
    job_id = await wrapped.enqueue(*args, **kwargs, backend=backend)
    await run_jobs(queue)
    assert await queue.wait_for(job_id, timeout=PATIENCE) == ["acme", 2]


async def test_what_a_decorator_supplies_unannotated_leaves_positions_plain(
    backend: Backend,
) -> None:
    registry = TaskRegistry()

    @task("work", registry=registry)
    @with_session
    async def note(session, day: date) -> int:
        assert isinstance(session, Session)
        return day.day

    queue = Queue("work", backend, registry=registry)
    job_id = await note.enqueue(day=date(2026, 1, 2), backend=backend)
    await run_jobs(queue)
    assert await queue.wait_for(job_id, timeout=PATIENCE) == 2
    with pytest.raises(NotSerializable, match="would arrive as str"):
        await note.enqueue(date(2026, 1, 2), backend=backend)


def test_a_plain_decorator_hides_no_wrong_argument() -> None:
    registry = TaskRegistry()

    @logged
    def day_of(day: date) -> int:
        return day.day

    arguments = registry.register(day_of, queue="work").arguments
    assert arguments.read(["2026-01-02"], {}) == ([date(2026, 1, 2)], {})
    with pytest.raises(ValidationError, match=r"(?s)day.*valid date"):
        arguments.read(["soon"], {})


# -- the promise, tried with values and annotations of every kind

SCALARS: list[tuple[Any, st.SearchStrategy[Any]]] = [
    (int, st.integers()),
    (float, st.floats()),
    (bool, st.booleans()),
    (str, st.text()),
    (bytes, st.binary()),
    (type(None), st.none()),
    (Decimal, st.decimals().filter(lambda number: not number.is_snan())),
    (date, st.dates()),
    (time, st.times()),
    (datetime, st.datetimes(timezones=st.sampled_from([None, UTC]))),
    (timedelta, st.timedeltas()),
    (UUID, st.uuids()),
    (Path, st.text("ab/.", min_size=1).map(Path)),
    (complex, st.complex_numbers()),
    (Colour, st.sampled_from(Colour)),
    (Size, st.sampled_from(Size)),
    (Word, st.sampled_from(Word)),
    (Literal["a", 1], st.sampled_from(["a", 1])),
    (Point, st.builds(Point, st.integers(), st.integers())),
    (Pair, st.builds(Pair, st.integers(), st.integers())),
    (Person, st.builds(Person, name=st.text())),
    (Area, st.builds(Area, side=st.integers())),
    (Strict, st.builds(Strict, day=st.dates())),
    (Aliased, st.builds(Aliased, fullName=st.text())),
    (TwoNames, st.builds(TwoNames, reading=st.text())),
    (Document, st.builds(Document, body=st.lists(st.integers(-9, 9)).map(json.dumps))),
    (SecretStr, st.text().map(SecretStr)),
    (Account, st.builds(Account, password=st.text().map(SecretStr))),
    (
        Animal,
        st.builds(Dog, name=st.text(), tricks=st.integers()) | st.builds(Animal, name=st.text()),
    ),
    (Noted, st.integers().map(noted)),
    (Any, st.recursive(st.none() | st.integers() | st.floats() | st.text(), st.lists)),
]
VALUES = st.one_of([values for _, values in SCALARS])
Typed = tuple[Any, st.SearchStrategy[Any]]


def of(container: Any, *inner: Any) -> Any:
    return container[inner if len(inner) > 1 else inner[0]]


def containers(inner: st.SearchStrategy[Typed]) -> st.SearchStrategy[Typed]:
    def hashable(typed: Typed) -> bool:
        return typed[0] in {int, str, bool, bytes, date, UUID, Colour, Size, Decimal, Pair}

    keys = inner.filter(hashable)
    return st.one_of(
        inner.map(lambda t: (of(list, t[0]), st.lists(t[1], max_size=3))),
        inner.map(lambda t: (of(tuple, t[0], ...), st.lists(t[1], max_size=3).map(tuple))),
        inner.map(lambda t: (of(deque, t[0]), st.lists(t[1], max_size=3).map(deque))),
        inner.map(lambda t: (of(Optional, t[0]), st.none() | t[1])),
        inner.map(lambda t: (of(dict, str, t[0]), st.dictionaries(st.text(), t[1], max_size=3))),
        keys.map(lambda t: (of(set, t[0]), st.sets(t[1], max_size=3))),
        keys.map(lambda t: (of(dict, t[0], int), st.dictionaries(t[1], st.integers(), max_size=3))),
        st.tuples(inner, inner).map(
            lambda ts: (of(Union, ts[0][0], ts[1][0]), ts[0][1] | ts[1][1])
        ),
    )


TYPES: st.SearchStrategy[Typed] = st.recursive(st.sampled_from(SCALARS), containers, max_leaves=4)


@st.composite
def calls(draw: st.DrawFn) -> tuple[Any, Any]:
    """Return an annotation, and a value that it has, or one that it may not have."""
    annotation, values = draw(TYPES)
    return annotation, draw(values if draw(st.integers(0, 9)) else VALUES)


@settings(max_examples=500)
@given(calls())
def test_what_is_accepted_arrives_equal(call: tuple[Any, Any]) -> None:
    annotation, value = call
    registry = TaskRegistry()

    def function(value: Any) -> None: ...

    function.__annotations__ = {"value": annotation}
    arguments = registry.register(function, queue="work", name="f").arguments
    try:
        args, _ = registry.write("f", [value], {})
        body = new_job(task_id="f", args=args).encode()
    except NotSerializable as error:
        event("refused")
        assert re.match("argument ('value'|0) of task 'f'", str(error))  # noqa: PT017
        return
    args = Job.decode(body).args
    try:
        here = TypeAdapter(annotation).validate_python(value)
    except ValidationError:
        event("of the wrong kind, and plain")
        assert args == [value]
        return
    event("carried")
    arrived = arguments.read(args, {})[0][0]
    assert arrived == here
    assert isinstance(here, type(arrived))


@settings(max_examples=200)
@given(
    VALUES
    | st.recursive(VALUES, st.lists)
    | st.dictionaries(VALUES.filter(lambda v: v.__hash__), VALUES)
)
def test_what_is_accepted_without_an_annotation_arrives_equal(value: Any) -> None:
    registry = TaskRegistry()

    def function(value):
        return value

    arguments = registry.register(function, queue="work", name="f").arguments
    try:
        body = new_job(task_id="f", args=registry.write("f", [value], {})[0]).encode()
    except NotSerializable:
        return
    assert arguments.read(Job.decode(body).args, {}) == ([value], {})


async def test_a_repeatable_is_found_by_the_arguments_that_it_was_made_of(
    backend: Backend,
) -> None:
    registry = TaskRegistry()
    echo_task("TwoNames", registry)
    queue = Queue("work", backend, registry=registry)
    made_of = {"task_id": "echo", "every": 3600, "args": [TwoNames(reading="Ada")]}
    await queue.upsert_repeatable(**made_of)  # type: ignore[arg-type]
    assert await queue.remove_repeatable(made_of)
    assert await queue.list_repeatables() == []
