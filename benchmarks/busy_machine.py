"""A queue on a machine with other work, beside a raw loop of nats-py under the same load.

    python benchmarks/busy_machine.py [hogs redelivered killed poison] [--full]
        [--workers 1 3] [--concurrency 100 10 3] [--milliseconds 0 1 50]

* hogs: two other processes keep both cores busy for the first 4 s; then they end.
* redelivered: jobs that another client fetched and gave back once, beside fresh ones.
* killed: a worker is killed with its hands full; `stalled_after` is 2 s.
* poison: a job kills its worker, among 1,000 jobs of 5 ms, at concurrency 10.

Another release is measured with `PYTHONPATH=<its checkout>`. Ratios and CPU time count; rates are
rough.
"""

import argparse
import itertools
import os
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import anyio
import nats
from measuring import (
    Launched,
    api,
    be_raw,
    cpu_seconds,
    deliveries,
    fill_raw,
    hogs,
    launch,
    messages,
    prepare_raw,
    run_worker,
    server_pid,
)
from nats.aio.client import Client

from asyncmq_nats import NATSBackend, Queue
from asyncmq_nats.settings import Settings
from asyncmq_nats.tasks import TaskRegistry

HOG_SECONDS: Final = 4.0
WATCH_SECONDS: Final = 12.0
"""How long a run with hogs is watched: the load, and what comes after it."""
MAX_JOBS: Final = 200_000
SAMPLE_SECONDS: Final = 0.1
RATE_WINDOW_SECONDS: Final = 0.5
DRAIN_SECONDS: Final = 120.0
STALLED_AFTER: Final = 2.0

registry = TaskRegistry()
names = itertools.count(1)


async def work(seconds: float) -> int:
    if seconds:
        await anyio.sleep(seconds)
    return 1


async def poison() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


registry.register(work, queue="bench", name="work")
registry.register(poison, queue="bench", name="poison")


@dataclass(frozen=True)
class Case:
    """How many workers, with how many slots, run jobs of how many seconds."""

    workers: int
    concurrency: int
    seconds: float

    def __str__(self) -> str:
        slots = f"{self.workers} × {self.concurrency:3}"
        return f"{slots}, jobs of {self.seconds * 1000:2.0f} ms"

    def jobs(self, run_seconds: float) -> int:
        """Return how many jobs are enough for such a run, at most `MAX_JOBS`."""
        if not self.seconds:
            return MAX_JOBS
        slots = self.workers * self.concurrency
        return min(MAX_JOBS, int(slots / self.seconds * run_seconds * 1.1))


@dataclass
class Run:
    """The figures of one run: acknowledged jobs by time since the start, CPU time, counts."""

    jobs: int
    samples: list[tuple[float, int]] = field(default_factory=lambda: [(0.0, 0)])
    server_cpu: float = 0.0
    worker_cpu: float = 0.0
    deliveries: int = 0
    counts: Counter[str] = field(default_factory=Counter)

    @property
    def done(self) -> int:
        return self.samples[-1][1]

    def rate(self, begin: float, end: float) -> float:
        """Return the jobs per second between two times, or until none was left."""
        first = next((at for at, done in self.samples if done), end)
        at_end = next((at for at, done in self.samples if done >= self.jobs), end)
        begin, end = max(begin, first), min(end, at_end)
        if end - begin < SAMPLE_SECONDS / 2:
            return float("nan")
        return (self._done_at(end) - self._done_at(begin)) / (end - begin)

    def _done_at(self, when: float) -> float:
        before, after = self.samples[0], self.samples[-1]
        for sample in self.samples:
            if sample[0] <= when:
                before = sample
            else:
                after = sample
                break
        if after[0] <= before[0]:
            return before[1]
        share = min(1.0, (when - before[0]) / (after[0] - before[0]))
        return before[1] + share * (after[1] - before[1])

    def seconds_until(self, wanted: float, begin: float) -> float | None:
        """Return the seconds from `begin` to half a second at the wanted rate; `None`: never."""
        for at, done in self.samples:
            if at >= begin and (
                done >= self.jobs or self.rate(at, at + RATE_WINDOW_SECONDS) >= wanted
            ):
                return max(0.0, at - begin)
        return None

    def costs(self) -> str:
        done = max(1, self.done)
        per_job = {name: self.counts[name] / done for name in ("claims", "hand-backs", "batches")}
        return (
            f"server {self.server_cpu / done * 1e6:5.0f} µs, "
            f"worker {self.worker_cpu / done * 1e6:5.0f} µs, "
            f"{self.deliveries / done:5.2f} deliveries"
            + "".join(f", {value:.3f} {name}" for name, value in per_job.items())
            + " a job"
        )


class Bench:
    """A server with a file store, and what looks at it."""

    def __init__(self, backend: NATSBackend, client: Client) -> None:
        self.backend = backend
        self.client = client
        self.server = server_pid()

    async def queue(self, jobs: int, seconds: float) -> Queue:
        """Return a new queue with this many jobs."""
        queue = Queue(f"busy{next(names)}", self.backend, registry=registry)
        entry = {"task_id": "work", "args": [seconds]}
        for start in range(0, jobs, 10_000):
            await queue.add_bulk([entry] * min(10_000, jobs - start))
        if not jobs:
            await queue.add_bulk([])
        return queue

    def launch(self, queue: Queue, case: Case, count: int | None = None) -> list[Launched]:
        return launch(
            __file__,
            case.workers if count is None else count,
            role="worker",
            url=self.backend.url,
            name=queue.name,
            slots=case.concurrency,
        )

    async def raw(self, jobs: int, case: Case) -> tuple[str, list[Launched]]:
        """Fill a raw stream; return its name and the processes that will work on it."""
        name = f"raw{next(names)}"
        await prepare_raw(self.client, name)
        await fill_raw(self.client, name, jobs, case.seconds)
        options = {"url": self.backend.url, "slots": case.concurrency, "seconds": case.seconds}
        return name, launch(__file__, case.workers, role="raw", name=name, **options)

    async def watch(
        self,
        stream: str,
        jobs: int,
        processes: Sequence[Launched],
        seconds: float,
        hog_seconds: float = 0.0,
        counted: bool = True,
    ) -> Run:
        """Let the processes go; sample the stream until it is empty or the time is over."""
        run = Run(jobs)
        server_before = cpu_seconds(self.server)
        with ExitStack() as stack:
            if hog_seconds:
                stack.enter_context(hogs(os.cpu_count() or 2))
            begun = time.monotonic()
            for process in processes:
                process.go()
            while run.done < jobs and (now := time.monotonic() - begun) < seconds:
                if hog_seconds and now >= hog_seconds:
                    hog_seconds = 0.0
                    stack.close()
                await anyio.sleep(SAMPLE_SECONDS)
                left = await messages(self.client, stream)
                run.samples.append((time.monotonic() - begun, jobs - left))
        run.server_cpu = cpu_seconds(self.server) - server_before
        run.worker_cpu = sum(process.cpu() - process.cpu_before for process in processes)
        run.deliveries = await deliveries(self.client, stream)
        for process in processes:
            if counted:
                run.counts += process.read_counts()
        for process in processes:
            process.stop()
        return run


def stream_of(queue: Queue) -> str:
    return f"amq_{queue.name}"


def line(text: str, what: str) -> None:
    print(f"{text:30} {what}", flush=True)


# -- what is measured


async def measure_hogs(bench: Bench, case: Case) -> None:
    """Alone, then with hogs for the first 4 s, each beside a raw loop."""
    jobs = case.jobs(WATCH_SECONDS)
    runs: dict[str, Run] = {}
    for load, watch, hog in (("alone", 3.0, 0.0), ("hogs", WATCH_SECONDS, HOG_SECONDS)):
        name, processes = await bench.raw(jobs, case)
        runs[f"raw {load}"] = await bench.watch(name, jobs, processes, watch, hog, counted=False)
        await api(bench.client, f"STREAM.DELETE.{name}")
        queue = await bench.queue(jobs, case.seconds)
        processes = bench.launch(queue, case)
        runs[load] = await bench.watch(stream_of(queue), jobs, processes, watch, hog)
        await queue.obliterate(force=True)
    alone, hogged = runs["alone"], runs["hogs"]
    idle, raw_idle = alone.rate(0, 3.0), runs["raw alone"].rate(0, 3.0)
    busy, raw_busy = hogged.rate(0, HOG_SECONDS), runs["raw hogs"].rate(0, HOG_SECONDS)
    after = hogged.rate(HOG_SECONDS, WATCH_SECONDS)
    back = hogged.seconds_until(idle / 2, HOG_SECONDS)
    line(f"alone: {case}", f"{idle:6.0f}/s, {idle / raw_idle:.2f} of raw; {alone.costs()}")
    line(f"hogs:  {case}", f"{busy:6.0f}/s, {busy / raw_busy:.2f} of raw; {hogged.costs()}")
    told = "not back in 8 s" if back is None else f"back after {back:.1f} s"
    line(f"after: {case}", f"{after:6.0f}/s, {told}")


async def measure_redelivered(bench: Bench, case: Case) -> None:
    """Fresh jobs, then as many that another client has given back once."""
    jobs = min(5_000, case.jobs(5.0))
    rates: list[float] = []
    for what in ("fresh", "given back"):
        queue = await bench.queue(jobs, case.seconds)
        if what == "given back":
            await give_back(bench.client, stream_of(queue), jobs)
        handed = await deliveries(bench.client, stream_of(queue))
        processes = bench.launch(queue, case)
        run = await bench.watch(stream_of(queue), jobs, processes, WATCH_SECONDS)
        run.deliveries -= handed
        rates.append(run.rate(0, WATCH_SECONDS))
        line(f"{what:10} {case}", f"{rates[-1]:6.0f}/s; {run.costs()}")
        await queue.obliterate(force=True)
    line("", f"given back: {rates[1] / rates[0]:.2f} of fresh")


async def give_back(client: Client, stream: str, jobs: int) -> None:
    """Fetch each job of the queue once and NAK it, as a worker does that stops."""
    left = jobs
    inbox = client.new_inbox()
    over = anyio.Event()

    async def on_job(msg: Any) -> None:
        nonlocal left
        if msg.reply:
            taken.append(msg.reply)
            left -= 1
            if not left:
                over.set()

    taken: list[str] = []
    subscription = await client.subscribe(inbox, cb=on_job)
    body = b'{"batch": %d, "expires": 60000000000}' % jobs
    await client.publish(f"$JS.API.CONSUMER.MSG.NEXT.{stream}.tier_5", body, reply=inbox)
    with anyio.fail_after(60):
        await over.wait()
    await subscription.unsubscribe()
    for reply in taken:
        await client.publish(reply, b"-NAK")
    await client.flush()


async def measure_killed(bench: Bench, case: Case) -> None:
    """Kill one worker a second after it began. With one worker, another takes over."""
    jobs = min(5_000, case.jobs(4.0))
    queue = await bench.queue(jobs, case.seconds)
    stream = stream_of(queue)
    processes = bench.launch(queue, case, max(2, case.workers))
    victim, *others = processes
    for process in processes if case.workers > 1 else [victim]:
        process.go()
    await until_left(bench, stream, jobs - min(jobs // 4, 50))
    info = await api(bench.client, f"CONSUMER.INFO.{stream}.tier_5")
    victim.kill()
    killed = time.monotonic()
    if case.workers == 1:
        others[0].go()
    in_hand, left = info["num_ack_pending"], await messages(bench.client, stream)
    took = await until_left(bench, stream, 0, since=killed)
    stats = await queue.queue_stats()
    counts: Counter[str] = Counter()
    for process in processes:
        counts += process.read_counts()
        process.stop()
    told = "not all in 120 s" if took is None else f"all had run {took:.1f} s after the kill"
    line(
        f"killed {case}",
        f"{left} left, {in_hand} in hands: {told}; "
        f"{stats['completed']} completed, {stats['failed']} failed; {counts['claims']} claims, "
        f"{counts['hand-backs']} hand-backs, {counts['batches']} batches",
    )
    await queue.obliterate(force=True)


async def until_left(
    bench: Bench, stream: str, left: int, since: float | None = None
) -> float | None:
    """Wait until at most `left` jobs are left; return the seconds since, `None` after 120 s."""
    begun = time.monotonic() if since is None else since
    while await messages(bench.client, stream) > left:
        if time.monotonic() - begun > DRAIN_SECONDS:
            return None
        await anyio.sleep(0.02)
    return time.monotonic() - begun


async def measure_poison(bench: Bench, workers: int) -> None:
    """One job kills its worker; a worker that dies is started again."""
    case = Case(workers, 10, 0.005)
    queue = await bench.queue(20, case.seconds)
    poison_id = await queue.add("poison")
    await queue.add_bulk([{"task_id": "work", "args": [case.seconds]}] * 980)
    stream = stream_of(queue)
    deaths = 0
    begun = time.monotonic()
    async with restarted(bench, queue, case) as processes:
        while (left := await messages(bench.client, stream)) and (
            time.monotonic() - begun < DRAIN_SECONDS
        ):
            for index, process in enumerate(processes):
                if process.process.poll() is not None:
                    deaths += 1
                    process.stop()
                    (processes[index],) = bench.launch(queue, case, 1)
                    processes[index].go()
            await anyio.sleep(0.05)
        took = time.monotonic() - begun
        stats = await queue.queue_stats()
    ended = await queue.get_job(poison_id)
    harmless = stats["failed"] - (ended is not None and ended["status"] == "failed")
    line(
        f"poison {case}",
        f"{took:5.1f} s, {left} left, {deaths} workers died; {stats['completed']} completed, "
        f"poison {ended and ended['status']}, {harmless} harmless ones failed",
    )
    await queue.obliterate(force=True)


@asynccontextmanager
async def restarted(bench: Bench, queue: Queue, case: Case) -> AsyncIterator[list[Launched]]:
    processes = bench.launch(queue, case)
    for process in processes:
        process.go()
    try:
        yield processes
    finally:
        for process in processes:
            process.stop()


# -- program

SHORT: Final = (Case(1, 100, 0.0), Case(1, 10, 0.001), Case(3, 100, 0.0), Case(1, 10, 0.05))


def chosen(arguments: argparse.Namespace) -> list[Case]:
    """Return the short selection; with `--full` or an option that chooses, all combinations."""
    given = (arguments.workers, arguments.concurrency, arguments.milliseconds)
    if not arguments.full and not any(given):
        return list(SHORT)
    workers, slots, milliseconds = given
    combinations = itertools.product(
        workers or (1, 3), slots or (100, 10, 3), milliseconds or (0, 1, 50)
    )
    return [Case(count, size, ms / 1000) for count, size, ms in combinations]


async def measure(arguments: argparse.Namespace) -> None:
    backend = NATSBackend.embedded(settings=Settings(stalled_after=STALLED_AFTER))
    await backend.connect()
    client = await nats.connect(backend.url)
    bench = Bench(backend, client)
    what = arguments.what or ["hogs", "redelivered", "killed", "poison"]
    measures = {
        "hogs": measure_hogs,
        "redelivered": measure_redelivered,
        "killed": measure_killed,
    }
    try:
        for name in what:
            if name == "poison":
                for workers in arguments.workers or (1, 3):
                    await measure_poison(bench, workers)
                continue
            for case in chosen(arguments):
                await measures[name](bench, case)
    finally:
        await client.close()
        await backend.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", nargs="*", help="hogs, redelivered, killed, poison; all by default")
    parser.add_argument("--full", action="store_true", help="the whole matrix")
    parser.add_argument("--workers", type=int, nargs="*")
    parser.add_argument("--concurrency", type=int, nargs="*")
    parser.add_argument("--milliseconds", type=float, nargs="*")
    for name in ("role", "url", "name"):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    parser.add_argument("--slots", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=0.0, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.role == "worker":
        settings = Settings(stalled_after=STALLED_AFTER)
        run_worker(arguments.url, arguments.name, arguments.slots, registry, settings)
    elif arguments.role == "raw":
        be_raw(arguments.url, arguments.name, arguments.slots, arguments.seconds)
    else:
        anyio.run(measure, arguments)


if __name__ == "__main__":
    main()
