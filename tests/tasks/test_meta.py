"""`meta`: strings that go with a job, wherever it goes, on both backends."""

import json
from typing import Any

import pytest

from asyncmq_nats import FlowProducer, Job, Queue, Retry, current_job
from asyncmq_nats._arguments import META_LIMIT
from asyncmq_nats.backends.base import Backend
from asyncmq_nats.exceptions import InvalidArgument
from asyncmq_nats.runtime.registry import TaskRegistry
from tests.receiver import until
from tests.running import PATIENCE, counted, make_queue, outcome, run_jobs, running

META = {"request": "r-7", "tenant": "açme"}


async def test_a_task_sees_the_meta_of_its_job(backend: Backend) -> None:
    async def work() -> dict[str, str]:
        return dict(current_job().meta)

    queue = make_queue(backend, work=work)
    with_meta = await queue.add("work", meta=META)
    without = await queue.add("work")
    async with running(queue):
        assert await queue.wait_for(with_meta, PATIENCE) == META
        assert await queue.wait_for(without, PATIENCE) == {}
    assert (await outcome(queue, with_meta))["meta"] == META


async def test_every_attempt_and_rerun_has_the_meta(backend: Backend) -> None:
    seen: list[dict[str, str]] = []

    def work() -> None:
        seen.append(dict(current_job().meta))
        raise Retry(delay=0)

    queue = make_queue(backend, work=work)
    job_id = await queue.add("work", retries=1, meta=META)
    await run_jobs(queue)
    assert await queue.retry_job(job_id)
    await run_jobs(queue)
    assert seen == [META] * 4


async def test_a_delayed_job_and_one_of_a_bulk_keep_it(backend: Backend) -> None:
    queue = make_queue(backend)
    await queue.add("work", delay=3600, meta=META)
    (bulk,) = await queue.add_bulk([{"task_id": "work", "job_id": "bulk", "meta": META}])
    payload = await queue.enqueue({"task": "work", "id": "payload", "meta": META})
    jobs = [await queue.get_job(bulk), await queue.get_job(payload)]
    assert [job and job["meta"] for job in jobs] == [META, META]
    await counted(queue)
    assert [each.payload["meta"] for each in await queue.list_delayed()] == [META]


async def test_a_follow_up_has_the_meta_of_its_job_unless_it_has_its_own(backend: Backend) -> None:
    def first() -> list[str]:
        job = current_job()
        return [job.add("second"), job.add("second", meta={"own": "1"}), job.add("second", meta={})]

    async def second() -> dict[str, str]:
        return dict(current_job().meta)

    queue = make_queue(backend, first=first, second=second)
    job_id = await queue.add("first", meta=META)
    async with running(queue):
        ids = await queue.wait_for(job_id, PATIENCE)
        found = [await queue.wait_for(each, PATIENCE) for each in ids]
    assert found == [META, {"own": "1"}, {}]


async def test_the_jobs_of_a_flow_have_their_own(backend: Backend) -> None:
    seen: dict[str, Any] = {}

    async def work(name: str) -> None:
        seen[name] = dict(current_job().meta)

    registry = TaskRegistry()
    registry.register(work, queue="work", name="work")
    queue = Queue("work", backend, registry=registry)
    parent = Job("work", args=["parent"], meta={"of": "parent"})
    child = Job("work", args=["child"], meta={"of": "child"}, depends_on=[parent.job_id])
    await FlowProducer(backend).add_flow("work", [parent, child])
    await run_jobs(queue)
    assert seen == {"parent": {"of": "parent"}, "child": {"of": "child"}}


async def test_a_job_that_repeats_itself_keeps_it(backend: Backend) -> None:
    queue = make_queue(backend, work=lambda: None)
    await queue.add("work", repeat_every=3600, meta=META)
    async with running(queue):
        await _until_delayed(queue)
    assert [each.payload["meta"] for each in await queue.list_delayed()] == [META]


async def _until_delayed(queue: Queue) -> None:
    await until(queue.list_delayed, lambda delayed: len(delayed) == 1)


@pytest.mark.parametrize(
    ("meta", "told"),
    [
        ({"tenant": 7}, "meta must be a dict of strings"),
        ({7: "tenant"}, "meta must be a dict of strings"),
        (["tenant"], "meta must be a dict"),
        ({"text": "\ud800"}, "meta must be of valid Unicode"),
        ({"text": "é" * (META_LIMIT // 2)}, "meta must have 8,192 bytes at most"),
    ],
)
async def test_what_is_no_small_dict_of_strings_is_refused(
    backend: Backend, meta: Any, told: str
) -> None:
    queue = make_queue(backend)
    with pytest.raises(InvalidArgument, match=told):
        await queue.add("work", meta=meta)
    with pytest.raises(InvalidArgument, match=told):
        await queue.add_bulk([{"task_id": "work", "meta": meta}])
    with pytest.raises(InvalidArgument, match=told):
        await queue.enqueue({"task": "work", "meta": meta})


def test_a_job_without_meta_is_written_as_before() -> None:
    assert "meta" not in json.loads(Job("work").encode())
    assert json.loads(Job("work", meta=META).encode())["meta"] == META
