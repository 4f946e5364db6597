"""Jobs added per second by blocking calls, from 1 and from 16 threads, beside Celery's `delay`.

    python benchmarks/sync_enqueue.py [--seconds 3] [--threads 1 16] [--celery redis://127.0.0.1]

Starts a nats-server of its own (extra `embedded`). Celery is measured where it is installed: with
the broker that is given, or else with its broker in memory, which sends nothing to anyone. Each
number is the best of three runs: others use the machine, too.
"""

import argparse
import importlib.util
import threading
import time
from collections.abc import Callable, Sequence

from asyncmq_nats import NATSBackend
from asyncmq_nats.sync import Queue, close

ROUNDS = 3


def rate(call: Callable[[], object], threads: int, seconds: float) -> float:
    """Return the calls per second of all threads together."""
    counts = [0] * threads
    begin = threading.Barrier(threads + 1)
    end = threading.Event()

    def work(number: int) -> None:
        call()  # the connection is there
        begin.wait()
        while not end.is_set():
            call()
            counts[number] += 1

    running = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
    for each in running:
        each.start()
    begin.wait()
    begun = time.perf_counter()
    time.sleep(seconds)
    counted, elapsed = sum(counts), time.perf_counter() - begun
    end.set()
    for each in running:
        each.join()
    return counted / elapsed


def show(name: str, call: Callable[[], object], threads: Sequence[int], seconds: float) -> None:
    """Measure one way to enqueue, and print it."""
    for number in threads:
        best = max(rate(call, number, seconds) for _ in range(ROUNDS))
        print(f"{name:28} {number:3} threads  {best:9,.0f} jobs/s")


def measure_ours(threads: Sequence[int], seconds: float) -> None:
    """Add jobs to a server of our own; each call waits for the confirmation."""
    backend = NATSBackend.embedded()
    queue = Queue("bench", backend)
    try:
        show("asyncmq_nats.sync", lambda: queue.add("note", ["ada"]), threads, seconds)
        queue.obliterate(force=True)
    finally:
        close()


def measure_celery(broker: str, threads: Sequence[int], seconds: float) -> None:
    """Add jobs by Celery."""
    from celery import Celery

    app = Celery("bench", broker=broker)

    @app.task(name="note", ignore_result=True)
    def note(name: str) -> None: ...

    show(f"Celery, {broker.partition(':')[0]}", lambda: note.delay("ada"), threads, seconds)


def main() -> None:
    """Measure all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--celery", default="memory://")
    given = parser.parse_args()
    measure_ours(given.threads, given.seconds)
    if importlib.util.find_spec("celery") is not None:
        measure_celery(given.celery, given.threads, given.seconds)


if __name__ == "__main__":
    main()
