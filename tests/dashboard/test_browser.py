"""A person at a real browser: each page is opened, clicked, and has its effect on a real server."""

import pytest

from asyncmq_nats.backends.nats.backend import NATSBackend
from asyncmq_nats.queues import Queue
from asyncmq_nats.settings import Settings
from tests.dashboard.web import Browser
from tests.receiver import until
from tests.running import make_queue, only, run_jobs, running


@pytest.fixture
def settings() -> Settings:
    return Settings(stalled_after=2.0, heartbeat_interval=0.5, shutdown_timeout=5.0)


async def break_down(text: str, password: str = "") -> None:
    raise ValueError(f"no {text!r} here")


async def succeed(*_: object) -> str:
    return "done"


@pytest.fixture
def queue(nats_backend: NATSBackend) -> Queue:
    return make_queue(nats_backend, "mail", break_down=break_down, succeed=succeed)


async def test_from_the_overview_to_a_job_that_is_retried(browser: Browser, queue: Queue) -> None:
    await queue.add("break_down", ["milk"], {"password": "hunter2"}, job_id="bad")
    await run_jobs(queue)
    await browser.open("/")
    await browser.click(".queues a", "mail")
    await browser.click(".cards a", "failed")
    await browser.click("table.jobs a", "bad")
    await browser.sees("ValueError: no 'milk' here", ".failure")
    await browser.sees("Attempt 1", ".attempt")
    assert "hunter2" not in await browser.text()
    await browser.click(".headline button", "Retry")
    await browser.sees("Job bad was retried.", "#said")
    await browser.sees("waiting", "h1")
    await only(queue, waiting=1)
    await run_jobs(queue)
    await browser.sees("failed", "h1")  # by itself: nothing was clicked


async def test_a_queue_is_paused_while_its_counts_are_watched(
    browser: Browser, queue: Queue
) -> None:
    await queue.add("succeed", delay=3600)
    await browser.open("/queues/mail")
    await browser.click(".headline button", "Pause")
    await browser.confirm()
    await browser.sees("paused", "h1")
    assert await queue.is_paused()
    await queue.add_bulk({"task_id": "succeed"} for _ in range(7))
    await browser.sees("7", "a.card.waiting")
    await browser.click(".headline button", "Resume")
    await browser.sees("running", "h1")
    assert not await queue.is_paused()


async def test_a_paused_page_stays_as_it_is(browser: Browser, queue: Queue) -> None:
    await queue.add("succeed")
    await browser.open("/queues/mail")
    await browser.sees("1", "a.card.waiting")
    await browser.click("#live-toggle")
    await browser.sees("Paused", "#live-toggle")
    await queue.add("succeed")
    await browser.run("document.body.dispatchEvent(new CustomEvent('sse:changed'))")
    assert "1" in await browser.text("a.card.waiting")
    await browser.click("#live-toggle")
    await browser.sees("2", "a.card.waiting")


async def test_selected_jobs_and_all_that_match(browser: Browser, queue: Queue) -> None:
    await queue.add_bulk({"task_id": "break_down", "args": [f"milk {n}"]} for n in range(25))
    await queue.add("break_down", ["bread"], job_id="bread")
    await run_jobs(queue)
    await browser.open("/queues/mail/jobs?state=failed")
    await browser.click("input[value=bread]")
    await browser.sees("1 selected", "#bulk")
    await browser.click("#bulk button", "Remove")
    await browser.sees("Remove the selected job?", "#confirm")
    await browser.confirm()
    await browser.sees("1 job was removed.", "#said")
    await only(queue, failed=25)
    await browser.write("input[name=text]", "milk 1")
    await browser.click(".search button", "Search")
    await browser.sees("milk 19", "table.jobs")
    await browser.click("#all-matching")
    await browser.click("#bulk button", "Retry")
    await browser.sees("Retry all jobs that match?", "#confirm")
    await browser.confirm()
    await only(queue, waiting=11, failed=14)
    await browser.sees("11 jobs, done", ".notices")


async def test_a_job_is_added_edited_and_made_ready(browser: Browser, queue: Queue) -> None:
    await queue.add("succeed", delay=3600)
    await browser.open("/queues/mail/add")
    await browser.write("input[name=task]", "succeed")
    await browser.write("textarea[name=args]", '["first"')
    await browser.write("input[name=delay]", "1h")
    await browser.write("input[name=job_id]", "mine")
    await browser.click("form button", "Add the job")
    await browser.sees("args is not JSON", "#said")
    await browser.write("textarea[name=args]", '["first"]')
    await browser.click("form button", "Add the job")
    await browser.sees("delayed", "h1")
    await browser.sees("Job mine was added.", "#said")
    await browser.click("a.button", "Edit")
    await browser.write("textarea[name=args]", '["second"]')
    await browser.click("form button", "Store")
    await browser.sees("second", ".code")
    await browser.click(".headline button", "Run now")
    await browser.sees("waiting", "h1")
    job = await queue.get_job("mine") or {}
    assert (job["args"], job["status"]) == (["second"], "waiting")
    # What is refused here is a line in the browser's log, too.
    assert all("400" in each for each in await browser.problems())


async def test_a_schedule_is_made_and_run(browser: Browser, queue: Queue) -> None:
    await queue.add("succeed", delay=3600)
    await browser.open("/queues/mail/schedules")
    await browser.click("a.button", "New schedule")
    await browser.write("input[name=name]", "weekly")
    await browser.write("input[name=cron]", "0 7 * * mon")
    await browser.write("input[name=task]", "succeed")
    await browser.click("form button", "Store")
    await browser.sees("At 07:00, only on Monday", "table.schedules")
    await browser.click("table.schedules button", "Run now")
    await browser.sees("waiting", "h1")
    await only(queue, waiting=1, delayed=1)
    await browser.open("/schedules")
    await browser.click("table.schedules button", "Pause")
    await browser.sees("paused", "table.schedules")
    assert (await queue.list_repeatables())[0].paused
    await browser.click("table.schedules button", "Remove")
    await browser.confirm()
    await browser.sees("Nothing is scheduled.")
    assert await queue.list_repeatables() == []


async def test_a_kind_of_failure_is_retried(browser: Browser, queue: Queue) -> None:
    await queue.add_bulk({"task_id": "break_down", "args": [f"milk {n}"]} for n in range(3))
    await run_jobs(queue)
    await browser.open("/failures")
    await browser.sees("1 kind in 3 failed jobs")
    await browser.click(".group button", "Retry all")
    await browser.confirm()
    await browser.sees("No job is failed.")
    await only(queue, waiting=3)


async def test_everything_is_removed_only_after_its_name_was_written(
    browser: Browser, queue: Queue
) -> None:
    await queue.add("succeed")
    await browser.open("/queues/mail")
    await browser.click("summary", "clean up")
    await browser.write("input[name=name]", "mail")
    await browser.click(".panels button", "Obliterate")
    disabled = "return document.querySelector('#confirm button[value=yes]').disabled"
    await until(lambda: browser.run("return document.querySelector('#confirm').open"), bool)
    assert await browser.run(disabled)
    await browser.confirm(typed="mail")
    await browser.sees("Everything of mail was removed", "#said")
    await only(queue)


async def test_events_come_as_they_happen(browser: Browser, queue: Queue) -> None:
    await queue.add("succeed", delay=3600)
    await browser.open("/events?queue=mail")

    async def see() -> str:
        await queue.add("break_down", ["x"])
        return await browser.text("#feed")

    async with running(queue):
        text = await until(see, lambda found: "failed" in found)
    assert "break_down" in text
    assert "no 'x' here" in text
    assert "started" not in text  # there are many of them: not shown at first


async def test_events_of_before_are_there_and_come_once(browser: Browser, queue: Queue) -> None:
    await queue.add("break_down", ["old"], job_id="old")
    await run_jobs(queue)
    await browser.open("/events")
    await browser.sees("no 'old' here", "#feed")
    await queue.add("break_down", ["new"], job_id="new")
    await run_jobs(queue)
    await browser.sees("no 'new' here", "#feed")
    # As if the tab had been hidden: its stream ends, and what it missed is made up for.
    hide = "Object.defineProperty(document, 'hidden', {value: arguments[0], configurable: true});"
    hide += "document.dispatchEvent(new Event('visibilitychange'))"
    await browser.run(hide, True)
    await queue.add("break_down", ["missed"], job_id="missed")
    await run_jobs(queue)
    await browser.run(hide, False)
    await browser.sees("no 'missed' here", "#feed")
    rows = (
        "return [...document.querySelectorAll('#feed li:not([hidden]) .id')].map(e => e.innerText)"
    )
    assert await browser.run(rows) == ["missed", "new", "old"]
    await browser.click("#feed-filter label", "failed")
    await browser.sees("No event of the chosen kinds yet.")


async def test_keys_and_colours(browser: Browser, queue: Queue) -> None:
    await queue.add("succeed", job_id="needle")
    await browser.open("/")

    async def press(keys: str) -> None:
        for key in keys:
            await browser.run(
                "document.body.dispatchEvent("
                "new KeyboardEvent('keydown', {key: arguments[0], bubbles: true}))",
                key,
            )

    colour = "return getComputedStyle(document.documentElement).backgroundColor"
    before = await browser.run(colour)
    await press("t")
    assert await browser.run(colour) != before
    await press("?")
    await browser.sees("Find a queue or a job", "#keys")
    await browser.click("#keys button", "Close")
    await press("gq")
    await until(lambda: browser.run("return location.pathname"), lambda path: path == "/queues")
    await until(lambda: browser.run("return document.documentElement.dataset.ready"), bool)
    assert await browser.run(colour) != before
    await press("/")
    await browser.write("#find-text", "needle")
    await browser.click("#find button", "Go")
    await browser.sees("needle", "h1")
    await browser.run("localStorage.removeItem('amq-theme')")


NARROW = (
    "/",
    "/queues",
    "/queues/mail",
    "/queues/mail/jobs?state=failed",
    "/queues/mail/jobs/bad",
    "/failures",
    "/schedules",
    "/workers",
    "/events",
    "/queues/mail/add",
    "/queues/mail/schedule",
)


async def test_every_page_fits_a_telephone_and_can_be_read_aloud(
    browser: Browser, queue: Queue
) -> None:
    text = "a-word-without-end-" * 20
    await queue.add("break_down", [text], job_id="bad")
    await queue.add("break_down", [text], job_id=text[:150])
    await queue.upsert_repeatable(
        "succeed", cron="0 7 * * mon-fri", name="a-rather-long-name-of-it"
    )
    async with running(queue):
        await only(queue, failed=2)
        await _narrow(browser, True)
        try:
            for path in NARROW:
                await browser.open(path)
                width = await browser.run("return document.documentElement.scrollWidth")
                assert (path, width) == (path, 360)
                assert (path, await browser.inspect("findMalformed")) == (path, [])
        finally:
            await _narrow(browser, False)


async def _narrow(browser: Browser, on: bool) -> None:
    metrics = {"width": 360, "height": 740, "deviceScaleFactor": 1, "mobile": True}
    command = "Emulation.setDeviceMetricsOverride" if on else "Emulation.clearDeviceMetricsOverride"
    await browser.do(lambda: browser.driver.execute_cdp_cmd(command, metrics if on else {}))
