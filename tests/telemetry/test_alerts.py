"""Alerts: what is told, once, to whom; and the webhook, which is a job."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import anyio
import pytest

from asyncmq_nats import Fail, InMemoryBackend, InvalidArgument
from asyncmq_nats.alerts import Alert, Alerts, Webhook, sign, verify_signature
from asyncmq_nats.backends.base import Backend
from asyncmq_nats.queues import Queue
from asyncmq_nats.runtime.registry import TaskRegistry
from tests.receiver import holds, until
from tests.running import counted, make_queue, only, run_jobs, running


class Address:
    """A receiver of webhooks: it answers with these statuses in turn, then with 200."""

    def __init__(self, *statuses: int) -> None:
        self.taken: list[tuple[dict[str, str], bytes]] = []
        left = list(statuses)
        taken = self.taken

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                status = left.pop(0) if left else 200
                if status == 200:
                    taken.append((dict(self.headers), body))
                self.send_response(status)
                self.end_headers()

            def log_message(self, *_: object) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/hook"

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.fixture
def address() -> Iterator[Address]:
    made = Address()
    yield made
    made.close()


async def fail() -> None:
    raise Fail("no such address")


async def nothing() -> None: ...


async def tell_one(queue: Queue, told: list[Alert]) -> None:
    """Have jobs fail until one more is told: nothing says when the events are listened to."""
    before = len(told)

    async def add() -> int:
        await queue.add("fail")
        return len(told)

    await until(add, lambda count: count > before)


async def test_a_job_that_fails_for_good_is_told(backend: Backend) -> None:
    told: list[Alert] = []
    queue = make_queue(backend, fail=fail, nothing=nothing)
    alerts = Alerts(queue)
    alerts.on_job_failed(told.append)
    async with anyio.create_task_group() as group:
        await group.start(alerts.run)
        async with running(queue):
            await queue.add("nothing")
            await tell_one(queue, told)
        group.cancel_scope.cancel()
    alert = told[0]
    job_id = alert.details["job_id"]
    assert (alert.kind, alert.queue) == ("job_failed", "work")
    assert alert.message == f"job {job_id} (fail) failed: Fail: no such address"
    assert (await queue.get_job(job_id) or {})["status"] == "failed"


async def test_a_failure_rate_is_told_once_until_it_was_lower(backend: Backend) -> None:
    told: list[Alert] = []
    queue = make_queue(backend, fail=fail, nothing=nothing)
    alerts = Alerts(queue)
    alerts.on_failure_rate(above=0.5, at_least=4)(told.append)
    await alerts.check()
    await queue.add_bulk([{"task_id": "fail"}] * 3)
    await run_jobs(queue)
    await alerts.check()
    assert told == []  # three are no rate
    await queue.add("fail")
    await run_jobs(queue)
    for _ in range(2):
        await alerts.check()
    assert [alert.details["failed"] for alert in told] == [4]
    await queue.add_bulk([{"task_id": "nothing"}] * 6)
    await run_jobs(queue)
    await alerts.check()
    await queue.add_bulk([{"task_id": "fail"}] * 9)
    await run_jobs(queue)
    await alerts.check()
    assert [alert.details["failed"] for alert in told] == [4, 13]


async def test_a_stuck_queue_is_told_unless_it_is_paused(backend: Backend) -> None:
    told: list[Alert] = []
    queue = make_queue(backend)
    alerts = Alerts(queue)
    alerts.on_queue_stuck(longer_than=0.0)(told.append)
    await alerts.check()
    job_id = await queue.add("x")
    await counted(queue)
    await queue.pause()
    await alerts.check()
    assert told == []
    await queue.resume()
    for _ in range(2):
        await alerts.check()
    [alert] = told
    assert alert.details["job_id"] == job_id
    assert "has no worker" in alert.message


async def test_a_hook_that_fails_ends_nothing(
    backend: Backend, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(_: Alert) -> None:
        raise RuntimeError("out of paper")

    queue = make_queue(backend)
    alerts = Alerts(queue)
    alerts.on_queue_stuck(longer_than=0.0)(broken)
    await queue.add("x")
    await counted(queue)
    await alerts.check()
    assert "out of paper" in caplog.text


async def test_a_webhook_is_signed_and_sent_once_by_a_worker(
    backend: Backend, address: Address
) -> None:
    registry = TaskRegistry()
    queue = Queue("work", backend, registry=registry)
    webhook = Webhook(queue, address.url, "secret", registry=registry)
    alert = Alert("queue_stuck", "work", "stuck", 1.0, "key", {"age": 5})
    assert len({await webhook(alert) for _ in range(3)}) == 1
    await run_jobs(queue)
    [(headers, body)] = address.taken
    assert json.loads(body)["message"] == "stuck"
    assert verify_signature("secret", headers, body)
    assert not verify_signature("other", headers, body)
    assert not verify_signature("secret", headers, body + b" ")


async def test_a_webhook_that_is_refused_is_tried_again(backend: Backend) -> None:
    address = Address(500)
    try:
        registry = TaskRegistry()
        queue = Queue("work", backend, registry=registry)
        webhook = Webhook(queue, address.url, "secret", registry=registry)
        job_id = await webhook(Alert("queue_stuck", "work", "stuck", 1.0, "key"))
        async with running(queue):
            await only(queue, delayed=1)
            await queue.retry_job(job_id)  # its time is come
            await only(queue, completed=1)
        assert len(address.taken) == 1
    finally:
        address.close()


async def test_a_webhook_that_fails_tells_nothing_of_itself(backend: Backend) -> None:
    told: list[Alert] = []
    registry = TaskRegistry()
    queue = Queue("work", backend, registry=registry)
    registry.register(fail, queue="work", name="fail")
    webhook = Webhook(queue, "http://127.0.0.1:1/", "secret", retries=0, registry=registry)
    alerts = Alerts(queue)
    alerts.on_job_failed(told.append)
    async with anyio.create_task_group() as group:
        await group.start(alerts.run)
        async with running(queue):
            await webhook(Alert("queue_stuck", "work", "stuck", 1.0, "key"))
            await only(queue, failed=1)
            await tell_one(queue, told)
            await webhook(Alert("queue_stuck", "work", "stuck", 2.0, "another"))
            await holds(lambda: bool(told))
            await tell_one(queue, told)
        group.cancel_scope.cancel()
    assert {alert.details["task"] for alert in told} == {"fail"}


@pytest.mark.parametrize("url", ["ftp://x", "file:///etc/passwd", "x"])
def test_an_address_must_be_one_of_http(url: str) -> None:
    queue = Queue("work", InMemoryBackend())
    with pytest.raises(InvalidArgument):
        Webhook(queue, url, "secret", registry=TaskRegistry())
    with pytest.raises(InvalidArgument):
        Webhook(queue, "https://x", "", registry=TaskRegistry())


def test_an_old_signature_is_refused() -> None:
    headers = {
        "X-ASYNCMQ-TIMESTAMP": "1000",
        "x-asyncmq-signature": sign("secret", "1000", b"{}"),
    }
    assert verify_signature("secret", headers, b"{}", now=1100)
    assert not verify_signature("secret", headers, b"{}", now=1400)
    assert not verify_signature("secret", headers | {"X-ASYNCMQ-TIMESTAMP": "x"}, b"{}")
    assert not verify_signature("secret", {}, b"{}")
