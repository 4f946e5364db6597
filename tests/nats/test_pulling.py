"""How credit is taken back from a real server, where something is on its way."""

import anyio
import pytest

from asyncmq_nats.backends.base import Consumer, Log, Write
from asyncmq_nats.backends.nats._client.client import DirectClient
from asyncmq_nats.backends.nats.backend import NATSBackend
from asyncmq_nats.backends.nats.embedded.server import EmbeddedServer
from asyncmq_nats.settings import Settings
from tests.nats.relay import relaying
from tests.receiver import PATIENCE, Receiver, until


async def test_what_comes_while_a_puller_withdraws_and_closes_is_delivered(
    nats_backend: NATSBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given back unclaimed, it would count as a job whose worker was lost."""
    await nats_backend.declare_log(Log("jobs", ("jobs.>",), work_queue=True))
    await nats_backend.declare_consumer("jobs", Consumer("one", ("jobs.*",), lease=60))
    receiver, begun, opened = Receiver(nats_backend, "jobs"), anyio.Event(), anyio.Event()
    real = DirectClient.stop_listening

    async def stop_listening(self: DirectClient, *numbers: int) -> None:
        if not begun.is_set():
            begun.set()
            await opened.wait()
        await real(self, *numbers)

    monkeypatch.setattr(DirectClient, "stop_listening", stop_listening)
    await receiver.puller.request("one", 5, wait=PATIENCE)
    with anyio.fail_after(PATIENCE):
        async with anyio.create_task_group() as group:
            group.start_soon(receiver.puller.withdraw)
            await begun.wait()
            group.start_soon(receiver.puller.close)
            for _ in range(10):
                await anyio.sleep(0.01)
            await nats_backend.write("jobs", Write("jobs.a", b"a"))
            (delivery,) = await receiver.take()
            opened.set()
    await nats_backend.write("jobs", Write("jobs.b", b"b"))
    (other,) = await Receiver(nats_backend, "jobs").pull("one")
    assert [(each.body, each.deliveries) for each in (delivery, other)] == [(b"a", 1), (b"b", 1)]
    assert len(receiver.deliveries) == 1


async def test_a_puller_closed_while_disconnected_delivers_nothing_afterwards(
    server: EmbeddedServer, nats_backend: NATSBackend, settings: Settings
) -> None:
    await nats_backend.declare_log(Log("jobs", ("jobs.>",), work_queue=True))
    await nats_backend.declare_consumer("jobs", Consumer("all", ("jobs.>",), lease=60))
    async with relaying(server) as relay, NATSBackend(relay.url, settings=settings) as distant:

        async def is_connected() -> bool:
            return distant._require_connection().client.is_connected

        away, near = Receiver(distant, "jobs"), Receiver(nats_backend, "jobs")
        await away.puller.request("all", 1, wait=60)
        await distant.list_logs("")  # the server has the pull
        await relay.cut()
        await until(is_connected, lambda connected: not connected)
        await away.puller.close()
        await until(is_connected, bool)
        await distant.list_logs("")
        await nats_backend.write("jobs", Write("jobs.a", b""))
        (delivery,) = await near.pull("all")
        assert delivery.subject == "jobs.a"
        assert away.deliveries == []


async def test_a_closed_puller_leaves_nothing_on_its_connection(nats_backend: NATSBackend) -> None:
    await nats_backend.declare_log(Log("jobs", ("jobs.>",), work_queue=True))
    connection = nats_backend._require_connection()

    def interests() -> tuple[int, int, int]:
        client = connection.client
        return len(client._subs), len(client._direct), len(connection.on_reconnect)

    before = interests()
    receiver = Receiver(nats_backend, "jobs")
    await receiver.puller.request("all", 1, wait=0)
    assert interests() != before
    await receiver.puller.close()
    assert interests() == before
