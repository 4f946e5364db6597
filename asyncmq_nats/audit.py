"""The audit log: which operator did what, when, to how many jobs.

The command line and the dashboard write it.

It is a record for people, not a lock: an action is carried out whether or not it can be recorded.
"""

from dataclasses import dataclass, field
from typing import Any, Final

from asyncmq_nats._arguments import checked_number
from asyncmq_nats._logging import get_logger
from asyncmq_nats.backends.base import Backend, Log, Record, Write
from asyncmq_nats.exceptions import (
    AssetMissing,
    AsyncMQError,
    InvalidArgument,
    InvalidJob,
)
from asyncmq_nats.jobs import new_job_id
from asyncmq_nats.settings import Settings
from asyncmq_nats.wire.codec import dump_json, load_json
from asyncmq_nats.wire.keys import audit_bucket, encode_token, last_token

__all__ = ["AuditEntry", "AuditPage", "read_audit", "record_action"]

logger = get_logger(__name__)

MOST_READ: Final = 5_000
"""Entries that one read looks through, at most."""


@dataclass(frozen=True, slots=True)
class AuditEntry:
    """One thing that an operator did.

    `who`: as the caller knows them, such as `ana` or `cli:root@host`. `action`: such as `job.retry`
    or `queue.pause`. `queue`: its name, `""` if it was none. `target`: such as a job's id, or the
    filter of many. `count`: the number of jobs. `at`: Unix seconds by the server's clock.
    """

    who: str
    action: str
    queue: str = ""
    target: str = ""
    count: int = 1
    details: dict[str, Any] = field(default_factory=dict)
    at: float = 0.0
    id: str = ""


STORED_FIELDS: Final = ("who", "action", "queue", "target", "count", "details")


@dataclass(frozen=True, slots=True)
class AuditPage:
    """Some entries, the newest first.

    `cursor`: where the next page begins, `None` if this is the last.
    """

    entries: list[AuditEntry]
    cursor: str | None


def _audit_log(settings: Settings) -> Log:
    name, key = audit_bucket(settings.prefix)
    return Log(name, (f"{key}>",), timers=True, max_bytes=settings.audit_max_bytes)


async def record_action(backend: Backend, entry: AuditEntry) -> bool:
    """Record what an operator did. Return whether it could be; if not, it is logged.

    Call it after the action: `AuditEntry("ana", "job.retry", "email", job_id)`; its `at` and `id`
    are made here. Nothing is raised for a server that is full, gone, or that forbids it.

    Raises:
        NotSerializable: the details are not JSON.
    """
    log, key = audit_bucket(backend.settings.prefix)
    fields = {name: getattr(entry, name) for name in STORED_FIELDS}
    body = dump_json({"v": 1} | fields, "the details")
    subject = f"{key}{encode_token(entry.queue or '-')}.{new_job_id()}"
    write = Write(subject, body, ttl=backend.settings.audit_ttl)
    try:
        try:
            await backend.write(log, write)
        except AssetMissing:
            await backend.declare_log(_audit_log(backend.settings))
            await backend.write(log, write)
    except AsyncMQError as error:
        what = entry.target or entry.queue
        logger.warning(
            "audit log: could not record that %s did %s to %r: %s",
            entry.who,
            entry.action,
            what,
            error,
        )
        return False
    return True


async def read_audit(
    backend: Backend,
    after: str | None = None,
    *,
    limit: int = 100,
    queue: str | None = None,
    who: str | None = None,
    action: str | None = None,
) -> AuditPage:
    """Return what operators did, the newest first.

    Args:
        backend: where the queues are.
        after: the `cursor` of the page before, `None` for the first.
        limit: how many entries at most. A page may have fewer, and a cursor: 5,000 are looked
            through.
        queue: only actions on this queue.
        who: only actions of this operator.
        action: only this one, such as `job.retry`, or all that begin so, such as `job.`.

    Raises:
        InvalidArgument: the cursor is none of ours.
    """
    log, key = audit_bucket(backend.settings.prefix)
    wanted = checked_number(limit, "limit", 1)
    if after is not None and not (after.isascii() and after.isdigit()):
        raise InvalidArgument("after must be the cursor of a page before", after)
    before = None if after is None else int(after)
    filter = f"{key}{'*' if queue is None else encode_token(queue or '-')}.*"
    found: list[AuditEntry] = []
    seen = 0
    while len(found) < wanted and seen < MOST_READ:
        try:
            records = await backend.page_back(log, filter, before=before, limit=wanted)
        except AssetMissing:
            return AuditPage([], None)
        if not records:
            return AuditPage(found, None)
        seen += len(records)
        for record in records:
            before = record.sequence
            entry = _parse(record)
            if entry is not None and _matches(entry, who, action):
                found.append(entry)
                if len(found) == wanted:
                    break
    return AuditPage(found, str(before))


def _matches(entry: AuditEntry, who: str | None, action: str | None) -> bool:
    if who not in (None, entry.who):
        return False
    if action is not None and action.endswith("."):
        return entry.action.startswith(action)
    return action in (None, entry.action)


def _parse(record: Record) -> AuditEntry | None:
    """Return the entry of a record; `None` for a marker and for what others wrote."""
    if record.marker:
        return None
    try:
        data = load_json(record.body)
    except InvalidJob:
        return None
    texts = {name: str(data.get(name, "")) for name in ("who", "action", "queue", "target")}
    count, details = data.get("count"), data.get("details")
    return AuditEntry(
        **texts,
        count=count if isinstance(count, int) else 1,
        details=details if isinstance(details, dict) else {},
        at=record.time,
        id=last_token(record.subject),
    )
