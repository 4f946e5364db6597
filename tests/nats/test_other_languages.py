"""A client in JavaScript, with the @nats-io packages, adds jobs, follows events and reads a result.

Skipped where there is no Node.js.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import anyio
import pytest

from asyncmq_nats.backends.base import Backend
from asyncmq_nats.backends.nats.embedded.server import EmbeddedServer
from tests.nats.processes import PROGRAM
from tests.running import make_queue, running

PACKAGES = ["@nats-io/transport-node@3", "@nats-io/jetstream@3", "@nats-io/kv@3"]
INSTALL, RUN = 45, 15


@pytest.fixture(scope="session")
def node(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the packages; in `NODE_CLIENT_DIR` they may be installed already."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("no node and npm")
    if "NODE_CLIENT_DIR" in os.environ:
        return Path(os.environ["NODE_CLIENT_DIR"])
    return tmp_path_factory.mktemp("node")


async def install(directory: Path) -> None:
    if (directory / "node_modules" / "@nats-io" / "kv").exists():
        return
    (directory / "package.json").write_text("{}")
    command = ["npm", "install", "--no-audit", "--no-fund", "--fetch-retries=0", *PACKAGES]
    try:
        with anyio.fail_after(INSTALL):
            result = await anyio.run_process(command, cwd=directory, check=False)
    except TimeoutError:
        pytest.skip(f"npm did not install the packages in {INSTALL} s")
    if result.returncode:
        pytest.skip(
            f"npm cannot install the packages: {result.stderr.decode(errors='replace')[-200:]}"
        )


async def test_a_javascript_client_adds_jobs_follows_events_and_reads_a_result(
    node: Path, server: EmbeddedServer, nats_backend: Backend
) -> None:
    await install(node)

    async def echo(value: Any) -> Any:
        return value

    async with running(make_queue(nats_backend, "mixed", echo=echo)):
        with anyio.fail_after(RUN):
            program = str(PROGRAM.with_name("client.mjs"))
            result = await anyio.run_process(
                ["node", program, server.url, "mixed"], cwd=node, check=False
            )
    assert result.returncode == 0, result.stderr.decode()
    told = json.loads(result.stdout)
    first, second, delayed = told["ids"]
    assert told["results"] == {first: "ä ✓", second: {"nested": [1, None]}, delayed: "later"}
    for job_id in (first, second):
        assert told["seen"][job_id] == ["started", "completed"]
    assert [what for what in told["seen"][delayed] if what != "released"] == [
        "delayed",
        "started",
        "completed",
    ]
    assert (told["outcome"]["id"], told["outcome"]["status"], told["outcome"]["result"]) == (
        first,
        "completed",
        "ä ✓",
    )
