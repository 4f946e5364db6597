"""Shared parts: CPU time of processes, counted writes, worker processes, a raw loop.

Public modules of asyncmq-nats only, so that a benchmark also runs against another release:
`PYTHONPATH=<its checkout>`.
"""

import asyncio
import importlib.util
import itertools
import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Final

import anyio
import nats
from nats.aio.client import Client
from nats.aio.msg import Msg

from asyncmq_nats import NATSBackend, Queue
from asyncmq_nats.settings import Settings
from asyncmq_nats.tasks import TaskRegistry
from asyncmq_nats.workers import Worker

START_TIMEOUT: Final = 60.0
"""How long a worker process may take to start, in seconds: beside other load a second is normal."""
TICKS_PER_SECOND: Final = os.sysconf("SC_CLK_TCK")

# The benchmarks put one task on many queues; a worker runs only the tasks of its own otherwise.
os.environ.setdefault("ASYNCMQ_NATS_ANY_TASK", "true")


def quantile(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


# -- CPU time


def cpu_seconds(pid: int) -> float:
    """Return the CPU time the process has used so far, of all its threads; 0 when it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return (int(fields[11]) + int(fields[12])) / TICKS_PER_SECOND


def server_pid() -> int:
    """Return the process id of the nats-server that this process has started."""
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            name, _, rest = (entry / "stat").read_text().partition("(")[2].rpartition(") ")
        except (FileNotFoundError, ProcessLookupError):
            continue
        if name == "nats-server" and int(rest.split()[1]) == os.getpid():
            return int(entry.name)
    raise RuntimeError("this process has started no nats-server")


class Cost:
    """CPU time of this process and of the server while a block runs."""

    own = server = 0.0

    @contextmanager
    def measure(self) -> Iterator[None]:
        pid = server_pid()
        self.own, self.server = time.process_time(), cpu_seconds(pid)
        yield
        self.own = time.process_time() - self.own
        self.server = cpu_seconds(pid) - self.server

    def of(self, jobs: int) -> str:
        own, server = self.own / jobs * 1e6, self.server / jobs * 1e6
        return f"{own:.0f} µs of this process, {server:.0f} µs of the server each"


@contextmanager
def hogs(count: int) -> Iterator[None]:
    """Keep cores busy with `count` processes while the block runs."""
    spin = [sys.executable, "-S", "-c", "while True: pass"]
    processes = [subprocess.Popen(spin) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


# -- counting


class CountingBackend(NATSBackend):
    """Counts what passes the seam: batches, single writes, claims, redeliveries, NAKs."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.counts: Counter[str] = Counter()

    def _count(self, writes: Sequence[Any]) -> None:
        if len(writes) == 1:
            self.counts["single writes"] += 1
        else:
            self.counts["batches"] += 1
            self.counts["writes in batches"] += len(writes)
        for write in writes:
            if write.subject.endswith(".claim") and not write.marker:
                released = b'"released":true' in write.body.replace(b" ", b"")
                self.counts["hand-back claims" if released else "claims"] += 1

    async def write(self, log: str, *writes: Any) -> int:
        self._count(writes)
        return await super().write(log, *writes)

    async def write_each(self, log: str, writes: Sequence[Any]) -> Any:
        for write in writes:
            self._count([write])
        return await super().write_each(log, writes)

    def send(self, log: str, write: Any, settle: Any, **options: Any) -> None:
        self._count([write])
        super().send(log, write, settle, **options)

    def discard(self, log: str, *sequence: Any, **options: Any) -> None:
        self.counts["deletes"] += 1
        super().discard(log, *sequence, **options)  # type: ignore[misc]

    async def delete(self, log: str, *sequence: Any, **options: Any) -> Any:
        self.counts["deletes"] += 1
        return await super().delete(log, *sequence, **options)

    async def delete_many(self, log: str, sequences: Sequence[int]) -> list[int]:
        self.counts["deletes"] += len(sequences)
        return await super().delete_many(log, sequences)

    def puller(
        self, log: str, on_delivery: Callable[[Any], None], *args: Any, **options: Any
    ) -> Any:
        counts = self.counts

        def count_delivery(delivery: Any) -> None:
            if delivery.consumer.startswith("tier_"):
                counts["deliveries"] += 1
                counts["redeliveries"] += delivery.deliveries > 1
                _count_naks(type(delivery), counts)
            on_delivery(delivery)

        return super().puller(log, count_delivery, *args, **options)


_patched: set[type] = set()


def _count_naks(kind: type, counts: Counter[str]) -> None:
    """Count the NAKs of all deliveries of this class: what a worker gives back."""
    if kind in _patched:
        return
    _patched.add(kind)
    nak: Callable[..., None] = kind.nak  # type: ignore[attr-defined]

    def count_nak(delivery: Any, *args: Any, **options: Any) -> None:
        counts["hand-backs"] += delivery.consumer.startswith("tier_")
        nak(delivery, *args, **options)

    kind.nak = count_nak  # type: ignore[attr-defined]


# -- worker processes


@dataclass
class Launched:
    """A process of a benchmark: it waits for a line of input, then works until SIGTERM."""

    process: subprocess.Popen[str]
    started: threading.Event = field(default_factory=threading.Event)
    """Set when the worker's startup hook has run."""
    counts: Counter[str] = field(default_factory=Counter)
    cpu_before: float = 0.0

    def __post_init__(self) -> None:
        self._ready, self._counted = threading.Event(), threading.Event()
        self._reader = threading.Thread(target=self._read, args=(self.process.stdout,), daemon=True)
        self._reader.start()

    def _read(self, output: IO[str]) -> None:
        for line in output:
            if line.startswith("ready"):
                self._ready.set()
            elif line.startswith("started"):
                self.started.set()
            elif line.startswith("{"):
                self.counts = Counter(json.loads(line))
                self._counted.set()
            else:
                print(line, end="", file=sys.stderr)

    def wait_ready(self) -> None:
        if not self._ready.wait(START_TIMEOUT):
            raise TimeoutError("a process of the benchmark did not start")

    def go(self) -> None:
        self.cpu_before = self.cpu()
        self._tell("go")

    def _tell(self, word: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{word}\n")
        self.process.stdin.flush()

    def read_counts(self) -> Counter[str]:
        """Return what the worker has counted so far; nothing if it is dead."""
        if self.process.poll() is None:
            self._counted.clear()
            self._tell("count")
            self._counted.wait(START_TIMEOUT)
        return self.counts

    def cpu(self) -> float:
        return cpu_seconds(self.process.pid)

    async def wait_started(self) -> None:
        if not await anyio.to_thread.run_sync(self.started.wait, START_TIMEOUT):
            raise TimeoutError("a worker of the benchmark did not start")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        """End it in order, or after 20 s at once."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(20.0)
            except subprocess.TimeoutExpired:
                self.kill()
        self._reader.join(5.0)
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()


def launch(script: str, count: int, **options: object) -> list[Launched]:
    """Start processes of the script with these options, and wait until each waits for `go`."""
    command = [sys.executable, script]
    for name, value in options.items():
        command += [f"--{name.replace('_', '-')}", str(value)]
    pipe = subprocess.PIPE
    found = [
        Launched(subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True))
        for _ in range(count)
    ]
    for each in found:
        each.wait_ready()
    return found


def wait_for_go() -> None:
    print("ready", flush=True)
    if not sys.stdin.readline():
        sys.exit(0)


def run_worker(
    url: str, queue: str, concurrency: int, registry: TaskRegistry, settings: Settings
) -> None:
    """Be a worker process: wait for `go`, run jobs until SIGTERM, print the counts when asked."""
    logging.getLogger("asyncmq_nats").setLevel(logging.CRITICAL)  # tasks fail on purpose
    backend = CountingBackend(url, settings=settings)
    worker = Worker(Queue(queue, backend, concurrency, registry=registry))
    worker.on_startup(lambda: print("started", flush=True))
    wait_for_go()
    threading.Thread(target=_answer, args=(backend.counts,), daemon=True).start()
    worker.start()


def _answer(counts: Counter[str]) -> None:
    """Print the counts for each line of input: at once, however long the worker takes to stop."""
    for _ in sys.stdin:
        print(json.dumps(dict(counts)), flush=True)


# -- plain nats-py


async def api(client: Client, subject: str, payload: Mapping[str, object] | None = None) -> Any:
    """Call the JetStream API, and return its answer."""
    body = b"" if payload is None else json.dumps(payload).encode()
    answer = json.loads((await client.request(f"$JS.API.{subject}", body, timeout=30)).data)
    if "error" in answer:
        raise RuntimeError(f"{subject}: {answer['error']}")
    return answer


async def messages(client: Client, stream: str) -> int:
    """Return how many messages the stream holds: of a work queue, those not acknowledged yet."""
    return int((await api(client, f"STREAM.INFO.{stream}"))["state"]["messages"])


async def deliveries(client: Client, stream: str) -> int:
    """Return how often messages of the stream were delivered, by all its consumers."""
    answer = await api(client, f"CONSUMER.LIST.{stream}", {"offset": 0})
    return sum(consumer["delivered"]["consumer_seq"] for consumer in answer["consumers"])


async def prepare_raw(client: Client, name: str) -> None:
    """Make a work queue and a stream for outcomes, like the two of a queue."""
    base = {"storage": "file", "max_msgs_per_subject": 1, "discard": "old", "allow_direct": True}
    ready = {"name": name, "subjects": [f"{name}.ready.*"], "retention": "workqueue"}
    await api(client, f"STREAM.CREATE.{name}", base | ready)
    done = {"name": f"{name}done", "subjects": [f"{name}.done.>"]}
    await api(client, f"STREAM.CREATE.{name}done", base | done)
    config = {
        "name": "c",
        "durable_name": "c",
        "ack_policy": "explicit",
        "max_ack_pending": -1,
        "filter_subject": f"{name}.ready.*",
    }
    consumer = {"stream_name": name, "config": config}
    await api(client, f"CONSUMER.CREATE.{name}.c.{name}.ready.*", consumer)


async def fill_raw(client: Client, name: str, jobs: int, seconds: float) -> None:
    """Store jobs, 500 confirmations at a time."""
    stream = client.jetstream()

    async def add(number: int) -> None:
        job = {"id": f"{name}{number}", "task": "work", "args": [seconds], "kwargs": {}}
        body = json.dumps(job | {"created_at": time.time()}).encode()
        await stream.publish(f"{name}.ready.{job['id']}", body, timeout=60)

    for start in range(0, jobs, 500):
        async with anyio.create_task_group() as group:
            for number in range(start, min(start + 500, jobs)):
                group.start_soon(add, number)


def be_raw(url: str, name: str, in_hand: int, seconds: float) -> None:
    """Be a raw loop's process: wait for `go`, then work until SIGTERM; on uvloop if workers are."""
    wait_for_go()
    fast = importlib.util.find_spec("uvloop") is not None
    anyio.run(run_raw, url, name, in_hand, seconds, backend_options={"use_uvloop": fast})


async def run_raw(url: str, name: str, in_hand: int, seconds: float) -> None:
    """Run a raw loop until the process is told to stop."""
    loop = RawLoop(await nats.connect(url), name, in_hand, seconds)
    await loop.start()
    print("started", flush=True)
    await anyio.sleep_forever()


class RawLoop:
    """Pull, wait `seconds`, publish an outcome, ack when that is confirmed."""

    def __init__(self, client: Client, name: str, in_hand: int, seconds: float) -> None:
        self._client = client
        self._name = name
        self._in_hand = in_hand
        self._seconds = seconds
        self._asked = 0
        self._acks: dict[str, str] = {}
        self._tokens = itertools.count()
        self._inbox, self._replies = client.new_inbox(), client.new_inbox()
        self._running: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        await self._client.subscribe(self._inbox, cb=self._on_job)
        await self._client.subscribe(f"{self._replies}.*", cb=self._on_confirmation)
        await self._ask()

    async def _ask(self) -> None:
        if self._asked > self._in_hand // 2:
            return
        credit = {"batch": self._in_hand - self._asked, "expires": 60_000_000_000}
        self._asked = self._in_hand
        subject = f"$JS.API.CONSUMER.MSG.NEXT.{self._name}.c"
        await self._client.publish(subject, json.dumps(credit).encode(), reply=self._inbox)

    async def _on_job(self, msg: Msg) -> None:
        if not msg.reply:  # the end of a pull
            return
        if self._seconds:
            task = asyncio.ensure_future(self._run_job(msg))
            self._running.add(task)
            task.add_done_callback(self._running.discard)
        else:
            await self._run_job(msg)

    async def _run_job(self, msg: Msg) -> None:
        job = json.loads(msg.data)
        if self._seconds:
            await asyncio.sleep(self._seconds)
        record = json.dumps({**job, "status": "completed", "result": 1}).encode()
        token = str(next(self._tokens))
        self._acks[token] = msg.reply
        subject = f"{self._name}.done.{job['id']}"
        await self._client.publish(subject, record, reply=f"{self._replies}.{token}")

    async def _on_confirmation(self, msg: Msg) -> None:
        await self._client.publish(self._acks.pop(msg.subject.rpartition(".")[2]))
        self._asked -= 1
        await self._ask()
