"""The log lines of jobs.

Fields, lines of start and end, failures, and lines that stay with a job.
"""

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import anyio
import anyio.from_thread
import pytest

from asyncmq_nats import Fail, InMemoryBackend, Settings, current_job
from asyncmq_nats.backends.base import Backend, Write
from asyncmq_nats.backends.nats.backend import NATSBackend
from asyncmq_nats.queues import Queue
from asyncmq_nats.runtime.registry import TaskRegistry
from asyncmq_nats.telemetry.logs import FIELDS, JobFields, JobLogHandler, JSONFormatter
from asyncmq_nats.testing import private_server
from tests.receiver import PATIENCE, until
from tests.running import has, make_queue, outcome, run_jobs, running

LINES = "asyncmq_nats.runtime.job_lines"
user_logger = logging.getLogger("tests.telemetry.of_a_task")


class Kept(logging.Handler):
    """Keeps what it is given, as a handler of a program does."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []
        self.addFilter(JobFields())

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


@pytest.fixture
def kept() -> Iterator[Kept]:
    handler, root = Kept(), logging.getLogger()
    level = root.level
    library = logging.getLogger("asyncmq_nats")
    library_level = library.level
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    library.setLevel(logging.NOTSET)  # a command that ran in this process has set it
    yield handler
    root.removeHandler(handler)
    root.setLevel(level)
    library.setLevel(library_level)


# -- fields


async def test_each_record_of_a_task_has_the_fields_of_its_job(
    backend: Backend, kept: Kept
) -> None:
    async def in_loop() -> None:
        user_logger.warning("from the loop")
        if current_job().attempt == 1:
            raise ValueError

    def in_thread() -> None:
        user_logger.warning("from a thread")

    queue = make_queue(backend, in_loop=in_loop, in_thread=in_thread)
    async with running(queue) as worker:
        one = await queue.add("in_loop", retries=1)
        await outcome(queue, one)
        two = await queue.add("in_thread")
        await outcome(queue, two)
        worker_id = worker.id
    user_logger.warning("from elsewhere")
    found = [
        (record.getMessage(), *(getattr(record, name) for name in FIELDS))
        for record in kept.records
        if record.name == user_logger.name
    ]
    assert found == [
        ("from the loop", one, "in_loop", "work", 1, worker_id),
        ("from the loop", one, "in_loop", "work", 2, worker_id),
        ("from a thread", two, "in_thread", "work", 1, worker_id),
        ("from elsewhere", "", "", "", "", ""),
    ]


async def test_a_field_of_the_callers_own_stays(backend: Backend, kept: Kept) -> None:
    async def log() -> None:
        user_logger.warning("x", extra={"queue": "at the baker's"})

    queue = make_queue(backend, log=log)
    await queue.add("log")
    await run_jobs(queue)
    [record] = [r for r in kept.records if r.name == user_logger.name]
    assert (record.queue, record.task) == ("at the baker's", "log")  # type: ignore[attr-defined]


def test_the_json_formatter_makes_one_object_of_a_record() -> None:
    try:
        raise ValueError("broken\nhere")
    except ValueError as error:
        record = logging.LogRecord(
            "app", logging.ERROR, "f.py", 1, "it %s", ("failed\nbadly",), (type(error), error, None)
        )
    record.__dict__ |= {"job_id": "1", "task": "send", "queue": "", "order": 7, "odd": object}
    record.created = 1_700_000_000.25
    line = JSONFormatter().format(record)
    assert "\n" not in line
    fields = json.loads(line)
    assert fields["time"] == "2023-11-14T22:13:20.250+00:00"
    assert (fields["level"], fields["logger"]) == ("ERROR", "app")
    assert fields["message"] == "it failed\nbadly"
    assert (fields["job_id"], fields["task"], fields["order"]) == ("1", "send", 7)
    assert "queue" not in fields
    assert "ValueError: broken" in fields["exception"]


# -- the lines of a worker


async def test_start_and_end_are_one_line_each_with_the_fields(
    backend: Backend, kept: Kept
) -> None:
    async def nothing() -> None: ...

    queue = make_queue(backend, nothing=nothing)
    job_id = await queue.add("nothing")
    await run_jobs(queue)
    lines = [r for r in kept.records if r.name == LINES]
    assert [(r.levelname, r.msg.split(") ")[1].split()[0]) for r in lines] == [
        ("DEBUG", "started,"),
        ("DEBUG", "completed"),
    ]
    assert {r.job_id for r in lines} == {job_id}  # type: ignore[attr-defined]
    assert lines[1].duration >= 0  # type: ignore[attr-defined]


async def test_these_lines_can_be_shown_at_info(settings: Settings, kept: Kept) -> None:
    async def nothing() -> None: ...

    settings.job_log_level = "INFO"
    async with InMemoryBackend(settings) as backend:
        queue = make_queue(backend, nothing=nothing)
        await queue.add("nothing")
        await run_jobs(queue)
    assert {r.levelname for r in kept.records if r.name == LINES} == {"INFO"}


async def test_a_failure_has_its_exception_and_the_fields(backend: Backend, kept: Kept) -> None:
    async def fail() -> None:
        if current_job().attempt == 1:
            raise ValueError("again")
        raise Fail("for good")

    queue = make_queue(backend, fail=fail)
    job_id = await queue.add("fail", retries=3)
    await run_jobs(queue)
    retried, failed = [r for r in kept.records if r.name == LINES and r.levelno > logging.DEBUG]
    assert (retried.levelname, retried.exc_info) == ("INFO", None)
    assert failed.levelname == "ERROR"
    assert failed.exc_info is not None
    assert isinstance(failed.exc_info[1], Fail)
    assert [getattr(failed, name) for name in FIELDS[:4]] == [job_id, "fail", "work", 2]


# -- lines that stay with the job


async def test_lines_of_each_attempt_stay_with_the_job(backend: Backend) -> None:
    async def flaky() -> None:
        job = current_job()
        job.log(f"attempt {job.attempt}")
        job.log("a warning", "WARNING")
        if job.attempt == 1:
            raise ValueError

    queue = make_queue(backend, flaky=flaky)
    job_id = await queue.add("flaky", retries=1)
    await run_jobs(queue)
    lines = await queue.job_logs(job_id)
    assert [(line.attempt, line.level, line.message) for line in lines] == [
        (1, "INFO", "attempt 1"),
        (1, "WARNING", "a warning"),
        (2, "INFO", "attempt 2"),
        (2, "WARNING", "a warning"),
    ]
    assert all(line.at > 1_600_000_000 for line in lines)
    assert await queue.job_logs("no such job") == []
    await has(queue, 1, "completed")


async def test_lines_can_be_read_while_the_job_runs(backend: Backend) -> None:
    go_on = anyio.Event()

    def talk() -> None:
        current_job().log("here I am")
        anyio.from_thread.run(go_on.wait)

    queue = make_queue(backend, talk=talk)
    async with running(queue):
        job_id = await queue.add("talk")

        async def messages() -> list[str]:
            return [line.message for line in await queue.job_logs(job_id)]

        await until(messages, lambda found: found == ["here I am"])
        assert await queue.get_job_state(job_id) == "active"
        go_on.set()
        await outcome(queue, job_id)


async def test_only_the_last_lines_are_kept_and_no_long_ones(settings: Settings) -> None:
    settings.job_log_lines = 3

    async def talk() -> None:
        for number in range(1000):
            current_job().log(number)
        current_job().log("x" * 10_000 + "\ud800")

    async with InMemoryBackend(settings) as backend:
        queue = make_queue(backend, talk=talk)
        job_id = await queue.add("talk")
        await run_jobs(queue)
        messages = [line.message for line in await queue.job_logs(job_id)]
    assert messages[:2] == ["998", "999"]
    assert len(messages) == 3
    assert len(messages[2]) == 2_001


async def test_many_large_lines_fit_into_a_record(settings: Settings) -> None:
    settings.job_log_lines = 10_000

    async def talk() -> None:
        for number in range(500):
            current_job().log(f"{number} " + "é" * 1_500)

    async with InMemoryBackend(settings) as backend:
        queue = make_queue(backend, talk=talk)
        job_id = await queue.add("talk")
        await run_jobs(queue)
        lines = await queue.job_logs(job_id)
    assert 20 < len(lines) < 500
    assert lines[-1].message.startswith("499 ")


@pytest.mark.usefixtures("server")  # there is a program to run
async def test_lines_are_cut_to_what_a_server_takes_and_the_job_ends(
    settings: Settings, tmp_path: Path
) -> None:
    async def talk() -> None:
        for number in range(50):
            current_job().log(f"{number} " + "x" * 1_500)

    with private_server(tmp_path / "small", config="max_payload: 32768") as url:
        async with NATSBackend(servers=url, settings=settings) as backend:
            queue = make_queue(backend, talk=talk)
            job_id = await queue.add("talk")
            async with running(queue):
                assert (await outcome(queue, job_id))["status"] == "completed"
            lines = await queue.job_logs(job_id)
    assert 5 < len(lines) < 50
    assert lines[-1].message.startswith("49 ")


async def test_a_handler_keeps_what_a_task_logs(backend: Backend) -> None:
    handler = JobLogHandler()
    logging.getLogger("tests").addHandler(handler)
    try:

        async def talk() -> None:
            user_logger.warning("as %s", "usual")

        queue = make_queue(backend, talk=talk)
        job_id = await queue.add("talk")
        await run_jobs(queue)
        user_logger.warning("outside a job")
        [line] = await queue.job_logs(job_id)
        assert (line.level, line.message) == ("WARNING", "as usual")
    finally:
        logging.getLogger("tests").removeHandler(handler)


async def test_lines_of_strangers_are_passed_over(backend: Backend) -> None:
    queue = Queue("work", backend, registry=TaskRegistry())
    job_id = await queue.add("x", delay=1000)
    for number, body in enumerate((b"junk", b"[]", b'{"lines":[1,{"at":1}]}', b'{"lines":3}')):
        key = f"$KV.amq_work_scheduler.log.{job_id}.{number}.lines"
        await backend.write("KV_amq_work_scheduler", Write(key, body))
    with anyio.fail_after(PATIENCE):
        assert await queue.job_logs(job_id) == []
    await has(queue, 1, "delayed")
