"""An embedded nats-server on the loopback interface, for development, tests and single machines.

It starts and stops a process, and never speaks NATS.
"""

import atexit
import os
import re
import secrets
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from asyncmq_nats.backends.nats.embedded.watchdog import Watchdog
from asyncmq_nats.exceptions import BackendError, ServerBinaryMissing

if sys.platform != "win32":
    import fcntl

__all__ = ["EmbeddedServer"]

HOST = "127.0.0.1"
START_TIMEOUT = 10.0
STOP_TIMEOUT = 5.0
LOCK_TIMEOUT = 2.0
"""How long a server may take to leave a store, whose program was killed a moment ago."""
POLL_INTERVAL = 0.005
LOG_LINES_SHOWN = 10
TOKEN_FILE = "nats-server.token"
COMMENT = re.compile(r"^\s*(#|//).*$", re.MULTILINE)
OWN_LOGINS = re.compile(
    r"(?:^|[\s,;{}])(authorization|accounts|operator|include|cluster|gateway|leafnodes)\b"
)
"""Words of a configuration with logins of its own, or of a server of a cluster."""
LISTENING = re.compile(rb"Listening for client connections on 127\.0\.0\.1:(\d+)")
READY = b"Server is ready"


class EmbeddedServer:
    """A nats-server process with JetStream that listens on 127.0.0.1 only.

    `store_dir` holds its data, log and configuration; without one a temporary directory is used,
    and removed by `stop`. Clients need the token in `url`: other users of this machine cannot
    connect, nor read the files. It is kept in the store.
    `port` -1 takes any free one. Once known, the port is kept: `kill` or `stop` and then `start`
    serve the same address again.
    `config` is the *text* of a server configuration to add; address, port and store stay ours, and
    it must not set `log_file`. If it has users, accounts or a cluster of its own, there is no
    token.

    Methods may be called from any thread; they block, for some 10 ms as a rule. A server that still
    runs when the interpreter exits is stopped, and so is one whose parent dies of a signal (not on
    Windows).
    """

    def __init__(
        self,
        store_dir: str | os.PathLike[str] | None = None,
        port: int = -1,
        config: str | None = None,
    ) -> None:
        self._store_dir = None if store_dir is None else Path(store_dir)
        self._port = port
        self._config = config
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._token = ""
        self._watchdog: Watchdog | None = None
        self._lock = threading.RLock()

    @property
    def port(self) -> int:
        """The port it listens on, or did before it was stopped.

        -1 before the first start of a server on a free port.
        """
        return self._port

    @property
    def url(self) -> str:
        """Address for clients, with the token: its holder can do everything."""
        login = f"{self._token}@" if self._token else ""
        return f"nats://{login}{HOST}:{self._port}"

    @property
    def pid(self) -> int | None:
        """Id of the process; `None` when none was started, or it was stopped."""
        process = self._process
        return None if process is None else process.pid

    @property
    def is_running(self) -> bool:
        """Whether the process runs."""
        process = self._process
        return process is not None and process.poll() is None

    def start(self) -> None:
        """Start the server and wait until it takes connections. Does nothing if it runs.

        Raises:
            ServerBinaryMissing: no nats-server program was found.
            BackendError: the server ended or was not ready in time, with the last lines of its log;
                or another process serves the store.
        """
        with self._lock:
            if self._process is not None and self._process.poll() is None:
                return
            self._dismiss_watchdog()
            program = _find_program()
            # Before the next lines: what is registered last is called first, and a store is removed
            # at exit too.
            store = self._make_store()
            atexit.unregister(self.stop)
            atexit.register(self.stop)
            try:
                self._launch(program, store)
            except BaseException:
                self.stop()
                raise

    def stop(self) -> None:
        """Ask the server to end, insist after 5 s, and remove the store if it is a temporary one.

        Does nothing if nothing was started.
        """
        with self._lock:
            self._dismiss_watchdog()
            process, self._process = self._process, None
            if process is not None:
                process.terminate()
                try:
                    process.wait(STOP_TIMEOUT)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
            temporary, self._temporary = self._temporary, None
            if temporary is not None:
                temporary.cleanup()
            atexit.unregister(self.stop)

    def kill(self) -> None:
        """End the server at once, as a crash would (SIGKILL).

        The store stays, for `start` to go on with.
        """
        with self._lock:
            self._dismiss_watchdog()
            process, self._process = self._process, None
            if process is not None:
                process.kill()
                process.wait()

    def _dismiss_watchdog(self) -> None:
        if self._watchdog is not None:
            self._watchdog.dismiss()
            self._watchdog = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def _launch(self, program: str, store: Path) -> None:
        config = self._config or ""
        self._token = (
            "" if OWN_LOGINS.search(COMMENT.sub("", config)) else self._token or _read_token(store)
        )
        if self._token:
            config += f'\nauthorization {{ token: "{self._token}" }}\n'
        config_path = store / "nats-server.conf"
        _write_private(config_path, config)
        # The token is in the file: other users see the arguments of a process.
        command = [program, "-a", HOST, "-p", str(self._port), "-js", "-sd", str(store)]
        command += ["-c", str(config_path)]
        log_path = store / "nats-server.log"
        with open(log_path, "ab", opener=_open_private) as log:
            _lock_store(log, store)
            log.truncate(0)
            # A session of its own: Ctrl-C in a terminal must not end the server before the
            # application has handed its jobs back.
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                umask=0o077 if sys.platform != "win32" else -1,  # the store is for this user only
            )
        self._watchdog = Watchdog(self._process.pid)
        self._port = _wait_until_ready(self._process, log_path)

    def _make_store(self) -> Path:
        if self._store_dir is not None:
            self._store_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
            return self._store_dir
        if self._temporary is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="asyncmq-nats-")
        return Path(self._temporary.name)


def _open_private(path: str, flags: int) -> int:
    """Open a file that only this user may read; an existing one becomes so."""
    descriptor = os.open(path, flags, 0o600)
    if sys.platform != "win32":
        os.fchmod(descriptor, 0o600)
    return descriptor


def _write_private(path: Path, text: str) -> None:
    with open(path, "w", encoding="utf-8", opener=_open_private) as file:
        file.write(text)


def _read_token(store: Path) -> str:
    """Return the token of this store, made when first needed: the address outlasts a restart."""
    path = store / TOKEN_FILE
    token = path.read_text("utf-8").strip() if path.exists() else ""
    if re.fullmatch("[0-9a-f]{32,}", token) is None:
        token = secrets.token_hex(16)
    _write_private(path, token)
    return token


def _find_program() -> str:
    # The scripts directory comes first: a program run by its path, without an activated
    # environment, does not have it on its PATH.
    program = shutil.which("nats-server", path=sysconfig.get_path("scripts")) or shutil.which(
        "nats-server"
    )
    if program is None:
        raise ServerBinaryMissing
    return program


def _lock_store(log: IO[bytes], store: Path) -> None:
    """Refuse a store that is being served.

    Two servers on one store corrupt it, and nats-server does not look. The lock is on the log file,
    which the server inherits as its stderr; so the lock lives exactly as long as the server does.
    """
    deadline = time.monotonic() + LOCK_TIMEOUT
    while sys.platform != "win32":
        try:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if time.monotonic() > deadline:
                raise BackendError(
                    f"another nats-server already serves the store {store}: connect to that one "
                    f"(its port is in {log.name}, its token in {store / TOKEN_FILE}), or stop it"
                ) from error
            time.sleep(POLL_INTERVAL)
        else:
            break


def _wait_until_ready(process: subprocess.Popen[bytes], log_path: Path) -> int:
    """Return the port, as the server's log shows it."""
    deadline = time.monotonic() + START_TIMEOUT
    while time.monotonic() < deadline:
        # In this order: what the server wrote before it ended is in the log then.
        status = process.poll()
        text = log_path.read_bytes()
        if status is not None:
            raise BackendError(
                f"nats-server ended with status {status} instead of starting; {_quote_end(text)}"
            )
        if READY in text and (listening := LISTENING.search(text)):
            return int(listening[1])
        time.sleep(POLL_INTERVAL)
    raise BackendError(
        f"nats-server was not ready within {START_TIMEOUT:g} s; {_quote_end(log_path.read_bytes())}"
    )


def _quote_end(text: bytes) -> str:
    lines = text.decode(errors="replace").splitlines()[-LOG_LINES_SHOWN:]
    return "\n".join(["the end of its log:", *lines]) if lines else "its log is empty"
