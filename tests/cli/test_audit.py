"""Commands that change something are in the audit log: who, what, when, how many."""

from asyncmq_nats import NATSBackend
from asyncmq_nats.audit import read_audit
from asyncmq_nats.cli.command import operator
from asyncmq_nats.contrib.dashboard.redaction import Redactor
from asyncmq_nats.settings import mask_login
from tests.cli.amq import Amq
from tests.running import make_queue, run_jobs


async def fail() -> None:
    raise RuntimeError("boom")


async def test_what_a_command_changed_is_recorded(amq: Amq, nats_backend: NATSBackend) -> None:
    queue = make_queue(nats_backend, fail=fail)
    ids = [await queue.add("fail", job_id=f"mine-{number}") for number in range(3)]
    await run_jobs(queue)
    for line in (
        "queue ls",
        f"job retry work {ids[0]} {ids[1]}",
        "job rm work --task fail --dry-run",
        "queue pause work",
        "queue drain work --force",
    ):
        done = await amq(line)
        assert done.code == 0, done.err
    entries = (await read_audit(nats_backend, queue="work")).entries
    assert [(each.action, each.target, each.count) for each in reversed(entries)] == [
        ("job.retry", "mine-0, mine-1", 2),
        ("queue.pause", "", 1),
        ("queue.drain", "", 2),
    ]
    assert {each.who for each in entries} == {operator()}


async def test_the_login_of_another_server_is_not_recorded(
    amq: Amq, nats_backend: NATSBackend
) -> None:
    queue = make_queue(nats_backend, fail=fail)
    await queue.add("fail")
    await amq.ok(f"queue move work other --all --to-server {amq.url} --force")
    (entry,) = (await read_audit(nats_backend, queue="work")).entries
    assert "@" in amq.url  # it has a token
    assert entry.details["to_server"] == mask_login(amq.url) != amq.url


async def test_the_dashboard_shows_no_arguments_of_commands(
    amq: Amq, nats_backend: NATSBackend
) -> None:
    queue = make_queue(nats_backend, fail=fail)
    await queue.add("fail", job_id="mine", delay=5000)
    lines = (
        "schedule add work often fail hunter2 -k pin=hunter2 --every 1h",
        "schedule edit work often --args '[\"hunter2\"]' -k pin=hunter2",
        'job edit work mine --args \'["hunter2"]\' --kwargs \'{"pin": "hunter2"}\'',
        "job edit work mine -k pin=hunter2",
    )
    for line in lines:
        await amq.ok(line)
    entries = (await read_audit(nats_backend, queue="work")).entries
    assert all("hunter2" in str(each.details) for each in entries)
    shown = [Redactor().details(each.details) for each in entries]
    assert len(shown) == len(lines)
    assert "hunter2" not in str(shown)
