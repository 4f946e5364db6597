"""The names and signatures that users rely on: AsyncMQ's where it has them."""

import importlib
import inspect
import subprocess
import sys
from collections.abc import Callable
from importlib.resources import files
from typing import Any

import pytest

import asyncmq_nats
from asyncmq_nats.jobs import Job
from asyncmq_nats.queues import Queue
from asyncmq_nats.tasks import TaskWrapper, task
from asyncmq_nats.workers import Worker, run_worker

EXPORTED = [
    "AsyncMQError",
    "Backoff",
    "BulkAddFailed",
    "Event",
    "Fail",
    "FlowProducer",
    "InMemoryBackend",
    "InvalidArgument",
    "Job",
    "JobContext",
    "JobFailed",
    "JobFilter",
    "JobNotFound",
    "NATSBackend",
    "NotSerializable",
    "PayloadTooLarge",
    "Queue",
    "Retry",
    "Settings",
    "State",
    "TaskTimeout",
    "Unconfirmed",
    "Worker",
    "__version__",
    "current_job",
    "deadline",
    "default_backend",
    "event_emitter",
    "list_queues",
    "list_workers",
    "run_worker",
    "set_default_backend",
    "settings",
    "task",
]
"""At least these; a name that is taken away is a breaking change."""

PATHS = [
    ("queues", "Queue"),
    ("tasks", "task"),
    ("tasks", "list_tasks"),
    ("tasks", "TASK_REGISTRY"),
    ("tasks", "TaskRegistry"),
    ("jobs", "Job"),
    ("jobs", "Backoff"),
    ("jobs", "DelayedInfo"),
    ("schedules", "RepeatableInfo"),
    ("workers", "WorkerInfo"),
    ("workers", "list_workers"),
    ("flow", "FlowProducer"),
    ("context", "current_job"),
    ("events", "event_emitter"),
    ("events", "EventEmitter"),
    ("states", "State"),
    ("states", "JOB_STATES"),
    ("workers", "Worker"),
    ("workers", "run_worker"),
    ("workers", "autodiscover_tasks"),
    ("backends.base", "Backend"),
    ("backends.inmemory", "InMemoryBackend"),
    ("backends.memory", "InMemoryBackend"),
    ("backends.nats", "NATSBackend"),
    ("settings", "Settings"),
    ("settings", "settings"),
    ("exceptions", "AsyncMQError"),
    ("exceptions", "PayloadTooLarge"),
    ("exceptions", "JobFailed"),
    ("exceptions", "JobNotFound"),
]


class AsyncMQ:
    """`asyncmq.queues.Queue` of AsyncMQ 0.10.1: what it is called with."""

    def __init__(
        self,
        name,
        backend=None,
        concurrency=3,
        rate_limit=None,
        rate_interval=1.0,
        scan_interval=None,
    ): ...
    async def add(
        self,
        task_id,
        args=None,
        kwargs=None,
        retries=0,
        ttl=None,
        backoff=None,
        priority=5,
        delay=None,
        job_id=None,
        deduplication=None,
        debounce=None,
    ): ...
    async def add_bulk(self, jobs): ...
    def add_repeatable(
        self,
        task_id,
        every=None,
        cron=None,
        args=None,
        kwargs=None,
        retries=0,
        ttl=None,
        priority=5,
        backoff=None,
    ): ...
    async def upsert_repeatable(
        self,
        task_id,
        every=None,
        cron=None,
        args=None,
        kwargs=None,
        retries=0,
        ttl=None,
        priority=5,
        backoff=None,
    ): ...
    async def pause(self): ...
    async def resume(self): ...
    async def clean(self, state, older_than=None): ...
    async def clean_jobs(self, grace, limit, state="completed"): ...
    async def run(self): ...
    def start(self): ...
    async def enqueue(self, payload): ...
    async def enqueue_delayed(self, payload, run_at): ...
    async def delay(self, payload, run_at=None): ...
    async def send(self, payload): ...
    async def get_due_delayed(self): ...
    async def list_delayed(self): ...
    async def remove_delayed(self, job_id): ...
    async def list_repeatables(self): ...
    async def remove_repeatable(self, job_def): ...
    async def pause_repeatable(self, job_def): ...
    async def resume_repeatable(self, job_def): ...
    async def cancel_job(self, job_id): ...
    async def is_job_cancelled(self, job_id): ...
    async def queue_stats(self): ...
    async def list_jobs(self, state): ...
    async def get_job(self, job_id): ...
    async def get_job_state(self, job_id): ...
    async def get_job_result(self, job_id): ...
    async def get_deduplication_job_id(self, deduplication_id): ...
    async def get_debounce_job_id(self, deduplication_id): ...
    async def remove_deduplication_key(self, deduplication_id): ...
    async def remove_job(self, job_id): ...
    async def retry_job(self, job_id): ...
    async def get_jobs(self, types=None, *, start=0, end=-1, asc=False): ...
    async def get_job_counts(self, *types): ...
    async def get_job_count_by_types(self, *types): ...
    async def count(self): ...
    async def get_waiting(self, *, start=0, end=-1, asc=False): ...
    async def get_active(self, *, start=0, end=-1, asc=False): ...
    async def get_completed(self, *, start=0, end=-1, asc=False): ...
    async def get_failed(self, *, start=0, end=-1, asc=False): ...
    async def get_delayed(self, *, start=0, end=-1, asc=False): ...
    async def get_waiting_children(self, *, start=0, end=-1, asc=False): ...
    async def get_paused(self, *, start=0, end=-1, asc=False): ...
    async def get_prioritized(self, *, start=0, end=-1, asc=False): ...
    async def drain(self, include_delayed=False): ...
    async def obliterate(self, *, force=False): ...


METHODS = {name: method for name, method in vars(AsyncMQ).items() if inspect.isfunction(method)}


def parameters(function: Callable[..., Any]) -> list[tuple[str, Any, Any]]:
    """Return name, kind and default of each parameter."""
    return [
        (each.name, each.kind, each.default)
        for each in inspect.signature(function).parameters.values()
    ]


@pytest.mark.parametrize("name", EXPORTED)
def test_a_name_is_exported(name: str) -> None:
    assert name in asyncmq_nats.__all__
    assert getattr(asyncmq_nats, name)


def test_every_exported_name_exists() -> None:
    assert [name for name in asyncmq_nats.__all__ if not hasattr(asyncmq_nats, name)] == []
    assert asyncmq_nats.__all__ == sorted(asyncmq_nats.__all__)


def test_other_names_are_refused_as_usual() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'Quue'"):
        _ = asyncmq_nats.Quue


@pytest.mark.parametrize(("module", "name"), PATHS)
def test_a_name_has_its_path(module: str, name: str) -> None:
    found = importlib.import_module(f"asyncmq_nats.{module}")
    assert name in found.__all__
    assert hasattr(found, name)


def test_both_names_of_a_thing_are_one_thing() -> None:
    assert (
        asyncmq_nats.InMemoryBackend
        is importlib.import_module("asyncmq_nats.backends.memory").InMemoryBackend
    )
    assert (
        asyncmq_nats.NATSBackend
        is importlib.import_module("asyncmq_nats.backends.nats").NATSBackend
    )
    assert asyncmq_nats.Queue is Queue
    assert asyncmq_nats.settings is importlib.import_module("asyncmq_nats.settings").settings


def test_types_are_shipped() -> None:
    assert files("asyncmq_nats").joinpath("py.typed").is_file()


def test_the_in_memory_backend_needs_no_nats() -> None:
    program = (
        "import asyncmq_nats, sys; asyncmq_nats.Queue('a', asyncmq_nats.InMemoryBackend()); "
        "sys.exit('nats' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_no_method_is_missing() -> None:
    assert [name for name in METHODS if not hasattr(Queue, name)] == []


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_called_as_asyncmqs(name: str) -> None:
    ours, theirs = parameters(getattr(Queue, name)), parameters(METHODS[name])
    assert [each[:2] for each in ours[: len(theirs)]] == [each[:2] for each in theirs]
    defaults = dict(
        zip(
            (each[0] for each in theirs),
            ((mine[2], each[2]) for mine, each in zip(ours, theirs, strict=False)),
            strict=True,
        )
    )
    assert {
        each: pair
        for each, pair in defaults.items()
        if pair[0] != pair[1] is not inspect.Parameter.empty
    } == {}
    for _, kind, default in ours[len(theirs) :]:
        assert kind is inspect.Parameter.KEYWORD_ONLY or default is not inspect.Parameter.empty
    assert inspect.iscoroutinefunction(getattr(Queue, name)) is inspect.iscoroutinefunction(
        METHODS[name]
    )


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (task, {"queue": ..., "retries": 0, "ttl": None, "progress": False}),
        (
            run_worker,
            {
                "queue_name": ...,
                "backend": None,
                "concurrency": 3,
                "rate_limit": None,
                "rate_interval": 1.0,
                "repeatables": None,
                "scan_interval": None,
                "drain_event": None,
            },
        ),
        (
            Job,
            {
                "task_id": ...,
                "args": ...,
                "kwargs": ...,
                "retries": 0,
                "max_retries": 3,
                "backoff": 1.5,
                "ttl": None,
                "job_id": ...,
                "created_at": ...,
                "priority": 5,
                "repeat_every": None,
                "depends_on": ...,
                "deduplication": None,
                "active_since": None,
            },
        ),
    ],
    ids=["task", "run_worker", "Job"],
)
def test_positional_arguments_are_asyncmqs(
    function: Callable[..., Any], expected: dict[str, Any]
) -> None:
    found = inspect.signature(function).parameters
    assert list(found)[: len(expected)] == list(expected)
    assert {
        name: default
        for name, default in expected.items()
        if default is not ... and found[name].default != default
    } == {}


def test_enqueue_of_a_task_is_called_as_asyncmqs() -> None:
    found = inspect.signature(TaskWrapper.enqueue).parameters
    assert {name: found[name].default for name in ("backend", "delay", "priority")} == {
        "backend": None,
        "delay": 0,
        "priority": 5,
    }
    assert {found[name].kind for name in ("backend", "delay", "priority")} == {
        inspect.Parameter.KEYWORD_ONLY
    }


@pytest.mark.parametrize("subject", [Queue, Worker, Job, TaskWrapper])
def test_everything_public_is_documented(subject: type) -> None:
    assert subject.__doc__
    members = [
        (name, member) for name, member in inspect.getmembers(subject) if not name.startswith("_")
    ]
    ours = [
        (name, member)
        for name, member in members
        if inspect.isfunction(member) or isinstance(member, property)
    ]
    assert [name for name, member in ours if not inspect.getdoc(member)] == []
