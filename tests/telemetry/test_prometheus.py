"""The metrics for Prometheus: of queues, and at a worker's own port."""

import sys
from collections.abc import Mapping

import pytest
from prometheus_client.parser import text_string_to_metric_families

from asyncmq_nats import Fail, InMemoryBackend, InvalidArgument, Settings
from asyncmq_nats.backends.base import Backend, Write
from asyncmq_nats.metrics import TaskMetrics
from asyncmq_nats.store.history import history_key, history_log
from asyncmq_nats.telemetry.prometheus import HistoryCounts, WorkerCounts, render, render_queues
from asyncmq_nats.testing import VirtualBackend, VirtualClock
from asyncmq_nats.wire.codec import dump_json
from tests.running import counted, make_queue, only, run_jobs, running
from tests.telemetry.probing import ask, free_port


@pytest.fixture
def port() -> int:
    return free_port()


@pytest.fixture
def settings(settings: Settings, port: int) -> Settings:
    settings.metrics_port = settings.health_port = port
    settings.probe_host = "127.0.0.1"
    return settings


def read(text: str | bytes, name: str, labels: Mapping[str, str]) -> float:
    """Return the one sample of that name and these labels."""
    shown = text if isinstance(text, str) else text.decode()
    [value] = [
        sample.value
        for family in text_string_to_metric_families(shown)
        for sample in family.samples
        if sample.name == name and sample.labels == labels
    ]
    return float(value)


async def test_a_worker_shows_its_queue_and_what_it_did(backend: Backend, port: int) -> None:
    tries: list[int] = []

    async def flaky() -> None:
        tries.append(1)
        if len(tries) < 3:
            raise ValueError

    async def hopeless() -> None:
        raise Fail("no")

    async def nothing() -> None: ...

    queue = make_queue(backend, concurrency=4, flaky=flaky, hopeless=hopeless, nothing=nothing)
    async with running(queue):
        await queue.add("flaky", retries=2)
        await queue.add("hopeless")
        for _ in range(5):
            await queue.add("nothing")
        await queue.add("nothing", delay=3600)
        await only(queue, completed=6, failed=1, delayed=1)
        status, text = await ask(port, "/metrics")
        assert status == 200
        assert (await ask(port, "/livez"))[0] == 200
    of = {"queue": "work"}
    assert read(text, "asyncmq_jobs", of | {"state": "completed"}) == 6
    assert read(text, "asyncmq_jobs", of | {"state": "delayed"}) == 1
    assert read(text, "asyncmq_oldest_waiting_seconds", of) == 0
    assert read(text, "asyncmq_queue_paused", of) == 0
    assert read(text, "asyncmq_workers", of) == 1
    assert read(text, "asyncmq_slots", of) == 4
    assert read(text, "asyncmq_worker_slots", of) == 4
    assert read(text, "asyncmq_worker_slots_busy", of) == 0
    assert read(text, "asyncmq_jobs_completed_total", of | {"task": "nothing"}) == 5
    assert read(text, "asyncmq_jobs_completed_total", of | {"task": "flaky"}) == 1
    assert read(text, "asyncmq_jobs_retried_total", of | {"task": "flaky"}) == 2
    assert read(text, "asyncmq_jobs_failed_total", of | {"task": "hopeless"}) == 1
    assert read(text, "asyncmq_job_run_seconds_count", of | {"task": "flaky"}) == 3
    assert read(text, "asyncmq_job_wait_seconds_count", of | {"task": "nothing"}) == 5
    for name in ("redeliveries", "lost_leases", "lost_workers", "handbacks", "reconnects"):
        assert read(text, f"asyncmq_{name}_total", of) == 0


async def test_queues_are_shown_for_a_page_of_a_web_application(backend: Backend) -> None:
    queues = [make_queue(backend, name) for name in ("a", "b")]
    await queues[0].add("x")
    await queues[0].add("x", delay=3600)
    await queues[1].pause()
    await counted(queues[0])
    text = await render_queues(queues)
    assert read(text, "asyncmq_jobs", {"queue": "a", "state": "waiting"}) == 1
    assert read(text, "asyncmq_jobs", {"queue": "a", "state": "delayed"}) == 1
    assert read(text, "asyncmq_oldest_waiting_seconds", {"queue": "a"}) > 0
    assert read(text, "asyncmq_oldest_waiting_seconds", {"queue": "b"}) == 0
    assert read(text, "asyncmq_queue_paused", {"queue": "b"}) == 1
    assert read(text, "asyncmq_workers", {"queue": "b"}) == 0


async def send() -> None: ...


async def test_a_page_of_queues_counts_their_jobs(backend: Backend) -> None:
    """All workers write the history, so the page counts what they do together."""
    queue, other = make_queue(backend, "a", send=send), make_queue(backend, "b", send=send)
    history = HistoryCounts(backend)
    text = await render_queues([queue, other], history)
    assert b"asyncmq_jobs_completed_total{" not in text
    for runs in (1, 2):
        await queue.add_bulk([{"task_id": "send"}] * 3)
        await other.add("send")
        await run_jobs(queue)  # a worker writes its history when it stops, too
        await run_jobs(other)
        text = await render_queues([queue], history)
        of = {"queue": "a", "task": "send"}
        assert read(text, "asyncmq_jobs_completed_total", of) == 3 * runs
        assert read(text, "asyncmq_job_run_seconds_count", of) == 3 * runs
        assert read(text, "asyncmq_reconnects_total", {"queue": "a"}) == 0
        assert b'queue="b"' not in text
    assert b"asyncmq_worker_slots" not in text


async def test_counts_of_the_history_grow_by_each_of_its_records_once() -> None:
    """Read at any time, also long after the last read; a record may be written again."""
    clock = VirtualClock(1_767_614_400)
    async with VirtualBackend(clock) as backend:
        await backend.declare_log(history_log(backend.settings))
        log = history_log(backend.settings).name

        async def write(start: float, completed: int) -> None:
            key = history_key(backend.settings.prefix, "a", "w", int(start), 10)
            metrics = TaskMetrics(completed=completed)
            body = {"tasks": {"send": metrics.to_dict()}, "incidents": {"redelivered": completed}}
            await backend.write(log, Write(key, dump_json(body)))

        await write(clock.time() - 600, 1000)  # before the first read: only its task is known
        history = HistoryCounts(backend)
        [counts] = await history.read()
        assert (counts.tasks["send"].completed, counts.incidents["redelivered"]) == (0, 0)
        for times, pause in enumerate((1, 9, 15, 60, 5, 119, 121, 400, 3, 130, 7200, 30)):
            await clock.advance(pause)
            start = clock.time() // 10 * 10 + 10
            await clock.advance_to(start + 2)
            await write(start, 2)
            await clock.advance(times % 2 and 4)
            if times % 3:
                [counts] = await history.read()
                assert counts.tasks["send"].completed == 5 * times + 2
            await write(start, 5)
            if times % 4:
                [counts] = await history.read()
                assert counts.tasks["send"].completed == 5 * times + 5
        assert counts.incidents["redelivered"] == counts.tasks["send"].completed == 5 * 12


async def test_counts_of_the_history_are_not_counted_again_after_hours_without_a_read() -> None:
    """The points of ten seconds are gone by then; those of a minute begin earlier."""
    clock = VirtualClock(1_767_614_400)
    async with VirtualBackend(clock) as backend:
        log = history_log(backend.settings)
        await backend.declare_log(log)

        async def write(start: float, step: int, completed: int) -> None:
            key = history_key(backend.settings.prefix, "a", "w", int(start), step)
            body = {"tasks": {"send": {"completed": completed}}}
            await backend.write(log.name, Write(key, dump_json(body)))

        history, start = HistoryCounts(backend), clock.time()
        await history.read()
        await write(start, 10, 5)
        await write(start, 60, 5)
        await clock.advance(150)  # the first half of the minute is settled
        [counts] = await history.read()
        assert counts.tasks["send"].completed == 5
        await write(start + 600, 60, 2)
        await clock.advance(4 * 3600)
        for _ in range(2):
            [counts] = await history.read()
            assert counts.tasks["send"].completed == 5 + 2


def test_workers_of_one_queue_in_one_process_are_counted_together() -> None:
    metrics = TaskMetrics(completed=3)
    metrics.wait.add(0.02)
    metrics.run.add(0.2)
    workers = [
        WorkerCounts("q", 4, 1, {"t": metrics}, {"redelivered": 2}),
        WorkerCounts("q", 2, 2, {"t": metrics, "u": TaskMetrics(failed=1)}, {"redelivered": 1}),
    ]
    text = render([], workers)
    of = {"queue": "q", "task": "t"}
    assert read(text, "asyncmq_worker_slots", {"queue": "q"}) == 6
    assert read(text, "asyncmq_worker_slots_busy", {"queue": "q"}) == 3
    assert read(text, "asyncmq_redeliveries_total", {"queue": "q"}) == 3
    assert read(text, "asyncmq_jobs_completed_total", of) == 6
    assert read(text, "asyncmq_jobs_failed_total", of | {"task": "u"}) == 1
    assert read(text, "asyncmq_job_run_seconds_bucket", of | {"le": "0.1"}) == 0
    assert read(text, "asyncmq_job_run_seconds_bucket", of | {"le": "0.25"}) == 2
    assert read(text, "asyncmq_job_run_seconds_bucket", of | {"le": "+Inf"}) == 2
    assert read(text, "asyncmq_job_run_seconds_sum", of) == pytest.approx(0.4)


def test_names_of_strangers_cannot_forge_a_line() -> None:
    name = 'a"} 1\nasyncmq_jobs{queue="x'
    text = render([], [WorkerCounts("q", 1, 0, {name: TaskMetrics(completed=1)})])
    assert read(text, "asyncmq_jobs_completed_total", {"queue": "q", "task": name}) == 1


async def test_without_the_extra_the_port_is_a_clear_error(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    monkeypatch.delitem(sys.modules, "asyncmq_nats.telemetry.prometheus", raising=False)
    import asyncmq_nats.telemetry

    monkeypatch.delattr(asyncmq_nats.telemetry, "prometheus", raising=False)
    async with InMemoryBackend(settings) as backend:
        with pytest.raises(InvalidArgument, match=r"asyncmq-nats\[prometheus\]"):
            await make_queue(backend).run()
