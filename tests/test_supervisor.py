"""Several worker processes under one parent: which programs can be run again."""

import subprocess
import sys

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
