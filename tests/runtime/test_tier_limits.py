"""More priorities than a queue can have tiers for: workers serve what they can."""

import logging

import anyio
import pytest

from asyncmq_nats.backends.base import Backend, Write
from asyncmq_nats.backends.nats.embedded.server import EmbeddedServer
from asyncmq_nats.store.topology import MAX_TIERS
from tests.running import PATIENCE, has, make_queue, running


async def echo(value: str = "ran") -> str:
    return value


async def test_a_worker_serves_256_tiers_and_says_once_that_there_are_more(
    backend: Backend, caplog: pytest.LogCaptureFixture
) -> None:
    queue = make_queue(backend, echo=echo)
    await queue._assets.declare_all()
    for priority in range(100, 400):
        subject = f"amq.work.ready.{priority}.job-{priority}"
        await backend.write("amq_work", Write(subject, b'{"task":"echo"}'))
    with caplog.at_level(logging.WARNING):
        assert await queue._assets.find_orphans() == list(range(100, 100 + MAX_TIERS - 1))
        assert await queue._assets.find_orphans() == []
    assert len([r for r in caplog.records if "more than 256 priorities" in r.getMessage()]) == 1
    mine = await queue.add("echo")
    async with running(queue):
        with anyio.fail_after(PATIENCE):
            assert await queue.wait_for(mine) == "ran"


async def test_names_that_are_no_priority_are_looked_at_once(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue = make_queue(backend, echo=echo)
    await queue._assets.declare_all()
    for number in range(1500):
        subject = f"amq.work.ready.x{number}.{number}"
        await backend.write("amq_work", Write(subject, b'{"task":"echo"}'))
    read: list[int] = []
    real = backend.page

    async def page(*args: object, **options: object) -> list[object]:
        records = await real(*args, **options)  # type: ignore[arg-type]
        read.append(len(records))
        return list(records)

    monkeypatch.setattr(backend, "page", page)
    assert await queue._assets.find_orphans() == []
    assert sum(read) == 1500
    read.clear()
    await backend.write("amq_work", Write("amq.work.ready.7.late", b'{"task":"echo"}'))
    assert await queue._assets.find_orphans() == [7]
    assert sum(read) == 1


async def test_a_ready_job_with_a_header_of_delete_markers_is_a_job(
    server: EmbeddedServer, nats_backend: Backend
) -> None:
    import nats

    queue = make_queue(nats_backend, echo=echo)
    await queue._assets.declare_all()
    client = await nats.connect(server.url)
    await client.jetstream().publish(
        "amq.work.ready.5.marked", b'{"task":"echo"}', headers={"KV-Operation": "DEL"}
    )
    await client.close()
    assert await queue.get_job_state("marked") == "waiting"
    assert await queue.cancel_job("marked")
    assert await queue.get_job_state("marked") == "cancelled"
    await has(queue, 0, "waiting")
