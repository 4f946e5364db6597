"""Workers that die lose nothing: their jobs run again elsewhere, and end once."""

import random
from collections import Counter

import anyio
import pytest

from asyncmq_nats.backends.nats.backend import NATSBackend
from asyncmq_nats.backends.nats.embedded.server import EmbeddedServer
from asyncmq_nats.queues import Queue
from asyncmq_nats.settings import Settings
from tests.nats.processes import PATIENCE, Fleet, eventually, holds
from tests.nats.streams import Streams, plain_client
from tests.running import only

JOBS = 1000
LOSSES = 5


@pytest.fixture
def settings() -> Settings:
    # Not a multiple of the interval between the losses: a job must not come back just when the next
    # worker dies, again and again.
    return Settings(stalled_after=1.5)


@pytest.mark.slow
async def test_jobs_of_killed_workers_run_elsewhere_and_end_once(
    fleet: Fleet, queue: Queue, server: EmbeddedServer, nats_backend: NATSBackend
) -> None:
    outcomes: Counter[str] = Counter()
    await nats_backend.subscribe(
        "amq.fleet.event.completed.*",
        lambda signal: outcomes.update([signal.subject.rpartition(".")[2]]),
    )
    ids = await queue.add_bulk(
        [{"task_id": "brief", "args": [number, 0.06]} for number in range(JOBS)]
    )
    workers = await fleet.start_all("a", "b", "c", concurrency=3)
    with anyio.fail_after(2 * PATIENCE):
        for _ in range(LOSSES):
            await anyio.sleep(1.0)
            lost = random.randrange(3)
            workers[lost].kill()
            workers[lost] = fleet.launch(workers[lost].name, concurrency=3)
        await only(queue, completed=JOBS, within=40)
    completed = await queue.get_jobs("completed")
    assert {job["id"] for job in completed} == set(ids)
    assert sorted(job["result"] for job in completed) == list(range(JOBS))
    async with plain_client(server.url) as client:
        streams = Streams(client)
        await streams.nothing_is_left()
        # Claims are written over with markers that live for a second.
        await eventually(streams.count_outcomes, lambda kinds: kinds == {"completed": JOBS})
    await holds(lambda: outcomes.total() >= JOBS)
    assert outcomes == Counter(ids)
    runs = fleet.watched.count_runs()
    stalls = Counter(job["stalls"] for job in completed)
    print(
        f"{JOBS} jobs: bodies ran {runs.total()} times, "
        f"at most {max(runs.values())} times; jobs by stalls: {dict(stalls)}"
    )
    assert len(runs) == JOBS
