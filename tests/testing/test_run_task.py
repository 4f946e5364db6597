"""One task is run as a worker would, with a job of the test's making."""

import threading
from datetime import date
from typing import Any

import pytest

from asyncmq_nats import NotSerializable, current_job, task
from asyncmq_nats.exceptions import InvalidArgument
from asyncmq_nats.runtime.registry import TaskRegistry
from asyncmq_nats.testing import job_context, run_task

registry = TaskRegistry()


@task(queue="work", name="describe", registry=registry, retries=3)
async def describe(day: date, *, prefix: str = "") -> dict[str, Any]:
    job = current_job()
    return {
        "day": day,
        "prefix": prefix,
        "attempt": job.attempt,
        "task": job.task_id,
        "queue": job.queue,
        "id": job.id,
        "parents": await job.parent_results(),
    }


@task(queue="work", name="in_thread", registry=registry, progress=True)
def in_thread(report_progress: Any) -> tuple[bool, str]:
    report_progress(0.5, {"half": True})
    return threading.current_thread() is threading.main_thread(), current_job().id


@task(queue="work", name="in_process", registry=registry, process=True)
def in_process(number: int) -> int:
    return number + 1


async def test_a_task_is_given_its_arguments_as_a_worker_would_give_them() -> None:
    result = await run_task(describe, date(2026, 1, 5), prefix="on")
    assert (result["day"], result["prefix"]) == (date(2026, 1, 5), "on")
    assert (result["attempt"], result["task"], result["queue"]) == (1, "describe", "work")


async def test_the_job_is_that_of_the_test() -> None:
    result = await run_task(
        describe, date(2026, 1, 5), attempt=2, parent_results={"a": 1}, job_id="mine"
    )
    assert (result["attempt"], result["parents"], result["id"]) == (2, {"a": 1}, "mine")


async def test_an_argument_that_would_not_arrive_is_refused() -> None:
    with pytest.raises(NotSerializable):
        await run_task(describe, object())


async def test_a_sync_task_runs_in_a_thread() -> None:
    in_main, job_id = await run_task(in_thread, job_id="one")
    assert (in_main, job_id) == (False, "one")


async def test_a_task_for_a_process_runs_here() -> None:
    assert await run_task(in_process, 1) == 2


async def test_what_a_task_raises_is_raised() -> None:
    @task(queue="work", name="fail", registry=registry)
    async def fail() -> None:
        raise KeyError("no")

    with pytest.raises(KeyError, match="no"):
        await run_task(fail)


def test_code_that_asks_for_the_job_is_given_one() -> None:
    with job_context(
        "work.task", attempt=3, parent_results={"a": 1}, meta={"request": "7"}, state="pool"
    ) as running:
        job = current_job()
        assert (job.meta, job.state) == ({"request": "7"}, "pool")
        assert (job.attempt, job.task_id, job.job.depends_on) == (3, "work.task", ["a"])
        job.report_progress(0.25, "a quarter")
        job.add("work.next", [1], delay=5)
    assert running.reports == [(0.25, "a quarter")]
    assert [(each.task_id, each.args) for each in running.follow_ups] == [("work.next", [1])]
    with pytest.raises(LookupError):
        current_job()


def test_the_first_attempt_is_1() -> None:
    with pytest.raises(InvalidArgument, match="1 or more"), job_context(attempt=0):
        pass
