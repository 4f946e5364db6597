"""The blocking queue: threads, forks, event loops around it, and how it ends."""

import asyncio
import inspect
import json
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import anyio
import pytest

import asyncmq_nats
from asyncmq_nats import (
    FlowProducer,
    Job,
    JobFailed,
    NATSBackend,
    NotSerializable,
    sync,
    task,
)
from asyncmq_nats.backends.nats.embedded.server import EmbeddedServer
from asyncmq_nats.exceptions import BackendError, LoopRunning
from asyncmq_nats.runtime.registry import TaskRegistry
from asyncmq_nats.sync import Queue, enqueue
from asyncmq_nats.testing import VirtualBackend, assert_enqueued, virtual_backend, worker
from tests.receiver import PATIENCE
from tests.running import counted, has

PROGRAMS = Path(__file__).parent / "programs"
registry = TaskRegistry()


@task(queue="mail", name="send", registry=registry)
async def send(to: str, text: str = "hi") -> str:
    return f"{text} {to}"


@task(queue="mail", name="fail", registry=registry)
async def fail() -> None:
    raise ValueError("no")


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    """No test leaves a loop to the next one."""
    yield
    sync.close()
    assert [each for each in threading.enumerate() if each.name == sync.THREAD_NAME] == []


@pytest.fixture
def server(server: EmbeddedServer) -> Iterator[EmbeddedServer]:
    """A server that outlives the connections to it."""
    yield server
    sync.close()


@pytest.fixture
def virtual() -> Iterator[VirtualBackend]:
    with virtual_backend() as backend:
        yield backend


def args_of(server: EmbeddedServer) -> Counter[str]:
    """Return what the jobs of the queue `mail` were given."""

    async def read() -> list[dict[str, Any]]:
        async with NATSBackend(server.url) as backend:
            queue = asyncmq_nats.Queue("mail", backend)
            await counted(queue)
            return await queue.get_jobs("waiting")

    return Counter(job["args"][0] for job in asyncio.run(read()))


# -- the same as the async one


def test_a_job_is_added_and_waited_for(virtual: VirtualBackend) -> None:
    virtual.inline = True
    queue = Queue("mail", registry=registry)
    assert queue.wait_for(queue.add("send", ["ada"])) == "hi ada"
    assert queue.wait_for(enqueue(send, "ada", text="bye")) == "bye ada"
    with pytest.raises(JobFailed, match="ValueError: no"):
        queue.wait_for(enqueue(fail))
    assert queue.queue_stats()["completed"] == 2


def test_errors_are_those_of_the_async_queue(virtual: VirtualBackend) -> None:
    queue = Queue("mail", registry=registry)
    with pytest.raises(NotSerializable, match="argument"):
        queue.add("other", [object()])
    with pytest.raises(asyncmq_nats.JobNotFound):
        queue.wait_for("none")
    with pytest.raises(TimeoutError):
        queue.wait_for(queue.add("send", ["ada"], delay=60), timeout=0.01)
    with pytest.raises(ValueError, match="A-Z"):
        Queue("not a name")
    with pytest.raises(TypeError, match="colour"):
        Queue("mail", colour="red")


def test_every_async_method_is_there_with_its_signature() -> None:
    for name, method in vars(asyncmq_nats.Queue).items():
        if name.startswith("_") or name == "run":
            continue
        if inspect.iscoroutinefunction(method) or inspect.isasyncgenfunction(method):
            found = getattr(Queue("mail"), name)
            expected = list(inspect.signature(method).parameters.values())[1:]
            assert list(inspect.signature(found).parameters.values()) == expected
            assert found.__name__ == method.__name__


def test_the_queues_of_a_backend_are_listed(virtual: VirtualBackend) -> None:
    Queue("b").add("any")
    Queue("a").add("any")
    assert sync.list_queues() == ["a", "b"]


def test_anything_async_is_run(virtual: VirtualBackend) -> None:
    jobs = [Job(task_id="send", args=["a"]), Job(task_id="send", args=["b"])]
    ids = sync.run(FlowProducer().add_flow, "mail", jobs)
    assert ids == [job.id for job in jobs]


def test_events_are_iterated(server: EmbeddedServer) -> None:
    queue = Queue("mail", NATSBackend(server.url))
    queue.add("send", ["before"])
    heard: list[str] = []
    listens = threading.Event()

    def listen() -> None:
        events = queue.events("job:waiting", "job:delayed")
        listens.set()
        for event in events:
            heard.append(event.job_id)
            if len(heard) == 2:
                break
        events.close()

    thread = threading.Thread(target=listen)
    thread.start()
    added: list[str] = []
    while thread.is_alive():
        added.append(queue.add("send", ["after"], delay=60))
        thread.join(0.02)
    assert heard == [each for each in added if each in heard]


def test_context_variables_travel_to_the_call(virtual: VirtualBackend) -> None:
    name: ContextVar[str] = ContextVar("name", default="none")

    async def ask() -> str:
        return name.get()

    name.set("caller")
    assert sync.run(ask) == "caller"


# -- in an event loop


async def test_in_an_event_loop_it_says_what_to_use_instead(virtual: VirtualBackend) -> None:
    queue = Queue("mail", registry=registry)
    with pytest.raises(LoopRunning, match=r"await Queue\.add"):
        queue.add("send", ["ada"])
    with pytest.raises(LoopRunning, match=r"await task\.enqueue"):
        enqueue(send, "ada")
    with pytest.raises(LoopRunning, match="async for"):
        next(queue.events())
    with pytest.raises(LoopRunning, match="await it"):
        sync.run(asyncmq_nats.list_queues, virtual)


async def test_in_a_thread_beside_an_event_loop_it_works(server: EmbeddedServer) -> None:
    backend = NATSBackend(server.url)
    async with backend:
        plain, blocking = asyncmq_nats.Queue("mail", backend), Queue("mail", backend)
        for number in range(3):
            await plain.add("send", [f"async {number}"])
            await anyio.to_thread.run_sync(blocking.add, "send", [f"sync {number}"])
        await has(plain, 6)
    await anyio.to_thread.run_sync(sync.close)


async def test_a_sync_task_enqueues(virtual: VirtualBackend) -> None:
    def pass_on(to: str) -> None:
        enqueue(send, to)

    registry.register(pass_on, queue="mail", name="pass_on")
    queue = asyncmq_nats.Queue("mail", registry=registry)
    async with worker(queue):
        await queue.add("pass_on", ["ada"])
        await virtual.clock.run_until_idle()
    assert assert_enqueued(send, ["ada"]).state == "completed"
    await anyio.to_thread.run_sync(sync.close)


# -- threads and forks


def test_threads_share_it(server: EmbeddedServer) -> None:
    queue = Queue("mail", NATSBackend(server.url))
    ready = threading.Barrier(16)

    def add(number: int) -> list[str]:
        ready.wait(PATIENCE)  # the first calls come at the same time
        return [queue.add("send", [f"{number}-{index}"]) for index in range(20)]

    with ThreadPoolExecutor(16) as pool:
        ids = [job_id for part in pool.map(add, range(16)) for job_id in part]
    assert len(set(ids)) == 320
    assert set(args_of(server).values()) == {1}
    assert len(args_of(server)) == 320
    loops = [each for each in threading.enumerate() if each.name == sync.THREAD_NAME]
    assert len(loops) == 1


def test_it_works_right_after_a_fork(server: EmbeddedServer) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(PROGRAMS / "fork.py"), server.url],
        check=False,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert (done.returncode, done.stderr) == (0, "")
    found = args_of(server)
    children = {f"child {number}{more}" for number in range(4) for more in ("", " again")}
    assert {name: found[name] for name in found if name != "thread"} == dict.fromkeys(
        children | {"parent before", "parent after"}, 1
    )


@pytest.mark.parametrize("preload", [False, True], ids=["", "preload"])
def test_under_gunicorn_every_request_enqueues(server: EmbeddedServer, preload: bool) -> None:
    pytest.importorskip("gunicorn")
    pytest.importorskip("flask")
    arguments = ["-w", "2", "--threads", "4", "-b", "127.0.0.1:0", "--worker-class", "gthread"]
    arguments += ["--preload"] if preload else []
    with subprocess.Popen(
        [sys.executable, "-m", "gunicorn", *arguments, "web:app"],
        cwd=PROGRAMS,
        env=_environment(server, preload=preload),
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            address = _address_of(process)
            with ThreadPoolExecutor(8) as pool:
                answers = list(pool.map(lambda number: _get(f"{address}/{number}"), range(60)))
        finally:
            process.terminate()
            process.communicate(timeout=PATIENCE)
    assert process.returncode == 0
    assert [answer["args"] for answer in answers] == [[str(number)] for number in range(60)]
    expected = Counter(str(number) for number in range(60))
    if preload:
        expected["from the parent"] = 1
    assert args_of(server) == expected


def _environment(server: EmbeddedServer, *, preload: bool) -> dict[str, str]:
    import os

    root = str(Path(__file__).parents[2])
    own = {"NATS": server.url, "PYTHONPATH": root, "PRELOAD": "1" if preload else ""}
    return os.environ | own


def _address_of(process: "subprocess.Popen[str]") -> str:
    assert process.stderr is not None
    told = []
    for line in process.stderr:
        told.append(line)
        if "Listening at: " in line:
            return line.partition("Listening at: ")[2].split()[0]
    raise AssertionError("".join(told))


def _get(url: str) -> Any:
    from urllib.request import urlopen

    with urlopen(url, timeout=PATIENCE) as answer:
        return json.load(answer)


# -- the end


def test_it_starts_again_after_it_was_closed(server: EmbeddedServer) -> None:
    queue = Queue("mail", NATSBackend(server.url))
    for _ in range(3):
        queue.add("send", ["again"])
        sync.close()
    assert args_of(server) == Counter({"again": 3})
    assert queue.count() == 3


def test_closing_it_ends_what_is_under_way(virtual: VirtualBackend) -> None:
    failures: list[BaseException] = []
    begun = threading.Event()

    async def wait() -> None:
        begun.set()
        await anyio.sleep_forever()

    def call() -> None:
        try:
            sync.run(wait)
        except BackendError as error:
            failures.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    assert begun.wait(PATIENCE)
    sync.close()
    thread.join(PATIENCE)
    assert "sync.close() was called" in str(failures[0])


def test_a_script_ends_by_itself(server: EmbeddedServer) -> None:
    program = (
        "import sys; from asyncmq_nats import NATSBackend; from asyncmq_nats.sync import Queue;"
        "Queue('mail', NATSBackend(sys.argv[1])).add('send', ['script'])"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program, server.url],
        check=False,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert args_of(server) == Counter(["script"])


def test_ctrl_c_ends_every_wait(server: EmbeddedServer) -> None:
    program = (
        "import sys, os, signal, threading, time\n"
        "from asyncmq_nats import NATSBackend\n"
        "from asyncmq_nats.sync import Queue\n"
        "queue = Queue('mail', NATSBackend(sys.argv[1]))\n"
        "job = queue.add('send', ['x'])\n"
        # Again and again, as a person does: Python drops one that comes in a destructor.
        "def interrupt():\n"
        "    while True:\n"
        "        time.sleep(0.5)\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "threading.Thread(target=interrupt, daemon=True).start()\n"
        "queue.wait_for(job)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, server.url],
        check=False,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode != 0
    assert "KeyboardInterrupt" in done.stderr


def test_asyncio_run_beside_it_has_its_own_connection(server: EmbeddedServer) -> None:
    backend = NATSBackend(server.url)
    queue = Queue("mail", backend)

    async def add() -> None:
        async with backend:
            await asyncmq_nats.Queue("mail", backend).add("send", ["async"])

    queue.add("send", ["sync"])
    asyncio.run(add())
    queue.add("send", ["sync"])
    assert args_of(server) == Counter({"sync": 2, "async": 1})
