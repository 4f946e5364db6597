"""Dependencies by FastDepends, on both backends."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from datetime import date
from typing import Annotated, Any

import pytest

from asyncmq_nats import InMemoryBackend, JobFailed, Queue, current_job
from asyncmq_nats.backends.base import Backend
from asyncmq_nats.contrib.fast_depends import Depends, Provider, inject
from asyncmq_nats.exceptions import InvalidCall
from asyncmq_nats.runtime.registry import TaskRegistry
from asyncmq_nats.tasks import task
from tests.running import PATIENCE, running


class Session:
    def __init__(self, url: str) -> None:
        self.url = url


registry = TaskRegistry()
calls: list[str] = []
provider = Provider()


@pytest.fixture(autouse=True)
def no_calls() -> None:
    calls.clear()


async def open_session() -> AsyncIterator[Session]:
    calls.append("open")
    yield Session(current_job().state["url"])
    calls.append("close")


def open_in_thread() -> Iterator[str]:
    calls.append("open")
    yield current_job().id
    calls.append("close")


def find_user(user_id: int, day: date | None = None) -> dict[str, Any]:
    return {"id": user_id, "year": None if day is None else day.year}


@task("work", registry=registry)
@inject
async def send(
    address: str, on: date, session: Session = Depends(open_session), *, text: str = "-"
) -> list[Any]:
    """Send a letter."""
    calls.append("run")
    return [address, on.year, session.url, text]


@task("work", registry=registry)
@inject
def send_in_thread(address: str, job_id: Annotated[str, Depends(open_in_thread)] = "") -> str:
    calls.append("run")
    return f"{address} {job_id}"


@task("work", registry=registry)
@inject(provider=provider)
async def greet(greeting: str, user: dict[str, Any] = Depends(find_user)) -> list[Any]:
    return [greeting, user]


@task("work", registry=registry)
@inject
async def fail(session: Session = Depends(open_session)) -> None:
    raise ValueError("no")


@asynccontextmanager
async def lifespan() -> AsyncIterator[dict[str, str]]:
    yield {"url": "sqlite://"}


def queue_on(backend: Backend) -> Queue:
    return Queue("work", backend, registry=registry, lifespan=lifespan)


async def test_a_run_is_given_its_dependencies(backend: Backend) -> None:
    here = await send.enqueue("ada", date(2030, 1, 1), text="hi", backend=backend)
    async with running(queue_on(backend)):
        assert await here.result(PATIENCE) == ["ada", 2030, "sqlite://", "hi"]
        assert calls == ["open", "run", "close"]
        calls.clear()
        in_thread = await send_in_thread.enqueue("bob", backend=backend)
        assert await in_thread.result(PATIENCE) == f"bob {in_thread}"
        assert calls == ["open", "run", "close"]


async def test_what_a_dependency_needs_is_given_by_name(backend: Backend) -> None:
    loose: Any = greet
    job_id = await loose.enqueue("hi", user_id="7", day="2030-01-01", backend=backend)
    async with running(queue_on(backend)):
        assert await job_id.result(PATIENCE) == ["hi", {"id": 7, "year": 2030}]
    with pytest.raises(InvalidCall, match="user_id: Missing required"):
        await loose.enqueue("hi", backend=backend)


async def test_a_test_gives_another_dependency(backend: Backend) -> None:
    loose: Any = greet
    with provider.scope(find_user, lambda user_id: {"fake": user_id}):
        job_id = await loose.enqueue("hi", user_id=7, backend=backend)
        async with running(queue_on(backend)):
            assert await job_id.result(PATIENCE) == ["hi", {"fake": 7}]


async def test_dependencies_end_after_a_failure(backend: Backend) -> None:
    job_id = await fail.enqueue(backend=backend)
    async with running(queue_on(backend)):
        with pytest.raises(JobFailed, match="ValueError: no"):
            await job_id.result(PATIENCE)
    assert calls[0] == "open"


@pytest.mark.parametrize(
    ("args", "kwargs", "told"),
    [
        (("ada",), {}, "on: Missing required"),
        (("ada", "soon"), {}, "on: Input should be a valid date"),
        (("ada", "2030-01-01"), {"session": 5}, "session: Unexpected keyword"),
        (("ada", "2030-01-01", "session"), {}, "2: Unexpected positional"),
    ],
)
async def test_a_dependency_is_no_argument_of_a_job(args: Any, kwargs: Any, told: str) -> None:
    loose: Any = send
    with pytest.raises(InvalidCall, match=told):
        await loose.enqueue(*args, **kwargs, backend=InMemoryBackend())


def test_the_task_looks_like_its_function() -> None:
    assert send.__doc__ == "Send a letter."
    assert send.task_id == f"{__name__}.send"
