"""Search: what a filter matches, page by page, on both backends."""

import math
from collections.abc import AsyncIterator
from typing import Any

import anyio
import pytest

from asyncmq_nats import InvalidArgument, Job, JobFilter, Queue, Settings, State
from asyncmq_nats.backends.base import Backend
from asyncmq_nats.store import search
from tests.receiver import PATIENCE, holds, until
from tests.running import counted, make_queue, run_jobs, running


async def ids(jobs: AsyncIterator[dict[str, Any]]) -> list[str]:
    return [job["id"] async for job in jobs]


async def fail(text: str = "") -> None:
    raise RuntimeError(f"boom {text}")


async def echo(value: Any) -> Any:
    return value


async def test_each_criterion_narrows_the_search(backend: Backend) -> None:
    queue = make_queue(backend, fail=fail, echo=echo)
    await queue.add("fail", ["disk"], job_id="f-disk")
    await queue.add("fail", ["net"], job_id="f-net")
    await queue.add("echo", ["Zürich"], job_id="e-1")
    await run_jobs(queue)
    await queue.add("echo", ["later"], delay=1000, job_id="d-1")
    await queue.add("echo", ["now"], priority=3)
    await counted(queue)

    async def found(**criteria: Any) -> set[str]:
        return set(await ids(queue.search(JobFilter(**criteria))))

    assert await found(state="failed") == {"f-disk", "f-net"}
    assert await found(task="fail") == {"f-disk", "f-net"}
    assert await found(task="f*") == {"f-disk", "f-net"}
    assert await found(task="fai") == set()
    assert await found(text="BOOM disk") == {"f-disk"}
    assert await found(text="zürich") == {"e-1"}
    assert await found(text="d-1") == {"d-1"}
    assert await found(state=["delayed", "completed"], task="echo") == {"d-1", "e-1"}
    assert len(await found()) == 5


async def test_a_search_goes_on_over_pages_and_keeps_its_order(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "FIRST_PAGE", 3)
    queue = make_queue(backend)
    added = await queue.add_bulk([{"task_id": "t", "args": [n]} for n in range(1200)])
    assert await ids(queue.search(newest_first=False)) == added
    assert await ids(queue.search()) == added[::-1]
    assert await ids(queue.search(limit=7)) == added[:-8:-1]


async def test_a_search_is_bounded_by_time(backend: Backend) -> None:
    queue = make_queue(backend)
    first = await queue.add("t", delay=100)
    middle = backend.now()
    await holds(lambda: backend.now() > middle + 0.02)
    second = await queue.add("t", delay=100)
    await counted(queue)
    at = middle + 0.01
    assert await ids(queue.search(JobFilter(since=at))) == [second]
    assert await ids(queue.search(JobFilter(until=at))) == [first]
    assert await ids(queue.search(JobFilter(since=at, until=at))) == []
    assert await ids(queue.search(JobFilter(since=0, until=math.inf))) == [second, first]


@pytest.fixture
def settings() -> Settings:
    return Settings(heartbeat_interval=0.5)


async def test_jobs_of_a_worker_are_those_it_runs_and_those_it_ended(backend: Backend) -> None:
    started, end = anyio.Event(), anyio.Event()

    async def hold() -> None:
        started.set()
        await end.wait()

    queue = make_queue(backend, hold=hold, echo=echo)
    async with running(queue) as worker:
        done = await queue.add("echo", [1])
        await queue.wait_for(done, PATIENCE)
        held = await queue.add("hold")
        await started.wait()
        assert worker.id is not None
        of_it = JobFilter(worker=f"{worker.id[:-2]}*")

        async def read() -> set[str]:
            return set(await ids(queue.search(of_it)))

        # Its entry is renewed at each heartbeat.
        await until(read, lambda found: found == {done, held})
        assert await ids(queue.search(JobFilter(worker="another"))) == []
        end.set()


async def test_a_queue_that_is_not_there_has_no_jobs(backend: Backend) -> None:
    queue = Queue("nothing", backend)
    assert await ids(queue.search(JobFilter(since=1.0))) == []
    assert await queue.oldest_waiting() is None


async def test_the_oldest_waiting_job_is_found_over_all_priorities(backend: Backend) -> None:
    queue = make_queue(backend)
    assert await queue.oldest_waiting() is None
    await queue.add("t", delay=1000)
    first = await queue.add("t", priority=9)
    await queue.add("t", priority=1)
    await counted(queue)
    oldest = await queue.oldest_waiting()
    assert oldest is not None
    assert oldest.job["id"] == first
    assert 0 <= oldest.age < PATIENCE
    assert oldest.since + oldest.age <= backend.now()


def test_a_state_that_is_none_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="state must be one of"):
        JobFilter(state="faild")


@pytest.mark.parametrize("text", ["ä", 'say "hi"', "back\\slash", "a*b", "plain"])
def test_the_look_at_the_bytes_misses_nothing(text: str) -> None:
    job = Job(task_id="t", args=[f"x {text} y"])
    assert JobFilter(text=text).may_match("subject", job.encode())
    assert JobFilter(text=text.upper()).matches(job, 0.0)
    foreign = job.encode().replace(b"plain", b"\\u0070lain")
    assert JobFilter(text=text).may_match("subject", foreign)


def test_the_look_at_the_bytes_sorts_out_most() -> None:
    job = Job(task_id="mail.send", args=["x"], status=State.WAITING)
    assert not JobFilter(task="mail.sent").may_match("subject", job.encode())
    assert not JobFilter(task="*.sent").may_match("subject", job.encode())
    assert JobFilter(task="*.sen?").may_match("subject", job.encode())
    assert not JobFilter(text="zebra").may_match("subject", job.encode())
