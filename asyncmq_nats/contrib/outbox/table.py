"""The outbox as a table of SQLAlchemy, and `add`, which writes a row in the user's transaction."""

from collections.abc import Mapping, Sequence
from typing import Any, Final, Protocol
from weakref import WeakKeyDictionary

from sqlalchemy import (
    BigInteger,
    Connection,
    Float,
    Index,
    Integer,
    String,
    Text,
    event,
    func,
    insert,
    select,
)
from sqlalchemy.engine import Transaction
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from asyncmq_nats.contrib.outbox.rows import (
    CHANNEL,
    MAX_KEY_LENGTH,
    TABLE,
    build_row,
    lock_number,
)
from asyncmq_nats.jobs import Backoff
from asyncmq_nats.tasks import TaskWrapper

__all__ = ["OutboxRow", "add", "metadata"]


class SupportsAdd(Protocol):
    """A `Session`, an `AsyncSession`, or a scoped one."""

    def add(self, instance: Any, /) -> None:
        """Add an object to the session."""


class _Base(DeclarativeBase):
    pass


metadata: Final = _Base.metadata
"""For `metadata.create_all(engine)`, and for the `target_metadata` of Alembic."""


class OutboxRow(_Base):
    """A job that is to be added to its queue. Times are Unix seconds of the database."""

    __tablename__ = TABLE
    # Otherwise SQLite gives the number of a removed row to another one.
    __table_args__ = {"sqlite_autoincrement": True}  # noqa: RUF012  SQLAlchemy's way

    number: Mapped[int] = mapped_column(
        BigInteger().with_variant(Integer, "sqlite"), primary_key=True
    )
    """The order of writing."""
    job_id: Mapped[str] = mapped_column(String(200))
    queue: Mapped[str] = mapped_column(String(64))
    order_key: Mapped[str | None] = mapped_column(String(MAX_KEY_LENGTH))
    body: Mapped[str] = mapped_column(Text)
    """The job, as docs/protocol.md describes it."""
    created_at: Mapped[float] = mapped_column(Float(53))
    taken_by: Mapped[str | None] = mapped_column(String(64))
    """The relay that publishes it."""
    taken_until: Mapped[float | None] = mapped_column(Float(53))
    """When another relay may take it."""
    published_at: Mapped[float | None] = mapped_column(Float(53))
    """When the job was published.

    The row of the last job of an order key stays: the next job waits for it.
    """
    error: Mapped[str | None] = mapped_column(Text)
    """Why no queue takes this job. Set it to NULL to have it tried again."""


_columns = OutboxRow.__table__.c
_is_open = _columns.published_at.is_(None) & _columns.error.is_(None)
_has_key = _columns.order_key.is_not(None)
Index(f"{TABLE}_open", _columns.number, postgresql_where=_is_open, sqlite_where=_is_open)
Index(
    f"{TABLE}_key",
    _columns.queue,
    _columns.order_key,
    _columns.number,
    postgresql_where=_has_key,
    sqlite_where=_has_key,
)

_notified: "WeakKeyDictionary[Transaction, bool]" = WeakKeyDictionary()
"""Transactions that notify the relays already."""


def add(
    session: SupportsAdd | Connection,
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
) -> str:
    """Write a job into the outbox, in the transaction of `session`, and return its id.

    It is added to its queue once the transaction is committed, and never if it is rolled back.

    Args:
        session: a `Session`, an `AsyncSession` (the row is sent by its next flush), or a
            `Connection`; with an `AsyncConnection`: `await connection.run_sync(add, task, args)`.
        task: a `@task`, whose queue, retries and limits count unless others are given; or the id of
            one.
        args: for the task, as for `Queue.add`.
        kwargs: likewise.
        queue: the name of the queue; the id of a task needs it.
        order_key: jobs of one queue with the same key run one after the other, in the order in
            which their transactions wrote them. On PostgreSQL, transactions that write the same key
            wait for each other.
        retries: see `Queue.add`, as all that follow. `delay` and `ttl` count from now, not from the
            publication.
        ttl: see there.
        backoff: see there.
        priority: see there.
        delay: see there.
        job_id: see there; by default a UUID.
        timeout: see there.
        repeat_every: see there.

    Raises:
        InvalidArgument, InvalidQueueName, InvalidJobId, NotSerializable: as for `Queue.add`;
            nothing was written.
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
    if isinstance(session, Connection):
        _prepare(session, row["queue"], row["order_key"])
        session.execute(insert(OutboxRow).values(row))
    else:
        session.add(OutboxRow(**row))
    job: str = row["job_id"]
    return job


@event.listens_for(OutboxRow, "before_insert")
def _before_insert(_mapper: object, connection: Connection, row: OutboxRow) -> None:
    _prepare(connection, row.queue, row.order_key)


def _prepare(connection: Connection, queue: str, order_key: str | None) -> None:
    """Before a row is inserted: its number comes after those of its key, and relays are told of it.

    PostgreSQL sends a notification when the transaction is committed. A sequence numbers rows in
    the order of their insertion; the lock makes that of one key the order of the commits.
    """
    if connection.dialect.name != "postgresql":
        return
    # A savepoint that is rolled back takes its notification with it.
    transaction = connection.get_nested_transaction() or connection.get_transaction()
    calls = []
    if transaction is not None and transaction not in _notified:
        _notified[transaction] = True
        calls.append(func.pg_notify(CHANNEL, ""))
    if order_key is not None:
        calls.append(func.pg_advisory_xact_lock(lock_number(queue, order_key)))
    if calls:
        connection.execute(select(*calls))
