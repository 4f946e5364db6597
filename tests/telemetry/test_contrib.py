"""The files for Grafana, Prometheus and KEDA: they name what there is."""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest

import asyncmq_nats
from asyncmq_nats import NATSBackend, Settings
from asyncmq_nats.backends.nats.embedded.server import EmbeddedServer
from asyncmq_nats.metrics import TaskMetrics
from asyncmq_nats.queues import Queue
from asyncmq_nats.runtime.registry import TaskRegistry
from asyncmq_nats.telemetry.prometheus import QueueGauges, WorkerCounts, render
from tests.receiver import until
from tests.running import PATIENCE, make_queue, running
from tests.telemetry.probing import ask, free_port

yaml: Any = pytest.importorskip("yaml")
FILES = Path(asyncmq_nats.__file__).parent / "contrib" / "monitoring"
METRIC = re.compile(r"\basyncmq_[a-z_]+")


@pytest.fixture(scope="module")
def shown() -> bytes:
    """The metrics of a queue and a worker, as Prometheus reads them."""
    metrics = TaskMetrics(completed=1)
    metrics.wait.add(1.0)
    metrics.run.add(1.0)
    return render(
        [QueueGauges("q", {"waiting": 1}, 0.0, paused=False, workers=1, slots=1)],
        [WorkerCounts("q", 1, 0, {"t": metrics}, {})],
    )


@pytest.fixture(scope="module")
def exported(shown: bytes) -> set[str]:
    """The names of all series that there are."""
    text = shown.decode()
    return {re.split(r"[{ ]", line)[0] for line in text.splitlines() if not line.startswith("#")}


def test_each_metric_of_the_dashboard_is_exported(exported: set[str]) -> None:
    dashboard = json.loads((FILES / "grafana-dashboard.json").read_text())
    targets = [
        target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())
    ]
    assert len(targets) > 15
    named = {name for expr in targets for name in METRIC.findall(expr)}
    assert named - exported == set()
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(ids)) == len(ids)


def test_each_metric_of_the_alerts_is_exported(exported: set[str]) -> None:
    (group,) = yaml.safe_load((FILES / "prometheus-alerts.yml").read_text())["groups"]
    assert len(group["rules"]) >= 6
    for rule in group["rules"]:
        named = set(METRIC.findall(rule["expr"]))
        assert named, rule["alert"]
        assert named - exported == set()
        assert rule["expr"].count("(") == rule["expr"].count(")")
        assert {"summary", "description"} <= rule["annotations"].keys()


def promtool(*arguments: str, given: bytes = b"") -> str:
    """Run Prometheus' own checks, and return their output."""
    program = shutil.which("promtool")
    if program is None:
        pytest.skip("no promtool, of Debian's package prometheus")
    done = subprocess.run([program, *arguments], input=given, capture_output=True, timeout=PATIENCE)
    output = (done.stdout + done.stderr).decode()
    assert done.returncode == 0, output
    return output


def test_promtool_accepts_the_alerts() -> None:
    output = promtool("check", "rules", str(FILES / "prometheus-alerts.yml"))
    assert re.search(r"SUCCESS: \d+ rules found", output)


def test_promtool_finds_no_fault_with_the_metrics(shown: bytes) -> None:
    assert promtool("check", "metrics", given=shown) == ""


ALERTS = """
rule_files: [{rules}]
evaluation_interval: 1m
tests:
  - interval: 1m
    input_series:
      - {{series: 'asyncmq_oldest_waiting_seconds{{queue="q"}}', values: '0x10 400x20'}}
      - {{series: 'asyncmq_jobs_failed_total{{queue="q",task="t"}}', values: '0+1x40'}}
      - {{series: 'asyncmq_jobs_completed_total{{queue="q",task="t"}}', values: '0+4x40'}}
      - {{series: 'asyncmq_lost_workers_total{{queue="q"}}', values: '0x40'}}
      - {{series: 'asyncmq_jobs{{queue="q",state="waiting"}}', values: '3x40'}}
      - {{series: 'asyncmq_workers{{queue="q"}}', values: '1x40'}}
    promql_expr_test:
      - expr: count(ALERTS{{alertstate="firing",alertname="AsyncmqJobsWaitTooLong"}})
        eval_time: 20m
        exp_samples: [{{labels: '{{}}', value: 1}}]
      - expr: count(ALERTS{{alertstate="firing",alertname="AsyncmqManyFailures"}})
        eval_time: 20m
        exp_samples: [{{labels: '{{}}', value: 1}}]
      - expr: count(ALERTS{{alertstate="firing"}})
        eval_time: 20m
        exp_samples: [{{labels: '{{}}', value: 2}}]
"""


def test_alerts_fire_when_they_should_and_no_others(tmp_path: Path) -> None:
    tests = tmp_path / "tests.yml"
    tests.write_text(ALERTS.format(rules=FILES / "prometheus-alerts.yml"))
    promtool("test", "rules", str(tests))


# -- KEDA


@pytest.fixture
def monitored(tmp_path: Path) -> Iterator[tuple[EmbeddedServer, int]]:
    """A server whose monitoring port is open."""
    port = free_port()
    server = EmbeddedServer(tmp_path / "nats", config=f'http: "127.0.0.1:{port}"')
    server.start()
    yield server, port
    server.stop()


def triggers(kind: str) -> list[dict[str, str]]:
    """Return what the example gives to the scalers of one kind."""
    objects = yaml.safe_load_all((FILES / "keda-scaledobject.yaml").read_text())
    return [
        trigger["metadata"]
        for each in objects
        for trigger in each["spec"]["triggers"]
        if trigger["type"] == kind
    ]


async def lag(port: int, trigger: dict[str, str]) -> int:
    """Return the lag, read as KEDA's scaler does: what waits and what is not acknowledged."""
    path = f"/jsz?acc={trigger['account']}&consumers=true&config=true"
    status, body = await ask(port, path)
    assert status == 200
    (account,) = [
        each for each in json.loads(body)["account_details"] if each["name"] == trigger["account"]
    ]
    (stream,) = [each for each in account["stream_detail"] if each["name"] == trigger["stream"]]
    (consumer,) = [
        each for each in stream["consumer_detail"] if each["name"] == trigger["consumer"]
    ]
    return int(consumer["num_pending"]) + int(consumer["num_ack_pending"])


async def test_kedas_jetstream_scaler_sees_what_waits_and_what_runs(
    monitored: tuple[EmbeddedServer, int], settings: Settings
) -> None:
    server, port = monitored
    tier, promoter = triggers("nats-jetstream")
    started, go_on = anyio.Event(), anyio.Event()

    async def slow() -> None:
        started.set()
        await go_on.wait()

    async with NATSBackend(server.url, settings=settings) as backend:
        queue = make_queue(backend, "email", concurrency=1, slow=slow)
        await queue.add_bulk([{"task_id": "slow"}] * 7)
        await queue.queue_stats()
        await queue.add("slow", delay=0.2)
        await until(lambda: lag(port, tier), lambda count: count == 7)

        async def due() -> int:
            return await lag(port, promoter)

        # Without a worker, the delayed job waits for a promoter.
        await until(due, lambda count: count == 1)
        async with running(queue):
            with anyio.fail_after(60):
                await started.wait()
            assert await lag(port, tier) >= 7
            go_on.set()

            async def left() -> int:
                return await lag(port, tier) + await lag(port, promoter)

            await until(left, lambda count: count == 0)


def test_kedas_prometheus_scaler_asks_for_what_is_exported(exported: set[str]) -> None:
    (trigger,) = triggers("prometheus")
    assert set(METRIC.findall(trigger["query"])) <= exported


def test_the_queue_of_the_example_is_that_of_its_streams() -> None:
    queue = Queue("email", asyncmq_nats.InMemoryBackend(), registry=TaskRegistry())
    streams = {trigger["stream"] for trigger in triggers("nats-jetstream")}
    assert streams == {queue._subjects.ready_log, queue._subjects.bucket_log}
