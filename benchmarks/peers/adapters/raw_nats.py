"""nats-py by hand: the least that a queue on JetStream does. `measuring.RawLoop` is its worker.

It publishes an outcome for each job, waits for the confirmation, and acknowledges the job then.
In bulk, all jobs are sent to one inbox of its own, and then their confirmations are awaited.
"""

import asyncio
import json
import time
import uuid

import anyio
import nats
from adapter import CONCURRENCY, QUEUE, URL, Adapter, NoWay, main, meter
from nats.aio.msg import Msg

from benchmarks.measuring import RawLoop, prepare_raw


class Loop(RawLoop):
    async def _run_job(self, msg: Msg) -> None:
        meter.note(json.loads(msg.data)["args"][0])
        await super()._run_job(msg)


async def run() -> None:
    loop = Loop(await nats.connect(URL), QUEUE, CONCURRENCY, 0.0)
    await loop.start()
    await anyio.sleep_forever()


def message(queue: str, number: int) -> tuple[str, bytes]:
    """Return the subject and the body of a job."""
    job = {"id": str(uuid.uuid4()), "task": "no_operation", "args": [number, 0.0], "kwargs": {}}
    body = json.dumps(job | {"created_at": time.time()}).encode()
    return f"{queue}.ready.{job['id']}", body


class RawNats(Adapter):
    packages = ("nats-py",)

    async def connect(self) -> None:
        self._client = await nats.connect(URL)
        self._stream = self._client.jetstream()
        self._made: set[str] = set()

    async def add(self, queue: str, number: int) -> None:
        if queue not in self._made:
            self._made.add(queue)
            await prepare_raw(self._client, queue)
        subject, body = message(queue, number)
        await self._stream.publish(subject, body, timeout=10)

    async def add_bulk(self, queue: str, jobs: int) -> None:
        left, over = jobs, asyncio.Event()

        async def on_confirmation(msg: Msg) -> None:
            nonlocal left
            if b'"error"' in msg.data:
                raise RuntimeError(msg.data)
            left -= 1
            if not left:
                over.set()

        inbox = self._client.new_inbox()
        replies = await self._client.subscribe(inbox, cb=on_confirmation)
        for number in range(jobs):
            subject, body = message(queue, number)
            await self._client.publish(subject, body, reply=inbox)
        await over.wait()
        await replies.unsubscribe()

    async def add_due(self, queue: str, jobs: int, due: float) -> None:
        raise NoWay("the loop by hand has no delayed jobs")

    def work(self) -> None:
        anyio.run(run, backend_options={"use_uvloop": True})


if __name__ == "__main__":
    main(RawNats())
