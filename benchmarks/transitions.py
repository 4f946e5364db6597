"""The cost of each change of a job's state on one server: rate, CPU time, batches.

    python benchmarks/transitions.py [plain child follow-up ticks …] [--count 1000] [--seconds 20]

A producer's changes are made by 100 tasks in this process, a worker's by one worker process with
100 slots. Each line says how many were made within `--seconds`, and what one of them cost. Another
release is measured with `PYTHONPATH=<its checkout>`.
"""

import argparse
import itertools
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final

import anyio
from measuring import CountingBackend, cpu_seconds, launch, run_worker, server_pid

from asyncmq_nats import Job, Queue
from asyncmq_nats.context import current_job
from asyncmq_nats.flow import FlowProducer
from asyncmq_nats.settings import Settings
from asyncmq_nats.tasks import TaskRegistry

PRODUCERS: Final = 100
SLOTS: Final = 100
DELAY_SECONDS: Final = 3600.0
POLL_SECONDS: Final = 0.1

registry = TaskRegistry()
names = itertools.count(1)


async def work(value: int = 1) -> int:
    return value


async def follow_up() -> int:
    current_job().add("work")
    return 1


async def fail_once() -> int:
    if current_job().attempt == 1:
        raise ValueError("the first attempt fails")
    return 1


async def fail() -> None:
    raise ValueError("each attempt fails")


for function in (work, follow_up, fail_once, fail):
    registry.register(function, queue="bench", name=function.__name__)


@dataclass
class Bench:
    """A server, and the bounds of each measurement."""

    backend: CountingBackend
    server: int
    count: int
    seconds: float

    def queue(self) -> Queue:
        return Queue(f"transitions{next(names)}", self.backend, registry=registry)


def show(
    what: str, done: int, seconds: float, server: float, own: float, counts: Counter[str]
) -> None:
    each = max(done, 1)
    kinds = ("batches", "single writes", "deletes")
    print(
        f"{what:34}{done:6} {done / seconds:7.0f}/s  server {server / each * 1e6:6.0f} µs"
        f"  own {own / each * 1e6:6.0f} µs"
        + "".join(f"  {counts[kind] / each:5.2f} {kind}" for kind in kinds),
        flush=True,
    )


# -- a producer's


async def produce(bench: Bench, what: str, action: Callable[[int], Awaitable[object]]) -> None:
    """Call the action for each number, 100 at a time, until the time is over."""
    numbers = iter(range(bench.count))
    done = 0
    bench.backend.counts.clear()
    server, own, begun = cpu_seconds(bench.server), time.process_time(), time.monotonic()

    async def one_after_another() -> None:
        nonlocal done
        for number in numbers:
            if time.monotonic() - begun > bench.seconds:
                return
            await action(number)
            done += 1

    async with anyio.create_task_group() as group:
        for _ in range(PRODUCERS):
            group.start_soon(one_after_another)
    seconds = time.monotonic() - begun
    own = time.process_time() - own
    show(what, done, seconds, cpu_seconds(bench.server) - server, own, bench.backend.counts)


async def plain_adds(bench: Bench) -> None:
    queue = bench.queue()
    await queue.add("work")
    await produce(bench, "add, plain", lambda number: queue.add("work", [number]))


async def dedup(bench: Bench) -> None:
    queue = bench.queue()
    await queue.add("work")

    def add(number: int) -> Awaitable[object]:
        return queue.add("work", deduplication={"id": f"key{number}", "ttl": 600})

    await produce(bench, "add, opens a window", add)
    await produce(bench, "add, into an open window", add)


async def dependency(bench: Bench) -> None:
    queue = bench.queue()
    parents = await queue.add_bulk([{"task_id": "work"}] * bench.count)
    await produce(
        bench,
        "add, with one dependency",
        lambda number: queue.add("work", depends_on=[parents[number]]),
    )


async def flows(bench: Bench) -> None:
    queue = bench.queue()
    await queue.add("work")
    producer = FlowProducer(bench.backend)

    async def add(_: int) -> None:
        first, second = Job(task_id="work"), Job(task_id="work")
        last = Job(task_id="work", depends_on=[first.job_id, second.job_id])
        await producer.add_flow(queue.name, [first, second, last])

    await produce(bench, "flow of 3", add)


async def delayed_adds(bench: Bench) -> None:
    queue = bench.queue()
    await queue.add("work")
    await produce(bench, "add, delayed", lambda _: queue.add("work", delay=DELAY_SECONDS))


async def cancel(bench: Bench) -> None:
    queue = bench.queue()
    delayed = [{"task_id": "work", "delay": DELAY_SECONDS}] * bench.count
    ids = await queue.add_bulk(delayed)
    await produce(bench, "cancel a delayed job", lambda number: queue.cancel_job(ids[number]))
    waiting = bench.queue()
    others = await waiting.add_bulk([{"task_id": "work"}] * bench.count)
    await produce(bench, "cancel a waiting job", lambda number: waiting.cancel_job(others[number]))


async def retry_by_hand(bench: Bench) -> None:
    queue = bench.queue()
    ids = await queue.add_bulk([{"task_id": "fail"}] * bench.count)
    await consume(bench, "plain job that fails", queue, {"failed": bench.count})
    await produce(bench, "retry_job", lambda number: queue.retry_job(ids[number]))


# -- a worker's


async def consume(
    bench: Bench, what: str, queue: Queue, wanted: dict[str, int], share: int = 1
) -> None:
    """Run a worker until the queue has these counts, or the time is over.

    `share`: how many jobs end for each one that is counted.
    """
    (state, target), *_ = wanted.items()
    (worker,) = launch(__file__, 1, worker=bench.backend.url, queue=queue.name)
    worker.go()
    await worker.wait_started()
    server, own, begun = cpu_seconds(bench.server), worker.cpu(), time.monotonic()
    done = 0
    while done < target and time.monotonic() - begun < bench.seconds:
        await anyio.sleep(POLL_SECONDS)
        done = (await queue.queue_stats())[state]
    seconds = time.monotonic() - begun
    server, own = cpu_seconds(bench.server) - server, worker.cpu() - own
    counts = worker.read_counts()
    worker.stop()
    show(what, done // share, seconds, server, own, counts)


async def plain(bench: Bench) -> None:
    queue = bench.queue()
    count = bench.count * 5
    await queue.add_bulk([{"task_id": "work"}] * count)
    await consume(bench, "run, plain", queue, {"completed": count})


async def child(bench: Bench) -> None:
    queue = bench.queue()
    jobs: list[Job] = []
    for _ in range(bench.count):
        parent = Job(task_id="work")
        jobs += [parent, Job(task_id="work", depends_on=[parent.job_id])]
    await FlowProducer(bench.backend).add_flow(queue.name, jobs)
    await consume(bench, "run, with one child (both)", queue, {"completed": bench.count * 2}, 2)


async def follow_ups(bench: Bench) -> None:
    queue = bench.queue()
    await queue.add_bulk([{"task_id": "follow_up"}] * bench.count)
    await consume(bench, "run, with a follow-up (both)", queue, {"completed": bench.count * 2}, 2)


async def retries(bench: Bench) -> None:
    queue = bench.queue()
    await queue.add_bulk([{"task_id": "fail_once", "retries": 1}] * bench.count)
    await consume(bench, "run, retried once (both attempts)", queue, {"completed": bench.count})


async def promoted(bench: Bench) -> None:
    queue = bench.queue()
    due = time.monotonic() + 8.0
    await queue.add_bulk([{"task_id": "work", "delay": 8.0}] * bench.count)
    await anyio.sleep(due + 1.0 - time.monotonic())
    await consume(bench, "run, delayed ones that are due", queue, {"completed": bench.count})


async def ticks(bench: Bench) -> None:
    queue = bench.queue()
    await queue.add_bulk([{"task_id": "work"}])  # declares the queue
    begun = time.monotonic()
    await queue.upsert_repeatable("work", cron="0 0 1 1 *", name="warm")
    async with anyio.create_task_group() as group:
        for number in range(PRODUCERS):
            group.start_soon(_upsert, queue, "0 0 1 1 *", f"try{number}")
    each = (time.monotonic() - begun) / PRODUCERS
    for definition in await queue.list_repeatables():
        await queue.remove_repeatable(definition.job_def)
    count = min(bench.count, 2_000)
    due = datetime.now(UTC) + timedelta(seconds=5 + each * count * 2)
    cron = f"{due.second} {due.minute} {due.hour} * * *".split()
    await _declare_ticks(bench, queue, " ".join([*cron[1:], cron[0]]), count)
    await anyio.sleep(max(0.0, (due - datetime.now(UTC)).total_seconds()) + 0.5)
    await consume(bench, "run, ticks due at once", queue, {"completed": count + 1})


async def _upsert(queue: Queue, cron: str, name: str) -> None:
    await queue.upsert_repeatable("work", cron=cron, name=name)


async def _declare_ticks(bench: Bench, queue: Queue, cron: str, count: int) -> None:
    smaller = Bench(bench.backend, bench.server, count, bench.seconds * 3)
    await produce(
        smaller, "upsert_repeatable", lambda number: _upsert(queue, cron, f"tick{number}")
    )


ALL: Final[dict[str, Callable[[Bench], Awaitable[None]]]] = {
    "plain": plain,
    "add": plain_adds,
    "delayed": delayed_adds,
    "promoted": promoted,
    "child": child,
    "follow-up": follow_ups,
    "ticks": ticks,
    "cancel": cancel,
    "dedup": dedup,
    "retries": retries,
    "retry_job": retry_by_hand,
    "dependency": dependency,
    "flow": flows,
}


async def measure(arguments: argparse.Namespace) -> None:
    embedded = CountingBackend.embedded()
    try:
        await embedded.connect()
        bench = Bench(embedded, server_pid(), arguments.count, arguments.seconds)
        for name in arguments.what or ALL:
            await ALL[name](bench)
    finally:
        await embedded.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", nargs="*", help=f"of {', '.join(ALL)}; all by default")
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--queue", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        run_worker(arguments.worker, arguments.queue, SLOTS, registry, Settings())
    else:
        anyio.run(measure, arguments)


if __name__ == "__main__":
    main()
