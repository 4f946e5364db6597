"""Celery on Redis: results are kept for a day. The worker is `celery worker`, with threads.

Its other pools run as many processes as jobs at a time, or need gevent or eventlet. Its calls
block, so 100 at once are 100 threads.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from threading import Lock

from adapter import CONCURRENCY, PRODUCERS, QUEUE, URL, Adapter, NoWay, become, main, meter
from celery import Celery

app = Celery("jobs", broker=URL, backend=URL)


@app.task(name="no_operation")
def no_operation(number: int, due: float) -> int:
    return meter.note(number, due)


def add(queue: str, number: int) -> None:
    no_operation.apply_async((number, 0.0), queue=queue)


class CeleryOnRedis(Adapter):
    packages = "celery", "redis"

    async def connect(self) -> None:
        pass

    async def add(self, queue: str, number: int) -> None:
        add(queue, number)

    async def add_100_at_once(self, queue: str, jobs: Iterator[int]) -> int:
        added, turn = 0, Lock()

        def produce() -> None:
            nonlocal added
            while True:
                with turn:
                    if (number := next(jobs, None)) is None:
                        return
                    added += 1
                add(queue, number)

        with ThreadPoolExecutor(PRODUCERS) as threads:
            for running in [threads.submit(produce) for _ in range(PRODUCERS)]:
                running.result()
        return added

    async def add_bulk(self, queue: str, jobs: int) -> None:
        raise NoWay("a group sends one message after the other")

    async def add_due(self, queue: str, jobs: int, due: float) -> None:
        when = datetime.fromtimestamp(due, UTC)
        for number in range(jobs):
            no_operation.apply_async((number, due), queue=queue, eta=when)

    def work(self) -> None:
        slots = "--pool", "threads", "--concurrency", str(CONCURRENCY)
        options = "--queues", QUEUE, "--loglevel", "WARNING", *slots
        become("celery", "--app", "celery_redis", "worker", *options)


if __name__ == "__main__":
    main(CeleryOnRedis())
