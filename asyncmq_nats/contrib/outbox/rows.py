"""Builds the rows of the outbox, for any library that writes them.

Uses no database and no server.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from hashlib import blake2b
from time import time
from typing import Any, Final

from asyncmq_nats.backends.inmemory import InMemoryBackend
from asyncmq_nats.exceptions import InvalidArgument
from asyncmq_nats.jobs import Backoff, new_job, new_job_id, validate_custom_job_id
from asyncmq_nats.queues import Queue
from asyncmq_nats.schedules import parse_every
from asyncmq_nats.tasks import TASK_REGISTRY, TaskWrapper

__all__ = ["CHANNEL", "MAX_KEY_LENGTH", "TABLE", "build_row", "lock_number"]

TABLE: Final = "asyncmq_nats_outbox"
CHANNEL: Final = "asyncmq_nats_outbox"
"""The channel of PostgreSQL's NOTIFY."""
MAX_KEY_LENGTH: Final = 200
"""The longest order key, in characters."""


def build_row(
    task: TaskWrapper[..., Any] | str,
    args: Sequence[Any] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    *,
    queue: str | None = None,
    order_key: str | None = None,
    retries: int | None = None,
    ttl: float | None = None,
    backoff: float | Backoff | None = None,
    priority: int = 5,
    delay: float | None = None,
    job_id: str | None = None,
    timeout: float | None = None,
    repeat_every: float | str | None = None,
) -> dict[str, Any]:
    """Return the columns of a new row: `job_id`, `queue`, `order_key`, `body`, `created_at`.

    The arguments are those of `asyncmq_nats.contrib.outbox.add`.

    Raises:
        InvalidArgument, InvalidQueueName, InvalidJobId, NotSerializable: as for `Queue.add`.
    """
    now = time()
    entry = task.entry if isinstance(task, TaskWrapper) else None
    name = queue if queue is not None else None if entry is None else entry.queue
    if name is None:
        raise InvalidArgument("a task given by its id needs the name of its queue: queue=…", task)
    _check_queue_name(name)
    _check_order_key(order_key)
    task_id = task if entry is None else entry.id
    if not isinstance(task_id, str):
        raise InvalidArgument("task must be a @task or the id of one", task)
    written = _write_arguments(task_id, entry, args, kwargs)
    given: dict[str, Any] = {"max_retries": retries, "ttl": ttl}
    given |= {"backoff": backoff, "timeout": timeout}
    if entry is not None:
        own: dict[str, Any] = {"max_retries": entry.retries, "ttl": entry.ttl}
        own |= {"backoff": entry.backoff, "timeout": entry.timeout}
        given = {key: own[key] if value is None else value for key, value in given.items()}
    job = new_job(
        task_id=task_id,
        args=written[0],
        kwargs=written[1],
        **given | {"max_retries": given["max_retries"] or 0},
        priority=priority,
        delay_until=_due(now, delay),
        job_id=new_job_id() if job_id is None else validate_custom_job_id(job_id),
        created_at=now,
        custom_id=True,
        repeat_every=None if repeat_every is None else parse_every(repeat_every),
    )
    return {
        "job_id": job.job_id,
        "queue": name,
        "order_key": order_key,
        "body": job.encode().decode(),
        "created_at": now,
    }


def lock_number(queue: str, order_key: str) -> int:
    """Return the number of the advisory lock that orders the writers of a key: 64 bits, signed."""
    digest = blake2b(f"{queue}\0{order_key}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)


def _write_arguments(
    task_id: str, entry: Any, args: Sequence[Any] | None, kwargs: Mapping[str, Any] | None
) -> tuple[list[Any], dict[str, Any]]:
    if args is not None and not isinstance(args, list | tuple):
        raise InvalidArgument("args must be a list or a tuple, also of a single one: [x]", args)
    if kwargs is not None and not isinstance(kwargs, Mapping):
        raise InvalidArgument("kwargs must be a dict", kwargs)
    if entry is None:
        return TASK_REGISTRY.write(task_id, args or (), kwargs or {})
    written: tuple[list[Any], dict[str, Any]] = entry.arguments.write(
        args or (), kwargs or {}, task_id
    )
    return written


def _due(now: float, delay: float | None) -> float | None:
    if delay is None:
        return None
    if isinstance(delay, bool) or not isinstance(delay, int | float):
        raise InvalidArgument("delay must be a number of seconds", delay)
    return now + delay if delay > 0 else None


def _check_order_key(order_key: object) -> None:
    if order_key is None:
        return
    if not isinstance(order_key, str) or not 0 < len(order_key) <= MAX_KEY_LENGTH:
        raise InvalidArgument(
            f"order_key must be a text of 1 to {MAX_KEY_LENGTH} characters", order_key
        )


@lru_cache(256)
def _check_queue_name(name: str) -> None:
    Queue(name, InMemoryBackend())
