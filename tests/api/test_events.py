"""Events: those of a queue from any process, those of this process's workers, and `wait_for`.

The tests run on both backends.
"""

import functools
import json
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import anyio
import anyio.from_thread
import pytest

from asyncmq_nats.backends.base import Backend
from asyncmq_nats.context import current_job
from asyncmq_nats.events import Event, EventEmitter, event_emitter, read_event
from asyncmq_nats.exceptions import InvalidArgument, JobFailed, JobNotFound
from asyncmq_nats.jobs import Job
from asyncmq_nats.queues import Queue
from asyncmq_nats.settings import Settings
from asyncmq_nats.store import announcing
from asyncmq_nats.store import listening as listening_module
from asyncmq_nats.store.listening import Inbox
from tests.receiver import holds, until
from tests.running import PATIENCE, lose_worker, make_queue, only, outcome, race, run_jobs, running


async def echo(value: Any = None) -> Any:
    return value


async def fail() -> None:
    raise ValueError("no")


def queue_of(backend: Backend, name: str = "work", **tasks: Any) -> Queue:
    return make_queue(backend, name, echo=echo, fail=fail, **tasks)


class Heard:
    """The events that a reader has heard."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self._changed = anyio.Event()

    def note(self, event: Event) -> None:
        self.events.append(event)
        self._changed.set()
        self._changed = anyio.Event()

    async def until(self, name: str, times: int = 1) -> list[Event]:
        """Wait until an event of that name was heard so often; return all events."""
        with anyio.fail_after(PATIENCE):
            while sum(event.name == name for event in self.events) < times:
                await self._changed.wait()
        return self.events

    def of(self, job_id: str) -> list[str]:
        """Return the names of the events of a job, in order."""
        return [event.name for event in self.events if event.job_id == job_id]


@asynccontextmanager
async def listening(queue: Queue, *names: str) -> AsyncIterator[Heard]:
    """Read the queue's events while the block runs. Jobs that are added in the block are heard."""
    heard = Heard()
    subscribed = anyio.Event()
    real = Inbox.open

    @asynccontextmanager
    async def open(self: Inbox) -> AsyncIterator[None]:
        async with real(self):
            subscribed.set()
            yield

    async def read() -> None:
        async for event in queue.events(*names):
            heard.note(event)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Inbox, "open", open)
        async with anyio.create_task_group() as group:
            group.start_soon(read)
            with anyio.fail_after(PATIENCE):
                await subscribed.wait()
            yield heard
            group.cancel_scope.cancel()


# -- of a queue


async def test_the_events_of_a_job_come_in_order(backend: Backend) -> None:
    queue = queue_of(backend)
    async with listening(queue) as heard, running(queue):
        job_id = await queue.add("echo", ["result"])
        await heard.until("job:completed")
    assert heard.of(job_id) == ["job:waiting", "job:started", "job:completed"]
    assert (
        {event.queue for event in heard.events}
        == {event.data["queue"] for event in heard.events}
        == {"work"}
    )
    assert heard.events[-1].data["result"] == "result"
    assert heard.events[-1].data["id"] == job_id


async def test_a_delayed_job_and_one_with_retries_say_so(backend: Backend) -> None:
    runs: list[int] = []

    async def flaky() -> None:
        runs.append(1)
        if len(runs) < 3:
            raise ValueError("not yet")

    queue = queue_of(backend, flaky=flaky)
    async with listening(queue) as heard, running(queue):
        job_id = await queue.add("flaky", delay=0.5, retries=1)
        await heard.until("job:failed")
        second = await queue.add("flaky", retries=1, backoff=0.5)
        await heard.until("job:completed")
    assert heard.of(job_id) == [
        "job:delayed",
        "job:waiting",
        "job:started",
        "job:retrying",
        "job:waiting",
        "job:started",
        "job:failed",
    ]
    assert heard.of(second) == ["job:waiting", "job:started", "job:completed"]


async def test_a_retry_that_waits_is_one_event(backend: Backend) -> None:
    queue = queue_of(backend)
    async with listening(queue) as heard, running(queue):
        job_id = await queue.add("fail", retries=1, backoff=0.6)
        events = await heard.until("job:failed")
    assert heard.of(job_id) == [
        "job:waiting",
        "job:started",
        "job:retrying",
        "job:waiting",
        "job:started",
        "job:failed",
    ]
    assert "no" in events[-1].data["last_error"]


async def test_other_ends_are_events(backend: Backend) -> None:
    queue = queue_of(backend)
    async with listening(queue) as heard:
        cancelled = await queue.add("echo")
        expired = await queue.add("echo", ttl=0.000001)
        parent = await queue.add("fail")
        await heard.until("job:waiting", 3)
        await queue.cancel_job(cancelled)
        child = await queue.add("echo", depends_on=[parent], on_parent_failure="fail")
        await run_jobs(queue)
        await heard.until("job:failed", 2)
        await heard.until("job:expired")
    assert heard.of(cancelled) == ["job:waiting", "job:cancelled"]
    assert heard.of(expired) == ["job:waiting", "job:expired"]
    assert heard.of(child) == ["job:waiting-children", "job:failed"]


async def test_a_child_that_is_released_says_so(backend: Backend) -> None:
    queue = queue_of(backend)
    async with listening(queue) as heard, running(queue):
        parent = await queue.add("echo", delay=3600)
        child = await queue.add("echo", depends_on=[parent])
        assert await queue.promote(parent)
        await heard.until("job:completed", 2)
    names = heard.of(child)
    assert names.count("job:ready") == 1
    assert [name for name in names if name != "job:ready"] == [
        "job:waiting-children",
        "job:waiting",
        "job:started",
        "job:completed",
    ]


async def test_a_child_is_ready_when_its_last_parent_is_done(backend: Backend) -> None:
    queue = queue_of(backend)
    async with listening(queue, "job:ready") as heard, running(queue):
        first, last = await queue.add("echo", delay=3600), await queue.add("echo", delay=3600)
        child = await queue.add("echo", depends_on=[first, last])
        assert await queue.promote(first)
        await queue.wait_for(first, timeout=PATIENCE)
        assert await queue.promote(last)
        [ready] = await heard.until("job:ready")
        state = await queue.get_job_state(last)
    assert (ready.job_id, ready.data["id"], ready.data["queue"]) == (child, child, "work")
    assert state == "completed"


async def test_what_is_added_twice_is_told(backend: Backend) -> None:
    queue, seen = queue_of(backend), []
    names = ("job:duplicated", "job:debounced", "job:deduplicated")
    async with listening(queue, *names) as heard:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(event_emitter, "_listeners", {})
            for name in names:
                event_emitter.on(name, lambda data, name=name: seen.append((name, data)))
            for _ in range(2):
                await queue.add("echo", job_id="mine")
            await queue.add_bulk(
                [{"task_id": "echo", "job_id": "mine"}, *[{"task_id": "echo", "job_id": "new"}] * 2]
            )
            owner = await queue.add("echo", deduplication={"id": "window"})
            assert await queue.add("echo", deduplication={"id": "window"}) == owner
        await heard.until("job:deduplicated")
    assert [(event.name, event.job_id) for event in heard.events] == [
        ("job:duplicated", "mine"),
        ("job:duplicated", "mine"),
        ("job:duplicated", "new"),
        ("job:debounced", owner),
        ("job:deduplicated", owner),
    ]
    *_, debounced, deduplicated = heard.events
    assert (debounced.data["job_id"], debounced.data["debounce_id"]) == (owner, "window")
    assert (deduplicated.data["job_id"], deduplicated.data["deduplication_id"]) == (owner, "window")
    assert deduplicated.data["deduplicated_job_id"] not in (owner, None)
    assert [(name, data["job_id"], data["queue"]) for name, data in seen] == [
        (e.name, e.job_id, "work") for e in heard.events
    ]


class TestStalled:
    @pytest.fixture
    def settings(self) -> Settings:
        return Settings(stalled_after=0.5)

    async def test_a_job_whose_worker_was_lost_is_told_once(self, backend: Backend) -> None:
        queue = queue_of(backend)
        job_id = await queue.add("echo")
        await lose_worker(queue, runs=True)
        async with listening(queue) as heard, running(queue):
            await heard.until("job:completed")
        assert heard.of(job_id) == ["job:stalled", "job:started", "job:completed"]
        assert heard.events[0].data["stalls"] == 1


async def test_only_the_events_that_are_wanted_are_heard(backend: Backend) -> None:
    queue = queue_of(backend)
    async with listening(queue, "job:completed", "job:failed") as heard:
        await queue.add("echo")
        await queue.add("fail")
        await run_jobs(queue)
        await heard.until("job:completed")
        await heard.until("job:failed")
    assert sorted(event.name for event in heard.events) == ["job:completed", "job:failed"]


async def test_the_past_events_are_those_that_were_heard_last_of_each_job(
    backend: Backend, twin: Backend
) -> None:
    queue = queue_of(backend)
    assert await queue.past_events() == []
    async with listening(queue) as heard:
        for job_id in ("good", "a b.c"):
            await queue.add("echo", job_id=job_id)
        await queue.add("fail", job_id="bad")
        await queue.add("fail", job_id="again", retries=1, backoff=3600)
        await queue.add("echo", job_id="child", depends_on=["again"])
        async with running(queue):
            await only(queue, completed=2, failed=1, delayed=1, **{"waiting-children": 1})
        waits = await queue.add("echo")
        await heard.until("job:waiting", 5)
    past = await make_queue(twin).past_events()
    last = {event.job_id: event for event in heard.events}
    assert {event.job_id: event.name for event in past} == {
        "good": "job:completed",
        "a b.c": "job:completed",
        "bad": "job:failed",
        "again": "job:retrying",
        "child": "job:waiting-children",
        waits: "job:waiting",
    }
    for event in past:
        assert replace(event, at=None) == last[event.job_id]
    times = [event.at or 0.0 for event in past]
    assert times == sorted(times, reverse=True)
    assert past[0].job_id == waits
    assert times[0] == pytest.approx(backend.now(), abs=PATIENCE)
    assert await queue.past_events(2) == past[:2]
    assert await queue_of(backend, "other").past_events() == []
    with pytest.raises(InvalidArgument):
        await queue.past_events(0)


async def test_the_events_of_another_queue_are_not_heard(backend: Backend) -> None:
    queue, other = queue_of(backend), queue_of(backend, "other")
    async with listening(queue, "job:waiting") as heard:
        await other.add("echo")
        mine = await queue.add("echo")
        await heard.until("job:waiting")
    assert [event.job_id for event in heard.events] == [mine]


@pytest.mark.parametrize("job_id", ["a.b c", "*", "50%", "é>"])
async def test_ids_are_as_they_were_given(backend: Backend, job_id: str) -> None:
    queue = queue_of(backend)
    async with listening(queue, "job:completed") as heard:
        await queue.add("echo", job_id=job_id)
        await run_jobs(queue)
        await heard.until("job:completed")
    assert [event.job_id for event in heard.events] == [job_id]


async def test_progress_is_heard_with_its_job(backend: Backend) -> None:
    async def work() -> None:
        current_job().report_progress(0.5, {"step": 1})

    queue = queue_of(backend, work=work)
    async with listening(queue, "job:progress") as heard:
        job_id = await queue.add("work")
        await run_jobs(queue)
        await heard.until("job:progress")
    assert [
        (event.job_id, event.data["progress"], event.data["data"]) for event in heard.events
    ] == [(job_id, 0.5, {"step": 1})]


async def test_events_are_heard_in_other_processes(backend: Backend, twin: Backend) -> None:
    worker, elsewhere = queue_of(backend), queue_of(twin)
    async with listening(elsewhere, "job:completed") as heard, running(worker):
        job_id = await worker.add("echo", ["x"])
        await heard.until("job:completed")
    assert [(event.job_id, event.data["result"]) for event in heard.events] == [(job_id, "x")]


async def test_a_reader_that_stops_hears_no_more(backend: Backend) -> None:
    queue = queue_of(backend)
    iterator = queue.events("job:waiting")

    async def add_until_heard() -> None:
        while True:
            await queue.add("echo")

    with anyio.fail_after(PATIENCE):
        async with anyio.create_task_group() as group:
            group.start_soon(add_until_heard)
            event = await anext(aiter(iterator))
            group.cancel_scope.cancel()
        await iterator.aclose()
    assert event.name == "job:waiting"
    await queue.add("echo")
    with pytest.raises(StopAsyncIteration):
        await anext(aiter(iterator))


async def test_a_slow_reader_loses_events_and_hinders_no_other(
    backend: Backend, caplog: pytest.LogCaptureFixture, monkeypatch: Any
) -> None:
    monkeypatch.setattr("asyncmq_nats.store.listening.EVENT_BUFFER", 10)
    queue = queue_of(backend)
    stuck = anyio.Event()
    heard: list[Event] = []

    async def read() -> None:
        async for event in queue.events():
            heard.append(event)
            await stuck.wait()

    with caplog.at_level(logging.WARNING, "asyncmq_nats.store.listening"):
        async with anyio.create_task_group() as group:
            group.start_soon(read)
            with anyio.fail_after(PATIENCE):
                while "too slow" not in caplog.text:
                    await queue.add("echo")
            group.cancel_scope.cancel()
    assert len(heard) == 1


# -- only what someone hears is sent


class Starts:
    """The starts that workers have told of."""

    def __init__(self, backend: Backend, patch: pytest.MonkeyPatch) -> None:
        self._subject, self._signal = (
            make_queue(backend)._subjects.event("started", ""),
            backend.signal,
        )
        self.tokens: list[str] = []
        patch.setattr(backend, "signal", self.send)

    def send(self, subject: str, *args: Any) -> None:
        if subject.startswith(self._subject):
            self.tokens.append(subject.removeprefix(self._subject))
        self._signal(subject, *args)


@pytest.fixture
def starts(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> Starts:
    return Starts(backend, monkeypatch)


async def run_one(queue: Queue) -> str:
    job_id = await queue.add("echo")
    await outcome(queue, job_id)
    return job_id


async def runs_silently(queue: Queue, starts: Starts) -> bool:
    return await run_one(queue) not in starts.tokens


async def runs_aloud(queue: Queue, starts: Starts) -> bool:
    return await run_one(queue) in starts.tokens


async def run_many_aloud(queue: Queue, starts: Starts) -> int:
    """Run a hundred jobs at a time. Return how many starts were told."""
    before = len(starts.tokens)
    ids = await queue.add_bulk([{"task_id": "echo"}] * 100)
    for job_id in ids:
        await outcome(queue, job_id)
    return len(starts.tokens) - before


async def test_starts_are_told_while_someone_listens(
    backend: Backend, twin: Backend, starts: Starts
) -> None:
    queue, other = queue_of(backend), make_queue(twin)
    async with running(queue):
        await until(lambda: runs_silently(queue, starts), bool)
        async with listening(other) as heard:
            job_id = await run_one(queue)
            await heard.until("job:completed")
            assert heard.of(job_id) == ["job:waiting", "job:started", "job:completed"]
            assert "ready_message" not in heard.events[1].data
        await until(lambda: runs_silently(queue, starts), bool)


@pytest.mark.parametrize("subject", ["started.*", "*.*", ">"])
async def test_starts_are_told_to_a_program_without_the_library(
    backend: Backend, twin: Backend, starts: Starts, subject: str
) -> None:
    queue, heard = queue_of(backend), list[str]()
    async with running(queue):
        await until(lambda: runs_silently(queue, starts), bool)
        pattern = queue._subjects.event("x", "y").replace("x.y", subject)
        subscription = await twin.subscribe(pattern, lambda signal: heard.append(signal.subject))
        await until(lambda: runs_aloud(queue, starts), bool)
        await holds(lambda: any(".started." in subject for subject in heard))
        await until(lambda: run_many_aloud(queue, starts), lambda told: told == 100)
        for _ in range(3):
            assert await runs_aloud(queue, starts)
        await subscription.unsubscribe()
        await until(lambda: runs_silently(queue, starts), bool)


async def test_the_start_of_one_job_is_told_to_its_listener(
    backend: Backend, twin: Backend, starts: Starts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No one hears the starts of other jobs, so the workers have to be told again and again."""
    monkeypatch.setattr(announcing, "LISTENING_TIME", 0.5)
    monkeypatch.setattr(listening_module, "LISTENING_TIME", 0.5)
    queue = queue_of(backend)

    async def run_others() -> None:
        while True:
            await run_one(queue)

    async with running(queue), anyio.create_task_group() as group:
        group.start_soon(run_others)
        await until(lambda: runs_silently(queue, starts), bool)
        job_id = await queue.add("echo", delay=2.5)
        names = [event.name async for event in make_queue(twin).events(job_id=job_id)]
        await until(lambda: runs_silently(queue, starts), bool)
        group.cancel_scope.cancel()
    assert names == ["job:waiting", "job:started", "job:completed"]


async def test_all_starts_are_told_for_a_time_after_a_reader_has_come(
    backend: Backend, starts: Starts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(announcing, "LISTENING_TIME", 60.0)
    queue = queue_of(backend)
    async with running(queue):
        await until(lambda: runs_silently(queue, starts), bool)
        backend.signal(queue._subjects.control("listen"))
        await until(lambda: runs_aloud(queue, starts), bool)
        end = time.monotonic() + 1.5  # longer than between two that find out who listens
        while time.monotonic() < end:
            assert await runs_aloud(queue, starts)


async def test_a_start_each_second_finds_out_who_listens(backend: Backend, starts: Starts) -> None:
    queue = queue_of(backend)
    async with running(queue):
        assert await runs_aloud(queue, starts)  # it is not known yet
        await until(lambda: runs_silently(queue, starts), bool)
        began = time.monotonic()
        await until(lambda: runs_aloud(queue, starts), bool)
        assert len(starts.tokens) <= 2 + 2 * (time.monotonic() - began)


async def test_of_a_burst_that_no_one_hears_one_start_finds_that_out(
    backend: Backend, starts: Starts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(announcing, "ASKING_INTERVAL", 3600.0)
    queue = queue_of(backend)
    async with running(queue):
        await backend.ping()  # the server has said that no one heard of the worker
        assert await run_many_aloud(queue, starts) == 1
        assert await run_many_aloud(queue, starts) == 0
    monkeypatch.setattr(announcing, "ASKING_INTERVAL", 0.0)
    monkeypatch.setattr(announcing, "ANSWER_TIME", 3600.0)
    async with running(queue):
        await backend.ping()
        assert await run_many_aloud(queue, starts) == 100  # each asks


@pytest.mark.parametrize("subject", ["*.*", ">"])
async def test_a_worker_that_begins_knows_who_listens(
    backend: Backend, twin: Backend, starts: Starts, monkeypatch: pytest.MonkeyPatch, subject: str
) -> None:
    monkeypatch.setattr(announcing, "ANSWER_TIME", 3600.0)
    queue, heard = queue_of(backend), list[Any]()
    await queue.queue_stats()
    pattern = queue._subjects.event("x", "y").replace("x.y", subject)
    await twin.subscribe(pattern, heard.append)
    async with running(queue) as worker:
        await backend.ping()
        assert await run_many_aloud(queue, starts) == 100
        begun = next(signal for signal in heard if ".worker." in signal.subject)
        assert json.loads(begun.body) == {"worker": worker.id}
        assert begun.subject.endswith(f".{worker.id}")


async def test_each_job_waits_once_however_soon_it_starts(backend: Backend, twin: Backend) -> None:
    queue = queue_of(backend)
    async with listening(make_queue(twin)) as heard, running(queue):
        early = await queue.add_bulk([{"task_id": "echo"}] * 300)
        await heard.until("job:completed", 300)
        late = [await queue.add("fail", retries=1, backoff=0.6) for _ in range(2)]
        await heard.until("job:failed", 2)
    for job_id in early:
        assert heard.of(job_id) == ["job:waiting", "job:started", "job:completed"]
    once = ["job:waiting", "job:started", "job:retrying", "job:waiting", "job:started"]
    assert [heard.of(job_id) for job_id in late] == [[*once, "job:failed"]] * 2
    waiting = next(event for event in heard.events if event.name == "job:waiting")
    assert waiting.data["status"] == "waiting"
    assert not {"worker", "ready_message"} & {
        name for name, value in waiting.data.items() if value is not None
    }


@pytest.mark.parametrize(
    "message", [b"[[1],2]", b'["1",2]', b"[1,null]", b"[1]", b"{}", b"7", b"[1e999,1]"], ids=str
)
async def test_a_start_of_a_stranger_is_told_without_its_message(
    backend: Backend, message: bytes
) -> None:
    queue = queue_of(backend)
    async with listening(queue) as heard:
        body = b'{"id":"a","task":"echo","large":1e999,"ready_message":' + message + b"}"
        await backend.publish(queue._subjects.event("started", "a"), body)
        await heard.until("job:started")
    assert heard.of("a") == ["job:started"]
    assert "ready_message" not in heard.events[0].data


async def test_a_job_that_started_at_once_waited_as_others_do(backend: Backend) -> None:
    queue = queue_of(backend)
    async with listening(queue) as heard:
        seen = await queue.add("echo", ["x"], retries=2, meta={"a": "b"})
        await heard.until("job:waiting")
        async with running(queue):
            started = await queue.add("echo", ["x"], retries=2, meta={"a": "b"})
            await heard.until("job:completed", 2)
    first, second = (
        next(e for e in heard.events if (e.name, e.job_id) == ("job:waiting", job_id))
        for job_id in (seen, started)
    )
    own = {"id", "job_id", "created_at", "updated_at"}
    assert {name: value for name, value in first.data.items() if name not in own} == {
        name: value for name, value in second.data.items() if name not in own
    }


async def test_what_waited_before_is_not_told_when_it_starts(backend: Backend) -> None:
    queue = queue_of(backend)
    before = await queue.add("echo")
    async with listening(queue) as heard, running(queue):
        await heard.until("job:completed")
    assert heard.of(before) == ["job:started", "job:completed"]


class TestWaitingEvents:
    @pytest.fixture
    def settings(self) -> Settings:
        return Settings(waiting_events=True)

    async def test_the_server_may_tell_others_that_a_job_waits(self, backend: Backend) -> None:
        queue, signals = queue_of(backend), list[str]()
        subject = queue._subjects.event("waiting", "*")
        await backend.subscribe(subject, lambda signal: signals.append(signal.subject))
        async with listening(queue) as heard:
            first = await queue.add("echo")
            await holds(lambda: bool(signals))
            await run_jobs(queue)
            await heard.until("job:completed")
        assert signals == [subject.replace("*", first)]
        assert heard.of(first) == ["job:waiting", "job:started", "job:completed"]


async def test_a_server_does_not_tell_by_itself_that_a_job_waits(backend: Backend) -> None:
    queue, signals = queue_of(backend), list[str]()
    events = queue._subjects.event("*", "*")
    await backend.subscribe(events, lambda signal: signals.append(signal.subject))
    await queue.add("echo")
    await run_jobs(queue)
    await holds(lambda: any("completed" in subject for subject in signals))
    assert not any("waiting" in subject for subject in signals)


# -- of this process's workers


@pytest.fixture
def emitted() -> Any:
    """The calls of the callbacks that the test registers with `listen`.

    They are removed again.
    """
    calls: list[tuple[str, dict[str, Any]]] = []
    registered: list[tuple[str, Callable[..., Any]]] = []

    def listen(*names: str) -> list[tuple[str, dict[str, Any]]]:
        for name in names:

            def callback(data: dict[str, Any], name: str = name) -> None:
                calls.append((name, data))

            event_emitter.on(name, callback)
            registered.append((name, callback))
        return calls

    yield listen
    for name, callback in registered:
        event_emitter.off(name, callback)


async def test_a_listener_may_be_an_object_or_return_what_is_awaited() -> None:
    heard: list[Any] = []

    class Listener:
        async def __call__(self, data: dict[str, Any]) -> None:
            await anyio.lowlevel.checkpoint()
            heard.append(("object", data["id"]))

    async def note(kind: str, data: dict[str, Any]) -> None:
        await anyio.lowlevel.checkpoint()
        heard.append((kind, data["id"]))

    emitter = EventEmitter()
    emitter.on("job:completed", Listener())
    emitter.on("job:completed", lambda data: note("returned", data))
    emitter.on("job:completed", functools.partial(note, "partial"))
    await emitter.emit("job:completed", {"id": "a"})
    assert heard == [("object", "a"), ("returned", "a"), ("partial", "a")]


async def test_listeners_hear_of_the_jobs_of_this_process(backend: Backend, emitted: Any) -> None:
    runs: list[int] = []

    async def flaky() -> str:
        runs.append(1)
        if len(runs) == 1:
            raise ValueError("not yet")
        return "done"

    calls = emitted("job:started", "job:completed", "job:retrying")
    queue = queue_of(backend, flaky=flaky)
    job_id = await queue.add("flaky", retries=1)
    await run_jobs(queue)
    await holds(lambda: len(calls) >= 4)  # the callbacks run in threads
    assert sorted(name for name, _ in calls) == [
        "job:completed",
        "job:retrying",
        "job:started",
        "job:started",
    ]
    for name, data in calls:
        assert (data["id"], data["task"], data["queue"]) == (job_id, "flaky", "work")
        if name == "job:completed":
            assert data["result"] == "done"


@pytest.mark.parametrize(("task_id", "name"), [("fail", "job:failed"), ("echo", "job:expired")])
async def test_listeners_hear_of_other_ends(
    backend: Backend, emitted: Any, task_id: str, name: str
) -> None:
    calls = emitted(name)
    queue = queue_of(backend)
    job_id = await queue.add(task_id, ttl=0.000001 if name == "job:expired" else None)
    await run_jobs(queue)
    await holds(lambda: bool(calls))  # the callbacks run in threads
    assert [(event, data["id"]) for event, data in calls] == [(name, job_id)]


async def test_on_is_a_function_and_a_decorator_and_off_ends_it() -> None:
    emitter = EventEmitter()
    calls: list[tuple[str, Any]] = []

    def plain(data: dict[str, Any]) -> None:
        calls.append(("plain", data["id"]))

    @emitter.on("job:completed")
    async def decorated(data: dict[str, Any]) -> None:
        calls.append(("decorated", data["id"]))

    assert emitter.on("job:completed", plain) is plain
    await emitter.emit("job:completed", {"id": 1})
    await emitter.emit("job:failed", {"id": 2})
    emitter.off("job:completed", plain)
    emitter.off("job:completed", plain)
    emitter.off("job:failed", plain)
    await emitter.emit("job:completed", {"id": 3})
    emitter.off("job:completed", decorated)
    await emitter.emit("job:completed", {"id": 4})
    assert calls == [("decorated", 1), ("plain", 1), ("decorated", 3)]
    assert not emitter.listens("job:completed")


async def test_a_callback_that_fails_harms_neither_the_others_nor_the_job(
    backend: Backend, caplog: pytest.LogCaptureFixture
) -> None:
    heard = anyio.Event()

    async def broken(data: dict[str, Any]) -> None:
        raise RuntimeError("broken callback")

    async def sound(data: dict[str, Any]) -> None:
        heard.set()

    queue = queue_of(backend)
    event_emitter.on("job:completed", broken)
    event_emitter.on("job:completed", sound)
    try:
        async with running(queue):
            assert await queue.wait_for(await queue.add("echo", ["x"]), timeout=PATIENCE) == "x"
            with anyio.fail_after(PATIENCE):
                await heard.wait()
    finally:
        event_emitter.off("job:completed", broken)
        event_emitter.off("job:completed", sound)
    assert "broken callback" in caplog.text


# -- wait_for


async def test_wait_for_cannot_miss_an_outcome(backend: Backend, twin: Backend) -> None:
    queue, waiter = queue_of(backend), queue_of(twin)
    queue.concurrency = 10

    async def add_and_wait(number: int) -> Any:
        return await waiter.wait_for(await waiter.add("echo", [number]), timeout=PATIENCE)

    async with running(queue):
        for start in range(0, 300, 30):
            numbers = list(range(start, start + 30))
            assert (
                await race(*[lambda number=number: add_and_wait(number) for number in numbers])
                == numbers
            )


async def test_wait_for_sees_an_outcome_whose_event_is_lost(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("asyncmq_nats.store.waiters.LOOK_INTERVAL", 0.1)
    queue = queue_of(backend)
    subscribe = backend.subscribe

    async def deaf(subject: str, on_signal: Callable[..., None]) -> Any:
        return await subscribe(
            subject, (lambda signal: None) if ".event." in subject else on_signal
        )

    monkeypatch.setattr(backend, "subscribe", deaf)
    async with running(queue):
        assert (
            await queue.wait_for(await queue.add("echo", ["x"], delay=0.2), timeout=PATIENCE) == "x"
        )


async def test_wait_for_sees_an_outcome_that_is_there(backend: Backend) -> None:
    queue = queue_of(backend)
    job_id = await queue.add("echo", ["x"])
    await run_jobs(queue)
    assert await queue.wait_for(job_id, timeout=PATIENCE) == "x"


@pytest.mark.parametrize("state", ["failed", "expired", "cancelled"])
async def test_wait_for_raises_what_the_job_ended_as(backend: Backend, state: str) -> None:
    queue = queue_of(backend)
    job_id = await queue.add("fail", ttl=0.000001 if state == "expired" else None)
    if state == "cancelled":
        await queue.cancel_job(job_id)
    async with running(queue):
        await outcome(queue, job_id)
    with pytest.raises(JobFailed, match=state) as caught:
        await queue.wait_for(job_id, timeout=PATIENCE)
    assert (caught.value.job_id, caught.value.state) == (job_id, state)


async def test_wait_for_has_a_time_limit_and_knows_no_unknown_job(backend: Backend) -> None:
    queue = queue_of(backend)
    with pytest.raises(JobNotFound):
        await queue.wait_for("nobody", timeout=PATIENCE)
    job_id = await queue.add("echo")
    with pytest.raises(TimeoutError, match=job_id):
        await queue.wait_for(job_id, timeout=0.05)


# -- AsyncMQ's data and history

OF_TO_DICT = set(Job("t").to_dict()) - {"id"}


async def test_events_have_the_keys_that_a_job_has(backend: Backend) -> None:
    names = ("job:started", "job:retrying", "job:completed", "job:failed")
    calls: list[tuple[str, dict[str, Any]]] = []
    all_told = anyio.Event()

    async def note(name: str, data: dict[str, Any]) -> None:
        calls.append((name, data))
        if len(calls) == 6:
            all_told.set()

    async def stumble(again: bool) -> str:
        if again and current_job().attempt > 1:
            return "ok"
        raise ValueError("no")

    queue = make_queue(backend, stumble=stumble)
    listeners = {name: partial(note, name) for name in names}
    for name, listener in listeners.items():
        event_emitter.on(name, listener)
    async with listening(queue, *names) as heard, running(queue):
        first = await queue.add("stumble", [True], retries=1, ttl=60)
        assert await queue.wait_for(first, timeout=PATIENCE) == "ok"
        second = await queue.add("stumble", [False])
        await heard.until("job:failed")
        with anyio.fail_after(PATIENCE):
            await all_told.wait()
    for name, listener in listeners.items():
        event_emitter.off(name, listener)
    for told in ([(event.name, event.data) for event in heard.events], calls):
        assert [data["depends_on"] for _, data in told] == [[]] * 6
        assert all(data.keys() >= OF_TO_DICT for _, data in told)
        (failed,) = [data for name, data in told if name == "job:failed"]
        assert (failed["id"], failed["last_error"]) == (second, "ValueError: no")
        assert "in stumble" in failed["error_traceback"]
        assert failed["failed_at"] == failed["finished_at"] >= failed["last_attempt"]


@pytest.mark.parametrize("sync", [False, True])
async def test_progress_reaches_listeners(backend: Backend, sync: bool) -> None:
    told: list[dict[str, Any]] = []
    done = anyio.Event()

    async def hear(data: dict[str, Any]) -> None:
        told.append(data)
        if data["progress"] == 1.0:
            done.set()

    async def report() -> None:
        current_job().report_progress(0.5, {"rows": 5})
        current_job().report_progress(1.0)

    def report_in_thread() -> None:
        current_job().report_progress(0.5, {"rows": 5})
        current_job().report_progress(1.0)

    queue = make_queue(backend, report=report_in_thread if sync else report)
    event_emitter.on("job:progress", hear)
    try:
        async with running(queue):
            job_id = await queue.add("report")
            with anyio.fail_after(PATIENCE):
                await done.wait()
    finally:
        event_emitter.off("job:progress", hear)
    assert told == [
        {"id": job_id, "progress": 0.5, "data": {"rows": 5}, "queue": "work"},
        {"id": job_id, "progress": 1.0, "data": None, "queue": "work"},
    ]


async def test_the_history_is_bounded_newest_first_and_can_be_searched() -> None:
    emitter = EventEmitter(history_limit=2)
    await emitter.emit("job:started", {"queue": "mail", "id": "a"})
    await emitter.emit("job:failed", {"queue": "bank", "id": "b", "last_error": "Boom"})
    await emitter.emit("job:completed", {"queue": "mail", "id": "c"})
    assert [each["event"] for each in emitter.list_history()] == ["job:completed", "job:failed"]
    assert [each["data"]["id"] for each in emitter.list_history(limit=1)] == ["c"]
    assert [each["data"]["id"] for each in emitter.list_history(event="job:failed")] == ["b"]
    assert [each["data"]["id"] for each in emitter.list_history(queue="mail")] == ["c"]
    assert [each["data"]["id"] for each in emitter.list_history(q="boom")] == ["b"]
    assert emitter.list_history(q="nothing") == []
    emitter.clear_history()
    assert emitter.list_history() == []


async def test_a_history_that_is_read_has_the_jobs_of_this_process(backend: Backend) -> None:
    emitter = EventEmitter()
    queue = queue_of(backend)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(announcing, "event_emitter", emitter)
        async with running(queue):
            await queue.wait_for(await queue.add("echo", [1]), timeout=PATIENCE)
            assert emitter.list_history() == []  # nothing read it, so nothing was kept
            ended = anyio.Event()
            emitter.on("job:completed", lambda _: anyio.from_thread.run_sync(ended.set))
            await queue.add("echo", [2])
            with anyio.fail_after(PATIENCE):
                await ended.wait()
    assert {each["event"] for each in emitter.list_history()} == {"job:started", "job:completed"}


class Listening:
    """A listener that is an object."""

    def __init__(self) -> None:
        self.heard: list[Any] = []

    async def __call__(self, data: dict[str, Any]) -> None:
        self.heard.append(data)


async def test_listeners_may_be_objects_and_may_return_an_awaitable() -> None:
    emitter, listener, heard = EventEmitter(), Listening(), []

    async def note(data: dict[str, Any]) -> None:
        heard.append(data)

    emitter.on("job:completed", listener)
    emitter.on("job:completed", lambda data: note(data))
    await emitter.emit("job:completed", {"id": "a"})
    assert listener.heard == heard == [{"id": "a"}]


@pytest.mark.parametrize("what", ["waiting", "started", "delayed", "failed"])
def test_the_id_of_the_subject_wins_over_that_of_the_body(what: str) -> None:
    event = read_event("work", f"amq.work.event.{what}.mine", b'{"task": "t", "id": "another"}')
    assert event is not None
    assert (event.job_id, event.data["id"]) == ("mine", "mine")


def test_the_status_of_a_stranger_is_not_that_of_the_job() -> None:
    body = b'{"task": "t", "status": "completed", "retries": 1}'
    for what, status in (("waiting", "waiting"), ("released", "waiting"), ("delayed", "delayed")):
        event = read_event("work", f"amq.work.event.{what}.a", body)
        assert event is not None
        assert event.data["status"] == status
