"""A person finds why jobs fail, fixes the code, and retries those of one task among 10,000.

python benchmarks/failed_jobs.py

Prints the terminal session that docs/troubleshooting-session.md shows: each command, what it
printed, and how long all of its process took, and its CPU time. `--jobs` says how many jobs fail; a
quarter of them is of the task.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import anyio

import asyncmq_nats
from asyncmq_nats import JobFilter, NATSBackend, Queue

BROKEN = """from asyncmq_nats import task


@task(queue="shop")
async def charge(order: dict) -> int:
    return order["total"] * 100


@task(queue="shop")
async def mail(address: str) -> None:
    raise ConnectionError(f"no mail server for {address}")
"""
FIXED = BROKEN.replace('order["total"]', 'order["amount"]')


PACKAGES = str(Path(asyncmq_nats.__file__).parents[1])


class Terminal:
    """Runs commands in one directory, and prints what a person would see."""

    def __init__(self, directory: Path, url: str) -> None:
        self._directory = directory
        paths = f"{directory}:{os.environ.get('PYTHONPATH', '')}"
        self._env = os.environ | {"NATS_URL": url, "PYTHONPATH": paths, "COLUMNS": "110"}

    def run(self, line: str) -> None:
        arguments, began = (
            [sys.executable, "-m", "asyncmq_nats", *line.split()],
            time.perf_counter(),
        )
        with (
            tempfile.TemporaryFile("w+") as out,
            subprocess.Popen(
                arguments, env=self._env, cwd=self._directory, stdout=out, stderr=out
            ) as process,
        ):
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            out.seek(0)
            printed = out.read()
        seconds, cpu = time.perf_counter() - began, usage.ru_utime + usage.ru_stime
        shown = "".join(line.rstrip() + "\n" for line in printed.splitlines())
        shown = shown.replace(str(self._directory), "/srv/shop").replace(PACKAGES, "/srv/lib")
        print(f"$ amq {line}\n{shown}[{seconds:.1f} s, CPU {cpu:.1f} s]\n", flush=True)

    def start_worker(self) -> subprocess.Popen[str]:
        line = ["worker", "start", "shop", "--tasks", "shop_tasks", "--concurrency", "50"]
        arguments = [sys.executable, "-m", "asyncmq_nats", *line]
        return subprocess.Popen(
            arguments,
            env=self._env,
            cwd=self._directory,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            text=True,
        )


async def fail_jobs(terminal: Terminal, backend: NATSBackend, count: int) -> None:
    """Have a worker run jobs that all fail."""
    queue, quarter = Queue("shop", backend), count // 4
    orders = [{"task_id": "shop_tasks.charge", "args": [{"amount": n}]} for n in range(quarter)]
    mails = [{"task_id": "shop_tasks.mail", "args": [f"u{n}@x.org"]} for n in range(3 * quarter)]
    await queue.add_bulk(orders + mails)
    with terminal.start_worker() as worker:
        await wait_for(queue, "failed", count)
        worker.terminate()


async def wait_for(queue: Queue, state: str, count: int) -> None:
    while (await queue.queue_stats())[state] < count:  # noqa: ASYNC110
        await anyio.sleep(0.2)


async def main(count: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        directory, tasks = Path(name), Path(name) / "shop_tasks.py"
        async with NATSBackend.embedded() as backend:
            tasks.write_text(BROKEN)
            terminal = Terminal(directory, str(backend._embedded.url))  # type: ignore[union-attr]
            await fail_jobs(terminal, backend, count)
            terminal.run("queue info shop")
            terminal.run("job ls shop --state failed --limit 3")
            terminal.run("job ls shop --state failed --task *.charge --limit 3")
            queue = Queue("shop", backend)
            where = JobFilter(state="failed", task="*.charge")
            (job,) = [job async for job in queue.search(where, limit=1)]
            terminal.run(f"job info shop {job['id']}")
            terminal.run(f"job run shop {job['id']} --tasks shop_tasks")
            tasks.write_text(FIXED)
            print('$ sed -i \'s/order\\["total"\\]/order["amount"]/\' shop_tasks.py\n')
            terminal.run(f"job run shop {job['id']} --tasks shop_tasks")
            print("$ amq worker start shop --tasks shop_tasks --concurrency 50 &\n")
            with terminal.start_worker() as worker:
                terminal.run("job retry shop --task *.charge --dry-run")
                async with anyio.create_task_group() as group:
                    watch = "queue stats shop --watch --every 2s --count 12"
                    group.start_soon(anyio.to_thread.run_sync, terminal.run, watch)
                    line = "job retry shop --task *.charge --force"
                    group.start_soon(anyio.to_thread.run_sync, terminal.run, line)
                await wait_for(queue, "completed", count // 4)
                terminal.run("queue info shop")
                worker.terminate()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=10_000)
    anyio.run(main, parser.parse_args().jobs)
