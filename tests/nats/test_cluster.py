"""Three replicas.

What is expected of a record that is still on its way to them, reads that lag behind, and the loss
of a server.
"""

import random
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path

import anyio
import pytest
from anyio import to_thread

from asyncmq_nats.backends.base import Backend, Expect, Log, Write
from asyncmq_nats.backends.nats.backend import NATSBackend
from asyncmq_nats.backends.nats.embedded.server import EmbeddedServer
from asyncmq_nats.exceptions import WriteRefused
from asyncmq_nats.queues import Queue
from asyncmq_nats.settings import Settings
from asyncmq_nats.wire.keys import counter_name
from tests.nats.cluster import Cluster
from tests.nats.processes import Fleet, eventually, holds
from tests.nats.relay import relaying
from tests.nats.streams import Streams, plain_client
from tests.running import PATIENCE, make_queue, outcome, race, running

BUCKET = "KV_amq_fleet_scheduler"
SETTINGS = Settings(replicas=3, stalled_after=2.0, publish_timeout=30.0, shutdown_timeout=5.0)


@pytest.fixture
async def cluster(tmp_path: Path, server: EmbeddedServer) -> AsyncIterator[Cluster]:
    """A cluster; `server` is there to skip where there is no nats-server."""
    three = Cluster(tmp_path / "cluster")
    try:
        await to_thread.run_sync(three.start)
        await three.ready()
        yield three
    finally:
        await to_thread.run_sync(three.stop)


@pytest.fixture
async def backends(cluster: Cluster) -> AsyncIterator[list[Backend]]:
    """A connection to each server."""
    async with AsyncExitStack() as stack:
        yield [
            await stack.enter_async_context(NATSBackend(url, settings=SETTINGS))
            for url in cluster.urls
        ]


@pytest.fixture
def fleet(cluster: Cluster, tmp_path: Path) -> Iterator[Fleet]:
    changed = SETTINGS.model_dump(exclude_unset=True)
    workers = Fleet(
        ",".join(cluster.urls),
        tmp_path / "fleet",
        environment={f"ASYNCMQ_NATS_{name.upper()}": str(value) for name, value in changed.items()},
    )
    yield workers
    workers.stop()


async def settle(queue: Queue, ended: int, left: int = 0) -> dict[str, int]:
    """Wait until `ended` jobs have ended and no others are left, and return the counts.

    Those of a cluster lag behind a little.
    """
    return await eventually(
        queue.queue_stats,
        lambda stats: (
            stats["completed"] + stats["failed"] + stats["cancelled"]
            == ended
            == sum(stats.values()) - left
        ),
        within=30,
    )


@pytest.mark.slow
@pytest.mark.timeout(480)
async def test_children_are_told_of_parents_that_end_while_they_are_added(
    backends: list[Backend],
) -> None:
    """The edge and the outcome are on their way at the same time.

    Neither is applied yet when the other is checked.
    """

    async def nap(seconds: float) -> float:
        await anyio.sleep(seconds)
        return seconds

    workers = [make_queue(backend, "fleet", concurrency=50, nap=nap) for backend in backends[:2]]
    producers = [Queue("fleet", backend) for backend in backends]

    async def add_family(number: int) -> None:
        producer, seconds = producers[number % 3], random.uniform(0.0, 0.01)
        parent = await producer.add("nap", [seconds])
        await anyio.sleep(max(0.0, seconds + random.uniform(-0.004, 0.004)))
        for _ in range(3):
            await producer.add("nap", [0], depends_on=[parent])

    async with running(workers[0]), running(workers[1]):
        for start in range(0, 400, 20):
            async with anyio.create_task_group() as group:
                for number in range(start, start + 20):
                    group.start_soon(add_family, number)
        assert await settle(producers[0], 1600) == dict.fromkeys(
            await producers[0].queue_stats(), 0
        ) | {"completed": 1600}


@pytest.mark.slow
@pytest.mark.timeout(480)
async def test_of_a_cancellation_and_the_failure_of_a_parent_one_wins(
    backends: list[Backend], cluster: Cluster
) -> None:
    async def fail(name: str) -> None:
        raise ValueError(name)

    queue = make_queue(backends[0], "fleet", concurrency=10, fail=fail)
    other = Queue("fleet", backends[1])
    async with running(queue):
        for _ in range(40):
            parent = await other.add("fail", ["p"], delay=0.05)
            child = await other.add("fail", ["c"], depends_on=[parent], on_parent_failure="fail")
            await anyio.sleep(0.05 + random.uniform(0.0, 0.01))
            await race(partial(other.cancel_job, child), partial(queue.cancel_job, parent))
        await settle(queue, 80)
    async with plain_client(cluster.urls[0]) as client:
        ends = [key.split(".") for key in await Streams(client).keys("done")]
    ended = [end[1] for end in ends if len(end) == 3]  # the others are edges
    assert len(set(ended)) == len(ended) == 80


@pytest.mark.timeout(480)
async def test_what_was_added_is_found_at_once_on_every_server(backends: list[Backend]) -> None:
    queues = [Queue("fleet", backend) for backend in backends]
    for number in range(60):
        here, there = queues[number % 3], queues[(number + 1) % 3]
        parent = await here.add("unnoted", delay=3600 if number % 2 else None)
        assert await there.get_job_state(parent) == ("delayed" if number % 2 else "waiting")
        child = await there.add("unnoted", depends_on=[parent])
        assert await here.cancel_job(child)
        assert await there.retry_job(child)
        assert await here.cancel_job(parent)


@pytest.mark.parametrize("deaf", [False, True])
async def test_a_repetition_is_told_from_what_another_one_wrote(
    cluster: Cluster, backends: list[Backend], deaf: bool
) -> None:
    here = backends[0]
    await here.declare_log(Log("notes", ("notes.>",), timers=True))
    batch = [
        Write(f"notes.{name}", b"", Expect(f"notes.{name}"), marker=True, ttl=60) for name in "ab"
    ]
    results: list[int | Exception] = []

    async def write(there: Backend) -> None:
        try:
            results.append(await there.write("notes", *batch))
        except WriteRefused as error:
            results.append(error)

    async with (
        relaying(cluster.servers[0]) as relay,
        NATSBackend(relay.url, settings=SETTINGS) as there,
    ):
        (relay.lose_request if deaf else relay.lose_answer)(rb"PUB notes\.")
        with anyio.fail_after(PATIENCE):
            async with anyio.create_task_group() as group:
                group.start_soon(write, there)
                await relay.lost.wait()
                if deaf:
                    await here.write("notes", *batch)
                await eventually(lambda: here.count("notes"), lambda count: count == 2)
                await relay.cut()
    assert [type(result) for result in results] == [WriteRefused] if deaf else results == [2]
    assert await here.write("notes", Write("notes.c", b"")) == 3  # the stream takes more


@pytest.mark.slow
@pytest.mark.timeout(480)
@pytest.mark.parametrize("end", [EmbeddedServer.kill, EmbeddedServer.stop])
async def test_while_a_server_with_counters_is_away_workers_start_and_jobs_are_counted(
    cluster: Cluster, end: Callable[[EmbeddedServer], None]
) -> None:
    """For minutes after a kill, what was on that server does not answer; after a stop, an error."""

    async def no_op() -> None:
        pass

    async with NATSBackend(cluster.urls, settings=SETTINGS) as backend:
        queue = make_queue(backend, "fleet", no_op=no_op)
        async with running(queue):
            await outcome(queue, await queue.add("no_op"))
            await queue.add("no_op", delay=3600)
    lost = await cluster.leader(BUCKET, counter_name("done_completed"))
    await to_thread.run_sync(end, lost)
    await cluster.leader(BUCKET)
    async with NATSBackend(cluster.urls, settings=SETTINGS) as backend:
        queue = make_queue(backend, "fleet", no_op=no_op)
        async with running(queue):
            await outcome(queue, await queue.add("no_op"))
            stats = await settle(queue, 2, left=1)
            assert stats == dict.fromkeys(stats, 0) | {"completed": 2, "delayed": 1}
            with anyio.fail_after(PATIENCE):
                assert len((await queue.list_page("completed")).jobs) == 2
                assert len(await queue.list_delayed()) == 1


@pytest.mark.slow
@pytest.mark.timeout(480)
@pytest.mark.parametrize("stream", ["amq_fleet", BUCKET])
async def test_the_loss_of_a_leader_loses_no_job(
    fleet: Fleet, cluster: Cluster, stream: str
) -> None:
    ids: list[str] = []
    done = anyio.Event()
    async with NATSBackend(cluster.urls, settings=SETTINGS) as backend:
        queue = Queue("fleet", backend)
        await queue._assets.declare_all()
        workers = await fleet.start_all("first", "second", concurrency=5)

        async def produce(producer: int) -> None:
            while not done.is_set():
                delay = 0.5 if producer == 1 else None
                ids.append(
                    await queue.add(
                        "brief",
                        [len(ids), 0.01],
                        job_id=f"job-{len(ids)}" if producer == 0 else None,
                        delay=delay,
                    )
                )
                await anyio.sleep(0.01)

        async def produce_families() -> None:
            while not done.is_set():
                ids.append(parent := await queue.add("unnoted"))
                ids.append(await queue.add("unnoted", depends_on=[parent]))
                await anyio.sleep(0.02)

        async with anyio.create_task_group() as group:
            for producer in range(3):
                group.start_soon(produce, producer)
            group.start_soon(produce_families)
            for _ in range(2):
                await anyio.sleep(0.5)
                leader = await cluster.leader(stream)
                await to_thread.run_sync(leader.kill)
                known = len(ids)
                await holds(lambda: len(ids) > known + 20, within=30)  # noqa: B023
                await to_thread.run_sync(leader.start)
            done.set()
        stats = await settle(queue, len(ids))
        assert stats == dict.fromkeys(stats, 0) | {"completed": len(ids)}
        assert {job["id"] for job in await queue.get_jobs("completed")} == set(ids)
        assert not any(worker.ended for worker in workers)
