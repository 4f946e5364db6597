"""The example runs, and the page shows parts of it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from asyncmq_nats.backends.nats.embedded.server import EmbeddedServer
from tests.outbox.shown import shown_nowhere
from tests.receiver import PATIENCE

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "outbox.py"


def test_the_example_runs(server: EmbeddedServer) -> None:
    done = subprocess.run(
        [sys.executable, str(EXAMPLE)],
        env=os.environ | {"ASYNCMQ_NATS_SERVERS": server.url},
        capture_output=True,
        text=True,
        timeout=2 * PATIENCE,
    )
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0] == "no order and no job for eve: the card is refused"
    assert lines[-1] == "5 jobs done"
    steps = [line for line in lines if "balance" in line]
    assert steps == [f"  balance of ada, step {step}" for step in (1, 2, 3)]


def test_what_the_page_shows_is_in_the_example() -> None:
    assert shown_nowhere("docs/outbox.md", "examples/outbox.py") == []


@pytest.mark.parametrize("option", ["batch-size", "poll-interval", "lease"])
def test_the_page_has_the_options_of_the_command(option: str) -> None:
    assert f"| `{option}` |" in (ROOT / "docs" / "outbox.md").read_text()
