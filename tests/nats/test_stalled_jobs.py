"""A job whose worker falls silent goes to another one, whose word then stands.

A worker that is only slow keeps its job.
"""

import signal

import anyio
import pytest
from anyio.abc import TaskStatus

from asyncmq_nats.backends.nats.backend import NATSBackend
from asyncmq_nats.backends.nats.embedded.server import EmbeddedServer
from asyncmq_nats.queues import Queue
from asyncmq_nats.settings import Settings
from tests.nats.processes import PATIENCE, Fleet, eventually
from tests.nats.streams import Streams, plain_client

CLAIMS = "KV_amq_fleet_scheduler"
DROPPED = "discarding this worker's result"


@pytest.fixture
def settings() -> Settings:
    return Settings(stalled_after=1.0, shutdown_timeout=5.0)


async def nothing_is_left(server: EmbeddedServer) -> None:
    async with plain_client(server.url) as client:
        await Streams(client).nothing_is_left()


@pytest.mark.slow
@pytest.mark.parametrize("first_does", ["succeeds", "fails", "retries"])
@pytest.mark.parametrize("second", ["has ended", "still runs"])
async def test_worker_paused_beyond_its_lease_has_no_say(
    first_does: str, second: str, fleet: Fleet, queue: Queue, server: EmbeddedServer
) -> None:
    watched, args = fleet.watched, ["job", "first", "second", first_does != "succeeds"]
    with anyio.fail_after(2 * PATIENCE):
        first = await fleet.start("first")
        job_id = await queue.add("disagree", args, retries=3 if first_does == "retries" else 0)
        await watched.begun("job")
        await eventually(lambda: queue.backend.last(CLAIMS, "$KV.*.done.*.claim"), bool)
        first.freeze()
        watched.say("first")
        second_worker = await fleet.start("second")
        await watched.begun("job", times=2)
        if second == "has ended":
            watched.say("second")
            assert await queue.wait_for(job_id) == "second"
        first.send(signal.SIGCONT)
        await first.logged(DROPPED)
        watched.say("second")
        assert await queue.wait_for(job_id) == "second"
        await nothing_is_left(server)
        for worker in (first, second_worker):
            worker.send(signal.SIGTERM)
            assert await worker.wait() == 0
    assert watched.runs("job") == ["first", "second"]
    job = await queue.get_job(job_id)
    assert job is not None
    assert (job["status"], job["result"], job["stalls"], job["errors"]) == (
        "completed",
        "second",
        1,
        [],
    )


@pytest.mark.slow
@pytest.mark.parametrize("tasks", [["block"], ["last", "last_in_thread"]])
async def test_task_that_outlasts_its_lease_runs_once(
    tasks: list[str], fleet: Fleet, queue: Queue, settings: Settings
) -> None:
    with anyio.fail_after(2 * PATIENCE):
        await fleet.start_all("first", "second")
        jobs = {task: await queue.add(task, [3 * settings.stalled_after]) for task in tasks}
        results = {task: await queue.wait_for(job_id) for task, job_id in jobs.items()}
    for task, job_id in jobs.items():
        assert fleet.watched.runs(task) == [results[task]]
        job = await queue.get_job(job_id)
        assert job is not None
        assert job["stalls"] == 0


async def test_job_that_kills_its_workers_ends_as_failed(
    fleet: Fleet, queue: Queue, nats_backend: NATSBackend
) -> None:
    async def keep_one_running(*, task_status: TaskStatus[None]) -> None:
        worker = await fleet.start("first")
        task_status.started()
        while True:
            await worker.wait()
            worker = await fleet.start("next")

    with anyio.fail_after(2 * PATIENCE):
        async with anyio.create_task_group() as group:
            await group.start(keep_one_running)
            job_id = await queue.add("kill")
            await eventually(lambda: queue.get_job_state(job_id), lambda state: state == "failed")
            group.cancel_scope.cancel()
    job = await queue.get_job(job_id)
    assert job is not None
    assert "stalled" in job["last_error"]
    assert job["stalls"] == nats_backend.settings.max_stalls
    assert len(fleet.watched.runs("kill")) == nats_backend.settings.max_stalls
