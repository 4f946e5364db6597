"""Jobs that repeat: their definitions, and exactly one job for each tick, on both backends."""

import itertools
import math
from collections.abc import Callable
from contextlib import AsyncExitStack
from functools import partial
from typing import Any

import anyio
import pytest

from asyncmq_nats.backends.base import Backend, Record, Write
from asyncmq_nats.exceptions import InvalidArgument, NotSerializable
from asyncmq_nats.jobs import Backoff
from asyncmq_nats.queues import Queue
from asyncmq_nats.runtime.control import list_workers
from asyncmq_nats.settings import Settings
from asyncmq_nats.store.records import delayed_write
from asyncmq_nats.store.secret import QueueSecret
from asyncmq_nats.transitions.definition import planned_time
from asyncmq_nats.transitions.repeat import repeatable_id
from asyncmq_nats.transitions.tick import Ticker
from asyncmq_nats.wire.keys import QueueSubjects
from asyncmq_nats.workers import Worker
from tests.passing import clocks, pass_time
from tests.receiver import holds, until
from tests.running import PATIENCE, counted, make_queue, outcome, race, running

VIRTUAL_TIME = True

BUCKET = "KV_amq_work_scheduler"
KEY = "$KV.amq_work_scheduler."
EVERY = 0.2


@pytest.fixture
def settings() -> Settings:
    return Settings(stalled_after=600, publish_timeout=10, shutdown_timeout=0.1)


class Ticks:
    """A task that notes the ticks for which it runs: the planned time, and when it started."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self.seen: list[tuple[str, float]] = []
        self._changed = anyio.Event()

    async def tick(self, label: str = "") -> None:
        self.seen.append((label, self._backend.now()))
        self._changed.set()
        self._changed = anyio.Event()

    async def wait_for(self, count: int, label: str = "") -> None:
        """Wait until `count` ticks have run."""
        with anyio.fail_after(PATIENCE):
            while sum(seen == label for seen, _ in self.seen) < count:
                if clocks:
                    await pass_time(0.02)
                else:
                    await self._changed.wait()


@pytest.fixture
def ticks(backend: Backend) -> Ticks:
    return Ticks(backend)


@pytest.fixture
def queue(backend: Backend, ticks: Ticks) -> Queue:
    return make_queue(backend, tick=ticks.tick)


async def make_due(queue: Queue, at: float) -> None:
    """Have the tick of `report` be due that was planned for then."""
    await queue.backend.write(BUCKET, Write(f"{KEY}fire.report", f'{{"at": {at}}}'.encode()))


async def planned_of(queue: Queue) -> list[int]:
    """Return the planned times of the jobs that were made, in milliseconds and in order.

    The ids have them.
    """
    return sorted(int(job["id"].rpartition("-")[2]) for job in await queue.get_jobs())


def assert_one_series(planned: list[int], every: float) -> None:
    """See that each tick made one job, that none was left out, and that the rhythm was kept.

    On a server, time is real: ticks for which the machine was too busy are one run, as documented.
    """
    steps = [(later - earlier) / (every * 1000) for earlier, later in itertools.pairwise(planned)]
    whole = [1 if clocks else max(1, round(step)) for step in steps]
    assert steps == [pytest.approx(step, abs=0.02) for step in whole]
    assert planned[-1] - planned[0] == pytest.approx(every * 1000 * sum(whole), abs=2)


async def after_its_last_tick(queue: Queue) -> None:
    """Wait for the job of a tick that is carried out just now: see docs/delivery.md."""
    await outcome(queue, await queue.add("tick", ["then"], delay=EVERY))
    await counted(queue)


# -- definitions


async def test_an_upsert_returns_the_next_run_and_is_listed(queue: Queue, backend: Backend) -> None:
    before = backend.now()
    next_run = await queue.upsert_repeatable(
        "tick", every="5m", args=["x"], retries=2, priority=1, backoff=Backoff("fixed"), timeout=3
    )
    assert before + 300 <= next_run <= backend.now() + 300
    [info] = await queue.list_repeatables()
    assert info.next_run == pytest.approx(next_run)
    assert not info.paused
    definition = info.job_def
    assert definition["id"]
    assert (
        definition["task_id"],
        definition["args"],
        definition["kwargs"],
        definition["every"],
    ) == ("tick", ["x"], {}, 300.0)
    assert (definition["retries"], definition["priority"], definition["timeout"]) == (2, 1, 3)
    assert "cron" not in definition


async def test_a_cron_series_runs_by_the_clock_of_its_zone(queue: Queue, backend: Backend) -> None:
    here, there = [
        await queue.upsert_repeatable("tick", cron="0 12 * * *", timezone=zone)
        for zone in (None, "Asia/Kolkata")
    ]
    assert (here - there) % 86_400 == 5.5 * 3600
    assert all(backend.now() < at <= backend.now() + 86_400 for at in (here, there))
    assert sorted(info.job_def["timezone"] for info in await queue.list_repeatables()) == [
        "Asia/Kolkata",
        "UTC",
    ]


async def test_the_same_definition_again_changes_nothing(queue: Queue, twin: Backend) -> None:
    first = await queue.upsert_repeatable("tick", every=3600, kwargs={"label": "a"})
    assert await queue.upsert_repeatable(
        "tick", every="1h", kwargs={"label": "a"}
    ) == pytest.approx(first)
    assert await Queue("work", twin).upsert_repeatable(
        "tick", every=3600.0, kwargs={"label": "a"}
    ) == pytest.approx(first)
    assert len(await queue.list_repeatables()) == 1


@pytest.mark.parametrize(
    "change", [{"args": ["b"]}, {"every": 7200}, {"retries": 1}, {"priority": 1}, {"ttl": 5}]
)
async def test_a_changed_definition_without_a_name_is_another_one(
    queue: Queue, change: dict[str, Any]
) -> None:
    await queue.upsert_repeatable("tick", every=3600)
    fields: dict[str, Any] = {"task_id": "tick", "every": 3600} | change
    await queue.upsert_repeatable(**fields)
    assert len(await queue.list_repeatables()) == 2


@pytest.mark.parametrize(
    "change",
    [{"args": ["b"]}, {"every": 7200}, {"retries": 1}, {"every": None, "cron": "0 0 1 1 *"}],
)
async def test_a_changed_definition_replaces_the_one_of_its_name(
    queue: Queue, backend: Backend, change: dict[str, Any]
) -> None:
    await queue.upsert_repeatable("tick", every=3600, name="report")
    fields: dict[str, Any] = {"task_id": "tick", "every": 3600, "name": "report"} | change
    next_run = await queue.upsert_repeatable(**fields)
    [info] = await queue.list_repeatables()
    assert info.next_run == pytest.approx(next_run)
    assert info.job_def["name"] == "report"
    assert {key: info.job_def.get(key) for key in change} == change
    assert next_run > backend.now() + 3000


@pytest.mark.parametrize(
    ("fields", "error", "told"),
    [
        ({}, ValueError, "either every="),
        ({"every": "soon"}, ValueError, r"not an interval(.|\n)*\^"),
        ({"cron": "61 * * * *"}, ValueError, r"not a valid minute(.|\n)*\^\^"),
        ({"every": 5, "args": [object()]}, NotSerializable, "argument .* of task"),
        ({"every": 5, "retries": -1}, InvalidArgument, "retries"),
        ({"every": 5, "name": ""}, ValueError, "name must be"),
        ({"every": 5, "name": "x" * 101}, ValueError, "name must be"),
    ],
)
async def test_a_bad_definition_is_refused_at_once(
    queue: Queue, fields: dict[str, Any], error: type[Exception], told: str
) -> None:
    with pytest.raises(error, match=told):
        queue.add_repeatable("tick", **fields)
    with pytest.raises(error, match=told):
        await queue.upsert_repeatable("tick", **fields)
    assert await queue.list_repeatables() == []


async def test_an_interval_given_as_a_text_is_one(queue: Queue, ticks: Ticks) -> None:
    await queue.upsert_repeatable("tick", every="0.2")
    async with running(queue):
        await ticks.wait_for(2)


async def test_a_name_may_be_any_text(queue: Queue, ticks: Ticks) -> None:
    for name in ("nightly report", "a.b.*.>", "100 %", "ü"):
        await queue.upsert_repeatable("tick", every=EVERY, name=name, args=[name])
    assert {info.job_def["name"] for info in await queue.list_repeatables()} == {
        "nightly report",
        "a.b.*.>",
        "100 %",
        "ü",
    }
    async with running(queue):
        for name in ("nightly report", "a.b.*.>", "100 %", "ü"):
            await ticks.wait_for(2, name)
    assert await queue.remove_repeatable("a.b.*.>")
    assert len(await queue.list_repeatables()) == 3


async def test_a_queue_without_any_lists_none(queue: Queue) -> None:
    assert await queue.list_repeatables() == []


# -- by dict and by name


GIVEN: list[Callable[[dict[str, Any]], Any]] = [
    lambda listed: listed,
    lambda listed: {key: value for key, value in listed.items() if key not in ("id", "name")},
    lambda _: {"task_id": "tick", "every": 3600, "args": ["a"]},
    lambda _: {
        "task": "tick",
        "every": "1h",
        "args": ["a"],
        "kwargs": {},
        "retries": 0,
        "priority": 5,
    },
    lambda listed: listed["id"],
]


@pytest.mark.parametrize("given", GIVEN)
async def test_one_is_found_by_dict_or_id(
    queue: Queue, backend: Backend, given: Callable[[dict[str, Any]], Any]
) -> None:
    await queue.upsert_repeatable("tick", every=3600, args=["a"])
    await queue.upsert_repeatable("tick", every=3600, args=["b"])
    listed = next(
        info.job_def for info in await queue.list_repeatables() if info.job_def["args"] == ["a"]
    )
    assert await queue.pause_repeatable(given(listed))
    paused = {info.job_def["args"][0]: info for info in await queue.list_repeatables()}
    assert (paused["a"].paused, paused["a"].next_run, paused["b"].paused) == (True, None, False)
    assert await queue.resume_repeatable(given(listed)) == pytest.approx(
        backend.now() + 3600, abs=5
    )
    assert not any(info.paused for info in await queue.list_repeatables())
    assert await queue.remove_repeatable(given(listed))
    assert not await queue.remove_repeatable(given(listed))
    assert [info.job_def["args"] for info in await queue.list_repeatables()] == [["b"]]


async def test_one_is_found_by_its_name(queue: Queue) -> None:
    await queue.upsert_repeatable("tick", every=3600, name="report")
    assert await queue.pause_repeatable("report")
    assert await queue.pause_repeatable({"name": "report"})
    await queue.resume_repeatable("report")
    assert await queue.remove_repeatable({"name": "report"})


async def test_one_that_is_not_there(queue: Queue) -> None:
    await queue._assets.declare()
    for given in ("missing", {"task_id": "tick", "every": 5}):
        assert not await queue.pause_repeatable(given)
        assert not await queue.remove_repeatable(given)
        with pytest.raises(KeyError):
            await queue.resume_repeatable(given)


def test_a_dict_that_describes_none_is_refused() -> None:
    with pytest.raises(ValueError, match="needs a task_id"):
        repeatable_id({"every": 5})


async def test_resuming_one_that_runs_leaves_its_series_alone(queue: Queue) -> None:
    next_run = await queue.upsert_repeatable("tick", every=3600, name="report")
    assert await queue.resume_repeatable("report") == pytest.approx(next_run)


# -- ticks


async def test_local_definitions_are_stored_when_a_worker_runs(queue: Queue, ticks: Ticks) -> None:
    queue.add_repeatable("tick", every=EVERY)
    assert await queue.list_repeatables() == []
    async with running(queue):
        await ticks.wait_for(1)
        assert len(await queue.list_repeatables()) == 1
    assert len(await queue.list_repeatables()) == 1


async def test_the_same_local_definition_in_two_workers_is_one_series(
    backend: Backend, twin: Backend, ticks: Ticks
) -> None:
    queues = [make_queue(handle, tick=ticks.tick) for handle in (backend, twin)]
    for each in queues:
        each.add_repeatable("tick", every=EVERY)
    async with running(queues[0]), running(queues[1]):
        await ticks.wait_for(8)
    assert len(await queues[0].list_repeatables()) == 1
    planned = await planned_of(queues[0])
    assert_one_series(planned, EVERY)
    assert len(ticks.seen) <= len(planned)


async def test_two_schedules_of_one_task_are_two(queue: Queue, ticks: Ticks) -> None:
    for label in "ab":
        queue.add_repeatable("tick", cron="* * * * * *", args=[label])
    async with running(queue):
        await ticks.wait_for(1, "a")
        await ticks.wait_for(1, "b")
    assert len(await queue.list_repeatables()) == 2


@pytest.mark.parametrize("every", [0.1, 0.25, 0.7])
async def test_each_tick_makes_one_job_and_none_drifts(
    queue: Queue, backend: Backend, ticks: Ticks, every: float
) -> None:
    first = await queue.upsert_repeatable("tick", every=every)
    async with running(queue):
        await ticks.wait_for(round(1.5 / every) + 1)
    planned = await planned_of(queue)
    assert_one_series(planned, every)
    assert planned[0] == pytest.approx(first * 1000, abs=1)
    for at, (_, started) in zip(
        planned, sorted(ticks.seen, key=lambda seen: seen[1]), strict=False
    ):
        assert started >= at / 1000 - 0.01
    [info] = await queue.list_repeatables()
    assert info.next_run is not None
    assert (info.next_run - first) / every == pytest.approx(
        round((info.next_run - first) / every), abs=0.01
    )


async def test_each_tick_makes_one_job_however_many_workers_run(
    backend: Backend, twin: Backend, ticks: Ticks
) -> None:
    queues = [make_queue(handle, tick=ticks.tick) for handle in (backend, twin) * 3]
    await queues[0].upsert_repeatable("tick", every=0.1)
    async with AsyncExitStack() as stack:
        for each in queues:
            await stack.enter_async_context(running(each))
        await ticks.wait_for(12)
    assert_one_series(await planned_of(queues[0]), 0.1)


async def test_a_tick_makes_a_job_as_it_was_defined(queue: Queue) -> None:
    await queue.upsert_repeatable(
        "unknown",
        every=EVERY,
        args=[1],
        kwargs={"k": 2},
        retries=1,
        backoff=3600,
        priority=2,
        ttl=60,
        timeout=9,
    )
    async with running(queue):
        await until(queue.list_delayed, lambda found: len(found) > 0)
    job = (await queue.list_delayed())[0].payload
    assert (job["args"], job["kwargs"], job["max_retries"], job["backoff"]) == (
        [1],
        {"k": 2},
        1,
        3600,
    )
    assert (job["priority"], job["ttl"], job["timeout"]) == (2, 60, 9)


async def test_one_is_run_by_hand_as_it_was_defined(
    queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {"args": [1], "kwargs": {"k": 2}, "priority": 2, "ttl": 60}
    given |= {"timeout": 9, "backoff": Backoff("fixed", delay=7)}
    planned = await queue.upsert_repeatable(
        "unknown", every="1h", name="hourly", retries=1, **given
    )
    with monkeypatch.context() as patch:
        patch.setattr(queue.backend, "page", None)  # the others are not read
        first = await queue.run_repeatable("hourly")
    second = await queue.run_repeatable({"name": "hourly"})
    assert first != second
    for job_id in (first, second):
        job = await queue.get_job(job_id)
        assert job is not None
        assert (job["task"], job["max_retries"]) == ("unknown", 1)
        assert {name: job[name] for name in given} == given
    assert [info.next_run for info in await queue.list_repeatables()] == [planned]
    for missing in ("daily", {"task_id": "unknown", "every": "2h"}):
        with pytest.raises(KeyError, match="no repeatable"):
            await queue.run_repeatable(missing)


async def test_workers_that_come_and_go_lose_no_tick(queue: Queue, ticks: Ticks) -> None:
    await queue.upsert_repeatable("tick", every=0.1)
    for count in range(1, 6):
        async with running(queue):
            await ticks.wait_for(3 * count)
    planned = await planned_of(queue)
    assert len(set(planned)) == len(planned) >= 15
    assert all(
        (at - planned[0]) / 100 == pytest.approx(round((at - planned[0]) / 100), abs=0.03)
        for at in planned
    )


async def test_ticks_missed_while_no_worker_ran_are_one(
    queue: Queue, backend: Backend, ticks: Ticks
) -> None:
    await queue.upsert_repeatable("tick", every=0.15, name="report")
    first = backend.now() - 100
    await make_due(queue, first)
    async with running(queue):
        await ticks.wait_for(4)
    planned = await planned_of(queue)
    assert planned[0] == round(first * 1000)
    assert planned[1] - planned[0] >= 100_000
    assert (planned[1] - planned[0]) / 150 == pytest.approx(
        round((planned[1] - planned[0]) / 150), abs=0.02
    )
    assert_one_series(planned[1:], 0.15)


async def test_ticks_that_are_a_little_late_are_all_made_up_for(
    queue: Queue, backend: Backend, ticks: Ticks
) -> None:
    await queue.upsert_repeatable("tick", every=0.5, name="report")
    first = backend.now() - 1.6
    await make_due(queue, first)
    async with running(queue):
        await ticks.wait_for(5)
    planned = await planned_of(queue)
    assert planned[0] == round(first * 1000)
    assert_one_series(planned, 0.5)


async def test_a_paused_one_makes_no_jobs_and_stays_paused(
    queue: Queue, ticks: Ticks, backend: Backend
) -> None:
    queue.add_repeatable("tick", every=EVERY, name="report")
    async with running(queue):
        await ticks.wait_for(2)
        assert await queue.pause_repeatable("report")
        await after_its_last_tick(queue)
        made = len(await queue.get_jobs())
        await queue.upsert_repeatable("tick", every=EVERY, name="report")
        later = await queue.add("tick", ["later"], delay=3 * EVERY)
        await outcome(queue, later)
        assert len(await queue.get_jobs()) == made + 1
    async with running(queue):  # stores its definition again
        [info] = await queue.list_repeatables()
        assert (info.paused, info.next_run) == (True, None)
        seen = sum(not label for label, _ in ticks.seen)
        assert await queue.resume_repeatable("report") > backend.now()
        await ticks.wait_for(seen + 2)


async def test_a_removed_one_makes_no_more_jobs(queue: Queue, ticks: Ticks) -> None:
    await queue.upsert_repeatable("tick", every=EVERY, name="report")
    async with running(queue):
        await ticks.wait_for(1)
        assert await queue.remove_repeatable("report")
        await after_its_last_tick(queue)
        made = len(await queue.get_jobs())
        assert made >= 1
        await outcome(queue, await queue.add("tick", ["later"], delay=3 * EVERY))
        await counted(queue)
        assert len(await queue.get_jobs()) == made + 1
    left = await queue.backend.last(BUCKET, f"{KEY}repeat.>", f"{KEY}tick.>", f"{KEY}fire.>")
    assert [record for record in left if not record.marker] == []


async def test_one_that_was_removed_begins_again(queue: Queue, backend: Backend) -> None:
    await queue.upsert_repeatable("tick", every=3600, name="report")
    await queue.remove_repeatable("report")
    assert await queue.upsert_repeatable("tick", every=60, name="report") == pytest.approx(
        backend.now() + 60, abs=5
    )


async def test_many_are_listed(queue: Queue) -> None:
    await race(
        *[lambda n=n: queue.upsert_repeatable("tick", every=3600, args=[n]) for n in range(60)]
    )
    assert sorted(info.job_def["args"][0] for info in await queue.list_repeatables()) == list(
        range(60)
    )


async def test_racing_upserts_of_one_name_leave_one_series(
    queue: Queue, twin: Backend, ticks: Ticks
) -> None:
    queues = [queue, make_queue(twin, tick=ticks.tick)]
    await race(
        *[
            lambda n=n: queues[n % 2].upsert_repeatable(
                "tick", every=EVERY, name="report", retries=n
            )
            for n in range(8)
        ]
    )
    async with running(queue):
        await ticks.wait_for(4)
    assert_one_series(await planned_of(queue), EVERY)


# -- a change while a tick is due


async def let_tick_be_due(queue: Queue, monkeypatch: pytest.MonkeyPatch, at: float) -> None:
    """Have the tick of `report` become due between the read and the write of the next change."""
    read = queue.backend.last

    async def last(log: str, *filters: str) -> list[Record]:
        records = await read(log, *filters)
        if f"{KEY}repeat.report" in filters:
            monkeypatch.undo()
            await make_due(queue, at)
        return records

    monkeypatch.setattr(queue.backend, "last", last)


async def no_tick_is_left(queue: Queue) -> None:
    """See that a worker which runs now makes no job of a tick."""
    async with running(queue):
        await outcome(queue, await queue.add("tick", delay=0.3))
    await counted(queue)
    assert len(await queue.get_jobs()) == 1


async def test_a_definition_that_changes_takes_its_due_tick_with_it(
    queue: Queue, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    await queue.upsert_repeatable("tick", every=3600, name="report")
    await let_tick_be_due(queue, monkeypatch, backend.now())
    next_run = await queue.upsert_repeatable("tick", every=1800, name="report")
    await no_tick_is_left(queue)
    [info] = await queue.list_repeatables()
    assert info.next_run == pytest.approx(next_run) == pytest.approx(backend.now() + 1800, abs=5)


async def test_one_that_is_paused_takes_its_due_tick_with_it(
    queue: Queue, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    await queue.upsert_repeatable("tick", every=3600, name="report")
    await let_tick_be_due(queue, monkeypatch, backend.now())
    assert await queue.pause_repeatable("report")
    assert await queue.resume_repeatable("report") == pytest.approx(backend.now() + 3600, abs=5)
    await no_tick_is_left(queue)


async def test_one_that_is_removed_takes_its_due_tick_with_it(
    queue: Queue, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    await queue.upsert_repeatable("tick", every=3600, name="report")
    await let_tick_be_due(queue, monkeypatch, backend.now())
    assert await queue.remove_repeatable("report")
    await queue.upsert_repeatable("tick", every=3600, name="report")
    await no_tick_is_left(queue)


async def test_a_change_in_the_middle_of_a_series_leaves_one_series(
    queue: Queue, ticks: Ticks
) -> None:
    await queue.upsert_repeatable("tick", every=0.1, name="report", args=["old"])
    async with running(queue):
        await ticks.wait_for(3, "old")
        await queue.upsert_repeatable("tick", every=EVERY, name="report", args=["new"])
        old = len([job for job in await queue.get_jobs() if job["args"] == ["old"]])
        await ticks.wait_for(5, "new")
    jobs = await queue.get_jobs()
    assert len([job for job in jobs if job["args"] == ["old"]]) == old
    assert_one_series(
        sorted(int(job["id"].rpartition("-")[2]) for job in jobs if job["args"] == ["new"]), EVERY
    )


async def test_a_change_of_the_arguments_keeps_the_series_and_a_pause(queue: Queue) -> None:
    first = await queue.upsert_repeatable("tick", every=3600, name="report", args=["old"])
    again = await queue.upsert_repeatable("tick", every=3600, name="report", args=["new"])
    assert again == pytest.approx(first)
    await queue.pause_repeatable("report")
    await queue.upsert_repeatable("tick", every=3600, name="report", args=["newest"])
    await queue.upsert_repeatable("tick", every=1800, name="report", args=["newest"])
    [info] = await queue.list_repeatables()
    assert (info.paused, info.next_run, info.job_def["args"]) == (True, None, ["newest"])


async def test_ticks_make_no_batch(
    queue: Queue, ticks: Ticks, monkeypatch: pytest.MonkeyPatch
) -> None:
    await queue.upsert_repeatable("tick", every=0.1)
    await queue.upsert_repeatable("tick", every=0.8)
    real, sizes = queue.backend.write, list[int]()

    async def write(log: str, *writes: Write) -> int:
        sizes.append(len(writes))
        return await real(log, *writes)

    monkeypatch.setattr(queue.backend, "write", write)
    async with running(queue):
        await ticks.wait_for(12)
    assert set(sizes) == {1}


# -- options


async def test_a_series_begins_at_its_start(queue: Queue, backend: Backend, ticks: Ticks) -> None:
    start = backend.now() + 0.4
    assert await queue.upsert_repeatable("tick", every=0.2, start=start) == pytest.approx(start)
    async with running(queue):
        await ticks.wait_for(3)
    planned = await planned_of(queue)
    assert planned[0] == round(start * 1000)
    assert_one_series(planned, 0.2)


async def test_a_series_ends_at_its_end(queue: Queue, backend: Backend, ticks: Ticks) -> None:
    start = backend.now() + 0.3
    fields: dict[str, Any] = {"every": 0.2, "start": start, "end": start + 0.41, "name": "report"}
    await queue.upsert_repeatable("tick", **fields)
    async with running(queue):
        await ticks.wait_for(3)
        await outcome(queue, await queue.add("tick", ["later"], delay=0.5))
    assert len(await queue.get_jobs()) == 4
    [info] = await queue.list_repeatables()
    assert (info.next_run, info.paused) == (None, False)
    assert await queue.upsert_repeatable("tick", **fields) == math.inf
    assert await queue.resume_repeatable("report") == math.inf


async def test_a_series_whose_end_is_past_makes_no_job(queue: Queue, backend: Backend) -> None:
    assert await queue.upsert_repeatable("tick", every=60, end=backend.now() + 1) == math.inf
    [info] = await queue.list_repeatables()
    assert info.next_run is None


async def test_a_series_makes_as_many_jobs_as_its_limit(queue: Queue, ticks: Ticks) -> None:
    # Long enough for a pause between two ticks on a busy machine.
    fields: dict[str, Any] = {"every": 0.8, "limit": 3, "name": "report"}
    first = await queue.upsert_repeatable("tick", **fields)
    async with running(queue):
        await ticks.wait_for(1)
        # The job is made before the next tick is planned: a pause in between forgets the job.
        await until(queue.list_repeatables, lambda found: (found[0].next_run or 0) > first)
        await queue.pause_repeatable("report")
        await queue.resume_repeatable("report")  # the count goes on
        await ticks.wait_for(3)
        await queue.upsert_repeatable("tick", **fields)  # as a worker that starts does
        await outcome(queue, await queue.add("tick", ["later"], delay=1.0))
    assert len([seen for seen in ticks.seen if seen[0] == ""]) == 3
    assert await queue.upsert_repeatable("tick", **(fields | {"limit": 4})) < math.inf


async def test_the_last_run_of_a_series_is_listed(queue: Queue, ticks: Ticks) -> None:
    await queue.upsert_repeatable("tick", every=0.1, limit=2, name="a report-7")
    (info,) = await queue.list_repeatables()
    assert (info.runs, info.last_job, info.last_run) == (0, None, None)
    async with running(queue):
        await ticks.wait_for(2)
        (info,) = await until(queue.list_repeatables, lambda found: found[0].runs == 2)
    await counted(queue)
    last = max(await planned_of(queue))
    assert info.last_job == f"a report-7-{last}"
    assert info.last_run == last / 1000
    await queue.upsert_repeatable("tick", every=60, name="a report-7")
    await queue.pause_repeatable("a report-7")
    (paused,) = await queue.list_repeatables()
    assert (paused.runs, paused.last_job, paused.last_run) == (0, info.last_job, info.last_run)


@pytest.mark.parametrize("job_id", ["report", "report-", "report-x", "x-5", f"report-{10**30}"])
def test_the_time_of_a_run_is_in_ids_of_its_form_only(job_id: str) -> None:
    assert planned_time("report", job_id) is None
    assert planned_time("report", "report-1500") == 1.5


async def test_jitter_makes_runs_later_and_none_lost(queue: Queue, ticks: Ticks) -> None:
    await queue.upsert_repeatable("tick", every=0.3, jitter=0.25)
    async with running(queue):
        await ticks.wait_for(5)
    planned = await planned_of(queue)
    assert_one_series(planned, 0.3)
    late = [
        started - at / 1000
        for at, (_, started) in zip(
            planned, sorted(ticks.seen, key=lambda seen: seen[1]), strict=False
        )
    ]
    assert min(late) >= -0.01
    assert len({round(seconds, 3) for seconds in late}) > 1


async def test_no_run_begins_while_the_last_one_is_unfinished(backend: Backend) -> None:
    free, starts = anyio.Event(), list[int]()

    async def slow() -> None:
        starts.append(1)
        if len(starts) == 1:
            await free.wait()

    queue = make_queue(backend, slow=slow, echo=lambda: None)
    await queue.upsert_repeatable("slow", every=0.1, overlap="skip")
    async with running(queue):
        await until(queue.queue_stats, lambda stats: stats["active"] == 1)
        await outcome(queue, await queue.add("echo", delay=0.6))
        assert len(starts) == 1
        await counted(queue)
        assert len(await queue.get_jobs()) == 2
        free.set()
        await holds(lambda: len(starts) >= 3)


async def test_a_last_run_that_is_retried_while_it_is_looked_for_is_unfinished(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue, real = make_queue(backend, tick=lambda: None), backend.last
    subjects, job_id = queue._subjects, await queue.add("tick")

    async def last(log: str, *filters: str) -> list[Record]:
        found = await real(log, *filters)
        if log == subjects.bucket_log:  # read before the retry, and the other log after it
            (ready,) = await real(subjects.ready_log, subjects.ready_any(job_id))
            patch.undo()
            run_at = backend.now() + 3600
            retry = delayed_write(subjects, job_id, ready.body, (run_at, backend.now()))
            await backend.write(log, retry)
            await backend.delete(subjects.ready_log, ready.sequence)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(backend, "last", last)
        ticker = Ticker(queue._store, QueueSecret(queue._store))
        assert await ticker._is_unfinished(job_id)


@pytest.mark.parametrize(("catch_up", "made"), [("none", 0), (None, 1), ("one", 1), ("all", 11)])
async def test_what_an_outage_missed_is_made_up_for_as_wished(
    queue: Queue, backend: Backend, catch_up: str | None, made: int
) -> None:
    await queue.upsert_repeatable("tick", every=3600, name="report", catch_up=catch_up)
    first = backend.now() - 10 * 3600 - 60
    await make_due(queue, first)
    async with running(queue):
        await until(queue.queue_stats, lambda stats: stats["completed"] == made)
        await outcome(queue, await queue.add("tick", ["later"], delay=0.2))
    await counted(queue)
    assert len(await queue.get_jobs()) == made + 1
    [info] = await queue.list_repeatables()
    assert info.next_run == pytest.approx(first + 11 * 3600)


@pytest.mark.parametrize(("catch_up", "made"), [("none", 0), (None, 0), ("one", 1), ("all", 3)])
async def test_what_a_pause_missed_is_made_up_for_as_wished(
    queue: Queue, backend: Backend, catch_up: str | None, made: int
) -> None:
    await queue.upsert_repeatable("tick", every=3600, name="report", catch_up=catch_up)
    await make_due(queue, backend.now() - 2 * 3600 - 60)
    assert await queue.pause_repeatable("report")
    await queue.resume_repeatable("report")
    async with running(queue):
        await until(queue.queue_stats, lambda stats: stats["completed"] == made)
        await outcome(queue, await queue.add("tick", ["later"], delay=0.2))
    await counted(queue)
    assert len(await queue.get_jobs()) == made + 1


@pytest.mark.parametrize(
    "option",
    [
        {"overlap": "never"},
        {"catch_up": "two"},
        {"limit": 0},
        {"limit": 1.5},
        {"limit": True},
        {"jitter": -1},
        {"jitter": 61},
        {"jitter": "1s"},
        {"jitter": math.nan},
    ],
)
async def test_a_bad_option_is_refused(queue: Queue, option: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument, match=next(iter(option))):
        queue.add_repeatable("tick", every=60, **option)


async def test_an_option_makes_another_definition_and_is_listed(queue: Queue) -> None:
    await queue.upsert_repeatable("tick", every=60)
    await queue.upsert_repeatable("tick", every=60, limit=3, overlap="skip", jitter=1)
    plain, limited = sorted(
        (info.job_def for info in await queue.list_repeatables()), key=lambda each: len(each)
    )
    assert "limit" not in plain
    assert (limited["limit"], limited["overlap"], limited["jitter"]) == (3, "skip", 1.0)
    assert await queue.remove_repeatable({k: v for k, v in limited.items() if k != "id"})


async def test_an_interval_below_the_setting_is_refused(backend: Backend) -> None:
    backend.settings = Settings(min_repeat_interval=10)
    queue = make_queue(backend)
    with pytest.raises(ValueError, match="the shortest interval is 10 s"):
        await queue.upsert_repeatable("tick", every=9)
    with pytest.raises(ValueError, match="the shortest interval is 10 s"):
        queue.add_repeatable("tick", every="9s")


# -- what code declares


async def names_of(queue: Queue) -> set[str]:
    return {info.job_def["name"] for info in await queue.list_repeatables()}


def declaring(backend: Backend, *names: str, every: float = 3600) -> Queue:
    """Return a queue whose code declares repeatables of these names."""
    queue = make_queue(backend, tick=lambda: None)
    for name in names:
        queue.add_repeatable("tick", every=every, name=name)
    return queue


async def test_what_code_no_longer_declares_goes(backend: Backend, twin: Backend) -> None:
    await declaring(backend).upsert_repeatable("tick", every=3600, name="by hand")
    async with running(declaring(backend, "kept", "dropped")):
        pass
    await pass_time(0.01)
    assert await names_of(declaring(backend)) == {"kept", "dropped", "by hand"}
    async with running(declaring(twin, "kept")) as worker:
        assert await names_of(worker.queue) == {"kept", "by hand"}


async def test_a_worker_without_any_declaration_takes_back_what_is_left(backend: Backend) -> None:
    async with running(declaring(backend, "dropped")):
        pass
    await pass_time(0.01)
    async with running(declaring(backend)) as worker:
        assert await names_of(worker.queue) == set()


async def test_a_changed_interval_replaces_the_old_series(backend: Backend) -> None:
    for every in (1000.0, 2000.0):
        queue = make_queue(backend, tick=lambda: None)
        queue.add_repeatable("tick", every=every)
        async with running(queue):
            assert [info.job_def["every"] for info in await queue.list_repeatables()] == [every]
        await pass_time(0.01)


async def test_nothing_goes_while_a_worker_declares_it(backend: Backend, twin: Backend) -> None:
    old, new = Worker(declaring(backend, "old", "both")), Worker(declaring(twin, "both"))
    async with anyio.create_task_group() as group:
        await group.start(old.run)
        await pass_time(0.01)
        await group.start(new.run)
        assert new._runner is not None
        await new._runner._declarations.retire()
        assert await names_of(new.queue) == {"old", "both"}
        old.stop()
        workers = partial(list_workers, backend)
        await until(workers, lambda found: len(found) == 1)
        await new._runner._declarations.retire()
        assert await names_of(new.queue) == {"both"}
        new.stop()


async def test_an_earlier_worker_takes_nothing_back(backend: Backend, twin: Backend) -> None:
    async with running(declaring(backend)) as early:
        async with running(declaring(twin, "later")):
            pass
        await early._runner._declarations.retire()  # type: ignore[union-attr]
        assert await names_of(early.queue) == {"later"}


async def test_a_redeploy_keeps_a_pause(backend: Backend) -> None:
    for label in ("old", "new"):
        queue = make_queue(backend, tick=lambda _: None)
        queue.add_repeatable("tick", every=3600, name="report", args=[label])
        async with running(queue):
            if label == "old":
                await queue.pause_repeatable("report")
            [info] = await queue.list_repeatables()
            assert (info.paused, info.job_def["args"]) == (True, [label])


async def test_a_series_whose_tick_was_taken_away_by_the_timer_of_an_earlier_one_goes_on(
    backend: Backend,
) -> None:
    """A foreign writer may change a definition just as its tick becomes due."""
    ran = list[str]()

    async def note(label: str) -> None:
        ran.append(label)

    queue, keys = make_queue(backend, note=note), QueueSubjects(backend.settings.prefix, "work")
    await queue.upsert_repeatable("note", every=1, args=["old"], name="n")
    (old,) = await backend.last(keys.bucket_log, keys.tick("n"))
    await queue.upsert_repeatable("note", every=1, args=["new"], name="n")
    for planned in await backend.last(keys.bucket_log, keys.tick("n"), keys.fire("n")):
        await backend.delete(keys.bucket_log, planned.sequence)
    await backend.write(keys.bucket_log, Write(keys.fire("n"), old.body))
    async with running(queue):
        await holds(lambda: len(ran) >= 2)
    assert {*ran} == {"new"}
