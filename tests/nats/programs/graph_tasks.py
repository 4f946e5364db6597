"""The task of the graphs that `test_flows_under_fire.py` runs.

Workers import it by `ASYNCMQ_NATS_TASKS`.
"""

import os
from pathlib import Path

import anyio

from asyncmq_nats.context import current_job
from asyncmq_nats.tasks import task

TRACE = Path(os.environ["NOTES"]) / "trace"


def trace(word: str, number: int) -> None:
    """Append a line.

    A short line is appended as a whole, so the lines are in the order in which things happened.
    """
    with TRACE.open("a") as lines:
        lines.write(f"{word} {number}\n")


@task(queue=os.environ["QUEUE"], name="node")
async def node(number: int, failures: int, seconds: float) -> int:
    """Fail this many times, then complete."""
    trace("start", number)
    await anyio.sleep(seconds)
    if current_job().attempt <= failures:
        raise ValueError("as it was told")
    trace("end", number)
    return number
