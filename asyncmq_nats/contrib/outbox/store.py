"""The relay's side of the table: take rows on a lease, and record their end.

It knows no queue. Each function is one transaction. A row belongs to the relay in `taken_by` until
`taken_until`, by the database's clock. A relay's write about a row expects that the relay still has
it, so one that stood still for longer than its lease changes nothing.
"""

import math
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any, Concatenate, Final, ParamSpec, TypeVar

import anyio
import anyio.lowlevel
import psycopg
from sqlalchemy import (
    URL,
    ColumnElement,
    Float,
    and_,
    delete,
    exists,
    func,
    literal_column,
    make_url,
    or_,
    select,
    tuple_,
    update,
)
from sqlalchemy.exc import ArgumentError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine
from sqlalchemy.orm import aliased

from asyncmq_nats._concurrency import open_task_group
from asyncmq_nats.contrib.outbox.rows import CHANNEL
from asyncmq_nats.contrib.outbox.table import OutboxRow
from asyncmq_nats.exceptions import InvalidArgument

__all__ = ["Counts", "OutboxStore", "Row", "Tail", "parse_database"]

DRIVERS: Final = {"postgresql": "postgresql+psycopg", "sqlite": "sqlite+aiosqlite"}
CLOCKS: Final = {
    "postgresql": "EXTRACT(epoch FROM clock_timestamp())",
    "sqlite": "((julianday('now') - 2440587.5) * 86400.0)",
}
FOLLOWERS_PER_KEY: Final = 100
"""How many rows of order keys are taken beside the first ones, at most for each of these."""
ANSWER_TIMEOUT: Final = 2.0
"""How long a cancelled relay waits for the answer of PostgreSQL, in seconds."""
LOCK_TIMEOUT: Final = 5.0
"""How long a statement of SQLite waits for the lock of a writer, in seconds. Its driver cannot be
interrupted meanwhile: it never ends the connection then."""

Key = tuple[str, str]
"""A queue and an order key."""


@dataclass(frozen=True, slots=True)
class Row:
    """A row that this relay has taken."""

    number: int
    job_id: str
    queue: str
    order_key: str | None
    body: str


@dataclass(frozen=True, slots=True)
class Tail:
    """The last published job of an order key."""

    number: int
    job_id: str
    queue: str


@dataclass(frozen=True, slots=True)
class Counts:
    """Counts of the outbox.

    `oldest`: the age in seconds of the oldest row that is not published.
    """

    waiting: int
    refused: int
    oldest: float


def parse_database(database: str | URL) -> URL:
    """Return the address of a database with the driver that the relay uses: psycopg, aiosqlite.

    Raises:
        InvalidArgument: it is no address of a PostgreSQL or SQLite database.
    """
    how = (
        "the database must be an address such as 'postgresql://user@host/name' or 'sqlite:///file'"
    )
    try:
        url = make_url(database)
    except ArgumentError:
        raise InvalidArgument(how, "this") from None  # it may have a password in it
    family = "postgresql" if url.get_backend_name() == "postgres" else url.get_backend_name()
    if family not in DRIVERS:
        raise InvalidArgument(how, url.drivername)
    if family == "sqlite" and url.database in (None, "", ":memory:"):
        raise InvalidArgument("a relay needs an SQLite database in a file", ":memory:")
    return url.set(drivername=DRIVERS[family])


_row = aliased(OutboxRow, name="candidate")
_other = aliased(OutboxRow, name="other")
_is_open = _row.published_at.is_(None) & _row.error.is_(None)
_is_first = _row.order_key.is_(None) | ~exists().where(
    _other.queue == _row.queue,
    _other.order_key == _row.order_key,
    _other.number < _row.number,
    _other.published_at.is_(None),
    _other.error.is_(None),
)
"""A row with an order key can be taken only if it is the first one of its key."""


P = ParamSpec("P")
R = TypeVar("R")


def _whole(
    method: "Callable[Concatenate[OutboxStore, P], Awaitable[R]]",
) -> "Callable[Concatenate[OutboxStore, P], Awaitable[R]]":
    """Have a cancellation wait until the database has answered, or for the store's limit.

    A driver that is interrupted in a statement may leave its connection in the middle of it.
    """

    @wraps(method)
    async def run(store: "OutboxStore", /, *args: P.args, **kwargs: P.kwargs) -> R:
        async with open_task_group() as group:
            with anyio.CancelScope(shield=True) as scope:
                group.start_soon(_limit_when_cancelled, scope, store.answer_timeout)
                result = await method(store, *args, **kwargs)
                group.cancel_scope.cancel()
                return result
            await anyio.lowlevel.checkpoint()
        raise AssertionError("only a cancellation ends the shield early")

    return run


async def _limit_when_cancelled(scope: anyio.CancelScope, seconds: float) -> None:
    try:
        await anyio.sleep_forever()
    finally:
        scope.deadline = anyio.current_time() + seconds


class OutboxStore:
    """The outbox of one database, for one relay."""

    def __init__(self, database: str | URL, relay_id: str) -> None:
        self.url = parse_database(database)
        self._relay = relay_id
        self._is_sqlite = self.url.get_backend_name() == "sqlite"
        self.answer_timeout = math.inf if self._is_sqlite else ANSWER_TIMEOUT
        options: dict[str, Any] = (
            {"connect_args": {"timeout": LOCK_TIMEOUT}} if self._is_sqlite else {}
        )
        self._engine: AsyncEngine = create_async_engine(self.url, pool_pre_ping=True, **options)
        self._now: ColumnElement[float] = literal_column(
            CLOCKS[self.url.get_backend_name()], Float()
        )

    @_whole
    async def close(self) -> None:
        """Close the connections."""
        await self._engine.dispose()

    @_whole
    async def take(self, limit: int, lease: float) -> list[Row]:
        """Take up to `limit` rows for `lease` seconds, and those after them under their order keys.

        Returned in the order in which they were written.
        """
        if self._is_sqlite and not await self._has_takeable():
            return []  # an update that finds nothing would take the writers' lock all the same
        async with self._engine.begin() as connection:
            candidates = (
                select(_row.number)
                .where(self._is_takeable())
                .order_by(_row.number)
                .limit(limit)
                .with_for_update(skip_locked=True, of=_row)
            )
            rows = await self._mark_taken(connection, candidates, lease)
            firsts = {(row.queue, row.order_key): row.number for row in rows if row.order_key}
            if firsts:
                taken = {row.number for row in rows}
                followers = (
                    select(_row.number)
                    .where(
                        tuple_(_row.queue, _row.order_key).in_(list(firsts)),
                        _is_open,
                        _row.number.not_in(taken),
                    )
                    .order_by(_row.number)
                    .limit(min(limit, FOLLOWERS_PER_KEY * len(firsts)))
                )
                rows += await self._mark_taken(connection, followers, lease)
        return sorted(rows, key=lambda row: row.number)

    async def _has_takeable(self) -> bool:
        async with self._engine.connect() as connection:
            found = await connection.execute(
                select(_row.number).where(self._is_takeable()).limit(1)
            )
            return found.first() is not None

    def _is_takeable(self) -> ColumnElement[bool]:
        is_free = or_(_row.taken_until.is_(None), _row.taken_until < self._now)
        return and_(_is_open, is_free, _is_first)

    async def _mark_taken(
        self, connection: AsyncConnection, numbers: Any, lease: float
    ) -> list[Row]:
        taken = await connection.execute(
            update(OutboxRow)
            .where(OutboxRow.number.in_(numbers))
            .values(taken_by=self._relay, taken_until=self._now + lease)
            .returning(
                OutboxRow.number,
                OutboxRow.job_id,
                OutboxRow.queue,
                OutboxRow.order_key,
                OutboxRow.body,
            )
            .execution_options(synchronize_session=False)
        )
        return [Row(*values) for values in taken]

    @_whole
    async def read_tails(self, keys: Iterable[Key]) -> dict[Key, str]:
        """Return the id of the last published job of each of these keys."""
        async with self._engine.connect() as connection:
            found = await connection.execute(
                select(OutboxRow.queue, OutboxRow.order_key, OutboxRow.job_id)
                .where(
                    tuple_(OutboxRow.queue, OutboxRow.order_key).in_(list(keys)),
                    OutboxRow.published_at.is_not(None),
                )
                .order_by(OutboxRow.number)
            )
            return {(queue, str(key)): job_id for queue, key, job_id in found}

    @_whole
    async def finish(self, rows: Sequence[Row]) -> None:
        """Remove rows whose jobs are in their queues; of each order key, the last one is kept."""
        plain = [row.number for row in rows if row.order_key is None]
        keyed = [row for row in rows if row.order_key is not None]
        async with self._engine.begin() as connection:
            if plain:
                await connection.execute(delete(OutboxRow).where(self._has(plain)))
            if keyed:
                done = {"published_at": self._now, "taken_by": None, "taken_until": None}
                numbers = self._has([row.number for row in keyed])
                await connection.execute(update(OutboxRow).where(numbers).values(**done))
                await connection.execute(self._earlier_tails(keyed))

    def _has(self, numbers: Sequence[int]) -> ColumnElement[bool]:
        return and_(OutboxRow.number.in_(numbers), OutboxRow.taken_by == self._relay)

    @staticmethod
    def _earlier_tails(rows: Iterable[Row]) -> Any:
        keys = {(row.queue, row.order_key) for row in rows}
        last = (
            select(func.max(_other.number))
            .where(
                _other.queue == OutboxRow.queue,
                _other.order_key == OutboxRow.order_key,
                _other.published_at.is_not(None),
            )
            .scalar_subquery()
        )
        return delete(OutboxRow).where(
            tuple_(OutboxRow.queue, OutboxRow.order_key).in_(list(keys)),
            OutboxRow.published_at.is_not(None),
            OutboxRow.number < last,
        )

    @_whole
    async def refuse(self, row: Row, reason: str) -> None:
        """Keep a row that no queue takes, with the reason."""
        values = {"error": reason, "taken_by": None, "taken_until": None}
        async with self._engine.begin() as connection:
            await connection.execute(
                update(OutboxRow).where(self._has([row.number])).values(**values)
            )

    @_whole
    async def release(self, rows: Sequence[Row] | None = None, delay: float = 0.0) -> None:
        """Give rows back, by default all that this relay has.

        Any relay may take them after `delay` seconds.
        """
        mine = OutboxRow.taken_by == self._relay
        which = mine if rows is None else self._has([row.number for row in rows])
        async with self._engine.begin() as connection:
            await connection.execute(
                update(OutboxRow).where(which).values(taken_until=self._now + delay)
            )

    @_whole
    async def idle_tails(self, age: float, limit: int = 100) -> list[Tail]:
        """Return order keys whose last job was published more than `age` seconds ago."""
        async with self._engine.connect() as connection:
            found = await connection.execute(
                select(OutboxRow.number, OutboxRow.job_id, OutboxRow.queue)
                .where(OutboxRow.published_at < self._now - age)
                .order_by(OutboxRow.published_at)
                .limit(limit)
            )
            return [Tail(*values) for values in found]

    @_whole
    async def remove_tails(self, tails: Sequence[Tail]) -> None:
        """Forget order keys: their next job waits for none."""
        numbers = [tail.number for tail in tails]
        async with self._engine.begin() as connection:
            await connection.execute(
                delete(OutboxRow).where(
                    OutboxRow.number.in_(numbers), OutboxRow.published_at.is_not(None)
                )
            )

    @_whole
    async def count(self) -> Counts:
        """Return the number of rows that wait, of those that no queue takes, and the oldest age."""
        async with self._engine.connect() as connection:
            waiting = select(func.count(), self._now - func.min(_row.created_at)).where(_is_open)
            number, oldest = (await connection.execute(waiting)).one()
            refused = await connection.scalar(
                select(func.count()).select_from(_row).where(_row.error.is_not(None))
            )
        return Counts(number, refused or 0, max(0.0, float(oldest or 0.0)))

    @property
    def can_listen(self) -> bool:
        """Whether the database tells of new rows."""
        return not self._is_sqlite

    async def listen(self, on_rows: Callable[[], None]) -> None:
        """Call `on_rows` once the connection listens, and at each notification.

        Ends when the connection is lost or this is cancelled.
        """
        async with self._listening() as connection:
            on_rows()  # for those that were written before
            async for _ in connection.notifies():
                on_rows()

    @asynccontextmanager
    async def _listening(self) -> "AsyncIterator[psycopg.AsyncConnection[Any]]":
        address = self.url.set(drivername="postgresql").render_as_string(hide_password=False)
        async with await psycopg.AsyncConnection.connect(address, autocommit=True) as connection:
            await connection.execute(f"LISTEN {CHANNEL}")
            yield connection
