"""The output of `amq permissions` is enough for the commands of that role, on a real server."""

import re
from pathlib import Path

import pytest

from asyncmq_nats import NATSBackend
from asyncmq_nats.backends.nats.embedded.server import EmbeddedServer
from tests.cli.amq import Amq
from tests.running import make_queue, run_jobs

READS = (
    "queue ls",
    "queue info mail",
    "queue stats mail",
    "job ls mail",
    "job ls mail --since 1h --search boom",
    "job info mail failed",
    "schedule ls mail",
    "flow show mail failed",
    "worker list",
)
CHANGES = (
    "job edit mail late --args '[2]'",
    "job reschedule mail late --at 2h",
    "job promote mail late",
    "job cancel mail late",
    "job retry mail --task fail --force",
    "job rm mail --state cancelled --force",
    "schedule pause mail hourly",
    "schedule resume mail hourly",
    "queue pause mail",
    "queue resume mail",
    "queue drain mail --force",
)
ADDS = ("job add mail echo", "job add mail echo --id mine --delay 1h", "job info mail mine")


async def fail() -> None:
    raise RuntimeError("boom")


async def test_each_role_can_use_its_commands(
    amq: Amq, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    users = 'user: root, password: "pw"}, {'
    for role in ("reader", "admin", "producer"):
        printed = (await amq.ok(f"permissions {role} mail --user {role}")).out
        users += f"{printed.replace(f'user: {role}', f'user: {role}, password: pw')}}}, {{"
    config = f"authorization: {{ users: [ {{ {users.removesuffix(', {')} ] }}"
    with EmbeddedServer(tmp_path / "guarded", config=config) as guarded:
        async with NATSBackend(guarded.url, user="root", password="pw") as backend:
            queue = make_queue(backend, "mail", fail=fail)
            await queue.add("fail", job_id="failed")
            await run_jobs(queue)
            await queue.add("echo", [1], delay=1000, job_id="late")
            await queue.upsert_repeatable("echo", every="1h", name="hourly")
            await queue.queue_stats()
        for role, lines in {"reader": READS, "admin": READS + CHANGES, "producer": ADDS}.items():
            role_amq = Amq(guarded.url.replace("//", f"//{role}:pw@"), capsys)
            for line in lines:
                await role_amq.ok(f"{line} --no-declare")
        refused = await Amq(guarded.url.replace("//", "//reader:pw@"), capsys).fails(
            "job cancel mail mine --no-declare"
        )
        assert "is not permitted" in refused
        log = (tmp_path / "guarded" / "nats-server.log").read_text()
    assert len(set(re.findall(r"\[ERR\].*Violation.*", log))) <= 2, log
