"""The possible damage of a client that may only publish to `ready.*.*`.

His message ends, and nothing else does.
"""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import pytest
from nats.aio.client import Client

from asyncmq_nats.backends.nats.backend import NATSBackend
from asyncmq_nats.backends.nats.embedded.server import EmbeddedServer
from asyncmq_nats.queues import Queue
from asyncmq_nats.settings import Settings
from tests.nats.processes import MakeServer, eventually
from tests.nats.streams import plain_client
from tests.running import counted, has, make_queue, outcome, running

USERS = """
authorization {
  users: [
    { user: "owner", password: "secret" }
    { user: "stranger", password: "secret",
      permissions: { publish: "amq.work.ready.*.*", subscribe: "_INBOX.>" } }
  ]
}
"""
LIMIT = 1_048_576


@pytest.fixture
def guarded(make_server: MakeServer) -> EmbeddedServer:
    return make_server(USERS)


@pytest.fixture
async def owner(guarded: EmbeddedServer) -> AsyncIterator[NATSBackend]:
    settings = Settings(user="owner", password="secret", stalled_after=1.0, heartbeat_interval=0.5)
    async with NATSBackend(guarded.url, settings=settings) as backend:
        yield backend


@asynccontextmanager
async def stranger(server: EmbeddedServer) -> AsyncIterator[Client]:
    async with plain_client(server.url, user="stranger", password="secret") as client:
        yield client


def echoing(backend: NATSBackend, **tasks: Any) -> Queue:
    async def echo(value: object = None) -> object:
        return value if isinstance(value, int) else None

    return make_queue(backend, echo=echo, **tasks)


def job_of_size(size: int) -> bytes:
    job = {"task": "echo", "args": [""]}
    padding = size - len(json.dumps(job))
    return json.dumps({"task": "echo", "args": ["x" * padding]}).encode()


@pytest.mark.parametrize(
    "size", [LIMIT, LIMIT - 6, LIMIT - 200, LIMIT - 1024, LIMIT - 1500, LIMIT - 70_000, LIMIT // 2]
)
async def test_a_job_as_large_as_a_message_ends_and_the_worker_goes_on(
    size: int, owner: NATSBackend, guarded: EmbeddedServer, caplog: pytest.LogCaptureFixture
) -> None:
    queue = echoing(owner)
    async with running(queue), stranger(guarded) as client:
        await client.publish("amq.work.ready.5.large", job_of_size(size))
        assert (await outcome(queue, "large"))["status"] in ("completed", "failed")
        assert await queue.wait_for(await queue.add("echo", [7]), timeout=10) == 7
    assert "disconnected" not in caplog.text


async def test_the_started_event_of_a_large_job_is_sent_without_its_arguments(
    owner: NATSBackend, guarded: EmbeddedServer
) -> None:
    queue = echoing(owner)
    heard: list[Any] = []
    await owner.subscribe("amq.work.event.started.*", lambda s: heard.append(json.loads(s.body)))
    async with running(queue), stranger(guarded) as client:
        await client.publish("amq.work.ready.5.large", job_of_size(LIMIT))
        await outcome(queue, "large")
    assert [(e["task"], e.get("truncated"), "args" in e) for e in heard] == [("echo", True, False)]


@pytest.mark.parametrize("size", [2_000_000, LIMIT - 300, 600_000])
@pytest.mark.parametrize("retries", [0, 2])
async def test_a_task_with_a_large_error_ends_and_the_worker_goes_on(
    size: int, retries: int, owner: NATSBackend, caplog: pytest.LogCaptureFixture
) -> None:
    async def fail() -> None:
        raise ValueError("x" * size)

    queue = echoing(owner, fail=fail)
    async with running(queue):
        job_id = await queue.add("fail", retries=retries)
        assert (await outcome(queue, job_id))["status"] == "failed"
        assert await queue.wait_for(await queue.add("echo", [7]), timeout=10) == 7
    assert "disconnected" not in caplog.text


@pytest.mark.parametrize("size", [2_000_000, LIMIT - 300, LIMIT - 1024])
async def test_a_large_result_fails_its_job_and_the_worker_goes_on(
    size: int, owner: NATSBackend, caplog: pytest.LogCaptureFixture
) -> None:
    async def produce() -> str:
        return "x" * size

    queue = echoing(owner, produce=produce)
    async with running(queue):
        job_id = await queue.add("produce")
        assert (await outcome(queue, job_id))["status"] == "failed"
        assert await queue.wait_for(await queue.add("echo", [7]), timeout=10) == 7
    assert "disconnected" not in caplog.text


async def test_a_large_progress_report_is_refused_in_the_task(owner: NATSBackend) -> None:
    async def report(report_progress: Any) -> str:
        try:
            report_progress(0.5, "x" * 2_000_000)
        except ValueError as error:
            return type(error).__name__
        return "taken"

    queue = make_queue(owner)
    queue._registry.register(report, queue="work", name="report", progress=True)
    async with running(queue):
        assert await queue.wait_for(await queue.add("report"), timeout=10) == "PayloadTooLarge"


@pytest.mark.parametrize("length", [1024, 1025, 3000, 4000])
async def test_a_long_id_ends_and_the_worker_goes_on(
    length: int, owner: NATSBackend, guarded: EmbeddedServer, caplog: pytest.LogCaptureFixture
) -> None:
    queue = echoing(owner)
    async with running(queue), stranger(guarded) as client:
        await client.publish(f"amq.work.ready.5.{'x' * length}", b'{"task": "echo"}')
        await eventually(
            lambda: queue.get_job_count_by_types("waiting", "active"), lambda count: count == 0, 15
        )
        assert await queue.wait_for(await queue.add("echo", [7]), timeout=10) == 7
    assert "disconnected" not in caplog.text


@pytest.mark.parametrize("operation", ["DEL", "PURGE", "x"])
async def test_a_header_makes_no_marker_of_a_ready_job(
    operation: str, owner: NATSBackend, guarded: EmbeddedServer
) -> None:
    ran: list[str] = []

    async def note() -> None:
        ran.append("note")

    queue = echoing(owner, note=note)
    await queue._assets.declare_all()
    async with stranger(guarded) as client:
        headers = {"KV-Operation": operation}
        await client.publish("amq.work.ready.5.marked", b'{"task": "note"}', headers=headers)
        await client.flush()
    await eventually(lambda: queue.get_job("marked"), lambda job: job is not None)
    await counted(queue)
    assert [job["id"] for job in await queue.list_jobs("waiting")] == ["marked"]
    assert await queue.cancel_job("marked")
    async with running(queue):
        assert await queue.wait_for(await queue.add("echo", [7]), timeout=10) == 7
    assert ran == []
    assert await queue.get_job_state("marked") == "cancelled"


async def test_open_batches_of_a_stranger_do_not_keep_a_bulk_out(
    owner: NATSBackend, guarded: EmbeddedServer
) -> None:
    queue = echoing(owner)
    await queue._assets.declare_all()
    begun = anyio.Event()

    async def keep_open(client: Client) -> None:
        """The server gives an open batch up after some seconds without a message."""
        for turn in range(1, 1000):
            for number in range(60):
                headers = {"Nats-Batch-Id": f"open-{number}", "Nats-Batch-Sequence": str(turn)}
                await client.publish(f"amq.work.ready.5.o{turn}-{number}", b"{}", headers=headers)
            await client.flush()
            begun.set()
            await anyio.sleep(0.5)

    async with stranger(guarded) as client, anyio.create_task_group() as group:
        group.start_soon(keep_open, client)
        await begun.wait()
        with anyio.fail_after(25):
            ids = await queue.add_bulk([{"task_id": "echo", "args": [n]} for n in range(3)])
        async with running(queue):
            assert [await queue.wait_for(job_id, timeout=15) for job_id in ids] == [0, 1, 2]
        group.cancel_scope.cancel()


@pytest.mark.parametrize("size", [2, 40])
async def test_many_bulks_at_once_are_all_added(size: int, owner: NATSBackend) -> None:
    queue = Queue("work", owner)

    async def add() -> None:
        ids.extend(await queue.add_bulk([{"task_id": "echo"}] * size))

    ids: list[str] = []
    async with anyio.create_task_group() as group:
        for _ in range(400):
            group.start_soon(add)
    assert len(set(ids)) == 400 * size
    await has(queue, 400 * size, "waiting")
