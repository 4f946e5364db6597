"""A producer that is killed when `KILL_AFTER` of its messages are on their way to the server.

It adds a flow of `JOBS` jobs, or if `WAY` is `add` a job that depends on `JOBS` - 1 others.
"""

import os
import signal
from collections.abc import Iterable
from typing import Any

import anyio

from asyncmq_nats.backends.nats._client.client import DirectClient
from asyncmq_nats.backends.nats.backend import NATSBackend
from asyncmq_nats.flow import FlowProducer
from asyncmq_nats.jobs import Job
from asyncmq_nats.queues import Queue
from asyncmq_nats.transitions import parked, plan

plan.PLAN_TIMEOUT = parked.LINK_TIMEOUT = 2.0  # type: ignore[misc]
QUEUE, JOBS, KILL_AFTER = (
    os.environ["QUEUE"],
    int(os.environ["JOBS"]),
    int(os.environ["KILL_AFTER"]),
)

posted = 0
post = DirectClient.post


def post_and_die(self: DirectClient, subject: bytes, *args: Any) -> None:
    global posted
    ours = subject.startswith(b"$KV.") or b".ready." in subject
    if ours:
        if KILL_AFTER == 0:
            die(self)
        posted += 1
    post(self, subject, *args)
    if posted == KILL_AFTER and ours:
        die(self)


def post_all_and_die(self: DirectClient, messages: Iterable[Any]) -> None:
    for message in messages:
        post_and_die(self, *message)


def patch_client() -> None:
    DirectClient.post = post_and_die  # type: ignore[method-assign, assignment]
    DirectClient.post_all = post_all_and_die  # type: ignore[method-assign]


def die(client: Any) -> None:
    """Hand what is buffered to the operating system, which sends it after this process is gone."""
    if client._pending:
        client._transport.writelines(client._pending[:])
    os.kill(os.getpid(), signal.SIGKILL)


async def main() -> None:
    backend = NATSBackend()
    await backend.connect()
    queue = Queue(QUEUE, backend)
    await queue._assets.declare()
    await queue._additions.dependencies.parked.secret.get()
    root = Job(task_id="unnoted", max_retries=0)
    children = [
        Job(task_id="unnoted", max_retries=0, depends_on=[root.job_id]) for _ in range(JOBS - 2)
    ]
    last = Job(task_id="unnoted", max_retries=0, depends_on=[child.job_id for child in children])
    if os.environ["WAY"] == "add":
        parents = await queue.add_bulk([{"task_id": "unnoted"}] * (JOBS - 1))
        patch_client()
        await queue.add("unnoted", depends_on=parents)
    else:
        patch_client()
        await FlowProducer(backend).add_flow(QUEUE, [root, *children, last])
    die(backend._require_connection().client)


if __name__ == "__main__":
    anyio.run(main)
