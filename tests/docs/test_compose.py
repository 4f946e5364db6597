"""docker-compose.yml.

That compose accepts it, that it fits the repository, and that its services work together, as plain
processes.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from asyncmq_nats.backends.nats.embedded.server import EmbeddedServer
from asyncmq_nats.settings import Settings
from tests.nats.cluster import free_ports
from tests.receiver import PATIENCE

ROOT = Path(__file__).parents[2]
COMPOSE = (ROOT / "docker-compose.yml").read_text()
CONF = (ROOT / "docker" / "nats.conf").read_text()
CLUSTER_CONF = (ROOT / "docker" / "cluster.conf").read_text()
DOCKERFILE = (ROOT / "Dockerfile").read_text()
HEALTH = re.compile(rb"http://127\.0\.0\.1:8222(/\w+)")
JOBS = 12


def compose_command() -> list[str] | None:
    """Return the command of docker compose, the plugin or the program of old.

    `None` without either.
    """
    if (
        shutil.which("docker")
        and subprocess.run(["docker", "compose", "version"], capture_output=True).returncode == 0
    ):
        return ["docker", "compose"]
    return ["docker-compose"] if shutil.which("docker-compose") else None


def service(name: str) -> str:
    """Return the lines of a service."""
    match = re.search(
        rf"^  {name}:\n((?:    .*\n|\n)+)", COMPOSE.partition("\nservices:\n")[2], re.MULTILINE
    )
    assert match is not None, f"no service {name}"
    return match[1]


# -- the image


@pytest.mark.slow
def test_the_package_is_built_of_the_files_that_the_image_has(tmp_path: Path) -> None:
    build = DOCKERFILE.partition("RUN pip install")[0]
    copied = [words.split() for words in re.findall(r"^COPY (.+)$", build, re.MULTILINE)]
    sources = [source for *names, _ in copied for source in names]
    given = re.findall(r"^!(.+)$", (ROOT / ".dockerignore").read_text(), re.MULTILINE)
    assert [source for source in sources if source not in given] == []
    for source in sources:
        target = tmp_path / "app" / source
        target.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / source).is_dir():
            shutil.copytree(ROOT / source, target)
        else:
            shutil.copy(ROOT / source, target)
    wheels = tmp_path / "wheels"
    done = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", wheels, tmp_path / "app"],
        capture_output=True,
        text=True,
        timeout=4 * PATIENCE,
    )
    if "No matching distribution" in done.stderr and not os.environ.get("CI"):
        pytest.skip("no package index answers")
    assert done.returncode == 0, done.stderr
    assert len(list(wheels.iterdir())) == 1


# -- the file


@pytest.mark.parametrize(
    ("files", "services"),
    [
        (["docker-compose.yml"], ["nats", "producer", "worker"]),
        (
            ["docker-compose.yml", "docker-compose.cluster.yml"],
            ["nats", "nats-2", "nats-3", "producer", "worker"],
        ),
    ],
)
def test_compose_accepts_the_files(files: list[str], services: list[str]) -> None:
    command = compose_command()
    if command is None:
        pytest.skip("no docker compose here")
    options = [option for file in files for option in ("--file", str(ROOT / file))]
    done = subprocess.run(
        [*command, *options, "config", "--services"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.split()) == services


def test_what_the_file_mentions_is_there() -> None:
    assert set(re.findall(r"^(\S+?):", COMPOSE, re.MULTILINE)) == {
        "x-application",
        "services",
        "volumes",
    }
    for program in re.findall(r'\["python", "(\S+)"\]', COMPOSE):
        assert (ROOT / program).is_file()
    for path in re.findall(r"- (\./\S+?):", COMPOSE):
        assert (ROOT / path).is_file()
    assert "/etc/nats/nats.conf" in service("nats")


def test_every_client_finds_the_server_and_waits_until_it_is_healthy() -> None:
    shared = COMPOSE.partition("x-application: &application")[2].partition("\nservices:")[0]
    assert "ASYNCMQ_NATS_SERVERS: nats://nats:4222" in shared
    assert "condition: service_healthy" in shared
    assert "<<: *application" in service("worker")
    assert "<<: *application" in service("producer")
    assert "healthcheck:" in service("nats")


def test_the_store_is_a_volume() -> None:
    volume = re.search(r"- (\w+):(/\S+)\n", service("nats"))
    assert volume is not None
    assert f"\n  {volume[1]}:" in COMPOSE.partition("\nvolumes:")[2]
    assert f"store_dir: {volume[2]}" in CONF


def test_the_server_is_new_enough() -> None:
    version = re.search(r"image: nats:(\d+)\.(\d+)", COMPOSE)
    assert version is not None
    assert (int(version[1]), int(version[2])) >= (2, 12)


def test_a_worker_has_time_to_stop() -> None:
    grace = re.search(r"stop_grace_period: (\d+)s", service("worker"))
    assert grace is not None
    assert int(grace[1]) > Settings.model_fields["shutdown_timeout"].default


def test_a_worker_that_is_unfit_to_live_is_seen() -> None:
    port = re.search(r'ASYNCMQ_NATS_HEALTH_PORT: "(\d+)"', service("worker"))
    assert port is not None
    assert f"http://127.0.0.1:{port[1]}/livez" in service("worker")


def test_the_image_gets_what_it_copies() -> None:
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    for line in re.findall(r"^COPY (.+)$", DOCKERFILE, re.MULTILINE):
        for path in line.split()[:-1]:
            assert (ROOT / path).exists()
            assert f"!{path}" in ignored


# -- the topology


@pytest.fixture
def healthy_server(server: EmbeddedServer, tmp_path: Path) -> Iterator[EmbeddedServer]:
    """A healthy server with the configuration of the compose file, free ports and its own store."""
    config = re.sub(r"^port:.*$|^\s+store_dir:.*$", "", CONF, flags=re.MULTILINE)
    config = config.replace("http_port: 8222", 'http: "127.0.0.1:-1"')
    with EmbeddedServer(tmp_path / "compose", config=config) as started:
        log = (tmp_path / "compose" / "nats-server.log").read_text()
        monitor = re.search(r"Starting http monitor on 127\.0\.0\.1:(\d+)", log)
        path = HEALTH.search(COMPOSE.encode())
        assert monitor is not None
        assert path is not None
        with urllib.request.urlopen(
            f"http://127.0.0.1:{monitor[1]}{path[1].decode()}", timeout=5
        ) as answer:
            assert answer.status == 200
        yield started


@pytest.fixture
def cluster(server: EmbeddedServer, tmp_path: Path) -> Iterator[list[EmbeddedServer]]:
    """Three servers with the configuration of the cluster on free ports and their own stores."""
    config = re.sub(r"^(http_)?port:.*$|^\s+store_dir:.*$", "", CLUSTER_CONF, flags=re.MULTILINE)
    hosts = re.findall(r"nats://([\w-]+):6222", CLUSTER_CONF)
    assert hosts == ["nats", "nats-2", "nats-3"]
    ports = dict(zip(hosts, free_ports(3), strict=True))
    for host, port in ports.items():
        config = config.replace(f"nats://{host}:6222", f"nats://127.0.0.1:{port}")
    servers = [
        EmbeddedServer(
            tmp_path / "cluster" / host,
            config=config.replace("$SERVER_NAME", host).replace(
                "port: 6222", f'listen: "127.0.0.1:{port}"'
            ),
        )
        for host, port in ports.items()
    ]
    try:
        with ThreadPoolExecutor() as threads:  # one alone is not ready
            list(threads.map(EmbeddedServer.start, servers))
        yield servers
    finally:
        for each in servers:
            each.kill()
            each.stop()


def start(service_name: str, server: EmbeddedServer, **environment: str) -> "subprocess.Popen[str]":
    """Start the command of a service."""
    match = re.search(r"command: (\[.+\])\n", service(service_name))
    assert match is not None
    program, *arguments = json.loads(match[1])
    directory = re.search(r"working_dir: /app/(\S+)\n", service(service_name))
    if program == "amq":
        arguments = ["-m", "asyncmq_nats", *arguments]
    environment = {
        **os.environ,
        "ASYNCMQ_NATS_SERVERS": server.url,
        "PYTHONPATH": str(ROOT),
        "PYTHONUNBUFFERED": "1",
        **environment,
    }
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT if directory is None else ROOT / directory[1],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def stop(process: "subprocess.Popen[str]") -> str:
    """Stop as docker does; return what it still wrote."""
    process.send_signal(signal.SIGTERM)
    try:
        return process.communicate(timeout=PATIENCE)[0]
    finally:
        process.kill()


def test_jobs_complete_and_sigterm_ends_both(healthy_server: EmbeddedServer) -> None:
    worker, producer = (
        start("worker", healthy_server),
        start("producer", healthy_server, INTERVAL="0.05"),
    )
    try:
        assert producer.stdout is not None
        seen = [next(producer.stdout) for _ in range(JOBS)]
    finally:
        rest, log = stop(producer), stop(worker)
    assert all(re.match(r"job \d+: (\d+|'.+') \(\d+ ms\)\n", line) for line in seen), seen
    totals = re.search(r"(\d+) added, (\d+) completed, 0 failed\n$", rest)
    assert totals is not None, rest
    assert int(totals[1]) == int(totals[2]) >= JOBS
    assert "has stopped" in log
    assert (producer.returncode, worker.returncode) == (0, 0)


@pytest.mark.slow
def test_jobs_complete_on_a_cluster_that_loses_a_server(cluster: list[EmbeddedServer]) -> None:
    environment = {
        "ASYNCMQ_NATS_SERVERS": ",".join(each.url for each in cluster),
        "ASYNCMQ_NATS_REPLICAS": "3",
    }
    worker = start("worker", cluster[0], **environment)
    producer = start("producer", cluster[0], INTERVAL="0.05", JOBS="60", **environment)
    try:
        assert producer.stdout is not None
        for _ in range(JOBS):
            next(producer.stdout)
        cluster[2].kill()
        output = producer.communicate(timeout=PATIENCE)[0]
    finally:
        producer.kill()
        log = stop(worker)
    assert output.endswith("60 added, 60 completed, 0 failed\n")
    assert (producer.returncode, worker.returncode) == (0, 0), log


def test_a_producer_of_so_many_jobs_ends_by_itself(healthy_server: EmbeddedServer) -> None:
    worker, producer = (
        start("worker", healthy_server),
        start("producer", healthy_server, INTERVAL="0.01", JOBS="6"),
    )
    try:
        output = producer.communicate(timeout=PATIENCE)[0]
    finally:
        producer.kill()
        log = stop(worker)
    assert output.endswith("6 added, 6 completed, 0 failed\n")
    assert producer.returncode == 0
    assert worker.returncode == 0, log
