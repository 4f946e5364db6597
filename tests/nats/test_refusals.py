"""Refusals of a server.

Each refusal is an error that says so and what to do, and comes at once.
"""

import asyncio
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import anyio
import pytest
from anyio.abc import SocketAttribute, SocketStream

from asyncmq_nats.backends.nats import embedded
from asyncmq_nats.backends.nats._client.client import DirectClient
from asyncmq_nats.backends.nats.backend import NATSBackend
from asyncmq_nats.backends.nats.embedded.server import EmbeddedServer
from asyncmq_nats.exceptions import (
    AssetMissing,
    BackendError,
    ConnectionFailed,
    PermissionRefused,
    ServerUnsuitable,
)
from asyncmq_nats.queues import Queue
from asyncmq_nats.settings import Settings
from tests.nats.processes import MakeServer, holds
from tests.nats.streams import Streams, plain_client
from tests.running import has

SOON = 15.0
"""Half of what an unconfirmed write is repeated for: a refusal is told before."""
USERS = """
authorization {
  users: [
    { user: "owner", password: "secret" }
    { user: "producer", password: "secret",
      permissions: { publish: "amq.fleet.ready.>", subscribe: "_INBOX.>" } }
    { user: "reader", password: "secret", permissions: { publish: { deny: ["amq.>", "$KV.>"] } } }
    { user: "deaf", password: "secret", permissions: { subscribe: "others.>" } }
    { user: "guest", password: "secret",
      permissions: { publish: { deny: ">" }, subscribe: "_INBOX.>" } }
  ]
}
"""
NO_JETSTREAM_FOR_ACCOUNT = 'accounts { plain { users: [ { user: "owner", password: "secret" } ] } }'


@pytest.fixture
async def guarded(make_server: MakeServer) -> EmbeddedServer:
    """A server with users, on which the owner has declared the queue."""
    server = make_server(USERS)
    async with login(server, "owner") as backend:
        await Queue("fleet", backend)._assets.declare_all()
    return server


def login(server: EmbeddedServer, user: str, *, declare: bool = True) -> NATSBackend:
    return NATSBackend(server.url, settings=Settings(user=user, password="secret"), declare=declare)


@asynccontextmanager
async def ageing(server: EmbeddedServer, version: str) -> AsyncIterator[str]:
    """The address of a relay to the server, which introduces it as of another version."""

    async def relay(client: SocketStream) -> None:
        async with (
            client,
            await anyio.connect_tcp("127.0.0.1", server.port) as upstream,
            anyio.create_task_group() as group,
        ):
            greeting = await upstream.receive()
            await client.send(
                re.sub(rb'"version":"[^"]*"', b'"version":"%b"' % version.encode(), greeting)
            )
            group.start_soon(pump, client, upstream)
            await pump(upstream, client)
            group.cancel_scope.cancel()

    async def pump(source: SocketStream, target: SocketStream) -> None:
        with suppress(anyio.BrokenResourceError, anyio.ClosedResourceError):
            async for data in source:
                await target.send(data)

    listener = await anyio.create_tcp_listener(local_host="127.0.0.1")
    async with listener, anyio.create_task_group() as group:
        group.start_soon(listener.serve, relay)
        port = listener.extra(SocketAttribute.local_port)
        yield server.url.replace(f":{server.port}", f":{port}")
        group.cancel_scope.cancel()


# -- connecting


async def test_unreachable_server_is_an_error_with_its_address() -> None:
    backend = NATSBackend("nats://user:hidden@127.0.0.1:1", settings=Settings(connect_timeout=0.5))
    with (
        anyio.fail_after(SOON),
        pytest.raises(ConnectionFailed, match=r"127\.0\.0\.1:1.*ASYNCMQ_NATS_SERVERS") as caught,
    ):
        await Queue("fleet", backend).add("brief", [1])
    assert "hidden" not in str(caught.value)


async def test_an_attempt_to_connect_that_swallows_a_cancellation_ends_in_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As nats-py's may, when a server refuses a login again and again."""

    async def connect(*_: object, **__: object) -> None:
        for _attempt in range(3):
            with suppress(asyncio.CancelledError):
                await anyio.sleep_forever()

    monkeypatch.setattr(DirectClient, "connect", connect)
    backend = NATSBackend("nats://127.0.0.1:1", settings=Settings(connect_timeout=0.1))
    with anyio.fail_after(SOON), pytest.raises(ConnectionFailed):
        await backend.connect()


@pytest.mark.parametrize("version", ["2.9.25", "2.11.11", "2.12.1"])
async def test_a_server_that_is_too_old_is_an_error_that_names_both_versions(
    version: str, server: EmbeddedServer
) -> None:
    async with ageing(server, version) as url:
        with (
            anyio.fail_after(SOON),
            pytest.raises(
                ServerUnsuitable,
                match=rf"{re.escape(version)} at .* too old.*upgrade it to 2\.12\.2 or newer",
            ),
        ):
            await Queue("fleet", NATSBackend(url)).add("brief", [1])


async def test_the_oldest_server_that_will_do_is_taken(server: EmbeddedServer) -> None:
    async with ageing(server, "2.12.2") as url, NATSBackend(url) as backend:
        await has(Queue("fleet", backend), 0, "waiting")


@pytest.mark.parametrize(
    ("version", "replicas", "warned"),
    [("2.12.13", 3, True), ("2.12.13", 1, False), ("2.12.14", 3, False), ("2.14.3", 3, True)],
)
async def test_a_server_that_is_unsound_with_replicas_is_warned_of(
    version: str,
    replicas: int,
    warned: bool,
    server: EmbeddedServer,
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with (
        ageing(server, version) as url,
        NATSBackend(url, settings=Settings(replicas=replicas)),
    ):
        assert ("upgrade it to 2.12.14, 2.14.4 or newer" in caplog.text) == warned


@pytest.mark.parametrize("password", ["wrong", None])
async def test_wrong_password_is_an_error_that_says_so(
    password: str | None, guarded: EmbeddedServer
) -> None:
    backend = NATSBackend(
        guarded.url, settings=Settings(user="owner", password=password, connect_timeout=1.0)
    )
    with (
        anyio.fail_after(SOON),
        pytest.raises(ConnectionFailed, match=r"(?i)authorization violation"),
    ):
        await Queue("fleet", backend).add("brief", [1])


async def test_server_without_jetstream_is_an_error_that_says_what_to_do(
    server: EmbeddedServer, tmp_path: Path
) -> None:
    log = tmp_path / "plain.log"
    command = [embedded.server._find_program(), "-a", "127.0.0.1", "-p", "-1", "-l", str(log)]
    async with await anyio.open_process(command, stdout=None, stderr=None) as process:
        try:
            await holds(lambda: log.exists() and embedded.server.READY in log.read_bytes())
            port = embedded.server.LISTENING.search(log.read_bytes())
            assert port is not None
            async with NATSBackend(f"nats://127.0.0.1:{int(port[1])}") as backend:
                with (
                    anyio.fail_after(SOON),
                    pytest.raises(ServerUnsuitable, match=r"JetStream.*start nats-server with -js"),
                ):
                    await Queue("fleet", backend).add("brief", [1])
        finally:
            process.kill()


async def test_account_without_jetstream_is_an_error_that_says_what_to_do(
    make_server: MakeServer,
) -> None:
    async with login(make_server(NO_JETSTREAM_FOR_ACCOUNT), "owner") as backend:
        with (
            anyio.fail_after(SOON),
            pytest.raises(ServerUnsuitable, match="enable JetStream for this account"),
        ):
            await Queue("fleet", backend).add("brief", [1])


# -- permissions


async def test_producer_that_may_only_publish_ready_jobs_adds_with_declare_false(
    guarded: EmbeddedServer,
) -> None:
    async with (
        login(guarded, "producer", declare=False) as producer,
        login(guarded, "owner") as owner,
    ):
        with anyio.fail_after(SOON):
            job_id = await Queue("fleet", producer).add("brief", [1])
            assert await Queue("fleet", owner).get_job_state(job_id) == "waiting"


async def test_producer_that_may_not_declare_is_told_of_declare_false(
    guarded: EmbeddedServer,
) -> None:
    async with login(guarded, "producer") as backend:
        with (
            anyio.fail_after(SOON),
            pytest.raises(PermissionRefused, match=r"(?i)STREAM\.CREATE.*declare=False"),
        ):
            await Queue("fleet", backend).add("brief", [1])


async def test_producer_that_may_not_use_the_bucket_is_told_which_subject(
    guarded: EmbeddedServer,
) -> None:
    async with login(guarded, "producer", declare=False) as backend:
        with (
            anyio.fail_after(SOON),
            pytest.raises(PermissionRefused, match=r"amq_fleet_scheduler\.later"),
        ):
            await Queue("fleet", backend).add("brief", [1], delay=10)


@pytest.mark.parametrize("user", ["guest", "reader"])
async def test_user_that_may_not_publish_is_told_what_is_forbidden(
    user: str, guarded: EmbeddedServer
) -> None:
    async with login(guarded, user, declare=False) as backend:
        queue = Queue("fleet", backend)
        with (
            anyio.fail_after(SOON),
            pytest.raises(PermissionRefused, match=r"amq\.fleet\.ready.*grant it"),
        ):
            await queue.add("brief", [1])
        with (
            anyio.fail_after(SOON),
            pytest.raises(PermissionRefused, match=r"amq\.fleet\.ready.*grant it"),
        ):
            await queue.add_bulk([{"task_id": "brief"}, {"task_id": "brief"}])


async def test_user_that_may_not_receive_replies_is_told_so_when_it_connects(
    guarded: EmbeddedServer,
) -> None:
    with (
        anyio.fail_after(SOON),
        pytest.raises(PermissionRefused, match=r"receiving replies at _INBOX\..*grant it"),
    ):
        await login(guarded, "deaf").connect()


async def test_user_that_may_not_read_is_told_what_is_forbidden(guarded: EmbeddedServer) -> None:
    async with login(guarded, "producer", declare=False) as backend:
        with anyio.fail_after(SOON), pytest.raises(PermissionRefused, match=r"(?i)DIRECT\.GET"):
            await Queue("fleet", backend).get_job("some-id")


async def test_queue_that_was_never_declared_is_an_error_with_declare_false(
    server: EmbeddedServer,
) -> None:
    async with NATSBackend(server.url, declare=False) as backend:
        with (
            anyio.fail_after(SOON),
            pytest.raises(AssetMissing, match=r"amq_fleet.*start a worker"),
        ):
            await Queue("fleet", backend).add("brief", [1])


# -- one error, and never a group of them

REFUSED_CALLS: dict[str, Callable[[Queue], Awaitable[object]]] = {
    "queue_stats": lambda queue: queue.queue_stats(),
    "count": lambda queue: queue.count(),
    "get_job": lambda queue: queue.get_job("some"),
    "list_jobs": lambda queue: queue.list_jobs("waiting"),
    "list_delayed": lambda queue: queue.list_delayed(),
    "list_repeatables": lambda queue: queue.list_repeatables(),
    "add_bulk": lambda queue: queue.add_bulk([{"task_id": "brief", "job_id": "a"}] * 3),
    "add_many": lambda queue: queue.add_bulk([{"task_id": "brief"}] * 2500),
    "add_delayed": lambda queue: queue.add("brief", [1], delay=5),
    "pause": lambda queue: queue.pause(),
    "resume": lambda queue: queue.resume(),
    "cancel_job": lambda queue: queue.cancel_job("some"),
    "retry_job": lambda queue: queue.retry_job("some"),
    "remove_job": lambda queue: queue.remove_job("some"),
    "drain": lambda queue: queue.drain(),
    "clean": lambda queue: queue.clean("completed"),
    "obliterate": lambda queue: queue.obliterate(force=True),
    "list_workers": lambda queue: queue.list_workers(),
    "wait_for": lambda queue: queue.wait_for("some"),
    "run": lambda queue: queue.run(),
}


@pytest.mark.parametrize("name", REFUSED_CALLS)
async def test_what_is_refused_is_one_error(name: str, guarded: EmbeddedServer) -> None:
    async with login(guarded, "guest") as backend:
        with anyio.fail_after(3 * SOON), pytest.raises(PermissionRefused):
            await REFUSED_CALLS[name](Queue("fleet", backend))


# -- streams that are there already


@pytest.mark.parametrize("stream", ["amq_fleet", "KV_amq_fleet_scheduler"])
async def test_existing_stream_with_other_settings_is_used_as_it_is(
    stream: str, queue: Queue, server: EmbeddedServer, caplog: pytest.LogCaptureFixture
) -> None:
    async with plain_client(server.url) as client:
        streams = Streams(client)
        own = {
            "name": stream,
            "max_msgs_per_subject": 1,
            "allow_direct": True,
            "allow_atomic": True,
            "storage": "memory",
        }
        if stream == "amq_fleet":
            own |= {"subjects": ["amq.fleet.ready.*.*"], "retention": "workqueue"}
        else:
            own |= {
                "subjects": ["$KV.amq_fleet_scheduler.>"],
                "allow_rollup_hdrs": True,
                "allow_msg_ttl": True,
                "allow_msg_schedules": True,
            }
        before = (await streams.call(f"STREAM.CREATE.{stream}", own))["config"]
        job_id = await queue.add("brief", [1])
        after = (await streams.call(f"STREAM.INFO.{stream}"))["config"]
    assert after == before
    warnings = [record.getMessage() for record in caplog.records if stream in record.getMessage()]
    assert len(warnings) == 1
    assert "storage is 'memory', wanted 'file'" in warnings[0]
    assert await queue.get_job_state(job_id) == "waiting"


async def test_stream_of_that_name_with_other_subjects_is_an_error_that_says_so(
    queue: Queue, server: EmbeddedServer
) -> None:
    async with plain_client(server.url) as client:
        await Streams(client).call(
            "STREAM.CREATE.amq_fleet", {"name": "amq_fleet", "subjects": ["others.>"]}
        )
        started = time.monotonic()
        with pytest.raises(BackendError, match=r"amq_fleet.*other subjects"):
            await queue.add("brief", [1])
    assert time.monotonic() - started < SOON
