"""Progress reports are coalesced per job; the last one is always sent, before the outcome."""

import json
import threading
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from asyncmq_nats.backends.base import Backend, Signal
from asyncmq_nats.queues import Queue
from asyncmq_nats.runtime.registry import TaskRegistry
from asyncmq_nats.store.progress import FIRST_REPORTS, REPORT_INTERVAL, ProgressReports
from tests.receiver import holds
from tests.running import PATIENCE, running

MANY_REPORTS = 20_000


async def report_often(report_progress: Any) -> str:
    for number in range(MANY_REPORTS):
        report_progress(number / MANY_REPORTS, number)
    return "done"


def report_often_in_thread(report_progress: Any) -> str:
    for number in range(MANY_REPORTS):
        report_progress(number / MANY_REPORTS, number)
    return "done"


@pytest.mark.parametrize("function", [report_often, report_often_in_thread])
async def test_a_flood_of_reports_is_a_few_signals_and_the_last_one_is_among_them(
    backend: Backend, function: Any
) -> None:
    registry = TaskRegistry()
    registry.register(function, queue="work", name="report", progress=True)
    queue = Queue("work", backend, registry=registry)
    heard: list[tuple[str, Any]] = []
    over = anyio.Event()

    def hear(signal: Signal) -> None:
        what = signal.subject.split(".")[-2]
        heard.append((what, json.loads(signal.body).get("data")))
        if what == "completed":
            over.set()

    await backend.subscribe("amq.work.event.progress.*", hear)
    await backend.subscribe("amq.work.event.completed.*", hear)
    async with running(queue):
        job_id = await queue.add("report")
        assert await queue.wait_for(job_id, timeout=PATIENCE) == "done"
        with anyio.fail_after(PATIENCE):
            await over.wait()
    reports = [data for what, data in heard if what == "progress"]
    assert reports == sorted(reports)
    assert reports[-1] == MANY_REPORTS - 1
    assert len(reports) < MANY_REPORTS / 10
    job = await queue.get_job(job_id)
    assert job is not None
    assert (job["progress"], job["progress_data"]) == (
        (MANY_REPORTS - 1) / MANY_REPORTS,
        MANY_REPORTS - 1,
    )


async def test_reports_of_many_threads_are_each_the_latest() -> None:
    sent: list[tuple[str, bytes]] = []
    reports = ProgressReports(lambda token, body: sent.append((token, body)))
    reports.attach()

    def work(token: str) -> None:
        for number in range(500):
            reports.report(token, b"%d" % number)

    threads = [threading.Thread(target=work, args=(f"job-{n}",)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        await anyio.to_thread.run_sync(thread.join)
    await anyio.lowlevel.checkpoint()
    for number in range(8):
        reports.finish(f"job-{number}")
        own = [int(body) for token, body in sent if token == f"job-{number}"]
        assert own == sorted(own)
        assert own[-1] == 499
        assert len(own) < 100


async def test_a_job_that_goes_on_is_heard_of_without_another_report() -> None:
    sent: list[bytes] = []
    reports = ProgressReports(lambda _, body: sent.append(body))
    for number in range(FIRST_REPORTS + 5):
        reports.report("job", b"%d" % number)
    assert len(sent) == FIRST_REPORTS
    await holds(lambda: sent[-1] == b"14", 100 * REPORT_INTERVAL)
    assert len(sent) == FIRST_REPORTS + 1
    reports.finish("job")
    assert len(sent) == FIRST_REPORTS + 1


def test_a_report_after_the_worker_has_ended_is_nothing() -> None:
    reports = ProgressReports(lambda _, __: None)
    anyio.run(_attach, reports)
    reports.report("job", b"1")
    reports.finish("job")


async def _attach(reports: ProgressReports) -> None:
    reports.attach()
