"""Additions beside existing jobs and junk, on both backends."""

from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import pytest

from asyncmq_nats.backends.base import Backend, Write
from asyncmq_nats.context import current_job
from asyncmq_nats.exceptions import Unconfirmed
from asyncmq_nats.flow import FlowProducer
from asyncmq_nats.jobs import Job
from asyncmq_nats.queues import Queue
from asyncmq_nats.transitions import parked
from asyncmq_nats.transitions.link import Linking
from tests.receiver import until
from tests.running import PATIENCE, make_queue, running

BUCKET, KEY = "KV_amq_work_scheduler", "$KV.amq_work_scheduler."


async def echo(value: Any = None) -> Any:
    return value


async def read_parents() -> dict[str, Any]:
    return await current_job().parent_results()


@pytest.fixture
def queue(backend: Backend) -> Queue:
    return make_queue(backend, echo=echo, read_parents=read_parents)


# -- a job exists if `get_job` would find it

JUNK = {
    "later.mine.claim": b"{}",
    "later.mine.completed": b'{"task":"echo"}',
    "later.mine.a.b": b"junk",
    "done.mine.parked": b"{}",
    "done.mine.claim": b'{"worker":"gone","message":0,"delivery":0}',
    "done.mine.awaited.nobody": b"{}",
}
Add = Callable[[Queue, str], Awaitable[Any]]


async def _add(queue: Queue, parent: str) -> None:
    assert await queue.add("echo", ["mine"], job_id="mine") == "mine"


async def _add_delayed(queue: Queue, parent: str) -> None:
    assert await queue.add("echo", ["mine"], job_id="mine", delay=0.1) == "mine"


async def _add_child(queue: Queue, parent: str) -> None:
    assert await queue.add("echo", ["mine"], job_id="mine", depends_on=[parent]) == "mine"


async def _add_bulk(queue: Queue, parent: str) -> None:
    first = {"task_id": "echo", "args": ["mine"], "job_id": "mine"}
    other = {"task_id": "echo", "depends_on": [parent]}
    assert (await queue.add_bulk([first, other]))[0] == "mine"


async def _add_deduplicated(queue: Queue, parent: str) -> None:
    await queue.add("echo", ["mine"], job_id="mine", deduplication={"id": "window"})


async def _add_flow(queue: Queue, parent: str) -> None:
    root = Job("echo", job_id="root")
    jobs = [root, Job("echo", ["mine"], job_id="mine", depends_on=["root", parent])]
    await FlowProducer(queue.backend).add_flow("work", jobs)


@pytest.mark.parametrize("key", JUNK)
@pytest.mark.parametrize(
    "add", [_add, _add_delayed, _add_child, _add_bulk, _add_deduplicated, _add_flow]
)
async def test_a_job_is_added_beside_junk_and_runs_once(queue: Queue, key: str, add: Add) -> None:
    parent = await queue.add("echo", ["parent"])
    await queue.backend.write(BUCKET, Write(KEY + key, JUNK[key]))
    with anyio.fail_after(PATIENCE):
        await add(queue, parent)
    assert await queue.get_job("mine") is not None
    assert await queue.add("echo", ["another"], job_id="mine") == "mine"
    async with running(queue):
        assert await queue.wait_for("mine", timeout=PATIENCE) == "mine"
    assert await queue.get_job_state("mine") == "completed"


@pytest.mark.parametrize("key", ["later.child.claim", "later.child.a.b"])
@pytest.mark.parametrize("count", [1, 70])
@pytest.mark.parametrize("delay", [None, 3600])
async def test_junk_beside_a_child_does_not_keep_it_waiting(
    queue: Queue, key: str, count: int, delay: float | None
) -> None:
    parents = await queue.add_bulk([{"task_id": "echo"}] * count)
    await queue.add("read_parents", job_id="child", depends_on=parents, delay=delay)
    await queue.backend.write(BUCKET, Write(KEY + key, b"{}"))
    end = "delayed" if delay else "completed"
    async with running(queue):
        await until(lambda: queue.get_job_state("child"), lambda state: state == end)


@pytest.mark.parametrize("count", [1, 70])
async def test_junk_beside_a_child_whose_producer_died_does_not_keep_it_waiting(
    queue: Queue, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parked, "LINK_TIMEOUT", 0.6)
    parents = await queue.add_bulk([{"task_id": "echo"}] * count)

    async def die(*_: object, **__: object) -> None:
        raise Unconfirmed("the write", 0)

    with monkeypatch.context() as patch:
        patch.setattr(queue._additions.plans.links, "connect", die)
        with pytest.raises(Unconfirmed):
            await queue.add("read_parents", job_id="child", depends_on=parents)
    await until(lambda: queue.backend.last(BUCKET, KEY + "later.child.released"), bool)
    await queue.backend.write(BUCKET, Write(KEY + "later.child.claim", b"{}"))
    async with running(queue):
        assert await queue.wait_for("child", timeout=PATIENCE) == dict.fromkeys(parents)


@pytest.mark.parametrize("count", [1, 70])
async def test_junk_beside_a_child_whose_parents_end_meanwhile_does_not_stop_its_producer(
    queue: Queue, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    parents = await queue.add_bulk([{"task_id": "echo"}] * count)
    connect = queue._additions.plans.links.connect

    async def late(*args: Any) -> Linking:
        await queue.backend.write(BUCKET, Write(KEY + "later.child.claim", b"{}"))
        async with running(queue):
            for parent in parents:
                await queue.wait_for(parent, timeout=PATIENCE)
        return await connect(*args)

    with monkeypatch.context() as patch:
        patch.setattr(queue._additions.plans.links, "connect", late)
        with anyio.fail_after(PATIENCE):
            await queue.add("read_parents", job_id="child", depends_on=parents)
    async with running(queue):
        assert await queue.wait_for("child", timeout=PATIENCE) == dict.fromkeys(parents)
