"""Alerts: functions that are called when jobs fail, too many of them do, or a queue is stuck.

A webhook is in the box: it is a job itself, so it is retried, and sent once however many programs
watch the queue.
"""

import hashlib
import hmac
import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Final, Literal, TypeVar

import anyio
from anyio.abc import TaskStatus

from asyncmq_nats._arguments import checked_seconds
from asyncmq_nats._concurrency import call_either, open_task_group
from asyncmq_nats._logging import get_logger
from asyncmq_nats.exceptions import AsyncMQError, InvalidArgument
from asyncmq_nats.jobs import Backoff
from asyncmq_nats.metrics import read_metrics
from asyncmq_nats.queues import Queue
from asyncmq_nats.runtime.registry import TASK_REGISTRY, TaskRegistry

__all__ = ["Alert", "Alerts", "Webhook", "verify_signature"]

logger = get_logger(__name__)

WEBHOOK_TASK: Final = "asyncmq_nats.webhook"
FAILED: Final = "job:failed"
SIGNATURE: Final = "X-Asyncmq-Signature"
TIMESTAMP: Final = "X-Asyncmq-Timestamp"
ANSWER_TIMEOUT: Final = 10.0
"""Seconds that the address of a webhook may take to answer."""
CLOCK_TOLERANCE: Final = 300.0
"""Seconds by which the time of a signature may differ from the receiver's."""


@dataclass(frozen=True, slots=True)
class Alert:
    """Something that a person should know. `at`: Unix seconds by the server's clock.

    `key` is the same for all programs that notice the same thing.
    """

    kind: Literal["job_failed", "failure_rate", "queue_stuck"]
    queue: str
    message: str
    at: float
    key: str
    details: dict[str, Any] = field(default_factory=dict)


AlertHook = Callable[[Alert], Any]
"""A function, sync (called in a thread) or async. Its exceptions are logged."""
H = TypeVar("H", bound=AlertHook)


@dataclass(slots=True)
class _Rule:
    """A check that is made again and again.

    `is_raised`: the alert was raised, and its condition still holds.
    """

    hook: AlertHook
    check: Callable[[], Any]
    is_raised: bool = False


class Alerts:
    """Watches one queue, from any program, while `run` runs.

    Args:
        queue: the queue to watch.
        interval: seconds between two looks at failure rate and waiting jobs.
    """

    def __init__(self, queue: Queue, *, interval: float = 30.0) -> None:
        self.queue = queue
        self._interval = checked_seconds(interval, "interval")
        self._job_hooks: list[AlertHook] = []
        self._rules: list[_Rule] = []

    def on_job_failed(self, hook: H) -> H:
        """Call a function for each job that fails for good; usable as a decorator.

        It is called at most once: failures while `run` has no connection are lost.
        """
        self._job_hooks.append(hook)
        return hook

    def on_failure_rate(
        self, *, above: float = 0.1, over: float = 600.0, at_least: int = 20
    ) -> Callable[[H], H]:
        """Return a decorator: call the function when more than a share of the ended jobs failed.

        It is called again once the rate has been lower. Needs the history (`Settings.metrics`).

        Args:
            above: the share, from 0 to 1.
            over: the length of the window, in seconds.
            at_least: how many jobs must have ended: one failure in two jobs says nothing.
        """

        async def check() -> Alert | None:
            now = self.queue.backend.now()
            history = await read_metrics(self.queue.backend, self.queue.name, since=now - over)
            total = history.total
            share = total.failed / total.ended if total.ended >= at_least else 0.0
            if share <= above:
                return None
            text = f"{share:.0%} of the {total.ended} jobs of queue {self.queue.name} failed"
            details = {"failed": total.failed, "ended": total.ended, "seconds": over}
            key = f"failure_rate.{above}.{int(now // over)}"
            return Alert("failure_rate", self.queue.name, text, now, key, details)

        return self._rule(check)

    def on_queue_stuck(self, *, longer_than: float = 300.0) -> Callable[[H], H]:
        """Return a decorator: call the function when a job has waited for too long.

        `longer_than`: in seconds. It is called again once no job has waited for that long. A paused
        queue is not stuck.
        """

        async def check() -> Alert | None:
            oldest = await self.queue.oldest_waiting()
            if oldest is None or oldest.age <= longer_than or await self.queue.is_paused():
                return None
            workers = len(await self.queue.list_workers())
            text = f"a job of queue {self.queue.name} has waited for {oldest.age:.0f} s"
            text += " and the queue has no worker" if not workers else ""
            details = {"job_id": oldest.job["id"], "age": oldest.age, "workers": workers}
            now, key = self.queue.backend.now(), f"queue_stuck.{oldest.since:.3f}"
            return Alert("queue_stuck", self.queue.name, text, now, key, details)

        return self._rule(check)

    def _rule(self, check: Callable[[], Any]) -> Callable[[H], H]:
        def register(hook: H) -> H:
            self._rules.append(_Rule(hook, check))
            return hook

        return register

    async def run(self, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        """Watch until cancelled. Started when the first look was taken."""
        await self.queue.backend.connect()
        async with open_task_group() as group:
            if self._job_hooks:
                group.start_soon(self._hear)
            await self.check()
            task_status.started()
            while True:
                await self.queue.backend.clock.sleep(self._interval, upkeep=True)
                await self.check()

    async def check(self) -> None:
        """Check failure rate and waiting jobs once. A read that fails is logged."""
        for rule in self._rules:
            try:
                alert = await rule.check()
            except AsyncMQError as error:
                logger.warning("queue %s: an alert was not checked: %s", self.queue.name, error)
                continue
            if alert is not None and not rule.is_raised:
                await _tell(rule.hook, alert)
            rule.is_raised = alert is not None

    async def _hear(self) -> None:
        async for event in self.queue.events(FAILED):
            data = event.data
            task = str(data.get("task"))
            if task.startswith(WEBHOOK_TASK):  # or its failure would be told by another one
                continue
            text = f"job {event.job_id} ({task}) failed: {data.get('last_error')}"
            details = {"job_id": event.job_id, "task": task, "error": data.get("last_error")}
            at = data.get("finished_at")
            at = float(at) if isinstance(at, int | float) else self.queue.backend.now()
            key = f"job_failed.{event.job_id}.{at}"
            alert = Alert("job_failed", self.queue.name, text, at, key, details)
            for hook in self._job_hooks:
                await _tell(hook, alert)


async def _tell(hook: AlertHook, alert: Alert) -> None:
    try:
        await call_either(hook, alert)
    except Exception:
        logger.exception("alert hook %r failed on the alert: %s", hook, alert.message)


class Webhook:
    """Posts alerts to an address as signed JSON. A hook: `alerts.on_job_failed(webhook)`.

    Each alert is a job of the queue, so a worker sends it, again until the address takes it, and
    once, however many programs noticed the same. Make it in the workers' code too: address and
    secret are in no job.

    Args:
        queue: whose workers send it.
        url: where to: `https://…`, or `http://…`.
        secret: signs it; see `verify_signature`.
        name: of this webhook, if there are several.
        retries: how often it is tried again, over some hours.
        registry: the tasks of the queue's workers, if they are not those of `@task`.

    Raises:
        InvalidArgument: the address has another scheme, or the secret is empty.
    """

    def __init__(
        self,
        queue: Queue,
        url: str,
        secret: str,
        *,
        name: str = "default",
        retries: int = 10,
        registry: TaskRegistry = TASK_REGISTRY,
    ) -> None:
        if not url.startswith(("https://", "http://")):
            raise InvalidArgument("the url of a webhook begins with https:// or http://", url)
        if not secret:
            raise InvalidArgument("the secret of a webhook must not be empty", "")
        self._queue = queue
        self._url = url
        self._secret = secret
        self._retries = retries
        self._task = f"{WEBHOOK_TASK}.{name}"
        registry.register(self._post, queue=queue.name, name=self._task)

    async def __call__(self, alert: Alert) -> str:
        """Add the job that sends an alert, unless it was added; return its id."""
        digest = hashlib.sha256(f"{self._task} {alert.queue} {alert.key}".encode()).hexdigest()
        return await self._queue.add(
            self._task,
            [asdict(alert)],
            retries=self._retries,
            backoff=Backoff(delay=2.0, maximum=3600.0, jitter=0.2),
            job_id=f"alert-{digest[:32]}",
        )

    def _post(self, alert: dict[str, Any]) -> int:
        """Send it. Return the status of the answer; any but 2xx is an error. Runs in a thread."""
        body = json.dumps(alert, separators=(",", ":")).encode()
        sent_at = str(int(time.time()))
        headers = {
            "Content-Type": "application/json",
            "User-Agent": "asyncmq-nats",
            TIMESTAMP: sent_at,
            SIGNATURE: sign(self._secret, sent_at, body),
        }
        request = urllib.request.Request(self._url, body, headers)
        try:
            with urllib.request.urlopen(request, timeout=ANSWER_TIMEOUT) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as refusal:
            with refusal:  # or its connection stays open
                raise ConnectionError(f"the address answered {refusal.code}") from None


def sign(secret: str, sent_at: str, body: bytes) -> str:
    """Return the signature of a webhook: HMAC-SHA256 of `<timestamp>.<body>`, in hexadecimal."""
    digest = hmac.new(secret.encode(), f"{sent_at}.".encode() + body, hashlib.sha256)
    return f"sha256={digest.hexdigest()}"


def verify_signature(
    secret: str,
    headers: Mapping[str, str],
    body: bytes,
    *,
    now: float | None = None,
    tolerance: float = CLOCK_TOLERANCE,
) -> bool:
    """Return whether a webhook was signed with this secret, and lately: for who receives it.

    `headers`: of the request, in any case. `tolerance`: seconds by which the clocks may differ, and
    for which a request that was overheard can be repeated.
    """
    given = {name.lower(): value for name, value in headers.items()}
    sent_at, signature = given.get(TIMESTAMP.lower(), ""), given.get(SIGNATURE.lower(), "")
    if not sent_at.isascii() or not sent_at.isdigit() or not signature.isascii():
        return False
    if abs((time.time() if now is None else now) - int(sent_at)) > tolerance:
        return False
    return hmac.compare_digest(sign(secret, sent_at, body), signature)
