"""Commands that change something are in the audit log: who, what, when, how many."""

from asyncmq_nats import NATSBackend
from asyncmq_nats.audit import read_audit
from asyncmq_nats.cli.command import operator
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
