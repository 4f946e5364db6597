"""Each example, run as a user would: a program of its own. worker.py and producer.py together are in test_compose.py."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from asyncmq_nats.backends.nats.embedded import EmbeddedServer

EXAMPLES = Path(__file__).parents[1] / "examples"

pytestmark = pytest.mark.usefixtures("server")  # skipped, or an error in CI, without a server program


def run_example(name: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {key: value for key, value in os.environ.items() if not key.startswith("ASYNCMQ_NATS_")}
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    return subprocess.run(command, env=clean | environment, capture_output=True, text=True, timeout=40)


def test_quickstart_with_a_server_of_its_own() -> None:
    done = run_example("quickstart.py")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    assert "207 jobs added" in done.stdout
    assert "207 of 207 done" in done.stdout
    assert "206 completed, 1 failed, as it should." in done.stdout
    assert "\x1b" not in done.stdout, "no control characters in a pipe"
    assert max(map(len, done.stdout.splitlines())) <= 120


def test_quickstart_on_a_given_server_can_be_run_again(server: EmbeddedServer) -> None:
    for _ in range(2):
        done = run_example("quickstart.py", ASYNCMQ_NATS_SERVERS=server.url)
        assert done.returncode == 0, done.stdout + done.stderr
        assert server.url in done.stdout
        assert "206 completed, 1 failed, as it should." in done.stdout


@pytest.mark.parametrize("name", ["quickstart.py", "worker.py", "producer.py"])
def test_without_a_server_an_example_says_so(name: str) -> None:
    done = run_example(name, ASYNCMQ_NATS_SERVERS="nats://127.0.0.1:1", ASYNCMQ_NATS_CONNECT_TIMEOUT="0.5")
    assert done.returncode == 1
    assert done.stderr.startswith("cannot reach NATS at nats://127.0.0.1:1: ")
    assert done.stderr.count("\n") == 1


def test_plain_producer_without_a_worker_says_so(server: EmbeddedServer) -> None:
    done = run_example("plain_nats_producer.py", ASYNCMQ_NATS_SERVERS=server.url)
    assert done.returncode == 1
    assert done.stderr == "There is no queue 'examples' yet: start a worker first.\n"


def test_plain_producer_adds_a_job_and_follows_it(server: EmbeddedServer) -> None:
    environment = {**os.environ, "ASYNCMQ_NATS_SERVERS": server.url}
    worker = subprocess.Popen([sys.executable, str(EXAMPLES / "worker.py")], env=environment, stderr=subprocess.PIPE, text=True)
    try:
        assert worker.stderr is not None
        assert any("runs queue examples" in line for line in worker.stderr)
        done = run_example("plain_nats_producer.py", "four words in all", ASYNCMQ_NATS_SERVERS=server.url)
    finally:
        worker.terminate()
        worker.communicate(timeout=20)
    assert done.returncode == 0, done.stderr
    added, *events = done.stdout.splitlines()
    assert added.startswith("added ")
    assert events == ["waiting", "started", "completed: 4"]
    assert worker.returncode == 0
