"""A clock that a test moves: SAQ has none.

SAQ takes the time of Python, not that of Redis: so it is enough to move that, and to do what the
loops of a worker would do in the meantime.
"""

import asyncio
import time


class Clock:
    def __init__(self, worker, traveller):
        self._worker = worker
        self._queue = worker.queue
        self._traveller = traveller

    async def advance(self, seconds):
        """Move the time, and run in order what is due until then."""
        end = time.time() + seconds
        while True:
            await self._run_due()
            if time.time() >= end:
                return
            waiting = await self._queue.redis.zrange(
                self._queue.namespace("incomplete"), 0, -1, withscores=True
            )
            self._traveller.move_to(min([end, *(due for _, due in waiting if due > time.time())]))

    async def _run_due(self):
        await self._queue.redis.delete(self._queue.namespace("schedule"))  # held for a second
        await self._worker.schedule()
        running = set()
        while (queued := await self._queue.count("queued")) or running:
            running |= {asyncio.create_task(self._worker.process()) for _ in range(queued)}
            _, running = await asyncio.wait(running, timeout=0.01)
