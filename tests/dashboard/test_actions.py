"""An action has its effect in the queue, is in the audit log, and is confirmed in words."""

import json
import re
from typing import Any
from urllib.parse import unquote

import anyio
import httpx2 as httpx
import pytest

from asyncmq_nats import Backoff, NATSBackend, current_job, task
from asyncmq_nats.audit import AuditEntry, read_audit, record_action
from asyncmq_nats.backends.base import Backend
from asyncmq_nats.contrib.dashboard.pages.events import reader_of
from asyncmq_nats.contrib.dashboard.pages.flow import read_graph
from asyncmq_nats.contrib.dashboard.pages.summaries import version_of
from asyncmq_nats.contrib.dashboard.redaction import MASK
from asyncmq_nats.flow import FlowProducer
from asyncmq_nats.jobs import Job
from asyncmq_nats.queues import Queue
from asyncmq_nats.settings import Settings
from asyncmq_nats.testing import VirtualBackend
from asyncmq_nats.workers import Worker
from tests.dashboard.web import client_of, make_app, post, words_of
from tests.receiver import until
from tests.running import counted, has, make_queue, only, run_jobs, running


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


async def entries(backend: Backend) -> list[tuple[str, str, str, int]]:
    page = await read_audit(backend)
    return [(each.who, each.action, each.target, each.count) for each in page.entries]


def said(answer: httpx.Response) -> str:
    """Return what an action had the browser say."""
    assert answer.status_code == 204, answer.text
    return str(json.loads(answer.headers["HX-Trigger"])["said"]["text"])


async def test_a_queue_is_paused_and_goes_on(queue: Queue, client: httpx.AsyncClient) -> None:
    await queue.add("succeed")
    assert said(await post(client, "/queues/work/pause")) == "Queue work is paused."
    assert await queue.is_paused()
    assert "paused" in words_of(await client.get("/queues/work"))
    assert said(await post(client, "/queues/work/resume")) == "Queue work goes on."
    assert not await queue.is_paused()
    assert [entry[:2] for entry in await entries(queue.backend)] == [
        ("local", "queue.resume"),
        ("local", "queue.pause"),
    ]


async def test_a_pause_for_a_while_ends_by_the_clock_of_the_server() -> None:
    backend = VirtualBackend()
    queue = make_queue(backend, succeed=succeed)
    await queue.add("succeed", delay=90_000)
    await backend.clock.advance(80_000)
    async with client_of(make_app(backend)) as client:
        assert "paused for 1h" in said(await post(client, "/queues/work/pause", {"for": "1h"}))
    info = await queue.info()
    assert info is not None
    assert info.paused_until == pytest.approx(backend.now() + 3600)


async def test_a_page_is_told_of_changes_only_when_there_are_some(
    queue: Queue,
) -> None:
    await queue.add("succeed", job_id="one")
    await queue.add("succeed", job_id="two", depends_on=["one"])
    app = make_app(queue.backend)
    pages = ("/", "/queues", "/schedules", "/failures", "/flows", "/workers")
    of_queue = ("", "/jobs", "/failures", "/schedules", "/jobs/one", "/jobs/one/flow")
    async with client_of(app) as client:
        for path in (*pages, *(f"/queues/work{each}" for each in of_queue)):
            page = await client.get(path)
            watched = re.search(r'sse-connect="/live\?topic=([^&]+)&amp;seen=([^"]*)"', page.text)
            assert watched is not None, path
            read = await reader_of(app.site, unquote(watched[1]))
            assert watched[2] == version_of(await read()), path


async def test_a_job_is_added_with_all_that_the_form_has(
    queue: Queue, client: httpx.AsyncClient
) -> None:
    await queue.add("succeed", job_id="parent")
    answer = await post(
        client,
        "/queues/work/add",
        {
            "task": "succeed",
            "args": '["ä", 1]',
            "kwargs": '{"k": [true]}',
            "retries": "2",
            "priority": "1",
            "delay": "1h",
            "ttl": "9000",
            "timeout": "2.5",
            "backoff": "3",
            "job_id": "new",
        },
    )
    assert json.loads(answer.headers["HX-Trigger"])["leave"]["to"] == "/queues/work/jobs/new"
    job = await queue.get_job("new")
    assert job is not None
    assert (job["args"], job["kwargs"], job["max_retries"]) == (["ä", 1], {"k": [True]}, 2)
    assert (job["priority"], job["ttl"], job["timeout"], job["backoff"]) == (1, 9000, 2.5, 3)
    assert job["status"] == "delayed"


@pytest.mark.parametrize(
    ("field", "value", "problem"),
    [
        ("task", "", "write the name of a task"),
        ("args", "{}", "must be a JSON list"),
        ("args", "[NaN]", "NaN is no JSON number"),
        ("args", "[" * 100_000, "args is not JSON"),
        ("kwargs", "[1]", "must be a JSON object"),
        ("retries", "many", "retries must be a whole number"),
        ("ttl", "-1", "ttl"),
        ("delay", "soon", "is not an interval"),
        ("job_id", "17", "digits only"),
        ("depends_on", "nobody", "has no job 'nobody'"),
    ],
)
async def test_a_wrong_field_is_named(
    queue: Queue, client: httpx.AsyncClient, field: str, value: str, problem: str
) -> None:
    await queue.add("succeed", job_id="one")
    answer = await post(client, "/queues/work/add", {"task": "succeed"} | {field: value})
    assert answer.status_code in (400, 404)
    assert problem in answer.text
    await has(queue, 1)


async def test_selected_jobs_are_retried_cancelled_promoted_and_removed(
    queue: Queue, client: httpx.AsyncClient
) -> None:
    for job_id in ("f1", "f2"):
        await queue.add("break_down", job_id=job_id)
    await run_jobs(queue)
    for job_id in ("d1", "d2", "d3"):
        await queue.add("succeed", delay=3600, job_id=job_id)

    async def act(action: str, *ids: str) -> str:
        return said(await post(client, "/queues/work/jobs", {"action": action, "id": ids}))

    assert await act("retry", "f1") == "1 job was retried."
    assert await act("promote", "d1", "f2") == "1 of 2 jobs were made ready."
    assert await act("cancel", "d2") == "1 job was cancelled."
    assert await act("remove", "d3", "f2") == "2 jobs were removed."
    await only(queue, waiting=2, cancelled=1)
    recorded = await entries(queue.backend)
    assert recorded[-1] == ("local", "job.retry", "f1", 1)
    assert recorded[0] == ("local", "job.remove", "", 2)


async def test_all_that_match_are_acted_on_and_no_others(
    queue: Queue, client: httpx.AsyncClient
) -> None:
    for number in range(30):
        await queue.add("break_down", [f"file {number}"])
    await queue.add("break_down", ["other"])
    await run_jobs(queue)
    form = {"action": "retry", "all": "yes", "state": "failed", "text": "no 'FILE"}
    assert "All jobs that match" in said(await post(client, "/queues/work/jobs", form))
    await only(queue, waiting=30, failed=1)
    assert (await entries(queue.backend))[0] == (
        "local",
        "job.retry",
        "state=failed text=no 'FILE",
        30,
    )
    assert "retry all that match, 30 jobs, done" in words_of(await client.get("/queues/work/jobs"))


@pytest.mark.parametrize(
    ("form", "problem"),
    [
        ({"action": "retry", "all": "yes", "state": "waiting"}, "retry is for jobs that are"),
        ({"action": "retry", "all": "yes", "state": "nowhere"}, "state must be one of"),
        ({"action": "remove", "all": "yes", "state": "any", "since": "soon"}, "since must be"),
        ({"action": "explode", "id": "a"}, "action must be one of"),
        ({"action": "remove"}, "select 1 to 1,000 jobs"),
    ],
)
async def test_an_action_that_means_nothing_is_refused(
    queue: Queue, client: httpx.AsyncClient, form: dict[str, str], problem: str
) -> None:
    await queue.add("succeed")
    answer = await post(client, "/queues/work/jobs", form)
    assert answer.status_code == 400
    assert problem in answer.text
    await has(queue, 1)


async def test_jobs_are_found(queue: Queue, client: httpx.AsyncClient) -> None:
    await queue.add("break_down", ["needle"], job_id="failed-one")
    await run_jobs(queue)
    await queue.add("succeed", ["hay"], job_id="waiting-one")
    await queue.add("succeed", ["needle"], job_id="waiting-two")
    await counted(queue)

    async def find(**query: str) -> set[str]:
        page = await client.get("/queues/work/jobs", params=query)
        assert page.status_code == 200
        ids = ("failed-one", "waiting-one", "waiting-two")
        return {each for each in ids if f'value="{each}"' in page.text}

    assert await find() == {"waiting-one", "waiting-two"}
    assert await find(state="failed") == {"failed-one"}
    assert await find(state="any", text="NEEDLE") == {"failed-one", "waiting-two"}
    assert await find(state="waiting", text="needle") == {"waiting-two"}
    assert await find(state="any", task="break_*") == {"failed-one"}
    assert await find(state="any", since="1h") == {"failed-one", "waiting-one", "waiting-two"}
    assert await find(state="any", until="1h") == set()
    worker = (await queue.get_job("failed-one") or {})["worker"]
    assert await find(state="any", worker=worker) == {"failed-one"}


async def test_pages_of_jobs_show_each_once(queue: Queue, client: httpx.AsyncClient) -> None:
    await queue.add_bulk({"task_id": "succeed", "job_id": f"job-{n:02}"} for n in range(45))
    path, seen = "/queues/work/jobs?size=20&order=oldest", list[str]()
    while path:
        text = (await client.get(path)).text
        seen += [part.split('"')[0] for part in text.split('name="id" value="')[1:]]
        link = text.partition('rel="next" href="')[2].partition('"')[0]
        path = link.replace("&amp;", "&")
    assert seen == [f"job-{n:02}" for n in range(45)]


async def test_one_job_is_told_whole(queue: Queue, client: httpx.AsyncClient) -> None:
    await queue.add(
        "break_down", ["milk"], {"password": "hunter2"}, retries=1, backoff=0.01, job_id="bad"
    )
    queue_of_one = make_queue(queue.backend, break_down=lambda text, password: 1 / 0)
    await run_jobs(queue_of_one)
    page = await client.get("/queues/work/jobs/bad")
    text = words_of(page)
    for part in (
        "failed",
        "milk",
        "Attempt 1",
        "Attempt 2",
        "ZeroDivisionError",
        "Traceback",
        "2 failed, 2 allowed",
        MASK,
    ):
        assert part in text
    assert "hunter2" not in page.text


async def test_a_job_that_is_not_there_is_told_so(queue: Queue, client: httpx.AsyncClient) -> None:
    await queue.add("succeed")
    page = await client.get("/queues/work/jobs/nobody")
    assert page.status_code == 404
    assert "has no job" in words_of(page)
    refused = await post(client, "/queues/work/jobs/nobody/retry")
    assert refused.status_code == 400
    assert "not there any more" in refused.text


async def test_arguments_are_edited_and_what_is_hidden_stays(
    queue: Queue, client: httpx.AsyncClient
) -> None:
    await queue.add("succeed", ["old"], {"token": "t"}, delay=3600, job_id="later")
    form = await client.get("/queues/work/jobs/later/edit")
    assert MASK in form.text
    changed = {"args": '["new"]', "kwargs": json.dumps({"token": MASK, "more": 1})}
    assert "new arguments" in said(await post(client, "/queues/work/jobs/later/edit", changed))
    job = await queue.get_job("later") or {}
    assert (job["args"], job["kwargs"]) == (["new"], {"token": "t", "more": 1})
    run_at = job["delay_until"]
    assert "runs in 3h" in said(
        await post(client, "/queues/work/jobs/later/reschedule", {"delay": "3h"})
    )
    job = await queue.get_job("later") or {}
    assert job["delay_until"] > run_at + 3600


def log_in(user: str, password: str) -> None: ...


async def test_secrets_are_on_no_page_and_stay_when_a_form_is_stored(
    queue: Queue, client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("asyncmq_nats.tasks.TASK_REGISTRY._tasks", {})
    task("work", name="log in")(log_in)
    arguments: tuple[list[Any], dict[str, Any]] = ["ada", "hunter2"], {"token": "hunter2"}
    meta = {"cookie": "hunter2"}
    await queue.add("log in", *arguments, delay=3600, job_id="one", meta=meta)
    await queue.upsert_repeatable("log in", 60, None, *arguments, name="often")
    entry = AuditEntry("cli", "job.edit", "work", "one", details={"kwargs": '{"token": "hunter2"}'})
    await record_action(queue.backend, entry)
    await counted(queue)
    job, schedule = "/queues/work/jobs/one", "/queues/work/schedule?name=often"
    lists = ("/queues/work/jobs?state=delayed", "/queues/work/jobs?state=any&text=ada")
    for path in (job, f"{job}/edit", schedule, *lists, "/audit"):
        page = await client.get(path)
        assert page.status_code == 200
        assert MASK in page.text, path
        assert "hunter2" not in page.text, path
    form = {"args": json.dumps(["eve", MASK]), "kwargs": json.dumps({"token": MASK})}
    said(await post(client, f"{job}/edit", form))
    stored = await queue.get_job("one") or {}
    assert (stored["args"], stored["kwargs"]) == (["eve", "hunter2"], {"token": "hunter2"})
    form |= {"id": "often", "name": "often", "task": "log in", "every": "60"}
    said(await post(client, "/queues/work/schedule", form))
    (info,) = await queue.list_repeatables()
    assert info.job_def["args"] == ["eve", "hunter2"]
    assert info.job_def["kwargs"] == {"token": "hunter2"}


async def test_failures_are_grouped_and_retried_as_a_group(
    queue: Queue, client: httpx.AsyncClient
) -> None:
    for number in range(5):
        await queue.add("break_down", [f"part {number}"])
    await queue.add("missing task")
    await run_jobs(queue)
    page = await client.get("/queues/work/failures")
    assert "2 kinds in 6 failed jobs" in words_of(page)
    assert "2 kinds in 6 failed jobs" in words_of(await client.get("/failures"))
    first = page.text.partition('name="group" value="')[2].partition('"')[0]
    answer = await post(client, "/queues/work/failures", {"action": "retry", "group": first})
    assert said(answer) == "5 jobs were retried."
    await only(queue, waiting=5, failed=1)
    gone = await post(client, "/queues/work/failures", {"action": "retry", "group": first})
    assert gone.status_code == 400


async def test_a_schedule_is_created_changed_paused_run_and_removed(
    queue: Queue, client: httpx.AsyncClient
) -> None:
    await queue.add("succeed", delay=9000)
    form = {
        "name": "nightly",
        "task": "succeed",
        "cron": "0 3 * * *",
        "timezone": "Europe/Berlin",
        "kwargs": '{"secret": "s"}',
        "retries": "1",
    }
    assert "Schedule nightly is stored" in said(await post(client, "/queues/work/schedule", form))
    text = words_of(await client.get("/schedules"))
    assert "At 03:00" in text
    assert "Europe/Berlin" in text
    twice = await post(client, "/queues/work/schedule", form)
    assert "there is a schedule of that name" in twice.text

    change = form | {
        "id": "nightly",
        "cron": "",
        "every": "6h",
        "kwargs": json.dumps({"secret": MASK}),
    }
    said(await post(client, "/queues/work/schedule", change))
    (info,) = await queue.list_repeatables()
    assert (info.job_def["every"], info.job_def["kwargs"]) == (21_600.0, {"secret": "s"})

    path = "/queues/work/schedules/nightly"
    said(await post(client, f"{path}/pause"))
    assert (await queue.list_repeatables())[0].paused
    said(await post(client, f"{path}/resume"))
    assert not (await queue.list_repeatables())[0].paused
    assert "was added" in said(await post(client, f"{path}/run"))
    await only(queue, waiting=1, delayed=1)
    said(await post(client, f"{path}/remove"))
    assert await queue.list_repeatables() == []
    assert (await post(client, f"{path}/run")).status_code == 400
    actions = [action for _, action, _, _ in await entries(queue.backend)]
    assert actions == [
        f"schedule.{each}" for each in ("remove", "run", "resume", "pause", "change", "create")
    ]


async def test_a_schedule_keeps_what_its_form_cannot_say(
    queue: Queue, client: httpx.AsyncClient
) -> None:
    backoff, start = Backoff("exponential", 2.0), queue.backend.now() // 1 + 9000.25
    await queue.upsert_repeatable(
        "succeed", 60, name="often", retries=3, backoff=backoff, start=start
    )
    before = (await queue.list_repeatables())[0].job_def
    page = await client.get("/queues/work/schedule", params={"name": "often"})
    fields = dict(re.findall(r'<input[^>]* name="([^"]+)"[^>]* value="([^"]*)"', page.text))
    said(await post(client, "/queues/work/schedule", fields | {"id": "often", "name": "often"}))
    assert (await queue.list_repeatables())[0].job_def == before
    said(await post(client, "/queues/work/schedules/often/run"))
    await counted(queue)
    (job,) = await queue.list_jobs("waiting")
    assert (job["max_retries"], job["backoff"]) == (3, backoff)


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"cron": "61 * * * *"}, "'61' is not a valid minute"),
        ({"every": "5m", "cron": "* * * * *"}, "give either every"),
        ({}, "give either every"),
        ({"every": "5m", "start": "soon"}, "start must be a time"),
        ({"every": "5m", "name": ""}, "give the schedule a name"),
    ],
)
async def test_a_malformed_schedule_is_refused(
    queue: Queue, client: httpx.AsyncClient, fields: dict[str, str], problem: str
) -> None:
    await queue.add("succeed")
    answer = await post(client, "/queues/work/schedule", {"name": "n", "task": "succeed"} | fields)
    assert answer.status_code == 400
    assert problem in answer.text
    assert await queue.list_repeatables() == []


async def test_a_queue_is_cleaned_drained_and_obliterated(
    queue: Queue, client: httpx.AsyncClient
) -> None:
    await queue.add("succeed")
    await run_jobs(queue)
    await queue.add("succeed")
    await queue.add("succeed", delay=3600)
    await counted(queue)
    clean = {"state": "completed", "age": "1d"}
    assert said(await post(client, "/queues/work/clean", clean)) == "0 completed jobs were removed."
    assert "1 completed" in said(await post(client, "/queues/work/clean", clean | {"age": "0"}))
    assert said(await post(client, "/queues/work/drain")) == "1 jobs were removed."
    refused = await post(client, "/queues/work/obliterate", {"name": "other"})
    assert refused.status_code == 400
    await has(queue, 1)
    assert "1 jobs" in said(await post(client, "/queues/work/obliterate", {"name": "work"}))
    await has(queue, 0)


async def test_a_form_works_without_a_script(queue: Queue, backend: Backend) -> None:
    await queue.add("succeed")
    async with client_of(make_app(backend)) as client:
        answer = await client.post(
            "/queues/work/pause", data={"": ""}, headers={"Origin": "http://127.0.0.1:8000"}
        )
        assert answer.status_code == 303
        assert answer.headers["location"] == "/"
    assert await queue.is_paused()


async def test_a_queue_or_a_job_is_found_by_its_name(
    queue: Queue, client: httpx.AsyncClient
) -> None:
    await FlowProducer(queue.backend).add_flow("work", [Job("succeed", job_id="a/b")])
    await Queue("other", queue.backend).add("succeed", job_id="twice")
    await queue.add("succeed", job_id="twice")

    async def find(text: str) -> httpx.Response:
        return await client.get("/find", params={"text": text})

    assert (await find("work")).headers["location"] == "/queues/work"
    assert (await find("a/b")).headers["location"] == "/queues/work/jobs/a%252Fb"
    assert "2 queues have a job" in words_of(await find("twice"))
    assert "work" in words_of(await find("wor"))
    assert "No queue and no job" in words_of(await find("nothing"))
    assert (await client.get("/find")).status_code == 200


async def test_probes_tell_that_the_server_is_away() -> None:
    backend = NATSBackend("nats://127.0.0.1:1")
    async with client_of(make_app(backend)) as client:
        for path in ("/health", "/ready"):
            answer = await client.get(path)
            assert answer.status_code == 503
            assert answer.json()["status"] == "unavailable"
    await backend.close()


async def test_probes_are_answered(backend: Backend, client: httpx.AsyncClient) -> None:
    for path in ("/health", "/ready"):
        answer = await client.get(path)
        assert answer.status_code == 200
        assert answer.json()["status"] == "ok"


async def test_workers_are_shown_with_what_they_run(
    queue: Queue, client: httpx.AsyncClient
) -> None:
    begun = anyio.Event()

    async def wait() -> None:
        begun.set()
        await anyio.sleep_forever()

    slow = make_queue(queue.backend, wait=wait)
    await slow.add("wait", job_id="slow-one")
    async with running(slow) as worker:
        await begun.wait()

        async def page() -> str:
            return words_of(await client.get("/workers"))

        assert str(worker.id) in await until(page, lambda text: "slow-one" in text)
        assert "healthy" in await page()
        assert "Runs on" in words_of(await client.get("/queues/work/jobs/slow-one"))
        await slow.cancel_job("slow-one")


async def test_a_worker_is_stopped(queue: Queue, client: httpx.AsyncClient) -> None:
    worker = Worker(queue)
    async with anyio.create_task_group() as group:
        await group.start(worker.run)
        assert "stops when its jobs" in said(await post(client, f"/workers/{worker.id}/stop"))
    assert (await post(client, f"/workers/{worker.id}/stop")).status_code == 400
    assert (await entries(queue.backend))[0] == ("local", "worker.stop", worker.id, 1)


async def test_the_audit_log_is_shown_and_narrowed_down(
    queue: Queue, client: httpx.AsyncClient
) -> None:
    await queue.add("succeed", job_id="one")
    await post(client, "/queues/work/pause")
    await post(client, "/queues/work/jobs/one/cancel")
    text = words_of(await client.get("/audit"))
    assert "queue.pause" in text
    assert "job.cancel work one 1" in text
    narrowed = words_of(await client.get("/audit", params={"action": "job."}))
    assert "job.cancel" in narrowed
    assert "queue.pause" not in narrowed
    assert "No one" in words_of(await client.get("/audit", params={"who": "eve"}))
    assert (await client.get("/audit", params={"after": "x"})).status_code == 400


async def test_a_flow_is_drawn_from_each_of_its_jobs(
    queue: Queue, client: httpx.AsyncClient
) -> None:
    flow = [
        Job("succeed", job_id="a"),
        Job("succeed", job_id="b"),
        Job("succeed", job_id="c", depends_on=["a", "b"]),
        Job("succeed", job_id="d", depends_on=["c"]),
    ]
    await FlowProducer(queue.backend).add_flow("work", flow)
    await queue.add("succeed", job_id="alone")
    for job_id in "abcd":
        page = await client.get(f"/queues/work/jobs/{job_id}/flow")
        assert page.text.count('class="edge"') == 3
        for other in "abcd":
            assert f'href="/queues/work/jobs/{other}"' in page.text
        assert "alone" not in page.text
    text = words_of(await client.get("/queues/work/jobs/c"))
    assert "Depends on waiting a waiting b" in text
    assert "Waited for by d" in text
    assert "Flow" in words_of(await client.get("/flows"))
    assert (await client.get("/queues/work/jobs/nobody/flow")).status_code == 404


async def test_a_flow_that_is_cut_says_so(queue: Queue) -> None:
    flow = [Job("succeed", job_id="root")]
    flow += [Job("succeed", job_id=f"near {n}", depends_on=["root"]) for n in range(2)]
    flow += [Job("succeed", job_id=f"far {n}", depends_on=["near 0"]) for n in range(3)]
    await FlowProducer(queue.backend).add_flow("work", flow)
    for most in range(1, 10):
        found = await read_graph(queue, "root", most)
        assert found is not None
        jobs, complete = found
        assert len(jobs) == min(most, 6)
        assert not (complete and len(jobs) < 6)
        assert complete or most < 9


async def test_the_server_is_told_of(queue: Queue, client: httpx.AsyncClient) -> None:
    await queue.add("succeed")
    text = words_of(await client.get("/server"))
    assert "answers" in text
    assert "work ready jobs 1" in text
    assert "checks are fine" in text
    assert "Nothing is wrong" in text or "What to do" in text


async def test_the_page_of_a_queue_tells_of_priorities_and_age(
    queue: Queue, client: httpx.AsyncClient
) -> None:
    await queue.add("succeed", priority=1)
    await queue.add("succeed", priority=9)
    await counted(queue)
    text = words_of(await client.get("/queues/work"))
    assert "Oldest waiting" in text
    assert "Priorities" in text
    assert re.search(r"\b1 1 0 5 0 0 9 1 0\b", text)


async def test_charts_count_what_the_workers_did(queue: Queue, client: httpx.AsyncClient) -> None:
    for _ in range(7):
        await queue.add("succeed")
    for _ in range(2):
        await queue.add("break_down")
    await run_jobs(queue)  # a worker writes its history when it stops, too
    for path in ("/queues/work/history", "/metrics/history"):
        charts = (await client.get(path)).json()
        chart = charts["throughput"]
        step = chart["at"][1] - chart["at"][0]
        counted = {line["label"]: sum(line["values"]) / 60 * step for line in chart["series"]}
        # The last point is of the running step: its rate is that of the part of it that is over.
        assert counted["completed"] >= 7
        assert counted["failed"] >= 2
        assert any(each is not None for each in charts["run"]["series"][0]["values"])
    text = words_of(await client.get("/metrics?queue=work"))
    assert "succeed 7 0 0" in text
    assert "break_down 0 2 0" in text
    assert (await client.get("/metrics?queue=nothing")).status_code == 404
    assert (await client.get("/queues/work/history?span=nonsense")).status_code == 200


async def test_prometheus_is_answered(queue: Queue, client: httpx.AsyncClient) -> None:
    pytest.importorskip("prometheus_client")
    await queue.add("succeed")
    await counted(queue)
    answer = await client.get("/metrics/prometheus")
    assert answer.headers["content-type"].startswith("text/plain")
    assert 'asyncmq_jobs{queue="work",state="waiting"} 1.0' in answer.text
    await run_jobs(queue)
    count = 'asyncmq_jobs_completed_total{queue="work",task="succeed"} 1.0'
    # An answer is used again for a second.
    await until(lambda: client.get("/metrics/prometheus"), lambda answer: count in answer.text)
    assert count not in (await client.get("/metrics/prometheus?only=queues")).text


async def test_the_log_of_a_job_is_shown(queue: Queue, client: httpx.AsyncClient) -> None:
    async def chat() -> None:
        current_job().log("half <b>done</b>", level="WARNING")

    chatty = make_queue(queue.backend, chat=chat)
    await chatty.add("chat", job_id="chatty")
    await run_jobs(chatty)
    page = await client.get("/queues/work/jobs/chatty")
    assert "WARNING half" in words_of(page)
    assert "half &lt;b&gt;done" in page.text
