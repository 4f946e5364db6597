"""Probes of a worker: what makes it live and ready, the ports, the file, a blocked event loop."""

import json
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from asyncmq_nats import InMemoryBackend, InvalidArgument, Queue, Settings
from asyncmq_nats.backends.base import Backend
from asyncmq_nats.backends.nats.backend import NATSBackend
from asyncmq_nats.backends.nats.embedded.server import EmbeddedServer
from asyncmq_nats.runtime import probes
from asyncmq_nats.runtime.health import WorkerHealth, judge_health
from asyncmq_nats.runtime.pulse import WATCHER
from asyncmq_nats.workers import Worker
from tests.receiver import PATIENCE, holds, until
from tests.running import make_queue, outcome, running
from tests.telemetry.probing import ask, free_port


@pytest.fixture
def port() -> int:
    return free_port()


@pytest.fixture
def settings(settings: Settings, port: int) -> Settings:
    settings.health_port = port
    settings.probe_host = "127.0.0.1"
    return settings


async def nothing() -> None:
    """Do nothing."""


# -- the rule


def judge(**changes: Any) -> WorkerHealth:
    given: dict[str, Any] = {
        "connected": True,
        "taking": True,
        "silent_for": 0.0,
        "overdue": 0.0,
        "blocked_for": 0.1,
    } | changes
    return judge_health("w", "q", **given)


@pytest.mark.parametrize(
    ("changes", "alive", "ready"),
    [
        ({}, True, True),
        ({"connected": False}, True, False),
        ({"taking": False}, True, False),
        ({"silent_for": 60.0}, False, False),
        ({"overdue": 60.0}, False, False),
        ({"blocked_for": 60.0}, False, False),
        # An outage of the server: a restart of the worker would mend nothing.
        ({"connected": False, "silent_for": 60.0, "overdue": 60.0}, True, False),
    ],
)
def test_what_makes_a_worker_live_and_ready(
    changes: dict[str, float | bool], alive: bool, ready: bool
) -> None:
    health = judge(**changes)
    assert (health.is_alive, health.is_ready) == (alive, ready)


# -- the port


async def test_a_worker_that_takes_jobs_is_alive_and_ready(backend: Backend, port: int) -> None:
    queue = make_queue(backend, nothing=nothing)
    async with running(queue) as worker:
        body = ""
        for path in ("/livez", "/healthz", "/readyz"):
            status, body = await ask(port, path)
            assert (status, json.loads(body)["ok"]) == (200, True)
        [found] = json.loads(body)["workers"]
        assert (found["worker"], found["queue"]) == (worker.id, "work")
        assert {name for name, check in found["checks"].items() if check["ok"]} == {
            "connected",
            "taking_jobs",
            "pulls_answered",
            "promoter",
            "event_loop",
        }
    with pytest.raises(OSError, match="connect"):
        await ask(port, "/livez")


async def test_a_worker_that_stops_is_alive_and_not_ready(backend: Backend, port: int) -> None:
    started, go_on = anyio.Event(), anyio.Event()

    async def slow() -> None:
        started.set()
        await go_on.wait()

    queue = make_queue(backend, slow=slow)
    async with running(queue) as worker:
        await queue.add("slow")
        with anyio.fail_after(PATIENCE):
            await started.wait()
        worker.stop()

        async def ready() -> int:
            return (await ask(port, "/readyz"))[0]

        await until(ready, lambda status: status == 503)
        assert (await ask(port, "/livez"))[0] == 200
        go_on.set()


@pytest.mark.parametrize(
    ("path", "method", "status"),
    [
        ("/", "GET", 404),
        ("/metrics", "GET", 404),
        ("/../../etc/passwd", "GET", 404),
        ("/livez", "POST", 405),
        ("/livez?verbose=1", "GET", 200),
        ("/livez", "HEAD", 200),
    ],
)
async def test_what_else_is_asked_of_the_port(
    settings: Settings, port: int, path: str, method: str, status: int
) -> None:
    queue = make_queue(InMemoryBackend(settings), nothing=nothing)
    async with queue.backend, running(queue):
        found, body = await ask(port, path, method)
        assert found == status
        assert (body == "") == (method == "HEAD")


async def test_junk_at_the_port_ends_nothing(settings: Settings, port: int) -> None:
    queue = make_queue(InMemoryBackend(settings), nothing=nothing)
    async with queue.backend, running(queue):
        for junk in (b"\x00\xff\r\n\r\n", b"GET\r\n\r\n", 40_000 * b"x", b""):
            async with await anyio.connect_tcp("127.0.0.1", port) as stream:
                await stream.send(junk)
                if len(junk) != 40_000:
                    await stream.send_eof()
                with pytest.raises((anyio.EndOfStream, anyio.BrokenResourceError)):
                    await stream.receive()
        assert (await ask(port, "/livez"))[0] == 200


async def test_the_workers_of_a_process_share_a_port(settings: Settings, port: int) -> None:
    async with InMemoryBackend(settings) as backend:
        one, two = (make_queue(backend, name, nothing=nothing) for name in ("one", "two"))
        async with running(one):
            async with running(two):
                _, body = await ask(port, "/readyz")
                assert [each["queue"] for each in json.loads(body)["workers"]] == ["one", "two"]
            _, body = await ask(port, "/readyz")
            assert [each["queue"] for each in json.loads(body)["workers"]] == ["one"]


async def test_each_of_the_workers_that_start_together_learns_that_a_port_is_taken(
    settings: Settings, port: int
) -> None:
    problems: list[InvalidArgument] = []

    async def open_one() -> None:
        try:
            await probes.open_ports(settings, probes.Probe(judge))
        except InvalidArgument as problem:
            problems.append(problem)

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port))
        taken.listen()
        async with anyio.create_task_group() as group:
            group.start_soon(open_one)
            group.start_soon(open_one)
    assert len(problems) == 2


async def test_a_port_that_is_taken_is_a_clear_error(settings: Settings, port: int) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port))
        taken.listen()
        async with InMemoryBackend(settings) as backend:
            with pytest.raises(InvalidArgument, match=f"cannot listen on 127.0.0.1:{port}"):
                await make_queue(backend, nothing=nothing).run()


# -- without a server


@pytest.fixture
async def cut_off(
    server: EmbeddedServer, settings: Settings
) -> AsyncIterator[tuple[Queue, EmbeddedServer]]:
    async with NATSBackend(servers=server.url, settings=settings) as backend:
        yield make_queue(backend, nothing=nothing), server


async def test_a_worker_without_its_server_is_alive_and_not_ready(
    cut_off: tuple[Queue, EmbeddedServer], port: int
) -> None:
    queue, server = cut_off
    async with running(queue):
        server.stop()

        async def ready() -> int:
            return (await ask(port, "/readyz"))[0]

        await until(ready, lambda status: status == 503)
        assert (await ask(port, "/livez"))[0] == 200
        server.start()
        await until(ready, lambda status: status == 200)


async def test_a_silent_server_is_noticed(
    cut_off: tuple[Queue, EmbeddedServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    queue, server = cut_off
    runner = queue.runner()
    async with anyio.create_task_group() as group:
        await group.start(runner.run)
        await holds(lambda: runner._fetcher.silent_for == 0.0)
        process = server._process
        assert process is not None
        os.kill(process.pid, signal.SIGSTOP)
        try:
            await runner._fetcher._puller.request("tier_5", 1, wait=1.0)
            await holds(lambda: runner._fetcher.silent_for > 0.0)
        finally:
            os.kill(process.pid, signal.SIGCONT)
        await holds(lambda: runner._fetcher.silent_for == 0.0)
        runner.stop()


# -- the file


async def test_the_health_file_is_there_while_the_worker_lives(
    settings: Settings, tmp_path: Path
) -> None:
    path = tmp_path / "healthy"
    settings.health_port, settings.health_file = None, str(path)
    async with InMemoryBackend(settings) as backend:
        async with running(make_queue(backend, nothing=nothing)):
            await holds(path.exists)
            assert json.loads(path.read_text())["alive"]
        assert not path.exists()


async def turns() -> None:
    """Let other tasks of the loop do what they do at once."""
    for _ in range(10):
        await anyio.lowlevel.checkpoint()


async def test_the_queues_of_a_worker_share_a_health_file(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, shown = tmp_path / "healthy", {"one": judge(), "two": judge()}
    monkeypatch.setattr(probes, "FILE_INTERVAL", 0.0)
    async with anyio.create_task_group() as group:
        first, second = anyio.CancelScope(), anyio.CancelScope()

        async def keep(name: str, scope: anyio.CancelScope) -> None:
            with scope:
                await probes.keep_health_file(path, lambda: shown[name])

        group.start_soon(keep, "one", first)
        group.start_soon(keep, "two", second)
        await holds(path.exists)
        shown["two"] = judge(silent_for=60.0)
        path.unlink()
        await turns()
        assert not path.exists()  # the other one does not speak for it
        shown["two"] = judge()
        await holds(path.exists)
        first.cancel()
        await turns()
        assert path.exists()  # it finishes its jobs
        second.cancel()
    assert not path.exists()


async def test_a_health_file_that_cannot_be_written_ends_nothing(
    settings: Settings, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings.health_port, settings.health_file = None, str(tmp_path / "no" / "such")
    async with InMemoryBackend(settings) as backend:
        queue = make_queue(backend, nothing=nothing)
        async with running(queue):
            assert (await outcome(queue, await queue.add("nothing")))["status"] == "completed"
    assert "the health file was not written" in caplog.text


# -- a blocked event loop


async def test_a_blocked_event_loop_is_a_warning_that_names_the_task(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings.health_port, settings.loop_block_warning = None, 0.1
    warned: list[logging.LogRecord] = []

    async def block() -> None:
        ends = time.monotonic() + PATIENCE
        while not warned and time.monotonic() < ends:
            pass

    handler = logging.Handler()
    monkeypatch.setattr(handler, "emit", warned.append)
    monkeypatch.setattr(logging.getLogger("asyncmq_nats.runtime.pulse"), "handlers", [handler])
    async with InMemoryBackend(settings) as backend:
        queue = make_queue(backend, block=block)
        async with running(queue):
            job_id = await queue.add("block")
            await outcome(queue, job_id)
    assert f"by task block (job {job_id}), at {__file__}" in warned[0].getMessage()


def spin(seconds: float, is_done: Callable[[], bool] = lambda: False) -> None:
    """Keep the thread busy."""
    ends = time.monotonic() + seconds
    while time.monotonic() < ends and not is_done():
        pass


async def test_a_worker_of_several_queues_warns_once_of_a_blocked_event_loop(
    settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    settings.health_port, settings.loop_block_warning = None, 0.1
    text = "event loop has been blocked"

    async def block() -> None:
        spin(PATIENCE, lambda: text in caplog.text)
        spin(0.6)  # another thread would warn too

    async with InMemoryBackend(settings) as backend:
        queues = [make_queue(backend, name, block=block) for name in ("one", "two", "three")]
        worker = Worker(queues)
        async with anyio.create_task_group() as group:
            await group.start(worker.run)
            assert [t.name for t in threading.enumerate()].count(WATCHER) == 1
            job_id = await queues[1].add("block")
            await outcome(queues[1], job_id)
            worker.stop()
    found = [message for message in caplog.messages if text in message]
    assert len(found) == 1
    assert f"by task block (job {job_id})" in found[0]


async def test_a_sync_task_blocks_no_event_loop(
    settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    settings.health_port, settings.loop_block_warning = None, 0.1
    backend = InMemoryBackend(settings)

    def busy() -> None:
        time.sleep(0.6)  # the work of the task

    async with backend:
        queue = make_queue(backend, busy=busy)
        async with running(queue):
            await outcome(queue, await queue.add("busy"))
    assert "task busy" not in caplog.text
