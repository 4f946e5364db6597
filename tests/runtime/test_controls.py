"""The list of workers, and what workers are told, on both backends."""

import os
import socket
from typing import Any

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncmq_nats.backends.base import Backend, Write
from asyncmq_nats.runtime.control import (
    PAUSE_ANSWER_TIMEOUT,
    WorkerRegistry,
    list_workers,
    parse_pause,
)
from asyncmq_nats.settings import Settings
from asyncmq_nats.store.queue_store import QueueStore
from asyncmq_nats.wire.codec import dump_json
from asyncmq_nats.wire.keys import QueueSubjects, workers_bucket
from tests.receiver import until
from tests.running import PATIENCE, make_queue, outcome, race, running


@pytest.fixture
def settings() -> Settings:
    return Settings(stalled_after=5, publish_timeout=10, shutdown_timeout=5, heartbeat_interval=0.5)


def entry(backend: Backend, worker: str, queue: str = "work") -> WorkerRegistry:
    return WorkerRegistry(QueueStore.of(backend, queue), worker, 3, dict)


async def test_there_are_no_workers_before_the_first(backend: Backend) -> None:
    assert await make_queue(backend).list_workers() == []


async def test_a_worker_is_listed_with_all_about_it(backend: Backend, twin: Backend) -> None:
    started, opened = anyio.Event(), anyio.Event()

    async def work() -> None:
        started.set()
        await opened.wait()

    queue, other = make_queue(backend, concurrency=7, work=work), make_queue(twin)
    before = backend.now()
    async with running(queue) as worker:
        job_id = await queue.add("work")
        with anyio.fail_after(PATIENCE):
            await started.wait()
        (seen,) = await until(
            other.list_workers, lambda workers: bool(workers and workers[0].running)
        )
        assert (seen.id, seen.queue, seen.concurrency, seen.running) == (
            worker.id,
            "work",
            7,
            (job_id,),
        )
        assert (seen.host, seen.pid) == (socket.gethostname(), os.getpid())
        assert before - 0.1 <= seen.since <= seen.heartbeat <= backend.now() + 0.1
        start = seen.start_of(job_id)
        assert start is not None
        assert seen.since - 0.1 <= start <= seen.heartbeat + 0.1
        assert seen.start_of("another") is None
        opened.set()
        await outcome(queue, job_id)
        await until(other.list_workers, lambda workers: not workers[0].running)


async def test_a_worker_that_stopped_is_not_listed(backend: Backend) -> None:
    queue = make_queue(backend)
    async with running(queue):
        await until(queue.list_workers, lambda found: len(found) == 1)
    assert await queue.list_workers() == []


async def test_a_heartbeat_on_its_way_does_not_outlast_the_worker(backend: Backend) -> None:
    for number in range(10):
        worker = entry(backend, f"worker-{number}")
        await worker.enter()
        async with anyio.create_task_group() as group:
            group.start_soon(worker.beat)
            group.start_soon(worker.leave)
            group.start_soon(worker.beat)
    assert await list_workers(backend) == []


async def test_a_heartbeat_renews_the_entry(backend: Backend) -> None:
    queue = make_queue(backend)
    async with running(queue):
        (first,) = await queue.list_workers()
        (later,) = await until(
            queue.list_workers, lambda workers: workers[0].heartbeat > first.heartbeat
        )
        assert (later.id, later.since) == (first.id, first.since)
        # Longer than an entry that is not renewed lasts.
        await until(
            queue.list_workers,
            lambda workers: (
                workers[0].heartbeat > first.heartbeat + 3.5 * backend.settings.heartbeat_interval
            ),
        )


async def test_an_entry_that_is_not_renewed_goes(backend: Backend) -> None:
    """The entry of a killed worker."""
    await entry(backend, "lost").enter()
    assert [worker.id for worker in await list_workers(backend)] == ["lost"]
    await until(lambda: list_workers(backend), lambda workers: workers == [])


async def test_workers_are_listed_by_queue_or_all(backend: Backend) -> None:
    one, other = make_queue(backend, "one"), make_queue(backend, "other")
    async with running(one) as first, running(other) as second, running(other) as third:
        (listed,) = await until(one.list_workers, lambda found: len(found) == 1)
        assert listed.id == first.id
        others = await until(other.list_workers, lambda found: len(found) == 2)
        assert {worker.id for worker in others} == {second.id, third.id}
        await until(lambda: list_workers(backend), lambda found: len(found) == 3)


async def test_workers_of_any_name_can_be_listed(backend: Backend) -> None:
    worker = entry(backend, "a.b c*>")
    await worker.enter()
    assert [seen.id for seen in await list_workers(backend)] == ["a.b c*>"]
    await worker.leave()
    assert await list_workers(backend) == []


async def test_pause_does_not_wait_for_a_worker_that_is_gone(
    backend: Backend, caplog: pytest.LogCaptureFixture
) -> None:
    await entry(backend, "lost").enter()
    queue = make_queue(backend)
    async with running(queue):
        with anyio.fail_after(5):
            await queue.pause()
        assert "no answer to pause from lost" in caplog.text
        await queue.resume()


async def test_pauses_at_the_same_time_are_all_answered(
    backend: Backend, twin: Backend, caplog: pytest.LogCaptureFixture
) -> None:
    queue, other = make_queue(backend), make_queue(twin)
    async with running(queue), running(other):
        with anyio.fail_after(PATIENCE):
            await race(*[queue.pause, other.pause] * 3)
    assert "no answer" not in caplog.text
    assert await queue.is_paused()


async def test_a_queue_without_workers_is_paused_at_once(backend: Backend) -> None:
    queue = make_queue(backend)
    with anyio.fail_after(PAUSE_ANSWER_TIMEOUT):
        await queue.pause()
    assert await queue.is_paused()


async def test_queues_are_paused_one_by_one(backend: Backend) -> None:
    ran: list[Any] = []
    one, other = (
        make_queue(backend, "one", work=lambda: None),
        make_queue(backend, "other", work=lambda: ran.append(1)),
    )
    async with running(one), running(other):
        await other.pause()
        await other.add("work")
        await outcome(one, await one.add("work"))
        assert await other.is_paused()
        assert not await one.is_paused()
        assert ran == []


# -- records and signals of ours that somebody else has written: a warning, and never the end

JUNK = [
    b"",
    b"\xff\xfe",
    b"junk",
    b"{}",
    b"[]",
    b"null",
    b"5",
    b'"text"',
    b"NaN",
    b"1e999",
    b"-1e999",
    b"9" * 5000,
    b"[" * 300,
    b'{"id": 5}',
    b'{"tokens": "x", "at": [], "leased": 5}',
    b'{"tokens": 1, "at": 1e300, "leased": {}}',
    b'{"tokens": 1, "at": 5, "leased": {"w": [1]}}',
    b'{"tokens": -1e308, "at": -1e308, "leased": {"w": [1000000000, 1e300]}}',
    b'{"tokens": 1e999, "at": 5, "leased": {}}',
]
SOUND_ENTRY: dict[str, Any] = {
    "id": "w",
    "queue": "work",
    "concurrency": 1,
    "host": "h",
    "pid": 1,
    "since": 1.0,
    "running": [],
}


@pytest.mark.parametrize("junk", JUNK)
async def test_a_malformed_pause_record_stops_nothing(junk: bytes, backend: Backend) -> None:
    async def echo(value: int) -> int:
        return value

    queue = make_queue(backend, echo=echo)
    await queue._assets.declare_all()
    subjects = QueueSubjects(backend.settings.prefix, "work")
    await backend.write(subjects.bucket_log, Write(subjects.pause, junk))
    async with running(queue):
        job_id = await queue.add("echo", [7], priority=3)
        assert await queue.wait_for(job_id, timeout=PATIENCE) == 7
        await queue.pause()
        await queue.resume()
        assert await queue.wait_for(await queue.add("echo", [8]), timeout=PATIENCE) == 8


@pytest.mark.parametrize("junk", JUNK)
async def test_a_malformed_token_bucket_is_made_again(junk: bytes, backend: Backend) -> None:
    async def echo(value: int) -> int:
        return value

    queue = make_queue(backend, echo=echo)
    queue.rate_limit = 1000
    await queue._assets.declare_all()
    subjects = QueueSubjects(backend.settings.prefix, "work")
    await backend.write(subjects.bucket_log, Write(subjects.rate_limit, junk))
    async with running(queue):
        assert await queue.wait_for(await queue.add("echo", [7]), timeout=PATIENCE) == 7


@pytest.mark.parametrize("starts", [None, 1, [], [1.0, 2.0], ["1"], [True], {"a": 1}])
async def test_a_worker_whose_starts_are_malformed_is_listed_without(
    starts: Any, backend: Backend
) -> None:
    async with running(make_queue(backend)):  # makes the bucket
        log, key = workers_bucket(backend.settings.prefix)
        entry = SOUND_ENTRY | {"id": "other", "running": ["job"], "starts": starts}
        await backend.write(log, Write(f"{key}other", dump_json(entry)))
        (other,) = [each for each in await list_workers(backend) if each.id == "other"]
    assert other.running == ("job",)
    assert other.start_of("job") is None


@pytest.mark.parametrize(
    "junk",
    [
        *JUNK,
        *(dump_json(SOUND_ENTRY | {name: None}) for name in SOUND_ENTRY),
        *(dump_json(SOUND_ENTRY | {name: {"a": 1}}) for name in SOUND_ENTRY),
        dump_json({name: value for name, value in SOUND_ENTRY.items() if name != "queue"}),
        dump_json(SOUND_ENTRY | {"running": [1]}),
    ],
)
async def test_a_malformed_entry_hides_no_worker_and_lets_queues_pause(
    junk: bytes, backend: Backend, caplog: pytest.LogCaptureFixture
) -> None:
    await entry(backend, "sound").enter()
    log, key = workers_bucket(backend.settings.prefix)
    await backend.write(log, Write(f"{key}junk", junk))
    assert [worker.id for worker in await list_workers(backend)] == ["sound"]
    await entry(backend, "other").leave()
    queue = make_queue(backend, "others")
    await queue.pause()
    assert await queue.is_paused()


@pytest.mark.parametrize(
    ("told", "limit"),
    [
        ([5, 60], (5, 60.0)),
        ([0, 0.5], (0, 0.5)),
        (None, None),
        *(
            (junk, None)
            for junk in (5, "5/s", [5], [5, 0], [-1, 1], [5, "1"], ["5", 1], [1, 1, 1], {"a": 1})
        ),
    ],
)
async def test_a_malformed_limit_is_none(
    told: object, limit: tuple[int, float] | None, backend: Backend
) -> None:
    await entry(backend, "sound").enter()
    log, key = workers_bucket(backend.settings.prefix)
    await backend.write(log, Write(f"{key}sound", dump_json(SOUND_ENTRY | {"rate_limit": told})))
    (worker,) = await list_workers(backend)
    assert worker.rate_limit == limit


@pytest.mark.parametrize("what", ["pause", "resume", "cancel", "tier", "answer.x", "other"])
async def test_malformed_signals_end_no_worker(what: str, backend: Backend) -> None:
    async def echo(value: int) -> int:
        return value

    queue = make_queue(backend, echo=echo)
    subject = QueueSubjects(backend.settings.prefix, "work").control(what)
    times = str(backend.now() + 60).encode()
    bodies = [*JUNK, times + b" amq.work.control.pause", times + b" > bad\r\nPUB x 0\r\n"]
    bodies += [times + b" amq.work.control.answer." + b"x" * 5000, times + b" $JS.API.x"]
    async with running(queue) as worker:
        for body in bodies:
            await backend.publish(subject, body)
        await queue.resume()
        assert await queue.wait_for(await queue.add("echo", [7]), timeout=PATIENCE) == 7
        (info,) = await until(queue.list_workers, lambda found: len(found) == 1)
        assert info.id == worker.id


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("5.5 q.answer.ab12", (5.5, "q.answer.ab12")),
        ("5.5", (5.5, "")),
        ("inf q.answer.ab12", (32_503_680_000.0, "q.answer.ab12")),
        ("5 q.answer.", (5.0, "")),
        ("5 q.answer.a.b", (5.0, "")),
        ("5 q.answer.a b", (5.0, "")),
        ("5 q.answer.ä", (5.0, "")),
        ("5 q.answer.*", (5.0, "")),
        ("5 $JS.API.STREAM.DELETE.x", (5.0, "")),
        ("nan", None),
        ("", None),
        (" x", None),
        ("soon", None),
    ],
)
def test_a_signal_to_pause_is_read_strictly(text: str, parsed: tuple[float, str] | None) -> None:
    assert parse_pause(text, "q.answer.") == parsed


@given(st.text() | st.builds("{} {}".format, st.floats(), st.text()))
def test_no_text_breaks_the_reading_of_a_signal(text: str) -> None:
    parsed = parse_pause(text, "q.answer.")
    assert parsed is None or parsed[0] <= 32_503_680_000.0
    assert parsed is None or parsed[1] == "" or parsed[1].startswith("q.answer.")
