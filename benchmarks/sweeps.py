"""A cancel, or a retry by hand, of all jobs that a search finds: rate, and cost of a job.

python benchmarks/sweeps.py [waiting] [delayed] [failed] [--sizes 10000,100000] [--profile]

`waiting` and `delayed` jobs are cancelled, `failed` ones retried. Runs on older releases too. The
CPU time is that of this process and of the server, for a job, with the search.
"""

import argparse
import cProfile
import pstats
import time
from collections.abc import Awaitable, Callable
from typing import Final

import anyio
from large_queues import Filling, fill_ready, job_body
from measuring import Cost

from asyncmq_nats import JobFilter, NATSBackend, Queue
from asyncmq_nats.backends.base import Timer, Write
from asyncmq_nats.jobs import new_job_id
from asyncmq_nats.runtime.program import run_program

DELAY: Final = 86_400.0


async def fill_delayed(backend: NATSBackend, name: str, count: int) -> None:
    filling, key = Filling(backend), f"$KV.amq_{name}_scheduler.later"
    for number in range(count):
        job_id, run_at = new_job_id(), time.time() + DELAY
        body = job_body(number, job_id, "delayed")[:-1] + b',"delay_until":%.3f}' % run_at
        timer = Timer(run_at, f"{key}.{job_id}.released")
        write = Write(f"{key}.{job_id}.delayed", body, timer=timer)
        await filling.send(f"KV_amq_{name}_scheduler", write)
    await filling.wait()


async def fill_failed(backend: NATSBackend, name: str, count: int) -> None:
    filling, key = Filling(backend), f"$KV.amq_{name}_scheduler"
    for number in range(count):
        job_id = new_job_id()
        body, index = job_body(number, job_id, "failed"), f"{key}.index.failed.{job_id}.entry"
        write = Write(f"{key}.done.{job_id}.failed", body, ttl=DELAY, index=index)
        await filling.send(f"KV_amq_{name}_scheduler", write)
    await filling.wait()


Fill = Callable[[NATSBackend, str, int], Awaitable[None]]
ROWS: Final[dict[str, tuple[Fill, str, str]]] = {
    "waiting": (fill_ready, "cancel", "cancelled"),
    "delayed": (fill_delayed, "cancel", "cancelled"),
    "failed": (fill_failed, "retry", "waiting"),
}


async def measure(backend: NATSBackend, state: str, size: int, *, profile: bool) -> None:
    fill, action, becomes = ROWS[state]
    queue = Queue(f"sweep_{state}_{size}", backend)
    await queue._assets.declare_all()
    await queue.queue_stats()
    await fill(backend, queue.name, size)
    await anyio.sleep(1.0)
    cost, profiler = Cost(), cProfile.Profile()
    if profile:
        profiler.enable()
    with cost.measure():
        began = time.perf_counter()
        result = await queue.apply(JobFilter(state=state), action)
        seconds = time.perf_counter() - began
    profiler.disable()
    counts = await queue.queue_stats()
    assert result.done == size == counts[becomes], (result, counts)
    text = f"{action} {size:,} {state} jobs"
    print(f"{text:<30} {size / seconds:>8,.0f}/s, {cost.of(size)}", flush=True)
    if profile:
        pstats.Stats(profiler).sort_stats("tottime").print_stats(40)
    for log in (f"amq_{queue.name}", f"KV_amq_{queue.name}_scheduler"):
        await backend.delete_log(log)


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", nargs="*", help=f"of {', '.join(ROWS)}; all by default")
    parser.add_argument("--sizes", default="10000,100000")
    parser.add_argument("--profile", action="store_true")
    arguments = parser.parse_args()
    async with NATSBackend.embedded() as backend:
        for size in map(int, arguments.sizes.split(",")):
            for state in arguments.what or ROWS:
                await measure(backend, state, size, profile=arguments.profile)


if __name__ == "__main__":
    run_program(main)
