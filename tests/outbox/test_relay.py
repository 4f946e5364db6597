"""A relay turns each row into one job, in order where asked, also after faults."""

from collections.abc import Callable
from contextlib import asynccontextmanager
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from anyio.abc import TaskStatus
from sqlalchemy import Engine, create_engine, func, insert, make_url, select
from sqlalchemy.orm import Session

from asyncmq_nats.backends.inmemory import InMemoryBackend
from asyncmq_nats.contrib import outbox
from asyncmq_nats.contrib.outbox import OutboxRow, Relay
from asyncmq_nats.contrib.outbox.store import OutboxStore
from asyncmq_nats.exceptions import InvalidArgument, Unconfirmed
from asyncmq_nats.queues import Queue
from asyncmq_nats.settings import Settings
from tests.outbox.databases import silent
from tests.receiver import PATIENCE, holds, until
from tests.running import make_queue, run_jobs, running


@pytest.fixture
def backend(settings: Settings) -> InMemoryBackend:
    return InMemoryBackend(settings=settings)


@pytest.fixture
async def make_relay(database: str, backend: InMemoryBackend) -> Any:
    made: list[Relay] = []

    def make(**options: Any) -> Relay:
        made.append(Relay(database, backend, **options))
        return made[-1]

    yield make
    for relay in made:
        await relay.close()


MakeRelay = Callable[..., Relay]


def write(engine: Engine, *names: Any, key: str | None = None, **options: Any) -> list[str]:
    """Write a job for each of the names, in one transaction."""
    with Session(engine) as session, session.begin():
        return [
            outbox.add(session, "note", [name], queue="work", order_key=key, **options)
            for name in names
        ]


def rows(engine: Engine) -> int:
    with Session(engine) as session:
        return session.scalar(select(func.count()).select_from(OutboxRow)) or 0


class Notes(list[Any]):
    """The notes of a queue's jobs, in order."""

    def __init__(self, backend: Any, *, concurrency: int = 3) -> None:
        super().__init__()

        async def note(name: Any) -> None:
            if name == "fails":
                raise ValueError("as it should")
            await anyio.lowlevel.checkpoint()
            self.append(name)

        self.queue = make_queue(backend, concurrency=concurrency, note=note)


async def relay_all(relay: Relay) -> int:
    count = 0
    while step := await relay.run_once():
        count += step
    return count


@asynccontextmanager
async def relaying(*relays: Relay) -> Any:
    async with anyio.create_task_group() as group:
        for relay in relays:
            await group.start(relay.run)
        yield
        group.cancel_scope.cancel()


async def test_each_row_becomes_a_job_and_goes(
    make_relay: MakeRelay, engine: Engine, backend: InMemoryBackend
) -> None:
    ids = write(engine, *range(7))
    relay = make_relay(batch_size=3)
    assert (await relay.count()).waiting == 7
    assert await relay_all(relay) == 7
    notes = Notes(backend)
    await run_jobs(notes.queue)
    assert sorted(notes) == list(range(7))
    assert [await notes.queue.get_job_state(job_id) for job_id in ids] == ["completed"] * 7
    assert rows(engine) == 0
    counts = await relay.count()
    assert (counts.waiting, counts.refused, counts.oldest) == (0, 0, 0)


async def test_a_row_that_is_published_twice_is_one_job(
    make_relay: MakeRelay, engine: Engine, backend: InMemoryBackend, monkeypatch: Any
) -> None:
    write(engine, "plain")
    write(engine, "first", "second", key="k")
    relay = make_relay(lease=0.001)
    with monkeypatch.context() as patch:

        async def lost(*_: Any) -> None:
            """The relay dies before it removes what it has published."""

        patch.setattr(OutboxStore, "finish", lost)
        await relay.run_once()
    notes = Notes(backend)
    await run_jobs(notes.queue)
    await until(relay.run_once, lambda count: count > 0)
    assert await relay_all(relay) == 0
    await run_jobs(notes.queue)
    assert sorted(notes) == ["first", "plain", "second"]


async def test_jobs_of_one_key_run_in_order_whatever_the_concurrency(
    make_relay: MakeRelay, engine: Engine, backend: InMemoryBackend
) -> None:
    relays = [make_relay(batch_size=2, poll_interval=0.01) for _ in range(3)]
    notes = Notes(backend, concurrency=10)
    async with running(notes.queue), relaying(*relays):
        for step in range(5):
            for key in ("a", "b"):
                write(engine, *(f"{key}{4 * step + each}" for each in range(4)), key=key)
        await holds(lambda: len(notes) == 40)
    for key in ("a", "b"):
        assert [name for name in notes if name[0] == key] == [f"{key}{each}" for each in range(20)]


async def test_a_job_that_fails_does_not_keep_its_key_waiting(
    make_relay: MakeRelay, engine: Engine, backend: InMemoryBackend
) -> None:
    write(engine, "before", "fails", "after", key="k")
    await relay_all(make_relay())
    notes = Notes(backend)
    await run_jobs(notes.queue)
    assert notes == ["before", "after"]


async def test_the_order_lasts_over_steps_and_the_last_row_of_a_key_goes_when_it_has_ended(
    make_relay: MakeRelay, engine: Engine, backend: InMemoryBackend
) -> None:
    relay = make_relay()
    write(engine, "one", "two", key="k")
    await relay_all(relay)
    assert rows(engine) == 1, "the last one, for which the next waits"
    write(engine, "three", key="k")
    await relay_all(relay)
    assert rows(engine) == 1
    assert await relay.tidy(age=-1) == 0, "it has not ended"
    stats = await Queue("work", backend).queue_stats()
    assert (stats["waiting"], stats["waiting-children"]) == (1, 2)
    notes = Notes(backend)
    await run_jobs(notes.queue)
    assert notes == ["one", "two", "three"]
    assert await relay.tidy(age=-1) == 1
    assert rows(engine) == 0


async def test_a_key_whose_last_job_is_gone_starts_again(
    make_relay: MakeRelay, engine: Engine, backend: InMemoryBackend
) -> None:
    relay = make_relay()
    (first,) = write(engine, "one", key="k")
    await relay_all(relay)
    await Queue("work", backend).remove_job(first)
    write(engine, "two", key="k")
    assert await relay_all(relay) == 1
    notes = Notes(backend)
    await run_jobs(notes.queue)
    assert notes == ["two"]


async def test_a_row_that_no_queue_takes_stays_and_holds_up_no_other(
    make_relay: MakeRelay, engine: Engine, backend: InMemoryBackend, caplog: Any
) -> None:
    good = '{"task": "note", "args": ["good"]}'
    strangers = {
        "no-json": ("work", None, "{"),
        "no-object": ("work", None, "[]"),
        "no-task": ("work", None, "{}"),
        "no-queue": ("no such name", None, good),
        "too-large": ("work", None, good.replace("good", "x" * 2_000_000)),
        "of-a-key": ("work", "k", "{}"),
        "good": ("work", None, good),
        "after-it": ("work", "k", good),
    }
    with engine.begin() as connection:
        for job_id, (queue, key, body) in strangers.items():
            row = {"job_id": job_id, "queue": queue, "order_key": key, "body": body}
            connection.execute(insert(OutboxRow).values(**row, created_at=0.0))
    relay = make_relay()
    assert await relay_all(relay) == 2
    counts = await relay.count()
    assert (counts.waiting, counts.refused) == (0, 6)
    with Session(engine) as session:
        kept = session.scalars(select(OutboxRow).where(OutboxRow.error.is_not(None))).all()
        assert sorted(row.job_id for row in kept) == sorted(strangers.keys() - {"good", "after-it"})
        session.query(OutboxRow).filter_by(job_id="no-task").update(
            {"error": None, "body": '{"task": "note", "args": ["mended"]}'}
        )
        session.commit()
    assert caplog.text.count("so the row stays") == 6
    assert await relay_all(relay) == 1
    notes = Notes(backend)
    await run_jobs(notes.queue)
    assert sorted(notes) == ["good", "good", "mended"]


async def test_rows_whose_queue_cannot_be_reached_are_tried_again(
    make_relay: MakeRelay, engine: Engine, backend: InMemoryBackend, monkeypatch: Any
) -> None:
    monkeypatch.setattr("asyncmq_nats.contrib.outbox.relay.RETRY_DELAY", 0.01)
    refusals = 3

    async def unreachable(self: Queue, payloads: Any) -> list[str]:
        nonlocal refusals
        if refusals:
            refusals -= 1
            raise Unconfirmed("a publish", 1.0)
        return await original(self, payloads)

    original = Queue.enqueue_bulk
    monkeypatch.setattr(Queue, "enqueue_bulk", unreachable)
    write(engine, "late")
    with pytest.raises(Unconfirmed):
        await make_relay().run_once()
    notes = Notes(backend)
    async with relaying(make_relay(poll_interval=0.01)), running(notes.queue):
        await holds(lambda: notes == ["late"])


async def test_a_relay_that_stops_gives_back_what_it_has(
    make_relay: MakeRelay, engine: Engine, backend: InMemoryBackend, monkeypatch: Any
) -> None:
    taken = anyio.Event()

    async def hang(self: Queue, payloads: Any) -> list[str]:
        taken.set()
        await anyio.sleep_forever()
        return []

    write(engine, "once")
    with monkeypatch.context() as patch:
        patch.setattr(Queue, "enqueue_bulk", hang)
        async with anyio.create_task_group() as group:
            group.start_soon(make_relay(lease=1000).run)
            with anyio.fail_after(PATIENCE):
                await taken.wait()
            group.cancel_scope.cancel()
    assert await relay_all(make_relay()) == 1


@pytest.mark.parametrize("poll_interval", [0.001, 1000], ids=["takes-rows", "listens"])
async def test_a_relay_stops_although_its_database_does_not_answer(
    make_relay: MakeRelay, database: str, monkeypatch: Any, poll_interval: float
) -> None:
    monkeypatch.setattr("asyncmq_nats.contrib.outbox.store.ANSWER_TIMEOUT", 0.05)
    monkeypatch.setattr("asyncmq_nats.contrib.outbox.store.LOCK_TIMEOUT", 0.05)
    monkeypatch.setattr("asyncmq_nats.contrib.outbox.relay.RELEASE_TIMEOUT", 0.05)
    relay = make_relay(poll_interval=poll_interval)
    scope, ended = anyio.CancelScope(), anyio.Event()

    async def run(*, task_status: TaskStatus[None]) -> None:
        with scope:
            await relay.run(task_status=task_status)
        ended.set()

    async with anyio.create_task_group() as group:
        await group.start(run)
        with silent(database):
            await anyio.sleep(0.1)  # by now it waits for an answer, or for news
            scope.cancel()
            with anyio.fail_after(PATIENCE):
                await ended.wait()


async def test_rows_of_a_relay_that_is_at_work_are_left_to_it(
    make_relay: MakeRelay, engine: Engine, database: str
) -> None:
    write(engine, "plain")
    write(engine, "first", "second", key="k")
    one, other = OutboxStore(database, "one"), OutboxStore(database, "other")
    assert len(await one.take(10, lease=1000)) == 3
    assert await other.take(10, lease=1000) == []
    await one.release()
    assert len(await other.take(10, lease=1000)) == 3
    taken = await other.take(10, lease=1000)
    await one.finish(taken)  # it stood still: what it says counts no more
    assert rows(engine) == 3
    await one.close()
    await other.close()


async def test_postgresql_wakes_a_relay(postgres: str, backend: InMemoryBackend) -> None:
    engine = create_engine(make_url(postgres).set(drivername="postgresql+psycopg"))
    relay = Relay(postgres, backend, poll_interval=1000)
    notes = Notes(backend)
    async with relaying(relay), running(notes.queue):
        for number in range(3):
            write(engine, number)
            await holds(lambda: len(notes) == number + 1)  # noqa: B023
    engine.dispose()


@pytest.mark.parametrize(
    "options", [{"batch_size": 0}, {"batch_size": 1001}, {"poll_interval": 0}, {"lease": -1}]
)
def test_a_relay_refuses_numbers_that_cannot_work(options: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument):
        Relay("sqlite:///file.db", InMemoryBackend(), **options)
