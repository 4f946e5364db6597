"""AsyncMQ on Redis: results are kept. Its worker is `Queue.start`, which is not on uvloop."""

import time

from adapter import CONCURRENCY, QUEUE, URL, Adapter, main, meter
from asyncmq.backends.redis import RedisBackend
from asyncmq.queues import Queue
from asyncmq.tasks import task


@task(queue=QUEUE or "jobs")
async def no_operation(number: int, due: float) -> int:
    return meter.note(number, due)


class AsyncMQ(Adapter):
    packages = "asyncmq", "redis"

    async def connect(self) -> None:
        self._backend = RedisBackend(URL)

    def _queue(self, name: str) -> Queue:
        return Queue(name, self._backend)

    async def add(self, queue: str, number: int) -> None:
        await self._queue(queue).add(no_operation.task_id, [number, 0.0])

    async def add_bulk(self, queue: str, jobs: int) -> None:
        await self._queue(queue).add_bulk(
            [{"task_id": no_operation.task_id, "args": [number, 0.0]} for number in range(jobs)]
        )

    async def add_due(self, queue: str, jobs: int, due: float) -> None:
        for number in range(jobs):
            delay = due - time.time()
            await self._queue(queue).add(no_operation.task_id, [number, due], delay=delay)

    def work(self) -> None:
        Queue(QUEUE, RedisBackend(URL), concurrency=CONCURRENCY).start()


if __name__ == "__main__":
    main(AsyncMQ())
