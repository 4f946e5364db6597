"""Mistakes of users, on both backends.

A clear error, nothing added or declared, and no harm to anybody else.
"""

import math
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from asyncmq_nats.backends.base import Backend, Write
from asyncmq_nats.backends.inmemory import InMemoryBackend
from asyncmq_nats.exceptions import (
    BackendError,
    BulkAddFailed,
    InvalidArgument,
    InvalidQueueName,
    JobFailed,
    JobNotFound,
    NotSerializable,
    PayloadTooLarge,
)
from asyncmq_nats.flow import FlowProducer
from asyncmq_nats.jobs import Job, check_size
from asyncmq_nats.queues import Queue, list_queues
from asyncmq_nats.runtime.registry import TaskRegistry
from asyncmq_nats.tasks import task
from asyncmq_nats.wire.codec import dump_json, load_json
from tests.receiver import Receiver, until
from tests.running import PATIENCE, counted, has, make_queue, run_jobs, running


async def echo(value: Any = None) -> Any:
    return value


@pytest.fixture
def queue(backend: Backend) -> Queue:
    return make_queue(backend, echo=echo)


class Point(BaseModel):
    x: int = 0


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


# -- ids


STRANGE_IDS = {
    "empty": "",
    "long": "x" * 1025,
    "huge": "x" * 5000,
    "dots": "." * 400,
    "surrogate": "\ud800",
    "accents": "é" * 600,
}


@pytest.mark.parametrize("job_id", STRANGE_IDS.values(), ids=STRANGE_IDS.keys())
async def test_no_job_is_found_under_an_id_that_none_can_have(queue: Queue, job_id: str) -> None:
    await queue.add("echo", job_id="there")
    assert await queue.get_job(job_id) is None
    assert await queue.get_job_state(job_id) is None
    for timeout in (0, 5):
        with pytest.raises(JobNotFound):
            await queue.wait_for(job_id, timeout=timeout)
    for look in (
        queue.cancel_job,
        queue.remove_job,
        queue.remove_delayed,
        queue.retry_job,
        queue.is_job_cancelled,
    ):
        assert await look(job_id) is False
    with pytest.raises((JobNotFound, NotSerializable)):
        await queue.add("echo", depends_on=[job_id])
    await has(queue, 1)
    await run_jobs(queue)


@pytest.mark.parametrize("job_id", STRANGE_IDS.values(), ids=STRANGE_IDS.keys())
async def test_no_job_is_added_under_an_id_that_none_can_have(queue: Queue, job_id: str) -> None:
    with pytest.raises(ValueError, match=r"job.id"):
        await queue.add("echo", job_id=job_id)
    with pytest.raises(ValueError, match=r"job.id"):
        await queue.enqueue({"task_id": "echo", "id": job_id})
    with pytest.raises(ValueError, match=r"job.id"):
        await FlowProducer(queue.backend).add_flow(
            "work", [Job("echo", job_id=job_id), Job("echo")]
        )
    await has(queue, 0)


@pytest.mark.parametrize(
    "job_id", ["x" * 1024, "é" * 512, "." * 341], ids=["letters", "accents", "dots"]
)
async def test_an_id_of_the_greatest_length_is_one(queue: Queue, job_id: str) -> None:
    first = await queue.enqueue({"task_id": "echo", "id": job_id, "args": ["ran"]})
    then = await queue.enqueue(
        {"task_id": "echo", "id": job_id[:-1], "args": ["then"], "depends_on": [first]}
    )
    assert await queue.enqueue({"task_id": "echo", "id": job_id}) == first
    async with running(queue):
        assert await queue.wait_for(first, timeout=PATIENCE) == "ran"
        assert await queue.wait_for(then, timeout=PATIENCE) == "then"


@pytest.mark.parametrize("key", ["x" * 5000, "\u3000x" * 900], ids=["letters", "blanks"])
async def test_a_key_of_any_length_makes_a_window(queue: Queue, key: str) -> None:
    first = await queue.add("echo", deduplication={"id": key})
    assert await queue.add("echo", deduplication={"id": key}) == first
    assert await queue.add("echo", deduplication={"id": f"{key}x"}) != first
    assert await queue.get_deduplication_job_id(key) == first
    assert await queue.remove_deduplication_key(key)


@pytest.mark.parametrize("job_id", [None, 5, b"a"])
async def test_an_id_that_is_no_text_is_refused(queue: Queue, job_id: Any) -> None:
    with pytest.raises(TypeError, match="an id is a str, not"):
        await queue.get_job(job_id)


async def test_a_dict_without_an_id_gets_one(queue: Queue) -> None:
    one, other = [
        await queue.enqueue({"task": "echo", "id": None, "created_at": None}) for _ in range(2)
    ]
    assert one != other
    assert await queue.get_job_state(one) == "waiting"


# -- values


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"delay": "5"}, "delay must be a number of seconds, not '5'"),
        ({"delay": timedelta(seconds=5)}, "delay must be a number of seconds"),
        ({"delay": 10**400}, "delay must be a number of seconds"),
        ({"delay": math.inf}, "delay must be a number of seconds, not inf"),
        ({"delay": 1e300}, "delay: Input should be less than"),
        ({"args": 5}, "args must be a list or a tuple"),
        (
            {"args": "abc"},
            r"args must be a list or a tuple, also of a single one: args=\[…\], not 'abc'",
        ),
        ({"args": b"abc"}, "args must be a list"),
        ({"args": {"a": 1}}, "args must be a list"),
        ({"args": Point()}, "args must be a list"),
        ({"kwargs": [1]}, "kwargs must be a dict"),
        ({"kwargs": {1: 2}}, "kwargs"),
        ({"retries": "x"}, "retries: Input should be a valid integer.*, not 'x'"),
        ({"priority": 10**200}, "priority"),
        ({"task_id": None}, "task_id"),
        ({"task_id": 5}, "task_id"),
        ({"timeout": 0}, "timeout"),
        ({"depends_on": 5}, "depends_on must be a list"),
        ({"depends_on": [5]}, "depends_on.0"),
        ({"repeat_every": 0.001}, "shortest interval"),
        ({"repeat_every": []}, "every must be a number of seconds"),
        ({"deduplication": {"id": "a", 5: 1}}, "unknown keys: 5"),
        ({"deduplication": "a"}, "deduplication must be a mapping"),
    ],
)
async def test_a_wrong_value_is_named_as_the_user_knows_it(
    queue: Queue, fields: dict[str, Any], told: str
) -> None:
    given = {"task_id": "echo"} | fields
    with pytest.raises((ValueError, TypeError), match=told) as raised:
        await queue.add(**given)
    assert "wire format" not in str(raised.value)
    with pytest.raises((ValueError, TypeError)) as raised:
        await queue.add_bulk([{"task_id": "echo"}, given])
    assert "job 1" in f"{raised.value} {getattr(raised.value, '__notes__', '')}"
    assert await list_queues(queue.backend) == []


@pytest.mark.parametrize(
    "payload",
    [
        None,
        5,
        "echo",
        {},
        {"task_id": None},
        {"task": "echo", "delay": 5},
        {"task": "echo", "max_retries": "x"},
    ],
)
async def test_a_wrong_payload_is_refused(queue: Queue, payload: Any) -> None:
    for add in (queue.enqueue, queue.send, queue.delay):
        with pytest.raises(InvalidArgument):
            await add(payload)
    with pytest.raises(InvalidArgument):
        await queue.enqueue_delayed(payload, 1e9)
    with pytest.raises(InvalidArgument, match="run_at"):
        await queue.enqueue_delayed({"task": "echo"}, "soon")  # type: ignore[arg-type]
    assert await list_queues(queue.backend) == []


@pytest.mark.parametrize("value", ["deep", "deeper", "deepest", "long", "generated", "infinite"])
async def test_what_could_be_written_but_not_read_is_refused(queue: Queue, value: str) -> None:
    unreadable = {
        "deep": nested(191),
        "deeper": nested(260),
        "deepest": nested(2000),
        "long": 10**4300,
        "generated": (number for number in [math.nan]),
        "infinite": [math.inf],
    }
    with pytest.raises(NotSerializable):
        await queue.add("echo", [unreadable[value]])
    assert await list_queues(queue.backend) == []


@pytest.mark.parametrize(
    "value",
    [nested(190), 10**3999, [{"a": "NaN", "b": number} for number in range(500)]],
    ids=["deep", "long", "wide"],
)
async def test_what_can_just_be_read_goes_through_everything(queue: Queue, value: Any) -> None:
    first = await queue.add("echo", [value])
    then = await queue.add("echo", [value], depends_on=[first])
    async with running(queue):
        assert await queue.wait_for(first, timeout=PATIENCE) == value
        assert await queue.wait_for(then, timeout=PATIENCE) == value


async def test_a_result_that_could_not_be_read_fails_the_job(backend: Backend) -> None:
    async def dig(depth: int) -> Any:
        return nested(depth)

    queue = make_queue(backend, dig=dig)
    ids = [await queue.add("dig", [depth]) for depth in (193, 260, 190)]
    await run_jobs(queue)
    for job_id in ids[:2]:
        with pytest.raises(JobFailed, match="cannot be sent as JSON"):
            await queue.wait_for(job_id, timeout=0)
    assert await queue.wait_for(ids[2], timeout=0) == nested(190)


def test_there_is_room_around_what_can_be_written() -> None:
    body = dump_json(nested(192))
    assert load_json(b'{"a":{"b":%b}}' % body)


async def test_a_bulk_blames_the_right_job_and_adds_nothing_whatever_kind_the_job_is(
    queue: Queue,
) -> None:
    window = {"task_id": "echo", "deduplication": {"id": "window"}}
    for bad in (
        {"task_id": "echo", "args": [math.nan]},
        window | {"args": [math.nan]},
        window | {"args": ["x" * queue.backend.max_body]},
    ):
        with pytest.raises((NotSerializable, PayloadTooLarge)) as raised:
            await queue.add_bulk([window, {"task_id": "echo"}, bad, {"task_id": "echo"}])
        assert raised.value.__notes__ == ["in job 2 of add_bulk"]
    assert await list_queues(queue.backend) == []


async def test_a_bulk_that_stops_half_way_counts_jobs_with_a_window_too(
    queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = queue.backend.write

    async def write(log: str, *writes: Write) -> int:
        if any(b'"bad"' in each.body for each in writes):
            raise BackendError("the disk is full")
        return await real(log, *writes)

    monkeypatch.setattr(queue.backend, "write", write)
    entries: list[dict[str, Any]] = [
        {"task_id": "echo", "deduplication": {"id": "window"}},
        *({"task_id": "echo", "args": [n]} for n in range(1, 1100)),
    ]
    entries[1050]["args"] = ["bad"]
    with pytest.raises(BulkAddFailed) as raised:
        await queue.add_bulk(entries)
    assert sorted(raised.value.added) == list(range(1, 1001))
    assert sorted(raised.value.errors) == [0, *range(1001, 1100)]


@pytest.mark.parametrize(("max_body", "limit"), [(8_000, 7_000), (1_047_552, 1_047_552 - 65_536)])
def test_a_job_leaves_room_for_its_outcome(max_body: int, limit: int) -> None:
    check_size(b"x" * limit, "the job", max_body)
    with pytest.raises(
        PayloadTooLarge, match=f"the job is {limit + 1:,} bytes, the limit is {limit:,}"
    ):
        check_size(b"x" * (limit + 1), "the job", max_body)


# -- queues and their settings


@pytest.mark.parametrize("name", [None, 5, b"q", "", "a.b", "a b", "x" * 65])
def test_a_name_that_no_queue_can_have(name: Any) -> None:
    with pytest.raises(InvalidQueueName, match="is not valid: use 1 to 64 characters"):
        Queue(name, InMemoryBackend())
    with pytest.raises(InvalidQueueName):
        TaskRegistry().register(echo, queue=name)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"backend": "nats://localhost"}, "backend must be a backend, such as NATSBackend"),
        ({"concurrency": 0}, "concurrency must be an integer, 1 or more, not 0"),
        ({"concurrency": "3"}, "concurrency must be an integer"),
        ({"concurrency": None}, "concurrency must be an integer"),
        ({"concurrency": True}, "concurrency must be an integer"),
        ({"rate_limit": -1}, "rate_limit must be an integer, 0 or more"),
        ({"rate_limit": math.nan}, "rate_limit"),
        ({"rate_interval": 0}, "rate_interval must be above 0 s"),
        ({"rate_interval": math.nan}, "rate_interval"),
    ],
)
def test_a_setting_that_means_nothing_is_refused(fields: dict[str, Any], told: str) -> None:
    with pytest.raises(InvalidArgument, match=told):
        Queue("work", **({"backend": InMemoryBackend()} | fields))


@pytest.mark.parametrize(
    "options",
    [
        {"retries": "x"},
        {"retries": -1},
        {"ttl": -1},
        {"timeout": 0},
        {"backoff": "x"},
        {"backoff": -1},
        {"name": 5},
    ],
)
def test_an_option_of_a_task_that_means_nothing_is_refused_where_it_is_written(
    options: dict[str, Any],
) -> None:
    registry = TaskRegistry()
    with pytest.raises(InvalidArgument, match=next(iter(options)).replace("name", "task_id")):
        task("work", registry=registry, **options)(echo)
    assert len(registry) == 0


def test_a_decorator_without_a_queue_is_refused() -> None:
    with pytest.raises(InvalidArgument, match=r"@task\(queue='email'\)"):
        task(echo)  # type: ignore[call-overload]


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda queue: queue.pause("x"), "until must be a number of seconds"),
        (lambda queue: queue.pause(math.nan), "until must be a number of seconds"),
        (lambda queue: queue.wait_for("a", timeout="1"), "timeout must be a number of seconds"),
        (lambda queue: queue.clean("done"), "state must be one of waiting, active"),
        (lambda queue: queue.clean("completed", "x"), "older_than must be a number of seconds"),
        (lambda queue: queue.clean_jobs(0, -1), "limit must be an integer, 0 or more"),
        (lambda queue: queue.clean_jobs(None), "grace must be a number of seconds"),
        (
            lambda queue: queue.list_jobs("completed", limit=-1),
            "limit must be an integer, 0 or more",
        ),
        (lambda queue: queue.list_delayed(limit=-1), "limit must be an integer, 0 or more"),
        (lambda queue: queue.remove_repeatable(None), "must be a dict"),
        (lambda queue: queue.upsert_repeatable("echo", every=5, name=5), "name must be a text"),
        (lambda queue: queue.upsert_repeatable("echo", every=5, args="abc"), "args must be a list"),
        (
            lambda queue: queue.upsert_repeatable("echo", cron="* * * * *", timezone=5),
            "time zone 5 is unknown",
        ),
        (
            lambda queue: queue.upsert_repeatable(
                "echo", cron="* * * * *", timezone="../etc/passwd"
            ),
            "is unknown",
        ),
        (
            lambda queue: queue.upsert_repeatable("echo", cron="* * * * *", timezone="Europe"),
            "is unknown",
        ),
        (
            lambda queue: queue.upsert_repeatable("echo", cron="* * * * *", timezone="x" * 5000),
            "is unknown",
        ),
    ],
)
async def test_a_wrong_value_declares_nothing(
    queue: Queue, call: Callable[[Queue], Any], told: str
) -> None:
    with pytest.raises((ValueError, TypeError), match=told):
        await call(queue)
    assert await list_queues(queue.backend) == []


async def test_a_repeated_job_that_is_too_large_is_refused(queue: Queue) -> None:
    with pytest.raises(PayloadTooLarge, match="the repeated job of task 'echo'"):
        await queue.upsert_repeatable("echo", every=3600, args=["x" * queue.backend.max_body])
    assert await queue.list_repeatables() == []


# -- jobs


def test_a_job_takes_no_argument_that_it_does_not_know() -> None:
    with pytest.raises(ValidationError, match="cron"):
        Job("echo", cron="* * * * *")  # type: ignore[call-arg]
    assert Job.from_dict({"task": "echo", "of_a_later_version": 1}).task_id == "echo"


def test_a_job_makes_an_id_and_a_time_where_none_is_given() -> None:
    job = Job("echo", job_id=None, created_at=None)  # type: ignore[arg-type]
    other = Job("echo", job_id=None)  # type: ignore[arg-type]
    assert job.job_id != other.job_id
    assert job.created_at > 1e9


# -- a queue that is not in use yet


async def test_a_queue_that_was_never_declared_is_empty(queue: Queue) -> None:
    for read in (
        queue.get_jobs,
        queue.get_waiting,
        queue.get_delayed,
        queue.get_completed,
        queue.list_delayed,
        queue.get_due_delayed,
    ):
        assert await read() == []
    assert await queue.remove_delayed("a") is False


@pytest.mark.parametrize("change", ["remove_repeatable", "pause_repeatable"])
async def test_a_queue_that_was_never_declared_has_no_repeatables(
    queue: Queue, change: str
) -> None:
    assert await getattr(queue, change)("a") is False


async def test_nothing_can_be_resumed_where_nothing_is(queue: Queue) -> None:
    with pytest.raises(KeyError):
        await queue.resume_repeatable("a")


# -- what a job that waits for its next attempt tells


async def test_a_job_that_is_tried_again_tells_what_went_wrong(backend: Backend) -> None:
    async def fail() -> None:
        raise ValueError("no")

    queue = make_queue(backend, fail=fail)
    job_id = await queue.add("fail", retries=1, backoff=3600)
    before = backend.now()
    async with running(queue):
        await until(lambda: queue.get_job_state(job_id), lambda state: state == "delayed")
    await counted(queue)
    (job,) = [delayed.payload for delayed in await queue.list_delayed()]
    assert job["last_error"] == "ValueError: no"
    assert "Traceback" in job["error_traceback"]
    assert job["last_attempt"] >= before - 0.1


# -- records that others wrote into the bucket


@pytest.mark.parametrize(
    ("key", "body"),
    [
        ("later.other.released", b'{"task":"echo","delay_until":NaN}'),
        ("fire.series", b"{}"),
        ("fire.series", b'{"at":null}'),
        ("fire.series", b'{"at":"soon"}'),
        ("fire.series", b'{"at":NaN}'),
        ("fire.series", b'{"at":1e300}'),
        ("repeat.other", b'{"x":1}'),
        (
            "repeat.other",
            b'{"rid":"other","task_id":"echo","args":[],"kwargs":{},'
            b'"job":{},"schedule":{"every":0}}',
        ),
        (
            "repeat.other",
            b'{"rid":"other","task_id":"echo","args":[],"kwargs":{},'
            b'"job":{},"schedule":{"cron":"never"}}',
        ),
        (
            "repeat.other",
            b'{"rid":"other","task_id":"echo","args":[],"kwargs":{},'
            b'"job":{"x":1},"schedule":{"every":1}}',
        ),
        (
            "repeat.other",
            b'{"rid":"another","task_id":"echo","args":[],"kwargs":{},'
            b'"job":{},"schedule":{"every":1}}',
        ),
        ("dedup.key", b"{}"),
        ("dedup.key", b'{"job_id":"a","until":"soon"}'),
    ],
)
async def test_a_malformed_record_ends_no_worker_and_no_list(
    backend: Backend, key: str, body: bytes
) -> None:
    queue = make_queue(backend, echo=echo)
    await queue.upsert_repeatable("echo", every=3600, name="series")
    async with running(queue):
        await backend.write("KV_amq_work_scheduler", Write(f"$KV.amq_work_scheduler.{key}", body))
        if key == "repeat.other":
            await backend.write(
                "KV_amq_work_scheduler", Write("$KV.amq_work_scheduler.fire.other", b'{"at":1}')
            )
        job_id = await queue.add("echo", [1], delay=0.01, deduplication={"id": "key"})
        assert await queue.wait_for(job_id, timeout=PATIENCE) == 1
        if key.startswith("fire"):  # it goes
            await until(
                lambda: backend.last("KV_amq_work_scheduler", "$KV.amq_work_scheduler.fire.*"),
                lambda found: not found,
            )
        assert [each.job_def["name"] for each in await queue.list_repeatables()] == ["series"]
    if key == "repeat.other":
        assert await queue.remove_repeatable("other")


async def test_a_malformed_claim_claims_nothing(backend: Backend) -> None:
    queue = make_queue(backend, echo=echo)
    job_id = await queue.add("echo", [1])
    (delivery,) = await Receiver(backend, "amq_work").pull("tier_5")
    await backend.write(
        "KV_amq_work_scheduler", Write(f"$KV.amq_work_scheduler.done.{job_id}.claim", b"{}")
    )
    delivery.nak()
    async with running(queue):
        assert await queue.wait_for(job_id, timeout=PATIENCE) == 1
