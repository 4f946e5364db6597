"""The doctor's findings on real servers that lack something, and its mends."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest

from asyncmq_nats import doctor
from asyncmq_nats.backends.base import ServerFacts
from asyncmq_nats.backends.inmemory import InMemoryBackend
from asyncmq_nats.backends.nats.backend import NATSBackend
from asyncmq_nats.backends.nats.embedded.server import EmbeddedServer
from asyncmq_nats.doctor import Check, Finding, Level, Role, Thresholds
from asyncmq_nats.queues import Queue
from asyncmq_nats.settings import Settings
from tests.nats.cluster import Cluster
from tests.nats.streams import stored
from tests.nats.test_refusals import ageing
from tests.receiver import PATIENCE
from tests.running import counted, make_queue, only, running

MakeServer = Callable[[str], EmbeddedServer]
PROTOCOL = Path(__file__).parents[2] / "docs" / "protocol.md"


@pytest.fixture
def make_server(server: EmbeddedServer, tmp_path: Path) -> Iterator[MakeServer]:
    servers: list[EmbeddedServer] = []

    def make(config: str) -> EmbeddedServer:
        servers.append(EmbeddedServer(tmp_path / f"configured-{len(servers)}", config=config))
        servers[-1].start()
        return servers[-1]

    yield make
    for each in servers:
        each.kill()
        each.stop()


def monitor_port(directory: Path) -> str:
    """Return the monitoring port of the server that was started last."""
    log = max(directory.glob("configured-*/nats-server.log")).read_text()
    return str(re.findall(r"Starting http monitor on 127\.0\.0\.1:(\d+)", log)[-1])


async def examine(
    backend: NATSBackend | InMemoryBackend,
    *,
    queues: list[str] | None = None,
    role: Role = "worker",
    monitor: str | None = None,
) -> list[Finding]:
    with anyio.fail_after(PATIENCE):
        found = doctor.examine(backend, queues=queues, role=role, monitor=monitor)
        findings = [each async for each in found]
    for each in findings:
        assert each.what
        assert each.mend or each.level in (Level.OK, Level.INFO), each
        assert "\n" not in each.what + each.mend
    return findings


def bad(findings: list[Finding]) -> list[tuple[str, str]]:
    return [
        (str(each.level), each.check)
        for each in findings
        if each.level in (Level.WARNING, Level.ERROR)
    ]


async def test_a_sound_server_with_a_queue_has_nothing_to_be_mended(
    server: EmbeddedServer, nats_backend: NATSBackend
) -> None:
    async def no_op() -> None:
        pass

    queue = make_queue(nats_backend, no_op=no_op)
    async with running(queue):
        await queue.add("no_op")
        await only(queue, completed=1)
        async with NATSBackend(server.url, settings=nats_backend.settings) as other:
            assert bad(await examine(other)) == []


async def test_looking_changes_nothing(server: EmbeddedServer, nats_backend: NATSBackend) -> None:
    """Whatever role is tried: permissions are tried with requests that remove, pause and make."""

    async def work(fails: bool = False) -> None:
        if fails:
            raise RuntimeError("no")

    queue = make_queue(nats_backend, work=work)
    async with running(queue):
        await queue.add_bulk([{"task_id": "work", "args": [fails]} for fails in (True, False)])
        await only(queue, completed=1, failed=1)
    await queue.pause()
    await queue.add("work", delay=5000)
    await queue.add("work")
    await queue.upsert_repeatable("work", every="1h")
    before = await stored(nats_backend)
    role: Role
    for role in ("worker", "admin", "reader", "producer"):
        async with NATSBackend(server.url, settings=nats_backend.settings) as other:
            await examine(other, role=role)
    assert await stored(nats_backend) == before
    assert await queue.is_paused()
    assert len(await queue.list_repeatables()) == 1
    await only(queue, waiting=1, delayed=1, completed=1, failed=1)


async def test_no_server_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASYNCMQ_NATS_SERVER", "nats://elsewhere")
    backend = NATSBackend("nats://127.0.0.1:1", settings=Settings(connect_timeout=0.5))
    settings, connection = await examine(backend)
    assert "did you mean ASYNCMQ_NATS_SERVERS" in settings.what
    assert (connection.level, connection.check) == (Level.ERROR, "connection")
    assert "127.0.0.1:1" in connection.what
    assert "start the server" in connection.mend


async def test_a_server_that_is_too_old_is_found(server: EmbeddedServer) -> None:
    async with ageing(server, "2.12.1") as url:
        (found,) = await examine(NATSBackend(url))
    assert (found.level, found.check) == (Level.ERROR, "version")
    assert "2.12.1" in found.what
    assert "upgrade it to 2.12.2" in found.mend


async def test_no_jetstream_and_a_wrong_password_are_found(make_server: MakeServer) -> None:
    server = make_server("accounts { app { users: [{user: a, password: b}] } }")
    for password, check in (("b", "jetstream"), ("wrong", "login")):
        backend = NATSBackend(
            server.url, settings=Settings(user="a", password=password, connect_timeout=2.0)
        )
        found = (await examine(backend))[-1]
        await backend.close()
        assert (found.level, found.check) == (Level.ERROR, check)


async def test_a_login_that_lacks_a_permission_is_found(make_server: MakeServer) -> None:
    (config,) = re.findall(r"^```conf run\n(.*?)^```$", PROTOCOL.read_text(), re.M | re.S)
    admin = "{ user: owner, password: secret },"
    lacking = config.replace('"$JS.API.STREAM.PURGE.KV_amq_email_scheduler"', "", 1)
    for text, expected in ((config, []), (lacking, ["KV_amq_email_scheduler"])):
        server = make_server(text.replace("users: [", f"users: [ {admin}", 1))
        async with NATSBackend(server.url, user="owner", password="secret") as backend:
            async with running(make_queue(backend, "email")):
                pass  # the worker makes the queue
            await Queue("email", backend).add("x")
        role: Role
        for role in ("worker", "admin", "reader", "producer"):
            async with NATSBackend(server.url, user=role, password="secret", declare=False) as who:
                findings = await examine(who, queues=["email"], role=role)
            refused = [each.what for each in findings if each.check == "permissions"]
            if role == "admin" and expected:
                assert len(refused) == 1
                assert "no admin: the server refuses $JS.API.STREAM.PURGE.KV" in refused[0]
            else:
                assert refused == [], role
        async with NATSBackend(server.url, user="owner", password="secret") as backend:
            await only(Queue("email", backend), waiting=1)  # looking had no effect


async def test_drift_is_found_and_mended(server: EmbeddedServer, nats_backend: NATSBackend) -> None:
    await Queue("mail", nats_backend).pause()
    settings = Settings(stalled_after=10, ready_max_bytes=10**7, storage="memory")
    async with NATSBackend(server.url, settings=settings) as other:
        findings = await examine(other)
        drift = [each for each in findings if each.check == "drift"]
        assert {
            re.findall(r": (\w+) is", each.what)[0]: "cannot" in each.mend for each in drift
        } == {
            "storage": True,
            "max_bytes": False,
            "discard": False,
            "ack_wait": False,
        }
        mended = await doctor.mend(findings)
        assert len(mended) == 1
        assert "ack_wait is 10000000000 now" in mended[0][1]
        left = [each.what for each in await examine(other) if each.check == "drift"]
        assert len(left) == 2  # the storage of both streams
        assert all("storage" in each for each in left)


async def test_sync_interval_at_its_default_is_found(
    make_server: MakeServer, tmp_path: Path
) -> None:
    for line, level in (("", Level.WARNING), ("sync_interval: always", Level.OK)):
        server = make_server(f'http: "127.0.0.1:-1"\njetstream {{ {line} }}')
        port = monitor_port(tmp_path)
        async with NATSBackend(server.url) as backend:
            findings = await examine(backend, monitor=f"http://127.0.0.1:{port}")
            (found,) = [each for each in findings if each.check == "sync_interval"]
            assert found.level is level
            if level is Level.WARNING:
                assert "every 120 s" in found.what
                assert "sync_interval: always" in found.mend
                for wrong in ("ftp://127.0.0.1", "http://127.0.0.1:1"):
                    (found,) = [
                        each
                        for each in await examine(backend, monitor=wrong)
                        if each.check == "sync_interval"
                    ]
                    assert found.level is Level.WARNING


@pytest.mark.slow
@pytest.mark.timeout(240)
async def test_a_cluster_with_a_lost_node_is_found(tmp_path: Path, server: EmbeddedServer) -> None:
    cluster = Cluster(tmp_path / "cluster")
    try:
        cluster.start()
        with anyio.fail_after(2 * PATIENCE):
            await cluster.ready()
            async with NATSBackend(cluster.urls, settings=Settings(replicas=3)) as backend:
                queue = Queue("mail", backend)
                await queue.pause()
                for stream in ("amq_mail", "KV_amq_mail_scheduler"):
                    await cluster.settle(stream)  # a new one may be late for as long as it likes
                assert bad(await examine(backend)) == []
                async with NATSBackend(cluster.urls, settings=Settings(replicas=1)) as single:
                    await Queue("alone", single).pause()
                    found = bad(await examine(single, queues=["alone"]))
                    assert found == [("warning", "replicas")] * 2
                # One server leads both: when it is lost, no other has heard of it as a leader.
                lost = await cluster.leader("amq_mail")
                await cluster.make_leader(lost, "KV_amq_mail_scheduler")
                lost.kill()
                while True:
                    findings = await examine(backend, queues=["mail"])
                    offline = [each for each in findings if "lacks its replica" in each.what]
                    if offline:
                        break
                    await anyio.sleep(0.2)
                assert "start that server" in offline[0].mend
                assert f"server-{cluster.servers.index(lost)} (silent for" in offline[0].what
                await queue.add("x")  # two of three go on
    finally:
        cluster.stop()


async def test_jobs_that_no_worker_runs_are_found_and_orphans_mended(
    nats_backend: NATSBackend,
) -> None:
    queue = Queue("mail", nats_backend)
    await queue.add("x")
    client = nats_backend._require_connection().client
    client.post(b"amq.mail.ready.77.foreign", b'{"v":1,"task":"x"}')
    await client.barrier()
    await counted(queue)
    findings = await examine(nats_backend)
    assert bad(findings) == [("error", "workers"), ("warning", "orphans")]
    assert "1 jobs wait, and no worker runs" in findings[-2].what
    ((_, done),) = await doctor.mend(findings)
    assert done == "made the consumers of 77"
    assert ("warning", "orphans") not in bad(await examine(nats_backend))
    await only(queue, waiting=2)


async def test_in_memory_there_is_little_to_look_at() -> None:
    findings = await examine(InMemoryBackend())
    assert [each.check for each in findings] == ["server", "queues"]


@pytest.mark.parametrize(
    ("change", "level", "check"),
    [
        ({"clock_offset": 7.0}, "warning", "clock"),
        ({"clock_offset": -7.0}, "warning", "clock"),
        ({"mixes_up_expectations": True, "is_clustered": True}, "error", "version"),
        ({"max_stored_bytes": 1100}, "warning", "storage"),
        ({"max_stored_bytes": 1001}, "error", "storage"),
    ],
)
def test_what_a_server_tells_is_judged(change: dict[str, object], level: str, check: str) -> None:
    sound: dict[str, object] = {
        "version": "2.15.1",
        "servers": "nats://a",
        "is_clustered": False,
        "mixes_up_expectations": False,
        "max_body": 1024**2,
        "clock_offset": 0.01,
        "stored_bytes": 1000,
        "max_stored_bytes": None,
    }
    facts = ServerFacts(**{**sound, **change})  # type: ignore[arg-type]
    assert bad([*doctor._judge_server(facts), *doctor._judge_account(facts)]) == [(level, check)]


# -- monitoring


async def test_a_check_compares_each_queue_with_the_thresholds(nats_backend: NATSBackend) -> None:
    queue = Queue("mail", nats_backend)
    for _ in range(3):
        await queue.add("x")
    await counted(queue)

    async def look(**thresholds: Any) -> Check:
        return await doctor.check(nats_backend, ["mail"], Thresholds(**thresholds))

    fine = await look(waiting=(4, 5))
    assert (fine.level, fine.text) == (Level.OK, "1 queues, 3 jobs wait")
    assert fine.figures["mail"]["waiting"] == 3
    assert (await look(waiting=(3, 5))).level is Level.WARNING
    late = await look(waiting=(1, 3), age=(0, None), workers=1)
    assert late.level is Level.ERROR
    assert late.text == "mail: 3 jobs wait; mail: 0 workers run, 1 should"


async def test_a_check_without_a_server_is_an_error() -> None:
    backend = NATSBackend("nats://127.0.0.1:1", settings=Settings(connect_timeout=0.5))
    found = await doctor.check(backend)
    assert found.level is Level.ERROR
    assert "cannot reach NATS" in found.text
