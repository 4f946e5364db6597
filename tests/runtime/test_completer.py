"""The ends of attempts: what is told of them, and what if the worker ends first. No server."""

import asyncio
from contextlib import suppress

import anyio
import pytest

from asyncmq_nats._concurrency import Spawner
from asyncmq_nats.backends.base import Settled, Write
from asyncmq_nats.backends.inmemory import InMemoryBackend
from asyncmq_nats.context import JobContext, current_job
from asyncmq_nats.events import event_emitter
from asyncmq_nats.exceptions import WriteRefused
from asyncmq_nats.jobs import JobHead
from asyncmq_nats.middleware import Ending, Middleware
from asyncmq_nats.queues import Queue
from asyncmq_nats.runtime.completer import Completer
from asyncmq_nats.runtime.registry import TaskRegistry
from asyncmq_nats.store.announcing import WorkerEvents
from asyncmq_nats.store.queue_store import QueueStore
from asyncmq_nats.transitions.claim import Attempt, Disposition
from asyncmq_nats.transitions.finish import Lifecycle
from tests.receiver import PATIENCE, holds
from tests.running import running

WRITE = Write("done.a.completed", b"{}")


class Message:
    """A delivery that notes what was done with it."""

    subject, body, consumer, pending = "amq.work.ready.5.a", b"", "tier_5", 0
    sequence, deliveries, first, time, stamp = 7, 1, True, 0.0, 0

    def __init__(self) -> None:
        self.ends: list[str] = []

    def ack(self) -> None:
        self.ends.append("ack")

    def nak(self, delay: float = 0.0) -> None:
        self.ends.append("nak")

    def abandon(self) -> None:
        self.ends.append("abandon")


class World:
    """A completer, and one attempt whose end the server has refused."""

    def __init__(self) -> None:
        store = QueueStore.of(InMemoryBackend(), "work")
        self.lifecycle = Lifecycle(store, "worker")
        self.spawner = Spawner()
        self.changes = 0
        events = WorkerEvents(store, "worker")
        self.completer = Completer(self.lifecycle, events, self.spawner, self._on_change)
        self.message = Message()
        self.attempt = Attempt(self.message, "a", JobHead(task_id="t", job_id="a", created_at=0.0))
        self.completer.begin(self.attempt)

    def _on_change(self) -> None:
        self.changes += 1

    def refuse(self) -> None:
        self.lifecycle.on_settled(self.attempt, WRITE, WriteRefused("amq_work", "done.a.completed"))


async def test_an_end_that_is_not_resolved_when_the_worker_ends_lets_its_lease_run_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world, begun = World(), anyio.Event()

    async def hang(attempt: Attempt, write: Write, result: Settled) -> Disposition:
        begun.set()
        await anyio.sleep_forever()
        return Disposition.ACK

    monkeypatch.setattr(world.lifecycle, "settled", hang)
    with anyio.fail_after(PATIENCE):
        async with anyio.create_task_group() as group:
            group.start_soon(world.spawner.serve, group)
            world.refuse()
            await begun.wait()
            group.cancel_scope.cancel()
    assert world.message.ends == ["abandon"]
    assert (world.completer.pending, world.changes) == (0, 1)


async def test_an_end_that_is_refused_after_the_worker_has_ended_is_left_to_its_lease() -> None:
    world = World()
    world.completer.stop()
    world.refuse()
    assert world.message.ends == ["abandon"]


class Ends(Middleware):
    """Keeps the states in which attempts ended."""

    def __init__(self) -> None:
        self.states: list[str] = []

    async def end(self, context: JobContext, ending: Ending) -> None:
        self.states.append(ending.state)


async def test_an_end_that_is_discarded_is_not_told(caplog: pytest.LogCaptureFixture) -> None:
    registry, ends, told, begun = TaskRegistry(), Ends(), list[object](), anyio.Event()

    async def go_on(waits: bool) -> str:
        begun.set()
        if waits:
            with suppress(asyncio.CancelledError):
                await anyio.sleep_forever()
        return current_job().id

    registry.register(go_on, queue="work", name="go_on")
    queue = Queue("work", InMemoryBackend(), registry=registry, middleware=[ends])
    event_emitter.on("job:completed", told.append)
    try:
        async with running(queue):
            job_id = await queue.add("go_on", [True])
            with anyio.fail_after(PATIENCE):
                await begun.wait()
            assert await queue.cancel_job(job_id)
            await holds(lambda: "already has a different outcome" in caplog.text)
            later = await queue.add("go_on", [False])
            assert await queue.wait_for(later, PATIENCE) == later
    finally:
        event_emitter.off("job:completed", told.append)
    assert ends.states == ["completed"]
    assert [each["id"] for each in told] == [later]  # type: ignore[index]
