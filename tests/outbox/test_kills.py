"""Applications, relays and the server are killed by SIGKILL.

Each committed row becomes exactly one job, and no other does.
"""

import itertools
import os
import random
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import pytest
from anyio import to_thread
from sqlalchemy import Engine, func, select, text
from sqlalchemy.orm import Session

from asyncmq_nats.backends.nats.backend import NATSBackend
from asyncmq_nats.backends.nats.embedded.server import EmbeddedServer
from asyncmq_nats.contrib import outbox
from asyncmq_nats.contrib.outbox import OutboxRow
from asyncmq_nats.states import State
from tests.receiver import PATIENCE, holds, until
from tests.running import has, make_queue, running

PROGRAMS = Path(__file__).parent / "programs"
ORDERS = int(os.environ.get("OUTBOX_ORDERS", "120"))
"""2,000 by hand."""


@pytest.fixture
def server_config() -> str:
    """Settings of a server that loses nothing when it is killed again and again.

    See docs/delivery.md.
    """
    return "jetstream { sync_interval: always }"


class Processes:
    """Programs of the tests; all are dead at the end."""

    def __init__(self, environment: dict[str, str], log: Path) -> None:
        self._environment = {**os.environ, **environment}
        self._log = log
        self._started: list[subprocess.Popen[bytes]] = []

    def start(self, program: str, **environment: Any) -> "subprocess.Popen[bytes]":
        own = {name.upper(): str(value) for name, value in environment.items()}
        with self._log.open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, str(PROGRAMS / program)],
                env=self._environment | own,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        self._started.append(process)
        return process

    @property
    def log(self) -> str:
        return self._log.read_text() if self._log.exists() else ""

    def stop(self) -> None:
        for process in self._started:
            process.kill()
            process.wait()


@pytest.fixture
def processes(
    database: str, server: EmbeddedServer, engine: Engine, tmp_path: Path
) -> Iterator[Processes]:
    environment = {
        "DATABASE": engine.url.render_as_string(hide_password=False),
        "ASYNCMQ_NATS_SERVERS": server.url,
    }
    made = Processes(environment, tmp_path / "programs.log")
    yield made
    made.stop()
    with engine.begin() as connection:
        connection.execute(text("DROP TABLE IF EXISTS orders"))


def open_rows(engine: Engine) -> int:
    is_open = OutboxRow.published_at.is_(None)
    with Session(engine) as session:
        return session.scalar(select(func.count()).select_from(OutboxRow).where(is_open)) or 0


async def published(engine: Engine) -> None:
    """Wait until no row is left to publish."""

    async def count() -> int:
        return await to_thread.run_sync(open_rows, engine)

    await until(count, lambda rows: rows == 0, 2 * PATIENCE)


STEPS = ("take:after:1", "enqueue_bulk:after:1", "enqueue:after:2", "finish:after:1")
"""After each of them a relay dies; one that dies before a step has died after the one before."""


@pytest.mark.slow
async def test_relays_may_die_at_each_step(
    processes: Processes, engine: Engine, nats_backend: NATSBackend
) -> None:
    runs: list[int] = []

    async def note(number: int) -> None:
        runs.append(number)

    count = 40
    with Session(engine) as session, session.begin():
        for number in range(count):
            key = "k" if number % 2 else None
            outbox.add(session, "note", [number], queue="orders", order_key=key)
    async with running(make_queue(nats_backend, "orders", note=note)):
        for step in STEPS:
            relay = processes.start("relay.py", die_at=step, batch=4, lease=0.1)
            await holds(lambda: relay.poll() is not None)  # noqa: B023
            assert relay.returncode == -signal.SIGKILL, processes.log
        assert open_rows(engine) > 0
        processes.start("relay.py", batch=4)
        await published(engine)
        await holds(lambda: len(runs) >= count)
    assert sorted(runs) == list(range(count))
    assert [number for number in runs if number % 2] == list(range(1, count, 2))


@pytest.mark.slow
async def test_each_committed_row_is_one_job_whatever_is_killed(
    processes: Processes,
    engine: Engine,
    server: EmbeddedServer,
    nats_backend: NATSBackend,
    tmp_path: Path,
) -> None:
    chance, may_end = random.Random(7), tmp_path / "may_end"
    runs: list[int | str] = []

    async def note(number: int | str) -> None:
        runs.append(number)

    start = partial(processes.start, orders=ORDERS, keyed=10, batch=40, may_end=may_end)
    current = {name: start(f"{name}.py") for name in ("application", "relay")}
    processes.start("relay.py", batch=40)  # this one is only cut off from the server
    kills = Counter[str]()

    async def kill(victim: str) -> None:
        kills[victim] += 1
        if victim == "server":
            await to_thread.run_sync(server.kill)
            await to_thread.run_sync(server.start)
            may_end.touch()  # it is the last kind to be killed
        elif current[victim].poll() is None:
            current[victim].kill()
            current[victim].wait()
            current[victim] = start(f"{victim}.py")

    async def more_runs() -> None:
        # The application waits for `may_end` before it takes the last orders.
        goal = len(runs) + 11 if may_end.exists() else min(len(runs) + 11, ORDERS - 10)
        application = current["application"]
        await holds(lambda: len(runs) >= goal or application.poll() is not None, 2 * PATIENCE)

    queue = make_queue(nats_backend, "orders", concurrency=10, note=note)
    async with running(queue):
        for victim in itertools.cycle(("relay", "application", "server")):
            await more_runs()
            if current["application"].poll() is not None:
                break
            await anyio.sleep(chance.uniform(0, 0.1))
            await kill(victim)
        assert current["application"].returncode == 0, processes.log
        await published(engine)
        await holds(lambda: len(runs) >= ORDERS)
        await until(queue.queue_stats, lambda stats: stats["completed"] >= ORDERS)
    with Session(engine) as session:
        ids = list(session.scalars(text("SELECT job_id FROM orders")))
    assert sorted(job["id"] for job in await queue.list_jobs("completed")) == sorted(ids)
    assert len(ids) >= ORDERS
    await has(queue, len(ids), *State)
    assert await nats_backend.last_sequence("amq_orders") == len(ids), "each was made ready once"
    assert {*runs} <= {*range(ORDERS)}, "none of a transaction that was rolled back"
    assert len(kills) == 3
    print(f"{len(ids)} rows; killed: {dict(kills)}")
