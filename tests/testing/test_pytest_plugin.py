"""The fixtures, in a pytest of its own."""

import os
import re
import subprocess
import sys
from pathlib import Path

TESTS = """
import asyncio

import pytest

from asyncmq_nats import NATSBackend, Queue, default_backend, task
from asyncmq_nats.testing import assert_enqueued, enqueued

ran = []

@task(queue="test")
async def note(name: str) -> str:
    ran.append(name)
    return name

@pytest.fixture
def anyio_backend():
    return "asyncio"

@pytest.fixture(autouse=True)
def forget():
    ran.clear()

def test_sync(amq_clock):
    asyncio.run(note.enqueue("a", delay=60))
    assert_enqueued(note, args=["a"], delay=60)
    asyncio.run(amq_clock.advance("1m"))
    assert ran == ["a"]

def test_each_test_begins_again(amq_backend):
    assert enqueued() == []
    assert default_backend() is amq_backend

@pytest.mark.anyio
async def test_async(amq_clock, amq_queue):
    job_id = await amq_queue.add(note.task_id, ["b"])
    await amq_clock.run_until_idle()
    assert await amq_queue.get_job_result(job_id) == "b"

@pytest.mark.anyio
async def test_worker(amq_clock, amq_queue, amq_worker):
    async with amq_worker as worker:
        assert worker.id
        await note.enqueue("c")
        await amq_clock.run_until_idle()
    assert ran == ["c"]

def test_inline(amq_inline):
    asyncio.run(note.enqueue("d"))
    assert ran == ["d"]

@pytest.mark.anyio
async def test_server(amq_server):
    async with NATSBackend(amq_server) as backend:
        assert await Queue("test", backend).queue_stats()
        assert await backend.ping() < 60
"""

SHARED = """
import asyncio

from asyncmq_nats import Queue, default_backend
from asyncmq_nats.testing import VirtualBackend, assert_enqueued, enqueued

queue = Queue("made-at-import")

def test_a_queue_of_a_module_is_virtual(amq_backend):
    assert queue.backend is amq_backend
    asyncio.run(queue.add("any", job_id="one"))
    assert_enqueued("any", count=1)

def test_its_jobs_are_gone_in_the_next_test(amq_backend, amq_inline):
    assert enqueued() == []
    assert asyncio.run(queue.queue_stats())["waiting"] == 0
    asyncio.run(queue.add("any", job_id="one"))
    assert_enqueued("any", count=1)

def test_inline_ends_with_its_test():
    assert default_backend().inline is False
"""


def run_pytest(folder: Path, text: str, ini: str = "") -> subprocess.CompletedProcess[str]:
    (folder / "test_it.py").write_text(text)
    (folder / "pytest.ini").write_text(f"[pytest]\nfilterwarnings = error\n{ini}")
    plugin = "asyncmq_nats.pytest_plugin"
    options = ["-p", plugin, "-p", "anyio.pytest_plugin", "-q", str(folder)]
    return subprocess.run(
        [sys.executable, "-m", "pytest", *options],
        env=os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},  # fewer to load
        check=False,
        capture_output=True,
        text=True,
    )


def test_the_fixtures_work_in_sync_and_in_async_tests(tmp_path: Path) -> None:
    done = run_pytest(tmp_path, TESTS)
    assert done.returncode == 0, done.stdout
    assert "6 passed" in done.stdout, done.stdout


def test_a_queue_that_is_made_at_import_is_virtual_if_so_set(tmp_path: Path) -> None:
    done = run_pytest(tmp_path, SHARED, "asyncmq_nats_virtual = true\n")
    assert done.returncode == 0, done.stdout


def test_pytest_loads_nothing_of_the_package_before_it_is_used() -> None:
    program = (
        "import asyncmq_nats.pytest_plugin, sys;"
        "sys.exit('asyncmq_nats.testing' in sys.modules or 'nats' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_the_page_of_the_documentation_passes(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "testing.md").read_text()
    blocks = dict(
        re.findall(r'^```python title="(\S+)"\n(.*?)^```$', page, re.MULTILINE | re.DOTALL)
    )
    assert sorted(blocks) == ["shop.py", "test_shop.py"]
    (tmp_path / "shop.py").write_text(blocks["shop.py"])
    done = run_pytest(tmp_path, blocks["test_shop.py"])
    assert done.returncode == 0, done.stdout
    assert "5 passed" in done.stdout, done.stdout
