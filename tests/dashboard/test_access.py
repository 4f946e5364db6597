"""Access to the dashboard: logins, roles, foreign origins, and attacks."""

import re
from base64 import b64encode
from pathlib import Path
from typing import Any

import anyio
import httpx2 as httpx
import pytest
from starlette.requests import Request
from starlette.routing import Route

from asyncmq_nats import InMemoryBackend, InvalidArgument, Queue
from asyncmq_nats.audit import AuditEntry, read_audit, record_action
from asyncmq_nats.contrib.dashboard import (
    Account,
    BasicLogin,
    Dashboard,
    HookLogin,
    Role,
    SessionLogin,
    User,
    hash_password,
    read_accounts,
)
from asyncmq_nats.contrib.dashboard.access import MAX_FAILURES, is_loopback
from asyncmq_nats.contrib.dashboard.app import OPEN_PATHS
from asyncmq_nats.contrib.dashboard.pages import ROUTES
from asyncmq_nats.contrib.dashboard.redaction import Shown
from asyncmq_nats.workers import Worker, list_workers
from tests.dashboard.web import ORIGIN, SAME_ORIGIN, client_of, make_app, post, served
from tests.receiver import PATIENCE, until
from tests.running import has, make_queue, run_jobs, running

ACCOUNTS = {"ada": ("right", "operator"), "vic": ("see", "viewer")}
PAGES = ("/", "/queues", "/queues/work", "/queues/work/jobs", "/failures", "/live?topic=queues")


@pytest.fixture
async def memory() -> InMemoryBackend:
    backend = InMemoryBackend()
    await Queue("work", backend).add("task", ["x"], job_id="one")
    return backend


def basic(name: str, password: str) -> dict[str, str]:
    return {"Authorization": "Basic " + b64encode(f"{name}:{password}".encode()).decode()}


# -- without a login


@pytest.mark.parametrize("address", ["192.0.2.7", "10.0.0.3", "2001:db8::1"])
async def test_without_a_login_no_other_machine_is_answered(
    memory: InMemoryBackend, address: str
) -> None:
    async with client_of(make_app(memory), client=(address, 5000)) as client:
        for path in PAGES:
            answer = await client.get(path)
            assert answer.status_code == 403
            assert "has no login" in answer.text
        assert (await client.get("/health")).status_code == 200


@pytest.mark.parametrize("host", ["rebound.example.org", "192.0.2.7:8000", "localhost.example.org"])
async def test_a_page_of_another_name_that_points_here_is_refused(
    memory: InMemoryBackend, host: str
) -> None:
    async with client_of(make_app(memory)) as client:
        assert (await client.get("/queues", headers={"Host": host})).status_code == 403


@pytest.mark.parametrize("header", ["Forwarded", "X-Forwarded-For", "X-Real-IP"])
async def test_what_a_proxy_passes_on_is_refused_without_a_login(
    memory: InMemoryBackend, header: str
) -> None:
    async with client_of(make_app(memory)) as client:
        answer = await client.get("/queues", headers={header: "192.0.2.7"})
        assert answer.status_code == 403


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "localhost", "[::1]", "::1", "a.localhost", "127.8.8.8"]
)
def test_these_are_this_machine(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize("host", ["", "0.0.0.0", "example.org", "128.0.0.1", "localhost.org", "::"])
def test_these_are_not(host: str) -> None:
    assert not is_loopback(host)


# -- foreign origins

NAMES = {"queue": "work", "job": "one", "name": "often", "worker": "nobody"}
ACTIONS = tuple(
    route.path.format_map(NAMES)
    for route in ROUTES
    if isinstance(route, Route) and "POST" in (route.methods or ()) and route.path not in OPEN_PATHS
)
"""All of them, those of later releases too."""


@pytest.mark.parametrize("path", ACTIONS)
@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Origin": "https://evil.example.org"},
        {"Origin": "null"},
        {"Origin": ORIGIN + ".evil.example.org"},
        {"Origin": ORIGIN, "Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
        {"Sec-Fetch-Site": "none"},
    ],
    ids=str,
)
async def test_an_action_from_elsewhere_is_refused(
    memory: InMemoryBackend, path: str, headers: dict[str, str]
) -> None:
    async with client_of(make_app(memory)) as client:
        answer = await client.post(path, data={"name": "work", "task": "t"}, headers=headers)
        assert answer.status_code == 403
        assert "no action of this dashboard" in answer.text
    queue = Queue("work", memory)
    await has(queue, 1)
    assert not await queue.is_paused()


async def test_a_trusted_origin_may_act(memory: InMemoryBackend) -> None:
    app = make_app(memory, trusted_origins=["https://jobs.example.org"])
    async with client_of(app) as client:
        answer = await post(
            client, "/queues/work/pause", headers={"Origin": "https://jobs.example.org"}
        )
        assert answer.status_code == 204
    assert await Queue("work", memory).is_paused()


async def test_nothing_is_changed_by_asking_for_a_page(memory: InMemoryBackend) -> None:
    async with client_of(make_app(memory)) as client:
        for path in (*ACTIONS, "/logout"):
            assert (await client.get(path)).status_code in (200, 400, 404, 405)
    queue = Queue("work", memory)
    await has(queue, 1)
    assert not await queue.is_paused()


# -- roles


async def test_a_viewer_looks_and_does_nothing(memory: InMemoryBackend) -> None:
    async with client_of(make_app(memory, login=BasicLogin(ACCOUNTS))) as client:
        page = await client.get("/queues/work/jobs/one", headers=basic("vic", "see"))
        assert page.status_code == 200
        assert "Remove" not in page.text
        for path in ACTIONS:
            answer = await post(client, path, {"name": "work"}, headers=basic("vic", "see"))
            assert answer.status_code == 403
            assert "viewers look only" in answer.text
        assert (
            "Remove"
            in (await client.get("/queues/work/jobs/one", headers=basic("ada", "right"))).text
        )
        assert (
            await post(client, "/queues/work/pause", headers=basic("ada", "right"))
        ).status_code == 204
    assert await Queue("work", memory).count() == 1


async def test_a_read_only_dashboard_does_nothing_for_anybody(memory: InMemoryBackend) -> None:
    async with client_of(make_app(memory, read_only=True)) as client:
        assert "read-only" in (await client.get("/queues/work")).text
        for path in ACTIONS:
            assert (await post(client, path, {"name": "work"})).status_code == 403
    assert await Queue("work", memory).count() == 1


async def test_only_the_chosen_queues_are_shown(memory: InMemoryBackend) -> None:
    await Queue("payroll", memory).add("task", job_id="pay")
    async with client_of(make_app(memory, queues=["work"])) as client:
        assert "payroll" not in (await client.get("/queues")).text
        assert (await client.get("/queues.json")).json() == ["work"]
        for path in ("", "/jobs", "/jobs/pay", "/failures", "/schedules"):
            assert (await client.get(f"/queues/payroll{path}")).status_code == 404
        assert (await client.get("/live?topic=queue:payroll")).status_code == 404
        assert (await client.get("/events/live?queue=payroll")).status_code == 404
        assert (await post(client, "/queues/payroll/pause")).status_code == 404


async def test_nothing_of_another_queue_is_on_any_page(memory: InMemoryBackend) -> None:
    async def fail() -> None:
        raise ValueError("no salary")

    tasks: dict[str, Any] = {"hidden_task": fail}
    payroll = make_queue(memory, "payroll", **tasks)
    await payroll.add("hidden_task", job_id="hidden_job")
    await run_jobs(payroll)
    await payroll.add("hidden_task", delay=60, job_id="hidden_later")
    await payroll.upsert_repeatable("hidden_task", 60, name="hidden_schedule")
    await record_action(memory, AuditEntry("cli", "queue.pause", "payroll", "hidden_target"))
    pages = [route.path for route in ROUTES if isinstance(route, Route) and "{" not in route.path]
    asked = [path for path in pages if path not in OPEN_PATHS and "live" not in path]
    async with (
        client_of(make_app(memory, queues=["work"])) as client,
        client_of(make_app(memory)) as all_seeing,
        running(payroll) as worker,
    ):
        found = ""
        for path in asked:
            answer = await client.get(path)
            for word in ("payroll", "hidden_", str(worker.id), "no salary"):
                assert word not in answer.text, path
            found += (await all_seeing.get(path)).text
        for word in ("payroll", "hidden_job", "hidden_schedule", "hidden_target", str(worker.id)):
            assert word in found
        for text in ("hidden_job", "payroll"):
            assert "No queue and no job" in (await client.get(f"/find?text={text}")).text
        assert "hidden_target" not in (await client.get("/audit?queue=payroll")).text
        for path in ("/metrics?queue=payroll", "/events?queue=payroll"):
            assert (await client.get(path)).status_code == 404
        stop = await post(client, f"/workers/{worker.id}/stop")
        assert "no such worker answers" in stop.text


async def test_a_worker_that_runs_hidden_queues_too_is_not_stopped(
    memory: InMemoryBackend,
) -> None:
    worker = Worker([Queue("work", memory), Queue("payroll", memory)])
    async with anyio.create_task_group() as group:
        await group.start(worker.run)
        async with client_of(make_app(memory, queues=["work"])) as client:
            refused = await post(client, f"/workers/{worker.id}/stop")
        assert "queues that are not shown here" in refused.text
        assert not any(each.stopping for each in await list_workers(memory))
        async with client_of(make_app(memory)) as client:
            assert (await post(client, f"/workers/{worker.id}/stop")).status_code == 204


async def test_older_entries_of_the_audit_log_are_found_behind_those_of_hidden_queues(
    memory: InMemoryBackend,
) -> None:
    await record_action(memory, AuditEntry("ada", "queue.pause", "work"))
    for _ in range(60):
        await record_action(memory, AuditEntry("cli", "queue.pause", "payroll"))
    async with client_of(make_app(memory, queues=["work"])) as client:
        path, text = "/audit", ""
        while path:
            text = (await client.get(path)).text
            path = text.partition('rel="next" href="')[2].partition('"')[0].replace("&amp;", "&")
    assert "ada" in text


# -- logins


@pytest.mark.parametrize(
    "headers",
    [
        {},
        basic("ada", "wrong"),
        basic("eve", "right"),
        basic("", ""),
        {"Authorization": "Basic %%"},
        {"Authorization": "Bearer x"},
    ],
    ids=str,
)
async def test_basic_login_refuses_a_stranger(
    memory: InMemoryBackend, headers: dict[str, str]
) -> None:
    async with client_of(make_app(memory, login=BasicLogin(ACCOUNTS))) as client:
        for path in PAGES:
            answer = await client.get(path, headers=headers)
            assert answer.status_code == 401
            assert answer.headers["WWW-Authenticate"].startswith("Basic")
        assert (await post(client, "/queues/work/pause", headers=headers)).status_code == 401
    assert not await Queue("work", memory).is_paused()


async def test_who_guesses_is_slowed_down(memory: InMemoryBackend) -> None:
    async with client_of(make_app(memory, login=BasicLogin(ACCOUNTS))) as client:
        answers = [await client.get("/", headers=basic("ada", f"{n}")) for n in range(MAX_FAILURES)]
        assert answers[0].status_code == 401
        assert answers[-1].status_code == 429
        # The right one is not even looked at.
        assert (await client.get("/", headers=basic("ada", "right"))).status_code == 429
    async with client_of(make_app(memory, login=SessionLogin(ACCOUNTS))) as client:
        for guess in range(MAX_FAILURES):
            assert (await log_in(client, password=f"{guess}")).status_code == 401
        assert (await log_in(client)).status_code == 429


async def test_many_guesses_at_once_tell_no_more_than_one_after_the_other(
    memory: InMemoryBackend,
) -> None:
    login = SessionLogin({"ada": hash_password("right")})
    answers: list[int] = []

    async with client_of(make_app(memory, login=login)) as client:

        async def guess(password: str) -> None:
            answers.append((await log_in(client, password=password)).status_code)

        async with anyio.create_task_group() as group:
            for number in range(50):  # more than there are threads for
                group.start_soon(guess, f"{number}")
            group.start_soon(guess, "right")
    assert len(answers) == 51
    assert set(answers) <= {401, 429}


async def test_one_who_guesses_is_not_forgotten_while_others_guess(
    memory: InMemoryBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("asyncmq_nats.contrib.dashboard.access.MAX_CLIENTS", 2)
    app = make_app(memory, login=SessionLogin(ACCOUNTS))
    async with (
        client_of(app, client=("192.0.2.1", 1)) as first,
        client_of(app, client=("192.0.2.2", 1)) as second,
    ):
        for number in range(MAX_FAILURES):
            assert (await log_in(first, password=f"{number}")).status_code == 401
            assert (await log_in(second, password=f"{number}")).status_code == 401
        assert (await log_in(first)).status_code == 429


async def log_in(client: httpx.AsyncClient, name: str = "ada", password: str = "right") -> Any:
    data = {"name": name, "password": password}
    return await client.post("/login?next=/queues/work", data=data, headers=SAME_ORIGIN)


async def test_a_session_begins_and_ends(memory: InMemoryBackend) -> None:
    async with client_of(make_app(memory, login=SessionLogin(ACCOUNTS))) as client:
        stranger = await client.get("/queues/work?a=b")
        assert stranger.headers["location"] == "/login?next=/queues/work%3Fa%3Db"
        assert "Password" in (await client.get("/login")).text
        refused = await log_in(client, password="wrong")
        assert refused.status_code == 401
        assert "set-cookie" not in refused.headers
        welcome = await log_in(client)
        assert welcome.headers["location"] == "/queues/work"
        cookie = welcome.headers["set-cookie"]
        assert "HttpOnly" in cookie
        assert "SameSite=lax" in cookie
        assert "Max-Age=43200" in cookie
        assert "Secure" not in cookie
        assert "ada" in (await client.get("/queues/work")).text
        assert (await post(client, "/queues/work/pause")).status_code == 204
        await client.post("/logout", data={"": ""}, headers=SAME_ORIGIN)
        assert (await client.get("/queues/work")).status_code == 303


async def test_a_cookie_of_https_is_for_https_only(memory: InMemoryBackend) -> None:
    address = ORIGIN.replace("http", "https")
    async with client_of(make_app(memory, login=SessionLogin(ACCOUNTS))) as client:
        data = {"name": "ada", "password": "right"}
        answer = await client.post(f"{address}/login", data=data, headers={"Origin": address})
        assert "Secure" in answer.headers["set-cookie"]


async def test_only_who_has_a_session_is_offered_to_end_it(memory: InMemoryBackend) -> None:
    async with client_of(make_app(memory, login=SessionLogin(ACCOUNTS))) as client:
        await log_in(client)
        assert 'action="/logout"' in (await client.get("/")).text
    async with client_of(make_app(memory, login=BasicLogin(ACCOUNTS))) as client:
        page = await client.get("/", headers=basic("vic", "see"))
        assert "vic" in page.text
        assert "/logout" not in page.text


async def test_a_forged_or_foreign_session_is_refused(memory: InMemoryBackend) -> None:
    login = SessionLogin(ACCOUNTS, secret="one")
    async with client_of(make_app(memory, login=SessionLogin(ACCOUNTS, secret="two"))) as other:
        await log_in(other)
        stolen = other.cookies["amq_session"]
    async with client_of(make_app(memory, login=login)) as client:
        await log_in(client)
        good = client.cookies["amq_session"]
        client.cookies.clear()
        for value in (stolen, good[:-2] + "xx", "x" + good, "", "a.b.c"):
            headers = {"Cookie": f"amq_session={value}"}
            assert (await client.get("/", headers=headers)).status_code == 303
        assert (await client.get("/", headers={"Cookie": f"amq_session={good}"})).status_code == 200


async def test_a_session_ends_with_its_account_password_and_time(memory: InMemoryBackend) -> None:
    async with client_of(make_app(memory, login=SessionLogin(ACCOUNTS, "key"))) as client:
        await log_in(client)
        cookie = {"Cookie": f"amq_session={client.cookies['amq_session']}"}
    later: list[Any] = [
        SessionLogin({"vic": ("see", "viewer")}, "key"),
        SessionLogin({"ada": ("changed", "operator")}, "key"),
        SessionLogin(ACCOUNTS, "key", lifetime=-1),
    ]
    for login in later:
        async with client_of(make_app(memory, login=login)) as client:
            assert (await client.get("/", headers=cookie)).status_code == 303
    async with client_of(make_app(memory, login=SessionLogin(ACCOUNTS, "key"))) as client:
        assert (await client.get("/", headers=cookie)).status_code == 200


@pytest.mark.parametrize(
    "target",
    ["https://evil.example.org", "//evil.example.org", "/\\evil.example.org", "javascript:x"],
)
async def test_a_login_leads_to_a_page_of_the_dashboard_only(
    memory: InMemoryBackend, target: str
) -> None:
    async with client_of(make_app(memory, login=SessionLogin(ACCOUNTS))) as client:
        answer = await client.post(
            "/login",
            params={"next": target},
            data={"name": "ada", "password": "right"},
            headers=SAME_ORIGIN,
        )
        assert answer.headers["location"] == "/"


@pytest.mark.parametrize("target", ["https://evil.example.org", "//evil.example.org", "/\\evil"])
async def test_a_form_without_a_script_leads_to_a_page_of_the_dashboard_only(
    memory: InMemoryBackend, target: str
) -> None:
    async with client_of(make_app(memory)) as client:
        for back, leads_to in ((target, "/"), ("/queues?sort=name", "/queues?sort=name")):
            answer = await client.post(
                "/queues/work/pause", params={"back": back}, data={"": ""}, headers=SAME_ORIGIN
            )
            assert answer.headers["location"] == leads_to


async def test_the_audit_log_has_the_name_of_the_login(memory: InMemoryBackend) -> None:
    async with client_of(make_app(memory, login=BasicLogin(ACCOUNTS))) as client:
        await post(client, "/queues/work/pause", headers=basic("ada", "right"))
    assert [each.who for each in (await read_audit(memory)).entries] == ["ada"]


async def test_a_login_of_ones_own(memory: InMemoryBackend) -> None:
    async def by_header(request: Request) -> User | None:
        name = request.headers.get("x-user")
        return None if name is None else User(name, Role.VIEWER)

    async with client_of(make_app(memory, login=HookLogin(by_header))) as client:
        assert (await client.get("/")).status_code == 403
        assert (await client.get("/", headers={"X-User": "mia"})).status_code == 200
        assert (
            await post(client, "/queues/work/pause", headers={"X-User": "mia"})
        ).status_code == 403
    away = HookLogin(lambda _: None, login_url="https://id.example.org")
    async with client_of(make_app(memory, login=away)) as client:
        assert (await client.get("/")).headers["location"] == "https://id.example.org"


async def test_accounts_come_from_a_file(tmp_path: Path, memory: InMemoryBackend) -> None:
    path = tmp_path / "accounts"
    path.write_text(f"# people\nada:operator:{hash_password('a:b')}\n\nvic:viewer:plain\n")
    accounts = read_accounts(path)
    assert {name: account.role for name, account in accounts.items()} == {
        "ada": Role.OPERATOR,
        "vic": Role.VIEWER,
    }
    assert "a:b" not in path.read_text()
    async with client_of(make_app(memory, login=BasicLogin(accounts))) as client:
        assert (await client.get("/", headers=basic("ada", "a:b"))).status_code == 200
        assert (await client.get("/", headers=basic("vic", "plain"))).status_code == 200
        assert (await client.get("/", headers=basic("ada", "plain"))).status_code == 401


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("ada:secret\n", "line 1 must be name:role:password"),
        ("ada:admin:secret\n", "role of 'ada' must be one of viewer, operator"),
        ("ada:viewer:\n", "needs a name"),
        ("# no one\n", "at least one account"),
    ],
)
def test_a_malformed_file_of_accounts_is_refused(tmp_path: Path, text: str, problem: str) -> None:
    path = tmp_path / "accounts"
    path.write_text(text)
    with pytest.raises(InvalidArgument, match=problem) as caught:
        read_accounts(path)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "accounts", [{}, {"ada": ("secret",)}, {"ada": ""}, {"ada": ("secret", "admin")}, {"a:b": "c"}]
)
def test_malformed_accounts_are_refused(accounts: dict[str, Any]) -> None:
    for login in (SessionLogin, BasicLogin):
        with pytest.raises(InvalidArgument) as caught:
            login(accounts)
        assert "secret" not in str(caught.value)


def test_a_password_is_not_shown() -> None:
    assert "secret" not in repr(Account("ada", "secret"))


# -- headers, paths, scripts


async def test_every_answer_forbids_foreign_scripts_and_frames(memory: InMemoryBackend) -> None:
    async with client_of(make_app(memory)) as client:
        for path in (*PAGES[:-1], "/nothing", "/static/dashboard.js", "/health", "/static/nothing"):
            headers = (await client.get(path)).headers
            policy = headers["content-security-policy"]
            assert "script-src 'self'" in policy
            assert "unsafe" not in policy
            assert "frame-ancestors 'none'" in policy
            assert headers["x-content-type-options"] == "nosniff"
        assert (await client.get("/queues")).headers["cache-control"] == "no-store"


async def test_no_page_has_code_or_styles_of_its_own(memory: InMemoryBackend) -> None:
    async with client_of(make_app(memory)) as client:
        for path in (*PAGES[:-1], "/queues/work/jobs/one", "/queues/work/add", "/workers"):
            text = (await client.get(path)).text
            assert not re.search(
                r"<script(?![^>]*\bsrc=)|<style|\sstyle=|\son[a-z]+=|javascript:", text
            )


@pytest.mark.parametrize(
    "path",
    [
        "/static/../app.py",
        "/static/..%2f..%2fapp.py",
        "/static/%2e%2e/%2e%2e/__init__.py",
        "/static/vendor/../../site.py",
        "/static//etc/passwd",
        "/static/",
        "/static/vendor",
        "/queues/..%2f..",
        "/queues/work/jobs/../../../etc/passwd",
        "/queues/%00",
        "/queues/a.b",
        "/queues/*",
        "/queues/amq_work",
        "/queues/work/jobs/" + "x" * 5000,
    ],
)
async def test_no_path_leads_out(memory: InMemoryBackend, path: str) -> None:
    async with client_of(make_app(memory)) as client:
        answer = await client.get(httpx.URL(ORIGIN, raw_path=path.encode()))
        assert answer.status_code in (400, 404)
        assert "import" not in answer.text
        assert "root:" not in answer.text


SCRIPT = "<script>alert(1)</script>"


async def test_a_script_in_a_job_is_text(memory: InMemoryBackend) -> None:
    queue = Queue("work", memory)
    job_id = "x'\"><img src=x onerror=alert(1)>"
    await queue.add(SCRIPT, [SCRIPT], {SCRIPT: {"a": SCRIPT}}, job_id=job_id)
    await queue.upsert_repeatable(SCRIPT, every=60, name=SCRIPT, args=[SCRIPT])
    paths = [
        "/queues/work/jobs",
        "/queues/work/jobs?state=any&text=<script>",
        "/queues/work/schedules",
        "/find",
        "/queues/work/schedule",
    ]
    queries: list[dict[str, str]] = [{}, {}, {}, {"text": SCRIPT}, {"name": SCRIPT}]
    async with client_of(make_app(memory), follow_redirects=True) as client:
        listing = (await client.get(paths[0])).text
        job_path = re.findall(r'href="(/queues/work/jobs/[^"?]+)"', listing)
        pages = [await client.get(path) for path in job_path]
        pages += [
            await client.get(path, params=query or None)
            for path, query in zip(paths, queries, strict=True)
        ]
        assert len(pages) == 7
        for page in pages:
            assert page.status_code == 200
            assert SCRIPT not in page.text
            assert "<img src=x" not in page.text


async def test_an_event_is_shown_as_its_job_is(memory: InMemoryBackend) -> None:
    def hide_cards(value: Any, where: Shown) -> Any:
        return re.sub(r"\d{12,19}", "(card)", value) if where.field == "error" else value

    async def pay() -> None:
        raise ValueError(f"card 4111111111111111 {SCRIPT}")

    tasks: dict[str, Any] = {"pay<b>": pay}
    queue = make_queue(memory, **tasks)
    found = ""

    async def listen(address: str) -> None:
        nonlocal found
        async with (
            httpx.AsyncClient(base_url=address) as client,
            client.stream("GET", "/events/live?queue=work") as answer,
        ):
            async for line in answer.aiter_lines():
                found += line

    async def pay_again() -> str:
        await queue.add("pay<b>")
        return found

    with anyio.fail_after(PATIENCE):
        async with (
            served(make_app(memory, redact_hook=hide_cards)) as address,
            running(queue),
            anyio.create_task_group() as group,
        ):
            group.start_soon(listen, address)
            await until(pay_again, lambda text: 'data-event="failed"' in text)
            group.cancel_scope.cancel()
    assert "ValueError: card (card)" in found
    assert "4111" not in found
    assert SCRIPT not in found
    assert "pay&lt;b&gt;" in found


@pytest.mark.parametrize(
    "job_id", ["a/b", "../../x", "..", "a?b#c", "ä ö", "100%", "%2F", "a&b=c", "a\\b", "new"]
)
async def test_a_job_of_any_id_has_its_page(memory: InMemoryBackend, job_id: str) -> None:
    queue = Queue("work", memory)
    await queue.add("task", job_id=job_id)
    async with client_of(make_app(memory)) as client:
        listing = (await client.get("/queues/work/jobs")).text
        path = next(p for p in re.findall(r'class="id" href="([^"]+)"', listing) if "/one" not in p)
        page = await client.get(path)
        assert page.status_code == 200
        assert (await post(client, f"{path}/remove")).status_code == 204
    assert await queue.get_job(job_id) is None


async def test_too_much_is_refused_unread(memory: InMemoryBackend) -> None:
    async with client_of(make_app(memory)) as client:
        headers = SAME_ORIGIN | {"Content-Length": str(5 * 1024 * 1024)}
        assert (await client.post("/queues/work/add", headers=headers)).status_code == 413

        async def endless() -> Any:
            yield b"task=x"

        answer = await client.post("/queues/work/add", content=endless(), headers=SAME_ORIGIN)
        assert answer.status_code == 411


@pytest.mark.parametrize(
    "options", [{"redact": "password"}, {"queues": "work"}, {"refresh": 0}, {"redact": ["--"]}]
)
def test_wrong_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument):
        Dashboard(InMemoryBackend(), **options)
