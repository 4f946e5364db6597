"""The cost of a browser that watches one queue, in requests and CPU time a minute.

    python benchmarks/dashboard.py [--jobs 1000000] [--seconds 60] [--idle]

A server, the queue's jobs, and a dashboard as a program of its own. The client asks for pages as
their script does: it listens for changes, reloads the page after each, and the charts every ten
seconds. A worker runs jobs meanwhile, unless `--idle`. CPU times are those of the processes, by
/proc.
"""

import argparse
import os
import socket
import sys
import tempfile
from pathlib import Path
from time import perf_counter

import anyio
import httpx2 as httpx

from asyncmq_nats import NATSBackend, Queue
from asyncmq_nats.backends.nats.embedded.server import EmbeddedServer
from asyncmq_nats.runtime.registry import TaskRegistry

BULK = 1_000
PAGES = ("/", "/queues/watched", "/queues/watched/jobs")


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def rest() -> None:
    await anyio.sleep(0.02)


async def watch(client: httpx.AsyncClient, path: str, seconds: float) -> tuple[int, int]:
    """Look at a page as a browser does; return the requests and the bytes."""
    page = await client.get(path)
    requests, received = 1, len(page.content)
    topic = page.text.partition('sse-connect="')[2].partition('"')[0].replace("&amp;", "&")
    charts = page.text.partition('data-chart="')[2].partition('"')[0]
    end, last_charts = perf_counter() + seconds, 0.0
    with anyio.move_on_after(seconds):
        async with client.stream("GET", topic) as changes:
            requests += 1
            async for line in changes.aiter_lines():
                if not line.startswith("event: changed"):
                    continue
                page = await client.get(path, headers={"HX-Request": "true"})
                requests, received = requests + 1, received + len(page.content)
                if charts and perf_counter() - last_charts > 10:
                    last_charts = perf_counter()
                    found = await client.get(charts)
                    requests, received = requests + 1, received + len(found.content)
    assert perf_counter() >= end - 1
    return requests, received


async def main(jobs: int, seconds: float, idle: bool) -> None:
    registry = TaskRegistry()
    registry.register(rest, queue="watched", name="rest")
    with tempfile.TemporaryDirectory() as folder, EmbeddedServer(Path(folder)) as server:
        async with NATSBackend(server.url) as backend:
            queue = Queue("watched", backend, registry=registry, concurrency=10)
            for _ in range(jobs // BULK):
                await queue.add_bulk([{"task_id": "rest"}] * BULK)
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            command = [sys.executable, "-m", "asyncmq_nats", "dashboard", "--server", server.url]
            command += ["--port", str(port)]
            async with await anyio.open_process(command, stdout=None, stderr=None) as dashboard:
                async with anyio.create_task_group() as group:
                    if not idle:
                        await group.start(queue.run)
                    await measure(server, dashboard.pid, port, seconds)
                    group.cancel_scope.cancel()
                dashboard.terminate()


async def measure(server: EmbeddedServer, pid: int, port: int, seconds: float) -> None:
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
        while True:
            try:
                await client.get("/ready")
                break
            except httpx.TransportError:
                await anyio.sleep(0.1)
        for path in PAGES:
            start = perf_counter()
            await client.get(path)
            first = perf_counter() - start
            before = cpu_seconds(pid), cpu_seconds(server.pid)
            requests, received = await watch(client, path, seconds)
            used = cpu_seconds(pid) - before[0], cpu_seconds(server.pid) - before[1]
            minutes = seconds / 60
            print(
                f"{path:24} first {first * 1000:5.0f} ms   "
                f"a minute: {requests / minutes:5.1f} requests, "
                f"{received / minutes / 1024:6.0f} KiB, "
                f"CPU of the dashboard {used[0] / minutes:5.2f} s, "
                f"of the server {used[1] / minutes:5.2f} s",
                flush=True,
            )


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--jobs", type=int, default=1_000_000)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--idle", action="store_true")
    given = parser.parse_args()
    anyio.run(main, given.jobs, given.seconds, given.idle)
