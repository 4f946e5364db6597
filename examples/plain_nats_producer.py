"""A producer without asyncmq-nats: one publish adds a job, one subscription follows it. See docs/protocol.md.

    python examples/plain_nats_producer.py [text]

Needs nats-py only, and a worker: python examples/worker.py
"""

import asyncio
import json
import os
import sys
import time
import uuid

import nats
from nats.aio.msg import Msg
from nats.js.errors import NoStreamResponseError

PREFIX, QUEUE, PRIORITY = "amq", "examples", 5
ENDS = ("completed", "failed", "expired", "cancelled")


async def main(text: str) -> int:
    client = await nats.connect(os.environ.get("ASYNCMQ_NATS_SERVERS", "nats://127.0.0.1:4222").split(","), connect_timeout=5)
    job_id = str(uuid.uuid4())
    job = {
        "v": 1,
        "id": job_id,
        "task": "tasks.count_words",
        "args": [text],
        "kwargs": {},
        "created_at": time.time(),
        "max_retries": 2,
        "backoff": 2,
        "priority": PRIORITY,
    }
    events: asyncio.Queue[Msg] = asyncio.Queue()
    # Before the publish: an event is heard by whoever listens, and kept for nobody.
    await client.subscribe(f"{PREFIX}.{QUEUE}.event.*.{job_id}", cb=events.put)
    try:
        # The message id makes it safe to publish again if no answer comes.
        subject, headers = f"{PREFIX}.{QUEUE}.ready.{PRIORITY}.{job_id}", {"Nats-Msg-Id": job_id}
        await client.jetstream().publish(subject, json.dumps(job).encode(), timeout=5, headers=headers)
        print(f"added {job_id}", flush=True)
        return await follow(events)
    except NoStreamResponseError:
        print(f"There is no queue {QUEUE!r} yet: start a worker first.", file=sys.stderr)
        return 1
    finally:
        await client.close()


async def follow(events: asyncio.Queue[Msg]) -> int:
    """Print the events of the job until it has ended."""
    while True:
        event = await events.get()
        what = event.subject.split(".")[3]
        if what not in ENDS:
            print(what, flush=True)
            continue
        outcome = json.loads(event.data)
        print(f"{what}: {outcome['result'] if what == 'completed' else outcome['last_error']}", flush=True)
        return 0 if what == "completed" else 1


if __name__ == "__main__":
    sys.exit(asyncio.run(main(" ".join(sys.argv[1:]) or "six words, counted in a worker")))
