"""How long it takes to look into a queue with many jobs, and to clean it.

python benchmarks/large_queues.py [--sizes 1000,100000,1000000] [--no-clean]

Each size is a number of completed jobs, with 100 failed ones between them. Runs on older releases
too: what they lack is left out. Server CPU is what the server used meanwhile, in milliseconds.
"""

import argparse
import os
import statistics
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import anyio

from asyncmq_nats import NATSBackend, Queue
from asyncmq_nats.backends.base import Settled, Write
from asyncmq_nats.exceptions import AsyncMQError
from asyncmq_nats.jobs import new_job_id

UNDER_WAY = 5_000
RARE = 100
TICKS = os.sysconf("SC_CLK_TCK")


class Filling:
    """Writes records as workers and producers do, as fast as they go.

    Pipelined, a bounded number under way.
    """

    def __init__(self, backend: NATSBackend) -> None:
        self._backend = backend
        self._sent = self._settled = 0
        self._room = anyio.Event()

    def _settle(self, result: Settled) -> None:
        if not isinstance(result, int):
            raise result
        self._settled += 1
        self._room.set()

    async def send(self, log: str, write: Write) -> None:
        self._backend.send(log, write, self._settle)
        self._sent += 1
        await self.wait(UNDER_WAY)

    async def wait(self, under_way: int = 0) -> None:
        while self._sent - self._settled > under_way:
            self._room = anyio.Event()
            await self._room.wait()


def job_body(number: int, job_id: str, state: str) -> bytes:
    return (
        b'{"v":1,"id":"%b","task":"tasks.send","args":[%d],'
        b'"kwargs":{},"created_at":%.3f,"retries":0,'
        b'"max_retries":0,"priority":5,"status":"%b","result":%d,"finished_at":%.3f}'
    ) % (job_id.encode(), number, time.time(), state.encode(), number, time.time())


async def fill_outcomes(backend: NATSBackend, name: str, count: int) -> str:
    """Write outcomes, a rare one now and then; return the id of the first."""
    filling, first, every = Filling(backend), "", max(2, count // RARE)
    for number in range(count):
        job_id = new_job_id()
        first = first or job_id
        state = "failed" if number % every == every - 1 else "completed"
        key = f"$KV.amq_{name}_scheduler"
        more: dict[str, Any] = {}
        if state == "failed" and hasattr(Write, "index"):
            more = {"index": f"{key}.index.failed.{job_id}.entry"}
        write = Write(
            f"{key}.done.{job_id}.{state}", job_body(number, job_id, state), ttl=86_400, **more
        )
        await filling.send(f"KV_amq_{name}_scheduler", write)
    await filling.wait()
    return first


async def fill_ready(backend: NATSBackend, name: str, count: int) -> None:
    filling = Filling(backend)
    for number in range(count):
        job_id = new_job_id()
        body = job_body(number, job_id, "waiting")
        await filling.send(f"amq_{name}", Write(f"amq.{name}.ready.5.{job_id}", body))
    await filling.wait()


class Meter:
    """Measures calls and prints a line for each."""

    def __init__(self, pid: int) -> None:
        self._pid = pid

    def server_cpu(self) -> float:
        with open(f"/proc/{self._pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICKS * 1000

    async def measure(
        self, size: int, name: str, call: Callable[[], Awaitable[Any]], times: int = 5
    ) -> None:
        taken: list[float] = []
        cpu, own = self.server_cpu(), time.process_time()
        error = ""
        for _ in range(times):
            started = time.perf_counter()
            try:
                await call()
            except AsyncMQError as failure:
                error = type(failure).__name__
            taken.append((time.perf_counter() - started) * 1000)
            if taken[-1] > 5_000:
                break
        cpu, own = self.server_cpu() - cpu, (time.process_time() - own) * 1000
        print(
            f"{size:>11,}  {name:<44} {statistics.median(taken):>10.1f} {cpu / len(taken):>12.1f} "
            f"{own / len(taken):>12.1f}  {error}",
            flush=True,
        )


async def last_page(queue: Queue, state: str, count: int) -> None:
    await queue.get_jobs(state, start=count - 50, end=count - 1)


async def look(meter: Meter, queue: Queue, size: int, first: str) -> None:
    completed = size - min(RARE, size // 2)
    calls: dict[str, Callable[[], Awaitable[Any]]] = {
        "queue_stats()": queue.queue_stats,
        "get_job(the oldest)": partial(queue.get_job, first),
        "get_job(an unknown id)": partial(queue.get_job, "unknown"),
        "get_jobs('completed', end=49)": partial(queue.get_jobs, "completed", end=49),
        "get_jobs('completed', end=49, asc=True)": partial(
            queue.get_jobs, "completed", end=49, asc=True
        ),
        "get_jobs('failed', end=49)": partial(queue.get_jobs, "failed", end=49),
        "get_jobs('failed', end=49, asc=True)": partial(queue.get_jobs, "failed", end=49, asc=True),
        "get_jobs('expired')": partial(queue.get_jobs, "expired"),
        "get_jobs('completed', start=10000, end=10049)": partial(
            queue.get_jobs, "completed", start=10_000, end=10_049
        ),
        "get_jobs('completed'), the last 50": partial(last_page, queue, "completed", completed),
    }
    for state in ("completed", "failed"):
        for newest in (True, False):
            if not hasattr(queue, "list_page"):
                continue
            page = await queue.list_page(state, limit=40, newest_first=newest)
            order = "newest" if newest else "oldest"
            calls[f"list_page({state}), {order} first, next"] = partial(
                queue.list_page, state, page.cursor, limit=40, newest_first=newest
            )
    for name, call in calls.items():
        await meter.measure(size, name, call)


async def clean(meter: Meter, backend: NATSBackend, queue: Queue, size: int) -> None:
    await meter.measure(
        size, "clean_jobs(0, limit=1000)", partial(queue.clean_jobs, 0, 1000, "completed"), 1
    )
    older_than = backend.now()
    await meter.measure(
        size, "clean('completed', older_than=now)", partial(queue.clean, "completed", older_than), 1
    )
    await fill_ready(backend, queue.name, size)
    await meter.measure(size, "drain()", queue.drain, 1)
    await fill_ready(backend, queue.name, size)
    await meter.measure(size, "obliterate()", queue.obliterate, 1)


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", default="1000,100000,1000000")
    parser.add_argument("--no-clean", action="store_true")
    arguments = parser.parse_args()
    backend = NATSBackend.embedded()
    try:
        await backend.connect()
        assert backend._embedded is not None
        process = backend._embedded._process
        assert process is not None
        meter = Meter(process.pid)
        print(f"{'jobs':>11}  {'call':<44} {'median ms':>10} {'server ms':>12} {'own CPU ms':>12}")
        for size in map(int, arguments.sizes.split(",")):
            queue = Queue(f"look_{size}", backend)
            await queue._assets.declare_all()
            await queue.queue_stats()
            first = await fill_outcomes(backend, queue.name, size)
            await look(meter, queue, size, first)
            if not arguments.no_clean:
                await clean(meter, backend, queue, size)
            await backend.delete_log(f"amq_{queue.name}")
            await backend.delete_log(f"KV_amq_{queue.name}_scheduler")
    finally:
        await backend.close()


if __name__ == "__main__":
    anyio.run(main)
