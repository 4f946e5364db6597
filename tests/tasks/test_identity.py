"""Names of tasks: one function a name; and `TASK_REGISTRY` as AsyncMQ has it."""

import functools
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from asyncmq_nats.backends.base import Backend
from asyncmq_nats.exceptions import InvalidArgument
from asyncmq_nats.queues import Queue
from asyncmq_nats.runtime.registry import RegisteredTask, TaskRegistry
from asyncmq_nats.tasks import task
from tests.running import PATIENCE, run_jobs


@pytest.fixture
def registry() -> TaskRegistry:
    return TaskRegistry()


def multiplier(factor: int) -> Callable[[int], int]:
    def multiply(number: int) -> int:
        return factor * number

    return multiply


def without_wraps(function: Callable[..., Any]) -> Callable[..., Any]:
    def wrapper(*args: Any) -> Any:
        return function(*args)

    return wrapper


def one(number: int) -> int:
    return number


def two(number: int) -> int:
    return 2 * number


# -- one function a name


def test_two_functions_of_one_factory_need_names(registry: TaskRegistry) -> None:
    registry.register(multiplier(2), queue="work")
    with pytest.raises(ValueError, match=r"multiply' is registered already.*name="):
        registry.register(multiplier(3), queue="work")
    assert registry.find(f"{__name__}.multiply").function(10) == 20
    registry.register(multiplier(3), queue="work", name="triple")
    assert registry.find("triple").function(10) == 30


def test_two_functions_of_one_decorator_without_wraps_need_names(registry: TaskRegistry) -> None:
    registry.register(without_wraps(one), queue="work")
    with pytest.raises(ValueError, match=r"wrapper' is registered already.*functools\.wraps"):
        registry.register(without_wraps(two), queue="work")


def test_what_a_factory_makes_twice_of_the_same_values_is_one_task(registry: TaskRegistry) -> None:
    registry.register(multiplier(2), queue="work")
    registry.register(multiplier(2), queue="work", retries=1)
    registry.register(without_wraps(one), queue="work")
    registry.register(without_wraps(one), queue="work")
    assert len(registry) == 2


def test_a_second_definition_in_one_module_is_refused(registry: TaskRegistry) -> None:
    def define(result: str) -> Any:
        scope: dict[str, Any] = {"__name__": __name__}
        exec(compile(f"def send(): return {result!r}", __file__, "exec"), scope)
        return scope["send"]

    registry.register(define("first"), queue="work")
    with pytest.raises(ValueError, match="send' is registered already"):
        registry.register(define("second"), queue="work")
    assert registry.find(f"{__name__}.send").function() == "first"


def test_a_function_may_name_itself(registry: TaskRegistry) -> None:
    def factory() -> Callable[[int], int]:
        def factorial(number: int) -> int:
            return number * other(number - 1) if number else 1

        def other(number: int) -> int:
            return factorial(number)

        return factorial

    registry.register(factory(), queue="work")
    registry.register(factory(), queue="work", retries=1)
    assert registry.find(f"{__name__}.factorial").function(4) == 24


def test_defaults_are_part_of_a_function(registry: TaskRegistry) -> None:
    for factor in (1, 1):

        def scaled(number: int, factor: int = factor) -> int:
            return number * factor

        registry.register(scaled, queue="work")

    def again(factor: int) -> Callable[..., int]:
        def scaled(number: int, factor: int = factor) -> int:
            return number * factor

        return scaled

    registry.register(again(1), queue="work", name="of the loop")
    with pytest.raises(ValueError, match="registered already"):
        registry.register(again(2), queue="work", name="of the loop")


class TestReload:
    @pytest.fixture
    def module(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
        (tmp_path / "amq_decorators.py").write_text(
            "def plain(function):\n    def wrapper(): return function()\n    return wrapper\n"
        )
        (tmp_path / "amq_reloaded.py").write_text(
            "from amq_decorators import plain\n"
            "def send(): return 1\n"
            "def bare(): return 2\n"
            "wrapped = plain(bare)\n"
        )
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.setattr(sys, "dont_write_bytecode", True)
        for name in ("amq_decorators", "amq_reloaded"):
            monkeypatch.delitem(sys.modules, name, raising=False)
        return importlib.import_module("amq_reloaded")

    def test_a_module_may_be_loaded_again(self, registry: TaskRegistry, module: ModuleType) -> None:
        registry.register(module.send, queue="work")
        first = module.send
        importlib.reload(module)
        registry.register(module.send, queue="work")
        assert registry.find("amq_reloaded.send").function is module.send is not first

    def test_a_module_may_be_changed_and_loaded_again(
        self, registry: TaskRegistry, module: ModuleType
    ) -> None:
        registry.register(module.send, queue="work")
        path = Path(str(module.__file__))
        path.write_text("\n\ndef send():\n    return 'changed'\n")
        importlib.reload(module)
        registry.register(module.send, queue="work")
        assert registry.find("amq_reloaded.send").function() == "changed"

    def test_so_may_one_with_a_decorator_of_another_module(
        self, registry: TaskRegistry, module: ModuleType
    ) -> None:
        registry.register(module.wrapped, queue="work")
        del sys.modules["amq_reloaded"]
        again = importlib.import_module("amq_reloaded")
        registry.register(again.wrapped, queue="work")
        assert registry.find("amq_decorators.wrapper").function is again.wrapped


# -- what has no name


class Adder:
    def __init__(self, offset: int) -> None:
        self.offset = offset

    def __call__(self, number: int) -> int:
        return number + self.offset


@pytest.mark.parametrize(
    "function",
    [functools.partial(two), Adder(1), lambda number: number],
    ids=["partial", "object", "lambda"],
)
async def test_what_has_no_name_needs_one(
    backend: Backend, registry: TaskRegistry, function: Callable[..., Any]
) -> None:
    with pytest.raises(InvalidArgument, match=r"needs one: name="):
        task("work", registry=registry)(function)
    wrapped = task("work", registry=registry, name="named")(function)
    queue = Queue("work", backend, registry=registry)
    job_id = await wrapped.enqueue("20", backend=backend)
    await run_jobs(queue)
    expected = "20" if function.__class__ is type(lambda: 0) else await wrapped(20)  # no annotation
    assert await queue.wait_for(job_id, timeout=PATIENCE) == expected


async def test_an_object_is_called_with_what_its_call_is_annotated_with(
    backend: Backend, registry: TaskRegistry
) -> None:
    wrapped = task("work", registry=registry, name="add")(Adder(2))
    assert await wrapped(40) == 42
    queue = Queue("work", backend, registry=registry)
    job_id = await wrapped.enqueue("40", backend=backend)
    await run_jobs(queue)
    assert await queue.wait_for(job_id, timeout=PATIENCE) == 42


@pytest.mark.parametrize("value", [None, "send", 5])
def test_what_is_no_function_is_refused(registry: TaskRegistry, value: Any) -> None:
    with pytest.raises(InvalidArgument, match="must be a function"):
        registry.register(value, queue="work", name="x")


# -- as AsyncMQ has it


def test_a_registered_task_has_the_keys_of_asyncmq(registry: TaskRegistry) -> None:
    wrapped = task("work", retries=2, ttl=60, progress=True, registry=registry, name="one")(one)
    entry = registry["one"]
    assert isinstance(entry, RegisteredTask)
    assert (entry["func"], entry.function) == (wrapped, one)
    assert dict(entry) == {
        "func": wrapped, "queue": "work", "retries": 2, "ttl": 60, "progress_enabled": True,
    }  # fmt: skip
    assert "queue" in entry
    assert entry.get("unknown", 7) == 7
    with pytest.raises(KeyError):
        entry["unknown"]


def test_a_registry_is_cleared_and_written_like_a_dict(registry: TaskRegistry) -> None:
    registry.register(one, queue="work")
    registry.clear()
    assert len(registry) == 0
    assert registry == {}
    registry["mine"] = {"func": two, "queue": "other", "retries": 4}
    assert (registry["mine"].queue, registry["mine"].retries) == ("other", 4)
    assert registry.find("mine").function is two
    registry["mine"] = {"func": one}
    assert registry.pop("mine")["func"] is one
    with pytest.raises(KeyError):
        del registry["mine"]


async def test_the_function_in_the_registry_can_be_enqueued(
    backend: Backend, registry: TaskRegistry
) -> None:
    task("work", registry=registry, name="one")(one)
    queue = Queue("work", backend, registry=registry)
    job_id = await registry["one"]["func"].enqueue(7, backend=backend)
    await run_jobs(queue)
    assert await queue.get_job_state(job_id) == "completed"


def test_a_task_that_is_registered_again_by_its_dict_is_the_same(registry: TaskRegistry) -> None:
    """As AsyncMQ's tests do: they keep a copy of the registry, clear it, and put things back."""
    wrapped = task("work", 2, 60, backoff=3, timeout=5, process=True, registry=registry)(one)
    copies: list[dict[str, Any]] = [dict(registry[wrapped.task_id]), {"func": wrapped}]
    for copy in copies:
        registry.clear()
        registry[wrapped.task_id] = copy
        entry = registry.find(wrapped.task_id)
        assert (entry.function, entry["func"]) == (one, wrapped)
        assert entry.options == wrapped.entry.options
        assert (entry.queue, entry.retries, entry.ttl) == ("work", 2, 60)
    registry[wrapped.task_id] = {"func": wrapped, "queue": "other", "retries": 1}
    assert (registry[wrapped.task_id].queue, registry[wrapped.task_id].retries) == ("other", 1)


def test_a_wrapper_is_registered_as_its_function(registry: TaskRegistry) -> None:
    wrapped = task("work", registry=registry, progress=True)(one)
    entry = registry.register(wrapped, queue="other")
    assert (entry.id, entry.function, entry["func"]) == (wrapped.task_id, one, wrapped)
    assert entry.is_async is wrapped.entry.is_async
