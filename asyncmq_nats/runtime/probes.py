"""The ports of a worker: health for probes, metrics for Prometheus. A few lines of HTTP.

The workers of one process share a port. Nothing that is read here changes a worker.
"""

import asyncio
import json
import os
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from weakref import WeakKeyDictionary

import anyio

from asyncmq_nats._concurrency import Turns
from asyncmq_nats._logging import get_logger
from asyncmq_nats.exceptions import AsyncMQError, InvalidArgument
from asyncmq_nats.runtime.health import WorkerHealth
from asyncmq_nats.runtime.supervisor import PROCESS_NUMBER
from asyncmq_nats.settings import Settings

__all__ = ["Probe", "ProbeServer", "keep_health_file", "open_ports"]

logger = get_logger(__name__)

LONGEST_REQUEST: Final = 16 * 1024
REQUEST_SECONDS: Final = 10.0
JSON: Final = "application/json"
FILE_INTERVAL: Final = 2.0
"""Seconds between two writes of the health file."""


@dataclass(frozen=True, slots=True)
class Probe:
    """The answers of one worker.

    `metrics`: reads the figures of each worker at the port for `render`.
    """

    health: Callable[[], WorkerHealth]
    metrics: Callable[[], Awaitable[Any]] | None = None
    render: Callable[[Sequence[Any]], bytes] | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer of HTTP."""

    status: str
    body: bytes
    kind: str = JSON


class ProbeServer:
    """One port, and the workers that are seen there."""

    def __init__(self) -> None:
        self.probes: list[Probe] = []
        self.shows_health = False
        self.shows_metrics = False
        self._server: asyncio.Server | None = None

    async def open(self, host: str, port: int) -> None:
        """Listen.

        Raises:
            InvalidArgument: the port is taken, or the address is none of this machine.
        """
        try:
            self._server = await asyncio.start_server(
                self._serve, host, port, limit=LONGEST_REQUEST
            )
        except OSError as error:
            raise InvalidArgument(
                f"cannot listen on {host}:{port} ({error.strerror}): choose another health_port, "
                "metrics_port or probe_host",
                port,
            ) from None

    def close(self) -> None:
        """Stop listening."""
        if self._server is not None:
            self._server.close()
            self._server = None

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(REQUEST_SECONDS):
                head = await reader.readuntil(b"\r\n\r\n")
                method, path, *_ = head.split(b"\r\n", 1)[0].decode("latin-1").split(" ")
                answer = await self._answer(method, path.partition("?")[0])
                writer.write(_encode(answer, with_body=method != "HEAD"))
                await writer.drain()
        except (OSError, TimeoutError, ValueError, EOFError, asyncio.LimitOverrunError):
            pass  # a malformed request gets no answer
        finally:
            with suppress(OSError):
                writer.close()

    async def _answer(self, method: str, path: str) -> Answer:
        if method not in ("GET", "HEAD"):
            return Answer("405 Method Not Allowed", b'{"error":"GET only"}')
        if self.shows_health and path in ("/livez", "/healthz"):
            return self._health(lambda health: health.is_alive)
        if self.shows_health and path == "/readyz":
            return self._health(lambda health: health.is_ready)
        if self.shows_metrics and path == "/metrics":
            return await self._metrics()
        return Answer("404 Not Found", b'{"error":"try /livez, /readyz or /metrics"}')

    def _health(self, is_fine: Callable[[WorkerHealth], bool]) -> Answer:
        found = [probe.health() for probe in self.probes]
        fine = bool(found) and all(map(is_fine, found))
        body = json.dumps({"ok": fine, "workers": [health.to_dict() for health in found]})
        return Answer("200 OK" if fine else "503 Service Unavailable", body.encode())

    async def _metrics(self) -> Answer:
        probes = [probe for probe in self.probes if probe.metrics is not None]
        render = next((probe.render for probe in probes if probe.render is not None), None)
        if render is None:
            return Answer("404 Not Found", b'{"error":"no worker here has metrics"}')
        try:
            values = [await probe.metrics() for probe in probes if probe.metrics is not None]
        except AsyncMQError as error:
            logger.warning("metrics could not be read: %s", error)
            return Answer("503 Service Unavailable", b'{"error":"the server does not answer"}')
        return Answer("200 OK", render(values), "text/plain; version=0.0.4; charset=utf-8")


def _encode(answer: Answer, *, with_body: bool) -> bytes:
    head = (
        f"HTTP/1.1 {answer.status}\r\nContent-Type: {answer.kind}\r\n"
        f"Content-Length: {len(answer.body)}\r\nCache-Control: no-store\r\n"
        "Connection: close\r\n\r\n"
    )
    return head.encode() + (answer.body if with_body else b"")


_servers: "WeakKeyDictionary[asyncio.AbstractEventLoop, dict[int, ProbeServer]]" = (
    WeakKeyDictionary()
)
"""The open ports of each event loop."""
_opening = Turns()


async def open_ports(settings: Settings, probe: Probe) -> Callable[[], None]:
    """Show a worker at the ports of the settings. Return the function to call when the worker ends.

    Raises:
        InvalidArgument: a port cannot be listened on.
    """
    shown: list[tuple[int, ProbeServer]] = []
    servers = _servers.setdefault(asyncio.get_running_loop(), {})

    def leave() -> None:
        for port, server in shown:
            server.probes.remove(probe)
            if not server.probes:
                server.close()
                servers.pop(port, None)

    for port in {settings.health_port, settings.metrics_port} - {None}:
        assert port is not None
        number = port + int(os.environ.get(PROCESS_NUMBER, "0"))
        try:
            server = await _open_server(servers, settings.probe_host, number)
        except InvalidArgument:
            leave()
            raise
        server.shows_health |= port == settings.health_port
        server.shows_metrics |= port == settings.metrics_port
        server.probes.append(probe)
        shown.append((number, server))

    return leave


async def _open_server(servers: dict[int, ProbeServer], host: str, port: int) -> ProbeServer:
    """Return the server of a port, opened if it is not.

    Raises:
        InvalidArgument: it cannot be listened on.
    """
    async with _opening:  # in turn, so that each worker learns that a port cannot be opened
        if port not in servers:
            server = ProbeServer()
            await server.open(host, port)
            servers[port] = server
        return servers[port]


Health = Callable[[], WorkerHealth]
_files: "WeakKeyDictionary[asyncio.AbstractEventLoop, dict[Path, list[Health]]]" = (
    WeakKeyDictionary()
)
"""By event loop and health file, the workers that share it."""


async def keep_health_file(path: Path, health: Health) -> None:
    """Write the health of a worker every two seconds, until cancelled: probes look at the time.

    The queues of a worker share a file. It is not written while one of them should not live on,
    and it is removed when the last one has ended. A file that cannot be written is logged.
    """
    files = _files.setdefault(asyncio.get_running_loop(), {})
    sharing = files.setdefault(path, [])
    sharing.append(health)
    try:
        while True:
            if all(each().is_alive for each in sharing):
                _write_health_file(path, health())
            await anyio.sleep(FILE_INTERVAL)
    finally:
        sharing.remove(health)
        if not sharing:
            del files[path]
            _remove_health_file(path)


def _write_health_file(path: Path, health: WorkerHealth) -> None:
    try:
        path.write_text(json.dumps(health.to_dict()) + "\n")
    except OSError as error:
        logger.warning("the health file was not written: %s", error)


def _remove_health_file(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        logger.warning("the health file was not removed: %s", error)
