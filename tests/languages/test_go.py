"""The producer in Go, written after docs/protocol.md, beside Python.

Skipped without Go, and without the packages of nats.go: Debian's, or those of a module proxy.
"""

import os
import re
import shutil
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import anyio
import pytest

from asyncmq_nats import NATSBackend, Queue
from asyncmq_nats.backends.nats.embedded.server import EmbeddedServer
from tests.languages.building import build_once
from tests.nats.following import follow_untold
from tests.nats.relay import Relay, relaying
from tests.outbox.shown import shown_nowhere
from tests.receiver import PATIENCE
from tests.running import make_queue, only, running

EXAMPLE = Path(__file__).parents[2] / "examples" / "go"
PACKAGES = Path("/usr/share/gocode")
"""Where Debian's golang-github-nats-io-go-nats-dev is."""
BUILD_TIMEOUT = 120
NO_MODULES = re.compile("no such host|connection refused|i/o timeout|network is unreachable")

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("server")]


def build(directory: Path) -> str:
    """Compile the example; return why not, if its packages are not to be had.

    Raises:
        AssertionError: the source has errors.
    """
    shutil.copytree(EXAMPLE, directory)
    environment = os.environ | {"GOCACHE": str(directory.parent / "go-cache")}

    def run(*command: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            ["go", *command],
            cwd=directory,
            env=environment,
            capture_output=True,
            text=True,
            timeout=BUILD_TIMEOUT,
        )

    if (PACKAGES / "src/github.com/nats-io/nats.go").is_dir():
        environment |= {"GO111MODULE": "off", "GOPATH": str(PACKAGES)}
    else:
        tidied = run("mod", "tidy")
        if tidied.returncode and NO_MODULES.search(tidied.stderr):
            return f"no packages of nats.go: {tidied.stderr[-200:]}"
        assert tidied.returncode == 0, tidied.stderr
    for command in (("vet", "producer.go"), ("build", "producer.go")):
        done = run(*command)
        assert done.returncode == 0, done.stderr
    return ""


@pytest.fixture(scope="session")
def producer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program, compiled once for all processes of this run."""
    if shutil.which("go") is None:
        pytest.skip("no go")
    return build_once(tmp_path_factory, "go", build) / "producer"


@pytest.fixture
async def relay(server: EmbeddedServer) -> AsyncIterator[Relay]:
    async with relaying(server) as relay:
        yield relay


@pytest.fixture
async def queue(nats_backend: NATSBackend) -> AsyncIterator[Queue]:
    """A queue with a worker in Python."""

    async def count_words(text: str) -> int:
        return len(text.split())

    async with running(made := make_queue(nats_backend, "words", count_words=count_words)):
        yield made


async def produce(producer: Path, url: str, *arguments: str) -> tuple[int, str]:
    """Run the producer; return how it exited, and all that it printed."""
    with anyio.fail_after(PATIENCE):
        done = await anyio.run_process(
            [str(producer), *arguments],
            env=os.environ | {"NATS_URL": url},
            stderr=subprocess.STDOUT,
            check=False,
        )
    return done.returncode, done.stdout.decode()


async def test_go_adds_and_python_runs(
    producer: Path, server: EmbeddedServer, queue: Queue
) -> None:
    code, printed = await produce(
        producer, server.url, "words", "count_words", '["three words, no"]'
    )
    lines = printed.splitlines()
    assert (code, lines[-1]) == (0, "completed 3"), printed
    job = await queue.get_job(lines[0].removeprefix("added "))
    assert job is not None
    assert (job["args"], job["max_retries"]) == (["three words, no"], 2)
    await only(queue, completed=1)


async def test_a_job_that_fails_is_told_to_go(
    producer: Path, server: EmbeddedServer, queue: Queue
) -> None:
    code, printed = await produce(producer, server.url, "words", "count_words", "[]")
    assert code == 1
    assert re.search(r"^failed .*count_words", printed, re.MULTILINE), printed
    await only(queue, failed=1)


async def test_a_publish_without_an_answer_is_repeated_and_stored_once(
    producer: Path, queue: Queue, relay: Relay
) -> None:
    relay.lose_answer(rb"HPUB amq\.words\.ready\.")

    async def cut() -> None:
        await relay.lost.wait()
        await relay.cut()

    async with anyio.create_task_group() as group:
        group.start_soon(cut)
        code, printed = await produce(producer, relay.url, "words", "count_words", '["one"]')
    assert printed.count("added") == 1
    assert (code, printed.splitlines()[-1]) == (0, "completed 1"), (
        "it reads the outcome whose event it missed"
    )
    await only(queue, completed=1)


async def test_go_learns_of_an_end_that_it_was_not_told(
    producer: Path, server: EmbeddedServer, nats_backend: NATSBackend
) -> None:
    queue = make_queue(nats_backend, "lonely", count=len)
    command = [str(producer), "lonely", "count", '["late"]']
    printed = await follow_untold(command, "NATS_URL", queue, server)
    assert printed[1:] == ["completed 4"]


async def test_what_cannot_be_added_is_said_in_a_line(
    producer: Path, server: EmbeddedServer
) -> None:
    assert await produce(producer, server.url, "nowhere", "count_words", "[]") == (
        1,
        'there is no queue "nowhere": run a worker of it once\n',
    )
    assert await produce(producer, server.url, "nowhere", "count_words", "{}") == (
        1,
        "the arguments are no JSON array: {}\n",
    )


def test_the_pages_show_what_the_program_does() -> None:
    for page in ("docs/protocol.md", "docs/languages.md"):
        assert shown_nowhere(page, "examples/go/producer.go", language="go") == []
