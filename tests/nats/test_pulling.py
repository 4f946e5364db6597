"""How credit is taken back from a real server, where something is on its way."""

import anyio
import pytest

from asyncmq_nats.backends.base import Consumer, Log, Write
from asyncmq_nats.backends.nats._client.client import DirectClient
from asyncmq_nats.backends.nats.backend import NATSBackend
from tests.receiver import PATIENCE, Receiver


async def test_what_comes_while_a_puller_withdraws_and_closes_is_delivered(
    nats_backend: NATSBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given back unclaimed, it would count as a job whose worker was lost."""
    await nats_backend.declare_log(Log("jobs", ("jobs.>",), work_queue=True))
    await nats_backend.declare_consumer("jobs", Consumer("one", ("jobs.*",), lease=60))
    receiver, begun, opened = Receiver(nats_backend, "jobs"), anyio.Event(), anyio.Event()
    real = DirectClient.stop_listening

    async def stop_listening(self: DirectClient, number: int) -> None:
        if not begun.is_set():
            begun.set()
            await opened.wait()
        await real(self, number)

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
