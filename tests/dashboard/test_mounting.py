"""Below any prefix, in other applications, and as a program of its own."""

import re
import sys
from functools import partial
from pathlib import Path

import anyio
import anyio.abc
import httpx2 as httpx
import pytest
from anyio.abc import Process
from starlette.applications import Starlette
from starlette.routing import Mount

from asyncmq_nats import InMemoryBackend, Queue
from asyncmq_nats.backends.nats.embedded.server import EmbeddedServer
from asyncmq_nats.contrib.dashboard import SessionLogin
from tests.dashboard.web import ORIGIN, client_of, make_app, post
from tests.receiver import PATIENCE, until


@pytest.fixture
async def memory() -> InMemoryBackend:
    backend = InMemoryBackend()
    await Queue("work", backend).add("task", job_id="one")
    return backend


ACTION = re.compile(r"/(pause|resume|retry|cancel|remove|promote|logout|drain|clean|obliterate)$")


async def follow(client: httpx.AsyncClient, start: str, prefix: str) -> int:
    """Ask for all that the pages link to, and return how many there were."""
    seen, ahead = set[str](), [start]
    while ahead:
        path = ahead.pop()
        seen.add(path)
        answer = await client.get(path)
        assert answer.status_code == 200, path
        if "html" not in answer.headers["content-type"]:
            continue
        links = re.findall(r'\s(?:href|src|action|hx-get|data-chart)="([^"#]*)"', answer.text)
        assert [link for link in links if not link.startswith(prefix + "/")] == []
        plain = {link.replace("&amp;", "&") for link in links if not re.search("/live|back=", link)}
        ahead += sorted({each for each in plain if not ACTION.search(each)} - seen - set(ahead))
    return len(seen)


@pytest.mark.parametrize("prefix", ["", "/jobs", "/a/b"])
async def test_no_link_leads_out_of_the_prefix(memory: InMemoryBackend, prefix: str) -> None:
    app = Starlette(routes=[Mount(prefix, app=make_app(memory))]) if prefix else make_app(memory)
    async with client_of(app) as client:
        assert await follow(client, f"{prefix}/queues/work", prefix) > 30
        answer = await post(client, f"{prefix}/queues/work/pause")
        assert answer.status_code == 204


async def test_behind_a_proxy_that_takes_the_prefix_away(memory: InMemoryBackend) -> None:
    async def proxied(scope, receive, send):  # as `--root-path` has uvicorn do
        path = "/jobs" + scope["path"]
        await app(dict(scope, path=path, raw_path=path.encode(), root_path="/jobs"), receive, send)

    app = make_app(memory)
    async with client_of(proxied) as client:
        page = await client.get("/queues/work")
        assert 'href="/jobs/queues/work/jobs' in page.text


@pytest.mark.parametrize("path", ["/queues/work", "/queues/work/", "/jobs/queues/work"])
async def test_the_prefix_can_be_told(memory: InMemoryBackend, path: str) -> None:
    async with client_of(make_app(memory, prefix="/jobs/")) as client:
        page = await client.get(path)
        assert page.status_code == 200
        assert 'href="/jobs/queues/work/jobs' in page.text
        assert (await post(client, f"{path.rstrip('/')}/pause")).status_code == 204


async def test_a_session_is_for_the_prefix_only(memory: InMemoryBackend) -> None:
    login = SessionLogin({"ada": "right"})
    app = Starlette(routes=[Mount("/jobs", app=make_app(memory, login=login))])
    async with client_of(app) as client:
        stranger = await client.get("/jobs/queues")
        assert stranger.headers["location"] == "/jobs/login?next=/jobs/queues"
        answer = await client.post(
            stranger.headers["location"],
            data={"name": "ada", "password": "right"},
            headers={"Origin": ORIGIN},
        )
        assert "Path=/jobs" in answer.headers["set-cookie"]
        assert answer.headers["location"] == "/jobs/queues"
        assert (await client.get("/jobs/queues")).status_code == 200


async def run_program(*arguments: str) -> tuple[int, str]:
    """Run the command until it ends; return its exit code and what it said."""
    command = [sys.executable, "-m", "asyncmq_nats", "dashboard", *arguments]
    with anyio.fail_after(PATIENCE):
        done = await anyio.run_process(command, check=False)
    return done.returncode, (done.stdout + done.stderr).decode()


async def test_the_program_wants_a_login_for_other_machines(tmp_path: Path) -> None:
    code, text = await run_program("--host", "0.0.0.0", "--port", "1")
    assert code != 0
    assert "does not listen on 0.0.0.0 without a login" in text
    code, text = await run_program("--host", "0.0.0.0", "--accounts", str(tmp_path / "none"))
    assert code != 0
    assert "the file of accounts cannot be read" in text


async def ask(client: httpx.AsyncClient, process: Process) -> str:
    """Return whether the program is ready, as it says; nothing while it does not listen."""
    assert process.returncode is None
    try:
        return str((await client.get("/ready")).json()["status"])
    except httpx.TransportError:
        return ""


@pytest.mark.server
async def test_the_program_serves(server: EmbeddedServer, tmp_path: Path) -> None:
    (tmp_path / "accounts").write_text("ada:operator:right\n")
    with anyio.fail_after(PATIENCE):
        listener = await anyio.create_tcp_listener(local_host="127.0.0.1")
        port = listener.extra(anyio.abc.SocketAttribute.local_port)
        await listener.aclose()
        command = [
            sys.executable,
            "-m",
            "asyncmq_nats",
            "dashboard",
            "--server",
            server.url,
            "--port",
            str(port),
            "--accounts",
            str(tmp_path / "accounts"),
            "--basic",
        ]
        async with (
            await anyio.open_process(command, stdout=None, stderr=None) as process,
            httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client,
        ):
            try:
                assert (await until(partial(ask, client, process), bool)) == "ok"
                assert (await client.get("/")).status_code == 401
                assert (await client.get("/", auth=("ada", "right"))).status_code == 200
            finally:
                process.terminate()
                await process.wait()
    assert process.returncode in (0, -15)
