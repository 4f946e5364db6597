"""`add` writes a job in Django's transaction.

The relay is that of `asyncmq_nats.contrib.outbox`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from django.db import connections, router

from asyncmq_nats.contrib.django.models import OutboxRow
from asyncmq_nats.contrib.outbox.rows import CHANNEL, build_row, lock_number
from asyncmq_nats.jobs import Backoff
from asyncmq_nats.tasks import TaskWrapper

__all__ = ["add"]


def add(
    task: TaskWrapper[..., Any] | str,
    args: Sequence[Any] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    *,
    using: str | None = None,
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
) -> str:
    """Write a job into the outbox, in the transaction of this thread, and return its id.

    It is added to its queue once the transaction is committed, and never if it is rolled back.
    Outside of `transaction.atomic` it is committed at once. An async view calls it by
    `sync_to_async`, with the rest of its transaction.

    `using`: the alias of the database, by default the one where the model `OutboxRow` is written.
    `order_key` needs a transaction. The other arguments are those of
    `asyncmq_nats.contrib.outbox.add`.

    Raises:
        InvalidArgument, InvalidQueueName, InvalidJobId, NotSerializable: as for `Queue.add`;
            nothing was written.
        TransactionManagementError: there is no transaction, and an `order_key`.
    """
    row = build_row(
        task,
        args,
        kwargs,
        queue=queue,
        order_key=order_key,
        retries=retries,
        ttl=ttl,
        backoff=backoff,
        priority=priority,
        delay=delay,
        job_id=job_id,
        timeout=timeout,
        repeat_every=repeat_every,
    )
    alias = router.db_for_write(OutboxRow) if using is None else using
    connection = connections[alias]
    if order_key is not None:
        connection.validate_no_broken_transaction()
        if connection.get_autocommit() and not connection.in_atomic_block:
            from django.db.transaction import TransactionManagementError

            raise TransactionManagementError("an order_key needs transaction.atomic()")
    if connection.vendor == "postgresql":
        with connection.cursor() as cursor:
            if order_key is not None:
                # The numbers of a key's rows are in the order of the commits.
                cursor.execute(
                    "SELECT pg_advisory_xact_lock(%s)", [lock_number(row["queue"], order_key)]
                )
            cursor.execute("SELECT pg_notify(%s, '')", [CHANNEL])
    OutboxRow.objects.using(alias).create(**row)
    job: str = row["job_id"]
    return job
