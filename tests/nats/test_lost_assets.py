"""Streams and consumers that vanish under a running worker are declared again, and new jobs run."""

import time

import anyio
import pytest

from asyncmq_nats.backends.nats.embedded.server import EmbeddedServer
from asyncmq_nats.queues import Queue
from asyncmq_nats.settings import Settings
from tests.nats.processes import PATIENCE, Fleet, eventually
from tests.nats.streams import Streams, plain_client
from tests.running import counted, has

UNFINISHED = ("waiting", "active", "delayed")
LOG_LIMIT = 200
"""Lines a worker may log about one loss: it must not chase the server."""


@pytest.fixture
def settings() -> Settings:
    return Settings(stalled_after=1.0)


async def delete(server: EmbeddedServer, what: str) -> None:
    async with plain_client(server.url) as client:
        await Streams(client).call(what)


async def ends_as(result: int, job_id: str, queue: Queue) -> None:
    # Not `wait_for`: without the bucket, there is a moment in which a job cannot be found.
    assert (
        await eventually(lambda: queue.get_job_result(job_id), lambda found: found is not None)
        == result
    )


@pytest.mark.parametrize(
    "what",
    [
        "CONSUMER.DELETE.amq_fleet.tier_5",
        "CONSUMER.DELETE.KV_amq_fleet_scheduler.promoter",
        "STREAM.DELETE.amq_fleet",
        "STREAM.DELETE.KV_amq_fleet_scheduler",
    ],
)
async def test_worker_and_producer_get_over_the_loss(
    what: str, fleet: Fleet, queue: Queue, server: EmbeddedServer
) -> None:
    worker = await fleet.start("first")
    assert await queue.wait_for(await queue.add("brief", [1]), timeout=PATIENCE) == 1
    await delete(server, what)
    started = time.monotonic()
    with anyio.fail_after(PATIENCE):
        await ends_as(2, await queue.add("brief", [2]), queue)
        at_once = time.monotonic() - started
        await ends_as(3, await queue.add("brief", [3], job_id="chosen"), queue)
        await ends_as(4, await queue.add("brief", [4], delay=0.2), queue)
        await ends_as(5, await queue.add("brief", [5], priority=1), queue)
    print(
        f"{what}: ready job after {at_once:.2f} s, "
        f"delayed job after {time.monotonic() - started:.2f} s, log {len(worker.log.splitlines())}"
    )
    # An outcome is there a moment before its message is acknowledged.
    await eventually(queue.queue_stats, lambda found: not any(found[each] for each in UNFINISHED))
    await has(queue, 4 if what == "STREAM.DELETE.KV_amq_fleet_scheduler" else 5, "completed")
    assert len(worker.log.splitlines()) < LOG_LIMIT
    assert not worker.ended


async def test_worker_that_idles_without_its_stream_keeps_quiet(
    fleet: Fleet, queue: Queue, server: EmbeddedServer
) -> None:
    worker = await fleet.start("first")
    assert await queue.wait_for(await queue.add("brief", [1]), timeout=PATIENCE) == 1
    await delete(server, "STREAM.DELETE.amq_fleet")
    await anyio.sleep(2.0)
    assert len(worker.log.splitlines()) < LOG_LIMIT


async def test_counters_in_memory_come_back_after_a_restart(
    queue: Queue, server: EmbeddedServer
) -> None:
    await queue.add("brief", [1])
    await queue.add("brief", [2], delay=60)
    await counted(queue)
    before = await queue.queue_stats()
    server.kill()
    server.start()
    with anyio.fail_after(PATIENCE):
        assert await queue.queue_stats() == before
    assert before["waiting"] == before["delayed"] == 1
