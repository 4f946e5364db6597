"""A task that adds a follow-up and waits for a word. Workers import it by `ASYNCMQ_NATS_TASKS`."""

import os
from pathlib import Path

import anyio

from asyncmq_nats.context import current_job
from asyncmq_nats.tasks import task

QUEUE, WORKER, NOTES = os.environ["QUEUE"], os.environ["WORKER"], Path(os.environ["NOTES"])


@task(queue=QUEUE, name="follow")
async def follow(word: str) -> str:
    current_job().add("unnoted")
    with (NOTES / "follow.runs").open("a") as runs:
        runs.write(f"{WORKER}\n")
    while not (NOTES / word).exists():  # noqa: ASYNC110  the test's word comes from another process
        await anyio.sleep(0.01)
    return WORKER
