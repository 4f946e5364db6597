"""What a watch of a stream costs, and what it does when it may not read."""

import time

import anyio
import pytest

from asyncmq_nats.backends.base import Log, Record, Write
from asyncmq_nats.backends.nats.backend import NATSBackend
from asyncmq_nats.backends.nats.reader import Reader
from asyncmq_nats.settings import Settings
from tests.nats.processes import MakeServer
from tests.receiver import holds

JOBS = Log("jobs", ("jobs.>",), work_queue=True)
USERS = """
authorization {
  users: [
    { user: "owner", password: "secret" }
    { user: "blind", password: "secret",
      permissions: { publish: ["$JS.API.STREAM.INFO.*"], subscribe: "_INBOX.>" } }
  ]
}
"""


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    times: list[float] = []
    read_on = Reader.read_on

    async def counted(*args: object, **options: object) -> list[Record]:
        times.append(time.monotonic())
        return await read_on(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Reader, "read_on", counted)
    return times


async def test_many_watches_read_as_often_together_as_ten(
    nats_backend: NATSBackend, reads: list[float]
) -> None:
    await nats_backend.declare_log(JOBS)
    watches = [await nats_backend.watch("jobs", "jobs.>", lambda _: None) for _ in range(60)]
    await anyio.sleep(1.0)
    began, before = time.monotonic(), len(reads)
    await anyio.sleep(2.0)
    assert 20 < len(reads) - before < 120 * (time.monotonic() - began)
    for watching in watches[1:]:
        await watching.unsubscribe()
    await holds(lambda: len(reads) > 3 and reads[-1] - reads[-2] < 0.25)
    await watches[0].unsubscribe()
    after = len(reads)
    await anyio.sleep(0.3)
    assert len(reads) == after


async def test_a_watch_ends_with_its_connection(
    nats_backend: NATSBackend, reads: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    async with NATSBackend(nats_backend.copy()._options["servers"]) as other:
        await other.declare_log(JOBS)
        watching = await other.watch("jobs", "jobs.>", lambda _: None)
    after = len(reads)
    await anyio.sleep(0.3)
    await watching.unsubscribe()
    assert (len(reads), caplog.records) == (after, [])


async def test_a_watch_that_may_not_read_says_so_once(
    make_server: MakeServer, caplog: pytest.LogCaptureFixture
) -> None:
    server, heard = make_server(USERS), list[Record]()
    owner = Settings(user="owner", password="secret")
    blind = Settings(user="blind", password="secret", request_timeout=1.0)
    async with (
        NATSBackend(server.url, settings=owner) as backend,
        NATSBackend(server.url, settings=blind) as other,
    ):
        await backend.declare_log(JOBS)
        watching = await other.watch("jobs", "jobs.>", heard.append)
        await backend.write("jobs", Write("jobs.a", b""))
        await holds(lambda: "not heard of" in caplog.text)
        await watching.unsubscribe()
    assert caplog.text.count("not heard of") == 1
    assert heard == []
