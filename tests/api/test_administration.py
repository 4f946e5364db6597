"""Cleaning up and looking through a queue.

Clean, remove, drain, obliterate, the getters, retention; on both backends.
"""

from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import anyio
import pytest

from asyncmq_nats.backends.base import Backend, Record, Write
from asyncmq_nats.context import current_job
from asyncmq_nats.queues import Queue, list_queues
from asyncmq_nats.settings import Settings
from asyncmq_nats.states import Place
from asyncmq_nats.wire.codec import dump_json
from tests.receiver import until
from tests.running import (
    PATIENCE,
    counted,
    has,
    make_queue,
    only,
    outcome,
    run_jobs,
    running,
    wait_until_done,
)

EMPTY = dict.fromkeys(
    (
        "waiting",
        "active",
        "delayed",
        "waiting-children",
        "completed",
        "failed",
        "expired",
        "cancelled",
    ),
    0,
)


async def echo(value: Any = None) -> Any:
    return value


async def fail() -> None:
    raise ValueError("no")


async def read_parents() -> dict[str, Any]:
    return await current_job().parent_results()


def queue_of(backend: Backend, name: str = "work", **tasks: Any) -> Queue:
    return make_queue(backend, name, echo=echo, fail=fail, read_parents=read_parents, **tasks)


class Hold:
    """A task that runs until it is let go."""

    def __init__(self) -> None:
        self.started, self.opened = anyio.Event(), anyio.Event()

    async def run(self) -> str:
        self.started.set()
        await self.opened.wait()
        return "done"


async def one_in_each_state(queue: Queue) -> dict[str, str]:
    """Fill a queue that has no worker: a job in each state but `active`; return their ids."""
    ids = {
        "completed": await queue.add("echo"),
        "failed": await queue.add("fail"),
        "expired": await queue.add("echo", ttl=0.000001),
    }
    await run_jobs(queue)
    ids["waiting"] = await queue.add("echo")
    ids["delayed"] = await queue.add("echo", delay=3600)
    ids["waiting-children"] = await queue.add("echo", depends_on=[ids["delayed"]])
    ids["cancelled"] = await queue.add("echo")
    assert await queue.cancel_job(ids["cancelled"])
    await counted(queue)
    return ids


# -- clean


@pytest.mark.parametrize("state", [state for state in EMPTY if state != "active"])
async def test_clean_removes_the_jobs_in_a_state_and_no_others(
    backend: Backend, state: str
) -> None:
    queue = queue_of(backend)
    ids = await one_in_each_state(queue)
    await only(queue, **dict.fromkeys(EMPTY, 1) | {"active": 0})
    await queue.clean(state)
    await only(queue, **dict.fromkeys(EMPTY, 1) | {"active": 0, state: 0})
    assert [name for name, job_id in ids.items() if await queue.get_job(job_id) is None] == [state]


async def test_clean_of_waiting_jobs_removes_those_with_an_id_of_their_own(
    backend: Backend,
) -> None:
    queue = queue_of(backend)
    await queue.add_bulk([{"task_id": "echo", "job_id": f"job-{number}"} for number in range(5)])
    await queue.add("echo")
    await counted(queue)
    await queue.clean("waiting")
    await only(queue)


async def test_clean_spares_what_came_to_the_state_later(backend: Backend) -> None:
    queue = queue_of(backend)
    first = await queue.add("echo")
    await run_jobs(queue)
    between = await mark_time(queue)
    second = await queue.add("echo")
    await run_jobs(queue)
    await queue.clean("completed", older_than=between)
    assert [job["id"] for job in await queue.get_completed()] == [second]
    assert await queue.get_job(first) is None
    await queue.clean("completed", older_than=0)
    await has(queue, 1, "completed")
    await queue.clean("completed", older_than=backend.now() + 60)
    await only(queue)


async def mark_time(queue: Queue) -> float:
    """Return a time after all that has happened and before all that will."""
    await anyio.sleep(0.05)
    now = queue.backend.now()
    await anyio.sleep(0.05)
    return now


async def test_the_age_of_an_outcome_is_since_its_end_and_not_since_the_job_was_added(
    backend: Backend,
) -> None:
    queue = queue_of(backend)
    job_id = await queue.enqueue({"task_id": "echo", "created_at": backend.now() - 3600})
    await run_jobs(queue)
    await queue.clean("completed", older_than=backend.now() - 60)
    assert await queue.clean_jobs(60) == []
    assert await queue.get_job_state(job_id) == "completed"
    assert await queue.clean_jobs(0) == [job_id]


async def test_clean_spares_jobs_that_run(backend: Backend) -> None:
    hold = Hold()
    queue = queue_of(backend, hold=hold.run)
    async with running(queue):
        job_id = await queue.add("hold")
        with anyio.fail_after(PATIENCE):
            await hold.started.wait()
        await queue.clean("waiting")
        await queue.clean("active")
        assert await queue.clean_jobs(0, state="active") == []
        assert await queue.get_job_state(job_id) == "active"
        hold.opened.set()
        assert await queue.wait_for(job_id, timeout=PATIENCE) == "done"


async def test_clean_of_an_unknown_state_is_an_error(backend: Backend) -> None:
    with pytest.raises(ValueError, match="nonsense"):
        await queue_of(backend).clean("nonsense")
    with pytest.raises(ValueError, match="nonsense"):
        await queue_of(backend).clean_jobs(0, state="nonsense")


@pytest.mark.parametrize("state", ["completed", "failed", "delayed", "waiting", "waiting-children"])
async def test_clean_jobs_returns_the_oldest_up_to_the_limit(backend: Backend, state: str) -> None:
    queue = queue_of(backend)
    parent = await queue.add("echo", delay=3600)
    extras: dict[str, dict[str, Any]] = {
        "delayed": {"delay": 7200},
        "waiting-children": {"depends_on": [parent]},
    }
    ids = [
        await queue.add("fail" if state == "failed" else "echo", **extras.get(state, {}))
        for _ in range(5)
    ]
    if state in ("completed", "failed"):
        queue.concurrency = 1
        async with running(queue):
            for job_id in ids:
                await outcome(queue, job_id)
    if state == "delayed":
        ids.insert(0, parent)
    await counted(queue)
    assert await queue.clean_jobs(60, state=state) == []
    assert await queue.clean_jobs(0, 2, state) == ids[:2]
    assert await queue.clean_jobs(0, 2, state) == ids[2:4]
    assert await queue.clean_jobs(0, state=state) == ids[4:]
    await has(queue, 0, state)


async def test_clean_jobs_spares_young_ones(backend: Backend) -> None:
    queue = queue_of(backend)
    old = await queue.add("echo")
    await run_jobs(queue)
    between = await mark_time(queue)
    await queue.add("echo")
    await run_jobs(queue)
    assert await queue.clean_jobs(backend.now() - between) == [old]


async def test_clean_jobs_reads_page_after_page(backend: Backend) -> None:
    queue = queue_of(backend)
    ids = await queue.add_bulk([{"task_id": "echo", "delay": 3600}] * 2500)
    assert await queue.clean_jobs(0, 1200, "delayed") == ids[:1200]
    assert await queue.clean_jobs(0, 0, "delayed") == ids[1200:]


@pytest.mark.parametrize("limit", [3, 2100])
async def test_what_a_clean_leaves_is_counted_and_runs(backend: Backend, limit: int) -> None:
    """A few are removed one by one, many by a purge."""
    queue = queue_of(backend)
    ids = await queue.add_bulk([{"task_id": "echo"}] * 2400)
    urgent = await queue.add("echo", priority=1)
    await counted(queue)
    assert await queue.clean_jobs(0, limit, "waiting") == [urgent, *ids][:limit]
    await only(queue, waiting=2401 - limit)
    await run_jobs(queue)
    await only(queue, completed=2401 - limit)
    left = await queue.clean_jobs(0, limit, "completed")
    assert len(left) == min(limit, 2401 - limit)
    await only(queue, completed=max(0, 2401 - 2 * limit))


@pytest.mark.parametrize(
    ("limit", "clustered", "purges"), [(0, False, 1), (0, True, 0), (1, False, 0)]
)
async def test_many_are_purged_where_reads_are_exact(
    backend: Backend, monkeypatch: pytest.MonkeyPatch, limit: int, clustered: bool, purges: int
) -> None:
    """A lagging replica may leave out jobs that a purge removes. Of a few, a purge costs more."""
    queue = queue_of(backend)
    ids = await queue.add_bulk([{"task_id": "echo"}] * 100)
    await counted(queue)
    monkeypatch.setattr(type(backend), "reads_may_lag", property(lambda _: clustered))
    purged, purge = list[str](), backend.purge

    async def note(log: str, filter: str, **options: Any) -> int:
        purged.append(filter)
        return await purge(log, filter, **options)

    monkeypatch.setattr(backend, "purge", note)
    assert await queue.clean_jobs(0, limit, "waiting") == ids[: limit or 100]
    assert purged == purges * [queue._subjects.tier(5)]
    await only(queue, waiting=100 - (limit or 100))


async def test_what_comes_after_a_young_record_stays(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clocks may be put back: a purge of an old record would take the young ones before it."""
    queue = queue_of(backend)
    ids = [await queue.add("echo") for _ in range(4)]
    await run_jobs(queue)
    await only(queue, completed=4)
    lists, now = queue._cleanup._lists, backend.now()
    read = lists.read_records

    async def read_with_times(*args: Any, **options: Any) -> list[Record]:
        times = (now - 90, now - 80, now, now - 70)
        records = await read(*args, **options)
        return [replace(record, time=time) for record, time in zip(records, times, strict=False)]

    monkeypatch.setattr(lists, "read_records", read_with_times)
    assert set(await queue.clean_jobs(60)) < set(ids)
    await only(queue, completed=2)


async def test_a_job_that_no_worker_has_fetched_yet_goes_with_a_drain(backend: Backend) -> None:
    """A worker asks for jobs: what it has fetched stays, the rest goes."""
    hold = Hold()
    queue = queue_of(backend, hold=hold.run)
    queue.concurrency = 1
    async with running(queue):
        active = await queue.add("hold")
        with anyio.fail_after(PATIENCE):
            await hold.started.wait()
        ids = await queue.add_bulk([{"task_id": "echo"}] * 1500)
        await counted(queue)
        removed = await queue.drain()
        assert set(removed) <= set(ids)
        assert len(removed) > 900  # a worker has 512 in hand at most
        hold.opened.set()
        left = {active, *ids} - set(removed)
        for job_id in left:
            await queue.wait_for(job_id, timeout=PATIENCE)
    await only(queue, completed=len(left))


async def test_cleaning_parents_leaves_their_results_to_a_child_that_waits(
    backend: Backend,
) -> None:
    hold = Hold()
    queue = queue_of(backend, hold=hold.run)
    async with running(queue):
        first = await queue.add("echo", ["kept"])
        last = await queue.add("hold")
        before = await queue.add("read_parents", depends_on=[first, last])
        await queue.wait_for(first, timeout=PATIENCE)
        after = await queue.add("read_parents", depends_on=[first, last])
        await queue.clean("completed")
        assert await queue.get_job(first) is None
        hold.opened.set()
        for child in (before, after):
            assert await queue.wait_for(child, timeout=PATIENCE) == {first: "kept", last: "done"}


# -- remove


async def test_remove_job_removes_a_job_in_any_state(backend: Backend) -> None:
    queue = queue_of(backend)
    for job_id in (await one_in_each_state(queue)).values():
        assert await queue.remove_job(job_id)
        assert not await queue.remove_job(job_id)
        assert await queue.get_job(job_id) is None
    await only(queue)


async def test_remove_job_spares_one_that_runs_and_knows_no_unknown_one(backend: Backend) -> None:
    hold = Hold()
    queue = queue_of(backend, hold=hold.run)
    assert not await queue.remove_job("nobody")
    async with running(queue):
        job_id = await queue.add("hold")
        with anyio.fail_after(PATIENCE):
            await hold.started.wait()
        assert not await queue.remove_job(job_id)
        hold.opened.set()
        assert await queue.wait_for(job_id, timeout=PATIENCE) == "done"


async def test_a_job_that_was_handed_back_is_active_and_can_be_cancelled(backend: Backend) -> None:
    backend.settings = Settings(shutdown_timeout=0.0)
    hold = Hold()
    queue = queue_of(backend, hold=hold.run)
    job_id = await queue.add("hold")
    async with running(queue):
        with anyio.fail_after(PATIENCE):
            await hold.started.wait()
    assert await queue.get_job_state(job_id) == "active"
    await only(queue, active=1)
    assert not await queue.remove_job(job_id)
    assert await queue.drain() == []
    with pytest.raises(RuntimeError, match="1 active"):
        await queue.obliterate()
    assert await queue.cancel_job(job_id)
    await only(queue, cancelled=1)


async def test_a_job_that_leaves_no_room_for_its_outcome_can_be_cancelled_and_not_retried(
    backend: Backend, caplog: pytest.LogCaptureFixture
) -> None:
    """Of another program: what is added by this library leaves room."""
    queue = queue_of(backend)
    await queue._assets.declare_all()
    body = dump_json({"id": "large", "task": "echo", "args": ["x" * (backend.max_body - 60)]})
    ready = queue._subjects.ready(5, "large")
    await backend.write(queue._subjects.ready_log, Write(ready, body))
    assert await queue.cancel_job("large")
    job = await queue.get_job("large")
    assert job is not None
    assert (job["status"], job["task"], job["args"]) == ("cancelled", "echo", [])
    assert not await queue.retry_job("large")
    assert "its arguments were not kept" in caplog.text
    assert await queue.get_job_state("large") == "cancelled"


@pytest.mark.parametrize("body", [b"junk", b"[]", b'{"v":1,"id":"bad"}'])
async def test_a_released_record_that_is_no_job_is_removed_as_any_other(
    backend: Backend, body: bytes
) -> None:
    """While no worker runs, whose promoter would make it ready."""
    queue = queue_of(backend)
    await queue._assets.declare_all()
    released = queue._subjects.later("bad", Place.RELEASED)
    await backend.write(queue._subjects.bucket_log, Write(released, body))
    assert not await queue.remove_delayed("bad")
    assert not await queue.retry_job("bad")
    await counted(queue)
    assert await queue.drain() == ["bad"]


async def test_a_removed_job_may_be_added_again(backend: Backend) -> None:
    queue = queue_of(backend)
    await queue.add("fail", job_id="mine")
    child = await queue.add("echo", depends_on=["mine"], on_parent_failure="fail")
    await run_jobs(queue)
    assert await queue.get_job_state(child) == "failed"
    await queue.clean("failed")
    assert await queue.add("echo", ["again"], job_id="mine") == "mine"
    await run_jobs(queue)
    assert await queue.get_job_result("mine") == "again"


# -- drain and obliterate


@pytest.mark.parametrize("include_delayed", [False, True])
async def test_drain_removes_what_waits(backend: Backend, include_delayed: bool) -> None:
    hold = Hold()
    queue = queue_of(backend, hold=hold.run)
    queue.concurrency = 1
    async with running(queue):
        active = await queue.add("hold", priority=1)
        with anyio.fail_after(PATIENCE):
            await hold.started.wait()
        await queue.pause()
        waiting = {await queue.add("echo", priority=priority) for priority in (1, 5, 9)}
        delayed = await queue.add("echo", delay=3600)
        child = await queue.add("echo", depends_on=[delayed])
        await counted(queue)
        removed = await queue.drain(include_delayed)
        assert set(removed) == (waiting | {delayed} if include_delayed else waiting)
        assert len(removed) == len(set(removed))
        left = {"delayed": 0 if include_delayed else 1, "waiting-children": 1}
        await only(queue, active=1, **left)
        assert await queue.get_job_state(child) == "waiting-children"
        hold.opened.set()
        assert await queue.wait_for(active, timeout=PATIENCE) == "done"


async def test_drain_leaves_delayed_jobs_that_are_about_to_run(backend: Backend) -> None:
    """A job is released a little before its time."""
    queue = queue_of(backend)
    due = backend.now() + 0.35
    delayed, waiting = await queue.add("echo", delay=0.35), await queue.add("echo", job_id="mine")
    await counted(queue)
    removed = await queue.drain()
    if backend.now() >= due:
        return  # this machine was too slow: by now the job waits as well
    assert removed == [waiting]
    async with running(queue):
        await queue.wait_for(delayed, timeout=PATIENCE)


async def test_drain_removes_jobs_with_an_id_of_their_own(backend: Backend) -> None:
    queue = queue_of(backend)
    ids = await queue.add_bulk(
        [{"task_id": "echo", "job_id": f"job-{number}"} for number in range(1500)]
    )
    await counted(queue)
    assert sorted(await queue.drain()) == sorted(ids)
    await only(queue)


async def test_obliterate_removes_everything(backend: Backend) -> None:
    queue = queue_of(backend)
    ids = await one_in_each_state(queue)
    await queue.upsert_repeatable("echo", every=3600)
    await queue.add("echo", job_id="window", deduplication={"id": "key"})
    await counted(queue)
    removed = await queue.obliterate()
    assert sorted(removed) == sorted([*ids.values(), "window"])
    await only(queue)
    assert await queue.list_repeatables() == []
    assert await queue.get_deduplication_job_id("key") is None
    assert await queue.obliterate() == []


async def test_an_obliterated_queue_can_be_used_again(backend: Backend) -> None:
    queue = queue_of(backend)
    await queue.add("echo", priority=3, job_id="mine")
    async with running(queue):
        await wait_until_done(queue)
        await queue.obliterate()
        await queue.add("echo", ["again"], priority=3, job_id="mine")
        assert await queue.wait_for("mine", timeout=PATIENCE) == "again"


async def test_an_obliterated_queue_is_not_paused(backend: Backend) -> None:
    queue = queue_of(backend)
    async with running(queue):
        await queue.pause()
        await queue.add("echo")
        await queue.obliterate()
        assert await queue.wait_for(await queue.add("echo", ["on"]), timeout=PATIENCE) == "on"


async def test_obliterate_spares_a_queue_with_jobs_that_run_unless_forced(backend: Backend) -> None:
    hold = Hold()
    queue = queue_of(backend, hold=hold.run)
    async with running(queue):
        job_id = await queue.add("hold")
        with anyio.fail_after(PATIENCE):
            await hold.started.wait()
        with pytest.raises(RuntimeError, match="1 active"):
            await queue.obliterate()
        assert await queue.get_job_state(job_id) == "active"
        assert await queue.obliterate(force=True) == [job_id]
        await only(queue)
        hold.opened.set()
        assert await queue.wait_for(await queue.add("echo", ["on"]), timeout=PATIENCE) == "on"


@pytest.mark.parametrize("options", [{"retries": 1_000}, {"repeat_every": 0.05}])
async def test_a_forced_obliterate_ends_what_runs(
    backend: Backend, options: dict[str, Any]
) -> None:
    starts: list[str] = []
    third, ended = anyio.Event(), anyio.Event()

    async def last() -> None:
        starts.append(current_job().id)
        if len(starts) < 3:
            if "retries" in options:
                raise ValueError("again")
            return
        third.set()
        try:
            await anyio.sleep(PATIENCE)
        finally:
            ended.set()

    queue = queue_of(backend, last=last)
    async with running(queue):
        await queue.add("last", backoff=0, **options)
        with anyio.fail_after(PATIENCE):
            await third.wait()
        removed = await queue.obliterate(force=True)
        assert starts[-1] in removed
        with anyio.fail_after(PATIENCE):
            await ended.wait()
        assert await queue.wait_for(await queue.add("echo", ["on"]), timeout=PATIENCE) == "on"
        await anyio.sleep(0.3)
        assert len(starts) == 3
        await has(queue, 1, "completed")


# -- lists


async def test_each_getter_gets_its_state(backend: Backend) -> None:
    hold = Hold()
    queue = queue_of(backend, hold=hold.run)
    ids = await one_in_each_state(queue)
    getters: dict[str, Callable[[], Awaitable[list[dict[str, Any]]]]] = {
        "waiting": queue.get_waiting,
        "completed": queue.get_completed,
        "failed": queue.get_failed,
        "delayed": queue.get_delayed,
        "waiting-children": queue.get_waiting_children,
    }
    for state, getter in getters.items():
        assert [(job["id"], job["status"]) for job in await getter()] == [(ids[state], state)]
    assert (
        await queue.get_active() == await queue.get_paused() == await queue.get_prioritized() == []
    )
    await queue.clean("waiting")
    async with running(queue):
        job_id = await queue.add("hold")
        with anyio.fail_after(PATIENCE):
            await hold.started.wait()
        assert [job["id"] for job in await queue.get_active()] == [job_id]
        hold.opened.set()
        await queue.wait_for(job_id, timeout=PATIENCE)


@pytest.mark.parametrize("state", ["waiting", "delayed", "completed"])
async def test_getters_page_in_both_orders(backend: Backend, state: str) -> None:
    queue = queue_of(backend)
    queue.concurrency = 1
    ids = [await queue.add("echo", delay=3600 if state == "delayed" else None) for _ in range(12)]
    if state == "completed":
        await run_jobs(queue)
    await counted(queue)
    getter = {
        "waiting": queue.get_waiting,
        "delayed": queue.get_delayed,
        "completed": queue.get_completed,
    }[state]
    newest = ids[::-1]
    for start, end in [(0, -1), (0, 0), (0, 4), (5, 9), (10, 50), (12, 20), (3, 2)]:
        stop = len(ids) if end < 0 else end + 1
        assert [job["id"] for job in await getter(start=start, end=end)] == newest[start:stop]
        assert [job["id"] for job in await getter(start=start, end=end, asc=True)] == ids[
            start:stop
        ]


async def test_list_queues_names_the_queues_that_exist(backend: Backend) -> None:
    assert await list_queues(backend) == []
    for name in ("email", "b-2", "a_scheduler", "workers"):
        await queue_of(backend, name).add("echo")
    await run_jobs(queue_of(backend, "email"))
    assert sorted(await list_queues(backend)) == ["a_scheduler", "b-2", "email", "workers"]


async def test_acting_on_one_job_reads_no_list(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue = queue_of(backend)
    await queue.add_bulk([{"task_id": "echo", "delay": 3600}] * 1000)
    delayed, removed, failed = [await queue.add("echo", delay=3600) for _ in range(3)]
    pages: list[str] = []
    page = backend.page

    async def counted(*args: Any, **kwargs: Any) -> Any:
        if kwargs["limit"] > 100 and "awaited" not in args[1]:
            pages.append(args[1])
        return await page(*args, **kwargs)

    monkeypatch.setattr(backend, "page", counted)
    assert await queue.remove_delayed(delayed)
    assert await queue.remove_job(removed)
    assert await queue.retry_job(failed)
    assert await queue.cancel_job(failed)
    assert pages == []
    await queue.clean("cancelled")
    await queue.clean("delayed", older_than=0)
    await queue.clean("delayed")
    await only(queue)


# -- retention


class TestTimes:
    @pytest.fixture
    def settings(self) -> Settings:
        return Settings(stalled_after=1.0, publish_timeout=10, completed_ttl=1, failed_ttl=2)

    async def test_outcomes_go_when_their_time_is_over(self, backend: Backend) -> None:
        queue = queue_of(backend)
        await queue.add("echo")
        await queue.add("fail")
        await queue.add("echo", ttl=0.000001)
        await run_jobs(queue)
        stats = await until(queue.queue_stats, lambda stats: stats["completed"] == 0)
        assert stats == EMPTY | {"failed": 1, "expired": 1}
        await until(queue.queue_stats, lambda stats: stats == EMPTY)


class TestNumbers:
    @pytest.fixture
    def settings(self) -> Settings:
        return Settings(
            stalled_after=1.0,
            publish_timeout=10,
            heartbeat_interval=0.5,
            completed_keep=10,
            failed_keep=3,
        )

    async def test_only_the_last_outcomes_are_kept(self, backend: Backend) -> None:
        queue = queue_of(backend)
        queue.concurrency = 1
        ids = [await queue.add("echo") for _ in range(25)]
        failed = [await queue.add("fail") for _ in range(7)]
        async with running(queue):
            stats = await until(
                queue.queue_stats, lambda stats: (stats["completed"], stats["failed"]) == (10, 3)
            )
        assert stats == EMPTY | {"completed": 10, "failed": 3}
        assert [job["id"] for job in await queue.get_completed(asc=True)] == ids[15:]
        assert [job["id"] for job in await queue.get_failed(asc=True)] == failed[4:]


class TestForEver:
    @pytest.fixture
    def settings(self) -> Settings:
        return Settings(stalled_after=1.0, publish_timeout=10, completed_ttl=None, failed_ttl=None)

    async def test_outcomes_without_a_time_to_live_are_kept(self, backend: Backend) -> None:
        queue = queue_of(backend)
        await queue.add("echo")
        await queue.add("fail")
        await run_jobs(queue)
        await only(queue, completed=1, failed=1)
