"""A cancel and a retry by hand of many jobs at once: each ends as if it had been the only one."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import anyio
import pytest

from asyncmq_nats import JobFilter, Queue
from asyncmq_nats.backends.base import Backend
from asyncmq_nats.exceptions import BackendError, Unconfirmed
from asyncmq_nats.store.search import Found
from tests.running import counted, make_queue, only, outcome, run_jobs, running


class Tasks:
    """Tasks that note when they ran; `fail` does so until it is told not to."""

    def __init__(self) -> None:
        self.ran: list[Any] = []
        self.broken = True

    async def note(self, value: Any = None) -> None:
        self.ran.append(value)

    async def fail(self, value: Any = None) -> None:
        self.ran.append(value)
        if self.broken:
            raise ValueError("no")


def queue_of(backend: Backend, tasks: Tasks) -> Queue:
    return make_queue(backend, concurrency=10, note=tasks.note, fail=tasks.fail)


async def find(queue: Queue, state: str) -> list[Found]:
    await counted(queue)
    where = JobFilter(state=state)
    return [
        found
        async for page in queue._pages_of(where, where.states, descending=False)
        for found in page
    ]


# -- both


@pytest.mark.parametrize(("action", "state"), [("cancel", "waiting"), ("retry", "failed")])
async def test_an_interruption_is_told_how_many_jobs_were_changed(
    action: str, state: str, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = Tasks()
    queue = queue_of(backend, tasks)
    await queue.add_bulk([{"task_id": "fail", "args": [n]} for n in range(150)])
    if state == "failed":
        await run_jobs(queue)
    write_each = backend.write_each
    seen: list[int] = []
    with anyio.CancelScope() as scope, monkeypatch.context() as patch:

        async def interrupt(log: str, writes: Sequence[Any]) -> Any:
            scope.cancel()
            return await write_each(log, writes)

        patch.setattr(backend, "write_each", interrupt)
        await queue.apply(JobFilter(state=state), action, progress=seen.append)
    assert scope.cancelled_caught
    assert seen == [100]  # the first page
    tasks.broken, tasks.ran = False, []
    await run_jobs(queue)
    if action == "cancel":
        await only(queue, cancelled=100, completed=50)
    else:
        await only(queue, completed=100, failed=50)
    assert len(tasks.ran) == (50 if action == "cancel" else 100)


# -- cancel


async def test_jobs_of_every_kind_are_cancelled(backend: Backend) -> None:
    tasks = Tasks()
    queue = queue_of(backend, tasks)
    again = await queue.add("fail")
    await run_jobs(queue)
    assert await queue.retry_job(again)  # it has a claim now
    parent = await queue.add("note", ["parent"], delay=3600)
    await queue.add("note", ["child"], depends_on=[parent], on_parent_failure="run")
    await queue.add("note", ["another"], depends_on=[parent], on_parent_failure="fail")
    await queue.add_bulk([{"task_id": "note", "args": [n]} for n in range(150)])
    await queue.add_bulk([{"task_id": "note", "args": [n], "delay": 3600} for n in range(150)])
    seen: list[int] = []
    result = await queue.apply(JobFilter(state="delayed"), "cancel", progress=seen.append)
    assert (result.matched, result.done, seen[-1]) == (151, 151, 151)
    await only(queue, cancelled=151, failed=1, waiting=152)
    result = await queue.apply(JobFilter(state="waiting"), "cancel")
    assert (result.matched, result.done) == (152, 152)
    await run_jobs(queue)
    await only(queue, cancelled=303, failed=1)
    assert tasks.ran == [None]


async def test_a_cancel_spares_a_job_that_has_ended_since(backend: Backend) -> None:
    tasks = Tasks()
    queue = queue_of(backend, tasks)
    await queue.add_bulk([{"task_id": "note", "args": [n]} for n in range(3)])
    found = await find(queue, "waiting")
    await run_jobs(queue)
    assert await queue._sweep.cancel(found) == set()
    await only(queue, completed=3)


async def test_a_cancel_finds_a_job_that_has_failed_since_and_is_to_run_again(
    backend: Backend,
) -> None:
    tasks = Tasks()
    queue = queue_of(backend, tasks)
    job_id = await queue.add("fail", retries=1, backoff=3600)
    found = await find(queue, "waiting")
    async with running(queue):
        await only(queue, delayed=1)
    assert await queue._sweep.cancel(found) == {job_id}
    await only(queue, cancelled=1)


async def test_a_cancel_finds_a_job_that_has_become_ready_since(backend: Backend) -> None:
    tasks = Tasks()
    queue = queue_of(backend, tasks)
    job_id = await queue.add("note", delay=3600)
    found = await find(queue, "delayed")
    await queue.pause()
    async with running(queue):
        assert await queue.promote(job_id)
        await only(queue, waiting=1)
    assert await queue._sweep.cancel(found) == {job_id}
    await queue.resume()
    await run_jobs(queue)
    await only(queue, cancelled=1)
    assert tasks.ran == []


async def test_jobs_that_are_cancelled_while_they_run_end_once(backend: Backend) -> None:
    tasks = Tasks()
    queue = queue_of(backend, tasks)
    await queue.add_bulk([{"task_id": "note", "args": [n]} for n in range(400)])
    async with running(queue):
        result = await queue.apply(JobFilter(), "cancel")
        await only(queue, completed=400 - result.done, cancelled=result.done)


async def test_a_cancel_that_dies_half_way_is_finished(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = Tasks()
    queue = queue_of(backend, tasks)
    await queue.add_bulk([{"task_id": "note", "args": [n]} for n in range(5)])
    await queue.add_bulk([{"task_id": "note", "args": [n], "delay": 3600} for n in range(5)])
    await counted(queue)

    async def die(log: str, sequences: Sequence[int]) -> list[int]:
        raise Unconfirmed("the removal", 30.0)

    with monkeypatch.context() as patch:
        patch.setattr(backend, "delete_many", die)
        for state in ("waiting", "delayed"):
            with pytest.raises(Unconfirmed):
                await queue.apply(JobFilter(state=state), "cancel")
    await run_jobs(queue)
    await only(queue, cancelled=10)


# -- retry


async def failed(queue: Queue, count: int) -> None:
    await queue.add_bulk([{"task_id": "fail", "args": [n]} for n in range(count)])
    await run_jobs(queue)
    await only(queue, failed=count)


async def test_retried_jobs_run_once_and_release_those_that_wait_for_them(
    backend: Backend,
) -> None:
    tasks = Tasks()
    queue = queue_of(backend, tasks)
    parent = await queue.add("fail", ["parent"])
    child = await queue.add("note", ["child"], depends_on=[parent])
    await queue.add_bulk([{"task_id": "fail", "args": [n]} for n in range(200)])
    async with running(queue):
        await only(queue, failed=201, **{"waiting-children": 1})
    tasks.broken, tasks.ran = False, []
    result = await queue.apply(JobFilter(state="failed"), "retry")
    assert (result.matched, result.done) == (201, 201)
    async with running(queue):
        assert (await outcome(queue, child))["status"] == "completed"
    await only(queue, completed=202)
    assert sorted(map(str, tasks.ran)) == sorted(["parent", "child", *map(str, range(200))])


async def test_two_that_retry_the_same_jobs_make_each_run_once(
    backend: Backend, twin: Backend
) -> None:
    tasks = Tasks()
    queue = queue_of(backend, tasks)
    await failed(queue, 150)
    tasks.broken, tasks.ran = False, []
    done: list[int] = []

    async def retry(each: Queue) -> None:
        done.append((await each.apply(JobFilter(state="failed"), "retry")).done)

    async with anyio.create_task_group() as group:
        group.start_soon(retry, queue)
        group.start_soon(retry, Queue("work", twin))
    await run_jobs(queue)
    await only(queue, completed=150)
    assert sum(done) == 150
    assert sorted(tasks.ran) == list(range(150))


async def test_a_retry_spares_what_has_been_retried_or_removed_since(backend: Backend) -> None:
    tasks = Tasks()
    queue = queue_of(backend, tasks)
    await failed(queue, 3)
    found = await find(queue, "failed")
    retried, removed, left = [each.job.job_id for each in found]
    assert await queue.retry_job(retried)
    assert await queue.remove_job(removed)
    assert await queue._sweep.retry(found) == {left}
    await only(queue, waiting=2)


@pytest.mark.parametrize("step", ["release", "remove"])
async def test_a_retry_that_dies_half_way_goes_on(
    step: str, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = Tasks()
    queue = queue_of(backend, tasks)
    await failed(queue, 5)
    tasks.broken, tasks.ran = False, []
    write_each = backend.write_each
    calls = 0

    async def die(log: str, records: Sequence[Any]) -> Any:
        nonlocal calls
        calls += 1
        if step == "remove" or calls > 1:
            raise Unconfirmed("the write", 30.0)
        return await write_each(log, records)

    with monkeypatch.context() as patch:
        patch.setattr(backend, "delete_many" if step == "remove" else "write_each", die)
        with pytest.raises(BackendError):
            await queue.apply(JobFilter(state="failed"), "retry")
    await queue.apply(JobFilter(state="failed"), "retry")
    await run_jobs(queue)
    await only(queue, completed=5)
    assert sorted(tasks.ran) == list(range(5))


async def test_jobs_whose_arguments_were_not_kept_are_not_retried(backend: Backend) -> None:
    tasks = Tasks()
    queue = queue_of(backend, tasks)
    await failed(queue, 1)
    (found,) = await find(queue, "failed")
    body = found.record.body.replace(b'"args"', b'"truncated":true,"args"')
    cut = replace(found, record=replace(found.record, body=body))
    assert await queue._sweep.retry([cut]) == set()
    await only(queue, failed=1)
