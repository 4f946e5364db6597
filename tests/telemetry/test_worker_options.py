"""Options of the command line: ports and JSON logs of a worker, lines of a job."""

import json
import sys
from pathlib import Path

import anyio
import pytest
from anyio import to_thread

from asyncmq_nats import current_job
from asyncmq_nats.backends.nats.backend import NATSBackend
from asyncmq_nats.backends.nats.embedded.server import EmbeddedServer
from asyncmq_nats.cli.app import run
from asyncmq_nats.queues import Queue
from tests.ops.programs import started
from tests.receiver import PATIENCE
from tests.running import make_queue, outcome, run_jobs
from tests.telemetry.probing import ask, free_port

SHOP = """
import logging
from asyncmq_nats import task

@task(queue="mail")
async def mail() -> None:
    logging.getLogger("shop").warning("sending")
"""


async def test_a_worker_opens_its_ports_and_logs_json(
    server: EmbeddedServer, nats_backend: NATSBackend, tmp_path: Path
) -> None:
    (tmp_path / "shop.py").write_text(SHOP)
    health, metrics = free_port(), free_port()
    options = ["--health-port", str(health), "--metrics-port", str(metrics), "--log-json"]
    command = [sys.executable, "-m", "asyncmq_nats", "worker", "start", "mail", "--tasks", "shop"]
    queue = Queue("mail", nats_backend)
    job_id = await queue.add("shop.mail")
    with started([*command, "-s", server.url, *options], tmp_path) as program:
        with anyio.fail_after(2 * PATIENCE):
            await outcome(queue, job_id)
            assert (await ask(health, "/readyz"))[0] == 200
            assert (await ask(health, "/metrics"))[0] == 404
            status, text = await ask(metrics, "/metrics")
        assert status == 200
        assert 'asyncmq_jobs{queue="mail",state="completed"} 1.0' in text
        assert program.stop() == 0
    lines = [json.loads(line) for line in program.log.splitlines()]
    [line] = [line for line in lines if line["logger"] == "shop"]
    assert (line["message"], line["job_id"], line["queue"]) == ("sending", job_id, "mail")


async def test_the_lines_of_a_job_are_shown(
    server: EmbeddedServer, nats_backend: NATSBackend, capsys: pytest.CaptureFixture[str]
) -> None:
    async def talk() -> None:
        current_job().log("half way", "WARNING")

    queue = make_queue(nats_backend, talk=talk)
    job_id = await queue.add("talk")
    await run_jobs(queue)

    async def amq(*arguments: str) -> int:
        return await to_thread.run_sync(run, [*arguments, "-s", server.url])

    assert await amq("job", "logs", "work", job_id) == 0
    assert "attempt 1  WARNING  half way" in capsys.readouterr().out
    assert await amq("job", "logs", "work", job_id, "--json") == 0
    [line] = json.loads(capsys.readouterr().out)
    assert (line["message"], line["level"], line["attempt"]) == ("half way", "WARNING", 1)
    assert await amq("job", "logs", "work", "no-such-job") == 1
