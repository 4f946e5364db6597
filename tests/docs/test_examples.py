"""Each example, run as a user would: a program of its own.

worker.py and producer.py together are in test_compose.py.
"""

import os
import re
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO

import pytest

from asyncmq_nats import NATSBackend, Queue
from asyncmq_nats.backends.nats.embedded.server import EmbeddedServer
from asyncmq_nats.runtime.registry import TaskRegistry
from tests.nats.following import follow_untold
from tests.receiver import PATIENCE

EXAMPLES = Path(__file__).parents[2] / "examples"

pytestmark = pytest.mark.usefixtures(
    "server"
)  # skipped, or an error in CI, without a server program


def run_example(name: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {key: value for key, value in os.environ.items() if not key.startswith("ASYNCMQ_NATS_")}
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    return subprocess.run(
        command, env=clean | environment, capture_output=True, text=True, timeout=2 * PATIENCE
    )


def start_example(name: str, **environment: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-u", str(EXAMPLES / name)]
    return subprocess.Popen(
        command,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def read_to(expected: str, output: IO[str] | None) -> str:
    """Read lines until one has the expected text in it; return that."""
    assert output is not None
    return next(line for line in output if expected in line)


def is_served(url: str) -> bool:
    try:
        socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=5).close()
    except ConnectionRefusedError:
        return False
    return True


def test_quickstart_with_a_server_of_its_own() -> None:
    done = run_example("quickstart.py")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    assert "207 jobs added" in done.stdout
    assert "207 of 207 done" in done.stdout
    assert "206 completed, 1 failed, as it should." in done.stdout
    assert "\x1b" not in done.stdout, "no control characters in a pipe"
    assert max(map(len, done.stdout.splitlines())) <= 120


@pytest.mark.slow
def test_quickstart_on_a_given_server_can_be_run_again(server: EmbeddedServer) -> None:
    for _ in range(2):
        done = run_example("quickstart.py", ASYNCMQ_NATS_SERVERS=server.url)
        assert done.returncode == 0, done.stdout + done.stderr
        assert server.url.rpartition("@")[2] in done.stdout
        assert "206 completed, 1 failed, as it should." in done.stdout


@pytest.mark.slow
def test_quickstart_minds_its_own_jobs_only(server: EmbeddedServer) -> None:
    killed = start_example("quickstart.py", ASYNCMQ_NATS_SERVERS=server.url)
    read_to("of 207 done", killed.stdout)
    killed.kill()
    killed.communicate()
    with ThreadPoolExecutor() as threads:
        both = list(
            threads.map(
                lambda _: run_example("quickstart.py", ASYNCMQ_NATS_SERVERS=server.url), range(2)
            )
        )
    for done in both:
        assert done.returncode == 0, done.stdout + done.stderr
        assert "206 completed, 1 failed, as it should." in done.stdout


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_quickstart_and_its_server(number: signal.Signals) -> None:
    run = start_example("quickstart.py")
    url = re.sub(".* at ", "", read_to("an embedded nats-server", run.stdout).strip())
    assert is_served(url)
    for _ in range(
        2
    ):  # as if it came from the terminal, and from a program around it that passes it on
        run.send_signal(number)
    _, errors = run.communicate(timeout=PATIENCE)
    assert (run.returncode, errors) == (128 + number, f"\nStopped by {number.name}.\n")
    assert not is_served(url)


def test_quickstart_ends_with_its_server_when_its_reader_has_gone() -> None:
    run = start_example("quickstart.py")
    url = re.sub(".* at ", "", read_to("an embedded nats-server", run.stdout).strip())
    assert run.stdout is not None
    run.stdout.close()
    assert run.wait(timeout=PATIENCE) == 1
    assert run.stderr is not None
    with run.stderr:
        assert run.stderr.read() == ""
    assert not is_served(url)


@pytest.mark.parametrize(
    ("name", "variable", "value"),
    [
        ("worker.py", "CONCURRENCY", "many"),
        ("worker.py", "CONCURRENCY", "0"),
        ("worker.py", "LOG_LEVEL", "LOUD"),
        ("producer.py", "INTERVAL", "-1"),
        ("producer.py", "JOBS", "all"),
    ],
)
def test_a_value_that_cannot_work_is_named_in_one_line(
    name: str, variable: str, value: str
) -> None:
    done = run_example(name, **{variable: value})
    assert done.returncode == 1
    assert re.fullmatch(rf"{variable} must be .*, not '{value}'\n", done.stderr)


@pytest.mark.parametrize(
    "name", ["quickstart.py", "worker.py", "producer.py", "plain_nats_producer.py"]
)
def test_without_a_server_an_example_says_so(name: str) -> None:
    done = run_example(
        name, ASYNCMQ_NATS_SERVERS="nats://127.0.0.1:1", ASYNCMQ_NATS_CONNECT_TIMEOUT="0.5"
    )
    assert done.returncode == 1
    assert done.stderr.startswith("cannot reach NATS at nats://127.0.0.1:1: ")
    assert done.stderr.count("\n") == 1


def test_plain_producer_without_a_worker_says_so(server: EmbeddedServer) -> None:
    done = run_example("plain_nats_producer.py", ASYNCMQ_NATS_SERVERS=server.url)
    assert done.returncode == 1
    assert done.stderr == "There is no queue 'examples' yet: start a worker first.\n"


def test_plain_producer_adds_a_job_and_follows_it(server: EmbeddedServer) -> None:
    environment = {**os.environ, "ASYNCMQ_NATS_SERVERS": server.url}
    worker = subprocess.Popen(
        [sys.executable, str(EXAMPLES / "worker.py")],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert worker.stderr is not None
        assert any("runs queue examples" in line for line in worker.stderr)
        done = run_example(
            "plain_nats_producer.py", "four words in all", ASYNCMQ_NATS_SERVERS=server.url
        )
    finally:
        worker.terminate()
        worker.communicate(timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    added, *events = done.stdout.splitlines()
    assert added.startswith("added ")
    assert events[-1] == "completed: 4"
    assert events[:-1] in ([], ["started"])
    assert worker.returncode == 0


async def count_words(text: str) -> int:
    return len(text.split())


async def test_plain_producer_learns_of_an_end_that_it_was_not_told(
    server: EmbeddedServer, nats_backend: NATSBackend
) -> None:
    registry = TaskRegistry()
    registry.register(count_words, queue="examples", name="tasks.count_words")
    queue = Queue("examples", nats_backend, registry=registry)
    command = [sys.executable, "-u", str(EXAMPLES / "plain_nats_producer.py"), "too late"]
    printed = await follow_untold(command, "ASYNCMQ_NATS_SERVERS", queue, server)
    assert printed[1:] == ["completed: 2"]
