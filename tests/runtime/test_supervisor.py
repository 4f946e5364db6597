"""Several worker processes under one parent: which programs can be run again."""

import subprocess
import sys

import anyio

from asyncmq_nats.runtime.supervisor import _Child

PROGRAM = """
import asyncmq_nats
asyncmq_nats.Worker(asyncmq_nats.Queue("work"), processes=2).start()
"""


def test_a_program_from_standard_input_cannot_be_run_again_and_is_told_so() -> None:
    for arguments in ([], ["-"]):
        done = subprocess.run(
            [sys.executable, *arguments],
            input=PROGRAM,
            capture_output=True,
            text=True,
            timeout=50,
            check=False,
        )
        assert done.returncode == 1
        assert "the program again, so it must be a file" in done.stderr
        assert "processes=1" in done.stderr


async def test_a_child_that_has_just_ended_by_itself_can_be_told_to_end() -> None:
    """Its code is not known yet: the system has no such process any more."""
    async with await anyio.open_process([sys.executable, "-c", ""]) as process:
        child = _Child(process)
        await process.wait()
        child.end()
        assert child.is_told
