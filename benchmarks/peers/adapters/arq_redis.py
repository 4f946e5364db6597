"""arq on Redis: results are kept for an hour. The worker is the program `arq`.

It takes jobs twice a second (`poll_delay`), and no more than run at a time.
"""

from datetime import UTC, datetime

from adapter import CONCURRENCY, QUEUE, URL, Adapter, main, meter
from arq import create_pool
from arq.connections import RedisSettings
from arq.worker import run_worker


async def no_operation(_: object, number: int, due: float) -> int:
    return meter.note(number, due)


class WorkerSettings:
    functions = (no_operation,)
    redis_settings = RedisSettings.from_dsn(URL) if URL else None
    queue_name = QUEUE
    max_jobs = CONCURRENCY


class Arq(Adapter):
    packages = "arq", "redis"

    async def connect(self) -> None:
        self._pool = await create_pool(RedisSettings.from_dsn(URL))

    async def add(self, queue: str, number: int) -> None:
        await self._pool.enqueue_job("no_operation", number, 0.0, _queue_name=queue)

    async def add_due(self, queue: str, jobs: int, due: float) -> None:
        until = datetime.fromtimestamp(due, UTC)
        for number in range(jobs):
            await self._pool.enqueue_job(
                "no_operation", number, due, _queue_name=queue, _defer_until=until
            )

    def work(self) -> None:
        run_worker(WorkerSettings)  # as the program does


if __name__ == "__main__":
    main(Arq())
