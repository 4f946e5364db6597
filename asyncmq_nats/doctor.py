"""Typed findings: faults of a server, an account and its queues, and how to mend them.

`examine` looks at everything and changes nothing; `mend` does what is safe. `check` is one look for
monitoring. Neither needs the code of the application.
"""

import json
import os
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import partial
from typing import Any, Final, Literal

import anyio
from anyio import to_thread

from asyncmq_nats._concurrency import deadline, open_task_group
from asyncmq_nats._version import __version__
from asyncmq_nats.backends.base import Backend, Difference, LogState, ServerFacts
from asyncmq_nats.exceptions import (
    AsyncMQError,
    ConnectionFailed,
    PermissionRefused,
    ServerUnsuitable,
    Unconfirmed,
)
from asyncmq_nats.queues import Queue, list_queues
from asyncmq_nats.runtime.control import list_workers
from asyncmq_nats.settings import find_unknown_variables

__all__ = [
    "Check",
    "Finding",
    "Level",
    "Role",
    "Thresholds",
    "check",
    "examine",
    "mend",
    "subjects_of",
    "worst",
]

OFFSET_LIMIT: Final = 1.0
"""Seconds that the clock of this machine may differ from the server's."""
SMALL_BODY: Final = 256 * 1024
FULL_SHARE: Final = 0.8
MONITOR_TIMEOUT: Final = 3.0
REPLICA_LOSS_SECONDS: Final = 5.0
"""Seconds after which a replica that is not up to date counts as lost."""
SETTLING: Final = (0.1, 0.2, 0.4, 0.8)
"""Pauses (seconds) before further looks at a log: a replica is behind for moments when in use."""
STEP_TIMEOUT: Final = 5.0
"""Seconds that one look at a queue may take: a consumer on a lost server does not answer."""
APPLY_ADVICE: Final = (
    "or apply them: `amq doctor --fix`, ASYNCMQ_NATS_APPLY=true, `amq queue config set`"
)

Role = Literal["worker", "admin", "reader", "producer"]


class Level(StrEnum):
    """How bad a finding is."""

    OK = "ok"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


SEVERITY: Final = {Level.OK: 0, Level.INFO: 1, Level.WARNING: 2, Level.ERROR: 3}


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at.

    `check`: a stable word for programs, such as `drift`. `subject`: what it is about, such as
    `queue mail`. `what`: what was found. `mend`: what to do, or "". `fix`: mends it, where that is
    safe; it returns what it did.
    """

    level: Level
    check: str
    subject: str
    what: str
    mend: str = ""
    fix: Callable[[], Awaitable[str]] | None = field(default=None, repr=False, compare=False)


def worst(levels: Sequence[Level]) -> Level:
    """Return the worst of some levels; OK if there are none."""
    return max(levels, key=SEVERITY.__getitem__, default=Level.OK)


# -- doctor


async def examine(
    backend: Backend,
    *,
    queues: Sequence[str] | None = None,
    role: Role = "worker",
    monitor: str | None = None,
) -> AsyncIterator[Finding]:
    """Yield what was found, the server first. Changes nothing.

    Args:
        backend: connected or not.
        queues: names of queues; by default all that are there.
        role: whose permissions this login needs, see docs/protocol.md.
        monitor: the address of the server's monitoring port, such as `http://127.0.0.1:8222`: only
            that tells of `sync_interval`.
    """
    for sentence in find_unknown_variables(os.environ):
        yield Finding(Level.WARNING, "settings", "environment", sentence, "mend its name")
    try:
        facts = await backend.describe_server()
    except AsyncMQError as error:
        yield _explain(error)
        return
    for finding in await _examine_server(facts, monitor):
        yield finding
    names, findings = await _find_queues(backend, queues, role)
    for finding in findings:
        yield finding
    for name in names:
        for finding in await _examine_queue(Queue(name, backend), facts, role):
            yield finding


async def _examine_server(facts: ServerFacts | None, monitor: str | None) -> list[Finding]:
    if facts is None:
        return [Finding(Level.INFO, "server", "in memory", "there is no server to look at")]
    return [*_judge_server(facts), *_judge_account(facts), await _examine_sync(monitor)]


async def _find_queues(
    backend: Backend, queues: Sequence[str] | None, role: Role
) -> tuple[list[str], list[Finding]]:
    """Return the names of the queues to examine, and the findings about all of them."""
    names = list(queues or ())
    if role == "producer":  # its login may look no further
        return names, []
    try:
        if queues is None:
            names = await list_queues(backend)
        versions = {worker.version or "older" for worker in await list_workers(backend)}
    except AsyncMQError as error:
        return names, [_explain(error)]
    findings: list[Finding] = []
    if not names:
        findings.append(Finding(Level.INFO, "queues", "server", "there is no queue yet"))
    if len(versions | {__version__}) > 1:
        what = f"releases that run: {', '.join(sorted(versions))}; this one is {__version__}"
        mend = "finish the upgrade: workers first, then producers"
        findings.append(Finding(Level.INFO, "versions", "workers", what, mend))
    return names, findings


async def mend(findings: Sequence[Finding]) -> list[tuple[Finding, str]]:
    """Mend the findings that are safe to mend.

    Return each of them, and what was done or why not.
    """
    done: list[tuple[Finding, str]] = []
    for finding in findings:
        if finding.fix is not None:
            try:
                done.append((finding, await finding.fix()))
            except AsyncMQError as error:
                done.append((finding, f"not mended: {error}"))
    return done


def _explain(error: AsyncMQError) -> Finding:
    """Return the finding for the error of a call."""
    text = str(error)
    if isinstance(error, PermissionRefused):
        mend = "give this login the subjects that docs/protocol.md lists for its role"
        return Finding(Level.ERROR, "permissions", "login", text, mend)
    if isinstance(error, ServerUnsuitable):
        check = "version" if "too old" in text else "jetstream"
        problem, _, remedy = text.partition(": ")
        return Finding(Level.ERROR, check, "server", problem, remedy)
    if isinstance(error, ConnectionFailed):
        if "authorization" in text.lower():
            mend = "check user, password, token or credentials (ASYNCMQ_NATS_USER, …, or a context)"
            return Finding(Level.ERROR, "login", "server", text, mend)
        mend = "start the server, or name it: ASYNCMQ_NATS_SERVERS, NATS_URL, --server"
        return Finding(Level.ERROR, "connection", "server", text, mend)
    if isinstance(error, Unconfirmed):
        text = "it does not answer in time, or a part of it: a lost server has what was asked for"
    return Finding(Level.ERROR, "connection", "server", text, "try again; is the cluster whole?")


def _judge_server(facts: ServerFacts) -> list[Finding]:
    where = f"nats-server {facts.version} at {facts.servers}"
    findings = [Finding(Level.OK, "connection", "server", f"{where} answers")]
    if facts.mixes_up_expectations:
        findings.append(
            Finding(
                Level.ERROR if facts.is_clustered else Level.INFO,
                "version",
                "server",
                f"{facts.version} mixes up what batches expect (nats-server#8377)",
                "upgrade to 2.12.14, 2.14.4 or newer"
                + ("" if facts.is_clustered else " before it becomes a cluster"),
            )
        )
    offset = facts.clock_offset
    if offset is not None and abs(offset) > OFFSET_LIMIT:
        direction = "ahead of" if offset > 0 else "behind"
        findings.append(
            Finding(
                Level.WARNING,
                "clock",
                "this machine",
                f"its clock is {abs(offset):.1f} s {direction} the server's, which counts",
                "run NTP here and on the servers; times in your code (run_at, until) are off",
            )
        )
    if facts.max_body < SMALL_BODY:
        findings.append(
            Finding(
                Level.INFO,
                "max_payload",
                "server",
                f"a message may have {facts.max_body:,} bytes",
                "raise max_payload if jobs or results are refused as too large",
            )
        )
    return findings


def _judge_account(facts: ServerFacts) -> list[Finding]:
    used, most = facts.stored_bytes, facts.max_stored_bytes
    if used is None:
        what = "this login may not ask how full the account is ($JS.API.INFO)"
        return [Finding(Level.INFO, "storage", "account", what)]
    if most is None:
        return [Finding(Level.OK, "jetstream", "account", f"JetStream has {used:,} bytes stored")]
    share = used / most
    what = f"{used:,} of {most:,} bytes are stored ({share:.0%})"
    if share < FULL_SHARE:
        return [Finding(Level.OK, "storage", "account", what)]
    mend = "clean outcomes (`amq queue clean`), shorten their time to live, or raise the limit"
    level = Level.ERROR if share > 0.95 else Level.WARNING
    return [Finding(level, "storage", "account", what, mend)]


async def _examine_sync(monitor: str | None) -> Finding:
    mend = "set `sync_interval: always` in the jetstream block of each server's configuration"
    if monitor is None:
        what = "clients are not told of sync_interval"
        hint = "name the monitoring port: --monitor http://127.0.0.1:8222"
        return Finding(Level.INFO, "sync_interval", "server", what, hint)
    try:
        config = await to_thread.run_sync(_read_config, monitor)
    except (OSError, ValueError) as error:
        hint = "name a server's monitoring port (http_port) that can be reached from here"
        return Finding(Level.WARNING, "sync_interval", "server", f"{monitor}: {error}", hint)
    if config.get("sync_always"):
        return Finding(Level.OK, "sync_interval", "server", "each write is synced to the disk")
    seconds = config.get("sync_interval", 0) / 1e9
    what = (
        f"files are synced every {seconds:g} s: a power cut takes what was confirmed since "
        "(docs/delivery.md)"
    )
    return Finding(Level.WARNING, "sync_interval", "server", what, mend)


def _read_config(monitor: str) -> dict[str, Any]:
    url = f"{monitor.rstrip('/')}/jsz"
    if not url.startswith(("http://", "https://")):
        raise ValueError("the address of a monitoring port begins with http:// or https://")
    with urllib.request.urlopen(url, timeout=MONITOR_TIMEOUT) as answer:
        data = json.load(answer)
    config = data.get("config") if isinstance(data, dict) else None
    if not isinstance(config, dict):
        raise ValueError("no JetStream is told of there")
    return config


async def _examine_queue(queue: Queue, facts: ServerFacts | None, role: Role) -> list[Finding]:
    subject = f"queue {queue.name}"
    steps: list[Callable[[], Awaitable[list[Finding]]]] = [
        partial(_examine_permissions, queue, role),
        partial(_examine_logs, queue, facts),
        partial(_examine_drift, queue),
        partial(_examine_work, queue),
    ]
    findings: list[Finding] = []
    for step in steps[:1] if role == "producer" else steps:
        try:
            with deadline(STEP_TIMEOUT):
                findings += await step()
        except AsyncMQError as error:
            explained = _explain(error)
            findings.append(
                Finding(explained.level, explained.check, subject, explained.what, explained.mend)
            )
    if not findings:
        findings.append(Finding(Level.OK, "queue", subject, "nothing is wrong"))
    return findings


async def _examine_permissions(queue: Queue, role: Role) -> list[Finding]:
    settings = queue.backend.settings
    publish, subscribe = subjects_of(role, settings.prefix, queue.name, settings.domain)
    refused = await queue.backend.find_refused(publish, subscribe)
    if not refused:
        return []
    shown = ", ".join(refused[:5]) + (f" and {len(refused) - 5} more" if len(refused) > 5 else "")
    what = f"this login is no {role}: the server refuses {shown}"
    mend = "grant them (docs/protocol.md#permissions), or name the role of this login: --role"
    return [Finding(Level.ERROR, "permissions", f"queue {queue.name}", what, mend)]


async def _examine_logs(queue: Queue, facts: ServerFacts | None) -> list[Finding]:
    prefix, subject = queue.backend.settings.prefix, f"queue {queue.name}"
    names = [f"{prefix}_{queue.name}", f"KV_{prefix}_{queue.name}_scheduler"]
    logs: dict[str, LogState | None] = dict.fromkeys(names)

    async def look(name: str) -> None:
        logs[name] = await _look_at_log(queue.backend, name)

    async with open_task_group() as group:
        for name in names:
            group.start_soon(look, name)
    missing = [name for name, log in logs.items() if log is None]
    if len(missing) == len(names):
        return [Finding(Level.INFO, "streams", subject, "it does not exist yet")]
    findings = [
        Finding(
            Level.ERROR,
            "streams",
            subject,
            f"stream {name} is missing, and all that was in it",
            "start a worker: it makes the stream again",
        )
        for name in missing
    ]
    for name, log in logs.items():
        if log is not None:
            findings += _judge_log(name, log, subject, facts)
    return findings


async def _look_at_log(backend: Backend, name: str) -> LogState | None:
    """Return how a log is kept. A replica that is up to date at one of several looks is so."""
    log = await backend.describe_log(name)
    for pause in SETTLING:
        if log is None or (log.has_leader and all(peer.is_current for peer in log.peers)):
            break
        current = {peer.name for peer in log.peers if peer.is_current}
        await anyio.sleep(pause)
        log = await backend.describe_log(name)
        if log is not None:
            peers = [replace(p, is_current=p.is_current or p.name in current) for p in log.peers]
            log = replace(log, peers=tuple(peers))
    return log


def _judge_log(name: str, log: LogState, subject: str, facts: ServerFacts | None) -> list[Finding]:
    findings: list[Finding] = []
    # A server that is down counts as offline after a while only.
    offline = [
        f"{peer.name} (silent for {peer.silent_seconds:.0f} s)"
        for peer in log.peers
        if peer.is_offline or (peer.silent_seconds > REPLICA_LOSS_SECONDS and not peer.is_current)
    ]
    late = [peer for peer in log.peers if not peer.is_current] if not offline else []
    if not log.has_leader:
        what = f"stream {name} has no leader: nothing can be added or run"
        mend = "start the servers that are down: more than half of its replicas must run"
        findings.append(Finding(Level.ERROR, "leader", subject, what, mend))
    if offline:
        what = f"stream {name} lacks its replica on {', '.join(offline)}"
        mend = "start that server; if it is gone for good, `nats stream cluster peer-remove`"
        findings.append(Finding(Level.ERROR, "replica", subject, what, mend))
    if late:
        what = f"stream {name}: {late[0].name} is {late[0].lag:,} operations behind"
        mend = "wait; if it does not catch up, look at that server's disk and log"
        findings.append(Finding(Level.WARNING, "replica", subject, what, mend))
    if facts is not None and facts.is_clustered and log.replicas == 1:
        what = f"stream {name} has one replica in a cluster: it stands still with its server"
        mend = f"amq queue config set {subject.removeprefix('queue ')} replicas=3"
        findings.append(Finding(Level.WARNING, "replicas", subject, what, mend))
    if log.max_bytes is not None and log.bytes > FULL_SHARE * log.max_bytes:
        what = f"stream {name} has {log.bytes:,} of {log.max_bytes:,} bytes"
        mend = "run more workers, clean outcomes, or raise the limit by `queue config set`"
        findings.append(Finding(Level.WARNING, "storage", subject, what, mend))
    return findings


async def _examine_drift(queue: Queue) -> list[Finding]:
    async def apply() -> str:
        changed = await queue.apply_settings()
        return "; ".join(map(_describe, changed)) or "nothing was left to change"

    findings: list[Finding] = []
    for each in await queue.find_drift():
        mend = "set this process's settings right; "
        mend += APPLY_ADVICE if each.can_change else "the server cannot change it in place"
        # All differences of a queue are mended together, by the first one.
        is_first = each.can_change and not any(found.fix for found in findings)
        findings.append(
            Finding(
                Level.WARNING,
                "drift",
                f"queue {queue.name}",
                f"{each.asset}: {each.key} is {each.found!r}, the settings say {each.wanted!r}",
                mend,
                apply if is_first else None,
            )
        )
    return findings


def _describe(difference: Difference) -> str:
    return f"{difference.asset}: {difference.key} is {difference.wanted!r} now"


async def _examine_work(queue: Queue) -> list[Finding]:
    """Look for jobs that no worker runs, and for what was left over."""
    subject = f"queue {queue.name}"
    counts = await queue.queue_stats()
    workers = await queue.list_workers()
    findings: list[Finding] = []
    if await queue.is_paused():
        what = f"it is paused, and {counts['waiting']:,} jobs wait"
        mend = f"amq queue resume {queue.name}"
        findings.append(Finding(Level.INFO, "paused", subject, what, mend))
    elif counts["waiting"] and not workers:
        what = f"{counts['waiting']:,} jobs wait, and no worker runs"
        mend = f"amq worker start {queue.name} --tasks YOUR.MODULE"
        findings.append(Finding(Level.ERROR, "workers", subject, what, mend))
    orphans = await queue.find_orphan_priorities()
    if orphans:
        what = f"jobs of the priorities {', '.join(map(str, orphans))} have no consumer"

        async def declare() -> str:
            made = await queue.declare_orphan_priorities()
            return f"made the consumers of {', '.join(map(str, made)) or 'none'}"

        mend = "a worker makes them within 30 s; without one: `amq doctor --fix`"
        findings.append(Finding(Level.WARNING, "orphans", subject, what, mend, declare))
    return findings


def subjects_of(
    role: Role, prefix: str, queue: str, domain: str | None = None
) -> tuple[list[str], list[str]]:
    """Return what a role must be able to publish to and to subscribe to, one subject of each kind.

    docs/protocol.md has the same as filters.
    """
    ready, bucket, workers = (
        f"{prefix}_{queue}",
        f"KV_{prefix}_{queue}_scheduler",
        f"KV_{prefix}_workers",
    )
    key = f"$KV.{prefix}_{queue}_scheduler"
    own = f"{prefix}.{queue}"
    read = [f"CONSUMER.INFO.{ready}.tier_5", f"DIRECT.GET.{ready}", f"DIRECT.GET.{bucket}"]
    look = [
        *read,
        f"CONSUMER.NAMES.{ready}",
        f"CONSUMER.INFO.{bucket}.promoter",
        f"DIRECT.GET.{workers}",
        f"STREAM.INFO.{ready}",
        f"STREAM.INFO.{bucket}",
    ]
    change = [
        f"CONSUMER.PAUSE.{ready}.doctor",  # there is no such consumer: nothing can be resumed
        f"STREAM.MSG.DELETE.{ready}",
        f"STREAM.MSG.DELETE.{bucket}",
        f"STREAM.PURGE.{bucket}",
    ]
    work = [
        *(f"STREAM.CREATE.{name}" for name in (ready, bucket, workers)),
        f"CONSUMER.CREATE.{ready}.tier_5.{own}.ready.5.*",
        f"CONSUMER.MSG.NEXT.{ready}.tier_5",
        f"CONSUMER.MSG.NEXT.{bucket}.promoter",
        f"STREAM.MSG.DELETE.{workers}",
    ]
    records = [f"{key}.later.doctor.delayed", f"{key}.queue.secret"]
    api = {"reader": look, "admin": look + change, "producer": read, "worker": look + change + work}
    plain = {
        "reader": [],
        "admin": [f"{own}.control.pause", *records],
        "producer": [f"{own}.ready.5.doctor", f"{own}.control.tier", *records],
        "worker": [
            f"{own}.ready.5.doctor",
            f"{own}.event.doctor.doctor",
            f"$KV.{prefix}_workers.doctor",
            *records,
        ],
    }
    subscribe = {
        "reader": [f"{own}.event.*.*"],
        "admin": [f"{own}.control.answer.doctor"],
        "producer": [f"{own}.event.*.*"],
        "worker": [f"{own}.control.*", f"{own}.event.*.*"],
    }
    start = f"$JS.{domain}.API." if domain else "$JS.API."
    return [start + each for each in api[role]] + plain[role], subscribe[role]


# -- monitoring


@dataclass(frozen=True, slots=True)
class Thresholds:
    """The bounds from which a check is a warning or an error. `None` is no bound.

    `waiting`: jobs that wait. `age`: seconds for which the oldest of them has waited. `failed`:
    failed jobs that are kept. `workers`: fewer are an error.
    """

    waiting: tuple[int | None, int | None] = (None, None)
    age: tuple[float | None, float | None] = (None, None)
    failed: tuple[int | None, int | None] = (None, None)
    workers: int | None = None


@dataclass(frozen=True, slots=True)
class Check:
    """One look at some queues. `figures`: by queue, then by name; ages in seconds."""

    level: Level
    text: str
    figures: dict[str, dict[str, float]]


async def check(
    backend: Backend, queues: Sequence[str] | None = None, thresholds: Thresholds | None = None
) -> Check:
    """Look at the queues, by default at all, and compare with the thresholds.

    A server that cannot be reached is an error, not an exception.
    """
    bounds = thresholds or Thresholds()
    figures: dict[str, dict[str, float]] = {}
    problems: list[tuple[Level, str]] = []
    try:
        for name in await list_queues(backend) if queues is None else queues:
            with deadline(STEP_TIMEOUT):
                figures[name] = await _measure(Queue(name, backend))
            problems += _compare(name, figures[name], bounds)
    except AsyncMQError as error:
        problems.append((Level.ERROR, str(error)))
    level = worst([each for each, _ in problems])
    if problems:
        text = "; ".join(text for each, text in problems if each is level)
    else:
        waiting = sum(each["waiting"] for each in figures.values())
        text = f"{len(figures)} queues, {waiting:,.0f} jobs wait"
    return Check(level, text, figures)


async def _measure(queue: Queue) -> dict[str, float]:
    counts = await queue.queue_stats()
    oldest = await queue.oldest_waiting()
    return {
        "waiting": counts["waiting"],
        "active": counts["active"],
        "delayed": counts["delayed"],
        "failed": counts["failed"],
        "oldest_waiting_seconds": 0.0 if oldest is None else round(oldest.age, 3),
        "workers": len(await queue.list_workers()),
        "paused": float(await queue.is_paused()),
    }


def _compare(name: str, found: dict[str, float], bounds: Thresholds) -> list[tuple[Level, str]]:
    problems: list[tuple[Level, str]] = []
    for key, what, (warning, error) in (
        ("waiting", "jobs wait", bounds.waiting),
        ("oldest_waiting_seconds", "s is the age of the oldest waiting job", bounds.age),
        ("failed", "jobs have failed", bounds.failed),
    ):
        value = found[key]
        text = f"{name}: {value:,.10g} {what}"
        if error is not None and value >= error:
            problems.append((Level.ERROR, text))
        elif warning is not None and value >= warning:
            problems.append((Level.WARNING, text))
    if bounds.workers is not None and found["workers"] < bounds.workers:
        text = f"{name}: {found['workers']:.0f} workers run, {bounds.workers} should"
        problems.append((Level.ERROR, text))
    return problems
