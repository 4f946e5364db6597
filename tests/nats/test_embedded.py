"""The embedded server: found, started, restarted, refused, and gone afterwards."""

import os
import re
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from asyncmq_nats.backends.nats import embedded
from asyncmq_nats.backends.nats.backend import NATSBackend
from asyncmq_nats.backends.nats.connection import Connection
from asyncmq_nats.backends.nats.embedded.server import EmbeddedServer
from asyncmq_nats.exceptions import BackendError, ConnectionFailed, ServerBinaryMissing
from asyncmq_nats.queues import Queue
from asyncmq_nats.settings import Settings
from tests.nats.processes import alive, freeze, holds
from tests.running import counted, has

pytestmark = pytest.mark.usefixtures(
    "server"
)  # skipped, or an error in CI, without a server program

INFO = b"INFO {"


def greet(port: int) -> bytes:
    """Return the first bytes a server sends to a client."""
    with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
        return connection.recv(1024)


def test_takes_connections_as_soon_as_start_returns(server: EmbeddedServer) -> None:
    assert re.fullmatch(rf"nats://[0-9a-f]{{32}}@127\.0\.0\.1:{server.port}", server.url)
    greeting = greet(server.port)
    assert greeting.startswith(INFO)
    assert b'"jetstream":true' in greeting


def test_start_of_a_running_server_changes_nothing(server: EmbeddedServer) -> None:
    pid = server.pid
    server.start()
    assert server.pid == pid


def test_two_servers_get_different_ports(server: EmbeddedServer) -> None:
    with EmbeddedServer() as other:
        assert other.port != server.port


def test_restart_after_a_kill_keeps_port_and_store(server: EmbeddedServer, tmp_path: Path) -> None:
    port, pid = server.port, server.pid
    kept = tmp_path / "nats" / "jetstream" / "kept"
    kept.parent.mkdir(exist_ok=True)
    kept.write_text("x")
    server.kill()
    assert server.pid is None
    with pytest.raises(ConnectionRefusedError):
        greet(port)
    server.start()
    assert server.port == port
    assert server.pid != pid
    assert kept.exists()
    assert greet(port).startswith(INFO)


def test_start_replaces_a_server_that_died(server: EmbeddedServer) -> None:
    assert server.pid is not None
    os.kill(server.pid, signal.SIGKILL)
    os.waitid(os.P_PID, server.pid, os.WEXITED | os.WNOWAIT)
    server.start()
    assert greet(server.port).startswith(INFO)


def test_stop_removes_a_temporary_store(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    with EmbeddedServer() as server:
        assert list(temporary.iterdir())
        server.kill()
        assert list(temporary.iterdir()), "a kill keeps the store"
        server.start()
    assert not list(temporary.iterdir())
    server.stop()


def test_stop_keeps_a_store_of_the_users(tmp_path: Path) -> None:
    with EmbeddedServer(str(tmp_path / "mine")):
        pass
    assert (tmp_path / "mine" / "jetstream").is_dir()


def test_stop_insists_when_the_server_does_not_listen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded.server, "STOP_TIMEOUT", 0.1)
    with EmbeddedServer() as server:
        assert server.pid is not None
        freeze(server.pid)
    with pytest.raises(ConnectionRefusedError):
        greet(server.port)


def test_missing_program_is_an_error_that_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("shutil.which", lambda *args, **kwargs: None)
    with pytest.raises(ServerBinaryMissing, match="asyncmq-nats\\[embedded\\]"):
        EmbeddedServer().start()


def test_program_on_the_path_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(Path(embedded.server._find_program()).parent))
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    with EmbeddedServer() as server:
        assert greet(server.port).startswith(INFO)


def test_config_is_added(tmp_path: Path) -> None:
    with EmbeddedServer(
        tmp_path / "store", config='server_name: "mine"\nlisten: "0.0.0.0:1"\n'
    ) as server:
        assert b'"server_name":"mine"' in greet(server.port)


# -- who may connect


async def connects(url: str) -> bool:
    try:
        async with NATSBackend(url, settings=Settings(connect_timeout=2.0)) as backend:
            await backend.ping()
    except ConnectionFailed:
        return False
    return True


async def test_only_who_knows_the_token_can_connect(server: EmbeddedServer) -> None:
    assert await connects(server.url)
    assert not await connects(f"nats://127.0.0.1:{server.port}")
    assert not await connects(f"nats://{'0' * 32}@127.0.0.1:{server.port}")


async def test_the_address_stays_when_it_is_started_again(tmp_path: Path) -> None:
    with EmbeddedServer(tmp_path / "store") as first:
        url, port = first.url, first.port
        first.kill()
        first.start()
        assert first.url == url
    with EmbeddedServer(tmp_path / "store", port=port) as second:
        assert second.url == url
        assert await connects(url)


async def test_the_address_of_an_embedded_backend_serves_other_processes(tmp_path: Path) -> None:
    async with NATSBackend.embedded(tmp_path / "store") as backend:
        await Queue("work", backend).add("echo", [1])
        async with NATSBackend(backend.url) as other:
            await has(Queue("work", other), 1, "waiting")


@pytest.mark.skipif(sys.platform == "win32", reason="no such permissions there")
async def test_no_other_user_can_read_what_it_stores(tmp_path: Path) -> None:
    async with NATSBackend.embedded(tmp_path / "store") as backend:
        await Queue("work", backend).add("echo", [1])
        paths = [tmp_path / "store", *(tmp_path / "store").rglob("*")]
        names = {path.name for path in paths}
        open_to_others = {str(path) for path in paths if stat.S_IMODE(path.lstat().st_mode) & 0o077}
    assert {"nats-server.token", "nats-server.conf", "nats-server.log", "jetstream"} <= names
    assert open_to_others == set()


def test_the_token_is_in_no_argument_of_the_process(server: EmbeddedServer) -> None:
    token = server.url.partition("//")[2].partition("@")[0]
    arguments = Path(f"/proc/{server.pid}/cmdline")
    if arguments.exists():
        assert token.encode() not in arguments.read_bytes()
    assert token not in repr(server)


@pytest.mark.parametrize(
    "config",
    [
        'authorization { users: [ { user: "me", password: "x" } ] }',
        'accounts { A { users: [ { user: "me", password: "x" } ] } }',
    ],
)
async def test_a_config_with_users_of_its_own_has_no_token(config: str, tmp_path: Path) -> None:
    with EmbeddedServer(tmp_path / "store", config=config) as server:
        assert server.url == f"nats://127.0.0.1:{server.port}"
        assert await connects(f"nats://me:x@127.0.0.1:{server.port}")


def test_rejected_config_shows_the_servers_words(tmp_path: Path) -> None:
    server = EmbeddedServer(tmp_path / "store", config="nonsense: 3\n")
    with pytest.raises(BackendError, match='unknown field "nonsense"'):
        server.start()
    assert server.pid is None


def test_port_in_use_shows_the_servers_words(server: EmbeddedServer, tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="address already in use"):
        EmbeddedServer(tmp_path / "other", port=server.port).start()


def test_server_that_is_never_ready_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded.server, "START_TIMEOUT", 0.05)
    monkeypatch.setattr(embedded.server, "READY", b"never written")
    server = EmbeddedServer()
    with pytest.raises(BackendError, match=r"not ready within 0\.05 s"):
        server.start()
    assert server.pid is None


@pytest.mark.skipif(sys.platform == "win32", reason="no lock there")
def test_store_is_served_by_one_server_only(
    server: EmbeddedServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded.server, "LOCK_TIMEOUT", 0.05)
    with pytest.raises(BackendError, match="another nats-server already serves"):
        EmbeddedServer(tmp_path / "nats").start()
    assert greet(server.port).startswith(INFO)


def test_server_ends_with_the_interpreter() -> None:
    program = (
        "from asyncmq_nats.backends.nats.embedded.server import EmbeddedServer\n"
        "s = EmbeddedServer(); s.start(); print(s.port, s._temporary.name)"
    )
    output = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True, timeout=30
    )
    port, store = output.stdout.split()
    with pytest.raises(ConnectionRefusedError):
        greet(int(port))
    assert not Path(store).exists()
    assert output.stderr == ""


def test_at_exit_the_server_ends_before_its_store_goes() -> None:
    program = """
from pathlib import Path
from asyncmq_nats.backends.nats.embedded.server import EmbeddedServer

class Observed(EmbeddedServer):
    def stop(self):
        print(Path(self._temporary.name).exists())
        super().stop()

Observed().start()
"""
    output = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True, timeout=30
    )
    assert (output.stdout, output.stderr) == ("True\n", "")


# -- the program that started it is killed

KILLED = """
import os, signal, subprocess, sys
from asyncmq_nats.backends.nats.embedded.server import EmbeddedServer

server = EmbeddedServer(sys.argv[1])
server.start()
server.kill()  # what watched that one is of no more use
server.start()
spawned = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], close_fds=False)
forked = os.fork()
if forked == 0:
    signal.pause()
print(server.port, server.pid, server._watchdog._process.pid, spawned.pid, forked, flush=True)
signal.pause()
"""


@pytest.fixture
def killed_program(tmp_path: Path) -> Iterator[tuple[int, int, int]]:
    """Kill a program whose other children live on.

    Return the port and the id of its server, and the id of the watchdog.
    """
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path / "killed")], stdout=subprocess.PIPE, text=True
    ) as program:
        assert program.stdout is not None
        port, *pids = (int(word) for word in program.stdout.readline().split())
        program.kill()
    yield port, pids[0], pids[1]
    for child in pids[2:]:
        os.kill(child, signal.SIGKILL)


@pytest.mark.skipif(sys.platform == "win32", reason="no shell there")
async def test_server_ends_when_the_program_is_killed(
    killed_program: tuple[int, int, int], tmp_path: Path
) -> None:
    port, *pids = killed_program
    with EmbeddedServer(tmp_path / "killed"):  # at once: its store is free in a moment
        with pytest.raises(ConnectionRefusedError):
            greet(port)
        await holds(lambda: not any(alive(pid) for pid in pids))


@pytest.mark.skipif(sys.platform == "win32", reason="no shell there")
@pytest.mark.parametrize("end", [EmbeddedServer.stop, EmbeddedServer.kill])
def test_watchdog_goes_with_the_server(end: Callable[[EmbeddedServer], None]) -> None:
    server = EmbeddedServer()
    server.start()
    assert server._watchdog is not None
    assert server._watchdog._process is not None
    pid = server._watchdog._process.pid
    end(server)
    server.stop()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


@pytest.mark.skipif(sys.platform == "win32", reason="no shell there")
def test_watchdog_that_was_killed_is_not_missed() -> None:
    with EmbeddedServer() as server:
        assert server._watchdog is not None
        assert server._watchdog._process is not None
        server._watchdog._process.kill()
        server._watchdog._process.wait()


def test_server_starts_where_there_is_no_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    program = embedded.server._find_program()
    monkeypatch.setattr(
        "shutil.which", lambda name, **_: program if name == "nats-server" else None
    )
    with EmbeddedServer() as server:
        assert greet(server.port).startswith(INFO)


# -- a backend with one


@pytest.mark.parametrize("keep", [False, True])
async def test_backend_that_was_closed_starts_its_server_again(keep: bool, tmp_path: Path) -> None:
    backend = NATSBackend.embedded(tmp_path / "kept" if keep else None)
    queue = Queue("work", backend)
    first = await queue.add("brief")
    await backend.close()
    second = await queue.add("brief")
    await counted(queue)
    assert {job["id"] for job in await queue.get_jobs("waiting")} == (
        {first, second} if keep else {second}
    )
    await backend.close()


async def test_a_backend_that_cannot_connect_ends_its_server(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def refuse(self: Connection) -> None:
        raise BackendError("not today")

    monkeypatch.setattr(Connection, "open", refuse)
    backend = NATSBackend.embedded()
    port = int(backend.url.rpartition(":")[2])
    with pytest.raises(BackendError, match="not today"):
        await backend.__aenter__()
    with pytest.raises(ConnectionRefusedError):
        greet(port)
