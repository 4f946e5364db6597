"""asyncmq-nats: outcomes with their results are kept; the worker as `amq worker start` has it."""

from adapter import CONCURRENCY, QUEUE, URL, Adapter, main, meter

from asyncmq_nats import NATSBackend, Queue, task
from asyncmq_nats.workers import Worker


@task(queue=QUEUE or "jobs", name="no_operation")
async def no_operation(number: int, due: float) -> int:
    return meter.note(number, due)


class Ours(Adapter):
    packages = "asyncmq-nats", "nats-py"

    async def connect(self) -> None:
        self._backend = NATSBackend(URL)
        await self._backend.connect()
        self._queues: dict[str, Queue] = {}

    def _queue(self, name: str) -> Queue:
        if name not in self._queues:
            self._queues[name] = Queue(name, self._backend)
        return self._queues[name]

    async def add(self, queue: str, number: int) -> None:
        await self._queue(queue).add("no_operation", [number, 0.0])

    async def add_bulk(self, queue: str, jobs: int) -> None:
        await self._queue(queue).add_bulk(
            [{"task_id": "no_operation", "args": [number, 0.0]} for number in range(jobs)]
        )

    async def add_due(self, queue: str, jobs: int, due: float) -> None:
        for number in range(jobs):
            delay = due - self._backend.now()
            await self._queue(queue).add("no_operation", [number, due], delay=delay)

    def work(self) -> None:
        Worker(Queue(QUEUE, NATSBackend(URL), concurrency=CONCURRENCY)).start()


if __name__ == "__main__":
    main(Ours())
