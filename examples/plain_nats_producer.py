"""A producer without asyncmq-nats: one publish adds a job, one subscription follows it.

See docs/protocol.md. python examples/plain_nats_producer.py [text]

Needs nats-py only, and a worker: python examples/worker.py
"""

import asyncio
import json
import os
import sys
import time
import uuid

import nats.errors
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.js.errors import NoStreamResponseError

SERVERS = os.environ.get("ASYNCMQ_NATS_SERVERS") or "nats://127.0.0.1:4222"
PATIENCE = 3.0  # seconds
PREFIX, QUEUE, PRIORITY = "amq", "examples", 5
ENDS = ("completed", "failed", "expired", "cancelled")


async def main(text: str) -> int:
    client = await connect()
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
    # Before the publish: an event reaches the subscribers of its moment, and is not kept.
    await client.subscribe(f"{PREFIX}.{QUEUE}.event.*.{job_id}", cb=events.put)
    try:
        # The message id makes it safe to publish again if no answer comes.
        subject, headers = f"{PREFIX}.{QUEUE}.ready.{PRIORITY}.{job_id}", {"Nats-Msg-Id": job_id}
        await client.jetstream().publish(
            subject, json.dumps(job).encode(), timeout=PATIENCE, headers=headers
        )
        print(f"added {job_id}", flush=True)
        return await follow(client, job_id, events)
    except NoStreamResponseError:
        print(f"There is no queue {QUEUE!r} yet: start a worker first.", file=sys.stderr)
        return 1
    except nats.errors.Error as error:
        print(f"job {job_id} may not have been added: {error}", file=sys.stderr)
        return 1
    finally:
        await client.close()


async def connect() -> Client:
    """Connect to one of the servers.

    Left alone, nats-py would try for ever, and print each failure with a traceback.
    """
    client, failures = Client(), []

    async def note(error: Exception) -> None:
        failures.append(error)

    try:
        async with asyncio.timeout(PATIENCE):
            await client.connect(SERVERS.split(","), error_cb=note, max_reconnect_attempts=-1)
    except (TimeoutError, OSError, nats.errors.Error) as error:
        await client.close()
        sys.exit(f"cannot reach NATS at {SERVERS}: {failures[-1] if failures else error}")
    return client


async def follow(client: Client, job_id: str, events: asyncio.Queue[Msg]) -> int:
    """Print the events of the job until it has ended."""
    while True:
        what, body = await next_event(client, job_id, events)
        if what in ENDS:
            outcome = json.loads(body)
            shown = outcome["result"] if what == "completed" else outcome["last_error"]
            print(f"{what}: {shown}", flush=True)
            return 0 if what == "completed" else 1
        if what:
            print(what, flush=True)


async def next_event(client: Client, job_id: str, events: asyncio.Queue[Msg]) -> tuple[str, bytes]:
    """Return the next event and its body.

    Events are lost with a connection: when none has come for a while, read how the job has ended.
    """
    try:
        async with asyncio.timeout(PATIENCE):
            event = await events.get()
    except TimeoutError:
        return await read_outcome(client, job_id)
    removed = "KV-Operation" in (event.headers or {})
    return ("", b"") if removed else (event.subject.split(".")[3], event.data)


async def read_outcome(client: Client, job_id: str) -> tuple[str, bytes]:
    """Return how the job has ended, and its outcome; "" if it has not, or no server answers."""
    bucket = f"{PREFIX}_{QUEUE}_scheduler"
    keys = [f"$KV.{bucket}.done.{job_id}.{end}" for end in ENDS]
    request = json.dumps({"multi_last": keys}).encode()
    try:
        answer = await client.request(f"$JS.API.DIRECT.GET.KV_{bucket}", request, timeout=PATIENCE)
    except nats.errors.TimeoutError:
        return "", b""
    headers = answer.headers or {}
    if headers.get("Status") == "404":
        return "", b""
    return headers["Nats-Subject"].rpartition(".")[2], answer.data


if __name__ == "__main__":
    try:
        code = asyncio.run(main(" ".join(sys.argv[1:]) or "six words, counted in a worker"))
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:
        # The reader has gone, as with `| head`: drop what is still to be written.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    sys.exit(code)
