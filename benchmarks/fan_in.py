"""The cost of ending one of the many parents of one child, beside jobs without a child.

    python benchmarks/fan_in.py [500 2000 8000] [--seconds 120]

Parents and child are a flow. A line says how many parents ended within `--seconds`, when the child
had run, and the CPU time for one parent, of the worker and of the server. Another release is
measured with `PYTHONPATH=<its checkout>`.
"""

import argparse
import itertools
import time
from typing import Final

import anyio
from measuring import CountingBackend, cpu_seconds, launch, run_worker, server_pid

from asyncmq_nats import Job, Queue
from asyncmq_nats.exceptions import AsyncMQError
from asyncmq_nats.flow import FlowProducer
from asyncmq_nats.settings import Settings
from asyncmq_nats.tasks import TaskRegistry

SLOTS: Final = 100
POLL_SECONDS: Final = 0.2

registry = TaskRegistry()
names = itertools.count(1)


async def work() -> int:
    return 1


registry.register(work, queue="bench", name="work")


async def measure_parents(
    backend: CountingBackend, server: int, parents: int, with_child: bool, limit: float
) -> None:
    """Run a flow with this many parents, and print the cost of one."""
    queue = Queue(f"fan{next(names)}", backend, registry=registry)
    jobs = [Job(task_id="work") for _ in range(parents)]
    child = Job(task_id="work", depends_on=[job.job_id for job in jobs])
    what = f"{parents:6} parents, {'one child' if with_child else 'no child'}"
    added = time.monotonic()
    try:
        await FlowProducer(backend).add_flow(queue.name, [*jobs, child] if with_child else jobs)
    except AsyncMQError as error:
        print(f"{what:28} {type(error).__name__}: {error}", flush=True)
        return
    added = time.monotonic() - added
    (worker,) = launch(__file__, 1, worker=backend.url, queue=queue.name)
    worker.go()
    await worker.wait_started()
    server_before, own, begun = cpu_seconds(server), worker.cpu(), time.monotonic()
    done, wanted = 0, parents + with_child
    while done < wanted and time.monotonic() - begun < limit:
        await anyio.sleep(POLL_SECONDS)
        done = (await queue.queue_stats())["completed"]
    seconds = time.monotonic() - begun
    server_cpu, own = cpu_seconds(server) - server_before, worker.cpu() - own
    counts = worker.read_counts()
    worker.stop()
    ended = "all ended" if done == wanted else f"{done} ended"
    each = max(1, done)
    print(
        f"{what:28} added in {added:5.1f} s, {ended} in {seconds:6.1f} s; a parent: worker "
        f"{own / each * 1e3:6.2f} ms, server {server_cpu / each * 1e3:6.2f} ms, "
        f"{counts['batches'] / each:.2f} batches, "
        f"{counts['single writes'] / each:.2f} single writes",
        flush=True,
    )


async def measure(arguments: argparse.Namespace) -> None:
    backend = CountingBackend.embedded()
    try:
        await backend.connect()
        for parents in arguments.parents:
            for with_child in (False, True):
                limit = arguments.seconds
                await measure_parents(backend, server_pid(), parents, with_child, limit)
    finally:
        await backend.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parents", nargs="*", type=int, default=[500, 2000, 8000])
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--queue", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        run_worker(arguments.worker, arguments.queue, SLOTS, registry, Settings())
    else:
        anyio.run(measure, arguments)


if __name__ == "__main__":
    main()
