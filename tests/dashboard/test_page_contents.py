"""What the pages of queues, schedules, events and failures tell."""

import re
from typing import Any

import anyio
import httpx2 as httpx
import pytest

from asyncmq_nats.audit import read_audit
from asyncmq_nats.backends.base import Backend
from asyncmq_nats.contrib.dashboard.charts import charts_of
from asyncmq_nats.contrib.dashboard.failures import FailureGroups
from asyncmq_nats.contrib.dashboard.pages.failures import Look, look_at
from asyncmq_nats.metrics import MetricsHistory, MetricsPoint
from asyncmq_nats.queues import Queue
from asyncmq_nats.settings import Settings
from tests.dashboard.web import make_app, post, served, words_of
from tests.receiver import until
from tests.running import PATIENCE, counted, make_queue, only, run_jobs, running


async def break_down(text: str = "") -> None:
    raise ValueError(f"no {text!r} here")


async def succeed(*_: Any, **__: Any) -> str:
    return "done"


@pytest.fixture
def settings() -> Settings:
    return Settings(heartbeat_interval=0.5, unknown_task_timeout=0)


@pytest.fixture
def queue(backend: Backend) -> Queue:
    return make_queue(backend, break_down=break_down, succeed=succeed)


async def shows(client: httpx.AsyncClient, path: str, *texts: str) -> str:
    """Wait until a page has all these texts: what it shows may be read a moment before."""

    async def read() -> str:
        return words_of(await client.get(path))

    return await until(read, lambda page: all(text in page for text in texts))


# -- limits of a queue


async def test_limits_of_a_queue_are_told_and_what_is_at_work(
    queue: Queue, client: httpx.AsyncClient
) -> None:
    queue.rate_limit, queue.rate_interval = 5, 600.0
    await queue.add_bulk([{"task_id": "succeed"}] * 9)
    untold = "Rate limit set by workers: none runs"
    await shows(client, "/queues/work", "Concurrency limit no worker", untold)
    async with running(queue):
        await only(queue, waiting=4, completed=5)
        used = "Rate limit 5 starts in 10 min: 0 free, 0 leased to workers"
        await shows(client, "/queues/work", "0 of 3 slots at work, 1 worker", used)
        other = make_queue(queue.backend, concurrency=7)
        other.rate_limit = 0
        async with running(other):
            both = "0 : no job starts, or 5 starts in 10 min"
            await shows(client, "/queues/work", "0 of 10 slots at work, 2 workers", both)
            await shows(client, "/queues/work", "Its workers do not agree.")


async def test_a_queue_without_a_limit_says_so(queue: Queue, client: httpx.AsyncClient) -> None:
    await queue.add("succeed")
    async with running(queue):
        await shows(client, "/queues/work", "Rate limit none")


# -- schedules


async def test_schedules_show_their_last_run_and_its_outcome(
    queue: Queue, client: httpx.AsyncClient
) -> None:
    await queue.upsert_repeatable("break_down", 0.1, args=["milk"], limit=1, name="daily")
    await queue.upsert_repeatable("succeed", 0.1, limit=1, name="hourly")
    await queue.upsert_repeatable("succeed", 3600, name="later")
    await shows(client, "/schedules", "later work succeed Every hour in 59 min", "not yet on")
    async with running(queue):
        await only(queue, completed=1, failed=1)
    text = await shows(client, "/schedules", "ValueError: no &#39;milk&#39; here", "completed")
    when = r"(?:now|\S+ \S+ ago)"
    assert re.search(rf"daily work break_down .*? – {when} failed {when} ValueError", text), text
    page = await client.get("/queues/work/schedules")
    (link,) = re.findall(r'href="(/queues/work/jobs/daily-\d+)"', page.text)
    assert "no &#39;milk&#39; here" in (await client.get(link)).text
    await queue.remove_job(link.rpartition("/")[2])
    await shows(client, "/queues/work/schedules", "its job is gone")


# -- events


async def test_the_latest_events_are_shown_though_no_reader_listened(
    queue: Queue, client: httpx.AsyncClient
) -> None:
    await queue.add("break_down", ["milk"], job_id="bad")
    other = make_queue(queue.backend, "other", succeed=succeed)
    await other.add("succeed", job_id="good")
    await run_jobs(queue)
    await run_jobs(other)
    text = await shows(client, "/events", "failed bad work", "completed good other")
    assert text.index("completed good other") < text.index("failed bad work break_down ValueError")
    assert "failed bad" not in words_of(await client.get("/events?queue=other"))


async def test_of_very_many_queues_one_is_chosen_for_its_latest_events(
    queue: Queue, client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("asyncmq_nats.contrib.dashboard.pages.events.PAST_QUEUES", 0)
    job_id = await queue.add("succeed")
    text = words_of(await client.get("/events"))
    assert "choose one to see its latest events" in text
    assert job_id not in text


async def test_a_new_listener_is_told_what_it_missed(queue: Queue) -> None:
    job_id = await queue.add("succeed")
    app, lines = make_app(queue.backend), list[str]()
    with anyio.fail_after(PATIENCE):
        async with (
            served(app) as address,
            httpx.AsyncClient(base_url=address) as session,
            session.stream("GET", "/events/live") as answer,
        ):
            async for line in answer.aiter_lines():
                lines.append(line)
                if f'data-key="waiting work {job_id}"' in line:
                    break
    assert lines[-2] == "event: past"


# -- failures


@pytest.fixture
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("asyncmq_nats.contrib.dashboard.pages.failures.STEPS", (4, 8))
    monkeypatch.setattr("asyncmq_nats.contrib.dashboard.pages.failures.PAGE", 3)
    monkeypatch.setattr("asyncmq_nats.contrib.dashboard.pages.failures.LEAST", 2)


async def add_failures(queue: Queue, first: int, last: int, task: str = "break_down") -> None:
    for number in range(first, last):
        await queue.add(task, [f"{number}"], job_id=f"{task} {number}")
        await run_jobs(queue)


def further(page: httpx.Response) -> dict[str, str]:
    """Return the links to what was not looked at, by their text."""
    found = re.findall(r'<a class="button"[^>]* href="([^"]+)">([^<]+)</a>', page.text)
    return {text: path.replace("&amp;", "&") for path, text in found}


@pytest.mark.usefixtures("small_steps")
async def test_all_failures_can_be_looked_at_part_by_part(
    queue: Queue, client: httpx.AsyncClient
) -> None:
    await add_failures(queue, 0, 3, "missing")
    await add_failures(queue, 0, 8)
    page = await client.get("/queues/work/failures")
    text = words_of(page)
    assert "1 kind in the newest 4 of 11 failed jobs, back to" in text
    assert "not brought up to date" not in text
    links = further(page)
    assert set(links) >= {"Look at 8", "Older ones"}

    wider = await client.get(links["Look at 8"])
    text = words_of(wider)
    assert "1 kind in the newest 8 of 11 failed jobs" in text
    assert "not brought up to date by itself" in text
    assert "sse-connect" not in wider.text
    assert "Look at" not in "".join(further(wider))

    rest = await client.get(further(wider)["Older ones"])
    text = words_of(rest)
    assert "1 kind in 3 older ones of 11 failed jobs, from" in text
    assert "missing" in text
    assert "no &#39;" not in text
    assert "Older ones" not in further(rest)
    again = words_of(await client.get(further(rest)["Newest failures"]))
    assert "in the newest 4 of 11" in again


@pytest.mark.usefixtures("small_steps")
async def test_the_jobs_that_a_page_looked_at_are_acted_on_and_no_others(
    queue: Queue, client: httpx.AsyncClient
) -> None:
    await add_failures(queue, 0, 7)
    page = await client.get("/queues/work/failures")
    older = await client.get(further(page)["Older ones"])
    fields = dict(re.findall(r'<input type="hidden" name="(\w+)" value="([^"]*)">', older.text))
    answer = await post(client, "/queues/work/failures", fields | {"action": "retry"})
    assert "3 jobs were retried." in answer.headers["HX-Trigger"]
    await counted(queue)
    waiting = {job["id"] for job in await queue.list_jobs("waiting")}
    assert waiting == {f"break_down {number}" for number in range(3)}
    assert "the newest 4 of" not in words_of(await client.get("/queues/work/failures"))


@pytest.mark.usefixtures("small_steps")
async def test_of_many_queues_each_is_looked_at_and_the_rest_is_told(
    queue: Queue, client: httpx.AsyncClient
) -> None:
    others = [make_queue(queue.backend, f"q{n}", break_down=break_down) for n in range(4)]
    for other in others:
        await add_failures(other, 0, 1)
    await add_failures(queue, 0, 5)
    page = await client.get("/failures")
    text = words_of(page)
    assert "5 kinds in the newest 6 of 9 failed jobs" in text
    assert "work 2 5 Older ones" in text
    assert "Look at 8 of each queue" in text
    assert "in 3 older ones of 5" in words_of(await client.get(further(page)["Older ones"]))


async def test_a_look_that_takes_too_long_ends_and_can_go_on(
    queue: Queue, client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("asyncmq_nats.contrib.dashboard.pages.failures.PAGE", 2)
    monkeypatch.setattr("asyncmq_nats.contrib.dashboard.pages.failures.look_at", short_of_time)
    await add_failures(queue, 0, 3)
    page = await client.get("/queues/work/failures")
    assert "Looking was ended after some seconds" in words_of(page)
    assert "the newest 2 of 3" in words_of(page)
    assert "Look at 10,000" not in further(page)
    rest = await client.get(further(page)["Older ones"])
    assert "in 1 older ones of 3" in words_of(rest)


async def short_of_time(*args: Any, **options: Any) -> Look:
    return await look_at(*args, **options | {"seconds": 0.0})


async def test_very_many_jobs_of_a_kind_are_retried_while_the_page_tells_how_far_it_is(
    queue: Queue, client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("asyncmq_nats.contrib.dashboard.pages.failures.MAX_SELECTED", 2)
    await add_failures(queue, 0, 3)
    page = await client.get("/failures")
    fields = dict(re.findall(r'<input type="hidden" name="(\w+)" value="([^"]*)">', page.text))
    answer = await post(client, "/queues/work/failures", fields | {"action": "remove"})
    assert "3 jobs are being removed" in answer.headers["HX-Trigger"]
    await only(queue)
    text = words_of(await client.get("/failures"))
    assert "remove break_down: ValueError: no ‹text› here in work, 3 jobs, done" in text
    (entry,) = (await read_audit(queue.backend)).entries
    assert (entry.action, entry.count) == ("job.remove", 3)


def test_a_group_keeps_some_ids_and_counts_all() -> None:
    groups = FailureGroups()
    for number in range(1_000):
        job = {"id": f"{number}", "task": "t", "last_error": f"no {number}", "created_at": 5.0}
        groups.add("work", job)
    (group,) = groups.largest_first()
    assert (group.count, len(group.job_ids), group.job_ids[0]) == (1_000, 10, "0")


# -- charts


def test_a_chart_ends_with_the_last_point_that_workers_have_told_whole() -> None:
    def history(last: float, count: int = 4) -> MetricsHistory:
        points = [MetricsPoint(20.0 * n, 20.0, 20.0, slots=5.0) for n in range(count - 1)]
        points.append(MetricsPoint(20.0 * (count - 1), 20.0, last, slots=1.0))
        return MetricsHistory("work", 0, 80, 20, points)

    def shown(of: MetricsHistory) -> list[float]:
        return list(charts_of(of)["slots"]["at"])

    assert shown(history(5.0)) == [0, 20]  # of the third one, ten seconds may be missing
    assert shown(history(10.0)) == [0, 20, 40]
    assert shown(history(20.0)) == [0, 20, 40]
    assert shown(history(5.0, count=1)) == [0]  # rather little than nothing
    assert shown(MetricsHistory("work", 0, 80, 20, [])) == []
    hours = [MetricsPoint(3600.0 * n, 3600.0, 3600.0 if n == 0 else 60.0) for n in range(2)]
    assert shown(MetricsHistory("work", 0, 7200, 3600, hours)) == [0, 3600]


async def test_a_job_that_runs_is_shown_with_its_start_and_its_worker(
    backend: Backend, client: httpx.AsyncClient
) -> None:
    release = anyio.Event()
    queue = make_queue(backend, wait=release.wait)
    async with running(queue) as worker:
        job_id = await queue.add("wait")
        await shows(client, f"/queues/work/jobs/{job_id}", "Started", "Ran", f"Runs on {worker.id}")
        release.set()
