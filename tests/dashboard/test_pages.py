"""What the pages of queues, schedules, events and failures tell."""

import re
from typing import Any

import anyio
import httpx2 as httpx
import pytest

from asyncmq_nats.backends.base import Backend
from asyncmq_nats.queues import Queue
from asyncmq_nats.settings import Settings
from tests.dashboard.web import make_app, served, words_of
from tests.receiver import until
from tests.running import PATIENCE, make_queue, only, run_jobs, running


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


async def test_the_latest_events_are_shown_though_nobody_listened(
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
