"""A store that is full: nothing is lost, producers are told, and workers work it empty."""

import anyio
import pytest

from asyncmq_nats.backends.nats.backend import NATSBackend
from asyncmq_nats.backends.nats.embedded.server import EmbeddedServer
from asyncmq_nats.exceptions import BackendError, StorageFull
from asyncmq_nats.queues import Queue
from asyncmq_nats.settings import Settings
from tests.nats.processes import MakeServer, eventually
from tests.receiver import until
from tests.running import make_queue, running

SERVER = "jetstream { max_file_store: 2MB, max_memory_store: 2MB }"
ACCOUNT = """
accounts { A { jetstream: { max_file: 2MB, max_mem: 2MB },
               users: [ { user: "owner", password: "secret" } ] } }
"""
SIZED = ACCOUNT.replace("max_mem: 2MB", "max_mem: 2MB, max_bytes_required: true")
FAST = {"heartbeat_interval": 0.5, "stalled_after": 20.0}


def store(server: EmbeddedServer, **settings: object) -> NATSBackend:
    url = server.url if "@" in server.url else server.url.replace("//", "//owner:secret@")
    return NATSBackend(url, settings=Settings.model_validate(FAST | settings))


async def fill(queue: Queue, size: int, delay: float | None = None) -> list[str]:
    """Add jobs until the store is full; return their ids."""
    ids: list[str] = []
    with anyio.fail_after(30):
        while True:
            try:
                ids.append(await queue.add("echo", [len(ids), "x" * size], delay=delay))
            except StorageFull:
                return ids


async def echo(value: int, padding: str) -> int:
    return value


@pytest.mark.parametrize("storage", ["file", "memory"])
@pytest.mark.parametrize("config", [SERVER, ACCOUNT])
async def test_workers_start_and_work_a_full_store_empty(
    config: str, storage: str, make_server: MakeServer, caplog: pytest.LogCaptureFixture
) -> None:
    server = make_server(config)
    async with store(server, storage=storage) as producer:
        ids = await fill(Queue("work", producer), 20_000)
    assert sum("no room" in r.getMessage() for r in caplog.records) <= 2, "logged once"
    async with store(server, storage=storage) as backend:
        queue = make_queue(backend, echo=echo)
        with anyio.fail_after(60):
            async with running(queue):
                await eventually(queue.queue_stats, lambda s: s["completed"] == len(ids), 50)
        assert [await queue.get_job_result(job_id) for job_id in ids] == list(range(len(ids)))
        assert await queue.add("echo", [1, "x"])


async def test_a_stream_with_a_limit_of_its_own_leaves_room_for_outcomes(
    server: EmbeddedServer,
) -> None:
    async with store(server, ready_max_bytes=200_000) as backend:
        queue = make_queue(backend, echo=echo)
        ids = await fill(queue, 10)
        with pytest.raises(StorageFull, match="maximum bytes exceeded"):
            await queue.add_bulk([{"task_id": "echo", "args": [1, "x" * 500]}] * 3)
        async with running(queue):
            await eventually(queue.queue_stats, lambda s: s["completed"] == len(ids), 50)
        assert await queue.add("echo", [1, "x"])


async def test_an_account_that_asks_for_limits_is_told_how_to_set_them(
    make_server: MakeServer,
) -> None:
    async with store(make_server(SIZED)) as backend:
        with pytest.raises(BackendError, match="ASYNCMQ_NATS_READY_MAX_BYTES"):
            await Queue("work", backend).add("echo", [1, "x"])


async def test_an_account_that_asks_for_limits_is_served_with_them(
    make_server: MakeServer,
) -> None:
    sizes = {
        "ready_max_bytes": 500_000,
        "bucket_max_bytes": 1_000_000,
        "workers_max_bytes": 100_000,
        "compression": "s2",
    }
    async with store(make_server(SIZED), **sizes) as backend:
        queue = make_queue(backend, echo=echo)
        async with running(queue):
            assert await queue.wait_for(await queue.add("echo", [1, "x"]), timeout=10) == 1
            await until(queue.list_workers, lambda found: len(found) == 1)


async def test_a_bucket_with_a_limit_never_discards_a_delayed_job(server: EmbeddedServer) -> None:
    async with store(server, bucket_max_bytes=500_000) as backend:
        queue = Queue("work", backend)
        ids = await fill(queue, 2000, delay=3600)
        with pytest.raises(StorageFull, match=r"a tenth is for outcomes.*nothing was stored"):
            await queue.add("echo", [1, "x" * 2000], delay=3600)
        assert 100 < len(ids) < 400
        state = await backend.describe_log("KV_amq_work_scheduler")
        assert state is not None
        assert 430_000 < state.bytes < 450_000  # the last tenth is free
        assert [job.job_id for job in await queue.list_delayed()] == ids


async def test_placement_is_asked_for(server: EmbeddedServer) -> None:
    """A server that is alone takes any; the stream keeps what was asked for."""
    async with store(server, placement_tags=("ssd",)) as backend:
        await Queue("work", backend).add("echo", [1, "x"])
        config = (await backend._require_connection().require("STREAM.INFO.amq_work"))["config"]
        assert config["placement"] == {"tags": ["ssd"]}
