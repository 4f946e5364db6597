"""Time moves only when a test moves it, and all that is due happens, in order."""

import time
from collections import Counter
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from asyncmq_nats import Backoff, FlowProducer, Job, Queue, Settings, current_job
from asyncmq_nats.exceptions import InvalidArgument, JobFailed, VirtualTimeStuck
from asyncmq_nats.runtime.registry import TASK_REGISTRY, TaskRegistry
from asyncmq_nats.testing import VirtualBackend, VirtualClock, worker
from tests.running import PATIENCE, lose_worker, make_queue

NOON = datetime(2026, 1, 5, 12, tzinfo=UTC)


class Notes:
    """When each run began, in seconds since noon, and for which job."""

    def __init__(self, clock: VirtualClock) -> None:
        self._clock = clock
        self.all: list[tuple[float, str]] = []

    def __call__(self, name: str) -> None:
        """Take a note."""
        self.all.append((round((self._clock.now() - NOON).total_seconds(), 3), name))

    async def run(self, name: str) -> None:
        """Take a note: a task. It is async, since the threads of sync tasks run in any order."""
        self(name)


@pytest.fixture
def notes(clock: VirtualClock) -> Notes:
    return Notes(clock)


async def test_a_delayed_job_runs_at_its_time_and_not_before(
    backend: VirtualBackend, clock: VirtualClock, notes: Notes
) -> None:
    queue = make_queue(backend, note=notes.run)
    await queue.add("note", ["a"], delay=3600)
    await clock.advance("59m59s")
    assert notes.all == []
    await clock.advance(1)
    assert notes.all == [(3600, "a")]


async def test_jobs_run_in_the_order_of_their_times(
    backend: VirtualBackend, clock: VirtualClock, notes: Notes
) -> None:
    queue = make_queue(backend, note=notes.run)
    for delay in (300, 20, 7200, 1):
        await queue.add("note", [f"{delay}"], delay=delay)
    await clock.advance("1d")
    assert notes.all == [(1, "1"), (20, "20"), (300, "300"), (7200, "7200")]
    assert clock.now() == NOON + timedelta(days=1)


async def test_retries_back_off_by_the_virtual_clock(
    backend: VirtualBackend, clock: VirtualClock, notes: Notes
) -> None:
    async def fail() -> None:
        notes(str(current_job().attempt))
        raise ValueError("no")

    queue = make_queue(backend, fail=fail)
    job_id = await queue.add("fail", retries=3, backoff=60)
    await clock.advance("3d")
    first, second, third = 60, 60 + 60**2, 60 + 60**2 + 60**3
    assert notes.all == [(0, "1"), (first, "2"), (second, "3"), (third, "4")]
    assert await queue.get_job_state(job_id) == "failed"


async def test_a_cron_schedule_runs_at_its_times(
    backend: VirtualBackend, clock: VirtualClock, notes: Notes
) -> None:
    queue = make_queue(backend, note=notes.run)
    await queue.upsert_repeatable("note", cron="0 3 * * *", args=["nightly"])
    await clock.advance("3d")
    night, day = 15 * 3600, 24 * 3600
    assert notes.all == [(night + day * each, "nightly") for each in range(3)]


async def test_a_queue_that_is_made_again_takes_no_schedule_away(
    backend: VirtualBackend, clock: VirtualClock, notes: Notes
) -> None:
    queue = make_queue(backend, note=notes.run)
    queue.add_repeatable("note", every="1h", args=["tick"])
    await clock.advance("90m")
    again = Queue(queue.name, backend, registry=queue._registry)
    await again.add("note", ["job"])
    await clock.advance("1h")
    assert [name for _, name in notes.all] == ["tick", "job", "tick"]


async def test_a_queue_that_is_made_again_takes_no_hook_away(
    backend: VirtualBackend, clock: VirtualClock, notes: Notes
) -> None:
    queue = make_queue(backend, note=notes.run)
    queue.on_startup(lambda: notes("startup"))
    await Queue(queue.name, backend, registry=queue._registry).add("note", ["job"])
    await clock.run_until_idle()
    assert [name for _, name in notes.all] == ["startup", "job"]


async def test_a_queue_that_is_made_again_takes_no_limit_away(
    backend: VirtualBackend, clock: VirtualClock, notes: Notes
) -> None:
    queue = make_queue(backend, note=notes.run)
    queue.rate_limit, queue.rate_interval = 1, 3600.0
    again = Queue(queue.name, backend, registry=queue._registry)
    await again.add_bulk([{"task_id": "note", "args": [name]} for name in "ab"])
    await clock.advance("30m")
    assert notes.all == [(0, "a")]
    await clock.advance("1h")
    assert [name for _, name in notes.all] == ["a", "b"]


async def test_a_task_is_told_the_time_of_the_server(
    backend: VirtualBackend, clock: VirtualClock
) -> None:
    told: list[float] = []

    async def note() -> None:
        told.append(current_job().now())

    queue = make_queue(backend, note=note)
    await queue.add("note", delay=3600)
    await clock.advance("1h")
    assert told == [pytest.approx(NOON.timestamp() + 3600)]


async def test_a_repeatable_of_the_code_runs_at_its_interval(
    backend: VirtualBackend, clock: VirtualClock, notes: Notes
) -> None:
    queue = make_queue(backend, note=notes.run)
    queue.add_repeatable("note", every=900, args=["a"])
    await clock.advance("1h")
    times = [at for at, _ in notes.all]
    assert len(times) == 4
    assert [round(after - before) for before, after in pairwise(times)] == [900] * 3


async def test_many_small_steps_are_one_large_one(
    backend: VirtualBackend, clock: VirtualClock, notes: Notes
) -> None:
    """Sums of floats are a little off: what is due within a microsecond is due, once."""
    queue = make_queue(backend, note=notes.run)
    for every in (0.1, 0.8):
        await queue.upsert_repeatable("note", every=every, args=[f"{every}"])
    async with worker(queue):
        for _ in range(150):
            await clock.advance(0.02)
    counts = Counter(name for _, name in notes.all)
    assert counts["0.1"] in (29, 30)
    assert counts["0.8"] == 3


async def test_a_task_that_takes_too_long_is_cancelled_at_its_time(
    backend: VirtualBackend, clock: VirtualClock, notes: Notes
) -> None:
    async def hang() -> None:
        try:
            await anyio.sleep(86_400)
        finally:
            notes("cancelled")

    queue = make_queue(backend, hang=hang)
    job_id = await queue.add("hang", timeout=30)
    await clock.advance("1m")
    assert notes.all == [(30, "cancelled")]
    with pytest.raises(JobFailed, match="30 s"):
        await queue.wait_for(job_id)


async def test_the_job_of_a_lost_worker_comes_back_when_its_lease_is_over(
    backend: VirtualBackend, clock: VirtualClock, notes: Notes
) -> None:
    queue = make_queue(backend, note=notes.run)
    await queue.add("note", ["a"])
    await lose_worker(queue)
    await clock.advance(backend.settings.stalled_after - 1)
    assert notes.all == []
    await clock.advance(1)
    assert notes.all == [(backend.settings.stalled_after, "a")]


async def test_a_job_that_has_not_started_in_time_expires(
    backend: VirtualBackend, clock: VirtualClock, notes: Notes
) -> None:
    queue = make_queue(backend, note=notes.run)
    await queue.pause(until=clock.time() + 120)
    late = await queue.add("note", ["late"], ttl=60)
    patient = await queue.add("note", ["patient"], ttl=180)
    await clock.advance("2m")
    assert notes.all == [(120, "patient")]
    assert await queue.get_job_state(late) == "expired"
    assert await queue.get_job_state(patient) == "completed"


async def test_a_rate_limit_is_kept_by_the_virtual_clock(
    backend: VirtualBackend, clock: VirtualClock, notes: Notes
) -> None:
    queue = make_queue(backend, note=notes.run)
    queue.rate_limit, queue.rate_interval = 2, 60.0
    for name in "abcde":
        await queue.add("note", [name])
    await clock.run_until_idle()
    assert [name for _, name in notes.all] == ["a", "b"]
    await clock.advance("30s")
    assert [name for _, name in notes.all] == ["a", "b", "c"]
    await clock.advance("1m")
    assert [name for _, name in notes.all] == ["a", "b", "c", "d", "e"]


async def test_a_window_of_deduplication_ends_by_the_virtual_clock(
    backend: VirtualBackend, clock: VirtualClock, notes: Notes
) -> None:
    queue = make_queue(backend, note=notes.run)

    async def add() -> str:
        return await queue.add("note", ["a"], deduplication={"id": "one", "ttl": 60})

    first = await add()
    await clock.advance(59)
    assert await add() == first
    await clock.advance(1)
    assert await add() != first
    await clock.run_until_idle()
    assert [at for at, _ in notes.all] == [0, 60]


async def test_results_go_when_their_time_to_live_is_over(
    backend: VirtualBackend, clock: VirtualClock, notes: Notes
) -> None:
    queue = make_queue(backend, note=notes.run)
    job_id = await queue.add("note", ["a"])
    await clock.advance("23h")
    assert await queue.get_job_state(job_id) == "completed"
    await clock.advance("1h")
    assert await queue.get_job(job_id) is None


async def test_a_month_of_upkeep_changes_nothing(
    backend: VirtualBackend, clock: VirtualClock, notes: Notes
) -> None:
    queue = make_queue(backend, note=notes.run)
    async with worker(queue):
        await clock.advance("30d")
        await queue.add("note", ["a"])
        await clock.run_until_idle()
    assert notes.all == [(30 * 86_400, "a")]


async def test_parents_run_before_the_job_that_waits_for_them(
    backend: VirtualBackend, clock: VirtualClock
) -> None:
    async def part(number: int) -> int:
        return number

    async def total() -> int:
        return sum((await current_job().parent_results()).values())

    queue = make_queue(backend, part=part, total=total)
    parts = [
        Job(task_id="part", args=[number], delay_until=clock.time() + number)
        for number in (1, 2, 3)
    ]
    whole = Job(task_id="total", depends_on=[each.id for each in parts])
    await FlowProducer(backend).add_flow("work", [*parts, whole])
    await clock.advance(2)
    assert await queue.get_job_state(whole.id) == "waiting-children"
    await clock.advance(1)
    assert await queue.get_job_result(whole.id) == 6


async def test_the_same_calls_give_the_same_events() -> None:
    async def trace() -> list[tuple[float, str]]:
        clock = VirtualClock(NOON)
        backend, notes = VirtualBackend(clock), Notes(clock)

        async def flaky(name: str) -> None:
            notes(f"{name}{current_job().attempt}")
            await anyio.lowlevel.checkpoint()
            if current_job().attempt < 3:
                raise ValueError(name)

        queue = make_queue(backend, flaky=flaky, note=notes.run)
        queue.add_repeatable("note", every=7, args=["tick"])
        for index in range(20):
            await queue.add(
                "flaky", [f"{index}-"], delay=index % 5, priority=index % 3, retries=3, backoff=2,
                job_id=f"job-{index}",
            )  # fmt: skip
        await clock.advance("1m")
        return notes.all

    first = await trace()
    assert len(first) > 60
    assert await trace() == first
    assert [at for at, _ in first] == sorted(at for at, _ in first)


# -- what runs meanwhile


async def test_only_what_is_due_runs_until_idle(
    backend: VirtualBackend, clock: VirtualClock, notes: Notes
) -> None:
    async def parent() -> None:
        notes("parent")
        current_job().add("note", ["follow-up"])
        current_job().add("note", ["late"], delay=60)

    queue = make_queue(backend, parent=parent, note=notes.run)
    await queue.add("parent")
    await queue.add("note", ["delayed"], delay=1)
    await clock.run_until_idle()
    assert notes.all == [(0, "parent"), (0, "follow-up")]


async def test_a_retry_without_delay_runs_before_the_clock_is_idle(
    backend: VirtualBackend, clock: VirtualClock
) -> None:
    attempts: list[int] = []

    async def fail() -> None:
        attempts.append(current_job().attempt)
        raise ValueError("no")

    queue = make_queue(backend, fail=fail)
    await queue.add("fail", retries=4)
    await clock.run_until_idle()
    assert attempts == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("kind", ["thread", "sleep", "process"])
async def test_real_work_is_waited_for(kind: str) -> None:
    clock = VirtualClock(patience=PATIENCE)
    backend = VirtualBackend(clock)

    async def sleep(seconds: float) -> str:
        await anyio.sleep(seconds)
        return "done"

    def thread(seconds: float) -> str:
        time.sleep(seconds)
        return "done"

    registry = TaskRegistry()
    registry.register(sleep, queue="work", name="sleep")
    registry.register(thread, queue="work", name="thread")
    registry.register(work, queue="work", name="process", process=True)
    queue = Queue("work", backend, registry=registry)
    job_id = await queue.add(kind, [0.05], timeout=10)
    await clock.advance("1h")
    assert await queue.get_job_result(job_id) == "done"


def work(seconds: float) -> str:
    time.sleep(seconds)
    return "done"


async def test_a_job_that_waits_for_the_test_does_not_hold_up_the_time(
    backend: VirtualBackend, clock: VirtualClock, notes: Notes
) -> None:
    go_on = anyio.Event()

    async def wait() -> None:
        await go_on.wait()
        notes("end")

    queue = make_queue(backend, wait=wait, note=notes.run)
    async with worker(queue):
        await queue.add("wait")
        await queue.add("note", ["meanwhile"], delay=60)
        await clock.advance("2m")
        go_on.set()
        await clock.run_until_idle()
    assert notes.all == [(60, "meanwhile"), (120, "end")]


async def test_a_job_that_still_waits_when_the_time_is_over_is_an_error_that_says_so(
    backend: VirtualBackend, clock: VirtualClock
) -> None:
    go_on, runs = anyio.Event(), 0

    async def wait() -> None:
        nonlocal runs
        runs += 1
        await go_on.wait()

    queue = make_queue(backend, wait=wait)
    job_id = await queue.add("wait")
    with pytest.raises(VirtualTimeStuck, match=job_id):
        await clock.advance(30)
    go_on.set()
    await clock.run_until_idle()
    assert (await queue.get_job_state(job_id), runs) == ("completed", 2)


async def test_without_workers_of_its_own_only_those_of_the_test_run_jobs(
    clock: VirtualClock, notes: Notes
) -> None:
    queue = make_queue(VirtualBackend(clock, workers=False), note=notes.run)
    await queue.add("note", ["a"])
    await clock.advance(60)
    assert notes.all == []
    async with worker(queue):
        await clock.run_until_idle()
    assert notes.all == [(60, "a")]


async def test_a_job_cannot_move_the_clock_that_waits_for_it(
    backend: VirtualBackend, clock: VirtualClock
) -> None:
    async def move() -> None:
        await clock.advance(1)

    queue = make_queue(backend, move=move)
    job_id = await queue.add("move")
    await clock.run_until_idle()
    with pytest.raises(JobFailed, match="VirtualTimeStuck"):
        await queue.wait_for(job_id)


async def test_a_job_of_another_queue_runs_too(
    backend: VirtualBackend, clock: VirtualClock, notes: Notes
) -> None:
    other = make_queue(backend, "other", note=notes.run)

    async def pass_on() -> None:
        await other.add("note", ["there"], delay=10)

    queue = make_queue(backend, pass_on=pass_on)
    await queue.add("pass_on")
    await clock.advance(10)
    assert notes.all == [(10, "there")]


async def test_two_moves_at_once_take_turns(
    backend: VirtualBackend, clock: VirtualClock, notes: Notes
) -> None:
    queue = make_queue(backend, note=notes.run)
    for delay in (5, 15):
        await queue.add("note", [str(delay)], delay=delay)
    async with anyio.create_task_group() as group:
        group.start_soon(clock.advance, 10)
        group.start_soon(clock.advance, 10)
    assert notes.all == [(5, "5"), (15, "15")]
    assert clock.now() == NOON + timedelta(seconds=20)


# -- the clock itself


@pytest.mark.parametrize(
    ("duration", "seconds"),
    [
        (90, 90.0),
        (0.5, 0.5),
        (0, 0.0),
        ("1h30m", 5400.0),
        ("90", 90.0),
        (timedelta(days=2), 172_800.0),
    ],
)
async def test_a_duration_is_seconds_or_a_text_or_a_timedelta(
    clock: VirtualClock, duration: Any, seconds: float
) -> None:
    await clock.advance(duration)
    assert clock.now() == NOON + timedelta(seconds=seconds)


@pytest.mark.parametrize("duration", [-1, float("inf"), float("nan"), "soon", timedelta(-1)])
async def test_a_clock_goes_forward_only(clock: VirtualClock, duration: Any) -> None:
    with pytest.raises(ValueError, match=r"forward|interval"):
        await clock.advance(duration)
    assert clock.now() == NOON


async def test_a_clock_is_moved_to_a_moment(clock: VirtualClock) -> None:
    await clock.advance_to(datetime(2026, 1, 6, tzinfo=UTC))
    assert clock.now() == datetime(2026, 1, 6, tzinfo=UTC)
    with pytest.raises(InvalidArgument, match="forward only"):
        await clock.advance_to(NOON)


async def test_listeners_hear_of_each_moment(
    backend: VirtualBackend, clock: VirtualClock, notes: Notes
) -> None:
    heard: list[datetime] = []
    leave = clock.on_move(heard.append)
    queue = make_queue(backend, note=notes.run)
    await queue.add("note", ["a"], delay=60)
    await clock.advance("2m")
    assert heard[-1] == NOON + timedelta(minutes=2)
    assert NOON + timedelta(minutes=1) in heard
    leave()
    count = len(heard)
    await clock.advance("1h")
    assert len(heard) == count


async def test_time_stands_still_without_a_move(backend: VirtualBackend) -> None:
    queue = make_queue(backend)
    before = backend.now()
    await queue.add("any")
    with anyio.move_on_after(0.02):
        await anyio.sleep_forever()
    assert backend.now() == before


async def test_settings_are_taken(clock: VirtualClock, notes: Notes) -> None:
    backend = VirtualBackend(clock, settings=Settings(completed_ttl=60, heartbeat_interval=5))
    queue = make_queue(backend, note=notes.run)
    async with worker(queue):
        job_id = await queue.add("note", ["a"])
        await clock.advance(59)
        assert await queue.get_job_state(job_id) == "completed"
        await clock.advance(1)
        assert await queue.get_job(job_id) is None


async def test_a_jittered_backoff_is_waited_out(
    backend: VirtualBackend, clock: VirtualClock, notes: Notes
) -> None:
    async def fail() -> None:
        notes(str(current_job().attempt))
        raise ValueError("no")

    queue = make_queue(backend, fail=fail)
    await queue.add("fail", retries=2, backoff=Backoff(delay=10, factor=3, jitter=0.5))
    await clock.advance("1m")
    (_, second, third) = (at for at, _ in notes.all)
    assert 5 <= second <= 10
    assert 15 <= third - second <= 30


async def test_a_queue_with_a_registry_of_its_own_is_served_with_that(
    backend: VirtualBackend, clock: VirtualClock
) -> None:
    async def part() -> str:
        return "ran"

    async def other() -> None: ...

    TASK_REGISTRY.register(other, queue="work", name="tests.testing.other")
    try:
        queue = make_queue(backend, part=part)
        jobs = [Job(task_id="part", delay_until=clock.time() + i + 1) for i in range(20)]
        await FlowProducer(backend).add_flow("work", jobs)  # it has a queue with that of all
        await clock.advance(20)
        assert [await queue.get_job_result(job.id) for job in jobs] == ["ran"] * 20
    finally:
        del TASK_REGISTRY["tests.testing.other"]
