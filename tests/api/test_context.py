"""The job context of a task, and its reports, on both backends."""

import json
from typing import Any

import anyio
import pytest

from asyncmq_nats.backends.base import Backend, Signal
from asyncmq_nats.context import current_job
from asyncmq_nats.queues import Queue
from asyncmq_nats.runtime.registry import TaskRegistry
from asyncmq_nats.tasks import task
from tests.receiver import holds, until
from tests.running import PATIENCE, make_queue, outcome, running

Seen = tuple[str, str, str, int]


def look() -> Seen:
    job = current_job()
    return job.id, job.task_id, job.queue, job.attempt


async def look_async() -> Seen:
    return look()


async def look_nested() -> list[Seen]:
    """In a child task, in a thread, and in a coroutine further down."""
    seen: list[Seen] = []

    async def note() -> None:
        seen.append(await look_async())

    async with anyio.create_task_group() as group:
        group.start_soon(note)
    seen.append(await anyio.to_thread.run_sync(look))
    seen.append(await look_async())
    return seen


def look_nested_sync() -> list[Seen]:
    return [look(), anyio.from_thread.run(look_async), anyio.from_thread.run_sync(look)]


@pytest.mark.parametrize("function", [look, look_async])
async def test_a_task_knows_its_job(backend: Backend, function: Any) -> None:
    queue = make_queue(backend, look=function)
    job_id = await queue.add("look")
    assert (await run(queue, job_id)) == [job_id, "look", "work", 1]


@pytest.mark.parametrize("function", [look_nested, look_nested_sync])
async def test_what_a_task_calls_knows_it_too(backend: Backend, function: Any) -> None:
    queue = make_queue(backend, look=function)
    job_id = await queue.add("look")
    assert (await run(queue, job_id)) == [[job_id, "look", "work", 1]] * 3


async def run(queue: Queue, job_id: str) -> Any:
    async with running(queue):
        return await queue.wait_for(job_id, timeout=PATIENCE)


async def test_each_job_knows_itself(backend: Backend) -> None:
    meeting = [0]
    met = anyio.Event()

    async def meet() -> str:
        before = current_job().id
        meeting[0] += 1
        if meeting[0] == 10:
            met.set()
        await met.wait()
        assert current_job().id == before
        return before

    queue = make_queue(backend, concurrency=10, meet=meet)
    jobs = await queue.add_bulk([{"task_id": "meet"}] * 10)
    async with running(queue):
        assert [await queue.wait_for(job_id, timeout=PATIENCE) for job_id in jobs] == jobs


async def test_attempts_count_from_1(backend: Backend) -> None:
    attempts: list[int] = []

    async def fail() -> None:
        attempts.append(current_job().attempt)
        raise RuntimeError("no")

    queue = make_queue(backend, fail=fail)
    job_id = await queue.add("fail", retries=2)
    async with running(queue):
        await outcome(queue, job_id)
    assert attempts == [1, 2, 3]


def test_outside_a_job_there_is_none() -> None:
    with pytest.raises(LookupError, match="outside a job"):
        current_job()


# -- progress


class Heard:
    """The progress events of a queue."""

    def __init__(self) -> None:
        self.signals: list[Signal] = []

    @property
    def reports(self) -> list[tuple[float, Any]]:
        bodies = [json.loads(signal.body) for signal in self.signals]
        return [(body["progress"], body["data"]) for body in bodies]


async def report_async(report_progress: Any = None) -> str:
    report_progress(0.25)
    await report_progress(0.5, {"step": "two"})
    await report_progress(1, data=[1, 2])
    return "done"


def report_sync(report_progress: Any) -> str:
    report_progress(0.25)
    report_progress(0.5, {"step": "two"})
    report_progress(1, data=[1, 2])
    return "done"


async def report_by_context() -> str:
    return await report_async(current_job().report_progress)


def report_by_context_in_thread() -> str:
    return report_sync(current_job().report_progress)


@pytest.mark.parametrize(
    ("function", "injected"),
    [
        (report_async, True),
        (report_sync, True),
        (report_by_context, False),
        (report_by_context_in_thread, False),
    ],
)
async def test_progress_is_an_event_and_is_stored(
    backend: Backend, function: Any, injected: bool
) -> None:
    registry, heard = TaskRegistry(), Heard()
    task(queue="work", name="report", progress=injected, registry=registry)(function)
    queue = Queue("work", backend, registry=registry)
    await backend.subscribe("amq.work.event.progress.*", heard.signals.append)
    job_id = await queue.add("report")
    assert await run(queue, job_id) == "done"
    await holds(lambda: len(heard.signals) >= 3)  # the last may still be on its way
    assert heard.reports == [(0.25, None), (0.5, {"step": "two"}), (1.0, [1, 2])]
    assert {signal.subject for signal in heard.signals} == {f"amq.work.event.progress.{job_id}"}
    job = await until(
        lambda: queue.get_job(job_id), lambda job: job is not None and job.get("progress") == 1.0
    )
    assert job is not None
    assert (job["status"], job["progress_data"]) == ("completed", [1, 2])


async def test_progress_can_be_read_while_the_job_runs(backend: Backend) -> None:
    opened = anyio.Event()

    async def work() -> None:
        current_job().report_progress(0.5, "half")
        await opened.wait()

    queue = make_queue(backend, work=work)
    job_id = await queue.add("work")
    async with running(queue):
        job = await until(
            lambda: queue.get_job(job_id), lambda job: job is not None and "progress" in job
        )
        assert job is not None
        assert (job["status"], job["progress"], job["progress_data"]) == ("active", 0.5, "half")
        opened.set()


async def test_a_job_that_reported_nothing_has_no_progress(backend: Backend) -> None:
    queue = make_queue(backend)
    job = await queue.get_job(await queue.add("work"))
    assert job is not None
    assert "progress" not in job


@pytest.mark.parametrize("progress", [-0.1, 1.1, float("nan"), float("inf")])
async def test_progress_is_a_share(backend: Backend, progress: float) -> None:
    async def work() -> None:
        current_job().report_progress(progress)

    queue = make_queue(backend, work=work)
    job_id = await queue.add("work")
    async with running(queue):
        assert (
            "ValueError: progress must be between 0 and 1"
            in (await outcome(queue, job_id))["last_error"]
        )


@pytest.mark.parametrize("in_thread", [False, True])
async def test_progress_data_that_is_not_json_is_the_tasks_error(
    backend: Backend, in_thread: bool
) -> None:
    def report() -> None:
        current_job().report_progress(0.5, object())

    async def report_in_loop() -> None:
        report()

    queue = make_queue(backend, work=report if in_thread else report_in_loop)
    job_id = await queue.add("work")
    async with running(queue):
        assert "NotSerializable" in (await outcome(queue, job_id))["last_error"]


async def test_a_task_with_progress_can_be_called_without_a_worker() -> None:
    wrapped = task(queue="work", name="report", progress=True, registry=TaskRegistry())(
        report_async
    )
    assert await wrapped() == "done"
