"""Outcomes that a task raises: retry, give up, snooze, expire.

The tests use coroutines, threads and processes.
"""

import math
import pickle
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import anyio
import pytest

from asyncmq_nats import (
    Backoff,
    Expired,
    Fail,
    InvalidArgument,
    Job,
    JobFailed,
    Queue,
    Reject,
    Retry,
    Snooze,
    current_job,
)
from asyncmq_nats.backends.base import Backend
from asyncmq_nats.events import event_emitter
from asyncmq_nats.exceptions import FailedAttempt
from asyncmq_nats.retries import (
    FULL_ERRORS,
    MAX_ERRORS,
    Failure,
    RetryLimits,
    add_failure,
    judge,
    retry_delay,
    snooze_delay,
)
from asyncmq_nats.runtime.registry import TaskRegistry
from tests.receiver import until
from tests.running import PATIENCE, only, outcome, run_jobs, running

KINDS = ["coroutine", "thread", "process"]


class Unreachable(ConnectionError):
    pass


class Unpicklable(ConnectionError):
    def __init__(self, host: str, port: int) -> None:
        super().__init__(f"{host}:{port}")


ERRORS: dict[str, Callable[[], BaseException]] = {
    "retry": lambda: Retry("not now", after=0),
    "reject": lambda: Reject("no such address"),
    "snooze": lambda: Snooze(3600),
    "expire": lambda: Expired("the sale is over"),
    "unreachable": lambda: Unreachable("down"),
    "unpicklable": lambda: Unpicklable("mail", 25),
    "group": lambda: ExceptionGroup("of a task group", [Reject("inside")]),
    "break": lambda: KeyError("break"),
}


def do(what: str) -> str:
    if what in ERRORS:
        raise ERRORS[what]()
    return what


async def do_here(what: str) -> str:
    return do(what)


def seconds_to_wait(retry: int, error: BaseException) -> float:
    if not isinstance(error, Unreachable) or error.args != ("down",):
        return math.nan
    return 3600.0 * retry


def queue_of(backend: Backend, kind: str, **options: Any) -> Queue:
    registry = TaskRegistry()
    function: Callable[..., Any] = do_here if kind == "coroutine" else do
    registry.register(function, queue="work", name="do", process=kind == "process", **options)
    return Queue("work", backend, registry=registry)


@pytest.mark.parametrize("kind", KINDS)
async def test_a_rejected_job_fails_whatever_retries_are_left(backend: Backend, kind: str) -> None:
    queue = queue_of(backend, kind)
    job_id = await queue.add("do", ["reject"], retries=5)
    async with running(queue):
        with pytest.raises(JobFailed, match="no such address") as caught:
            await queue.wait_for(job_id, PATIENCE)
    assert caught.value.type == "asyncmq_nats.exceptions.Reject"
    assert caught.value.message == "no such address"
    assert len(caught.value.attempts) == 1


@pytest.mark.parametrize("kind", KINDS)
async def test_a_snoozed_job_runs_again_and_no_attempt_is_counted(
    backend: Backend, kind: str
) -> None:
    queue = queue_of(backend, kind)
    job_id = await queue.add("do", ["snooze"])
    async with running(queue):
        await only(queue, delayed=1)
        job = await queue.get_job(job_id)
    assert job is not None
    assert (job["retries"], job["errors"], job["snoozes"]) == (0, [], 1)
    assert job["delay_until"] == pytest.approx(job["created_at"] + 3600, abs=PATIENCE)


@pytest.mark.parametrize("kind", KINDS)
async def test_a_job_that_came_too_late_ends_as_expired(backend: Backend, kind: str) -> None:
    queue = queue_of(backend, kind)
    job_id = await queue.add("do", ["expire"], retries=5)
    async with running(queue):
        job = await outcome(queue, job_id)
        with pytest.raises(JobFailed, match="expired: Expired: the sale is over") as caught:
            await queue.wait_for(job_id, PATIENCE)
    assert (job["status"], job["last_error"]) == ("expired", "Expired: the sale is over")
    assert (caught.value.type, caught.value.attempts) == ("", ())


@pytest.mark.parametrize("kind", KINDS)
async def test_a_retry_counts_and_waits_as_the_task_says(backend: Backend, kind: str) -> None:
    queue = queue_of(backend, kind)
    job_id = await queue.add("do", ["retry"], retries=2, backoff=1000)
    async with running(queue):
        job = await outcome(queue, job_id)
    assert job["retries"] == 3
    assert [entry["attempt"] for entry in job["errors"]] == [1, 2, 3]


@pytest.mark.parametrize("kind", KINDS)
async def test_only_the_exceptions_that_are_named_are_retried(backend: Backend, kind: str) -> None:
    queue = queue_of(backend, kind, retry_on=(ConnectionError, TimeoutError))
    retried = await queue.add("do", ["unpicklable"], retries=1)
    given_up = await queue.add("do", ["break"], retries=9)
    async with running(queue):
        jobs = [await outcome(queue, job_id) for job_id in (retried, given_up)]
    assert [(job["retries"], job["status"]) for job in jobs] == [(2, "failed"), (1, "failed")]


@pytest.mark.parametrize("kind", KINDS)
async def test_the_exceptions_that_are_given_up_on_are_final(backend: Backend, kind: str) -> None:
    queue = queue_of(backend, kind, give_up_on=Unreachable)
    final = await queue.add("do", ["unreachable"], retries=9)
    other = await queue.add("do", ["break"], retries=1)
    asked = await queue.add("do", ["retry"], retries=1)
    async with running(queue):
        jobs = [await outcome(queue, job_id) for job_id in (final, other, asked)]
    assert [job["retries"] for job in jobs] == [1, 2, 2]


@pytest.mark.parametrize("kind", KINDS)
async def test_a_backoff_function_sees_the_exception(backend: Backend, kind: str) -> None:
    queue = queue_of(backend, kind, backoff=seconds_to_wait)
    job_id = await queue.add("do", ["unreachable"], retries=2)
    async with running(queue):
        await only(queue, delayed=1)
        job = await queue.get_job(job_id)
    assert job is not None
    assert job["delay_until"] == pytest.approx(job["errors"][0]["at"] + 3600, abs=PATIENCE)


@pytest.mark.parametrize("kind", KINDS)
async def test_the_sole_error_of_a_group_is_what_counts(backend: Backend, kind: str) -> None:
    queue = queue_of(backend, kind)
    job_id = await queue.add("do", ["group"], retries=9)
    async with running(queue):
        job = await outcome(queue, job_id)
    assert (job["retries"], job["errors"][0]["type"]) == (1, "asyncmq_nats.exceptions.Reject")


@pytest.mark.parametrize("kind", KINDS)
async def test_the_waiter_is_told_of_every_attempt(backend: Backend, kind: str) -> None:
    queue = queue_of(backend, kind)
    job_id = await queue.add("do", ["unreachable"], retries=2)
    async with running(queue):
        with pytest.raises(JobFailed, match="Unreachable: down") as caught:
            await queue.wait_for(job_id, PATIENCE)
    failed = caught.value
    here = f"{__name__}.Unreachable"
    assert (failed.type, failed.message, failed.error) == (here, "down", "Unreachable: down")
    assert "in do" in failed.traceback
    assert [each.attempt for each in failed.attempts] == [1, 2, 3]
    assert {(each.type, each.message) for each in failed.attempts} == {(here, "down")}
    assert failed.attempts[0].at <= failed.attempts[2].at
    assert "in do" in failed.attempts[0].traceback
    again = pickle.loads(pickle.dumps(failed))
    assert (str(again), again.attempts) == (str(failed), failed.attempts)


async def test_a_snoozed_job_goes_on_where_it_was(backend: Backend) -> None:
    seen: list[tuple[int, int]] = []
    told: list[str] = []

    async def work() -> str:
        job = current_job()
        seen.append((job.attempt, job.snoozes))
        if len(seen) in (1, 2, 4):
            raise Snooze(timedelta(0))
        if len(seen) == 3:
            raise Retry(after=0)
        return "done"

    registry = TaskRegistry()
    registry.register(work, queue="work", name="work")
    queue = Queue("work", backend, registry=registry)

    def listen(event: str) -> None:
        event_emitter.on(event, lambda data: told.append(event))

    for event in ("job:delayed", "job:retrying"):
        listen(event)
    try:
        job_id = await queue.add("work", retries=1)
        async with running(queue):
            assert await queue.wait_for(job_id, PATIENCE) == "done"
    finally:
        for event in ("job:delayed", "job:retrying"):
            for listener in list(event_emitter._listeners.get(event, ())):
                event_emitter.off(event, listener)
    assert seen == [(1, 0), (1, 1), (1, 2), (2, 0), (2, 1)]
    assert told == ["job:retrying"]


async def test_a_snooze_ends_with_the_time_to_live(backend: Backend) -> None:
    async def work() -> None:
        raise Snooze(0.02)

    registry = TaskRegistry()
    registry.register(work, queue="work", name="work")
    queue = Queue("work", backend, registry=registry)
    job_id = await queue.add("work", ttl=0.3)
    async with running(queue):
        job = await outcome(queue, job_id)
    assert (job["status"], job["retries"]) == ("expired", 0)


async def test_a_snoozed_job_can_be_cancelled_and_run_by_hand(backend: Backend) -> None:
    queue = queue_of(backend, "thread")
    first, second = [await queue.add("do", ["snooze"]) for _ in range(2)]
    async with running(queue):
        await only(queue, delayed=2)
        assert await queue.cancel_job(first)
        assert await queue.retry_job(second)

        async def snoozed_again() -> Any:
            return await queue.get_job(second)

        job = await until(snoozed_again, lambda job: bool(job and job["status"] == "delayed"))
    assert job["snoozes"] == 1
    assert await queue.get_job_state(first) == "cancelled"


async def test_follow_ups_of_a_snoozed_run_are_not_added(backend: Backend) -> None:
    async def work() -> None:
        current_job().add("work")
        raise Snooze(3600)

    registry = TaskRegistry()
    registry.register(work, queue="work", name="work")
    queue = Queue("work", backend, registry=registry)
    await queue.add("work")
    async with running(queue):
        await only(queue, delayed=1)


async def test_a_job_that_waits_for_a_snoozed_one_goes_on_waiting(backend: Backend) -> None:
    runs: list[str] = []

    async def parent() -> str:
        runs.append("parent")
        if len(runs) == 1:
            raise Snooze(0)
        return "ready"

    async def child() -> Any:
        runs.append("child")
        return await current_job().parent_results()

    registry = TaskRegistry()
    registry.register(parent, queue="work", name="parent")
    registry.register(child, queue="work", name="child")
    queue = Queue("work", backend, registry=registry)
    first = await queue.add("parent")
    second = await queue.add("child", depends_on=[first])
    async with running(queue):
        assert await queue.wait_for(second, PATIENCE) == {first: "ready"}
    assert runs == ["parent", "parent", "child"]


async def test_a_timeout_is_an_exception_like_others(backend: Backend) -> None:
    registry = TaskRegistry()
    registry.register(
        anyio.sleep_forever, queue="work", name="sleep", timeout=0.01, retry_on=ConnectionError
    )
    queue = Queue("work", backend, registry=registry)
    job_id = await queue.add("sleep", retries=5, timeout=0.01)
    async with running(queue):
        job = await outcome(queue, job_id)
    assert job["retries"] == 1
    assert job["errors"][0]["type"] == "asyncmq_nats.exceptions.TaskTimeout"


# -- values


@pytest.mark.parametrize("seconds", [-1, math.inf, math.nan, "5", None])
def test_a_wait_that_is_no_number_of_seconds_is_refused(seconds: Any) -> None:
    with pytest.raises(InvalidArgument, match="seconds must be 0 or more seconds"):
        Snooze(seconds)
    if seconds is not None:
        with pytest.raises(InvalidArgument, match="after must be 0 or more seconds"):
            Retry(after=seconds)


def test_both_names_of_a_wait_at_once_are_refused() -> None:
    assert Retry(delay=7).delay == Retry(after=timedelta(seconds=7)).delay == 7
    with pytest.raises(ValueError, match="give one of them"):
        Retry(after=7, delay=7)


@pytest.mark.parametrize("types", [ValueError("x"), "ValueError", int, [int], [ValueError()]])
def test_what_is_no_class_of_exceptions_is_refused(types: Any) -> None:
    for name in ("retry_on", "give_up_on"):
        with pytest.raises(InvalidArgument, match=f"{name} must be a class of exceptions"):
            TaskRegistry().register(do, queue="work", **{name: types})


def test_giving_up_comes_before_retrying() -> None:
    failure = Failure.of(Unreachable("down"), 0)
    assert judge(failure, (ConnectionError,), (Unreachable,)).final
    assert not judge(failure, (ConnectionError,), (ValueError,)).final
    assert not judge(Failure.of(Retry(), 0), (ValueError,), (Exception,)).final
    assert judge(failure, (), None).final


def test_an_exception_that_stayed_in_its_process_is_known_by_its_classes() -> None:
    there = Failure("Unreachable: down", "", 0, lineage=("x.Unreachable", "ConnectionError"))
    assert there.is_one_of((ConnectionError,))
    assert not there.is_one_of((ValueError, Unreachable))


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda: 1, 1.0),
        (lambda retry: retry, 2.0),
        (lambda retry, factor=10: retry * factor, 20.0),
        (lambda retry, error: retry + len(str(error)), 6.0),
        (lambda *args: len(args), 1.0),
    ],
)
def test_a_backoff_function_is_given_what_it_takes(
    function: Callable[..., float], expected: float
) -> None:
    job = Job("t", retries=1, max_retries=5, backoff=None)
    assert retry_delay(job, Failure.of(ValueError("four"), 0), function) == expected


def test_from_the_eleventh_in_a_row_on_a_snooze_waits() -> None:
    failure, limits = Failure.of(Snooze(0), 0), RetryLimits(delay=2.0)
    waits = [snooze_delay(Job("t", snoozes=number), failure, limits) for number in (0, 9, 10, 11)]
    assert waits == [0.0, 0.0, 2.0, 2.0]


def test_every_attempt_is_kept_the_earlier_ones_in_short() -> None:
    job = Job("t", backoff=Backoff())
    for number in range(MAX_ERRORS + 3):
        job = add_failure(job, Failure(f"ValueError: {'x' * 2_000}", "t" * 4_000, float(number)))
    assert [entry["attempt"] for entry in job.errors] == list(range(4, MAX_ERRORS + 4))
    assert job.retries == MAX_ERRORS + 3
    full = [entry for entry in job.errors if entry["traceback"]]
    assert full == job.errors[-FULL_ERRORS:]
    assert {len(entry["error"]) for entry in full} == {2_012}
    assert max(len(entry["error"]) for entry in job.errors[:-FULL_ERRORS]) <= 123
    assert len(job.encode()) < 64 * 1024


def test_an_entry_without_a_type_is_read_as_it_is() -> None:
    old = FailedAttempt.read({"attempt": 2, "error": "ValueError: no", "traceback": "", "at": 1})
    assert (old.type, old.message, old.attempt) == ("", "ValueError: no", 2)
    assert FailedAttempt.read({"attempt": "x", "at": None}).attempt == 0
    same = FailedAttempt.read({"type": "a.B", "error": "B: no: really"})
    assert (same.type, same.message) == ("a.B", "no: really")
    bare = FailedAttempt.read({"type": "a.B", "error": "B"})
    assert (bare.type, bare.message) == ("a.B", "")


def test_an_error_that_no_other_process_can_make_is_told_all_the_same() -> None:
    failed = JobFailed("a", "failed", "ValueError: no")
    assert (failed.type, failed.message, failed.traceback, failed.attempts) == (
        *("", "ValueError: no", ""),
        (),
    )
    assert isinstance(Reject("no"), Fail)


async def test_a_job_that_fails_with_its_parent_says_so(backend: Backend) -> None:
    queue = queue_of(backend, "coroutine")
    parent = await queue.add("do", ["reject"])
    child = await queue.add("do", ["x"], depends_on=[parent], on_parent_failure="fail")
    await run_jobs(queue)
    with pytest.raises(JobFailed, match=parent) as caught:
        await queue.wait_for(child, PATIENCE)
    assert (caught.value.type, caught.value.attempts) == ("", ())
