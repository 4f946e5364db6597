"""A worker of several queues: one process and one connection serve all of them."""

from collections import Counter

import anyio
import pytest

from asyncmq_nats.backends.base import Backend
from asyncmq_nats.backends.inmemory import InMemoryBackend
from asyncmq_nats.context import current_job
from asyncmq_nats.exceptions import InvalidArgument
from asyncmq_nats.queues import Queue
from asyncmq_nats.runtime.registry import TaskRegistry
from asyncmq_nats.workers import Worker, list_workers, stop_worker
from tests.receiver import PATIENCE, holds
from tests.running import counted, only, outcome


class Shop:
    """Two queues with one task, which notes its queue and waits for a word if it is told to."""

    def __init__(self, backend: Backend) -> None:
        self.started: list[str] = []
        self.running = self.most = 0
        self.go = anyio.Event()
        self.seconds = 0.0
        self.registry = TaskRegistry()
        self.registry.register(self.note, queue="mail", name="mail")
        self.registry.register(self.note, queue="reports", name="reports")
        self.mail = Queue("mail", backend, registry=self.registry)
        self.reports = Queue("reports", backend, registry=self.registry)
        self.queues = [self.mail, self.reports]

    async def note(self, waits: bool = False) -> str:
        name = current_job().queue
        self.started.append(name)
        self.running += 1
        self.most = max(self.most, self.running)
        if waits:
            await self.go.wait()
        else:
            await anyio.sleep(self.seconds)
        self.running -= 1
        return name

    async def add(self, count: int, *, waits: bool = False) -> None:
        for queue in self.queues:
            jobs = [{"task_id": queue.name, "args": [waits]} for _ in range(count)]
            await queue.add_bulk(jobs)


async def run(worker: Worker) -> None:
    with anyio.fail_after(2 * PATIENCE):
        await worker.run()


async def test_one_worker_runs_the_jobs_of_all_its_queues(backend: Backend) -> None:
    shop = Shop(backend)
    await shop.add(20)
    await run(Worker(shop.queues, burst=True))
    assert Counter(shop.started) == {"mail": 20, "reports": 20}
    for queue in shop.queues:
        await only(queue, completed=20)


async def test_it_is_listed_once_per_queue_and_stops_as_a_whole_when_it_is_asked(
    backend: Backend, twin: Backend
) -> None:
    shop = Shop(backend)
    worker = Worker(shop.queues, concurrency=4)
    with anyio.fail_after(PATIENCE):
        async with anyio.create_task_group() as group:
            await group.start(worker.run)
            entries = await list_workers(twin)
            assert {(each.id, each.queue) for each in entries} == {
                (worker.id, "mail"),
                (worker.id, "reports"),
            }
            assert [(each.concurrency, each.version) for each in entries] == [(4, "0.1.0")] * 2
            assert all((each.memory or 0) > 1_000_000 for each in entries)
            assert worker.id is not None
            assert await stop_worker(twin, worker.id)
    assert await list_workers(twin) == []
    assert not await stop_worker(twin, str(worker.id))


async def test_a_worker_that_is_asked_to_stop_finishes_what_runs(
    backend: Backend, twin: Backend
) -> None:
    shop = Shop(backend)
    worker = Worker(shop.mail)
    job_id = await shop.mail.add("mail", [True])
    with anyio.fail_after(PATIENCE):
        async with anyio.create_task_group() as group:
            await group.start(worker.run)
            await holds(lambda: shop.running > 0)
            assert worker.id is not None
            assert await stop_worker(twin, worker.id)
            later = await shop.mail.add("mail")
            shop.go.set()
    assert (await outcome(shop.mail, job_id))["status"] == "completed"
    assert len(shop.started) == 1
    assert await shop.mail.get_job_state(later) in ("waiting", "active")  # or was handed back


async def test_shared_slots_are_never_exceeded(backend: Backend) -> None:
    shop = Shop(backend)
    await shop.add(60)
    await run(Worker(shop.queues, concurrency=2, burst=True))
    assert shop.most == 2
    assert len(shop.started) == 120


async def test_each_queue_may_have_slots_of_its_own(backend: Backend) -> None:
    shop = Shop(backend)
    await shop.add(10, waits=True)
    worker = Worker(shop.queues, concurrency={"mail": 4, "reports": 1})
    with anyio.fail_after(PATIENCE):
        async with anyio.create_task_group() as group:
            await group.start(worker.run)
            await holds(lambda: shop.running == 5)
            assert Counter(shop.started) == {"mail": 4, "reports": 1}
            shop.go.set()
            for queue in shop.queues:
                await only(queue, completed=10)
            worker.stop()


async def test_in_strict_order_the_first_queue_is_emptied_first(backend: Backend) -> None:
    shop = Shop(backend)
    await shop.add(100)
    await run(Worker(shop.queues, concurrency=2, strict=True, burst=True))
    first = shop.started.index("reports")
    # What runs when the last ones are fetched may overtake them; no more.
    assert shop.started[:first].count("mail") >= 90
    assert len(shop.started) == 200


async def test_a_queue_of_more_weight_gets_more_of_the_starts(backend: Backend) -> None:
    shop = Shop(backend)
    shop.seconds = 0.005
    await shop.add(120)
    await run(Worker(shop.queues, concurrency=2, weights={"mail": 4, "reports": 1}, burst=True))
    last = 240 - shop.started[::-1].index("mail")
    assert 10 <= shop.started[:last].count("reports") <= 80  # 30 by the weights; 120 if equal
    assert len(shop.started) == 240


async def test_a_worker_ends_after_its_number_of_jobs(backend: Backend) -> None:
    shop = Shop(backend)
    await shop.add(10)
    await run(Worker(shop.queues, max_jobs=7))
    assert len(shop.started) == 7
    await run(Worker(shop.mail, max_jobs=2))
    assert len(shop.started) == 9
    for queue in shop.queues:
        await counted(queue)
    counts = [await queue.queue_stats() for queue in shop.queues]
    assert sum(each["completed"] for each in counts) == 9
    assert sum(each["failed"] for each in counts) == 0
    await run(Worker(shop.queues, burst=True))
    assert len(shop.started) == 20


async def test_a_burst_runs_what_its_jobs_add_and_leaves_what_is_delayed(backend: Backend) -> None:
    registry = TaskRegistry()

    async def step(left: int) -> None:
        if left:
            current_job().add("step", [left - 1])

    registry.register(step, queue="work", name="step")
    queue = Queue("work", backend, registry=registry)
    await queue.add("step", [5])
    await queue.add("step", [0], delay=3600)
    await run(Worker(queue, burst=True))
    await only(queue, completed=6, delayed=1)


async def test_a_worker_that_grows_too_large_ends(backend: Backend) -> None:
    shop = Shop(backend)
    await run(Worker(shop.queues, max_memory=1))
    assert shop.started == []


async def test_queues_by_name_take_the_backend_of_a_queue_beside_them() -> None:
    backend = InMemoryBackend()
    worker = Worker([Queue("mail", backend), "reports"], concurrency={"reports": 7})
    assert [(queue.name, queue.concurrency) for queue in worker.queues] == [
        ("mail", 3),
        ("reports", 7),
    ]
    assert all(queue.backend is backend for queue in worker.queues)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"queue": []}, "at least one queue"),
        ({"queue": ["mail", "mail"]}, "each queue can be given once"),
        ({"queue": ["mail"], "strict": True}, "share their slots"),
        ({"queue": ["mail", "reports"], "strict": True}, "share their slots"),
        ({"weights": {"sms": 1}}, "may name the queues mail, reports"),
        ({"weights": {"mail": 0}, "concurrency": 5}, "must be above 0"),
        ({"weights": {"mail": 2}, "concurrency": 5, "strict": True}, "knows no weights"),
        ({"concurrency": {"sms": 1}}, "may name the queues mail, reports"),
        ({"concurrency": {"mail": 0}}, "concurrency of mail"),
        ({"max_jobs": 0}, "max_jobs"),
        ({"max_memory": 0}, "max_memory must be above 0"),
        ({"processes": 0}, "processes must be at least 1"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, object], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        Worker(**{"queue": ["mail", "reports"], **options})  # type: ignore[arg-type]


def test_the_queues_of_a_worker_share_one_backend() -> None:
    with pytest.raises(InvalidArgument, match="share one backend"):
        Worker([Queue("mail", InMemoryBackend()), Queue("reports", InMemoryBackend())])
