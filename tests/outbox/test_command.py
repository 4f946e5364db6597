"""The commands of `outbox`, each as a user runs it."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from sqlalchemy import Engine, create_engine
from sqlalchemy.orm import Session

from asyncmq_nats.backends.nats.backend import NATSBackend
from asyncmq_nats.backends.nats.embedded.server import EmbeddedServer
from asyncmq_nats.contrib import outbox
from asyncmq_nats.queues import Queue
from tests.receiver import PATIENCE, until


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "asyncmq_nats", "outbox", *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )


@pytest.fixture
def application(sqlite: str) -> Engine:
    return create_engine(sqlite)


@pytest.mark.slow
async def test_a_relay_publishes_until_it_is_told_to_stop(
    sqlite: str, application: Engine, server: EmbeddedServer, nats_backend: NATSBackend
) -> None:
    with Session(application) as session, session.begin():
        for number in range(3):
            outbox.add(session, "note", [number], queue="work")
    waiting = json.loads(run("status", "--database", sqlite, "--json").stdout)
    assert (waiting["waiting"], waiting["refused"]) == (3, 0)
    relay = subprocess.Popen(  # noqa: ASYNC220  the test has nothing else to do
        [sys.executable, "-m", "asyncmq_nats", "-s", server.url, "outbox", "relay"],
        env=os.environ | {"OUTBOX_DATABASE": sqlite},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        await until(Queue("work", nats_backend).count, lambda count: count == 3)
    finally:
        relay.send_signal(signal.SIGTERM)
        _, said = relay.communicate(timeout=PATIENCE)
    assert relay.returncode == 0, said
    assert "publishes rows" in said
    assert run("status", "-d", sqlite).stdout.split()[-3:-1] == ["0", "0"]


def test_a_database_that_it_does_not_know_is_an_error_in_one_line(tmp_path: Path) -> None:
    done = run("relay", "--database", "mysql://host/name")
    assert done.returncode == 1
    assert done.stderr.startswith("error: the database must be an address such as")
    assert done.stderr.count("\n") == 1
    missing = run("status", "--database", f"sqlite:///{tmp_path / 'none.db'}")
    assert missing.returncode == 1
    assert "asyncmq_nats_outbox" in missing.stderr, "it says which table is missing"
    assert missing.stderr.count("\n") == 1
