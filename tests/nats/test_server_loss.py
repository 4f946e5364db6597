"""The server dies and comes back on its store, or freezes.

Producers and workers go on, and what was confirmed is there.
"""

import itertools
import os
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager

import anyio
import anyio.lowlevel
import pytest
from anyio import to_thread

from asyncmq_nats.backends.nats import puller
from asyncmq_nats.backends.nats.backend import NATSBackend
from asyncmq_nats.backends.nats.embedded.server import EmbeddedServer
from asyncmq_nats.context import current_job
from asyncmq_nats.exceptions import Fail, Retry, Unconfirmed
from asyncmq_nats.queues import Queue
from asyncmq_nats.settings import Settings
from tests.nats.processes import PATIENCE, Fleet, freeze, holds
from tests.nats.streams import Streams, plain_client
from tests.receiver import Receiver, until
from tests.running import counted, make_queue, only, outcome, running

CRASHES = 4
PRODUCERS = 4
ORDERS = 500


@pytest.fixture
def settings() -> Settings:
    return Settings(stalled_after=1.0, shutdown_timeout=5.0)


@pytest.mark.slow
async def test_killed_server_loses_nothing_and_no_worker_is_restarted(
    fleet: Fleet, queue: Queue, server: EmbeddedServer
) -> None:
    added: list[tuple[float, str]] = []
    done, numbers = anyio.Event(), itertools.count()

    async def produce(producer: int) -> None:
        while not done.is_set():
            number = next(numbers)
            job_id = (
                f"job-{producer}-{number}" if producer == 0 else None
            )  # one of them chooses the ids of its jobs
            added.append(
                (time.monotonic(), await queue.add("brief", [number, 0.01], job_id=job_id))
            )
            await anyio.sleep(0.005)

    async def add_many() -> None:
        while not done.is_set():
            ids = await queue.add_bulk([{"task_id": "unnoted"} for _ in range(20)])
            added.extend((time.monotonic(), job_id) for job_id in ids)
            await anyio.sleep(0.1)

    workers = await fleet.start_all("first", "second", concurrency=5)
    silences = []
    with anyio.fail_after(2 * PATIENCE):
        async with anyio.create_task_group() as group:
            for producer in range(PRODUCERS):
                group.start_soon(produce, producer)
            group.start_soon(add_many)
            for _ in range(CRASHES):
                await anyio.sleep(0.5)
                await to_thread.run_sync(server.kill)
                started = time.monotonic()
                await to_thread.run_sync(server.start)
                known = len(added)
                await holds(lambda: len(added) > known)  # noqa: B023
                silences.append(time.monotonic() - started)
            done.set()
        ids = [job_id for _, job_id in added]
        produced = time.monotonic()
        # A released record counts as waiting until a promoter sees that its job has ended: a crash
        # may take the removal.
        await only(queue, completed=len(ids), within=30)
        print(f"{len(ids)} jobs, done {time.monotonic() - produced:.2f} s after the last one")
    assert len(set(ids)) == len(ids)
    assert {job["id"] for job in await queue.get_jobs("completed")} == set(ids)
    runs = fleet.watched.count_runs()
    print(
        f"silences {[round(s, 2) for s in silences]}; "
        f"noted bodies {len(runs)}, ran {runs.total()} times, at most {max(runs.values())}"
    )
    assert not any(worker.ended for worker in workers)


@pytest.mark.slow
async def test_a_job_runs_once_however_often_the_server_is_killed(
    server: EmbeddedServer, nats_backend: NATSBackend, settings: Settings
) -> None:
    """Also one that was delivered, or had ended, just before: the server forgets that."""
    runs, ids = Counter[str](), list[str]()

    async def brief() -> None:
        runs[current_job().id] += 1

    async def add() -> None:
        async with NATSBackend(servers=server.url, settings=settings) as backend:
            adding = make_queue(backend, "fleet", brief=brief)
            for number in itertools.count():
                chosen = {"job_id": f"chosen-{number}"}
                entries = [chosen, *({"job_id": f"{number}-{each}"} for each in range(19))]
                ids.extend(
                    await adding.add_bulk([{"task_id": "brief", **each} for each in entries])
                )
                ids.extend(await adding.add_bulk([{"task_id": "brief"}] * 20))

    queue = make_queue(nats_backend, "fleet", concurrency=10, brief=brief)
    async with running(queue):
        with anyio.fail_after(2 * PATIENCE):
            async with anyio.create_task_group() as group:
                group.start_soon(add)
                for crash in range(3 * CRASHES):
                    goal = len(runs) + 30
                    await holds(lambda: len(runs) >= goal)  # noqa: B023
                    await anyio.sleep(0.01 * (crash % 5))
                    await to_thread.run_sync(server.kill)
                    await to_thread.run_sync(server.start)
                group.cancel_scope.cancel()
        await until(queue.queue_stats, lambda stats: stats["completed"] == sum(stats.values()))
    assert runs.keys() >= set(ids)
    assert {*runs.values()} == {1}
    assert await nats_backend.last_sequence("amq_fleet") == len(runs)


@pytest.mark.parametrize("doubt", [0.0, 600.0])
async def test_what_a_killed_server_may_have_delivered_before_is_no_first_delivery(
    nats_backend: NATSBackend,
    server: EmbeddedServer,
    monkeypatch: pytest.MonkeyPatch,
    doubt: float,
) -> None:
    """Of what this worker has not had, only for a while."""
    monkeypatch.setattr(puller, "DOUBT_SECONDS", doubt)
    queue = make_queue(nats_backend, "fleet", brief=lambda: 1)
    await queue.add_bulk([{"task_id": "brief"}] * 3)
    receiver = Receiver(nats_backend, "amq_fleet")
    [first] = await receiver.pull("tier_5")
    assert first.first
    await to_thread.run_sync(server.kill)
    await to_thread.run_sync(server.start)
    await holds(lambda: nats_backend.reconnects == 1)
    assert not first.first
    await receiver.puller.request("tier_5", 3, wait=PATIENCE)
    await receiver.wait_for(lambda: {each.sequence for each in receiver.deliveries} == {1, 2, 3})
    found = {each.sequence: each.first for each in receiver.deliveries}
    assert found == {1: False, 2: not doubt, 3: not doubt}


@pytest.fixture
async def impatient_queue(server: EmbeddedServer) -> AsyncIterator[Queue]:
    """The queue of a producer that waits 1.5 s for a confirmation; its leases outlast that."""
    async with NATSBackend(
        servers=server.url, settings=Settings(publish_timeout=1.5, stalled_after=20)
    ) as backend:
        queue = Queue("fleet", backend)
        await queue._assets.declare_all()
        yield queue


@contextmanager
def frozen(server: EmbeddedServer) -> Iterator[None]:
    """Stop the server's process for as long as the block runs."""
    assert server.pid is not None
    freeze(server.pid)
    try:
        yield
    finally:
        os.kill(server.pid, signal.SIGCONT)


@pytest.mark.parametrize(
    ("job_id", "told"),
    [
        ("order-1", r"not answered within 1\.5 s.*Try again"),
        (None, r"not confirmed within 1\.5 s.*job_id of your own"),
    ],
)
async def test_add_that_cannot_be_confirmed_raises_in_time(
    job_id: str | None, told: str, impatient_queue: Queue, server: EmbeddedServer
) -> None:
    started = time.monotonic()
    with frozen(server), anyio.fail_after(2 * PATIENCE), pytest.raises(Unconfirmed, match=told):
        await impatient_queue.add("brief", [1], job_id=job_id)
    assert 1.0 < time.monotonic() - started < 15.0  # half of the default


async def test_unconfirmed_adds_can_be_repeated_under_their_job_ids(
    fleet: Fleet, impatient_queue: Queue, server: EmbeddedServer
) -> None:
    queue, confirmed, unconfirmed = impatient_queue, set[int](), set[int]()
    under_way, half = anyio.CapacityLimiter(50), anyio.Event()

    async def add(number: int) -> None:
        async with under_way:
            try:
                assert (
                    await queue.add("brief", [number], job_id=f"order-{number}")
                    == f"order-{number}"
                )
                confirmed.add(number)
            except Unconfirmed:
                unconfirmed.add(number)
            if len(confirmed) >= ORDERS // 2:
                half.set()

    with anyio.fail_after(2 * PATIENCE):
        await fleet.start("first", asyncmq_nats_stalled_after=20)
        async with anyio.create_task_group() as group:
            for number in range(ORDERS):
                group.start_soon(add, number)
            await half.wait()
            with frozen(server):  # catches some adds at each of their steps
                await holds(lambda: len(unconfirmed) >= under_way.total_tokens // 2)
        print(f"{len(unconfirmed)} of {ORDERS} adds were not confirmed")
        async with anyio.create_task_group() as group:
            for number in range(ORDERS):
                group.start_soon(add, number)
        assert len(confirmed) == ORDERS
        await only(queue, completed=ORDERS)
        async with plain_client(server.url) as client:
            await Streams(client).nothing_is_left()
    assert fleet.watched.count_runs() == {str(number): 1 for number in range(ORDERS)}


async def test_a_server_that_was_killed_brings_nothing_back(
    nats_backend: NATSBackend, server: EmbeddedServer
) -> None:
    """Removed records stay removed, also where one had replaced another.

    Records that a limit removed come back by themselves.
    """

    failures: list[str] = []

    def fail_twice() -> None:
        if current_job().attempt < 3:
            raise Retry("not yet")

    def fail_once() -> None:
        if not failures:
            failures.append("once")
            raise Fail("not yet")

    queue = make_queue(
        nats_backend, "fleet", brief=lambda: 1, fail_twice=fail_twice, fail_once=fail_once
    )
    async with running(queue):
        await queue.pause(time.time() + 3600)
        await queue.pause()
        await queue.resume()
        for every in (3600, 7200):
            await queue.upsert_repeatable("brief", every=every, name="series")
        assert await queue.remove_repeatable("series")
        assert await queue.cancel_job(cancelled := await queue.add("brief", delay=3600))
        await queue.retry_job(brought_forward := await queue.add("brief", delay=3600))
        parents = [await queue.add("brief", delay=0.5) for _ in range(2)]
        child = await queue.add("brief", depends_on=parents)
        failed = await queue.add("fail_once")
        assert (await outcome(queue, failed))["status"] == "failed"
        await queue.retry_job(failed)
        retried = [await queue.add("fail_twice", retries=5) for _ in range(20)]
        for job_id in (failed, brought_forward, *parents, child, *retried):
            await outcome(queue, job_id)
        async with plain_client(server.url) as client:
            # Markers live for a second.
            kept = await until(
                lambda: Streams(client).keys("*"),
                lambda keys: (
                    Counter(key.partition(".")[0] for key in keys)
                    == {"done": 26, "index": 2, "queue": 2}
                ),
            )
    await counted(queue)
    stats = await queue.queue_stats()
    await to_thread.run_sync(server.kill)
    await to_thread.run_sync(server.start)
    async with plain_client(server.url) as client:
        assert sorted(await Streams(client).keys("*")) == sorted(kept)
    await only(queue, **stats)
    assert (stats["cancelled"], stats["completed"], sum(stats.values())) == (1, 25, 26)
    assert await queue.get_job_state(cancelled) == "cancelled"
    assert not await queue.is_paused()
    assert await queue.list_repeatables() == []


async def test_a_removal_whose_answer_is_lost_counts_as_done(
    queue: Queue, nats_backend: NATSBackend
) -> None:
    job_id = await queue.add("unnoted", delay=3600)
    connection = nats_backend._require_connection()
    removed: list[bool] = []

    async def remove() -> None:
        removed.append(await queue.remove_delayed(job_id))

    async with anyio.create_task_group() as group:
        group.start_soon(remove)
        while not any(
            "STREAM.MSG.DELETE" in subject for subject, _ in connection._requests.values()
        ):
            await anyio.lowlevel.checkpoint()
        connection._interrupt_requests()  # as when the connection is lost: the request is out
    assert removed == [True]
    assert await queue.get_job(job_id) is None
