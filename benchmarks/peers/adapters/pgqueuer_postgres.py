"""pgqueuer on PostgreSQL: keeps no results. The worker is on uvloop, as `pgq run` is.

A worker takes as many jobs in one statement as run at a time. A connection of asyncpg runs one
statement at a time, so 100 at once share a pool with asyncpg's default of ten.
"""

import asyncio
import json
from collections.abc import Iterator
from datetime import timedelta
from time import time

import asyncpg
import uvloop
from adapter import CONCURRENCY, QUEUE, URL, Adapter, at_once, main, meter
from pgqueuer import PgQueuer
from pgqueuer.db import AsyncpgDriver, AsyncpgPoolDriver
from pgqueuer.models import Job
from pgqueuer.queries import Queries


async def run() -> None:
    """Do what `pgq run` does."""
    worker = PgQueuer.from_asyncpg_connection(await asyncpg.connect(URL))

    @worker.entrypoint(QUEUE)
    async def no_operation(job: Job) -> None:
        meter.note(*json.loads(job.payload or b""))

    await worker.run(batch_size=CONCURRENCY)


def payload(number: int, due: float = 0.0) -> bytes:
    return json.dumps([number, due]).encode()


class Pgqueuer(Adapter):
    packages = "pgqueuer", "asyncpg"

    async def connect(self) -> None:
        self._one = Queries(AsyncpgDriver(await asyncpg.connect(URL)))
        self._many = Queries(AsyncpgPoolDriver(await asyncpg.create_pool(URL)))
        await self._one.install()

    async def add(self, queue: str, number: int) -> None:
        await self._one.enqueue(queue, payload(number))

    async def add_100_at_once(self, queue: str, jobs: Iterator[int]) -> int:
        async def add(number: int) -> None:
            await self._many.enqueue(queue, payload(number))

        return await at_once(add, jobs)

    async def add_bulk(self, queue: str, jobs: int) -> None:
        payloads: list[bytes | None] = [payload(number) for number in range(jobs)]
        await self._one.enqueue([queue] * jobs, payloads, [0] * jobs)

    async def add_due(self, queue: str, jobs: int, due: float) -> None:
        for number in range(jobs):
            after = timedelta(seconds=due - time())
            await self._one.enqueue(queue, payload(number, due), execute_after=after)

    def work(self) -> None:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(run())


if __name__ == "__main__":
    main(Pgqueuer())
