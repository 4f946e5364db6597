"""gylo on PostgreSQL, an alpha release: results are kept if a task asks for it, which it does here.

The worker is `gylo worker`: a program in Rust, and one Python process, which runs the tasks.
"""

import asyncio
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from time import time

import asyncpg
from adapter import CONCURRENCY, QUEUE, URL, Adapter, at_once, become, main, meter
from gylo import Gylo

app = Gylo()


@app.task(name="no_operation", store_result=True)
async def no_operation(number: int, due: float) -> int:
    return meter.note(number, due)


class OnPostgres(Adapter):
    packages = "gylo", "asyncpg"

    async def connect(self) -> None:
        program = str(Path(sys.executable).with_name("gylo"))
        given = os.environ | {"DATABASE_URL": URL}
        migrate = await asyncio.create_subprocess_exec(program, "migrate", env=given)
        assert await migrate.wait() == 0
        self._connection = await asyncpg.connect(URL)
        app.bind(await asyncpg.create_pool(URL))

    async def add(self, queue: str, number: int) -> None:
        await no_operation.options(queue=queue).enqueue(self._connection, number, 0.0)

    async def add_100_at_once(self, queue: str, jobs: Iterator[int]) -> int:
        task = no_operation.options(queue=queue)

        async def add(number: int) -> None:
            await task.submit(number, 0.0)

        return await at_once(add, jobs)

    async def add_bulk(self, queue: str, jobs: int) -> None:
        calls = [((number, 0.0), {}) for number in range(jobs)]
        await no_operation.options(queue=queue).enqueue_many(self._connection, calls)

    async def add_due(self, queue: str, jobs: int, due: float) -> None:
        for number in range(jobs):
            task = no_operation.options(queue=queue, delay=due - time())
            await task.enqueue(self._connection, number, due)

    def work(self) -> None:
        app_and_queue = "--app", "gylo_postgres:app", "--queue", QUEUE, "--database-url", URL
        size = "--processes", "1", "--concurrency", str(CONCURRENCY)
        become("gylo", "worker", *app_and_queue, *size)


if __name__ == "__main__":
    main(OnPostgres())
