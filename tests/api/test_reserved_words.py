"""A job's id can be any word, also one of ours.

Through every public operation, on both backends.
"""

from collections.abc import Awaitable, Callable

import anyio
import pytest

from asyncmq_nats.backends.base import Backend, Write
from asyncmq_nats.queues import Queue
from tests.running import PATIENCE, counted, make_queue, run_jobs, running

WORDS = [
    "done",
    "later",
    "claim",
    "awaited",
    "completed",
    "failed",
    "released",
    "delayed",
    "parked",
    "ready",
    "event",
    "tick",
    "fire",
    "index",
    "entry",
    "queue",
]
BUCKET, KEY = "KV_amq_work_scheduler", "$KV.amq_work_scheduler"


async def echo(value: str = "ran") -> str:
    return value


async def fail() -> None:
    raise ValueError("no")


@pytest.fixture
def queue(backend: Backend) -> Queue:
    return make_queue(backend, echo=echo, fail=fail)


async def ids(queue: Queue, state: str) -> list[str]:
    """Return the ids of a list, read in both orders and by page."""
    await counted(queue)
    forwards = [job["id"] for job in await queue.get_jobs(state, asc=True)]
    assert [job["id"] for job in await queue.get_jobs(state)] == forwards[::-1]
    page = await queue.list_page(state)
    assert [job["id"] for job in page.jobs] == forwards[::-1]
    assert page.cursor is None
    return forwards


@pytest.mark.parametrize("word", WORDS)
async def test_a_job_with_the_id_of_a_word_of_ours_runs(queue: Queue, word: str) -> None:
    assert await queue.add("echo", job_id=word) == word
    assert await queue.add("echo", job_id=word) == word
    async with running(queue):
        with anyio.fail_after(PATIENCE):
            assert await queue.wait_for(word) == "ran"
    assert await ids(queue, "completed") == [word]
    assert await queue.get_job_state(word) == "completed"
    assert await queue.get_job_result(word) == "ran"
    assert not await queue.cancel_job(word)
    assert await queue.remove_job(word)
    assert await queue.get_job(word) is None


@pytest.mark.parametrize("word", WORDS)
async def test_it_can_be_delayed_cancelled_and_retried(queue: Queue, word: str) -> None:
    await queue.add("echo", job_id=word, delay=3600)
    assert await queue.get_job_state(word) == "delayed"
    assert await ids(queue, "delayed") == [word]
    assert [job.job_id for job in await queue.list_delayed()] == [word]
    assert await queue.cancel_job(word)
    assert await queue.is_job_cancelled(word)
    assert await ids(queue, "cancelled") == [word]
    assert await queue.retry_job(word)
    async with running(queue):
        with anyio.fail_after(PATIENCE):
            assert await queue.wait_for(word) == "ran"


@pytest.mark.parametrize("word", WORDS)
async def test_it_can_fail_and_be_retried_removed_and_cleaned(queue: Queue, word: str) -> None:
    await queue.add("fail", job_id=word)
    await run_jobs(queue)
    assert await ids(queue, "failed") == [word]
    assert await queue.retry_job(word)
    await run_jobs(queue)
    assert await ids(queue, "failed") == [word]
    assert await queue.clean_jobs(0, state="failed") == [word]
    assert await ids(queue, "failed") == []


@pytest.mark.parametrize("word", WORDS)
async def test_it_can_be_a_parent_and_a_child(queue: Queue, word: str) -> None:
    child = f"{word}-child"
    await queue.add("echo", job_id=word, delay=3600)
    await queue.add("echo", job_id=child, depends_on=[word])
    other = await queue.add("echo", delay=3600)
    await queue.add("echo", job_id=f"{word}.{word}", depends_on=[other])
    assert await ids(queue, "waiting-children") == [child, f"{word}.{word}"]
    assert await queue.retry_job(word)
    async with running(queue):
        with anyio.fail_after(PATIENCE):
            assert await queue.wait_for(child) == "ran"
    await counted(queue)
    assert await queue.drain(include_delayed=True) == [other]
    removed = await queue.obliterate()
    assert sorted(removed) == sorted([word, child, f"{word}.{word}"])


@pytest.mark.parametrize(
    "key",
    [
        "later.{id}.completed",
        "later.{id}.claim",
        "done.{id}.delayed",
        "done.{id}.released",
        "done.{id}.awaited.x.completed",
        "done.completed.{id}",
        "index.failed.{id}.entry",
    ],
)
async def test_a_key_that_is_none_of_ours_is_no_job(
    queue: Queue, backend: Backend, key: str
) -> None:
    await queue._assets.declare_all()
    await backend.write(BUCKET, Write(f"{KEY}.{key.format(id='forged')}", b'{"result":"forged"}'))
    assert await queue.get_job("forged") is None
    assert not await queue.cancel_job("forged")
    assert not await queue.retry_job("forged")
    for state in ("completed", "failed", "delayed", "waiting", "waiting-children", "cancelled"):
        assert await queue.get_jobs(state) == []


READS: dict[str, Callable[[Queue], Awaitable[object]]] = {
    "queue_stats": lambda queue: queue.queue_stats(),
    "get_job_counts": lambda queue: queue.get_job_counts(),
    "count": lambda queue: queue.count(),
    "get_job": lambda queue: queue.get_job("x"),
    "get_job_state": lambda queue: queue.get_job_state("x"),
    "get_jobs": lambda queue: queue.get_jobs(),
    "list_jobs": lambda queue: queue.list_jobs("waiting"),
    "list_page": lambda queue: queue.list_page("failed"),
    "list_delayed": lambda queue: queue.list_delayed(),
    "get_due_delayed": lambda queue: queue.get_due_delayed(),
    "list_repeatables": lambda queue: queue.list_repeatables(),
    "pause_repeatable": lambda queue: queue.pause_repeatable("x"),
    "remove_repeatable": lambda queue: queue.remove_repeatable("x"),
    "is_paused": lambda queue: queue.is_paused(),
    "is_job_cancelled": lambda queue: queue.is_job_cancelled("x"),
    "retry_job": lambda queue: queue.retry_job("x"),
    "cancel_job": lambda queue: queue.cancel_job("x"),
    "remove_job": lambda queue: queue.remove_job("x"),
    "remove_delayed": lambda queue: queue.remove_delayed("x"),
    "clean": lambda queue: queue.clean("completed"),
    "clean_jobs": lambda queue: queue.clean_jobs(0),
    "drain": lambda queue: queue.drain(include_delayed=True),
    "obliterate": lambda queue: queue.obliterate(),
    "get_deduplication_job_id": lambda queue: queue.get_deduplication_job_id("x"),
    "remove_deduplication_key": lambda queue: queue.remove_deduplication_key("x"),
}


@pytest.mark.parametrize("read", READS.values(), ids=READS)
async def test_what_adds_nothing_makes_no_queue(
    queue: Queue, backend: Backend, read: Callable[[Queue], Awaitable[object]]
) -> None:
    found = await read(queue)
    values = found.values() if isinstance(found, dict) else [found]
    assert not any(getattr(value, "jobs", value) for value in values)
    assert await backend.list_logs("") == []


async def test_resuming_a_repeatable_of_no_queue_is_a_key_error(
    queue: Queue, backend: Backend
) -> None:
    with pytest.raises(KeyError, match="no repeatable"):
        await queue.resume_repeatable("x")
    assert await backend.list_logs("") == []
