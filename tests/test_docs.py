"""The documents: their examples run, their links lead somewhere, their tables are complete, and the wire format is as described."""

import asyncio
import importlib
import importlib.util
import json
import logging
import os
import re
import sys
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

from asyncmq_nats import InMemoryBackend, Job, NATSBackend, Queue, Settings, events, flow, tasks, workers
from asyncmq_nats.backends.nats.embedded import EmbeddedServer
from asyncmq_nats.context import current_job
from asyncmq_nats.dependencies import LEAD
from asyncmq_nats.events import Event
from asyncmq_nats.exceptions import JobFailed, PermissionRefused
from asyncmq_nats.flow import FlowProducer
from asyncmq_nats.jobs import OPTIONAL_FIELDS
from asyncmq_nats.queues import list_queues
from asyncmq_nats.registry import TaskRegistry
from tests.test_public_api import METHODS

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "asyncmq_nats"
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w+) run\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]+\]\(([^)\s]+)\)")
QUEUE = "email"

registry = TaskRegistry()


def runnable(document: str, language: str) -> list[str]:
    """Return the blocks of a document that are marked to be run."""
    return [body for name, body in BLOCK.findall((ROOT / document).read_text()) if name == language]


async def count_words(text: str) -> int:
    return len(text.split())


async def fail() -> None:
    raise ValueError("no")


registry.register(count_words, queue=QUEUE, name="tasks.count_words")


async def follow() -> None:
    current_job().add("tasks.count_words", ["a b"])


registry.register(fail, queue=QUEUE, name="tasks.fail")
registry.register(follow, queue=QUEUE, name="tasks.follow")


# -- complete, and without dead ends


def test_every_module_is_named_in_the_architecture() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    modules = [path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py") if path.name != "__init__.py"]
    assert [name for name in sorted(modules) if f"`{name}`" not in text] == []


def test_no_module_that_is_named_is_gone() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text().partition("## Where to find what")[2]
    assert [name for name in re.findall(r"`([\w/]+\.py)`", text) if not (PACKAGE / name).is_file()] == []


def test_every_setting_is_in_the_table() -> None:
    table = (ROOT / "README.md").read_text()
    assert [name for name in Settings.model_fields if f"`ASYNCMQ_NATS_{name.upper()}`" not in table] == []


def test_every_default_in_the_table_is_right() -> None:
    rows = re.findall(r"^\| `ASYNCMQ_NATS_(\w+)` \| `([^`]*)` \|", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert len(rows) > 10
    for name, shown in rows:
        default = Settings.model_fields[name.lower()].default
        if isinstance(default, tuple):
            default = ",".join(default)
        assert shown == (f"{default:.10g}" if isinstance(default, float) else str(default))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    for link in LINK.findall(document.read_text()):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (document.parent / path).resolve() if path else document
        assert target.exists(), link
        if anchor:
            titles = re.findall(r"^#+ (.+)$", target.read_text(), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles], link


def test_there_are_examples_to_run() -> None:
    assert len(runnable("README.md", "python")) == 1
    assert len(runnable("docs/protocol.md", "python")) == 2
    assert len(runnable("docs/protocol.md", "conf")) == 1


# -- coming from AsyncMQ

COMING = (ROOT / "docs" / "coming-from-asyncmq.md").read_text()
VERDICTS = {"same", "better", "different", "missing"}
OWNERS: dict[str, Any] = {
    "Queue": Queue("any", InMemoryBackend()),
    "Job": Job("any"),
    "Tasks": tasks,
    "Workers": workers,
    "Flows and dependencies": flow,
    "Events": events,
}
"""What the names in the tables of that page belong to."""
SPAN = re.compile(r"`([^`]+)`")


def rows(title: str) -> list[list[str]]:
    """Return the cells of each row of the table under a title."""
    section = COMING.partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line.startswith("|")][2:]


def has(owner: Any, name: str) -> bool:
    for part in name.split("."):
        if not hasattr(owner, part):
            return False
        owner = getattr(owner, part)
    return True


@pytest.mark.parametrize("title", OWNERS)
def test_names_of_asyncmq_are_there_or_missing_as_the_table_says(title: str) -> None:
    assert rows(title)
    for names, verdict, *_ in rows(title):
        assert verdict in VERDICTS
        for name in SPAN.findall(names):
            assert has(OWNERS[title], name) == (verdict != "missing"), name


def test_every_method_of_asyncmqs_queue_is_in_the_table() -> None:
    named = {name for names, *_ in rows("Queue") for name in SPAN.findall(names)}
    assert {name for name in METHODS if not name.startswith("_")} - named == set()


def test_methods_that_only_we_have_are_there() -> None:
    names = SPAN.findall(COMING.partition("Only here: ")[2].partition("\n")[0])
    assert len(names) > 4
    assert [name for name in names if not hasattr(Queue, name) or name in METHODS] == []


def test_functions_of_core_that_are_said_to_be_missing_are() -> None:
    text = COMING.partition("Missing are the functions of `core`: ")[2].partition(". Most have")[0]
    names = SPAN.findall(text)
    assert len(names) > 10
    modules = [importlib.import_module(f"asyncmq_nats.{path.stem}") for path in PACKAGE.glob("*.py")]
    assert [name for name in names if any(name in getattr(module, "__all__", ()) for module in modules)] == []


def test_every_row_of_the_imports_says_where_a_name_is_or_that_it_is_missing() -> None:
    assert len(rows("Imports")) > 10
    for _, here, verdict in rows("Imports"):
        assert verdict.partition(":")[0] in VERDICTS
        assert (here == "") == verdict.startswith("missing")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_path_into_the_package_leads_somewhere(document: Path) -> None:
    for path in re.findall(r"`(asyncmq_nats(?:\.\w+)+)`", document.read_text()):
        parent, _, name = path.rpartition(".")
        try:
            assert hasattr(importlib.import_module(parent), name) or importlib.util.find_spec(path), path
        except ModuleNotFoundError:
            pytest.fail(path)


def test_settings_that_replace_those_of_asyncmq_exist() -> None:
    named = {name for document in DOCUMENTS for name in re.findall(r"ASYNCMQ_NATS_([A-Z]\w+)", document.read_text())}
    assert {name.lower() for name in named} - set(Settings.model_fields) == set()


# -- the tables of the protocol


PROTOCOL = (ROOT / "docs" / "protocol.md").read_text()


def test_every_field_of_a_job_is_in_the_protocol() -> None:
    written = json.loads(Job("any").encode()).keys() | set(OPTIONAL_FIELDS) | {"on_parent_failure", "reruns"}
    table = PROTOCOL.partition("## The job\n")[2].partition("### Ids")[0]
    assert [name for name in sorted(written) if f"`{name}`" not in table] == []


def test_every_event_is_in_the_protocol() -> None:
    names = set(re.findall(r"`(job:[\w-]+)`", Event.__doc__ or ""))
    assert len(names) > 8
    assert [name for name in sorted(names) if f"`{name}`" not in PROTOCOL] == []


def test_the_lead_of_timers_is_the_one_of_the_protocol() -> None:
    assert f"{LEAD} s early" in PROTOCOL
    assert f"less {LEAD} s" in PROTOCOL


# -- the examples


async def run_block(source: str, **environment: str) -> str:
    """Run a block as a program of its own; return what it printed."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("ASYNCMQ_NATS_")}
    with anyio.fail_after(20):
        done = await anyio.run_process([sys.executable, "-c", source], env=clean | environment, check=False)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode()


@pytest.mark.usefixtures("server")
async def test_the_example_of_the_readme() -> None:
    (source,) = runnable("README.md", "python")
    result, stats = (await run_block(source)).splitlines()
    assert result == "sent to ada@example.org"
    assert "'completed': 1" in stats


@asynccontextmanager
async def working(queue: Queue) -> AsyncIterator[None]:
    async with anyio.create_task_group() as group:
        await group.start(queue.run)
        yield
        group.cancel_scope.cancel()


async def test_the_examples_of_the_protocol(nats_backend: NATSBackend) -> None:
    publish, custom_id = runnable("docs/protocol.md", "python")
    queue = Queue(QUEUE, nats_backend, registry=registry)
    async with working(queue):
        assert await run_block(publish.replace("examples", QUEUE), ASYNCMQ_NATS_SERVERS=nats_backend.url) == "3\n"
        assert await run_block(custom_id, ASYNCMQ_NATS_SERVERS=nats_backend.url) == ""
        assert await queue.wait_for("invoice-7", timeout=5) == 2


async def test_a_job_with_an_id_of_its_own_is_stored_once(nats_backend: NATSBackend) -> None:
    custom_id = runnable("docs/protocol.md", "python")[1]
    await Queue(QUEUE, nats_backend).queue_stats()
    assert await run_block(custom_id, ASYNCMQ_NATS_SERVERS=nats_backend.url) == ""
    assert await run_block(custom_id, ASYNCMQ_NATS_SERVERS=nats_backend.url) == "it is there already\n"


# -- the permissions


def connect_as(server: EmbeddedServer, user: str, **options: Any) -> NATSBackend:
    settings = Settings(stalled_after=1.0, publish_timeout=2.0, connect_timeout=5.0, heartbeat_interval=0.5)
    return NATSBackend(server.url, settings=settings, user=user, password="secret", **options)


async def test_each_role_can_do_its_work_with_the_permissions_of_the_protocol(tmp_path: Path, server: EmbeddedServer) -> None:
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
            assert await Queue(QUEUE, producer).wait_for("plain", timeout=5) == 2
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
    for options in ({}, {"priority": 2}, {"delay": 0.1}, {"delay": 0.6}, {"job_id": "mine"}, {"deduplication": {"id": "one", "ttl": 60}}):
        assert await queue.wait_for(await add(**options), timeout=5) == 2
    assert len(await queue.add_bulk([{"task_id": "tasks.count_words", "args": ["a"]}] * 3)) == 3
    parent = await add(delay=0.6)
    assert await queue.wait_for(await add(depends_on=[parent]), timeout=5) == 2
    assert await queue.wait_for(await queue.add("tasks.follow"), timeout=5) is None
    failing = await queue.add("tasks.fail", retries=1, backoff=0.1, priority=2)
    with pytest.raises(JobFailed):
        await queue.wait_for(failing, timeout=5)
    with pytest.raises(JobFailed, match="did not complete"):
        await queue.wait_for(await add(depends_on=[failing], on_parent_failure="fail"), timeout=5)
    first, second = Job("tasks.count_words", ["a"]), Job("tasks.count_words", ["a b c"])
    await FlowProducer(queue.backend).add_flow(QUEUE, [replace(second, depends_on=[first.job_id]), first])
    assert await queue.wait_for(second.job_id, timeout=5) == 3


async def use_as_reader(queue: Queue) -> None:
    assert (await queue.queue_stats())["completed"] >= 4
    assert await queue.get_job_state("mine") == "completed"
    assert len(await queue.get_jobs("completed", end=1)) == 2
    assert [info.job_def["name"] for info in await queue.list_repeatables()] == ["clock"]
    assert len(await queue.list_workers()) == 1
    assert await list_queues(queue.backend) == [QUEUE]
    assert not await queue.is_paused()
    with anyio.fail_after(5):
        async for event in queue.events("job:started"):
            assert event.data["task"] == "tasks.count_words"
            break


async def use_as_admin(queue: Queue) -> None:
    assert await queue.remove_repeatable("clock")
    await queue.upsert_repeatable("tasks.count_words", every=3600, args=["tick"], name="hourly")
    await queue.pause_repeatable("hourly")
    await queue.resume_repeatable("hourly")
    assert await queue.retry_job((await queue.get_jobs("failed", end=0))[0]["id"])
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


async def test_a_role_cannot_do_more(tmp_path: Path, server: EmbeddedServer, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL)
    (config,) = runnable("docs/protocol.md", "conf")
    with EmbeddedServer(tmp_path / "guarded", config=config) as guarded:
        async with connect_as(guarded, "worker") as worker, connect_as(guarded, "plain", declare=False) as plain:
            await Queue(QUEUE, worker).queue_stats()
            await Queue(QUEUE, plain).add("tasks.count_words", ["a"])
            with pytest.raises(PermissionRefused):
                await Queue(QUEUE, plain).add("tasks.count_words", ["a"], delay=60)


# -- the wire format


async def add(stream: JetStreamContext, token: str, priority: int = 5, headers: dict[str, str] | None = None, **fields: Any) -> PubAck:
    """Add a job by one publish."""
    body = json.dumps({"task": "tasks.count_words", **fields}).encode()
    return await stream.publish(f"amq.{QUEUE}.ready.{priority}.{token}", body, headers=headers)


@pytest.fixture
async def stream(nats_backend: NATSBackend) -> AsyncIterator[JetStreamContext]:
    """nats-py, connected to the server of `nats_backend`, where the queue exists."""
    await Queue(QUEUE, nats_backend).queue_stats()
    client = await nats.connect(nats_backend.url)
    yield client.jetstream()
    await client.close()


async def outcome(queue: Queue, job_id: str) -> dict[str, Any]:
    """Return the job when it has ended."""
    with suppress(JobFailed):
        await queue.wait_for(job_id, timeout=5)
    job = await queue.get_job(job_id)
    assert job is not None
    return job


async def test_a_task_is_all_a_job_needs(nats_backend: NATSBackend, stream: JetStreamContext) -> None:
    queue = Queue(QUEUE, nats_backend, registry=registry)
    await stream.publish(f"amq.{QUEUE}.ready.5.bare", b'{"task": "tasks.fail"}')
    job = await queue.get_job("bare")
    assert job is not None
    assert (job["id"], job["args"], job["kwargs"], job["max_retries"], job["backoff"], job["priority"]) == ("bare", [], {}, 3, 1.5, 5)
    assert abs(job["created_at"] - time.time()) < 5


async def test_a_message_id_is_stored_once(stream: JetStreamContext) -> None:
    first = await add(stream, "one", headers={"Nats-Msg-Id": "one"})
    second = await add(stream, "one", headers={"Nats-Msg-Id": "one"})
    assert (second.seq, second.duplicate) == (first.seq, True)


async def test_an_id_that_is_ready_is_replaced_unless_told_otherwise(nats_backend: NATSBackend, stream: JetStreamContext) -> None:
    await add(stream, "twice", args=["a"])
    await add(stream, "twice", args=["b"])
    job = await Queue(QUEUE, nats_backend).get_job("twice")
    assert job is not None
    assert job["args"] == ["b"]
    filter = f"amq.{QUEUE}.ready.*.twice"
    expect_nothing = {"Nats-Expected-Last-Subject-Sequence": "0", "Nats-Expected-Last-Subject-Sequence-Subject": filter}
    with pytest.raises(APIError) as refused:
        await add(stream, "twice", headers=expect_nothing)
    assert refused.value.err_code == 10071


async def test_a_priority_without_a_tier_is_stored_and_runs_when_a_worker_finds_it(
    nats_backend: NATSBackend, stream: JetStreamContext
) -> None:
    queue = Queue(QUEUE, nats_backend, registry=registry)
    await add(stream, "early", priority=3, args=["a"])
    assert (await queue.queue_stats())["waiting"] == 0
    async with working(queue):
        assert await queue.wait_for("early", timeout=5) == 1
        await add(stream, "signalled", priority=4, args=["a b"])
        await nats_backend.publish(f"amq.{QUEUE}.control.tier", b"4")
        assert await queue.wait_for("signalled", timeout=5) == 2


async def test_the_subject_wins_over_the_body(nats_backend: NATSBackend, stream: JetStreamContext) -> None:
    queue = Queue(QUEUE, nats_backend, registry=registry)
    body = {"task": "tasks.fail", "max_retries": 0, "id": "other", "priority": 9, "status": "completed", "worker": "w"}
    await stream.publish(f"amq.{QUEUE}.ready.5.true", json.dumps(body).encode())
    async with working(queue):
        job = await outcome(queue, "true")
    record = await read(stream, "done.true.failed")
    assert (job["id"], record["id"], record["priority"], record["status"]) == ("true", "true", 5, "failed")
    assert record["worker"] != "w"


async def test_ids_are_percent_encoded(nats_backend: NATSBackend, stream: JetStreamContext) -> None:
    queue = Queue(QUEUE, nats_backend, registry=registry)
    await add(stream, "invoice%207%2Epdf", args=["a"])
    async with working(queue):
        assert await queue.wait_for("invoice 7.pdf", timeout=5) == 1


async def test_what_is_no_job_is_kept_as_failed(nats_backend: NATSBackend, stream: JetStreamContext) -> None:
    queue = Queue(QUEUE, nats_backend, registry=registry)
    await stream.publish(f"amq.{QUEUE}.ready.5.text", b"no json")
    await add(stream, "future", v=2)
    async with working(queue):
        await outcome(queue, "text")
        await outcome(queue, "future")
    text, future = await read(stream, "done.text.failed"), await read(stream, "done.future.failed")
    assert (text["task"], text["body"]) == ("?", "no json")
    assert "its version is 2" in future["last_error"]


async def test_outcomes_have_the_fields_of_the_table(nats_backend: NATSBackend, stream: JetStreamContext) -> None:
    queue = Queue(QUEUE, nats_backend, registry=registry)
    async with working(queue):
        await add(stream, "good", args=["a b"], mine={"kept": True})
        await add(stream, "bad", task="tasks.fail", max_retries=0)
        await add(stream, "late", ttl=1, created_at=time.time() - 10)
        for job_id in ("good", "bad", "late"):
            await outcome(queue, job_id)
    await add(stream, "unwanted")
    assert await queue.cancel_job("unwanted")
    keys = ("done.good.completed", "done.bad.failed", "done.late.expired", "done.unwanted.cancelled")
    good, bad, late, unwanted = [await read(stream, key) for key in keys]
    assert (good["status"], good["result"], good["mine"]) == ("completed", 2, {"kept": True})
    assert (bad["status"], bad["last_error"], bad["retries"]) == ("failed", "ValueError: no", 1)
    assert set(bad["errors"][0]) == {"attempt", "error", "traceback", "at"}
    assert {"error_traceback"} <= set(bad)
    assert late["status"] == "expired"
    assert "time to live" in late["last_error"]
    assert (unwanted["status"], unwanted["last_error"]) == ("cancelled", "cancelled")
    assert all({"active_since", "finished_at", "worker", "id", "created_at"} <= set(record) for record in (good, bad, late))


async def test_the_events_of_a_retried_job(nats_backend: NATSBackend, stream: JetStreamContext) -> None:
    queue = Queue(QUEUE, nats_backend, registry=registry)
    events: asyncio.Queue[Msg] = asyncio.Queue()
    client = await nats.connect(nats_backend.url)
    await client.subscribe(f"amq.{QUEUE}.event.*.again", cb=events.put)
    await client._flush_pending(force_flush=True)
    await client.flush()
    async with working(queue):
        await add(stream, "again", task="tasks.fail", max_retries=1, backoff=0.6)
        await outcome(queue, "again")
        with anyio.fail_after(5):
            heard = [await events.get() for _ in range(7)]
    await client.close()
    words = [event.subject.split(".")[3] for event in heard]
    assert words == ["waiting", "started", "delayed", "released", "waiting", "started", "failed"]
    assert heard[-1].headers is not None
    assert heard[-1].headers["Nats-Subject"] == f"$KV.amq_{QUEUE}_scheduler.done.again.failed"
    assert {"Nats-Stream", "Nats-Sequence", "Nats-Last-Sequence", "Nats-Time-Stamp"} <= set(heard[-1].headers)


async def test_a_ready_job_with_a_time_to_come_is_delayed(nats_backend: NATSBackend, stream: JetStreamContext) -> None:
    queue = Queue(QUEUE, nats_backend, registry=registry)
    async with working(queue):
        run_at = time.time() + 0.6
        await add(stream, "soon", args=["a"], delay_until=run_at)
        job = await outcome(queue, "soon")
    assert 0 <= job["active_since"] - run_at < 1


async def test_a_delayed_job_can_be_left_with_the_servers_timer(nats_backend: NATSBackend, stream: JetStreamContext) -> None:
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
    assert (await queue.queue_stats())["delayed"] == 1
    async with working(queue):
        job = await outcome(queue, "timed")
    assert 0 <= job["active_since"] - run_at < 1
