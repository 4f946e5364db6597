"""Requests to running workers: pause, resume, cancel, stop; and the list of workers.

Other programs may write these records and signals: a malformed one is only a warning.
"""

import math
import os
import socket
import sys
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import anyio

from asyncmq_nats._logging import Throttle, get_logger
from asyncmq_nats._version import __version__
from asyncmq_nats.backends.base import Backend, Log, Record, Signal, Subscription, Write
from asyncmq_nats.exceptions import (
    AssetMissing,
    BackendError,
    ConnectionFailed,
    ConnectionLost,
    InvalidJob,
    PayloadTooLarge,
    PermissionRefused,
)
from asyncmq_nats.store.queue_store import QueueStore
from asyncmq_nats.store.records import without_markers
from asyncmq_nats.store.topology import DEFAULT_PRIORITY, LATEST_PAUSE
from asyncmq_nats.wire.codec import dump_json, load_json
from asyncmq_nats.wire.keys import encode_token, tier_name, workers_bucket

__all__ = [
    "CANCEL",
    "PAUSE",
    "RESUME",
    "STOP",
    "Controls",
    "WorkerInfo",
    "WorkerRegistry",
    "list_workers",
    "measure_memory",
    "new_worker_id",
    "parse_pause",
    "stop_worker",
]

logger = get_logger(__name__)

PAUSE: Final = "pause"
RESUME: Final = "resume"
CANCEL: Final = "cancel"
STOP: Final = "stop"
PAUSE_ANSWER_TIMEOUT: Final = 2.0
"""Seconds to wait until the workers confirm that they start nothing more."""
MAX_SHOWN_JOBS: Final = 100
"""Ids of running jobs in the entry of a worker."""
STOP_ANSWER_TIMEOUT: Final = 1.0
STOP_TRIES: Final = 3

_malformed = Throttle()


class Controls:
    """Pause and resume of one queue, and signals to its workers."""

    def __init__(self, store: QueueStore) -> None:
        self._store = store
        self._backend = store.backend
        self._keys = store.keys

    async def pause(self, until: float | None = None) -> None:
        """Stop the queue.

        The server delivers nothing more, and when this returns the workers start nothing more of
        what they hold.
        """
        end = LATEST_PAUSE if until is None else min(until, LATEST_PAUSE)
        await self._store.assets.write_pause(end)
        # The default tier first: a tier that is made meanwhile finds it paused, or else is among
        # those that are listed after it.
        await self._backend.pause(self._keys.ready_log, tier_name(DEFAULT_PRIORITY), end)
        for priority in await self._store.assets.list_tiers():
            if priority != DEFAULT_PRIORITY:
                await self._backend.pause(self._keys.ready_log, tier_name(priority), end)
        await self._tell_all(PAUSE, str(end).encode())

    async def resume(self) -> None:
        """Let the queue go on at once."""
        await self._store.assets.write_pause(None)
        for priority in await self._store.assets.list_tiers():
            await self._backend.resume(self._keys.ready_log, tier_name(priority))
        await self._backend.publish(self._keys.control(RESUME))

    async def signal_cancel(self, job_id: str) -> None:
        """Tell the workers that a job was cancelled."""
        await self._backend.publish(self._keys.control(CANCEL), job_id.encode())

    async def _tell_all(self, what: str, body: bytes) -> None:
        """Signal the queue's workers and wait, for a time, until each one has answered."""
        workers = {worker.id for worker in await list_workers(self._backend, self._keys.queue)}
        missing = await _tell(self._store, what, body, workers, PAUSE_ANSWER_TIMEOUT)
        if missing:
            logger.warning(
                "queue %s: no answer to %s from %s",
                self._keys.queue,
                what,
                ", ".join(sorted(missing)),
            )


async def _tell(
    store: QueueStore,
    what: str,
    body: bytes,
    workers: set[str],
    timeout: float,
) -> set[str]:
    """Signal the queue's workers; return those of `workers` that have not answered in time."""
    missing = set(workers)
    answered = anyio.Event()
    inbox = store.keys.control(f"answer.{encode_token(os.urandom(6).hex())}")

    def on_answer(signal: Signal) -> None:
        missing.discard(signal.body.decode(errors="replace"))
        if not missing:
            answered.set()

    subscription = await store.backend.subscribe(inbox, on_answer)
    try:
        await store.backend.publish(store.keys.control(what), body + b" " + inbox.encode())
        if missing:
            with anyio.move_on_after(timeout):
                await answered.wait()
        return missing
    finally:
        with anyio.CancelScope(shield=True):
            await subscription.unsubscribe()


async def stop_worker(backend: Backend, worker: str) -> bool:
    """Have a worker stop in order, as by SIGTERM; a supervisor does not start it again.

    Return whether it has answered that it stops: what runs may still take `shutdown_timeout`.
    A worker of several queues stops as a whole. `False`: there is no such worker, or it does not
    answer.
    """
    for _ in range(STOP_TRIES):  # a signal is lost while its worker reconnects
        entries = [entry for entry in await list_workers(backend) if entry.id == worker]
        if not entries:
            return False
        if entries[0].stopping:
            return True
        store = QueueStore.of(backend, entries[0].queue)
        body = encode_token(worker).encode()
        if not await _tell(store, STOP, body, {worker}, STOP_ANSWER_TIMEOUT):
            return True
    return False


def parse_pause(text: str, answers: str) -> tuple[float, str] | None:
    """Return until when to pause (Unix seconds), and the subject for the answer or `""`.

    `None`: it is no signal of ours. `answers`: what the subjects of answers begin with; no other
    one is written to.
    """
    until, _, inbox = text.partition(" ")
    try:
        end = float(until)
    except ValueError:
        return None
    return None if math.isnan(end) else (min(end, LATEST_PAUSE), _checked_inbox(inbox, answers))


def _checked_inbox(inbox: str, answers: str) -> str:
    token = inbox.removeprefix(answers)
    sound = token != inbox and token.isalnum() and token.isascii()
    return inbox if sound else ""


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """A running worker.

    Times are Unix seconds by the server's clock; `running` are job ids (AsyncMQ `WorkerInfo`, and
    more).
    """

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
    version: str | None = None
    """Its version of this library; `None` if its release does not tell."""
    busy: int = 0
    """How many jobs run: `running` names a hundred at most."""
    memory: int | None = None
    """Bytes of memory of its process; `None` if that is not known."""
    stopping: bool = False
    """Whether it was told to stop and finishes what runs."""
    rate_limit: tuple[int, float] | None = None
    """How many jobs the whole queue may start in how many seconds; `None`: no limit, or untold."""
    starts: tuple[float, ...] = ()
    """When each of `running` started; empty if its release does not tell."""

    def start_of(self, job_id: str) -> float | None:
        """Return when a job that it runs started; `None` if it does not run it, or is not told."""
        return dict(zip(self.running, self.starts, strict=False)).get(job_id)


async def list_workers(backend: Backend, queue: str | None = None) -> list[WorkerInfo]:
    """Return the running workers, of one queue or of all.

    One that was killed is listed until three heartbeats are missing.
    """
    log, key = workers_bucket(backend.settings.prefix)
    try:
        records = await backend.last(log, f"{key}*")
    except AssetMissing:
        return []
    workers = [_worker_of(record) for record in without_markers(records)]
    return [worker for worker in workers if worker is not None and queue in (None, worker.queue)]


def _worker_of(record: Record) -> WorkerInfo | None:
    """Return the worker of an entry; `None`, and a warning, if the entry is malformed."""
    try:
        data = load_json(record.body)
        texts = [data[name] for name in ("id", "queue", "host")]
        numbers = [data[name] for name in ("concurrency", "pid", "since")]
        running = data["running"]
        if not (
            all(isinstance(text, str) for text in (*texts, *running))
            and isinstance(running, list)
            and all(isinstance(n, int | float) and math.isfinite(n) for n in numbers)
        ):
            raise InvalidJob("a value is of the wrong kind")
    except (InvalidJob, KeyError, TypeError, OverflowError) as problem:
        if times := _malformed.note():
            text = "%d malformed entries in the list of workers, the last at %s: %s"
            logger.warning(text, times, record.subject, problem)
        return None
    return WorkerInfo(
        data["id"],
        data["queue"],
        int(data["concurrency"]),
        record.time,
        data["host"],
        int(data["pid"]),
        float(data["since"]),
        tuple(running),
        tuple(data["repeatables"]) if isinstance(data.get("repeatables"), list) else None,
        data["version"] if isinstance(data.get("version"), str) else None,
        data["busy"] if isinstance(data.get("busy"), int) else len(running),
        data["memory"] if isinstance(data.get("memory"), int) else None,
        data.get("stopping") is True,
        _rate_limit_of(data.get("rate_limit")),
        _starts_of(data.get("starts"), running),
    )


def _starts_of(given: Any, running: Sequence[str]) -> tuple[float, ...]:
    match given:
        case [*times] if len(times) == len(running) and all(_is_time(time) for time in times):
            return tuple(map(float, times))
    return ()


def _is_time(given: Any) -> bool:
    return isinstance(given, int | float) and not isinstance(given, bool) and math.isfinite(given)


def _rate_limit_of(given: Any) -> tuple[int, float] | None:
    match given:
        case [int(starts), int() | float() as interval] if starts >= 0 and 0 < interval < math.inf:
            return starts, float(interval)
    return None


def measure_memory() -> int | None:
    """Return the bytes of memory that this process has now; `None` where that cannot be read.

    Without `/proc` it is the peak.
    """
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        if sys.platform == "win32":
            return None
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
    return pages * os.sysconf("SC_PAGE_SIZE")


def new_worker_id() -> str:
    """Return a name for a worker: host, process, and something random."""
    return f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:6]}"


class WorkerRegistry:
    """The entry of one worker, and its listener to `Controls`."""

    def __init__(
        self,
        store: QueueStore,
        worker: str,
        concurrency: int,
        running: Callable[[], Mapping[str, float]],
        repeatables: Sequence[str] = (),
        *,
        rate_limit: tuple[int, float] | None = None,
        is_stopping: Callable[[], bool] = lambda: False,
        has_siblings: bool = False,
    ) -> None:
        """Make its entry, and do no I/O.

        `running`: returns the jobs that run, and when each started. `has_siblings`: the worker
        serves other queues too, and has an entry for each.
        """
        self._backend = store.backend
        self._keys = store.keys
        self._worker = worker
        self._is_stopping = is_stopping
        self._concurrency = concurrency
        self._rate_limit = rate_limit
        self._running = running
        self._repeatables = list(repeatables)
        self._log, key = workers_bucket(store.backend.settings.prefix)
        self._key = key + encode_token(f"{worker}/{store.keys.queue}" if has_siblings else worker)
        self._subscriptions: list[Subscription] = []
        self._since = 0.0
        self._writing = anyio.Lock()
        self._left = False

    @property
    def since(self) -> float:
        """When the entry was made, in Unix seconds by the server's clock."""
        return self._since

    async def enter(self) -> None:
        """Make the entry. Without it the worker runs as well, and only is not listed.

        Raises:
            ConnectionLost, ConnectionFailed: there is no server.
        """
        self._since = self._backend.now()
        try:
            await self._declare()
            await self.beat()
        except (ConnectionLost, ConnectionFailed, PermissionRefused):
            raise
        except (BackendError, PayloadTooLarge) as error:
            logger.warning("worker %s is not in the list of workers yet: %s", self._worker, error)

    async def _declare(self) -> None:
        _, key = workers_bucket(self._backend.settings.prefix)
        limit = self._backend.settings.workers_max_bytes
        log = Log(self._log, (f"{key}>",), timers=True, max_bytes=limit)
        await self._backend.declare_log(log)

    async def beat(self) -> None:
        """Renew the entry, unless it was removed."""
        entry = {
            "id": self._worker,
            "queue": self._keys.queue,
            "concurrency": self._concurrency,
            "rate_limit": self._rate_limit,
            "host": socket.gethostname(),
            "version": __version__,
            "memory": measure_memory(),
            "stopping": self._is_stopping(),
        }
        entry |= {"pid": os.getpid(), "since": self._since}
        entry["repeatables"] = self._repeatables
        async with self._writing:
            if self._left:
                return
            try:
                await self._write(entry)
            except AssetMissing:  # the server came back without its store
                await self._declare()
                await self._write(entry)

    async def _write(self, entry: dict[str, Any]) -> None:
        running = self._running()
        entry["busy"] = len(running)
        shown, starts = list(running)[:MAX_SHOWN_JOBS], list(running.values())[:MAX_SHOWN_JOBS]
        body = dump_json(entry | {"running": shown, "starts": starts})
        while shown and len(body) > self._backend.max_body:
            shown, starts = shown[: len(shown) // 2], starts[: len(shown) // 2]
            body = dump_json(entry | {"running": shown, "starts": starts})
        ttl = 3 * self._backend.settings.heartbeat_interval
        await self._backend.write(self._log, Write(self._key, body, ttl=ttl))

    async def leave(self) -> None:
        """Remove the entry for good."""
        for subscription in self._subscriptions:
            await subscription.unsubscribe()
        self._left = True
        async with self._writing:  # a beat on its way would come after the removal
            for record in await self._backend.last(self._log, self._key):
                await self._backend.delete(self._log, record.sequence)

    async def listen(self, what: str, heard: Callable[[str], None]) -> None:
        """Call `heard` with the text of each signal of that kind."""

        def on_signal(signal: Signal) -> None:
            heard(signal.body.decode(errors="replace"))

        self._subscriptions.append(
            await self._backend.subscribe(self._keys.control(what), on_signal)
        )

    async def listen_for_pause(self, pause: Callable[[float], None]) -> None:
        """Call `pause` with the time (Unix seconds) of each signal to pause, then answer it."""

        def on_pause(text: str) -> None:
            parsed = parse_pause(text, self._keys.control("answer."))
            if parsed is None:
                if times := _malformed.note():
                    logger.warning("%d malformed signals to pause, the last: %.200r", times, text)
                return
            until, inbox = parsed
            pause(until)
            if inbox:
                self._backend.signal(inbox, self._worker.encode())

        await self.listen(PAUSE, on_pause)

    async def listen_for_stop(self, stop: Callable[[], None]) -> None:
        """Call `stop` at the signal that names this worker, then answer it."""

        def on_stop(text: str) -> None:
            worker, _, inbox = text.partition(" ")
            if worker == encode_token(self._worker):
                stop()
                if inbox := _checked_inbox(inbox, self._keys.control("answer.")):
                    self._backend.signal(inbox, self._worker.encode())

        await self.listen(STOP, on_stop)
