"""Fixtures: a fresh outbox in each kind of database."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import Engine, create_engine, make_url, text

from asyncmq_nats.contrib.outbox import metadata
from tests.outbox.databases import run_postgres


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[str]:
    """The address of a PostgreSQL that this process of the tests has for itself."""
    with run_postgres() as address:
        yield address


@pytest.fixture
def postgres(postgres_server: str) -> Iterator[str]:
    """An empty outbox on PostgreSQL."""
    url = make_url(postgres_server).set(drivername="postgresql+psycopg")
    engine = create_engine(url)
    metadata.create_all(engine)
    yield postgres_server
    metadata.drop_all(engine)
    engine.dispose()


@pytest.fixture
def sqlite(tmp_path: Path) -> str:
    """An empty outbox in a file of SQLite."""
    url = f"sqlite:///{tmp_path / 'outbox.db'}"
    engine = create_engine(url)
    with engine.begin() as connection:
        connection.execute(text("PRAGMA journal_mode=WAL"))
    metadata.create_all(engine)
    engine.dispose()
    return url


@pytest.fixture(params=["sqlite", "postgres"])
def database(request: pytest.FixtureRequest) -> str:
    """The address of a database with an empty outbox, of each kind in turn."""
    address: str = request.getfixturevalue(request.param)
    return address


@pytest.fixture
def engine(database: str) -> Iterator[Engine]:
    """The application's connections."""
    url = make_url(database)
    if url.get_backend_name() == "postgresql":
        url = url.set(drivername="postgresql+psycopg")
    made = create_engine(url)
    yield made
    made.dispose()
