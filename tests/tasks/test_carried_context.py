"""Context variables that travel from `enqueue` to the task, on both backends."""

from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import pytest

from asyncmq_nats import InvalidArgument, Queue, Retry, add_middleware, current_job
from asyncmq_nats.backends.base import Backend
from asyncmq_nats.middleware import CarryContext, remove_middleware
from asyncmq_nats.runtime.registry import TaskRegistry
from asyncmq_nats.tasks import task
from tests.running import PATIENCE, running

tenant: ContextVar[str] = ContextVar("tenant")
request: ContextVar[str | None] = ContextVar("request", default=None)
registry = TaskRegistry()


def read() -> list[str | None]:
    return [tenant.get("nobody"), request.get()]


@task("work", registry=registry)
async def here() -> list[str | None]:
    return read()


@task("work", registry=registry)
def in_thread() -> list[str | None]:
    return read()


@task("work", retries=1, backoff=0, registry=registry)
async def again() -> list[str | None]:
    if current_job().attempt == 1:
        tenant.set("changed")
        raise Retry(after=0)
    return read()


@task("work", registry=registry)
async def passes_on() -> list[str]:
    first = current_job().add(here.call())
    tenant.set("other")
    return [first, current_job().add(in_thread.call())]


@pytest.fixture(autouse=True)
def carried() -> Iterator[None]:
    carry = CarryContext(tenant, request)
    add_middleware(carry)
    yield
    remove_middleware(carry)


async def test_a_task_sees_the_values_of_its_producer(backend: Backend) -> None:
    ids = [await here.enqueue(backend=backend)]
    tokens = tenant.set("acme"), request.set("r-7")
    ids += [await each.enqueue(backend=backend) for each in (here, in_thread, again)]
    ids.append(await here.options(backend=backend, meta={"own": "1"}).enqueue())
    tenant.reset(tokens[0])
    request.reset(tokens[1])
    async with running(Queue("work", backend, registry=registry)):
        found = [await job_id.result(PATIENCE) for job_id in ids]
    assert found == [["nobody", None], *[["acme", "r-7"]] * 4]
    job = await ids[-1].details()
    assert job is not None
    assert job["meta"] == {"own": "1", "context.tenant": "acme", "context.request": "r-7"}
    assert read() == ["nobody", None]


async def test_jobs_that_a_task_adds_carry_them_on(backend: Backend) -> None:
    queue = Queue("work", backend, registry=registry)
    token = tenant.set("acme")
    job_id = await passes_on.enqueue(backend=backend)
    tenant.reset(token)
    async with running(queue):
        first, second = await job_id.result(PATIENCE)
        assert await queue.wait_for(first, PATIENCE) == ["acme", None]
        assert await queue.wait_for(second, PATIENCE) == ["other", None]


async def test_a_value_that_is_no_text_is_refused(backend: Backend) -> None:
    value: Any = 7
    token = tenant.set(value)
    with pytest.raises(InvalidArgument, match=r"dict of strings.*context\.tenant"):
        await here.enqueue(backend=backend)
    tenant.reset(token)
    token = tenant.set("x" * 9_000)
    with pytest.raises(InvalidArgument, match="8,192 bytes"):
        await here.enqueue(backend=backend)
    tenant.reset(token)


def test_what_is_no_variable_is_refused() -> None:
    value: Any = "tenant"
    with pytest.raises(InvalidArgument, match="takes ContextVar"):
        CarryContext(value)
    with pytest.raises(InvalidArgument, match="different names"):
        CarryContext(tenant, ContextVar[str]("tenant"))
