"""How many rows of an outbox relays publish in a second.

Writes rows, then runs relays as processes until the outbox is empty. No worker runs beside them.

    python benchmarks/outbox.py --database sqlite:////tmp/outbox.db --rows 20000 --relays 1
    python benchmarks/outbox.py --database postgresql://user@host/name --rows 20000 --relays 2
    --keys 100

Without ASYNCMQ_NATS_SERVERS it starts a server of its own. The tables are dropped at the end.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import anyio
from sqlalchemy import create_engine, func, select
from sqlalchemy.orm import Session

from asyncmq_nats.backends.nats.embedded.server import EmbeddedServer
from asyncmq_nats.contrib import outbox
from asyncmq_nats.contrib.outbox import OutboxRow, Relay
from asyncmq_nats.contrib.outbox.store import parse_database

IN_TRANSACTION = 100


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--database", required=True)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--relays", type=int, default=1)
    parser.add_argument("--keys", type=int, default=0, help="order keys; 0: none")
    parser.add_argument("--batch", type=int, default=500)
    parser.add_argument("--as-relay", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


@contextmanager
def server() -> Iterator[None]:
    if "ASYNCMQ_NATS_SERVERS" in os.environ:
        yield
        return
    with EmbeddedServer() as embedded:
        os.environ["ASYNCMQ_NATS_SERVERS"] = embedded.url
        yield


async def relay(given: argparse.Namespace) -> None:
    await Relay(given.database, batch_size=given.batch).run()


def main() -> None:
    given = parse()
    if given.as_relay:
        anyio.run(relay, given)
        return
    url = parse_database(given.database)
    engine = create_engine(url.set(drivername=url.drivername.replace("+aiosqlite", "")))
    outbox.metadata.create_all(engine)
    started = time.perf_counter()
    with Session(engine) as session:
        for number in range(given.rows):
            key = f"key {number % given.keys}" if given.keys else None
            outbox.add(session, "work", [number], queue="bench", order_key=key)
            if number % IN_TRANSACTION == IN_TRANSACTION - 1:
                session.commit()
        session.commit()
    print(f"written: {given.rows / (time.perf_counter() - started):,.0f} rows/s")
    is_open = OutboxRow.published_at.is_(None)
    with server():
        started = time.perf_counter()
        command = [sys.executable, *sys.argv, "--as-relay"]
        relays = [subprocess.Popen(command) for _ in range(given.relays)]
        first = None
        with Session(engine) as session:
            while left := session.scalar(select(func.count()).where(is_open)):
                session.rollback()
                if first is None and left < given.rows:
                    first = time.perf_counter(), left
                time.sleep(0.02)
        ended = time.perf_counter()
        for each in relays:
            each.terminate()
            each.wait()
    assert first is not None
    print(f"published: {given.rows / (ended - started):,.0f} rows/s with the start of the relays")
    print(f"           {first[1] / (ended - first[0]):,.0f} rows/s after the first ones")
    outbox.metadata.drop_all(engine)
    engine.dispose()


if __name__ == "__main__":
    main()
