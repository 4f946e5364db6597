"""The producer and the worker in TypeScript, written after docs/protocol.md, beside Python.

Skipped without Node.js, and without a network for its packages.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import nats
import pytest
from anyio import to_thread

from asyncmq_nats import NATSBackend, Queue, Settings, stop_worker
from asyncmq_nats.backends.base import Write
from asyncmq_nats.backends.nats.embedded.server import EmbeddedServer
from asyncmq_nats.store.secret import keyed_id
from tests.languages.building import build_once
from tests.nats.following import follow_untold
from tests.outbox.shown import shown_nowhere
from tests.receiver import PATIENCE, holds, until
from tests.running import make_queue, only, outcome, running

EXAMPLE = Path(__file__).parents[2] / "examples" / "node"
INSTALL_TIMEOUT = 60
BUILD_TIMEOUT = 60
INSTALL = ["npm", "ci", "--no-audit", "--no-fund", "--prefer-offline", "--fetch-retries=0"]
NO_NETWORK = re.compile(
    "ENOTFOUND|EAI_AGAIN|ECONNREFUSED|ECONNRESET|ENETUNREACH|EHOSTUNREACH|ETIMEDOUT"
    "|ERR_SOCKET_TIMEOUT|ENOTCACHED"
)

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("server")]


def build(directory: Path) -> str:
    """Install the packages and compile the example; return why not, if there is no network.

    Raises:
        AssertionError: the packages do not fit together, or the sources have errors.
    """
    shutil.copytree(EXAMPLE, directory, ignore=shutil.ignore_patterns("node_modules", "dist"))

    def run(command: list[str], timeout: float) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            command, cwd=directory, capture_output=True, text=True, timeout=timeout
        )

    try:
        done = run(INSTALL, INSTALL_TIMEOUT)
    except subprocess.TimeoutExpired:
        return f"npm did not install the packages in {INSTALL_TIMEOUT} s"
    if done.returncode and NO_NETWORK.search(done.stderr):
        return f"npm cannot install the packages: {done.stderr[-200:]}"
    assert done.returncode == 0, done.stderr
    done = run(["npm", "run", "build"], BUILD_TIMEOUT)
    assert done.returncode == 0, done.stdout + done.stderr
    return ""


@pytest.fixture(scope="session")
def node(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example, installed and compiled once for all processes of this run."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("no node and npm")
    return build_once(tmp_path_factory, "node", build)


class NodeWorker:
    """A worker in Node.js."""

    def __init__(self, process: "subprocess.Popen[bytes]", log: Path) -> None:
        self.process = process
        self._log = log

    @property
    def log(self) -> str:
        return self._log.read_text()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture
def start(node: Path, server: EmbeddedServer, tmp_path: Path) -> Any:
    """Starts workers in Node.js; all are dead at the end."""
    started: list[NodeWorker] = []

    async def begin() -> NodeWorker:
        log = tmp_path / f"node-{len(started)}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(  # noqa: ASYNC220  the test has nothing else to do
                ["node", "dist/main.js", "mixed"],
                cwd=node,
                env=os.environ | {"NATS_URL": server.url},
                stdout=output,
                stderr=output,
            )
        worker = NodeWorker(process, log)
        started.append(worker)
        await holds(lambda: "runs queue mixed" in worker.log or process.poll() is not None)
        assert process.poll() is None, worker.log
        return worker

    yield begin
    for worker in started:
        worker.kill()


@pytest.fixture
async def queue(nats_backend: NATSBackend) -> Queue:
    """The queue, which Python makes with all that a worker needs."""
    made = Queue("mixed", nats_backend)
    async with running(made):
        pass
    return made


Start = Callable[[], Any]


@asynccontextmanager
async def told(queue: Queue, *names: str) -> AsyncIterator[list[Any]]:
    """Collect events while the block runs."""
    seen: list[Any] = []

    async def listen() -> None:
        async for event in queue.events(*names):
            seen.append(event)  # noqa: PERF401  it grows while the test goes on

    async with anyio.create_task_group() as group:
        group.start_soon(listen)
        yield seen
        group.cancel_scope.cancel()


async def test_python_adds_and_node_runs(start: Start, queue: Queue) -> None:
    worker = await start()
    added = await queue.add("add", [20, 22])
    chosen = await queue.add("add", ["in", "voice"], job_id="invoice 7.pdf")
    delayed = await queue.add("add", [1, 2], delay=0.6)
    bulk = await queue.add_bulk([{"task_id": "add", "args": [n, 1]} for n in range(20)])
    assert await queue.wait_for(added, PATIENCE) == 42
    assert await queue.wait_for(chosen, PATIENCE) == "invoice"
    assert await queue.wait_for(delayed, PATIENCE) == 3
    assert [await queue.wait_for(job_id, PATIENCE) for job_id in bulk] == list(range(1, 21))
    job = await outcome(queue, chosen)
    assert job["worker"] in worker.log
    assert (await until(queue.list_workers, lambda found: bool(found)))[0].id == job["worker"]
    await only(queue, completed=23)
    worker.process.send_signal(signal.SIGTERM)
    await holds(lambda: worker.process.poll() is not None)
    assert worker.process.returncode == 0, worker.log


async def test_node_waits_for_the_time_of_a_job_that_was_made_ready_early(
    start: Start, queue: Queue, nats_backend: NATSBackend
) -> None:
    await start()
    run_at = nats_backend.now() + 0.15
    body = f'{{"task": "add", "args": [1, 2], "delay_until": {run_at}}}'.encode()
    await nats_backend.write("amq_mixed", Write("amq.mixed.ready.5.early", body))
    assert await queue.wait_for("early", PATIENCE) == 3
    assert (await outcome(queue, "early"))["active_since"] >= run_at
    assert await nats_backend.last_sequence("amq_mixed") == 1


async def test_node_retries_and_fails(start: Start, queue: Queue) -> None:
    worker = await start()
    at_once = await queue.add("flaky", [2], retries=2)
    later = await queue.add("flaky", [1], retries=1, backoff=0.7)
    too_often = await queue.add("flaky", [5], retries=1)
    refused = await queue.add("refuse", ["no card"], retries=5)
    slow = await queue.add("forever", timeout=0.2)
    assert await queue.wait_for(at_once, PATIENCE) == "after 2 failures"
    assert await queue.wait_for(later, PATIENCE) == "after 1 failures"
    assert [each["error"] for each in (await outcome(queue, at_once))["errors"]] == [
        "Error: attempt 1",
        "Error: attempt 2",
    ]
    assert {each["type"] for each in (await outcome(queue, at_once))["errors"]} == {"Error"}
    failed = await outcome(queue, too_often)
    assert (failed["status"], failed["retries"]) == ("failed", 2)
    assert failed["last_error"] == "Error: attempt 2"
    failed = await outcome(queue, refused)
    assert (failed["retries"], failed["last_error"]) == (1, "Error: no card")
    assert "it ran longer than 0.2 s" in (await outcome(queue, slow))["last_error"]
    await only(queue, completed=2, failed=3)
    assert [job["id"] for job in await queue.get_failed()].count(slow) == 1, "lists find it"
    await queue.retry_job(slow)
    await until(queue.queue_stats, lambda stats: stats["failed"] == 3 and not stats["waiting"])
    assert worker.process.poll() is None, worker.log


async def test_node_reports_progress_and_python_cancels(start: Start, queue: Queue) -> None:
    await start()
    async with told(queue) as seen:
        counting = await queue.add("count", [4])
        assert await queue.wait_for(counting, PATIENCE) == 4
        running_job = await queue.add("forever")
        await until(lambda: queue.get_job_state(running_job), lambda state: state == "active")
        await queue.cancel_job(running_job)
        assert (await outcome(queue, running_job))["status"] == "cancelled"
        # What is left of its attempt ends before these do: the first outcome stays.
        for number in range(5):
            assert await queue.wait_for(await queue.add("add", [number, 1]), PATIENCE) == number + 1
        await only(queue, completed=6, cancelled=1)
    shares = [e.data.get("progress") for e in seen if e.name == "job:progress"]
    assert shares in ([0.25, 0.5, 0.75, 1.0], shares[-4:])
    assert any(event.name == "job:started" and event.job_id == counting for event in seen)


async def test_the_job_of_a_killed_node_worker_is_run_by_the_next(
    start: Start, queue: Queue
) -> None:
    first = await start()
    job_id = await queue.add("forever", timeout=1000)
    await until(lambda: queue.get_job_state(job_id), lambda state: state == "active")
    first.kill()
    second = await start()
    async with told(queue, "job:started") as seen:
        found = await until(
            queue.list_workers, lambda found: any(job_id in w.running for w in found[-1:])
        )
        assert found[-1].since <= (found[-1].start_of(job_id) or 0) <= found[-1].heartbeat + 0.1
        await queue.cancel_job(job_id)
        assert (await outcome(queue, job_id))["status"] == "cancelled"
        await only(queue, cancelled=1)
    assert seen is not None
    assert second.process.poll() is None, second.log


async def test_what_no_task_knows_is_put_off_for_the_worker_that_does(
    start: Start, queue: Queue, nats_backend: NATSBackend
) -> None:
    node_worker = await start()
    job_id = await queue.add("only_python", ["x"])
    await until(lambda: queue.get_job(job_id), lambda job: bool(job and job["status"] == "delayed"))

    async def only_python(value: str) -> str:
        return value * 2

    node_worker.kill()  # otherwise it may be the faster one, again and again
    async with running(make_queue(nats_backend, "mixed", only_python=only_python)):
        assert await queue.wait_for(job_id, PATIENCE) == "xx"


async def test_node_fails_what_is_no_job_and_puts_off_a_later_version(
    start: Start, queue: Queue, server: EmbeddedServer
) -> None:
    await start()
    wrong = {"text": "no job", "list": "[1]", "number": '{"task": "add", "max_retries": "many"}'}
    newer = '{"v": 2, "task": "add", "args": {"of": "another kind"}}'
    client = await nats.connect(server.url)
    stream = client.jetstream()
    delayed = await client.subscribe("amq.mixed.event.delayed.newer")
    for job_id, text in {**wrong, "newer": newer}.items():
        await stream.publish(f"amq.mixed.ready.5.{job_id}", text.encode())
    errors = {job_id: (await outcome(queue, job_id))["last_error"] for job_id in wrong}
    assert errors == {
        "text": "it is not a JSON object",
        "list": "it is not a JSON object",
        "number": "max_retries: not what the protocol says",
    }
    key = "$KV.amq_mixed_scheduler.done.text.failed"
    record = await stream.get_last_msg("KV_amq_mixed_scheduler", key)
    assert json.loads(record.data or b"")["body"] == "no job"
    put_off = json.loads((await delayed.next_msg(PATIENCE)).data)
    assert (put_off["args"], put_off["put_offs"]) == ({"of": "another kind"}, 1)
    assert "version 2" in put_off["put_off_reason"]
    await client.close()


async def test_node_starts_nothing_that_it_holds_while_the_queue_is_paused(
    start: Start, queue: Queue, caplog: pytest.LogCaptureFixture
) -> None:
    await start()
    busy = [await queue.add("forever") for _ in range(10)]
    held = await queue.add("add", [1, 2])  # it has ten slots
    await until(lambda: queue.get_job_state(held), lambda state: state == "active")
    await queue.pause()
    assert "no answer" not in caplog.text
    for job_id in busy:
        await queue.cancel_job(job_id)
    await only(queue, cancelled=10, active=1)
    resumed = time.time()
    await queue.resume()
    assert await queue.wait_for(held, PATIENCE) == 3
    assert (await outcome(queue, held))["active_since"] >= resumed - 0.001  # in milliseconds
    await only(queue, completed=1, cancelled=10)


async def test_node_stops_when_python_says_so(
    start: Start, queue: Queue, nats_backend: NATSBackend
) -> None:
    worker = await start()
    (entry,) = await until(queue.list_workers, lambda found: bool(found))
    assert str(entry.version).startswith("node ")
    assert await stop_worker(nats_backend, entry.id)
    await holds(lambda: worker.process.poll() is not None)
    assert worker.process.returncode == 0, worker.log


async def test_a_child_in_python_waits_for_a_parent_in_node(
    start: Start, queue: Queue, nats_backend: NATSBackend
) -> None:
    await start()
    parent = await queue.add("add", [1, 1], delay=0.5)
    child = await queue.add("add", [2, 2], depends_on=[parent])
    async with running(make_queue(nats_backend, "mixed", add=lambda a, b: a + b)):
        assert await queue.wait_for(child, PATIENCE) == 4


async def test_the_worker_program_ends_when_its_server_is_gone(
    queue: Queue, start: Start, server: EmbeddedServer
) -> None:
    """A supervisor starts it again: it gives up after ten attempts to connect, in 20 seconds."""
    worker = await start()
    server.kill()
    await holds(lambda: worker.process.poll() is not None)
    assert (worker.process.returncode, worker.log.splitlines()[-1]) == (1, "the server is gone")


async def test_the_producer_in_node_follows_its_job(
    node: Path, server: EmbeddedServer, nats_backend: NATSBackend
) -> None:
    async with running(make_queue(nats_backend, "mixed", echo=lambda text: text)):
        done = await to_thread.run_sync(
            lambda: subprocess.run(
                ["npm", "run", "--silent", "produce", "--", "mixed", "echo", '["ä ✓"]'],
                cwd=node,
                env=os.environ | {"NATS_URL": server.url},
                capture_output=True,
                text=True,
                timeout=PATIENCE,
            )
        )
    assert done.returncode == 0, done.stderr
    added, *events = done.stdout.splitlines()
    assert added.startswith("added ")
    assert events[-2:] == ["completed", 'result "ä ✓"']
    assert events[:-2] in ([], ["started"])


async def test_the_producer_in_node_learns_of_an_end_that_it_was_not_told(
    node: Path, server: EmbeddedServer, nats_backend: NATSBackend
) -> None:
    queue = make_queue(nats_backend, "mixed", echo=lambda text: text)
    command = ["npm", "run", "--silent", "produce", "--", "mixed", "echo", '["late"]']
    printed = await follow_untold(command, "NATS_URL", queue, server, cwd=node)
    assert printed[1:] == ["completed", 'result "late"']


def test_both_promote_under_the_same_message_id(node: Path) -> None:
    source = """
import { promotionId } from "./dist/protocol.js";
const secret = new TextEncoder().encode("ab".repeat(32));
console.log(promotionId(secret, 7, 1764220338123456789));
"""
    done = subprocess.run(
        ["node", "--input-type=module", "-e", source],
        cwd=node,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    time = 1764220338123456789 / 1e9
    assert done.stdout.strip() == keyed_id(b"ab" * 32, "released", "7", repr(time)), done.stderr


async def test_the_example_of_the_page(start: Start, queue: Queue) -> None:
    assert shown_nowhere("docs/languages.md", "examples/node/src/main.ts", language="ts") == []
    page = (EXAMPLE.parents[1] / "docs" / "languages.md").read_text()
    (source,) = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    await start()
    program = source.replace('Queue("node")', "Queue('mixed', backend)")
    body = "".join(f"    {line}\n" for line in program.splitlines())
    names: dict[str, Any] = {"Queue": Queue, "backend": queue.backend}
    exec(f"async def main():\n{body}", names)
    await names["main"]()


def test_the_types_have_the_fields_of_the_page() -> None:
    page = (EXAMPLE.parents[1] / "docs" / "protocol.md").read_text()
    types = (EXAMPLE / "src" / "wire.ts").read_text()

    def fields(name: str) -> set[str]:
        (body,) = re.findall(rf"^(?:export )?interface {name}\b.*?{{\n(.*?)^}}", types, re.M | re.S)
        return set(re.findall(r"^  (\w+)\??:", body, re.M))

    def section(title: str) -> str:
        (text,) = re.findall(rf"^##+ {title}\n(.*?)(?=^##)", page, re.M | re.S)
        return str(text)

    def rows(title: str) -> set[str]:
        firsts = re.findall(r"^\| (`.*?) \|", section(title), re.M)
        return {name for first in firsts for name in re.findall(r"`(.+?)`", first)}

    def names(text: str) -> set[str]:
        (listed,) = re.findall(r"`{(.*?)}`", text, re.S)
        return set(re.findall(r'"(\w+)"', listed))

    assert fields("Job") == rows("The job")
    ends = {"Ended", "Completed", "Failed", "Expired", "Cancelled"}
    of_ends = {field for name in ends for field in fields(name)} - {"body"}  # told in the text
    assert of_ends == rows("Outcome") - fields("Job")
    assert fields("Claim") == names(section("Claim"))
    assert fields("WorkerEntry") == names(page[page.index("An entry of the worker list") :][:400])
    told = section("Events").split("\n\n")
    of_the_server = set(re.findall(r"`(\w+)`", told[0])) - {"what"}
    of_workers = set(re.findall(r"^\| `amq\.email\.event\.(\w+)", section("Events"), re.M))
    assert fields("EventBodies") == of_the_server | of_workers


def test_the_lockfile_names_no_registry() -> None:
    assert '"resolved"' not in (EXAMPLE / "package-lock.json").read_text()


@pytest.fixture
def settings() -> Settings:
    return Settings(stalled_after=1.0, shutdown_timeout=5.0, unknown_task_timeout=3600)
