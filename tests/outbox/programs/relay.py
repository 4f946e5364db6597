"""A relay as a process of its own.

With `DIE_AT` it kills itself at that step: `<call>:<before|after>:<how many-th>`.
"""

import logging
import os
import signal
from collections.abc import Callable
from typing import Any

import anyio

from asyncmq_nats.contrib.outbox.relay import Relay
from asyncmq_nats.contrib.outbox.store import OutboxStore
from asyncmq_nats.queues import Queue

OWNERS: dict[str, Any] = {
    "take": OutboxStore,
    "finish": OutboxStore,
    "enqueue": Queue,
    "enqueue_bulk": Queue,
}


def die_at(step: str) -> None:
    name, moment, times = step.split(":")
    original: Callable[..., Any] = getattr(OWNERS[name], name)
    left = int(times)

    async def dying(*args: Any, **kwargs: Any) -> Any:
        nonlocal left
        left -= 1
        if not left and moment == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = await original(*args, **kwargs)
        if name == "take" and not result:
            left += 1  # only steps that do something count
        elif not left:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(OWNERS[name], name, dying)


async def main() -> None:
    relay = Relay(
        os.environ["DATABASE"],
        batch_size=int(os.environ.get("BATCH", "500")),
        poll_interval=float(os.environ.get("POLL", "0.1")),
        lease=float(os.environ.get("LEASE", "0.5")),
    )
    async with anyio.create_task_group() as group:
        await group.start(relay.run)
        print("relays", flush=True)


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    if "DIE_AT" in os.environ:
        die_at(os.environ["DIE_AT"])
    anyio.run(main)
