"""The audit log: written after the action, read page by page, and never in the way."""

from collections.abc import Callable
from typing import Any

import pytest

from asyncmq_nats import NATSBackend
from asyncmq_nats.audit import AuditEntry, AuditPage, read_audit, record_action
from asyncmq_nats.backends.base import Backend, Write
from asyncmq_nats.exceptions import InvalidArgument, NotSerializable
from asyncmq_nats.queues import list_queues


async def test_an_action_is_read_as_it_was_recorded(backend: Backend) -> None:
    before = backend.now()
    entry = AuditEntry("ana", "job.retry", "email", "failed", 12, {"task": "send"})
    assert await record_action(backend, entry)
    [found] = (await read_audit(backend)).entries
    assert (found.who, found.action, found.queue, found.target) == (
        "ana",
        "job.retry",
        "email",
        "failed",
    )
    assert (found.count, found.details) == (12, {"task": "send"})
    assert found.at >= before - 1
    assert found.id
    assert await list_queues(backend) == []


async def test_pages_go_from_the_newest_to_the_oldest(backend: Backend) -> None:
    for number in range(7):
        await record_action(backend, AuditEntry("ana", "queue.pause", target=str(number)))
    targets: list[str] = []
    page = AuditPage([], None)
    while page.cursor is not None or not targets:
        page = await read_audit(backend, page.cursor, limit=3)
        targets += [entry.target for entry in page.entries]
    assert targets == ["6", "5", "4", "3", "2", "1", "0"]


async def test_entries_are_found_by_queue_person_and_action(backend: Backend) -> None:
    for who in ("ana", "bo"):
        for queue in ("email", "sms"):
            for action in ("job.retry", "job.remove", "queue.pause"):
                await record_action(backend, AuditEntry(who, action, queue))

    async def count(**wanted: Any) -> int:
        return len((await read_audit(backend, **wanted)).entries)

    assert await count(queue="email") == 6
    assert await count(who="bo") == 6
    assert await count(action="job.") == 8
    assert await count(who="ana", queue="sms", action="job.remove") == 1
    assert await count(who="cy") == 0


async def test_records_of_strangers_are_passed_over(backend: Backend) -> None:
    await record_action(backend, AuditEntry("ana", "queue.pause", "email"))
    await backend.write("KV_amq_audit", Write("$KV.amq_audit.email.x", b"no JSON"))
    await backend.write("KV_amq_audit", Write("$KV.amq_audit.email.y", b'{"count":"x"}'))
    entries = (await read_audit(backend)).entries
    assert [(entry.who, entry.count) for entry in entries] == [("", 1), ("ana", 1)]


async def test_a_cursor_of_another_list_is_refused(backend: Backend) -> None:
    with pytest.raises(InvalidArgument):
        await read_audit(backend, "bucket:12")
    with pytest.raises(NotSerializable):
        await record_action(backend, AuditEntry("ana", "job.add", details={"x": object()}))


async def test_what_cannot_be_recorded_is_logged(
    make_backend: Callable[[], Backend], caplog: pytest.LogCaptureFixture
) -> None:
    backend = make_backend()
    if not isinstance(backend, NATSBackend):
        return  # in memory nothing is refused
    backend.may_declare = False
    backend._assets._declare = False
    async with backend:
        assert not await record_action(backend, AuditEntry("ana", "queue.pause", "email"))
    assert "could not record that ana did queue.pause" in caplog.text
