"""A job that this worker cannot run, but another may: put off with growing delays, then failed.

And whose tasks a worker runs.
"""

import json
from typing import Any

import anyio
import pytest

from asyncmq_nats.backends.base import Backend, Expect, Write
from asyncmq_nats.exceptions import JobFailed
from asyncmq_nats.queues import Queue
from asyncmq_nats.runtime.registry import TaskRegistry
from asyncmq_nats.settings import Settings
from tests.passing import pass_time
from tests.running import PATIENCE, make_queue, outcome, result, running

VIRTUAL_TIME = True


async def echo(value: Any = None) -> Any:
    return value


async def put_off(queue: Queue, job_id: str) -> dict[str, Any]:
    """Wait until the job has been put off, and return it."""
    with anyio.fail_after(PATIENCE):
        while True:
            job = await queue.get_job(job_id)
            assert job is not None
            if job["status"] == "delayed":
                return job
            await pass_time(0.01)


async def publish(backend: Backend, body: dict[str, Any]) -> None:
    """Add a job as another program does."""
    subject = f"amq.work.ready.5.{body['id']}"
    await backend.write("amq_work", Write(subject, json.dumps(body).encode(), Expect(subject, 0)))


class TestForATime:
    @pytest.fixture
    def settings(self) -> Settings:
        return Settings(stalled_after=2.0, shutdown_timeout=5.0)

    async def test_an_unknown_task_is_delayed_and_says_why(self, backend: Backend) -> None:
        queue = make_queue(backend, echo=echo)
        job_id = await queue.add("later", ["a"], retries=3)
        async with running(queue):
            job = await put_off(queue, job_id)
            assert await result(queue, await queue.add("echo", ["on"])) == "on"
        assert "no task 'later' is registered in this worker" in job["last_error"]
        assert (job["retries"], job["errors"], job["max_retries"]) == (0, [], 3)
        assert job["delay_until"] > job["created_at"]

    async def test_a_worker_that_knows_the_task_runs_it(self, backend: Backend) -> None:
        """A rolling deploy: the producers come first."""
        queue = make_queue(backend)
        job_ids = await queue.add_bulk([{"task_id": "echo", "args": [n]} for n in range(20)])
        async with running(queue):
            for job_id in job_ids:
                await put_off(queue, job_id)
        newer = make_queue(backend, echo=echo)
        async with running(newer):
            results = [await result(newer, job_id) for job_id in job_ids]
        assert results == list(range(20))
        job = await newer.get_job(job_ids[0])
        assert job is not None
        assert (job["retries"], job["last_error"], job["errors"]) == (0, None, [])

    async def test_delays_grow(self, backend: Backend) -> None:
        queue = make_queue(backend)
        job_id = await queue.add("later")
        times: list[float] = []
        async with running(queue):
            with anyio.fail_after(PATIENCE):
                while len(times) < 3:
                    job = await put_off(queue, job_id)
                    if job["delay_until"] not in times:
                        times.append(job["delay_until"])
                    await pass_time(0.01)
        assert times[2] - times[1] > 1.5  # the first ones are a second each

    async def test_a_job_of_a_newer_version_is_put_off(self, backend: Backend) -> None:
        queue = make_queue(backend, echo=echo)
        await result(queue, await _run_one(queue))  # the queue is there
        body = {"v": 2, "id": "new", "task": "echo", "args": {"of": "another kind"}}
        await publish(backend, body)
        async with running(queue):
            job = await put_off(queue, "new")
        assert "its version is 2" in job["last_error"]
        assert "upgrade asyncmq-nats" in job["last_error"]

    async def test_a_retried_job_counts_its_own_attempts_only(self, backend: Backend) -> None:
        queue = make_queue(backend)
        job_id = await queue.add("fail", retries=1)
        async with running(queue):
            await put_off(queue, job_id)

        async def fail() -> None:
            raise ValueError("on its own")

        async with running(newer := make_queue(backend, fail=fail)):
            job = await outcome(newer, job_id)
        assert (job["status"], len(job["errors"])) == ("failed", 2)
        assert job["last_error"] == "ValueError: on its own"


class TestInTheEnd:
    @pytest.fixture
    def settings(self) -> Settings:
        return Settings(stalled_after=2.0, unknown_task_timeout=1.5)

    async def test_a_task_that_no_worker_knows_fails(self, backend: Backend) -> None:
        queue = make_queue(backend)
        job_id = await queue.add("never", retries=5)
        async with running(queue):
            with pytest.raises(JobFailed, match="no task 'never'"):
                await result(queue, job_id)
        job = await queue.get_job(job_id)
        assert job is not None
        assert job["finished_at"] - job["created_at"] >= 1.4

    async def test_a_job_of_a_newer_version_fails_with_its_body(self, backend: Backend) -> None:
        queue = make_queue(backend, echo=echo)
        await result(queue, await _run_one(queue))
        await publish(backend, {"v": 7, "id": "new", "what": "a job of next year"})
        async with running(queue):
            job = await outcome(queue, "new")
        assert job["status"] == "failed"
        assert "its version is 7" in job["last_error"]

    async def test_one_that_is_retried_by_hand_has_all_its_time_again(
        self, backend: Backend
    ) -> None:
        queue = make_queue(backend)
        job_id = await queue.add("echo")
        async with running(queue):
            assert (await outcome(queue, job_id))["status"] == "failed"
            assert await queue.retry_job(job_id)
            await put_off(queue, job_id)
        async with running(newer := make_queue(backend, echo=echo)):
            assert (await outcome(newer, job_id))["status"] == "completed"


async def _run_one(queue: Queue) -> str:
    async with running(queue):
        job_id = await queue.add("echo")
        await result(queue, job_id)
    return job_id


async def test_a_task_of_the_producers_main_module_says_what_to_do(backend: Backend) -> None:
    queue = make_queue(backend)
    job_id = await queue.add("__main__.send")
    async with running(queue):
        with pytest.raises(JobFailed, match=r"of the program that added the job.*move it into"):
            await result(queue, job_id)


# -- whose tasks


def bank(ran: list[str]) -> TaskRegistry:
    registry = TaskRegistry()

    async def transfer() -> None:
        ran.append("transfer")

    registry.register(transfer, queue="bank", name="bank.transfer")
    return registry


async def test_a_worker_does_not_run_a_task_of_another_queue(backend: Backend) -> None:
    ran: list[str] = []
    queue = Queue("email", backend, registry=bank(ran))
    job_id = await queue.add("bank.transfer")
    async with running(queue):
        with pytest.raises(JobFailed, match=r"'bank.transfer' is of queue 'bank'.*any_task"):
            await result(queue, job_id)
    assert ran == []


async def test_a_worker_that_is_told_to_runs_any_task(backend: Backend) -> None:
    ran: list[str] = []
    queue = Queue("email", backend, registry=bank(ran), any_task=True)
    job_id = await queue.add("bank.transfer")
    async with running(queue):
        await result(queue, job_id)
    assert ran == ["transfer"]


class TestAnyTaskBySetting:
    @pytest.fixture
    def settings(self) -> Settings:
        return Settings(any_task=True, unknown_task_timeout=0)

    async def test_the_setting_says_so_for_all_queues(self, backend: Backend) -> None:
        ran: list[str] = []
        queue = Queue("email", backend, registry=bank(ran))
        strict = Queue("post", backend, registry=bank(ran), any_task=False)
        job_id, other = await queue.add("bank.transfer"), await strict.add("bank.transfer")
        async with running(queue), running(strict):
            await result(queue, job_id)
            with pytest.raises(JobFailed, match="of queue 'bank'"):
                await result(strict, other)
        assert ran == ["transfer"]
