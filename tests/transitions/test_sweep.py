"""A cancel and a retry by hand of many jobs at once: each ends as if it had been the only one."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import anyio
import pytest

from asyncmq_nats import JobFilter, Queue
from asyncmq_nats.backends.base import Backend, ConsumerState, Write
from asyncmq_nats.exceptions import BackendError, PayloadTooLarge, Unconfirmed, WriteRefused
from asyncmq_nats.states import Place, State
from asyncmq_nats.store.search import Found
from tests.receiver import Receiver, until
from tests.running import counted, make_queue, only, outcome, run_jobs, running


class Tasks:
    """Tasks that note when they ran; `fail` does so until it is told not to."""

    def __init__(self) -> None:
        self.ran: list[Any] = []
        self.broken = True

    async def note(self, value: Any = None) -> None:
        self.ran.append(value)

    async def fail(self, value: Any = None) -> None:
        self.ran.append(value)
        if self.broken:
            raise ValueError("no")


def queue_of(backend: Backend, tasks: Tasks) -> Queue:
    return make_queue(backend, concurrency=10, note=tasks.note, fail=tasks.fail)


async def find(queue: Queue, state: str) -> list[Found]:
    await counted(queue)
    where = JobFilter(state=state)
    return [
        found
        async for page in queue._pages_of(where, where.states, descending=False)
        for found in page
    ]


# -- both


@pytest.mark.parametrize(("action", "state"), [("cancel", "waiting"), ("retry", "failed")])
async def test_an_interruption_is_told_how_many_jobs_were_changed(
    action: str, state: str, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = Tasks()
    queue = queue_of(backend, tasks)
    await queue.add_bulk([{"task_id": "fail", "args": [n]} for n in range(150)])
    if state == "failed":
        await run_jobs(queue)
    name = "write" if action == "retry" else "write_each"
    act = getattr(backend, name)
    seen: list[int] = []
    with anyio.CancelScope() as scope, monkeypatch.context() as patch:

        async def interrupt(*arguments: Any) -> Any:
            scope.cancel()
            return await act(*arguments)

        patch.setattr(backend, name, interrupt)
        await queue.apply(JobFilter(state=state), action, progress=seen.append)
    assert scope.cancelled_caught
    assert seen == [100]  # the first page
    tasks.broken, tasks.ran = False, []
    await run_jobs(queue)
    if action == "cancel":
        await only(queue, cancelled=100, completed=50)
    else:
        await only(queue, completed=100, failed=50)
    assert len(tasks.ran) == (50 if action == "cancel" else 100)


@pytest.mark.parametrize(("size", "pages"), [(1, [100, 2100, 2200]), (20_000, [100, 600, 1100])])
async def test_small_jobs_are_acted_on_many_at_a_time(
    size: int, pages: list[int], backend: Backend
) -> None:
    queue = queue_of(backend, Tasks())
    await queue.add_bulk([{"task_id": "note", "args": ["x" * size]}] * pages[-1])
    await counted(queue)
    seen: list[int] = []
    await queue.apply(JobFilter(state="waiting"), "cancel", progress=seen.append)
    assert seen == pages


async def test_the_next_jobs_are_read_while_the_first_are_acted_on(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue = queue_of(backend, Tasks())
    await queue.add_bulk([{"task_id": "note"}] * 1200)
    await counted(queue)
    read, lists = anyio.Event(), queue._lists
    read_records = lists.read_records

    async def note(source: Any, after: int | None, *args: Any, **options: Any) -> Any:
        if after is not None:
            read.set()
        return await read_records(source, after, *args, **options)

    async def act(job_id: str) -> bool:
        with anyio.fail_after(10):
            await read.wait()
        return True

    monkeypatch.setattr(lists, "read_records", note)
    assert (await queue.apply(JobFilter(state="waiting"), act)).done == 1200


# -- cancel


async def test_jobs_of_every_kind_are_cancelled(backend: Backend) -> None:
    tasks = Tasks()
    queue = queue_of(backend, tasks)
    again = await queue.add("fail")
    await run_jobs(queue)
    assert await queue.retry_job(again)  # it has a claim now
    parent = await queue.add("note", ["parent"], delay=3600)
    await queue.add("note", ["child"], depends_on=[parent], on_parent_failure="run")
    await queue.add("note", ["another"], depends_on=[parent], on_parent_failure="fail")
    await queue.add_bulk([{"task_id": "note", "args": [n]} for n in range(150)])
    await queue.add_bulk([{"task_id": "note", "args": [n], "delay": 3600} for n in range(150)])
    seen: list[int] = []
    result = await queue.apply(JobFilter(state="delayed"), "cancel", progress=seen.append)
    assert (result.matched, result.done, seen[-1]) == (151, 151, 151)
    await only(queue, cancelled=151, failed=1, waiting=152)
    result = await queue.apply(JobFilter(state="waiting"), "cancel")
    assert (result.matched, result.done) == (152, 152)
    await run_jobs(queue)
    await only(queue, cancelled=303, failed=1)
    assert tasks.ran == [None]


async def test_a_cancel_spares_a_job_that_has_ended_since(backend: Backend) -> None:
    tasks = Tasks()
    queue = queue_of(backend, tasks)
    await queue.add_bulk([{"task_id": "note", "args": [n]} for n in range(3)])
    found = await find(queue, "waiting")
    await run_jobs(queue)
    assert await queue._sweep.cancel(found) == set()
    await only(queue, completed=3)


async def test_a_cancel_finds_a_job_that_has_failed_since_and_is_to_run_again(
    backend: Backend,
) -> None:
    tasks = Tasks()
    queue = queue_of(backend, tasks)
    job_id = await queue.add("fail", retries=1, backoff=3600)
    found = await find(queue, "waiting")
    async with running(queue):
        await only(queue, delayed=1)
    assert await queue._sweep.cancel(found) == {job_id}
    await only(queue, cancelled=1)


async def test_a_cancel_finds_a_job_that_has_become_ready_since(backend: Backend) -> None:
    tasks = Tasks()
    queue = queue_of(backend, tasks)
    job_id = await queue.add("note", delay=3600)
    found = await find(queue, "delayed")
    await queue.pause()
    async with running(queue):
        assert await queue.promote(job_id)
        await only(queue, waiting=1)
    assert await queue._sweep.cancel(found) == {job_id}
    await queue.resume()
    await run_jobs(queue)
    await only(queue, cancelled=1)
    assert tasks.ran == []


async def test_jobs_that_are_cancelled_while_they_run_end_once(backend: Backend) -> None:
    tasks = Tasks()
    queue = queue_of(backend, tasks)
    await queue.add_bulk([{"task_id": "note", "args": [n]} for n in range(400)])
    async with running(queue):
        result = await queue.apply(JobFilter(), "cancel")
        await only(queue, completed=400 - result.done, cancelled=result.done)


async def test_a_cancel_that_dies_half_way_is_finished(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = Tasks()
    queue = queue_of(backend, tasks)
    await queue.add_bulk([{"task_id": "note", "args": [n]} for n in range(5)])
    await queue.add_bulk([{"task_id": "note", "args": [n], "delay": 3600} for n in range(5)])
    await counted(queue)

    async def die(log: str, sequences: Sequence[int]) -> list[int]:
        raise Unconfirmed("the removal", 30.0)

    with monkeypatch.context() as patch:
        patch.setattr(backend, "delete_many", die)
        for state in ("waiting", "delayed"):
            with pytest.raises(Unconfirmed):
                await queue.apply(JobFilter(state=state), "cancel")
    await run_jobs(queue)
    await only(queue, cancelled=10)


# -- what is read


@pytest.mark.parametrize("state", ["waiting", "delayed", "failed"])
async def test_a_search_by_state_and_time_alone_reads_no_job(
    state: str, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue, read = queue_of(backend, Tasks()), list[Any]()
    task, delay = ("fail", None) if state == "failed" else ("note", 3600.0)
    ids = [
        await queue.add(task, [n], delay=None if state == "waiting" else delay) for n in range(3)
    ]
    if state == "failed":
        await run_jobs(queue)
    await counted(queue)

    def read_none(*given: Any) -> list[Any]:
        read.append(given)
        return []

    monkeypatch.setattr(queue._lists, "jobs_in", read_none)
    where = JobFilter(state=state, since=0.0, until=backend.now() + 60)
    result = await queue.apply(where, "remove", dry_run=True)
    assert (result.matched, read) == (3, [])
    await queue.apply(replace(where, task="*"), "remove", dry_run=True)
    assert len(read) == 3
    monkeypatch.undo()
    found = await find(queue, state)
    assert [(each.job_id, each.state, each.job.args) for each in found] == [
        (job_id, state, [n]) for n, job_id in enumerate(ids)
    ]


async def test_a_job_that_ends_badly_twice_has_one_index_entry(backend: Backend) -> None:
    queue = queue_of(backend, Tasks())
    job_id, keys = await queue.add("fail"), queue._subjects
    for failures in range(1, 3):
        await run_jobs(queue)
        await only(queue, failed=1)
        assert await backend.count(keys.bucket_log, keys.indexed(State.FAILED)) == 1
        if failures == 1:
            assert await queue.retry_job(job_id)


# -- a cancel by a purge


class Purges:
    """Notes what a backend is told to purge."""

    def __init__(self, backend: Backend, patch: pytest.MonkeyPatch) -> None:
        self.filters: list[str] = []
        self.counts: list[int] = []
        self._purge = backend.purge
        patch.setattr(backend, "purge", self.purge)

    async def purge(self, log: str, filter: str, **options: Any) -> int:
        self.filters.append(filter)
        self.counts.append(await self._purge(log, filter, **options))
        return self.counts[-1]


async def test_jobs_that_no_worker_asks_for_are_removed_together(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = Tasks()
    queue = queue_of(backend, tasks)
    await queue.add("note", ["urgent"], priority=1)
    await queue.add_bulk([{"task_id": "note", "args": [n]} for n in range(300)])
    await counted(queue)
    purges = Purges(backend, monkeypatch)
    result = await queue.apply(JobFilter(state="waiting", task="note"), "cancel")
    assert (result.matched, result.done) == (301, 301)
    assert purges.filters == 3 * [">"], "the records of no other tier come between"
    assert purges.counts == [1, 100, 200]
    await only(queue, cancelled=301)
    assert await backend.last_sequence(queue._subjects.ready_log) == 301
    assert not await backend.last(queue._subjects.ready_log, ">")
    await queue.add("note", ["later"])
    await run_jobs(queue)
    assert tasks.ran == ["later"]


@pytest.mark.parametrize("others", [{0}, {299}, {150}, {0, 150}, {120, 121, 250}, set(range(90))])
async def test_a_purge_leaves_jobs_that_do_not_match(
    others: set[int], backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`others`: which of the jobs are of another task."""
    tasks = Tasks()
    queue = make_queue(backend, concurrency=10, note=tasks.note, other=tasks.note)
    await queue.add_bulk(
        [{"task_id": "other" if n in others else "note", "args": [n]} for n in range(300)]
    )
    await counted(queue)
    purges = Purges(backend, monkeypatch)
    result = await queue.apply(JobFilter(state="waiting", task="note"), "cancel")
    assert result.done == 300 - len(others)
    assert bool(purges.counts) == (0 not in others)
    await only(queue, cancelled=300 - len(others), waiting=len(others))
    await run_jobs(queue)
    assert sorted(tasks.ran) == sorted(others)


async def test_a_purge_leaves_jobs_whose_cancel_was_refused_and_those_that_came_since(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = Tasks()
    queue = queue_of(backend, tasks)
    ids = await queue.add_bulk([{"task_id": "note", "args": [n]} for n in range(100)])
    await queue.add("note", ["child"], depends_on=[ids[50]])  # its parent is not cancelled here
    found = await find(queue, "waiting")
    await queue.add("note", ["new"])
    purges = Purges(backend, monkeypatch)
    assert await queue._sweep.cancel(found) == {*ids} - {ids[50]}
    assert purges.counts == [50]
    await run_jobs(queue)
    await only(queue, cancelled=99, completed=3)
    assert sorted(map(str, tasks.ran)) == ["50", "child", "new"]


async def test_a_purge_finds_jobs_that_have_been_written_anew_since(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = Tasks()
    queue = queue_of(backend, tasks)
    ids = await queue.add_bulk([{"task_id": "note", "args": [n]} for n in range(100)])
    await queue.pause()
    found = await find(queue, "waiting")
    await queue.edit(ids[3], args=["edited"])
    purges = Purges(backend, monkeypatch)
    assert await queue._sweep.cancel(found) == {*ids}
    assert purges.counts == [99]
    await only(queue, cancelled=100)
    await queue.resume()
    await run_jobs(queue)
    assert tasks.ran == []


@pytest.mark.parametrize("where", ["before", "between"])
async def test_a_purge_leaves_jobs_of_other_tiers(
    where: str, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = Tasks()
    queue = queue_of(backend, tasks)
    entries: list[dict[str, Any]] = [{"task_id": "note", "args": [n]} for n in range(60)]
    entries.insert(0 if where == "before" else 30, {"task_id": "note", "priority": 9})
    await queue.add_bulk(entries)
    found = [each for each in await find(queue, "waiting") if each.job.priority == 5]
    purges = Purges(backend, monkeypatch)
    assert len(await queue._sweep.cancel(found)) == 60
    assert (purges.filters, purges.counts) == ([queue._subjects.tier(5)], [60])
    await only(queue, cancelled=60, waiting=1)
    await run_jobs(queue)
    assert tasks.ran == [None]


async def test_of_jobs_that_were_purged_nothing_else_is_looked_for(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue = queue_of(backend, Tasks())
    await queue.add_bulk([{"task_id": "note", "args": [n]} for n in range(60)])
    found, told = await find(queue, "waiting"), list[str]()
    last, filters = backend.last, list[str]()

    async def look(log: str, *given: str) -> list[Any]:
        filters.extend(given)
        return await last(log, *given)

    async def tell(job_id: str) -> None:
        told.append(job_id)

    monkeypatch.setattr(backend, "last", look)
    monkeypatch.setattr(queue._controls, "signal_cancel", tell)
    assert len(await queue._sweep.cancel(found)) == 60
    assert filters == told == []
    await only(queue, cancelled=60)


async def test_what_a_dead_promoter_has_left_of_a_purged_job_is_removed(backend: Backend) -> None:
    tasks = Tasks()
    queue = queue_of(backend, tasks)
    ids = await queue.add_bulk([{"task_id": "note", "args": [n]} for n in range(60)])
    found, keys = await find(queue, "waiting"), queue._subjects
    record = found[7].record
    await backend.write(
        keys.bucket_log, Write(keys.later(found[7].token, Place.RELEASED), record.body)
    )
    assert found[7].job_id == ids[7]
    assert await queue._sweep.cancel(found) == {*ids}
    await only(queue, cancelled=60)
    assert await backend.last(keys.bucket_log, keys.later_all(found[7].token)) == []
    await run_jobs(queue)
    assert tasks.ran == []


async def test_a_worker_is_told_of_a_delayed_job_that_has_become_ready_since(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue = queue_of(backend, Tasks())
    await queue.add_bulk([{"task_id": "note", "delay": 3600} for _ in range(3)])
    found, told = await find(queue, "delayed"), list[str]()
    await queue.pause()
    async with running(queue):
        assert await queue.promote(found[1].job_id)
        await only(queue, waiting=1, delayed=2)

    async def tell(job_id: str) -> None:
        told.append(job_id)

    monkeypatch.setattr(queue._controls, "signal_cancel", tell)
    assert len(await queue._sweep.cancel(found)) == 3
    assert told == [found[1].job_id]
    await only(queue, cancelled=3)


@pytest.mark.parametrize("why", ["cluster", "few of many", "a worker", "a job that runs"])
async def test_jobs_are_removed_one_by_one(
    why: str, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a purge is not safe, or costs more, or keeps workers waiting."""
    queue = queue_of(backend, Tasks())
    ids = await queue.add_bulk([{"task_id": "note", "args": [n]} for n in range(300)])
    found = await find(queue, "waiting")
    if why == "cluster":
        monkeypatch.setattr(type(backend), "reads_may_lag", property(lambda _: True))
    elif why == "few of many":
        found = found[:4]
    purges = Purges(backend, monkeypatch)
    if why == "a job that runs":
        await Receiver(backend, queue._subjects.ready_log).pull("tier_5")
    if why == "a worker":
        await queue.pause()
        async with running(queue):
            await until_pulled(queue)
            await queue._sweep.cancel(found)
    else:
        await queue._sweep.cancel(found)
    assert purges.counts == []
    await only(queue, cancelled=len(found), waiting=len(ids) - len(found))


async def until_pulled(queue: Queue) -> None:
    async def state() -> ConsumerState:
        return await queue._inspection.tier(5)

    await until(state, lambda tier: tier.waiting_pulls > 0)


# -- retry


async def failed(queue: Queue, count: int) -> None:
    await queue.add_bulk([{"task_id": "fail", "args": [n]} for n in range(count)])
    await run_jobs(queue)
    await only(queue, failed=count)


async def failed_and_mended(queue: Queue, tasks: Tasks, count: int) -> None:
    """Have jobs fail, and their task mended: a retry succeeds."""
    await failed(queue, count)
    tasks.broken, tasks.ran = False, []


async def test_retried_jobs_run_once_and_release_those_that_wait_for_them(
    backend: Backend,
) -> None:
    tasks = Tasks()
    queue = queue_of(backend, tasks)
    parent = await queue.add("fail", ["parent"])
    child = await queue.add("note", ["child"], depends_on=[parent])
    await queue.add_bulk([{"task_id": "fail", "args": [n]} for n in range(200)])
    async with running(queue):
        await only(queue, failed=201, **{"waiting-children": 1})
    tasks.broken, tasks.ran = False, []
    result = await queue.apply(JobFilter(state="failed"), "retry")
    assert (result.matched, result.done) == (201, 201)
    async with running(queue):
        assert (await outcome(queue, child))["status"] == "completed"
    await only(queue, completed=202)
    assert sorted(map(str, tasks.ran)) == sorted(["parent", "child", *map(str, range(200))])


async def test_two_that_retry_the_same_jobs_make_each_run_once(
    backend: Backend, twin: Backend
) -> None:
    tasks = Tasks()
    queue = queue_of(backend, tasks)
    await failed_and_mended(queue, tasks, 150)
    done: list[int] = []

    async def retry(each: Queue) -> None:
        done.append((await each.apply(JobFilter(state="failed"), "retry")).done)

    async with anyio.create_task_group() as group:
        group.start_soon(retry, queue)
        group.start_soon(retry, Queue("work", twin))
    await run_jobs(queue)
    await only(queue, completed=150)
    assert sum(done) == 150
    assert sorted(tasks.ran) == list(range(150))


async def test_a_retry_spares_what_has_been_retried_or_removed_since(backend: Backend) -> None:
    tasks = Tasks()
    queue = queue_of(backend, tasks)
    await failed(queue, 3)
    found = await find(queue, "failed")
    retried, removed, left = [each.job.job_id for each in found]
    assert await queue.retry_job(retried)
    assert await queue.remove_job(removed)
    assert await queue._sweep.retry(found) == {left}
    await only(queue, waiting=2)


@pytest.mark.parametrize("count", [5, 60])
@pytest.mark.parametrize("step", ["release", "remove"])
async def test_a_retry_that_dies_half_way_goes_on(
    step: str, count: int, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A few jobs are written one by one, and so are many if one of them is refused."""
    tasks = Tasks()
    queue = queue_of(backend, tasks)
    await failed_and_mended(queue, tasks, count)
    write_each = backend.write_each
    calls = 0

    async def die(log: str, records: Sequence[Any]) -> Any:
        nonlocal calls
        calls += 1
        if step == "remove" or calls > 1:
            raise Unconfirmed("the write", 30.0)
        return await write_each(log, records)

    with monkeypatch.context() as patch:
        patch.setattr(backend, "delete_many" if step == "remove" else "write_each", die)
        if step == "release":
            Batches(backend, patch, WriteRefused("log", "test"))
        with pytest.raises(BackendError):
            await queue.apply(JobFilter(state="failed"), "retry")
    await queue.apply(JobFilter(state="failed"), "retry")
    await run_jobs(queue)
    await only(queue, completed=count)
    assert sorted(tasks.ran) == list(range(count))


@pytest.mark.parametrize("stored", [False, True])
async def test_a_retry_whose_batch_is_in_doubt_goes_on(
    stored: bool, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = Tasks()
    queue = queue_of(backend, tasks)
    await failed_and_mended(queue, tasks, 60)
    write = backend.write

    async def die(log: str, *writes: Any) -> int:
        if stored:
            await write(log, *writes)
        raise Unconfirmed("the write", 30.0)

    with monkeypatch.context() as patch:
        patch.setattr(backend, "write", die)
        with pytest.raises(Unconfirmed):
            await queue.apply(JobFilter(state="failed"), "retry")
    await queue.apply(JobFilter(state="failed"), "retry")
    await run_jobs(queue)
    await only(queue, completed=60)
    assert sorted(tasks.ran) == list(range(60))


class Batches:
    """Notes how many writes each batch has that a backend is given, and how many were refused.

    `error`: raised by each batch.
    """

    def __init__(
        self, backend: Backend, patch: pytest.MonkeyPatch, error: Exception | None = None
    ) -> None:
        self.sizes: list[int] = []
        self.refused = 0
        self._error = error
        self._write = backend.write
        patch.setattr(backend, "write", self.write)

    async def write(self, log: str, *writes: Any) -> int:
        if len(writes) == 1:
            return await self._write(log, *writes)
        self.sizes.append(len(writes))
        if self._error is not None:
            raise self._error
        try:
            return await self._write(log, *writes)
        except WriteRefused:
            self.refused += 1
            raise


async def test_each_retry_of_many_is_in_one_batch_with_what_voids_its_earlier_run(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = Tasks()
    queue = queue_of(backend, tasks)
    await failed(queue, 300)
    found = await find(queue, "failed")
    batches = Batches(backend, monkeypatch)
    assert len(await queue._sweep.retry(found)) == 300
    assert sorted(batches.sizes) == [100, 500]


async def test_the_records_of_a_batch_have_a_bound(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue = queue_of(backend, Tasks())
    await queue.add_bulk([{"task_id": "fail", "args": ["x" * 50_000]} for _ in range(120)])
    await run_jobs(queue)
    found = await find(queue, "failed")
    batches = Batches(backend, monkeypatch)
    assert len(await queue._sweep.retry(found)) == 120
    assert len(batches.sizes) == 1
    assert batches.sizes[0] < 180  # and the other part is small enough for single writes


async def test_a_retry_is_no_batch_where_older_servers_mix_up_expectations(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue = queue_of(backend, Tasks())
    await failed(queue, 60)
    found = await find(queue, "failed")
    batches = Batches(backend, monkeypatch)
    monkeypatch.setattr(type(backend), "reads_may_lag", property(lambda _: True))
    assert len(await queue._sweep.retry(found)) == 60
    assert batches.sizes == []


async def test_one_that_is_refused_takes_no_other_with_it(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = Tasks()
    queue = queue_of(backend, tasks)
    await failed(queue, 100)
    found = await find(queue, "failed")
    retried, removed, ended, *left = [each.job.job_id for each in found]
    tasks.broken, tasks.ran = False, []
    assert await queue.remove_job(removed)
    assert await queue.retry_job(ended)
    await run_jobs(queue)
    assert await queue.retry_job(retried)
    batches = Batches(backend, monkeypatch)
    assert await queue._sweep.retry(found) == {*left}
    assert batches.refused == 1
    await run_jobs(queue)
    await only(queue, completed=99)
    assert len(tasks.ran) == 99


@pytest.mark.parametrize(
    "error", [WriteRefused("log", "test"), PayloadTooLarge("the body", 2, 1)], ids=str
)
async def test_a_batch_that_cannot_be_stored_is_written_one_by_one(
    error: Exception, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = Tasks()
    queue = queue_of(backend, tasks)
    await failed_and_mended(queue, tasks, 60)
    found = await find(queue, "failed")
    with monkeypatch.context() as patch:
        Batches(backend, patch, error)
        assert len(await queue._sweep.retry(found)) == 60
    await run_jobs(queue)
    await only(queue, completed=60)
    assert sorted(tasks.ran) == list(range(60))


async def test_after_an_error_no_other_part_is_begun_and_those_under_way_are_finished(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue = queue_of(backend, Tasks())
    await queue.add_bulk([{"task_id": "note", "delay": 3600}] * 2000)
    found = await find(queue, "delayed")
    write_each, third, calls = backend.write_each, anyio.Event(), 0

    async def die(log: str, writes: Sequence[Any]) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            third.set()
            raise Unconfirmed("the write", 30.0)
        with anyio.fail_after(10):
            await third.wait()
        return await write_each(log, writes)

    monkeypatch.setattr(backend, "write_each", die)
    with pytest.raises(Unconfirmed):
        await queue._sweep.cancel(found)
    assert calls == 3
    await only(queue, cancelled=500, delayed=1500)


async def test_jobs_whose_arguments_were_not_kept_are_not_retried(backend: Backend) -> None:
    tasks = Tasks()
    queue = queue_of(backend, tasks)
    await failed(queue, 1)
    (found,) = await find(queue, "failed")
    body = found.record.body.replace(b'"args"', b'"truncated":true,"args"')
    cut = replace(found, record=replace(found.record, body=body))
    assert await queue._sweep.retry([cut]) == set()
    await only(queue, failed=1)
