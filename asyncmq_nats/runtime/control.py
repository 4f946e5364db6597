"""What is asked of running workers: pause, resume, cancel; and which workers there are."""

import os
import socket
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import anyio

from asyncmq_nats._logging import get_logger
from asyncmq_nats.backends.base import Backend, Log, Signal, Subscription, Write
from asyncmq_nats.exceptions import AssetMissing
from asyncmq_nats.store.topology import DEFAULT_PRIORITY, QueueAssets
from asyncmq_nats.wire.codec import dump_json, load_json
from asyncmq_nats.wire.keys import QueueSubjects, encode_token, tier_name, workers_bucket

__all__ = [
    "CANCEL",
    "FOREVER",
    "PAUSE",
    "RESUME",
    "Controls",
    "WorkerInfo",
    "WorkerRegistry",
    "list_workers",
    "new_worker_id",
]

logger = get_logger(__name__)

PAUSE: Final = "pause"
RESUME: Final = "resume"
CANCEL: Final = "cancel"
FOREVER: Final = 32_503_680_000.0
"""The year 3000: a pause without an end."""
PAUSE_ANSWERS: Final = 2.0
"""How long to wait for the workers' word that they start nothing more."""


class Controls:
    """Pause and resume of one queue, and signals to its workers."""

    def __init__(self, backend: Backend, subjects: QueueSubjects, assets: QueueAssets) -> None:
        self._backend = backend
        self._subjects = subjects
        self._assets = assets

    async def pause(self, until: float | None = None) -> None:
        """Stop the queue: the server delivers nothing more, and when this returns the workers start nothing more of what they hold."""
        end = FOREVER if until is None else until
        await self._assets.write_pause(end)
        # The default tier first: a tier that is made meanwhile finds it paused, or else is among those that are listed after it.
        await self._backend.pause(self._subjects.ready_log, tier_name(DEFAULT_PRIORITY), end)
        for priority in await self._assets.list_tiers():
            if priority != DEFAULT_PRIORITY:
                await self._backend.pause(self._subjects.ready_log, tier_name(priority), end)
        await self._tell_all(PAUSE, str(end).encode())

    async def resume(self) -> None:
        """Let the queue go on at once."""
        await self._assets.write_pause(None)
        for priority in await self._assets.list_tiers():
            await self._backend.resume(self._subjects.ready_log, tier_name(priority))
        await self._backend.publish(self._subjects.control(RESUME))

    async def signal_cancel(self, job_id: str) -> None:
        """Tell the workers that a job was cancelled."""
        await self._backend.publish(self._subjects.control(CANCEL), job_id.encode())

    async def _tell_all(self, what: str, body: bytes) -> None:
        """Signal the queue's workers and wait until each of those that are registered has answered, or some time has passed."""
        missing = {worker.id for worker in await list_workers(self._backend, self._subjects.queue)}
        answered = anyio.Event()
        inbox = self._subjects.control(f"answer.{encode_token(os.urandom(6).hex())}")

        def on_answer(signal: Signal) -> None:
            missing.discard(signal.body.decode())
            if not missing:
                answered.set()

        subscription = await self._backend.subscribe(inbox, on_answer)
        try:
            await self._backend.publish(self._subjects.control(what), body + b" " + inbox.encode())
            if missing:
                with anyio.move_on_after(PAUSE_ANSWERS):
                    await answered.wait()
            if missing:
                logger.warning(
                    "queue %s: no answer to %s from %s",
                    self._subjects.queue,
                    what,
                    ", ".join(sorted(missing)),
                )
        finally:
            with anyio.CancelScope(shield=True):
                await subscription.unsubscribe()


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """A running worker. Times are Unix seconds by the server's clock; `running` are job ids (AsyncMQ `WorkerInfo`, and more)."""

    id: str
    queue: str
    concurrency: int
    heartbeat: float
    host: str
    pid: int
    since: float
    running: tuple[str, ...]
    repeatables: tuple[str, ...] | None = None
    """Ids of the repeatables that its code declares; `None` if its release does not tell."""


async def list_workers(backend: Backend, queue: str | None = None) -> list[WorkerInfo]:
    """Return the running workers, of one queue or of all. One that was killed is listed until three heartbeats are missing."""
    log, key = workers_bucket(backend.settings.prefix)
    try:
        records = await backend.last(log, f"{key}*")
    except AssetMissing:
        return []
    workers = [
        _worker_of(load_json(record.body), record.time) for record in records if not record.marker
    ]
    return [worker for worker in workers if queue is None or worker.queue == queue]


def _worker_of(data: dict[str, Any], heartbeat: float) -> WorkerInfo:
    return WorkerInfo(
        data["id"],
        data["queue"],
        data["concurrency"],
        heartbeat,
        data["host"],
        data["pid"],
        data["since"],
        tuple(data["running"]),
        tuple(data["repeatables"]) if isinstance(data.get("repeatables"), list) else None,
    )


def new_worker_id() -> str:
    """Return a name for a worker: host, process, and something random."""
    return f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:6]}"


class WorkerRegistry:
    """The entry of one worker, and what it hears from `Controls`."""

    def __init__(
        self,
        backend: Backend,
        subjects: QueueSubjects,
        worker: str,
        concurrency: int,
        running: Callable[[], list[str]],
        repeatables: Sequence[str] = (),
    ) -> None:
        self._backend = backend
        self._subjects = subjects
        self._worker = worker
        self._concurrency = concurrency
        self._running = running
        self._repeatables = list(repeatables)
        self._log, key = workers_bucket(backend.settings.prefix)
        self._key = key + encode_token(worker)
        self._subscriptions: list[Subscription] = []
        self._since = 0.0
        self._writing = anyio.Lock()
        self._left = False

    @property
    def since(self) -> float:
        """When the entry was made, in Unix seconds by the server's clock."""
        return self._since

    async def enter(self) -> None:
        """Make the entry."""
        _, key = workers_bucket(self._backend.settings.prefix)
        await self._backend.declare_log(Log(self._log, (f"{key}>",), timers=True))
        self._since = self._backend.now()
        await self.beat()

    async def beat(self) -> None:
        """Renew the entry, unless it was removed."""
        entry = {
            "id": self._worker,
            "queue": self._subjects.queue,
            "concurrency": self._concurrency,
            "host": socket.gethostname(),
        }
        entry |= {"pid": os.getpid(), "since": self._since, "running": self._running()[:100]}
        entry["repeatables"] = self._repeatables
        async with self._writing:
            if not self._left:
                await self._backend.write(
                    self._log,
                    Write(
                        self._key,
                        dump_json(entry),
                        ttl=3 * self._backend.settings.heartbeat_interval,
                    ),
                )

    async def leave(self) -> None:
        """Remove the entry for good."""
        for subscription in self._subscriptions:
            await subscription.unsubscribe()
        self._left = True
        async with self._writing:  # what is on its way would be there after the removal
            for record in await self._backend.last(self._log, self._key):
                await self._backend.delete(self._log, record.sequence)

    async def listen(self, what: str, heard: Callable[[str], None]) -> None:
        """Call `heard` with the text of each signal of that kind."""

        def on_signal(signal: Signal) -> None:
            heard(signal.body.decode())

        self._subscriptions.append(
            await self._backend.subscribe(self._subjects.control(what), on_signal)
        )

    async def answer(self, inbox: str) -> None:
        """Answer a signal."""
        if inbox:
            await self._backend.publish(inbox, self._worker.encode())
