"""A command that only looks changes nothing on the server: no stream, no consumer, no record."""

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest
from typer.main import get_command

from asyncmq_nats import FlowProducer, Job, NATSBackend, Queue, Settings, current_job
from asyncmq_nats.cli.app import make_app
from asyncmq_nats.store.records import MARKER_TTL
from tests.cli.amq import Amq
from tests.nats.streams import plain_client, stored
from tests.receiver import PATIENCE, until
from tests.running import make_queue, only, outcome, running

FILTERS = "--task * --search o --since 1d --until 2030-01-01 --worker *"
LOOKS = [
    "version",
    "config show",
    "config show --json",
    "permissions worker mail",
    "queue ls",
    "queue ls --json",
    "queue ls --names",
    "queue info mail",
    "queue info odd --json",
    "queue stats mail",
    "queue stats mail --watch --every 0.1s --count 3",
    "queue config get mail",
    "queue config get odd --json",
    "queue export mail EXPORT",
    "queue export odd EXPORT",
    "job ls mail --all",
    f"job ls mail {FILTERS}",
    "job ls mail --json --all --oldest",
    "job ls odd --all",
    *(f"job info mail {state}" for state in ("DONE", "FAILED", "DELAYED", "ACTIVE", "child")),
    "job info mail DONE --json",
    "job logs mail DONE",
    "job result mail DONE",
    "job run mail DONE --tasks tests.cli.looked_at",
    "schedule ls mail",
    "schedule info mail hourly",
    "schedule next mail hourly --count 3",
    "flow show mail child",
    "events --count 1",
    "doctor",
    *(f"doctor --json --role {role}" for role in ("worker", "admin", "reader", "producer")),
    "doctor mail odd nothing",
    "check",
    *(f"check mail odd --format {form}" for form in ("json", "prometheus", "text")),
    "worker list",
    "worker info WORKER",
    *(
        f"job {verb} mail {which} --dry-run"
        for verb in ("retry", "cancel", "rm", "promote", "reschedule --at 1h", "edit -k a=1")
        for which in ("--all", "--task *", "DONE FAILED DELAYED")
    ),
    "job rm mail --state completed --worker * --dry-run",
    "queue drain mail --include-delayed --dry-run",
    "queue clean mail --state completed --dry-run",
    "queue obliterate mail --force --dry-run",
    "queue move mail other --all --dry-run",
]
CHANGES = {
    *("queue pause", "queue resume", "queue config set", "queue import"),
    *("job add", "schedule add", "schedule edit", "schedule rm", "schedule pause"),
    *("schedule resume", "schedule run-now", "worker start", "worker stop"),
    *("server", "dashboard", "outbox relay", "outbox status"),
}
"""Commands that change something and have no dry run; or that are of another server, or of none."""


def names_of(at: Any, name: str = "") -> Iterator[str]:
    if not hasattr(at, "commands"):
        yield name
        return
    for word, each in at.commands.items():
        yield from names_of(each, f"{name} {word}".strip())


def test_each_command_that_changes_nothing_is_in_the_list() -> None:
    names = set(names_of(get_command(make_app())))
    looked = {name for name in names if any(f"{line} ".startswith(f"{name} ") for line in LOOKS)}
    assert looked | CHANGES == names
    assert not looked & CHANGES


@pytest.fixture
def settings() -> Settings:
    """Workers that say nothing by themselves while a test looks at what is stored."""
    return Settings(stalled_after=600, heartbeat_interval=600, metrics=False)


async def work(fails: bool = False) -> str:
    current_job().log("a line")
    if fails:
        raise RuntimeError("no")
    return "done"


@asynccontextmanager
async def world(backend: NATSBackend, url: str) -> AsyncIterator[dict[str, str]]:
    """Have a queue with a job in each state, an odd one, and a worker with a job that runs."""
    release = anyio.Event()
    mail = make_queue(backend, "mail", work=work, wait=release.wait)
    names: dict[str, str] = {}
    async with running(mail) as worker:
        names["DONE"] = await mail.add("work")
        names["FAILED"] = await mail.add("work", [True])
        await outcome(mail, names["FAILED"])
        await mail.upsert_repeatable("work", every="1h", name="hourly")
        await mail.upsert_repeatable("work", cron="0 4 * * *", name="nightly")
        await mail.pause_repeatable("nightly")
        names["DELAYED"] = await mail.add("work", delay=5000, deduplication={"id": "once"})
        await mail.cancel_job(await mail.add("work", delay=5000))
        names["ACTIVE"] = await mail.add("wait")
        await until(mail.queue_stats, lambda stats: stats["active"] == 1)
        await mail.pause()
        for priority in (1, 5, 9):
            await mail.add("work", priority=priority)
        flow = FlowProducer(backend=backend)
        child = Job("work", job_id="child", depends_on=["parent"])
        await flow.add_flow("mail", [Job("work", job_id="parent"), child])
        await _make_odd(backend, url)
        await only(
            mail,
            completed=1,
            failed=1,
            delayed=1,
            cancelled=1,
            active=1,
            **{"waiting": 4, "waiting-children": 1},
        )
        try:
            yield names | {"WORKER": worker.id or ""}
        finally:
            release.set()


async def _make_odd(backend: NATSBackend, url: str) -> None:
    """Make a queue with drift, an orphan tier, and records of strangers."""
    odd = Queue("odd", backend)
    await odd.configure(failed_ttl=86_400, ready_max_bytes=50_000_000)
    await odd.add("work", job_id="ordinary")
    await odd.queue_stats()  # the first count makes the counters
    connection = backend._connection
    assert connection is not None
    async with plain_client(url) as client:
        for subject in ("amq.odd.ready.7.orphan", "amq.odd.ready.5.stranger"):
            await client.request(subject, b"no job")
        held = b'{"moved_from": "somewhere"}'
        await client.request("$KV.amq_odd_scheduler.later.x.delayed", held)
    info = await connection.require("STREAM.INFO.amq_odd")
    await connection.require("STREAM.UPDATE.amq_odd", info["config"] | {"max_bytes": 60_000_000})


async def settled(backend: NATSBackend) -> dict[str, Any]:
    """Return what is stored once the markers of removed records are gone: they expire."""
    before: dict[str, Any] = {}
    with anyio.fail_after(PATIENCE):
        while (found := await stored(backend)) != before:
            before = found
            await anyio.sleep(2 * MARKER_TTL)
    return before


async def test_commands_that_look_change_nothing(
    amq: Amq, nats_backend: NATSBackend, tmp_path: Path
) -> None:
    async with world(nats_backend, amq.url) as names:
        names["EXPORT"] = str(tmp_path / "export")
        before = await settled(nats_backend)
        for line in LOOKS:
            words = [names.get(word, word) for word in line.split()]
            command = " ".join("'*'" if word == "*" else word for word in words)
            seen = anyio.Event()
            async with anyio.create_task_group() as group:
                if line.startswith("events"):
                    group.start_soon(_announce, amq.url, seen)
                result = await amq(command)
                seen.set()
            looked = line.startswith(("doctor", "check"))
            assert result.code == 0 or (looked and "error" not in result.err), (line, result)
            now = await stored(nats_backend)
            changed = [name for name in now | before if now.get(name) != before.get(name)]
            assert not changed, (line, [(before.get(name), now.get(name)) for name in changed])


async def _announce(url: str, seen: anyio.Event) -> None:
    async with plain_client(url) as client:
        while not seen.is_set():
            await client.publish("amq.mail.event.started.x", b"{}")
            await anyio.sleep(0.05)
