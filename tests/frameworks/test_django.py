"""Django: the app, its outbox on both databases, and the example with its worker and its relay."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
from anyio import to_thread
from sqlalchemy import create_engine, make_url

from asyncmq_nats import InMemoryBackend
from asyncmq_nats.backends.nats.embedded.server import EmbeddedServer
from asyncmq_nats.contrib.outbox import Relay, metadata
from tests.frameworks.sites import EXAMPLES, Site, serving
from tests.receiver import PATIENCE, until
from tests.running import make_queue, run_jobs

pytest.importorskip("django")

SHOP = EXAMPLES / "django_shop"
PROGRAMS = Path(__file__).parent / "programs"


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
async def test_rows_that_django_writes_are_those_of_the_relay(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if kind == "sqlite":
        address = f"sqlite:///{tmp_path / 'shop.db'}"
        environment = {"DATABASE_FILE": str(tmp_path / "shop.db")}
    else:
        address = request.getfixturevalue("postgres_server")
        environment = {"DATABASE_HOST": str(make_url(address).query["host"])}
    done = await to_thread.run_sync(
        lambda: subprocess.run(
            [sys.executable, str(PROGRAMS / "django_outbox.py")],
            env=os.environ | environment,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["stalled_after"] == 7
    assert told["no order without a transaction"]
    assert told["no queue"]
    assert told["one signature"]
    assert told["rows"] == [
        ["work", "k", "first"],
        ["work", "k", "second"],
        ["work", None, "alone"],
    ]
    assert make_url(told["url"]).get_backend_name() == kind

    seen: list[str] = []
    backend = InMemoryBackend()
    relay = Relay(told["url"], backend)
    assert await relay.run_once() == 3
    queue = make_queue(backend, note=seen.append)
    await run_jobs(queue)
    assert sorted(seen) == ["alone", "first", "second"]
    assert seen.index("first") < seen.index("second")
    assert await relay.tidy(age=-1) == 1
    await relay.close()
    if kind == "postgresql":
        engine = create_engine(make_url(address).set(drivername="postgresql+psycopg"))
        metadata.drop_all(engine)
        with engine.begin() as connection:
            connection.exec_driver_sql("DROP TABLE django_migrations")
        engine.dispose()


@contextmanager
def managing(*arguments: str, **environment: str) -> Iterator["subprocess.Popen[str]"]:
    """Run a command of the shop while the block runs; SIGTERM must end it in order."""
    process = subprocess.Popen(
        [sys.executable, str(SHOP / "manage.py"), *arguments],
        env=os.environ | environment,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, errors


@pytest.mark.slow
async def test_a_shop_in_django(server: EmbeddedServer, tmp_path: Path) -> None:
    environment = {
        "NATS_URL": server.url,
        "SHOP_DATABASE": str(tmp_path / "shop.db"),
        "DJANGO_SETTINGS_MODULE": "shop.settings",
    }
    migrated = await to_thread.run_sync(
        lambda: subprocess.run(
            [sys.executable, str(SHOP / "manage.py"), "migrate"],
            env=os.environ | environment,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )
    )
    assert migrated.returncode == 0, migrated.stderr
    with (
        managing("asyncmq_worker", "shop", **environment),
        managing("asyncmq_outbox_relay", "--poll-interval", "0.1", **environment),
        serving("shop.asgi:application", SHOP, lifespan="off", **environment) as site,
    ):
        assert await post(site, "/orders", customer="eve") == 202  # and rolled back
        job_id = (await ask(site, "/orders", customer="ada"))[1]["job"]
        assert await post(site, "/register", name="bob") == 202

        async def job() -> Any:
            return (await to_thread.run_sync(site.ask, f"/jobs/{job_id}"))[1]

        async def count() -> Any:
            return (await to_thread.run_sync(site.ask, "/count"))[1]

        ended = await until(job, lambda job: job and job["state"] == "completed")
        assert ended["result"] == "receipt for ada"
        counts = await until(count, lambda counts: counts["completed"] == 2)
        assert sum(counts.values()) == 2, "none for the order that was rolled back"
        page = await to_thread.run_sync(site.read, "/dashboard/queues/shop")
        assert "shop" in page
        assert "completed" in page


async def ask(site: Site, path: str, **fields: str) -> tuple[int, Any]:
    form = urlencode(fields).encode()
    return await to_thread.run_sync(lambda: site.ask(path, form=form))


async def post(site: Site, path: str, **fields: str) -> int:
    return (await ask(site, path, **fields))[0]


def test_settings_that_cannot_be_are_named() -> None:
    source = (
        "from django.conf import settings; import django;"
        "settings.configure(INSTALLED_APPS=['asyncmq_nats.contrib.django'],"
        "ASYNCMQ_NATS={'severs': 'a'});"
        "django.setup()"
    )
    done = subprocess.run(
        [sys.executable, "-c", source], capture_output=True, text=True, timeout=PATIENCE
    )
    last = done.stderr.strip().splitlines()[-1]
    assert "ImproperlyConfigured: ASYNCMQ_NATS" in last
    assert "did you mean servers?" in last
