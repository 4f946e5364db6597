"""SAQ on Redis: results are kept for ten minutes. The worker is the program `saq`."""

from adapter import CONCURRENCY, QUEUE, URL, Adapter, become, main, meter
from saq import Queue


async def no_operation(_: object, *, number: int, due: float) -> int:
    return meter.note(number, due)


settings = {
    "queue": Queue.from_url(URL, name=QUEUE or "jobs"),
    "functions": [no_operation],
    "concurrency": CONCURRENCY,
}


class SAQ(Adapter):
    packages = "saq", "redis"

    async def connect(self) -> None:
        self._queues: dict[str, Queue] = {}

    def _queue(self, name: str) -> Queue:
        if name not in self._queues:
            self._queues[name] = Queue.from_url(URL, name=name)
        return self._queues[name]

    async def add(self, queue: str, number: int) -> None:
        await self._queue(queue).enqueue("no_operation", number=number, due=0.0)

    async def add_due(self, queue: str, jobs: int, due: float) -> None:
        for number in range(jobs):
            await self._queue(queue).enqueue(
                "no_operation", number=number, due=due, scheduled=int(due)
            )

    def work(self) -> None:
        become("saq", "saq_redis.settings")


if __name__ == "__main__":
    main(SAQ())
