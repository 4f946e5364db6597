"""`Job` and its wire format."""

import json
import math
from dataclasses import FrozenInstanceError, dataclass, fields, replace
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from enum import Enum
from typing import Any
from uuid import UUID

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import BaseModel

from asyncmq_nats.exceptions import (
    InvalidArgument,
    InvalidJob,
    InvalidJobId,
    NewerJob,
    NotSerializable,
)
from asyncmq_nats.jobs import (
    WIRE_VERSION,
    Backoff,
    Job,
    JobHead,
    new_job,
    new_job_id,
    validate_custom_job_id,
)
from asyncmq_nats.states import State
from asyncmq_nats.wire.codec import dump_json, load_json, splice

NUMBERS = st.integers(-(2**300), 2**300) | st.floats(allow_nan=False, allow_infinity=False)
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
OBJECTS = st.dictionaries(st.text(min_size=1), JSON, max_size=4)
DURATIONS = st.none() | st.floats(0, 1e9)
JOBS = st.builds(
    Job,
    st.text(min_size=1),
    st.lists(JSON, max_size=4),
    OBJECTS,
    max_retries=st.integers(0, 10**6),
    backoff=DURATIONS,
    ttl=DURATIONS,
    job_id=st.text(min_size=1),
    created_at=st.floats(0, 1e11),
    priority=st.integers(-(10**9), 10**9),
    delay_until=st.none() | st.floats(1, 1e11),
    custom_id=st.booleans(),
)


class Colour(Enum):
    RED = "red"


@dataclass
class Point:
    x: int
    y: int


class Address(BaseModel):
    city: str


# -- the wire format


@given(JOBS)
@example(Job("t", [9007199254740993, 12345678901234567890, 2**200, -0.0, 1e300]))
@example(Job("t", [[], {}, "", None, False, 0], {"empty": [], "object": {}}))
@example(Job("übung", ["日本", "\u2028", "\x00", "😀"], {"ключ": "é"}))
def test_a_job_is_the_same_after_its_journey(job: Job) -> None:
    again = Job.decode(job.encode())
    assert again == job
    assert repr((again.args, again.kwargs)) == repr(
        (job.args, job.kwargs)
    )  # 1, 1.0 and True are equal, and not the same


@given(JOBS)
def test_the_wire_is_json_that_any_language_reads(job: Job) -> None:
    data = json.loads(job.encode())
    assert (data["v"], data["task"], data["id"]) == (WIRE_VERSION, job.task_id, job.job_id)
    assert data["args"] == job.args
    assert data["kwargs"] == job.kwargs


@given(OBJECTS)
def test_fields_of_a_newer_producer_are_passed_over(unknown: dict[str, Any]) -> None:
    known = {"task": "t", "id": "a", "created_at": 1.0}
    body = json.dumps({f"x-{name}": value for name, value in unknown.items()} | known).encode()
    assert Job.decode(body) == Job("t", job_id="a", created_at=1.0)


def test_the_least_a_foreign_producer_must_send_is_the_task() -> None:
    job = Job.decode(b'{"task": "t"}', job_id="from-subject", created_at=12.5)
    assert (job.task_id, job.args, job.kwargs, job.job_id, job.created_at) == (
        "t",
        [],
        {},
        "from-subject",
        12.5,
    )


def test_the_id_of_the_subject_wins() -> None:
    assert Job.decode(b'{"task": "t", "id": "body"}', job_id="subject").job_id == "subject"


def test_the_producers_time_wins() -> None:
    assert Job.decode(b'{"task": "t", "created_at": 7}', created_at=12.5).created_at == 7


@given(JOBS)
def test_the_head_of_a_job_says_what_the_job_says(job: Job) -> None:
    whole, head = Job.decode(job.encode()), JobHead.decode(job.encode())
    names = {each.name for each in fields(JobHead)} - {"v", "children", "meta"}
    assert {name: getattr(head, name) for name in names} == {
        name: getattr(whole, name) for name in names
    }


def test_what_a_body_leaves_out_has_its_default_in_the_head() -> None:
    body = b'{"task_id": "t", "job_id": "a", "created_at": 1}'
    head, other = JobHead.decode(body), JobHead.decode(body)
    assert head == JobHead("t", "a", 1.0)
    assert head.args is not other.args
    assert head.kwargs is not other.kwargs


def test_a_worker_tells_a_job_of_a_newer_version_from_one_that_is_malformed() -> None:
    body = b'{"task": "t", "id": "a", "created_at": 1, "v": 2}'
    with pytest.raises(NewerJob, match=r"version is 2.*upgrade asyncmq-nats"):
        JobHead.decode(body)
    assert Job.decode(body).task_id == "t"  # what is known of it can be read


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (b"", "JSON"),
        (b"hello", "JSON"),
        (b"\xff\xfe", "JSON"),
        (b"[]", "object"),
        (b"null", "object"),
        (b"{}", "task"),
        (b'{"task": ""}', "task"),
        (b'{"task": 5}', "task"),
        (b'{"task": "t", "args": {}}', "args"),
        (b'{"task": "t", "kwargs": []}', "kwargs"),
        (b'{"task": "t", "retries": -1}', "retries"),
        (b'{"task": "t", "max_retries": "many"}', "max_retries"),
        (b'{"task": "t", "delay_until": NaN}', "delay_until"),
        (b'{"task": "t", "status": "gone"}', "status"),
    ],
)
def test_what_is_not_a_job_is_told_precisely(body: bytes, told: str) -> None:
    with pytest.raises(InvalidJob, match=told):
        Job.decode(body)


@given(st.binary(max_size=60))
def test_no_bytes_do_more_than_be_refused(body: bytes) -> None:
    with pytest.raises(InvalidJob):
        Job.decode(body)


@pytest.mark.parametrize("number", [b"NaN", b"Infinity", b"-Infinity"])
def test_numbers_that_are_not_json_are_refused(number: bytes) -> None:
    with pytest.raises(InvalidJob):
        Job.decode(b'{"task": "t", "args": [' + number + b"]}")


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC), "2026-01-02T03:04:05Z"),
        (date(2026, 1, 2), "2026-01-02"),
        (timedelta(seconds=90), "PT1M30S"),
        (UUID(int=1), "00000000-0000-0000-0000-000000000001"),
        (Decimal("1.10"), "1.10"),
        (Colour.RED, "red"),
        (Point(1, 2), {"x": 1, "y": 2}),
        (Address(city="Bern"), {"city": "Bern"}),
        ((1, 2), [1, 2]),
        ({3}, [3]),
        (b"bytes", "bytes"),
        (State.FAILED, "failed"),
    ],
)
def test_arguments_of_common_kinds_are_written_as_json(value: object, written: object) -> None:
    data = json.loads(Job("t", [value], {"key": value}).encode())
    assert data["args"] == [written]
    assert data["kwargs"] == {"key": written}


@pytest.mark.parametrize(
    "value",
    [object(), lambda: None, {1: object()}, math.nan, math.inf, [-math.inf], "\ud800", b"\xff"],
)
def test_an_argument_that_is_not_json_is_named(value: object) -> None:
    with pytest.raises(NotSerializable, match=r"argument 1 of task 'send'"):
        Job("send", ["fine", value]).encode()
    with pytest.raises(NotSerializable, match=r"argument 'body' of task 'send'"):
        Job("send", ["fine"], {"to": "me", "body": value}).encode()


def test_an_argument_that_contains_itself_is_refused() -> None:
    endless: list[Any] = []
    endless.append(endless)
    with pytest.raises(NotSerializable, match="argument 0"):
        Job("t", [endless]).encode()


@pytest.mark.parametrize("value", ["NaN", "Infinity", {"NaN": 1}, ["-Infinity"]])
def test_words_that_look_like_numbers_are_words(value: object) -> None:
    assert Job.decode(Job("t", [value]).encode()).args == [value]


# -- splice


@given(
    st.dictionaries(
        st.text(min_size=1).filter(lambda name: not name.startswith("+")),
        JSON,
        min_size=1,
        max_size=4,
    ),
    st.dictionaries(st.text().map("+{}".format), JSON, min_size=1, max_size=4),
    st.sampled_from([None, 1]),
    st.text(alphabet=" \n\t\r", max_size=3),
)
def test_what_is_spliced_in_leaves_the_bytes_before_it_alone(
    there: dict[str, Any], new: dict[str, Any], indent: int | None, space: str
) -> None:
    body = (json.dumps(there, indent=indent) + space).encode()
    longer = splice(body, dump_json(new)[1:-1])
    assert longer.startswith(body.rstrip()[:-1])
    assert json.loads(longer) == there | new


@pytest.mark.parametrize("body", [b"", b"[]", b"1", b"{", b"null"])
def test_load_json_reads_objects_only(body: bytes) -> None:
    with pytest.raises(InvalidJob):
        load_json(body)


@given(OBJECTS)
def test_load_json_reads_what_dump_json_wrote(value: dict[str, Any]) -> None:
    assert load_json(dump_json(value)) == value


# -- dicts


def test_the_dict_has_asyncmqs_keys() -> None:
    assert set(Job("t").to_dict()) >= {
        "id",
        "task",
        "args",
        "kwargs",
        "retries",
        "max_retries",
        "backoff",
        "ttl",
        "created_at",
        "last_attempt",
        "status",
        "result",
        "last_error",
        "error_traceback",
        "delay_until",
        "priority",
        "depends_on",
        "repeat_every",
        "deduplication",
    }
    assert "active_since" not in Job("t").to_dict()
    assert Job("t", active_since=1.0).to_dict()["active_since"] == 1.0


def test_the_dict_says_when_the_job_ended() -> None:
    times: Any = {"created_at": 1.0, "active_since": 2.0, "finished_at": 3.0}
    done = Job("t", status=State.COMPLETED, **times).to_dict()
    assert (done["completed_at"], done["updated_at"], done["last_attempt"]) == (3.0, 3.0, 2.0)
    assert "failed_at" not in done
    for state in (State.FAILED, State.EXPIRED):
        failed = Job("t", status=state, **times).to_dict()
        assert (failed["failed_at"], failed["updated_at"]) == (3.0, 3.0)
        assert "completed_at" not in failed
    waiting = Job("t", created_at=1.0).to_dict()
    assert waiting["updated_at"] == 1.0
    assert {"completed_at", "failed_at"}.isdisjoint(waiting)


def test_the_dict_of_a_job_that_is_retried_says_why() -> None:
    errors = [{"attempt": 1, "error": "E: no", "traceback": "Traceback…", "at": 5.0}]
    told = Job("t", retries=1, errors=errors, created_at=1.0).to_dict()
    assert (told["last_error"], told["error_traceback"], told["last_attempt"]) == (
        "E: no",
        "Traceback…",
        5.0,
    )
    done = Job("t", retries=1, errors=errors, status=State.COMPLETED).to_dict()
    assert (done["last_error"], done["error_traceback"]) == (None, None)


def test_the_dict_of_a_job_that_is_put_off_says_why() -> None:
    failure = {"attempt": 1, "error": "E: no", "traceback": "Traceback…", "at": 5.0}
    for errors in ([], [failure]):
        told = Job("t", retries=len(errors), errors=errors, put_off_reason="no task").to_dict()
        assert (told["last_error"], told["error_traceback"]) == ("no task", None)
    done = Job("t", put_off_reason="no task", status=State.FAILED, last_error="E: no").to_dict()
    assert done["last_error"] == "E: no"


@pytest.mark.parametrize("given", [None, []])
def test_a_job_without_dependencies_has_an_empty_list(given: Any) -> None:
    assert Job("t", depends_on=given).depends_on == []
    assert Job("t").to_dict()["depends_on"] == []
    assert Job.from_dict({"task": "t", "depends_on": given}).depends_on == []
    assert b"depends_on" not in Job("t", depends_on=given).encode()


@pytest.mark.parametrize(
    ("backoff", "retries", "delay"),
    [(2.0, 1, 2.0), (2.0, 2, 4.0), (None, 3, 0.0), (Backoff("fixed", 5.0), 2, 5.0)],
)
def test_the_next_retry_is_asyncmqs(backoff: Any, retries: int, delay: float) -> None:
    assert Job("t", backoff=backoff, retries=retries).next_retry_delay() == delay


def test_the_defaults_are_asyncmqs() -> None:
    job = Job("t")
    assert (
        job.args,
        job.kwargs,
        job.retries,
        job.max_retries,
        job.backoff,
        job.ttl,
        job.priority,
    ) == ([], {}, 0, 3, 1.5, None, 5)
    assert job.status is State.WAITING
    assert job.id == job.job_id


@given(JOBS)
def test_a_job_is_the_same_after_a_dict(job: Job) -> None:
    assert Job.from_dict(job.to_dict()) == replace(job, custom_id=False)


@pytest.mark.parametrize("data", [{}, {"task": None}, {"task_id": 5}, {"task": "t", "args": 5}])
def test_a_dict_that_is_no_job_is_refused(data: dict[str, Any]) -> None:
    with pytest.raises(InvalidJob):
        Job.from_dict(data)


def test_the_constructors_names_are_read_too() -> None:
    job = Job.from_dict({"task_id": "t", "job_id": "a"})
    assert (job.task_id, job.job_id) == ("t", "a")


@pytest.mark.parametrize(
    "fields",
    [
        {"max_retries": -1},
        {"backoff": -1},
        {"ttl": math.nan},
        {"priority": "high"},
        {"task_id": ""},
        {"args": 5},
    ],
)
def test_a_job_with_wrong_values_names_the_field(fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument, match=next(iter(fields)).removeprefix("max_")):
        new_job(**({"task_id": "t"} | fields))


def test_a_job_is_not_changed_in_place() -> None:
    job = Job("t")
    with pytest.raises(FrozenInstanceError):
        job.retries = 1  # type: ignore[misc]


# -- time to live


@pytest.mark.parametrize(
    ("ttl", "now", "expired"),
    [(None, 1e12, False), (5, 104.9, False), (5, 105.0, False), (5, 105.1, True), (0, 100.1, True)],
)
def test_a_job_expires_when_its_time_to_live_is_over(
    ttl: float | None, now: float, expired: bool
) -> None:
    assert Job("t", ttl=ttl, created_at=100.0).is_expired(now) is expired


def test_without_a_time_it_is_now() -> None:
    assert Job("t", ttl=1, created_at=1.0).is_expired()
    assert not Job("t", ttl=3600).is_expired()


# -- ids


def test_ids_are_uuids() -> None:
    ids = {new_job_id() for _ in range(100)}
    assert len(ids) == 100
    assert all(str(UUID(job_id)) == job_id for job_id in ids)


@pytest.mark.parametrize("job_id", ["order-7", "a", "7a", "a.b", "über", "x" * 200, "-1", "a b"])
def test_a_custom_id_is_taken_as_it_is(job_id: str) -> None:
    assert validate_custom_job_id(job_id) == job_id


@pytest.mark.parametrize(
    "job_id", ["", " ", "7", "0123456789", "order:7", ":", "x" * 201, "é" * 101]
)
def test_a_custom_id_outside_asyncmqs_rules_is_refused(job_id: str) -> None:
    with pytest.raises(InvalidJobId):
        validate_custom_job_id(job_id)


@pytest.mark.parametrize("job_id", [7, 7.5, b"a", None, ["a"], UUID(int=1)])
def test_a_custom_id_that_is_no_text_is_a_type_error(job_id: object) -> None:
    with pytest.raises(TypeError, match="job_id"):
        validate_custom_job_id(job_id)
