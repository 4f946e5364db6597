"""Takes the pictures of the dashboard: `python docs/images/dashboard.py [--minutes 20]`.

A server, workers and jobs that succeed, fail and are retried for some minutes, then each page in a
headless Chromium, in light and in dark. Meanwhile `--address` takes them of what is served already.
"""

import argparse
import logging
import random
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import anyio
import anyio.to_thread
import uvicorn

FOLDER: Final = Path(__file__).parent
sys.path.insert(0, str(FOLDER.parents[1]))

from asyncmq_nats import FlowProducer, Job, NATSBackend, Queue, Settings, current_job  # noqa: E402
from asyncmq_nats.backends.nats.embedded.server import EmbeddedServer  # noqa: E402
from asyncmq_nats.contrib.dashboard import Dashboard  # noqa: E402
from asyncmq_nats.runtime.registry import TaskRegistry  # noqa: E402
from tests.dashboard.web import start_browser  # noqa: E402

WIDTH: Final = 1200
PICTURES: Final = {
    "overview": ("/", 705),
    "queue": ("/queues/mail", 1190),
    "job": ("/queues/mail/jobs/invoice-2041", 915),
    "failures": ("/failures", 545),
    "flow": ("/queues/images/jobs/album-7/flow", 465),
}
"""Pages, and the height of their pictures."""
BATCH_SECONDS: Final = 1.5
WIDTHS: Final = (320, 800, 800, 1600)


# -- tasks


async def send(to: str, subject: str = "", **_: Any) -> dict[str, Any]:
    """Send a mail."""
    job = current_job()
    job.log(f"connected to the mail server for {to}")
    await anyio.sleep(random.lognormvariate(-3, 0.7))
    if to.startswith("bad"):
        job.log("the mail server refused the address", "WARNING")
        raise ConnectionError(f"mail server said 451 to '{to}': try again in 17 s")
    return {"sent": to, "message_id": f"m-{random.randrange(10**6)}"}


async def resize(path: str, width: int = 800) -> list[int]:
    """Resize a picture."""
    await anyio.sleep(random.lognormvariate(-1.5, 0.5))
    if width > 4000:
        raise ValueError(f"image is {width} pixels wide, at most 4000 are allowed")
    return [width, width // 2]


async def merge(*_: Any) -> None:
    """Take long."""
    await anyio.sleep(3600)


async def report(month: str) -> str:
    """Make a report."""
    await anyio.sleep(0.2)
    if month == "February":
        raise LookupError(f"no figures for '{month}' yet")
    return month


# -- a queue that is in use


def make_queues(backend: NATSBackend) -> tuple[Queue, Queue, Queue]:
    """Return the queues."""
    registry = TaskRegistry()
    for task in (send, resize, merge, report):
        registry.register(task, queue="mail", name=f"app.{task.__name__}")

    def make(name: str, **options: Any) -> Queue:
        return Queue(name, backend, registry=registry, any_task=True, **options)

    mail = make("mail", concurrency=5, rate_limit=40, rate_interval=1.0)
    return mail, make("images", concurrency=4), make("reports", concurrency=2)


def mails(count: int, **options: Any) -> list[dict[str, Any]]:
    """Return mails to add; some fail."""
    names = ["bad" if random.random() < 0.06 else "user" for _ in range(count)]
    return [
        {
            "task_id": "app.send",
            "args": [f"{name}{random.randrange(10**4)}@example.org"],
            "kwargs": {"subject": "Your invoice", "api_token": "s3cret"},
            "retries": 1,
            "backoff": 0.5,
            **options,
        }
        for name in names
    ]


async def begin(mail: Queue, images: Queue, reports: Queue) -> None:
    """Add what the pictures show in any case."""
    await mail.add(
        "app.send",
        ["bad-address@example.org"],
        {"subject": "Your invoice", "api_token": "s3cret"},
        retries=2,
        backoff=2.0,
        job_id="invoice-2041",
        priority=2,
    )
    await mail.add_bulk(mails(6, delay=3600.0))
    await mail.upsert_repeatable(
        "app.report", args=["February"], every="2m", name="figures of the month"
    )
    await mail.upsert_repeatable("app.send", args=["ops@example.org"], every="1m", name="digest")
    await mail.upsert_repeatable(
        "app.send",
        args=["team@example.org"],
        cron="0 7 * * mon-fri",
        timezone="Europe/Berlin",
        name="weekly",
    )
    await reports.add_bulk(
        [{"task_id": "app.report", "args": [month]} for month in ("May", "June")]
    )
    shots = [
        Job("app.resize", [f"/album/{n}.jpg"], {"width": 1000 * n**2}, job_id=f"photo-{n}")
        for n in (1, 2)
    ]
    shots += [Job("app.resize", ["/album/3.jpg"], {"width": 5000}, job_id="photo-3")]
    shots += [Job("app.resize", ["/album/4.jpg"], job_id="photo-4")]
    album = Job("app.merge", job_id="album-7", depends_on=["photo-1", "photo-2", "photo-4"])
    flow = [*shots, album]
    flow += [Job("app.resize", ["cover.jpg"], job_id="cover", depends_on=["photo-1", "photo-3"])]
    flow += [Job("app.report", ["May"], job_id="publish", depends_on=["album-7"])]
    flow += [
        Job("app.send", [f"{name}@example.org"], job_id=f"tell-{name}", depends_on=["publish"])
        for name in ("ada", "eve")
    ]
    await FlowProducer(images.backend).add_flow("images", flow)


async def keep_busy(mail: Queue, images: Queue) -> None:
    """Add jobs for ever, now more and now fewer."""
    for number in range(10**9):
        busy = 2 + number // 40 % 5
        await mail.add_bulk(mails(random.randrange(busy, 5 * busy)))
        await mail.add_bulk(mails(1, priority=random.choice([1, 9])))
        if number % 3 == 0:
            width = 5000 if number % 9 == 0 else random.choice(WIDTHS)
            await images.add("app.resize", [f"/photos/{number}.jpg"], {"width": width})
        await anyio.sleep(BATCH_SECONDS)


async def serve(backend: NATSBackend, then: Callable[[str], Any]) -> None:
    """Serve a dashboard of queues in use, and call a function with its address."""
    queues = make_queues(backend)
    server = uvicorn.Server(uvicorn.Config(Dashboard(backend), port=0, log_level="warning"))
    await begin(*queues)
    mail, images, _ = queues
    async with anyio.create_task_group() as group:
        for queue in (mail, mail, images):
            await group.start(queue.run)
        group.start_soon(keep_busy, mail, images)
        group.start_soon(server.serve)
        while not server.started:  # noqa: ASYNC110
            await anyio.sleep(0.05)
        port = server.servers[0].sockets[0].getsockname()[1]
        await then(f"http://127.0.0.1:{port}")
        server.should_exit = True
        group.cancel_scope.cancel()


# -- pictures


def take_pictures(address: str) -> None:
    """Write a picture of each page in light and in dark."""
    with tempfile.TemporaryDirectory() as profile:
        driver = start_browser(Path(profile))
        try:
            for theme in ("light", "dark"):
                for name, (path, height) in PICTURES.items():
                    file = FOLDER / f"dashboard-{name}-{theme}.png"
                    _take(driver, address + path, theme, height, file)
        finally:
            driver.quit()


def _take(driver: Any, url: str, theme: str, height: int, file: Path) -> None:
    metrics = {"width": WIDTH, "height": height, "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    driver.get(url)
    driver.execute_script("localStorage.setItem('amq-theme', arguments[0])", theme)
    driver.get(url)
    drawn = (
        "return document.documentElement.dataset.ready"
        " && [...document.querySelectorAll('[data-chart]')].every((each) => each.dataset.state)"
    )
    while not driver.execute_script(drawn):
        pass
    driver.save_screenshot(str(file))
    sys.stdout.write(f"{file.name}\n")


async def main(minutes: float) -> None:
    """Serve, wait, and take the pictures."""

    async def then(address: str) -> None:
        sys.stdout.write(f"{address}, for {minutes:g} minutes\n")
        sys.stdout.flush()
        await anyio.sleep(60 * minutes)
        await anyio.to_thread.run_sync(take_pictures, address)

    with tempfile.TemporaryDirectory() as folder, EmbeddedServer(Path(folder)) as server:
        settings = Settings(heartbeat_interval=2, stalled_after=10)
        async with NATSBackend(server.url, settings=settings) as backend:
            await serve(backend, then)


if __name__ == "__main__":
    logging.disable(logging.ERROR)  # jobs that fail are meant to
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--address", help="take pictures of the dashboard that is served there")
    given = parser.parse_args()
    if given.address:
        take_pictures(given.address)
    else:
        anyio.run(main, given.minutes)
