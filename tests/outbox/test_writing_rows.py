"""Rows are written in the user's transaction, checked as by `Queue.add`, in the protocol's form."""

import json
from datetime import date
from typing import Any

import pytest
from sqlalchemy import Engine, create_engine, make_url, select
from sqlalchemy.exc import OperationalError
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session

from asyncmq_nats.contrib import outbox
from asyncmq_nats.contrib.outbox import OutboxRow
from asyncmq_nats.contrib.outbox.store import parse_database
from asyncmq_nats.exceptions import InvalidArgument, InvalidQueueName, NotSerializable
from asyncmq_nats.runtime.registry import TaskRegistry
from asyncmq_nats.tasks import task

REGISTRY = TaskRegistry()


@task(queue="post", retries=4, ttl=60, timeout=5, backoff=2.5, name="send", registry=REGISTRY)
async def send(to: str, on: date) -> None:
    """The task of the tests."""


def bodies(engine: Engine) -> list[dict[str, Any]]:
    with Session(engine) as session:
        rows = session.scalars(select(OutboxRow).order_by(OutboxRow.number)).all()
        return [json.loads(row.body) | {"queue": row.queue} for row in rows]


def test_a_row_is_there_after_the_commit_only(engine: Engine) -> None:
    with Session(engine) as session:
        job_id = outbox.add(session, "send", ["ada"], queue="post")
        session.flush()
        assert bodies(engine) == []
        session.commit()
    (body,) = bodies(engine)
    assert (body["id"], body["queue"], body["task"], body["args"]) == (
        job_id,
        "post",
        "send",
        ["ada"],
    )


def test_nothing_is_left_of_a_transaction_that_is_rolled_back(engine: Engine) -> None:
    with Session(engine) as session:
        outbox.add(session, "send", queue="post", order_key="ada")
        session.flush()
        session.rollback()
        with session.begin_nested() as savepoint:
            outbox.add(session, "send", queue="post")
            session.flush()
            savepoint.rollback()
        outbox.add(session, "keep", queue="post")
        session.commit()
    assert [body["task"] for body in bodies(engine)] == ["keep"]


def test_a_connection_will_do(engine: Engine) -> None:
    with engine.begin() as connection:
        outbox.add(connection, "send", queue="post", order_key="ada")
        outbox.add(connection, "send", queue="post")
    assert len(bodies(engine)) == 2


async def test_an_async_session_and_an_async_connection_will_do(
    database: str, engine: Engine
) -> None:
    made = create_async_engine(parse_database(database))
    async with AsyncSession(made) as session, session.begin():
        outbox.add(session, send, ["ada", date(2026, 1, 2)], order_key="ada")
    async with made.begin() as connection:
        await connection.run_sync(outbox.add, send, ["bob", date(2026, 1, 3)])
    await made.dispose()
    assert [body["args"] for body in bodies(engine)] == [
        ["ada", "2026-01-02"],
        ["bob", "2026-01-03"],
    ]


def test_a_task_gives_its_queue_and_its_limits(engine: Engine) -> None:
    with Session(engine) as session, session.begin():
        outbox.add(session, send, ["ada"], {"on": date(2026, 1, 2)})
        outbox.add(session, send, ["ada"], queue="other", retries=0, timeout=9, delay=60)
    first, second = bodies(engine)
    kept = ("queue", "max_retries", "ttl", "timeout", "backoff", "kwargs")
    assert [first[name] for name in kept] == ["post", 4, 60, 5, 2.5, {"on": "2026-01-02"}]
    assert [second[name] for name in kept] == ["other", 0, 60, 9, 2.5, {}]
    assert second["delay_until"] == pytest.approx(second["created_at"] + 60)
    assert first["custom_id"], "the queue refuses a second job with this id"


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"task": "send"}, InvalidArgument, "needs the name of its queue"),
        ({"task": "send", "queue": "a b"}, InvalidQueueName, "a b"),
        ({"task": 5, "queue": "post"}, InvalidArgument, "task must be"),
        ({"task": "send", "queue": "post", "args": "ada"}, InvalidArgument, "a list or a tuple"),
        ({"task": "send", "queue": "post", "kwargs": []}, InvalidArgument, "kwargs must be a dict"),
        ({"task": "send", "queue": "post", "args": [object()]}, NotSerializable, "argument"),
        ({"task": "send", "queue": "post", "order_key": ""}, InvalidArgument, "order_key"),
        ({"task": "send", "queue": "post", "order_key": "k" * 201}, InvalidArgument, "order_key"),
        ({"task": "send", "queue": "post", "delay": "1"}, InvalidArgument, "delay must be"),
        ({"task": "send", "queue": "post", "retries": -1}, InvalidArgument, "retries"),
        ({"task": "send", "queue": "post", "job_id": "12"}, ValueError, "digits only"),
    ],
)
def test_what_no_queue_would_take_is_refused_before_it_is_written(
    arguments: dict[str, Any], error: type[Exception], words: str
) -> None:
    engine = create_engine("sqlite://")
    with Session(engine) as session:
        with pytest.raises(error, match=words):
            outbox.add(session, **arguments)
        assert not session.new


def test_writers_of_one_key_wait_for_each_other(postgres: str) -> None:
    engine = create_engine(make_url(postgres).set(drivername="postgresql+psycopg"))
    with Session(engine) as first, Session(engine) as second:
        outbox.add(first, "send", queue="post", order_key="ada")
        first.flush()
        outbox.add(second, "send", queue="post", order_key="bob")
        second.flush()  # another key
        second.connection().exec_driver_sql("SET LOCAL lock_timeout = '100ms'")
        outbox.add(second, "send", queue="post", order_key="ada")
        with pytest.raises(OperationalError, match="lock timeout"):
            second.flush()
    engine.dispose()


@pytest.mark.parametrize(
    ("address", "driver"),
    [
        ("postgresql://a:b@host/name", "postgresql+psycopg"),
        ("postgres://a:b@host/name", None),
        ("postgresql+asyncpg://a:b@host/name", "postgresql+psycopg"),
        ("sqlite:///file.db", "sqlite+aiosqlite"),
        ("sqlite://", None),
        ("mysql://host/name", None),
        ("no address, but a secret", None),
    ],
)
def test_a_relay_takes_addresses_of_postgresql_and_sqlite(address: str, driver: str | None) -> None:
    if driver is not None:
        assert parse_database(address).drivername == driver
    elif address.startswith("postgres:"):  # as hosts of databases write it
        assert parse_database(address).drivername == "postgresql+psycopg"
    else:
        with pytest.raises(InvalidArgument) as raised:
            parse_database(address)
        assert "secret" not in str(raised.value)
