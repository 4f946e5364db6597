"""The wire format and the permissions of docs/protocol.md, on a real server.

Its examples run, its tables are true.
"""

import asyncio
import json
import logging
import re
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import nats
import pytest
from nats.aio.msg import Msg
from nats.js.api import PubAck
from nats.js.client import JetStreamContext
from nats.js.errors import APIError

from asyncmq_nats import Job, NATSBackend, Queue, Settings
from asyncmq_nats.backends.nats.embedded.server import EmbeddedServer
from asyncmq_nats.context import current_job
from asyncmq_nats.exceptions import JobFailed, PermissionRefused
from asyncmq_nats.flow import FlowProducer
from asyncmq_nats.queues import list_queues
from asyncmq_nats.runtime.registry import TaskRegistry
from tests.docs.test_docs import run_block, runnable
from tests.receiver import PATIENCE, until
from tests.running import has

QUEUE = "email"

registry = TaskRegistry()


async def count_words(text: str) -> int:
    return len(text.split())


async def fail() -> None:
    raise ValueError("no")


registry.register(count_words, queue=QUEUE, name="tasks.count_words")


async def follow() -> None:
    current_job().add("tasks.count_words", ["a b"])


registry.register(fail, queue=QUEUE, name="tasks.fail")
registry.register(follow, queue=QUEUE, name="tasks.follow")


@asynccontextmanager
async def working(queue: Queue) -> AsyncIterator[None]:
    async with anyio.create_task_group() as group:
        await group.start(queue.run)
        yield
        group.cancel_scope.cancel()


# -- the examples


async def test_the_examples_of_the_protocol(
    server: EmbeddedServer, nats_backend: NATSBackend
) -> None:
    publish, custom_id = runnable("docs/protocol.md", "python")
    queue = Queue(QUEUE, nats_backend, registry=registry)
    async with working(queue):
        assert (
            await run_block(publish.replace("examples", QUEUE), ASYNCMQ_NATS_SERVERS=server.url)
            == "3\n"
        )
        assert await run_block(custom_id, ASYNCMQ_NATS_SERVERS=server.url) == ""
        assert await queue.wait_for("invoice-7", timeout=PATIENCE) == 2


async def test_a_job_with_an_id_of_its_own_is_stored_once(
    server: EmbeddedServer, nats_backend: NATSBackend
) -> None:
    custom_id = runnable("docs/protocol.md", "python")[1]
    await Queue(QUEUE, nats_backend)._assets.declare_all()
    assert await run_block(custom_id, ASYNCMQ_NATS_SERVERS=server.url) == ""
    assert await run_block(custom_id, ASYNCMQ_NATS_SERVERS=server.url) == "it is there already\n"


# -- the permissions


def connect_as(server: EmbeddedServer, user: str, **options: Any) -> NATSBackend:
    settings = Settings(
        stalled_after=1.0, publish_timeout=2.0, connect_timeout=5.0, heartbeat_interval=0.5
    )
    return NATSBackend(server.url, settings=settings, user=user, password="secret", **options)


async def test_each_role_can_do_its_work_with_the_permissions_of_the_protocol(
    tmp_path: Path, server: EmbeddedServer
) -> None:
    (config,) = runnable("docs/protocol.md", "conf")
    with EmbeddedServer(tmp_path / "guarded", config=config) as guarded:
        async with (
            connect_as(guarded, "worker") as worker,
            connect_as(guarded, "producer", declare=False) as producer,
            connect_as(guarded, "reader", declare=False) as reader,
            connect_as(guarded, "admin", declare=False) as admin,
            working(repeating(Queue(QUEUE, worker, registry=registry))),
        ):
            await use_as_producer(Queue(QUEUE, producer))
            await use_as_reader(Queue(QUEUE, reader))
            await use_as_admin(Queue(QUEUE, admin))
            async with plain_client(guarded, "plain") as stream:
                await add(stream, "plain", args=["one two"])
            assert await Queue(QUEUE, producer).wait_for("plain", timeout=PATIENCE) == 2
            async with plain_client(guarded, "reader") as stream:
                assert (await read(stream, "done.plain.completed"))["result"] == 2
        log = (tmp_path / "guarded" / "nats-server.log").read_text()
    assert re.findall(r"\[ERR\].*Violation.*", log) == []


@asynccontextmanager
async def plain_client(server: EmbeddedServer, user: str) -> AsyncIterator[JetStreamContext]:
    client = await nats.connect(server.url, user=user, password="secret")
    yield client.jetstream()
    await client.close()


async def read(stream: JetStreamContext, key: str) -> dict[str, Any]:
    """Return a record of the bucket, as any KV client reads it."""
    bucket = await stream.key_value(f"amq_{QUEUE}_scheduler")
    record: dict[str, Any] = json.loads((await bucket.get(key)).value or b"")
    return record


def repeating(queue: Queue) -> Queue:
    """Return the queue with a repeatable that its worker stores."""
    queue.add_repeatable("tasks.count_words", every=0.2, args=["tick"], name="clock")
    return queue


async def use_as_producer(queue: Queue) -> None:
    add = partial(queue.add, "tasks.count_words", ["a b"])
    for options in (
        {},
        {"priority": 2},
        {"delay": 0.1},
        {"delay": 0.6},
        {"job_id": "mine"},
        {"deduplication": {"id": "one", "ttl": 60}},
    ):
        assert await queue.wait_for(await add(**options), timeout=PATIENCE) == 2
    assert len(await queue.add_bulk([{"task_id": "tasks.count_words", "args": ["a"]}] * 3)) == 3
    parent = await add(delay=0.6)
    assert await queue.wait_for(await add(depends_on=[parent]), timeout=PATIENCE) == 2
    assert await queue.wait_for(await queue.add("tasks.follow"), timeout=PATIENCE) is None
    failing = await queue.add("tasks.fail", retries=1, backoff=0.1, priority=2)
    with pytest.raises(JobFailed):
        await queue.wait_for(failing, timeout=PATIENCE)
    with pytest.raises(JobFailed, match="did not complete"):
        await queue.wait_for(
            await add(depends_on=[failing], on_parent_failure="fail"), timeout=PATIENCE
        )
    first, second = Job("tasks.count_words", ["a"]), Job("tasks.count_words", ["a b c"])
    await FlowProducer(queue.backend).add_flow(
        QUEUE, [replace(second, depends_on=[first.job_id]), first]
    )
    assert await queue.wait_for(second.job_id, timeout=PATIENCE) == 3


async def use_as_reader(queue: Queue) -> None:
    await until(queue.queue_stats, lambda stats: stats["completed"] >= 4)
    assert await queue.get_job_state("mine") == "completed"
    assert len(await queue.get_jobs("completed", end=1)) == 2
    assert [info.job_def["name"] for info in await queue.list_repeatables()] == ["clock"]
    await until(queue.list_workers, lambda found: len(found) == 1)
    assert await list_queues(queue.backend) == [QUEUE]
    assert not await queue.is_paused()
    with anyio.fail_after(PATIENCE):
        async for event in queue.events("job:started"):
            assert event.data["task"] == "tasks.count_words"
            break


async def use_as_admin(queue: Queue) -> None:
    assert await queue.configure(stalled_after=45, ready_max_bytes=10**8)
    assert await queue.configure(reset=["stalled_after", "ready_max_bytes"])
    assert await queue.remove_repeatable("clock")
    await queue.upsert_repeatable("tasks.count_words", every=3600, args=["tick"], name="hourly")
    await queue.pause_repeatable("hourly")
    await queue.resume_repeatable("hourly")
    (failed,) = await until(lambda: queue.get_jobs("failed", end=0), bool)
    assert await queue.retry_job(failed["id"])
    await queue.clean_jobs(0, 1)
    assert await queue.remove_deduplication_key("one")
    await queue.pause()
    await queue.resume()
    assert await queue.remove_job("mine")
    await queue.clean("completed")
    assert not await queue.cancel_job("mine")
    assert await queue.drain() == []
    await queue.obliterate(force=True)
    assert (await queue.queue_stats())["completed"] == 0


async def test_a_role_cannot_do_more(
    tmp_path: Path, server: EmbeddedServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL)
    (config,) = runnable("docs/protocol.md", "conf")
    with EmbeddedServer(tmp_path / "guarded", config=config) as guarded:
        async with (
            connect_as(guarded, "worker") as worker,
            connect_as(guarded, "plain", declare=False) as plain,
        ):
            await Queue(QUEUE, worker)._assets.declare_all()
            await Queue(QUEUE, plain).add("tasks.count_words", ["a"])
            with pytest.raises(PermissionRefused):
                await Queue(QUEUE, plain).add("tasks.count_words", ["a"], delay=60)


# -- the wire format


async def add(
    stream: JetStreamContext,
    token: str,
    priority: int = 5,
    headers: dict[str, str] | None = None,
    **fields: Any,
) -> PubAck:
    """Add a job by one publish."""
    body = json.dumps({"task": "tasks.count_words", **fields}).encode()
    return await stream.publish(f"amq.{QUEUE}.ready.{priority}.{token}", body, headers=headers)


@pytest.fixture
async def stream(
    server: EmbeddedServer, nats_backend: NATSBackend
) -> AsyncIterator[JetStreamContext]:
    """nats-py, connected to the server of `nats_backend`, where the queue exists."""
    await Queue(QUEUE, nats_backend)._assets.declare_all()
    client = await nats.connect(server.url)
    yield client.jetstream()
    await client.close()


async def outcome(queue: Queue, job_id: str) -> dict[str, Any]:
    """Return the job when it has ended."""
    with suppress(JobFailed):
        await queue.wait_for(job_id, timeout=PATIENCE)
    job = await queue.get_job(job_id)
    assert job is not None
    return job


async def test_a_task_is_all_a_job_needs(
    nats_backend: NATSBackend, stream: JetStreamContext
) -> None:
    queue = Queue(QUEUE, nats_backend, registry=registry)
    await stream.publish(f"amq.{QUEUE}.ready.5.bare", b'{"task": "tasks.fail"}')
    job = await queue.get_job("bare")
    assert job is not None
    assert (
        job["id"],
        job["args"],
        job["kwargs"],
        job["max_retries"],
        job["backoff"],
        job["priority"],
    ) == ("bare", [], {}, 3, 1.5, 5)
    assert abs(job["created_at"] - time.time()) < 5


async def test_a_message_id_is_stored_once(stream: JetStreamContext) -> None:
    first = await add(stream, "one", headers={"Nats-Msg-Id": "one"})
    second = await add(stream, "one", headers={"Nats-Msg-Id": "one"})
    assert (second.seq, second.duplicate) == (first.seq, True)


async def test_an_id_that_is_ready_is_replaced_unless_told_otherwise(
    nats_backend: NATSBackend, stream: JetStreamContext
) -> None:
    await add(stream, "twice", args=["a"])
    await add(stream, "twice", args=["b"])
    job = await Queue(QUEUE, nats_backend).get_job("twice")
    assert job is not None
    assert job["args"] == ["b"]
    filter = f"amq.{QUEUE}.ready.*.twice"
    expect_nothing = {
        "Nats-Expected-Last-Subject-Sequence": "0",
        "Nats-Expected-Last-Subject-Sequence-Subject": filter,
    }
    with pytest.raises(APIError) as refused:
        await add(stream, "twice", headers=expect_nothing)
    assert refused.value.err_code == 10071


async def test_a_priority_without_a_tier_is_stored_and_runs_when_a_worker_finds_it(
    nats_backend: NATSBackend, stream: JetStreamContext
) -> None:
    queue = Queue(QUEUE, nats_backend, registry=registry)
    await add(stream, "early", priority=3, args=["a"])
    await has(queue, 0, "waiting")
    async with working(queue):
        assert await queue.wait_for("early", timeout=PATIENCE) == 1
        await add(stream, "signalled", priority=4, args=["a b"])
        await nats_backend.publish(f"amq.{QUEUE}.control.tier", b"4")
        assert await queue.wait_for("signalled", timeout=PATIENCE) == 2


async def test_the_subject_wins_over_the_body(
    nats_backend: NATSBackend, stream: JetStreamContext
) -> None:
    queue = Queue(QUEUE, nats_backend, registry=registry)
    body = {
        "task": "tasks.fail",
        "max_retries": 0,
        "id": "other",
        "priority": 9,
        "status": "completed",
        "worker": "w",
    }
    await stream.publish(f"amq.{QUEUE}.ready.5.true", json.dumps(body).encode())
    async with working(queue):
        job = await outcome(queue, "true")
    record = await read(stream, "done.true.failed")
    assert (job["id"], record["id"], record["priority"], record["status"]) == (
        "true",
        "true",
        5,
        "failed",
    )
    assert record["worker"] != "w"


async def test_ids_are_percent_encoded(nats_backend: NATSBackend, stream: JetStreamContext) -> None:
    queue = Queue(QUEUE, nats_backend, registry=registry)
    await add(stream, "invoice%207%2Epdf", args=["a"])
    async with working(queue):
        assert await queue.wait_for("invoice 7.pdf", timeout=PATIENCE) == 1


async def test_what_is_no_job_is_kept_as_failed(
    nats_backend: NATSBackend, stream: JetStreamContext
) -> None:
    queue = Queue(QUEUE, nats_backend, registry=registry)
    await stream.publish(f"amq.{QUEUE}.ready.5.text", b"no json")
    await add(stream, "future", v=2)
    async with working(queue):
        await outcome(queue, "text")
        await outcome(queue, "future")
    text, future = await read(stream, "done.text.failed"), await read(stream, "done.future.failed")
    assert (text["task"], text["body"]) == ("?", "no json")
    assert "its version is 2" in future["last_error"]


async def test_outcomes_have_the_fields_of_the_table(
    nats_backend: NATSBackend, stream: JetStreamContext
) -> None:
    queue = Queue(QUEUE, nats_backend, registry=registry)
    async with working(queue):
        await add(stream, "good", args=["a b"], mine={"kept": True})
        await add(stream, "bad", task="tasks.fail", max_retries=0)
        await add(stream, "late", ttl=1, created_at=time.time() - 10)
        for job_id in ("good", "bad", "late"):
            await outcome(queue, job_id)
    await add(stream, "unwanted")
    assert await queue.cancel_job("unwanted")
    keys = (
        "done.good.completed",
        "done.bad.failed",
        "done.late.expired",
        "done.unwanted.cancelled",
    )
    good, bad, late, unwanted = [await read(stream, key) for key in keys]
    assert (good["status"], good["result"], good["mine"]) == ("completed", 2, {"kept": True})
    assert (bad["status"], bad["last_error"], bad["retries"]) == ("failed", "ValueError: no", 1)
    assert set(bad["errors"][0]) == {"attempt", "type", "error", "traceback", "at"}
    assert {"error_traceback"} <= set(bad)
    assert late["status"] == "expired"
    assert "time to live" in late["last_error"]
    assert (unwanted["status"], unwanted["last_error"]) == ("cancelled", "cancelled")
    assert all(
        {"active_since", "finished_at", "worker", "id", "created_at"} <= set(record)
        for record in (good, bad, late)
    )


async def test_the_events_of_a_retried_job(
    server: EmbeddedServer, nats_backend: NATSBackend, stream: JetStreamContext
) -> None:
    queue = Queue(QUEUE, nats_backend, registry=registry)
    events: asyncio.Queue[Msg] = asyncio.Queue()
    client = await nats.connect(server.url)
    await client.subscribe(f"amq.{QUEUE}.event.*.*", cb=events.put)
    await client._flush_pending(force_flush=True)
    await client.flush()
    async with working(queue):
        await add(stream, "again", task="tasks.fail", max_retries=1, backoff=0.6)
        await outcome(queue, "again")
        with anyio.fail_after(PATIENCE):
            begun, *heard = [await events.get() for _ in range(6)]
    await client.close()
    worker = json.loads(begun.data)["worker"]
    assert begun.subject == f"amq.{QUEUE}.event.worker.{worker}"
    words = [event.subject.split(".")[3] for event in heard]
    assert words == ["started", "delayed", "released", "started", "failed"]
    assert heard[-1].headers is not None
    assert heard[-1].headers["Nats-Subject"] == f"$KV.amq_{QUEUE}_scheduler.done.again.failed"
    assert {"Nats-Stream", "Nats-Sequence", "Nats-Last-Sequence", "Nats-Time-Stamp"} <= set(
        heard[-1].headers
    )


async def test_an_edge_and_a_parked_job_are_as_described(
    nats_backend: NATSBackend, stream: JetStreamContext
) -> None:
    queue = Queue(QUEUE, nats_backend, registry=registry)
    parent = await queue.add("tasks.count_words", ["a b"])
    child = await queue.add(
        "tasks.count_words", ["c"], depends_on=[parent], on_parent_failure="run"
    )
    parked = await read(stream, f"later.{child}.parked")
    assert (parked["parents"], parked["depends_on"], parked["on_parent_failure"]) == (
        [parent],
        [parent],
        "run",
    )
    assert await read(stream, f"done.{parent}.awaited.{child}") == {}
    async with working(queue):
        assert await queue.wait_for(child, timeout=PATIENCE) == 1
    assert (await read(stream, f"done.{child}.completed"))["parent_results"] == {parent: 2}


async def test_the_start_of_an_attempt_is_an_event(
    server: EmbeddedServer, nats_backend: NATSBackend
) -> None:
    queue = Queue(QUEUE, nats_backend, registry=registry)
    client = await nats.connect(server.url)
    started = await client.subscribe(f"amq.{QUEUE}.event.started.*")
    await client._flush_pending(force_flush=True)
    await client.flush()
    async with working(queue):
        job_id = await queue.add("tasks.count_words", ["a b"])
        data = json.loads((await started.next_msg(timeout=5)).data)
    await client.close()
    assert (data["id"], data["task"], data["args"]) == (job_id, "tasks.count_words", ["a b"])
    assert data["worker"]
    assert abs(data["active_since"] - time.time()) < 5


async def test_a_ready_job_with_a_time_to_come_is_delayed(
    nats_backend: NATSBackend, stream: JetStreamContext
) -> None:
    queue = Queue(QUEUE, nats_backend, registry=registry)
    async with working(queue):
        run_at = time.time() + 0.6
        await add(stream, "soon", args=["a"], delay_until=run_at)
        job = await outcome(queue, "soon")
    assert run_at <= job["active_since"] < run_at + PATIENCE


async def test_a_delayed_job_can_be_left_with_the_servers_timer(
    nats_backend: NATSBackend, stream: JetStreamContext
) -> None:
    queue = Queue(QUEUE, nats_backend, registry=registry)
    run_at = time.time() + 0.8
    key = f"$KV.amq_{QUEUE}_scheduler.later.timed"
    headers = {
        "Nats-Schedule": f"@at {datetime.fromtimestamp(run_at - 0.4, UTC):%Y-%m-%dT%H:%M:%S.%fZ}",
        "Nats-Schedule-Target": f"{key}.released",
        "Nats-Expected-Last-Subject-Sequence": "0",
        "Nats-Expected-Last-Subject-Sequence-Subject": f"{key}.>",
    }
    body = json.dumps({"task": "tasks.count_words", "args": ["a"], "delay_until": run_at}).encode()
    await stream.publish(f"{key}.delayed", body, headers=headers)
    await has(queue, 1, "delayed")
    async with working(queue):
        job = await outcome(queue, "timed")
    assert run_at <= job["active_since"] < run_at + PATIENCE
