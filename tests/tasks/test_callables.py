"""Functions and callables that can be tasks.

Functions of every kind, methods, objects, classes, other people's callables.
"""

import functools
import json
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from typing import Any, ParamSpec, TypeVar

import anyio
import pytest

from asyncmq_nats import InMemoryBackend, InvalidArgument, Queue
from asyncmq_nats.exceptions import InvalidCall
from asyncmq_nats.runtime.registry import TaskRegistry
from asyncmq_nats.tasks import TaskWrapper, task
from tests.running import PATIENCE, running

P = ParamSpec("P")
R = TypeVar("R")


class Mailer:
    def __init__(self, server: str) -> None:
        self.server = server

    async def send(self, to: str, on: date) -> list[Any]:
        await anyio.lowlevel.checkpoint()
        return [self.server, to, on.year]

    def send_in_thread(self, to: str, on: date) -> list[Any]:
        return [self.server, to, on.year]

    async def __call__(self, to: str, on: date) -> list[Any]:
        return await self.send(to, on)

    @classmethod
    def of_class(cls, to: str, on: date) -> list[Any]:
        return [cls.__name__, to, on.year]

    @staticmethod
    def static(to: str, on: date) -> list[Any]:
        return ["static", to, on.year]


class CallableInThread:
    def __call__(self, to: str, on: date) -> list[Any]:
        return ["object", to, on.year]


def plain(server: str, to: str, on: date) -> list[Any]:
    return [server, to, on.year]


async def coroutine(server: str, to: str, on: date) -> list[Any]:
    await anyio.lowlevel.checkpoint()
    return [server, to, on.year]


def logged(function: Callable[P, R]) -> Callable[P, R]:
    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        return function(*args, **kwargs)

    return wrapper


@logged
@logged
async def decorated(to: str, on: date) -> list[Any]:
    return ["decorated", to, on.year]


@functools.lru_cache(maxsize=1)
def cached(to: str, on: date) -> list[Any]:
    return ["cached", to, on.year]


mailer = Mailer("smtp")
SENDERS: dict[str, Callable[..., Any]] = {
    "smtp bound": mailer.send,
    "smtp bound in a thread": mailer.send_in_thread,
    "smtp object": Mailer("smtp"),
    "object in a thread": CallableInThread(),
    "Mailer classmethod": Mailer.of_class,
    "static": Mailer.static,
    "part coroutine": functools.partial(coroutine, "part"),
    "part plain": functools.partial(plain, "part"),
    "part of a method": functools.partial(Mailer.send, Mailer("part")),
    "decorated": decorated,
    "cached": cached,
}


@pytest.mark.parametrize("name", SENDERS)
async def test_what_is_called_like_a_function_is_a_task(name: str) -> None:
    backend, registry = InMemoryBackend(), TaskRegistry()
    send: TaskWrapper[..., list[Any]] = task("work", name=name, registry=registry)(SENDERS[name])
    ids = [
        await send.enqueue("ada", date(2030, 1, 1), backend=backend),
        await send.options(backend=backend).enqueue("ada", on="2030-01-01"),
    ]
    async with running(Queue("work", backend, registry=registry)):
        results = [await job_id.result(PATIENCE) for job_id in ids]
    assert results == [[name.split()[0], "ada", 2030]] * 2
    for args in ((), ("ada", date(2030, 1, 1), 1)):
        if not name.startswith(("decorated", "cached")):  # their wrappers take anything
            with pytest.raises(InvalidCall):
                await send.enqueue(*args, backend=backend)
    assert await send("ada", date(2030, 1, 1)) == results[0]


@dataclass
class Letter:
    to: str
    on: date


OTHERS: list[tuple[Callable[..., Any], tuple[Any, ...], Any]] = [
    (math.hypot, (3, 4), 5.0),
    (statistics.mean, ([1, 2, 3],), 2),
    (json.loads, ('{"a": 1}',), {"a": 1}),
    ("{}-{}".format, (1, 2), "1-2"),
    (Letter, ("ada", date(2030, 1, 1)), {"to": "ada", "on": "2030-01-01"}),
    (max, (1, 2), 2),
    (lambda number: number + 1, (1,), 2),
]


@pytest.mark.parametrize(("function", "args", "expected"), OTHERS)
async def test_callables_of_others_are_tasks_under_a_name(
    function: Callable[..., Any], args: tuple[Any, ...], expected: Any
) -> None:
    backend, registry = InMemoryBackend(), TaskRegistry()
    wrapped: TaskWrapper[..., Any] = task("work", name="other", registry=registry)(function)
    job_id = await wrapped.enqueue(*args, backend=backend)
    queue = Queue("work", backend, registry=registry)
    async with running(queue):
        assert await queue.wait_for(job_id, PATIENCE) == expected


async def test_a_static_method_under_a_task_is_one() -> None:
    backend, registry = InMemoryBackend(), TaskRegistry()

    class Service:
        @staticmethod
        @task("work", registry=registry)
        async def inner(number: int) -> int:
            return number + 1

        @task("work", name="outer", registry=registry)
        @staticmethod
        async def outer(number: int) -> int:
            return number + 2

    one = await Service.inner.enqueue(1, backend=backend)
    two = await Service().outer.enqueue(1, backend=backend)
    async with running(Queue("work", backend, registry=registry)):
        assert [await one.result(PATIENCE), await two.result(PATIENCE)] == [2, 3]


def test_a_method_that_lacks_its_object_is_refused() -> None:
    registry = TaskRegistry()
    with pytest.raises(InvalidArgument, match=r"cannot decorate a method.*bound method"):

        class Service:
            @task("work", registry=registry)
            async def send(self, to: str) -> None: ...

    assert len(registry) == 0
    with pytest.raises(InvalidArgument, match="cannot decorate a method"):
        task("work", registry=registry)(Mailer.send)


@pytest.mark.parametrize(
    "function", [mailer.send_in_thread, Mailer("smtp"), functools.partial(plain, "part")]
)
def test_a_process_finds_only_what_its_module_names(function: Any) -> None:
    with pytest.raises((InvalidArgument, ValueError), match="process=True"):
        task("work", name="send", process=True, registry=TaskRegistry())(function)


@pytest.mark.parametrize("function", [Mailer.static, Mailer.of_class, cached])
async def test_functions_of_classes_run_in_processes(function: Any) -> None:
    backend, registry = InMemoryBackend(), TaskRegistry()
    wrapped = task("work", name="send", process=True, registry=registry)(function)
    job_id = await wrapped.enqueue("ada", date(2030, 1, 1), backend=backend)
    async with running(Queue("work", backend, registry=registry)):
        assert (await job_id.result(PATIENCE))[1:] == ["ada", 2030]
