"""Whether and when a failed job runs again."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from asyncmq_nats.exceptions import Fail, Retry
from asyncmq_nats.jobs import MAX_DELAY, Backoff, Job
from asyncmq_nats.retries import (
    MAX_ERROR,
    MAX_ERRORS,
    MAX_TRACEBACK,
    BackoffFunction,
    Failure,
    RetryLimits,
    add_failure,
    backoff_delay,
    retry_delay,
)
from asyncmq_nats.wire.codec import dump_json

FAILURE = Failure("ValueError: no", "", 0.0)


def failed(job: Job, times: int) -> Job:
    for number in range(times):
        job = add_failure(job, Failure(f"error {number + 1}", "", float(number)))
    return job


def delays(job: Job, times: int, function: BackoffFunction | None = None) -> list[float | None]:
    return [retry_delay(failed(job, number), FAILURE, function) for number in range(times)]


@pytest.mark.parametrize("retries", [0, 1, 3])
def test_as_many_retries_as_asked_for_and_no_more(retries: int) -> None:
    assert delays(Job("t", max_retries=retries, backoff=None), retries + 1) == [0.0] * retries + [
        None
    ]


def test_a_job_of_a_stranger_with_more_failures_than_retries_runs_once_more() -> None:
    job = Job("t", retries=2, max_retries=1, backoff=None)
    assert retry_delay(job, FAILURE) is None
    after = add_failure(job, FAILURE)
    assert (after.retries, after.errors[-1]["attempt"]) == (3, 3)


@pytest.mark.parametrize(
    ("backoff", "expected"),
    [
        (2, [2.0, 4.0, 8.0]),
        (1.5, [1.5, 2.25, 3.375]),
        (0.1, [0.1, 0.01, 0.001]),
        (1, [1.0, 1.0, 1.0]),
        (0, [0.0, 0.0, 0.0]),
        (Backoff(), [1.0, 2.0, 4.0]),
        (Backoff("fixed", delay=5), [5.0, 5.0, 5.0]),
        (Backoff("exponential", delay=2, factor=3), [2.0, 6.0, 18.0]),
        (Backoff("exponential", delay=2, factor=3, maximum=10), [2.0, 6.0, 10.0]),
    ],
)
def test_each_retry_waits_as_its_backoff_says(
    backoff: float | Backoff, expected: list[float]
) -> None:
    assert delays(Job("t", max_retries=9, backoff=backoff), 3) == pytest.approx(expected)


@given(share=st.floats(0, 1), jitter=st.floats(0, 1))
def test_jitter_takes_away_a_share(share: float, jitter: float) -> None:
    delay = backoff_delay(Backoff("fixed", delay=8, jitter=jitter), 1, lambda: share)
    assert 8 * (1 - jitter) - 1e-9 <= delay <= 8


@given(backoff=st.floats(0, allow_nan=False, allow_infinity=False), retries=st.integers(0, 2_000))
def test_a_delay_is_never_absurd(backoff: float, retries: int) -> None:
    for kind in (backoff, Backoff(delay=backoff, factor=1e10)):
        delay = retry_delay(
            Job("t", retries=retries, max_retries=retries + 1, backoff=kind), FAILURE
        )
        assert delay is not None
        assert 0 <= delay <= MAX_DELAY


def test_a_tasks_own_function_is_asked_when_the_job_has_no_backoff() -> None:
    assert delays(Job("t", max_retries=2, backoff=None), 3, lambda retry: 10.0 * retry) == [
        10.0,
        20.0,
        None,
    ]
    assert delays(Job("t", max_retries=1, backoff=2), 1, lambda retry: 10.0 * retry) == [2.0]
    assert delays(Job("t", max_retries=1, backoff=None), 1, lambda retry: -5.0) == [0.0]


def test_a_task_may_say_when_to_try_again() -> None:
    failure = Failure.of(Retry("busy", delay=7), 0)
    assert retry_delay(Job("t", max_retries=1, backoff=2), failure) == 7
    assert retry_delay(Job("t", max_retries=0), failure) is None
    assert retry_delay(Job("t", max_retries=1, backoff=2), Failure.of(Retry(), 0)) == 2


def test_a_task_may_give_up() -> None:
    assert retry_delay(Job("t", max_retries=5), Failure.of(Fail("hopeless"), 0)) is None


def test_each_failed_attempt_is_recorded() -> None:
    job = failed(Job("t"), 2)
    assert job.retries == 2
    assert job.errors == [
        {"attempt": 1, "error": "error 1", "traceback": "", "at": 0.0},
        {"attempt": 2, "error": "error 2", "traceback": "", "at": 1.0},
    ]


def test_a_failure_leaves_the_job_it_was_given_alone() -> None:
    job = Job("t")
    failed(job, 1)
    assert (job.retries, job.errors) == (0, [])


def test_only_the_last_errors_are_kept() -> None:
    job = failed(Job("t"), MAX_ERRORS + 3)
    assert [entry["attempt"] for entry in job.errors] == list(range(4, MAX_ERRORS + 4))
    assert job.retries == MAX_ERRORS + 3


def raised(error: BaseException) -> BaseException:
    try:
        raise error
    except BaseException as caught:
        return caught


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ValueError("no such address"), "ValueError: no such address"),
        (ValueError(), "ValueError"),
        (KeyError("name"), "KeyError: 'name'"),
        (SystemExit(3), "SystemExit: 3"),
        (
            ExceptionGroup("two", [ValueError("a"), TypeError("b")]),
            "ExceptionGroup: two (2 sub-exceptions)",
        ),
    ],
)
def test_an_exception_is_told_by_type_and_message(error: BaseException, text: str) -> None:
    failure = Failure.of(raised(error), 12.5)
    assert failure.error == text
    assert failure.traceback.startswith(("Traceback", "  + Exception Group Traceback"))
    assert "in raised" in failure.traceback
    assert failure.at == 12.5


def test_a_traceback_tells_the_cause() -> None:
    try:
        try:
            raise KeyError("first")
        except KeyError as cause:
            raise ValueError("second") from cause
    except ValueError as error:
        text = Failure.of(error, 0).traceback
    assert "KeyError: 'first'" in text
    assert "ValueError: second" in text


class Unprintable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


def test_an_exception_without_a_text_is_told_by_its_type() -> None:
    assert "Unprintable" in Failure.of(raised(Unprintable()), 0).error


@given(st.text(max_size=50))
@example("\ud800")
def test_any_message_can_be_stored(message: str) -> None:
    failure = Failure.of(raised(ValueError(message)), 0)
    assert dump_json([failure.error, failure.traceback])


@given(head=st.text(max_size=100), length=st.integers(0, 20_000), tail=st.text(max_size=100))
def test_texts_are_cut_in_the_middle(head: str, length: int, tail: str) -> None:
    failure = Failure.of(raised(ValueError(head + "x" * length + tail)), 0)
    assert len(failure.error) <= MAX_ERROR + 3
    assert len(failure.traceback) <= MAX_TRACEBACK + 3
    assert failure.error.startswith("ValueError")
    assert failure.error.endswith(tail)


def test_from_the_eleventh_on_a_retry_waits(caplog: pytest.LogCaptureFixture) -> None:
    job, limits = Job("t", max_retries=10**9, backoff=None), RetryLimits(retries=10**10, delay=2.0)
    waits = [retry_delay(failed(job, number), FAILURE, limits=limits) for number in range(13)]
    assert waits == [0.0] * 10 + [2.0] * 3
    slow = Job("t", max_retries=99, backoff=Backoff("fixed", delay=7))
    assert retry_delay(failed(slow, 20), FAILURE, limits=limits) == 7.0
    asked = Failure.of(Retry(delay=0.0), 0)
    assert retry_delay(failed(job, 20), asked, limits=limits) == 2.0


def test_a_worker_grants_so_many_retries_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    job, limits = Job("t", max_retries=10**9, backoff=None), RetryLimits(retries=2)
    waits = [retry_delay(failed(job, number), FAILURE, limits=limits) for number in range(3)]
    assert waits == [0.0, 0.0, None]
    assert caplog.text.count("its 1000000000 retries are cut to 2") == 1
