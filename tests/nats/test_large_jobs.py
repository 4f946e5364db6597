"""Jobs, results and pages of more bytes than the server holds for a client that is slow.

It would disconnect it, and jobs would stall.
"""

import anyio
import pytest

from asyncmq_nats.backends.base import Log, Write
from asyncmq_nats.backends.nats.backend import NATSBackend
from asyncmq_nats.queues import Queue
from tests.nats.processes import eventually
from tests.running import counted, make_queue, running

SIZE = 950_000
JOBS = 120
"""Twice what the server holds: 64 MiB."""


def disconnections(backend: NATSBackend) -> int:
    assert backend._connection is not None
    return backend._connection.client.stats["reconnects"]


@pytest.fixture
async def queue(nats_backend: NATSBackend) -> Queue:
    async def measure(text: str) -> int:
        return len(text)

    return make_queue(nats_backend, concurrency=100, measure=measure)


async def add_large(queue: Queue) -> list[str]:
    return [await queue.add("measure", ["x" * SIZE]) for _ in range(JOBS)]


async def test_large_jobs_run_once_each(queue: Queue, nats_backend: NATSBackend) -> None:
    await add_large(queue)
    async with running(queue):
        stats = await eventually(
            queue.queue_stats, lambda stats: stats["completed"] == JOBS, within=40
        )
    jobs = await queue.get_jobs("completed")
    assert (
        stats["completed"],
        len(jobs),
        {job["stalls"] for job in jobs},
        disconnections(nats_backend),
    ) == (JOBS, JOBS, {0}, 0)


async def test_large_jobs_are_listed_and_read_in_any_number(
    queue: Queue, nats_backend: NATSBackend
) -> None:
    ids = await add_large(queue)
    await counted(queue)
    assert [job["id"] for job in await queue.list_jobs("waiting")] == ids
    read: list[str] = []

    async def read_one(job_id: str) -> None:
        job = await queue.get_job(job_id)
        assert job is not None
        assert len(job["args"][0]) == SIZE
        read.append(job_id)

    async with anyio.create_task_group() as group:
        for job_id in ids:
            group.start_soon(read_one, job_id)
    assert sorted(read) == sorted(ids)
    assert disconnections(nats_backend) == 0


async def test_the_last_records_of_any_number_and_size_are_complete(
    nats_backend: NATSBackend,
) -> None:
    """A job may have a hundred parents with large results."""
    await nats_backend.declare_log(Log("notes", ("notes.>",)))
    for number in range(20):
        await nats_backend.write("notes", Write(f"notes.large.{number}", b"x" * SIZE))
    for number in range(1010):
        await nats_backend.write("notes", Write(f"notes.small.{number}", b""))
    records = await nats_backend.last("notes", "notes.large.*")
    assert [(record.subject, len(record.body)) for record in records] == [
        (f"notes.large.{number}", SIZE) for number in range(20)
    ]
    assert len(await nats_backend.last("notes", "notes.small.*", "notes.large.1")) == 1011
