"""The registry of tasks, and the arguments of their calls."""

import threading
from datetime import date
from functools import wraps
from typing import TYPE_CHECKING, cast

import anyio
import pytest
from pydantic import BaseModel, ValidationError

from asyncmq_nats.exceptions import TaskNotFound
from asyncmq_nats.jobs import JobHead
from asyncmq_nats.runtime.registry import TASK_REGISTRY, TaskRegistry
from asyncmq_nats.tasks import TASK_REGISTRY as SAME_REGISTRY

if TYPE_CHECKING:
    from asyncmq_nats.context import JobContext


class Opaque:
    pass


@pytest.fixture
def registry() -> TaskRegistry:
    return TaskRegistry()


async def run(registry: TaskRegistry, task_id: str, *args: object, **kwargs: object) -> object:
    job = JobHead(task_id=task_id, job_id="id", created_at=0.0, args=list(args), kwargs=kwargs)
    context = cast("JobContext", None)  # only what reports progress looks at it
    return await registry.find(task_id).run(job, anyio.CapacityLimiter(1), context)


async def double(number: int) -> int:
    return 2 * number


def name_of_thread() -> str:
    return threading.current_thread().name


def days_since(first: date, *, last: date) -> int:
    return (last - first).days


def test_a_task_is_found_by_module_and_name(registry: TaskRegistry) -> None:
    entry = registry.register(double, queue="work")
    assert entry.id == f"{__name__}.double"
    assert registry.find(entry.id) is registry[entry.id] is entry
    assert (list(registry), len(registry), entry.id in registry) == ([entry.id], 1, True)


def test_a_task_is_found_by_a_name_of_its_own(registry: TaskRegistry) -> None:
    assert registry.register(double, queue="work", name="twice").id == "twice"
    assert list(registry) == ["twice"]


def test_what_a_task_says_of_its_jobs_is_kept(registry: TaskRegistry) -> None:
    entry = registry.register(double, queue="work", retries=2, ttl=60, backoff=1.5)
    assert (entry.queue, entry.retries, entry.ttl, entry.backoff, entry.is_async) == (
        "work",
        2,
        60,
        1.5,
        True,
    )


def test_two_functions_of_one_name_are_refused(registry: TaskRegistry) -> None:
    registry.register(double, queue="work", name="job")
    with pytest.raises(ValueError, match=r"'job' is registered already.*name="):
        registry.register(days_since, queue="work", name="job")
    assert registry.find("job").function is double


def test_registering_a_function_again_replaces_what_was_said_of_it(registry: TaskRegistry) -> None:
    registry.register(double, queue="work", retries=1)
    assert registry.register(double, queue="other", retries=2) is registry.find(
        f"{__name__}.double"
    )
    assert registry.find(f"{__name__}.double").queue == "other"


def test_an_unknown_task_is_told_together_with_those_known(registry: TaskRegistry) -> None:
    with pytest.raises(TaskNotFound, match=r"'missing'.*registered: none"):
        registry.find("missing")
    registry.register(double, queue="work", name="twice")
    with pytest.raises(TaskNotFound, match=r"'missing'.*registered: twice"):
        registry.find("missing")
    with pytest.raises(KeyError):
        registry["missing"]


def test_registries_are_separate(registry: TaskRegistry) -> None:
    registry.register(double, queue="work", name="only here")
    assert "only here" not in TaskRegistry()
    assert "only here" not in TASK_REGISTRY


def test_the_default_registry_is_one() -> None:
    assert TASK_REGISTRY is SAME_REGISTRY


async def test_an_async_function_runs_in_the_event_loop(registry: TaskRegistry) -> None:
    registry.register(double, queue="work", name="double")
    assert await run(registry, "double", 21) == 42


async def test_a_sync_function_runs_in_a_thread(registry: TaskRegistry) -> None:
    entry = registry.register(name_of_thread, queue="work", name="name")
    assert not entry.is_async
    assert await run(registry, "name") != threading.current_thread().name


async def test_arguments_become_what_the_annotations_say(registry: TaskRegistry) -> None:
    registry.register(days_since, queue="work", name="days")
    registry.register(double, queue="work", name="double")
    assert await run(registry, "days", "2026-01-01", last="2026-01-31") == 30
    assert await run(registry, "double", "21") == 42


async def test_a_function_with_an_annotation_of_any_class_is_called_as_it_is(
    registry: TaskRegistry,
) -> None:
    async def echo(value: Opaque | None = None) -> object:
        return value

    registry.register(echo, queue="work", name="echo")
    assert await run(registry, "echo") is None


async def test_a_function_whose_annotations_have_no_meaning_here_is_called_as_it_is(
    registry: TaskRegistry,
) -> None:
    async def echo(
        value: "imported_for_type_checkers_only.Thing",  # type: ignore[name-defined]  # noqa: F821
    ) -> object:
        return value

    registry.register(echo, queue="work", name="echo")
    assert await run(registry, "echo", 7) == 7


async def test_an_annotation_may_name_what_is_defined_later(
    registry: TaskRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def total(basket: "Basket") -> int:
        return sum(basket.prices)

    with monkeypatch.context() as earlier:
        earlier.delitem(globals(), "Basket")
        registry.register(total, queue="work", name="total")
    assert await run(registry, "total", {"prices": ["1", "2"]}) == 3


class Basket(BaseModel):
    prices: list[int]


async def test_a_wrong_argument_is_told_by_name(registry: TaskRegistry) -> None:
    registry.register(days_since, queue="work", name="days")
    with pytest.raises(ValidationError, match=r"(?s)first.*date"):
        await run(registry, "days", "yesterday", last="2026-01-31")
    with pytest.raises(ValidationError, match=r"(?s)last.*Missing"):
        await run(registry, "days", "2026-01-31")


@pytest.mark.parametrize(
    ("args", "kwargs"), [((1, 2, 3), {}), ((1,), {"first": 2}), ((1,), {"other": 2})]
)
async def test_arguments_that_do_not_fit_are_refused(
    registry: TaskRegistry, args: tuple[object, ...], kwargs: dict[str, object]
) -> None:
    async def two(first: int, second: int = 0) -> None:
        raise AssertionError("it must not run")

    registry.register(two, queue="work", name="two")
    with pytest.raises(ValidationError):
        await run(registry, "two", *args, **kwargs)


async def test_arguments_of_every_kind_reach_the_function(registry: TaskRegistry) -> None:
    async def all_kinds(
        first: int, /, second: int, *rest: int, only: int, **more: int
    ) -> list[object]:
        return [first, second, rest, only, more]

    registry.register(all_kinds, queue="work", name="all")
    assert await run(registry, "all", "1", 2, 3, 4, only=5, other="6") == [
        1,
        2,
        (3, 4),
        5,
        {"other": 6},
    ]


async def test_a_decorated_function_gets_what_its_decorator_takes(registry: TaskRegistry) -> None:
    async def inner(first: int, second: int) -> int:
        return first - second

    @wraps(inner)
    async def positional_only(*args: int) -> int:
        return await inner(*args)

    registry.register(positional_only, queue="work", name="inner")
    assert await run(registry, "inner", 5, 3) == 2
