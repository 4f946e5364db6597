"""Databases for the tests of the outbox: SQLite in a file, and a PostgreSQL of its own."""

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from sqlalchemy import create_engine, make_url

__all__ = ["find_postgres", "run_postgres", "silent"]

BINARIES = "/usr/lib/postgresql/*/bin/initdb"
START_TIMEOUT = 60


def find_postgres() -> Path | None:
    """Return the directory of PostgreSQL's server programs, or `None`."""
    found = shutil.which("initdb")
    if found is not None:
        return Path(found).parent
    installed = sorted(Path("/").glob(BINARIES.lstrip("/")))
    return installed[-1].parent if installed else None


def _owner() -> str | None:
    """Return the user that runs PostgreSQL; `None`: this one. It refuses to be run by root."""
    if os.geteuid() != 0:
        return None
    for name in ("postgres", "nobody"):
        try:
            pwd.getpwnam(name)
        except KeyError:
            continue
        return name
    pytest.skip("PostgreSQL does not run as root, and there is no other user")


@contextmanager
def run_postgres() -> Iterator[str]:
    """Run a PostgreSQL server with an empty database, and yield its address.

    Skips where there is none.
    """
    programs = find_postgres()
    if programs is None:
        pytest.skip("no PostgreSQL server: initdb and pg_ctl are not installed")
    owner = _owner()
    if owner is not None and shutil.which("runuser") is None:
        pytest.skip("PostgreSQL does not run as root, and there is no runuser")
    # Not pytest's directory: another user has to get into it, and a socket's path is short.
    directory = Path(tempfile.mkdtemp(prefix="amq-pg-"))
    if owner is not None:
        shutil.chown(directory, owner)
    prefix = [] if owner is None else ["runuser", "-u", owner, "--"]

    def run(*command: str) -> None:
        done = subprocess.run(
            [*prefix, *command],
            cwd=directory,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            timeout=START_TIMEOUT,
        )
        assert done.returncode == 0, done.stderr.decode()

    data, log = directory / "data", directory / "log"
    control = (str(programs / "pg_ctl"), "-D", str(data), "-l", str(log), "-w")
    try:
        run(str(programs / "initdb"), "-D", str(data), "-A", "trust", "-U", "test", "-N")
        options = f"-c listen_addresses='' -c unix_socket_directories={directory} -c fsync=off"
        run(*control, "-o", options, "start")
        try:
            yield f"postgresql://test@/postgres?host={directory}"
        finally:
            run(*control, "-m", "immediate", "stop")
    finally:
        shutil.rmtree(directory, ignore_errors=True)


@contextmanager
def silent(address: str) -> Iterator[None]:
    """Have a database answer nothing while the block runs: its processes are frozen.

    SQLite has none: another writer keeps its lock.
    """
    url = make_url(address)
    if url.get_backend_name() == "sqlite":
        engine = create_engine(address)
        with engine.connect() as connection:
            connection.exec_driver_sql("BEGIN EXCLUSIVE")
            yield
        engine.dispose()
        return
    pid_file = Path(str(url.query["host"])) / "data" / "postmaster.pid"
    server = int(pid_file.read_text().splitlines()[0])
    frozen = [server, *_children(server)]
    try:
        for pid in frozen:
            os.kill(pid, signal.SIGSTOP)
        yield
    finally:
        for pid in frozen:
            os.kill(pid, signal.SIGCONT)


def _children(pid: int) -> list[int]:
    found = []
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = file.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended meanwhile
            continue
        if int(fields[1]) == pid:
            found.append(int(file.parent.name))
    return found
