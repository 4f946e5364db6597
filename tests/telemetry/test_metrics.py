"""The history of what workers did: what is counted, what survives, and that no job waits for it."""

import math
import random
from collections.abc import Callable
from pathlib import Path

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncmq_nats import Fail, InMemoryBackend, NATSBackend, Settings
from asyncmq_nats.backends.base import Backend, Write
from asyncmq_nats.backends.nats.embedded.server import EmbeddedServer
from asyncmq_nats.exceptions import InvalidArgument, InvalidQueueName
from asyncmq_nats.metrics import (
    Histogram,
    MetricsHistory,
    TaskMetrics,
    read_all_metrics,
    read_metrics,
)
from asyncmq_nats.queues import list_queues
from asyncmq_nats.runtime.recorder import Recorder
from asyncmq_nats.store.history import history_key, history_log, read_history
from asyncmq_nats.wire.codec import dump_json, load_json
from tests.nats.relay import relaying
from tests.receiver import PATIENCE, holds, until
from tests.running import lose_worker, make_queue, only, outcome, run_jobs, running

DURATIONS = st.floats(min_value=1e-5, max_value=1e6)


# -- histograms


@given(st.lists(DURATIONS, min_size=1, max_size=200), st.floats(min_value=0.0, max_value=1.0))
def test_a_percentile_is_right_within_one_percent(durations: list[float], share: float) -> None:
    histogram = Histogram()
    histogram.add_many(durations)
    exact = sorted(durations)[max(1, math.ceil(share * len(durations))) - 1]
    assert histogram.percentile(share) == pytest.approx(exact, rel=0.01)


def test_many_durations_at_once_are_counted_as_one_by_one() -> None:
    generator = random.Random(7)
    durations = [generator.lognormvariate(-5, 4) for _ in range(5_000)] + [0.0, -0.5, 1e-9, 1e9]
    one_by_one, at_once = Histogram(), Histogram()
    for duration in durations:
        one_by_one.add(duration)
    at_once.add_many(durations[:2_000])
    at_once.add_many(durations[2_000:])
    assert at_once.to_list() == one_by_one.to_list()
    assert (at_once.count, at_once.maximum) == (5_004, 1e9)
    assert at_once.total == pytest.approx(sum(max(0.0, each) for each in durations))


def test_a_duration_below_zero_counts_as_zero() -> None:
    """A clock was put back."""
    histogram = Histogram()
    histogram.add_many([-0.5, 0.5, -2.0])
    assert (histogram.count, histogram.total, histogram.maximum) == (3, 0.5, 0.5)
    assert histogram.count_below([0.001, 1.0]) == [2, 3]


@given(st.lists(DURATIONS, max_size=50), st.lists(DURATIONS, max_size=50))
def test_merged_histograms_count_what_both_had(one: list[float], other: list[float]) -> None:
    apart, together = [Histogram(), Histogram()], Histogram()
    for histogram, durations in zip(apart, (one, other), strict=True):
        for duration in durations:
            histogram.add(duration)
            together.add(duration)
    merged = Histogram.from_list(load_json(b'{"a":%a}' % apart[0].to_list())["a"])
    merged.merge(apart[1])
    assert merged.count == together.count
    assert merged.total == pytest.approx(together.total, abs=1e-5)
    assert merged.to_list()[2:] == together.to_list()[2:]


def test_a_histogram_says_how_many_are_not_above_a_bound() -> None:
    histogram = Histogram()
    for duration in (0.001, 0.01, 0.01, 0.1, 1.0, 0.0):
        histogram.add(duration)
    assert histogram.count_below([0.0005, 0.001, 0.02, 0.5, 2.0]) == [1, 2, 4, 5, 6]


def test_nothing_counted_has_no_percentile_and_no_mean() -> None:
    assert Histogram().percentile(0.5) is None
    assert Histogram().mean is None
    assert TaskMetrics().failure_rate is None


@pytest.mark.parametrize("junk", [None, "x", [], [1], [1, "x"], [1, 2, 3], {"a": 1}])
def test_a_malformed_histogram_counts_nothing(junk: object) -> None:
    assert Histogram.from_list(junk).count == 0


# -- what is counted


async def flaky_queue(backend: Backend, *, concurrency: int = 3):
    """Return a queue with tasks that write down what they did, and where they write it."""
    ran: list[tuple[str, float]] = []
    failures: dict[str, int] = {}

    async def work(name: str, seconds: float) -> str:
        started = anyio.current_time()
        await anyio.sleep(seconds)
        ran.append((name, anyio.current_time() - started))
        return name

    async def flaky(name: str) -> None:
        failures[name] = failures.get(name, 0) + 1
        ran.append((name, 0.0))
        if failures[name] <= 2:
            raise ValueError("not yet")

    async def hopeless() -> None:
        raise Fail("never")

    queue = make_queue(backend, concurrency=concurrency, work=work, flaky=flaky, hopeless=hopeless)
    return queue, ran


async def test_totals_are_those_that_the_tasks_wrote_down(backend: Backend) -> None:
    queue, ran = await flaky_queue(backend, concurrency=8)
    durations = [random.uniform(0.001, 0.03) for _ in range(60)]
    for index, seconds in enumerate(durations):
        await queue.add("work", [str(index), seconds])
    for index in range(6):
        await queue.add("flaky", [f"flaky {index}"], retries=2)
    await queue.add("hopeless", retries=5)
    await queue.add("work", ["too late", 0], ttl=0.0)
    await run_jobs(queue)
    history = await read_metrics(backend, queue.name)
    tasks = history.tasks
    assert (tasks["work"].completed, tasks["work"].expired) == (60, 1)
    assert (tasks["flaky"].completed, tasks["flaky"].retried) == (6, 12)
    assert (tasks["hopeless"].failed, tasks["hopeless"].retried) == (1, 0)
    assert history.total.ended == 68
    assert history.total.run.count == len(ran) + 1
    slept = sorted(seconds for name, seconds in ran if not name.startswith("flaky"))
    for share in (0.5, 0.95):
        exact = slept[max(1, math.ceil(share * len(slept))) - 1]
        # What a worker measures has the worker's own part in it: never less than the task saw.
        assert tasks["work"].run.percentile(share) >= 0.99 * exact
    assert tasks["work"].run.total >= sum(slept)


async def test_a_cancelled_run_and_a_job_without_a_form_are_counted(backend: Backend) -> None:
    started = anyio.Event()

    async def endless() -> None:
        started.set()
        await anyio.sleep_forever()

    queue = make_queue(backend, endless=endless)
    async with running(queue):
        job_id = await queue.add("endless")
        with anyio.fail_after(PATIENCE):
            await started.wait()
        assert await queue.cancel_job(job_id)
        await only(queue, cancelled=1)
        await backend.write("amq_work", Write("amq.work.ready.5.junk", b"no job"))
        await only(queue, cancelled=1, failed=1)
    tasks = (await read_metrics(backend, queue.name)).tasks
    assert tasks["endless"].cancelled == 1
    assert tasks["?"].failed == 1


async def test_a_lost_worker_and_its_redelivery_are_incidents(backend: Backend) -> None:
    queue = make_queue(backend, work=lambda: None)
    await queue.add("work")
    await lose_worker(queue, runs=True)
    await run_jobs(queue)
    incidents = (await read_metrics(backend, queue.name)).incidents
    assert (incidents["lost"], incidents["redelivered"]) == (1, 1)


async def test_a_job_that_is_handed_back_is_an_incident(backend: Backend) -> None:
    backend.settings = backend.settings.model_copy(update={"shutdown_timeout": 0.0})
    started = anyio.Event()

    async def endless() -> None:
        started.set()
        await anyio.sleep_forever()

    queue = make_queue(backend, endless=endless)
    async with running(queue):
        await queue.add("endless")
        with anyio.fail_after(PATIENCE):
            await started.wait()
    incidents = (await read_metrics(backend, queue.name)).incidents
    assert (incidents["handed_back"], incidents["lost"]) == (1, 0)


async def test_a_lease_that_runs_out_beside_a_living_worker_is_an_incident(
    backend: Backend,
) -> None:
    started, go = anyio.Event(), anyio.Event()

    async def slow() -> None:
        started.set()
        await go.wait()

    queue = make_queue(backend, slow=slow)
    async with running(queue) as worker:
        await queue.add("slow")
        with anyio.fail_after(PATIENCE):
            await started.wait()
        runner = worker._runner
        assert runner is not None
        [run] = runner._slots.running
        run.attempt.delivery.abandon()  # nothing extends the lease any more
        await holds(lambda: runner._completer.leases_lost == 1)
        go.set()
        await only(queue, completed=1)
    incidents = (await read_metrics(backend, queue.name)).incidents
    assert (incidents["lease_lost"], incidents["lost"]) == (1, 0)


async def test_a_connection_that_is_made_again_is_an_incident(
    server: EmbeddedServer, settings: Settings
) -> None:
    async with relaying(server) as relay, NATSBackend(relay.url, settings=settings) as backend:
        queue = make_queue(backend, work=lambda: None)
        async with running(queue):
            await relay.cut()
            await holds(lambda: backend.reconnects == 1)
            await queue.add("work")
            await only(queue, completed=1)
        assert (await read_metrics(backend, queue.name)).incidents["reconnected"] == 1


async def test_a_worker_writes_while_it_runs(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("asyncmq_nats.runtime.recorder.RECORD_INTERVAL", 0.2)
    queue, _ = await flaky_queue(backend)
    async with running(queue):
        job_id = await queue.add("work", ["a", 0])
        await outcome(queue, job_id)

        async def completed() -> int:
            return (await read_metrics(backend, queue.name)).total.completed

        await until(completed, lambda count: count == 1)
    history = await read_metrics(backend, queue.name)
    assert history.total.completed == 1
    assert max(point.workers for point in history.points) == 1
    assert max(point.slots for point in history.points) > 0


async def test_a_queue_that_no_worker_runs_has_a_history_of_zeros(backend: Backend) -> None:
    history = await read_metrics(backend, "nobody", step=60)
    assert len(history.points) in (60, 61)
    assert (history.total.ended, history.total.run.count) == (0, 0)
    assert await read_all_metrics(backend) == {}
    assert await list_queues(backend) == []


async def test_the_history_is_no_queue(backend: Backend) -> None:
    queue, _ = await flaky_queue(backend)
    await queue.add("work", ["a", 0])
    await run_jobs(queue)
    assert await list_queues(backend) == ["work"]
    assert list(await read_all_metrics(backend)) == ["work"]


async def test_without_the_setting_nothing_is_written(
    make_backend: Callable[[], Backend], settings: Settings
) -> None:
    settings.metrics = False
    async with make_backend() as backend:
        queue, _ = await flaky_queue(backend)
        await queue.add("work", ["a", 0])
        await run_jobs(queue)
        assert await backend.incarnation("KV_amq_metrics") is None
        assert (await read_metrics(backend, queue.name)).total.ended == 0


async def test_a_refused_history_holds_up_no_job(
    make_backend: Callable[[], Backend], caplog: pytest.LogCaptureFixture
) -> None:
    backend = make_backend()
    if not isinstance(backend, NATSBackend):
        return  # in memory nothing is refused
    producer = make_backend()
    async with producer:
        queue, _ = await flaky_queue(producer)
        await queue._assets.declare_all()
        await queue.add("work", ["a", 0])
    backend.may_declare = False
    backend._assets._declare = False
    async with backend:
        queue, _ = await flaky_queue(backend)
        async with running(queue):
            await only(queue, completed=1)
    assert "the history was not written" in caplog.text


# -- reading


def metrics_of(completed: int) -> dict[str, object]:
    return {
        "v": 1,
        "slot_seconds": 30.0,
        "busy_seconds": 20.0,
        "tasks": {"send": {"completed": completed}},
    }


async def test_a_long_stretch_is_read_from_few_records(backend: Backend) -> None:
    await backend.declare_log(history_log(backend.settings))
    now = backend.now()
    for worker in ("one", "two"):
        for back in range(0, 6 * 3600, 600):
            start = int(now - back) // 600 * 600
            key = history_key("amq", "email", worker, start, 600)
            await backend.write("KV_amq_metrics", Write(key, dump_json(metrics_of(5))))
    history = await read_metrics(backend, "email", since=now - 4 * 86_400, step=3600)
    assert history.total.completed == 2 * 36 * 5
    assert history.step == 3600
    assert {point.start % 3600 for point in history.points} == {0}
    assert max(point.workers for point in history.points) == 2
    assert len(await read_history(backend, "email", now - 1800, now, 600)) in (6, 8)


@pytest.mark.parametrize(
    ("seconds", "step"), [(600, 10), (3600, 20), (10_000, 60), (86_400, 600), (7 * 86_400, 3600)]
)
async def test_a_read_without_a_step_has_some_two_hundred_points(
    seconds: float, step: float
) -> None:
    backend = InMemoryBackend()
    history = await read_metrics(backend, "email", since=backend.now() - seconds)
    assert history.step == step
    assert seconds / step <= len(history.points) <= 202
    await backend.close()


async def test_a_step_that_is_not_kept_so_long_is_raised(backend: Backend) -> None:
    now = backend.now()
    day = await read_metrics(backend, "email", since=now - 86_400, until=now - 86_000, step=10)
    assert day.step == 60
    week = await read_metrics(backend, "email", since=now - 6 * 86_400, until=now - 86_000, step=30)
    assert week.step == 600


@pytest.mark.parametrize(
    "given",
    [{"since": 5.0, "until": 5.0}, {"step": 0}, {"step": -1}, {"since": math.nan}, {"until": "x"}],
)
async def test_a_read_of_nothing_is_refused(backend: Backend, given: dict[str, float]) -> None:
    with pytest.raises(InvalidArgument):
        await read_metrics(backend, "email", **given)
    with pytest.raises(InvalidQueueName):
        await read_metrics(backend, "*")


async def test_records_of_strangers_count_nothing(backend: Backend) -> None:
    await backend.declare_log(history_log(backend.settings))
    start = int(backend.now()) // 10 * 10
    for number, body in enumerate(
        (b"x", b"[]", b'{"tasks":[1]}', b'{"tasks":{"a":7},"slot_seconds":"x"}')
    ):
        key = history_key("amq", "email", f"w{number}", start, 10)
        await backend.write("KV_amq_metrics", Write(key, body))
    await backend.write("KV_amq_metrics", Write("$KV.amq_metrics.10.email.x.y.z", b"{}"))
    history = await read_metrics(backend, "email", step=10)
    assert history.total.ended == 0


# -- the recorder


def make_recorder(backend: Backend) -> Recorder:
    return Recorder(backend, "email", "w", 4, lambda: 0.0, dict)


def test_too_many_tasks_for_a_record_are_counted_together(settings: Settings) -> None:
    recorder = make_recorder(InMemoryBackend(settings))
    recorder.begin()
    for number in range(1_500):
        task = f"{number:05}" + 1_000 * "x"
        recorder.note_run(task, 0, 0.1 * number, 0.1 * number + 0.2)
        recorder.note_end["completed"](task)
    for write in recorder.take():
        assert len(write.body) < 1_048_576
        assert load_json(write.body)["tasks"]["?"]["completed"] == 1_500


def test_an_idle_worker_writes_one_record_at_a_time(settings: Settings) -> None:
    recorder = make_recorder(InMemoryBackend(settings))
    recorder.begin()
    recorder.take()
    assert len(recorder.take()) in (1, 2)  # two, if a minute is over at this moment
    recorder.note_end["completed"]("send")
    assert len(recorder.take()) >= 3


# -- a stop of everything


async def test_the_history_survives_a_stop_of_everything(
    tmp_path: Path, settings: Settings
) -> None:
    histories: list[MetricsHistory] = []
    since = None
    for turn in range(2):
        server = EmbeddedServer(tmp_path / "store")
        server.start()
        try:
            async with NATSBackend(servers=server.url, settings=settings) as backend:
                since = since or backend.now()
                if turn:
                    histories.append(await read_metrics(backend, "work", since=since))
                queue, _ = await flaky_queue(backend)
                for number in range(20):
                    await queue.add("work", [str(number), 0])
                await run_jobs(queue)
                histories.append(await read_metrics(backend, "work", since=since))
        finally:
            server.stop()
    assert [history.total.completed for history in histories] == [20, 20, 40]
