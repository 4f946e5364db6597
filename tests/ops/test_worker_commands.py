"""`worker` and `server` of the command line, on real servers; programs are processes."""

import json
import os
import re
import sys
from pathlib import Path

import anyio
import pytest
from anyio import to_thread

from asyncmq_nats.backends.nats.backend import NATSBackend
from asyncmq_nats.backends.nats.embedded.server import EmbeddedServer
from asyncmq_nats.cli import worker as commands
from asyncmq_nats.cli.app import run
from asyncmq_nats.cli.command import CommandFailed
from asyncmq_nats.queues import Queue
from asyncmq_nats.workers import Worker
from tests.ops.programs import started
from tests.receiver import PATIENCE
from tests.running import counted, only

AMQ = [sys.executable, "-m", "asyncmq_nats"]
SHOP = """
import os
from asyncmq_nats import NATSBackend, Queue, Worker, task

@task(queue="mail")
async def mail() -> int:
    return os.getpid()

@task(queue="reports")
async def reports() -> int:
    return os.getpid()

queues = [Queue("reports", NATSBackend(os.environ.get("NATS_URL")))]
"""


@pytest.fixture
def app(tmp_path: Path) -> Path:
    """A directory with the module `shop`."""
    (tmp_path / "app").mkdir()
    (tmp_path / "app" / "shop.py").write_text(SHOP)
    return tmp_path / "app"


async def amq(*arguments: str) -> int:
    """Run a command in a thread, as it has an event loop of its own; return its exit code."""
    return await to_thread.run_sync(run, arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--tasks", "shop"],
        ["mail", "reports", "--tasks", "shop", "-c", "mail:2,reports:1", "--processes", "2"],
        ["mail", "reports", "-c", "mail:2", "reports:1", "--tasks", "shop"],
        ["mail", "reports", "--tasks", "shop", "-c", "2", "--weight", "mail:2", "--max-jobs", "5"],
    ],
)
async def test_it_runs_the_jobs_of_all_queues_until_they_are_empty(
    arguments: list[str], server: EmbeddedServer, nats_backend: NATSBackend, app: Path
) -> None:
    queues = [Queue("mail", nats_backend), Queue("reports", nats_backend)]
    for queue in queues:
        await queue.add_bulk([{"task_id": f"shop.{queue.name}"}] * 6)
    command = [*AMQ, "worker", "start", "-s", server.url, "--burst", *arguments]
    with started(command, app) as program, anyio.fail_after(2 * PATIENCE):
        assert await program.wait() == 0, program.log
    for queue in queues:
        await only(queue, completed=6)


async def test_it_serves_the_queues_of_the_app_and_stops_at_sigterm(
    server: EmbeddedServer, nats_backend: NATSBackend, app: Path
) -> None:
    queue = Queue("reports", nats_backend)
    job_id = await queue.add("shop.reports")
    command = [*AMQ, "worker", "start", "--app", "shop:queues"]
    with started(command, app, NATS_URL=server.url) as program:
        with anyio.fail_after(PATIENCE):
            assert await queue.wait_for(job_id) == program.process.pid
        assert program.stop() == 0
    assert "has stopped" in program.log


async def test_workers_are_listed_shown_and_stopped(
    server: EmbeddedServer, nats_backend: NATSBackend, capsys: pytest.CaptureFixture[str]
) -> None:
    worker = Worker([Queue("mail", nats_backend), Queue("reports", nats_backend)], concurrency=7)
    at = ["-s", server.url]
    with anyio.fail_after(PATIENCE):
        async with anyio.create_task_group() as group:
            await group.start(worker.run)
            name = str(worker.id)
            assert await amq("worker", "list", "--names", *at) == 0
            assert capsys.readouterr().out == f"{name}\n"
            assert await amq("worker", "list", "--json", *at) == 0
            (row,) = json.loads(capsys.readouterr().out)
            assert (row["id"], row["pid"], row["state"]) == (name, os.getpid(), "running")
            assert {queue: each["slots"] for queue, each in row["queues"].items()} == {
                "mail": 7,
                "reports": 7,
            }
            assert await amq("worker", "list", *at) == 0
            assert re.search(rf"{name} +mail:7, reports:7 +0 +\d+ MB", capsys.readouterr().out)
            assert await amq("worker", "info", name, *at) == 0
            assert "0 of 7 slots busy" in capsys.readouterr().out
            assert await amq("worker", "stop", name, "--wait", *at) == 0
    assert await amq("worker", "list", "--names", *at) == 0
    assert capsys.readouterr().out == ""
    for command in ("info", "stop"):
        assert await amq("worker", command, name, *at) == 1
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert "`worker list` shows those that run" in error


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ([], "no queue to serve"),
        (["--tasks", "nowhere"], "task module 'nowhere' cannot be imported"),
        (["--app", "shop"], "is module:attribute"),
        (["--app", "shop:nothing"], "has no 'nothing'"),
        (["--app", "shop:os"], "is a module: name a Worker"),
        (["mail", "-c", "many"], "takes QUEUE:NUMBER, as in mail:20, not 'many'"),
        (["mail", "-c", "sms:3"], "concurrency may name the queues mail"),
        (["mail", "--strict"], "share their slots"),
        (["mail", "--log-level", "LOUD"], "there is no log level 'LOUD'"),
        (["bad name"], "queue name 'bad name' is not valid"),
    ],
)
def test_what_cannot_be_started_is_said_in_one_line(
    arguments: list[str],
    problem: str,
    app: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(app)
    monkeypatch.setenv("NATS_URL", "nats://127.0.0.1:1")
    monkeypatch.setattr("asyncmq_nats.tasks.TASK_REGISTRY._tasks", {})
    monkeypatch.setattr(sys, "path", [str(app), *sys.path])
    assert run(["worker", "start", *arguments]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert problem in error


def test_concurrency_is_a_number_or_one_for_each_queue() -> None:
    assert commands.read_concurrency([]) is None
    assert commands.read_concurrency(["20"]) == 20
    assert commands.read_concurrency(["mail:20", "reports:2"]) == {"mail": 20, "reports": 2}
    assert commands.read_concurrency(["mail:20 reports:2"]) == {"mail": 20, "reports": 2}
    for wrong in ("mail:", "mail:2.5", "mail=3"):
        with pytest.raises(CommandFailed):
            commands.read_concurrency([wrong])


async def test_the_server_says_where_it_is_and_keeps_its_jobs(tmp_path: Path) -> None:
    command = [*AMQ, "server", "--port", "-1", "--store", str(tmp_path / "store")]
    for counts in ({}, {"waiting": 1}):
        with started(command, tmp_path / "run") as program, anyio.fail_after(PATIENCE):
            await program.logged("nats-server runs as")
            url = re.search(r"export NATS_URL=(\S+)", program.log)
            assert url is not None
            async with NATSBackend(url[1]) as backend:
                queue = Queue("mail", backend)
                await only(queue, **counts)
                await queue.add("mail", job_id="one")
            assert program.stop() == 0


async def test_a_server_that_ends_by_itself_ends_the_command(tmp_path: Path) -> None:
    command = [*AMQ, "server", "--port", "-1"]
    with started(command, tmp_path / "run") as program, anyio.fail_after(PATIENCE):
        await program.logged("nats-server runs as")
        pid = re.search(r"runs as (\d+)", program.log)
        assert pid is not None
        os.kill(int(pid[1]), 9)
        assert await program.wait() == 1
        assert "has ended by itself" in program.log


async def test_the_doctor_tells_what_is_wrong_and_mends_it(
    server: EmbeddedServer, nats_backend: NATSBackend, capsys: pytest.CaptureFixture[str]
) -> None:
    queue = Queue("mail", nats_backend)
    await queue.add("x", priority=3)
    await counted(queue)
    at = ["-s", server.url]
    assert await amq("doctor", *at) == 1
    shown = capsys.readouterr().out
    assert "FAIL queue mail: 1 jobs wait, and no worker runs" in shown
    assert "amq worker start mail" in shown
    assert "WARN queue mail: consumer tier_3 of amq_mail: ack_wait is 1000000000" in shown
    assert await amq("doctor", "--fix", "--json", *at) == 1
    findings = json.loads(capsys.readouterr().out)
    (fixed,) = [each for each in findings if each["fixed"]]
    assert fixed["check"] == "drift"
    assert await amq("doctor", *at) == 1
    assert "ack_wait" not in capsys.readouterr().out
    assert await amq("doctor", "--role", "king", *at) == 1
    assert "there is no role 'king'" in capsys.readouterr().err


async def test_a_check_is_one_line_and_an_exit_code(
    server: EmbeddedServer, nats_backend: NATSBackend, capsys: pytest.CaptureFixture[str]
) -> None:
    queue = Queue("mail", nats_backend)
    await queue.add_bulk([{"task_id": "x"}] * 3)
    await counted(queue)
    at = ["-s", server.url]
    assert await amq("check", *at) == 0
    line = capsys.readouterr().out
    assert line.startswith("ASYNCMQ OK - 1 queues, 3 jobs wait | 'mail_waiting'=3 ")
    assert line.count("\n") == 1
    assert await amq("check", "mail", "--waiting", "2:", "--age", "3600:", *at) == 1
    assert capsys.readouterr().out.startswith("ASYNCMQ WARNING - mail: 3 jobs wait")
    assert await amq("check", "--waiting", "1:3", "--format", "text", *at) == 2
    assert capsys.readouterr().out == "error: mail: 3 jobs wait\n"
    assert await amq("check", "--workers", "1", "--format", "json", *at) == 2
    found = json.loads(capsys.readouterr().out)
    assert (found["level"], found["queues"]["mail"]["waiting"]) == ("error", 3)
    assert await amq("check", "--format", "prometheus", *at) == 0
    assert 'asyncmq_check_waiting{queue="mail"} 3\n' in capsys.readouterr().out
    assert await amq("check", "--waiting", "many", *at) == 1
    assert "takes WARN:CRIT" in capsys.readouterr().err
    assert await amq("check", "-s", "nats://127.0.0.1:1", "--timeout", "0.5s") == 2
    assert capsys.readouterr().out.startswith("ASYNCMQ CRITICAL - cannot reach NATS")


async def test_the_settings_of_a_queue_are_shown_and_changed(
    server: EmbeddedServer, nats_backend: NATSBackend, capsys: pytest.CaptureFixture[str]
) -> None:
    queue = Queue("mail", nats_backend)
    await queue.add("x")
    at = ["-s", server.url]
    change = ["stalled_after=60", "completed_ttl=none", "failed_keep=100"]
    assert await amq("queue", "config", "set", "mail", *change, *at) == 0
    assert "ack_wait 1000000000 → 60000000000" in capsys.readouterr().out
    assert await queue.get_configuration() == {
        "stalled_after": 60.0,
        "completed_ttl": None,
        "failed_keep": 100,
    }
    assert await amq("queue", "config", "get", "mail", *at) == 0
    assert re.search(r"completed_ttl +none", capsys.readouterr().out)
    assert await amq("queue", "config", "set", "mail", "failed_keep=", *at) == 0
    capsys.readouterr()
    assert await amq("queue", "config", "get", "mail", "--json", *at) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown == {"stored": {"stalled_after": 60.0, "completed_ttl": None}, "drift": []}
    for word, problem in (("stalled_after", "NAME=VALUE"), ("speed=9", "a queue can keep")):
        assert await amq("queue", "config", "set", "mail", word, *at) == 1
        assert problem in capsys.readouterr().err
    assert await amq("queue", "config", "get", "nowhere", *at) == 1
    assert "there is no queue 'nowhere'" in capsys.readouterr().err
