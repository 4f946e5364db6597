"""Middleware: what happens around the addition, the run and the end of a job, on both backends."""

import gc
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

import anyio
import pytest

from asyncmq_nats import (
    Fail,
    FlowProducer,
    InMemoryBackend,
    Job,
    JobFailed,
    Queue,
    Retry,
    current_job,
)
from asyncmq_nats.backends.base import Backend
from asyncmq_nats.context import JobContext
from asyncmq_nats.exceptions import InvalidArgument
from asyncmq_nats.middleware import (
    AddJobs,
    Chain,
    Ending,
    Middleware,
    RunTask,
    add_middleware,
    remove_middleware,
)
from asyncmq_nats.runtime.registry import TaskRegistry
from asyncmq_nats.tasks import task
from tests.receiver import holds
from tests.running import PATIENCE, has, outcome, run_jobs, running


class Recorder(Middleware):
    """Writes down what happens around each job."""

    def __init__(self, calls: list[Any], name: str = "") -> None:
        self.calls = calls
        self.name = name

    async def enqueue(self, queue: str, jobs: Sequence[Job], add: AddJobs) -> list[str]:
        self.calls.append(f"{self.name}enqueue {queue} {len(jobs)}")
        ids = await add(jobs)
        self.calls.append(f"{self.name}enqueued")
        assert ids == [job.job_id for job in jobs]
        return ids

    async def run(self, context: JobContext, call: RunTask) -> Any:
        self.calls.append(f"{self.name}run")
        try:
            return await call()
        except BaseException as error:
            self.calls.append(f"{self.name}raised {type(error).__name__}")
            raise
        finally:
            self.calls.append(f"{self.name}ran")

    async def end(self, context: JobContext, ending: Ending) -> None:
        self.calls.append(f"{self.name}{ending.state}")


class Endings(Middleware):
    """Keeps how each attempt ended."""

    def __init__(self) -> None:
        self.found: list[tuple[str, Ending]] = []

    async def end(self, context: JobContext, ending: Ending) -> None:
        self.found.append((context.id, ending))

    @property
    def states(self) -> list[str]:
        return [ending.state for _, ending in self.found]


@contextmanager
def added(*members: Middleware, queue: str | None = None) -> Iterator[None]:
    for member in members:
        add_middleware(member, queue)
    try:
        yield
    finally:
        for member in members:
            remove_middleware(member)


def queue_of(
    backend: Backend, *middleware: Middleware, options: dict[str, Any] | None = None, **tasks: Any
) -> Queue:
    registry = TaskRegistry()
    for name, function in tasks.items():
        registry.register(function, queue="work", name=name)
    return Queue("work", backend, registry=registry, middleware=middleware, **(options or {}))


async def test_the_first_one_is_the_outermost(backend: Backend) -> None:
    calls: list[Any] = []
    outer, inner, own = (Recorder(calls, name) for name in ("outer ", "inner ", "own "))
    queue = queue_of(backend, own, work=lambda: calls.append("task"))
    with added(outer, inner):
        await queue.add("work")
        await run_jobs(queue)
    assert calls == [
        *("outer enqueue work 1", "inner enqueue work 1", "own enqueue work 1"),
        *("own enqueued", "inner enqueued", "outer enqueued"),
        *("outer run", "inner run", "own run", "task", "own ran", "inner ran", "outer ran"),
        *("own completed", "inner completed", "outer completed"),
    ]


async def test_one_of_another_queue_is_not_called(backend: Backend) -> None:
    calls: list[Any] = []
    queue = queue_of(backend, work=lambda: calls.append("task"))
    with added(Recorder(calls), queue="other"):
        await queue.add("work")
        await run_jobs(queue)
    assert calls == ["task"]
    with added(Recorder(calls), queue="work"):
        await queue.add("work")
    assert calls[1:] == ["enqueue work 1", "enqueued"]


async def test_it_is_called_for_jobs_of_every_kind_of_addition(backend: Backend) -> None:
    calls: list[Any] = []
    registry = TaskRegistry()

    @task("work", registry=registry)
    async def work() -> None: ...

    name = work.task_id
    queue = Queue("work", backend, registry=registry)
    with added(Recorder(calls)):
        await work.enqueue(backend=backend)
        await queue.add(name, deduplication={"id": "one", "ttl": 60})
        await queue.enqueue({"task": name})
        await queue.add_bulk(
            [{"task_id": name}, {"task_id": name, "deduplication": {"id": "two", "ttl": 60}}]
        )
        parent = Job(name)
        await FlowProducer(backend).add_flow(
            "work", [parent, Job(name, depends_on=[parent.job_id])]
        )
        await queue.add_bulk([])
    assert calls[::2] == [
        *["enqueue work 1"] * 3,
        *["enqueue work 2"] * 2,
    ]
    await has(queue, 7, "waiting", "waiting-children")


async def test_it_may_change_what_is_added(backend: Backend) -> None:
    class Stamp(Middleware):
        async def enqueue(self, queue: str, jobs: Sequence[Job], add: AddJobs) -> list[str]:
            return await add([replace(job, meta=job.meta | {"by": queue}) for job in jobs])

    async def work() -> dict[str, str]:
        return dict(current_job().meta)

    queue = queue_of(backend, Stamp(), work=work)
    one = await queue.add("work", meta={"own": "1"})
    bulk = await queue.add_bulk([{"task_id": "work"}, {"task_id": "work"}])
    async with running(queue):
        found = [await queue.wait_for(job_id, PATIENCE) for job_id in (one, *bulk)]
    assert found == [{"own": "1", "by": "work"}, {"by": "work"}, {"by": "work"}]


async def test_it_may_refuse_what_is_added(backend: Backend) -> None:
    class Gate(Middleware):
        async def enqueue(self, queue: str, jobs: Sequence[Job], add: AddJobs) -> list[str]:
            raise PermissionError("closed")

    queue = queue_of(backend, Gate())
    with pytest.raises(PermissionError, match="closed"):
        await queue.add("work")
    assert await queue.list_jobs("waiting") == []


async def test_it_may_change_the_result_and_the_error(backend: Backend) -> None:
    class Translate(Middleware):
        async def run(self, context: JobContext, call: RunTask) -> Any:
            try:
                return {"wrapped": await call()}
            except ValueError as error:
                raise Fail(f"given up: {error}") from error

    def work(text: str) -> int:
        return int(text)

    queue = queue_of(backend, Translate(), work=work)
    good, bad = await queue.add("work", ["7"]), await queue.add("work", ["x"], retries=5)
    async with running(queue):
        assert await queue.wait_for(good, PATIENCE) == {"wrapped": 7}
        with pytest.raises(JobFailed, match="given up: invalid literal"):
            await queue.wait_for(bad, PATIENCE)
    assert (await outcome(queue, bad))["retries"] == 1


async def test_what_it_sets_in_the_context_reaches_async_and_sync_tasks(backend: Backend) -> None:
    tenant: ContextVar[str] = ContextVar("tenant", default="none")

    class SetTenant(Middleware):
        async def run(self, context: JobContext, call: RunTask) -> Any:
            tenant.set(context.meta["tenant"])
            return await call()

    async def here() -> str:
        return tenant.get()

    def in_thread() -> list[Any]:
        return [tenant.get(), threading.current_thread() is threading.main_thread()]

    queue = queue_of(backend, SetTenant(), here=here, in_thread=in_thread)
    ids = [await queue.add(name, meta={"tenant": name}) for name in ("here", "in_thread")]
    async with running(queue):
        assert await queue.wait_for(ids[0], PATIENCE) == "here"
        assert await queue.wait_for(ids[1], PATIENCE) == ["in_thread", False]
    assert tenant.get() == "none"


async def test_it_is_within_the_timeout_and_sees_the_cancellation(backend: Backend) -> None:
    calls: list[Any] = []
    queue = queue_of(backend, Recorder(calls), work=anyio.sleep_forever)
    job_id = await queue.add("work", timeout=0.05)
    calls.clear()
    async with running(queue):
        with pytest.raises(JobFailed, match="TaskTimeout"):
            await queue.wait_for(job_id, PATIENCE)
    assert calls == ["run", "raised CancelledError", "ran", "failed"]


async def test_every_end_is_told(backend: Backend) -> None:
    endings = Endings()

    async def work(attempts: int) -> str:
        job = current_job()
        if job.attempt < attempts:
            raise Retry("not yet", delay=0)
        if attempts == 2:
            raise Fail("never")
        return "done"

    queue = queue_of(backend, endings, work=work)
    failed = await queue.add("work", [2], retries=1)
    await run_jobs(queue)
    assert endings.states == ["retrying", "failed"]
    (_, retrying), (job_id, last) = endings.found
    assert job_id == failed
    assert (retrying.error, retrying.delay) == ("Retry: not yet", 0)
    assert last.error == "Fail: never"
    assert "in work" in str(last.traceback)
    assert 0 < last.started_at <= last.ended_at
    await queue.add("work", [1])
    await queue.add("work", [1], ttl=0)
    await run_jobs(queue)
    states = dict(zip(endings.states[2:], endings.found[2:], strict=True))
    assert states["completed"][1].result == "done"
    assert states["expired"][1].started_at == 0


async def test_the_end_of_a_cancelled_job_is_told(backend: Backend) -> None:
    endings, started = Endings(), anyio.Event()

    async def work() -> None:
        started.set()
        await anyio.sleep_forever()

    queue = queue_of(backend, endings, work=work)
    job_id = await queue.add("work")
    async with running(queue):
        with anyio.fail_after(PATIENCE):
            await started.wait()
        assert await queue.cancel_job(job_id)
        await holds(lambda: endings.states == ["cancelled"])


async def test_a_result_that_is_no_json_ends_as_failed(backend: Backend) -> None:
    endings = Endings()
    queue = queue_of(backend, endings, work=lambda: object())
    await queue.add("work")
    await run_jobs(queue)
    assert endings.states == ["failed"]
    assert "NotSerializable" in str(endings.found[0][1].error)


async def test_a_worker_that_stops_tells_the_last_end(backend: Backend) -> None:
    endings, opened = Endings(), anyio.Event()

    class Slow(Middleware):
        async def end(self, context: JobContext, ending: Ending) -> None:
            await opened.wait()

    queue = queue_of(backend, endings, Slow(), work=lambda: None)
    job_id = await queue.add("work")
    async with running(queue) as worker:
        await outcome(queue, job_id)
        worker.stop()
        opened.set()
    assert endings.states == ["completed"]


async def test_an_error_at_the_end_is_logged_and_the_others_are_told(
    backend: Backend, caplog: pytest.LogCaptureFixture
) -> None:
    endings = Endings()

    class Broken(Middleware):
        async def end(self, context: JobContext, ending: Ending) -> None:
            raise RuntimeError("no metrics")

    queue = queue_of(backend, endings, Broken(), work=lambda: None)
    job_id = await queue.add("work")
    await run_jobs(queue)
    assert endings.states == ["completed"]
    assert "no metrics" in caplog.text
    assert job_id in caplog.text


async def test_a_plain_end_is_called_at_once_and_its_error_is_logged(
    backend: Backend, caplog: pytest.LogCaptureFixture
) -> None:
    calls: list[str] = []

    class Plain(Middleware):
        def __init__(self, name: str, result: Any = None) -> None:
            self.name, self.result = name, result

        def end(self, context: JobContext, ending: Ending) -> Any:
            calls.append(f"{self.name} {ending.state} {ending.result}")
            return self.result

    class Awaited(Middleware):
        async def end(self, context: JobContext, ending: Ending) -> None:
            calls.append("awaited")

    members = Plain("outer"), Awaited(), Plain("inner", "no result is wanted")
    queue = queue_of(backend, *members, work=lambda: 5)
    await queue.add("work")
    await run_jobs(queue)
    assert calls == ["inner completed 5", "outer completed 5", "awaited"]
    assert "write `async def end`" in caplog.text


async def test_an_end_that_is_told_leaves_no_garbage() -> None:
    """The objects of an attempt are freed with it, without the garbage collector."""
    endings, count = Endings(), 500
    queue = queue_of(InMemoryBackend(), endings, work=lambda: None)
    await queue.add_bulk([{"task_id": "work"}] * count)
    gc.collect()
    gc.disable()
    try:
        await run_jobs(queue)
        endings.found.clear()
        found = gc.collect()
    finally:
        gc.enable()
    assert found < 3 * count  # an attempt and what it holds are some twelve objects


async def test_notes_go_from_the_run_to_the_end(backend: Backend) -> None:
    found: list[Any] = []

    class Span(Middleware):
        async def run(self, context: JobContext, call: RunTask) -> Any:
            context.notes["span"] = context.id
            return await call()

        async def end(self, context: JobContext, ending: Ending) -> None:
            found.append(context.notes)

    queue = queue_of(backend, Span(), work=lambda: None)
    ids = [await queue.add("work") for _ in range(3)]
    await run_jobs(queue)
    assert sorted(each["span"] for each in found) == sorted(ids)


# -- jobs that a task adds

request: ContextVar[str] = ContextVar("request", default="none")


class Carry(Middleware):
    """Sends a context variable along."""

    async def enqueue(self, queue: str, jobs: Sequence[Job], add: AddJobs) -> list[str]:
        meta = {"request": request.get()}
        return await add([replace(job, meta=job.meta | meta) for job in jobs])


@pytest.mark.parametrize("kind", ["async", "thread"])
async def test_follow_ups_pass_in_the_context_in_which_they_were_added(
    backend: Backend, kind: str
) -> None:
    def add_two() -> list[str]:
        token = request.set("first")
        ids = [current_job().add("second")]
        request.reset(token)
        request.set("other")
        return [*ids, current_job().add("second")]

    async def add_two_here() -> list[str]:
        return add_two()

    async def second() -> str:
        return current_job().meta["request"]

    first = add_two if kind == "thread" else add_two_here
    queue = queue_of(backend, Carry(), first=first, second=second)
    job_id = await queue.add("first")
    async with running(queue):
        ids = await queue.wait_for(job_id, PATIENCE)
        assert [await queue.wait_for(each, PATIENCE) for each in ids] == ["first", "other"]


async def test_follow_ups_that_are_refused_fail_the_attempt(backend: Backend) -> None:
    class Gate(Middleware):
        async def enqueue(self, queue: str, jobs: Sequence[Job], add: AddJobs) -> list[str]:
            if jobs[0].task_id == "second":
                raise PermissionError("closed")
            return await add(jobs)

    queue = queue_of(backend, Gate(), first=lambda: current_job().add("second"))
    job_id = await queue.add("first")
    async with running(queue):
        with pytest.raises(JobFailed, match="PermissionError: closed"):
            await queue.wait_for(job_id, PATIENCE)
    assert await queue.list_jobs("waiting") == []


# -- what is no middleware


@pytest.mark.parametrize("value", [None, "log", Recorder, object(), Middleware])
async def test_what_is_no_middleware_is_refused(backend: Backend, value: Any) -> None:
    with pytest.raises(InvalidArgument, match="a middleware must be an object with"):
        add_middleware(value)
    with pytest.raises(InvalidArgument, match="a middleware must be an object with"):
        Queue("work", backend, middleware=[value])


async def test_one_that_does_not_derive_from_the_protocol_will_do(backend: Backend) -> None:
    calls: list[str] = []

    class OnlyRun:
        async def run(self, context: JobContext, call: RunTask) -> Any:
            calls.append(context.id)
            return await call()

    only_run: Any = OnlyRun()
    queue = queue_of(backend, only_run, work=lambda: None)
    job_id = await queue.add("work")
    await run_jobs(queue)
    assert calls == [job_id]


@pytest.mark.parametrize("kind", ["none passed on", "none returned"])
async def test_one_that_loses_jobs_is_told(backend: Backend, kind: str) -> None:
    class Lossy(Middleware):
        async def enqueue(self, queue: str, jobs: Sequence[Job], add: AddJobs) -> list[str]:
            return await add([]) if kind == "none passed on" else []

    queue = queue_of(backend, Lossy())
    told = "must pass on as many jobs" if kind == "none passed on" else "must return the ids"
    with pytest.raises(InvalidArgument, match=told):
        await queue.add("work")


def test_without_any_nothing_is_called() -> None:
    class Idle(Middleware):
        pass

    assert Chain.of("work") == Chain("work")
    with added(Idle()):
        assert Chain.of("work") == Chain("work")
