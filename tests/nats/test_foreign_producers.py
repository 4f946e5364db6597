"""Jobs from producers without this library.

One publish of the wire format is enough, and what is not a job ends and does not loop.
"""

import json
import time
from collections.abc import AsyncIterator

import anyio
import pytest
from nats.aio.client import Client

from asyncmq_nats.backends.nats.backend import NATSBackend
from asyncmq_nats.backends.nats.embedded.server import EmbeddedServer
from asyncmq_nats.queues import Queue
from asyncmq_nats.runtime.registry import TaskRegistry
from tests.nats.processes import PATIENCE, eventually
from tests.nats.streams import Streams, plain_client
from tests.running import counted, has

runs: list[str] = []
registry = TaskRegistry()


async def echo(word: str = "nothing") -> str:
    runs.append(word)
    return word


registry.register(echo, queue="fleet", name="echo")


@pytest.fixture
async def foreign(server: EmbeddedServer) -> AsyncIterator[Client]:
    """A plain NATS connection, of a producer in any language."""
    async with plain_client(server.url) as client:
        yield client


@pytest.fixture
async def running(queue: Queue, nats_backend: NATSBackend) -> AsyncIterator[Queue]:
    """The queue with a worker."""
    runs.clear()
    with anyio.fail_after(2 * PATIENCE):
        async with anyio.create_task_group() as group:
            queue = Queue("fleet", nats_backend, registry=registry)
            await group.start(queue.run)
            yield queue
            group.cancel_scope.cancel()


async def publish(client: Client, job_id: str, body: bytes, priority: int = 5) -> int:
    ack = await client.jetstream().publish(f"amq.fleet.ready.{priority}.{job_id}", body)
    return ack.seq


async def ended(queue: Queue, job_id: str) -> dict[str, object]:
    """Wait until the job has ended and nothing of it is left to run; return it."""
    await eventually(
        lambda: queue.get_job_state(job_id), lambda state: state in ("completed", "failed")
    )
    job = await queue.get_job(job_id)
    assert job is not None
    return job


async def nothing_is_ready(client: Client) -> None:
    await eventually(Streams(client).count_ready, lambda count: count == 0)


async def test_least_possible_job_runs(running: Queue, foreign: Client) -> None:
    before = time.time()
    await publish(foreign, "order-1", b'{"task": "echo"}')
    assert await running.wait_for("order-1") == "nothing"
    job = await ended(running, "order-1")
    assert (job["id"], job["task"], job["args"], job["status"]) == (
        "order-1",
        "echo",
        [],
        "completed",
    )
    assert before - 1 < float(str(job["created_at"])) < time.time() + 1
    assert runs == ["nothing"]


async def test_arguments_and_unknown_fields_are_welcome(running: Queue, foreign: Client) -> None:
    await publish(
        foreign,
        "order-1",
        json.dumps(
            {"task": "echo", "kwargs": {"word": "hello"}, "traceparent": "00-1-2-3"}
        ).encode(),
    )
    assert await running.wait_for("order-1") == "hello"


async def test_id_of_the_subject_wins(running: Queue, foreign: Client) -> None:
    await publish(foreign, "order-1", b'{"task": "echo", "id": "another"}')
    assert await running.wait_for("order-1") == "nothing"
    assert await running.get_job("another") is None


async def test_job_published_before_any_worker_ran_waits(
    queue: Queue, foreign: Client, nats_backend: NATSBackend
) -> None:
    runs.clear()
    await queue._assets.declare_all()
    await publish(foreign, "order-1", b'{"task": "echo"}')
    await has(queue, 1, "waiting")
    assert await queue.get_job_state("order-1") == "waiting"
    with anyio.fail_after(2 * PATIENCE):
        async with anyio.create_task_group() as group:
            await group.start(Queue("fleet", nats_backend, registry=registry).run)
            assert await queue.wait_for("order-1") == "nothing"
            group.cancel_scope.cancel()


async def test_job_whose_time_is_to_come_waits_for_it(running: Queue, foreign: Client) -> None:
    due = time.time() + 1.5
    await publish(foreign, "order-1", json.dumps({"task": "echo", "delay_until": due}).encode())
    state = await eventually(
        lambda: running.get_job_state("order-1"), lambda state: state in ("delayed", "completed")
    )
    assert state == "delayed" or time.time() >= due
    assert await running.wait_for("order-1") == "nothing"
    job = await ended(running, "order-1")
    started = float(str(job["active_since"]))
    assert due <= started < due + PATIENCE
    print(f"started {(started - due) * 1000:.1f} ms after its time")
    assert runs == ["nothing"]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"garbage",
        b"\xff\xfe\x00",
        b"null",
        b"[1, 2]",
        b"{}",
        b'{"task": 3}',
        b'{"task": "echo"',
        b'{"task": "echo", "args": 5}',
        b'{"task": "echo", "v": 99}',
        b'{"task": "echo", "priority": "high"}',
        b'{"task": "echo", "ttl": NaN}',
        b'{"task": "echo", "delay_until": "soon"}',
        b'{"task":"echo","retries":-1}',
    ],
)
async def test_what_is_not_a_job_ends_as_failed_and_does_not_loop(
    body: bytes, running: Queue, foreign: Client
) -> None:
    await publish(foreign, "order-1", body)
    job = await ended(running, "order-1")
    assert job["status"] == "failed"
    assert "not a job of the wire format" in str(job["last_error"])
    await nothing_is_ready(foreign)
    assert runs == []
    await publish(foreign, "order-2", b'{"task": "echo"}')
    assert await running.wait_for("order-2") == "nothing"


@pytest.mark.parametrize(
    "body",
    [b"garbage", b"[1, 2]", b'{"task": "echo", "v": 99}', b'{"task": "echo", "priority": "high"}'],
)
async def test_what_is_released_and_not_a_job_ends_as_failed(
    body: bytes, running: Queue, foreign: Client
) -> None:
    await foreign.jetstream().publish("$KV.amq_fleet_scheduler.later.order-1.released", body)
    job = await ended(running, "order-1")
    assert job["status"] == "failed"
    assert "not a job of the wire format" in str(job["last_error"])
    await eventually(lambda: Streams(foreign).keys("later"), lambda keys: keys == [])
    await nothing_is_ready(foreign)


@pytest.mark.parametrize(
    "body",
    [
        b'{"task": "unknown"}',
        b'{"task": "echo", "args": [1, 2, 3]}',
        b'{"task": "echo", "args": [{}]}',
    ],
)
async def test_job_that_cannot_be_run_here_ends_as_failed(
    body: bytes, running: Queue, foreign: Client
) -> None:
    data = json.loads(body) | {"max_retries": 0}
    await publish(foreign, "order-1", json.dumps(data).encode())
    job = await ended(running, "order-1")
    assert job["status"] == "failed"
    await nothing_is_ready(foreign)
    assert runs == []


@pytest.mark.parametrize("token", ["%zz", "%FF", "$KV", "é", "x" * 500])
async def test_strange_id_does_not_stop_the_worker(
    token: str, running: Queue, foreign: Client
) -> None:
    await publish(foreign, token, b'{"task": "echo"}')
    await publish(foreign, "order-2", b'{"task": "echo"}')
    assert await running.wait_for("order-2") == "nothing"
    await nothing_is_ready(foreign)
    await counted(running)
    assert [job["status"] for job in await running.get_jobs()] == ["completed", "completed"]


@pytest.mark.parametrize(
    "token",
    [b"x" * 1025, b"x" * 4000, b"a\xff\xfe", b"\xc3" * 600],
    ids=["long", "longest", "bytes", "long bytes"],
)
@pytest.mark.parametrize("place", ["ready", "later"])
async def test_an_id_that_cannot_be_one_ends_as_failed(
    token: bytes, place: str, running: Queue, foreign: Client
) -> None:
    before, after = (
        (b"amq.fleet.ready.5.", b"")
        if place == "ready"
        else (b"$KV.amq_fleet_scheduler.later.", b".released")
    )
    subject = before + token[: 4060 - len(before + after)] + after
    # As another client would write it: ours takes text only.
    message = b"PUB %b 16\r\n" % subject + b'{"task": "echo"}\r\n'
    foreign._transport.write(message)  # type: ignore[union-attr]
    await foreign.flush()
    await publish(foreign, "order-2", b'{"task": "echo"}')
    assert await running.wait_for("order-2") == "nothing"
    await eventually(lambda: running.get_failed(), lambda jobs: len(jobs) == 1)
    await nothing_is_ready(foreign)
    (job,) = await running.get_failed()
    assert "at most 1,024 bytes" in job["last_error"]
    assert await running.get_job(job["id"]) == job
    assert (
        await running.get_job(
            subject.split(b".")[-1 if place == "ready" else -2].decode("utf-8", "surrogateescape")
        )
        == job
    )
