"""Every error belongs to one tree, is the builtin it resembles, and says what to do."""

import inspect
import pickle
import re

import pytest

from asyncmq_nats import exceptions
from asyncmq_nats.exceptions import (
    AssetMissing,
    AssetOffline,
    AsyncMQError,
    BackendError,
    BulkAddFailed,
    ConnectionFailed,
    Fail,
    InvalidArgument,
    InvalidJob,
    InvalidJobId,
    InvalidQueueName,
    JobFailed,
    JobNotFound,
    LoopRunning,
    NotSerializable,
    PayloadTooLarge,
    PermissionRefused,
    Retry,
    ServerBinaryMissing,
    ServerUnsuitable,
    TaskNotFound,
    TaskTimeout,
    TooManyPriorities,
    Unconfirmed,
    VirtualTimeStuck,
    WriteRefused,
)

EVERY = {
    name: value
    for name, value in vars(exceptions).items()
    if inspect.isclass(value) and issubclass(value, AsyncMQError)
}
DRAWN = re.compile(r"^ {4}([│├└─ ]+)(\w+)(?: +\(([\w, ]+)\))?", re.MULTILINE)


@pytest.mark.parametrize(
    ("error", "builtin", "told"),
    [
        (InvalidQueueName("a.b"), ValueError, ["'a.b'", "A-Z"]),
        (
            InvalidArgument("delay must be a number", "5"),
            TypeError,
            ["delay must be a number, not '5'"],
        ),
        (InvalidArgument("delay must be a number", 10**5000), ValueError, ["not this int"]),
        (
            InvalidArgument("delay must be a number", "x" * 5000),
            ValueError,
            ["x" * 70 + "xxxxxxxxx…"],
        ),
        (Unconfirmed("the reading of log", 2.5, read=True), TimeoutError, ["2.5 s", "leader"]),
        (InvalidJobId("7", "it has digits only"), ValueError, ["'7'", "digits"]),
        (InvalidJob("no task"), ValueError, ["no task", "docs/protocol.md"]),
        (
            NotSerializable("argument 0", "it is a socket"),
            TypeError,
            ["argument 0", "socket", "plain data"],
        ),
        (
            PayloadTooLarge("job 'a'", 2_000_000, 1_000_000),
            ValueError,
            ["job 'a'", "2,000,000", "1,000,000", "max_payload"],
        ),
        (TooManyPriorities("work", 256), ValueError, ["'work'", "256"]),
        (TaskNotFound("mail.send", ["b", "a"]), LookupError, ["'mail.send'", "a, b", "import"]),
        (JobNotFound("work", "a"), LookupError, ["'work'", "'a'"]),
        (
            JobFailed("a", "failed", "ValueError: no"),
            AsyncMQError,
            ["'a'", "failed", "ValueError: no"],
        ),
        (JobFailed("a", "expired", None), AsyncMQError, ["'a'", "expired"]),
        (
            BulkAddFailed({0: "a"}, {1: ValueError("full")}),
            AsyncMQError,
            ["1 jobs were added", "1 were not", "full"],
        ),
        (WriteRefused("log", "wrong sequence"), BackendError, ["'log'", "wrong sequence"]),
        (Unconfirmed("the write", 2.5), TimeoutError, ["2.5 s", "job_id"]),
        (
            ConnectionFailed("nats://a", "refused"),
            ConnectionError,
            ["nats://a", "refused", "ASYNCMQ_NATS_SERVERS"],
        ),
        (
            ServerUnsuitable("nats-server 2.9 is too old", "install 2.12"),
            BackendError,
            ["2.9", "install 2.12"],
        ),
        (
            PermissionRefused("publishing", "denied"),
            PermissionError,
            ["publishing", "denied", "declare=False"],
        ),
        (AssetMissing("stream x"), LookupError, ["stream x", "declare"]),
        (AssetOffline("stream x", "is offline"), BackendError, ["stream x", "start one"]),
        (LoopRunning("enqueue()", "await it"), RuntimeError, ["enqueue()", "await it"]),
        (VirtualTimeStuck("a job waits"), RuntimeError, ["a job waits"]),
        (ServerBinaryMissing(), RuntimeError, ["asyncmq-nats[embedded]"]),
        (Retry("busy", delay=2), AsyncMQError, ["busy"]),
        (Fail("hopeless"), AsyncMQError, ["hopeless"]),
        (TaskTimeout("mail.send", 2.5, in_thread=False), TimeoutError, ["'mail.send'", "2.5 s"]),
    ],
)
def test_a_message_has_the_values_and_says_what_to_do(
    error: AsyncMQError, builtin: type, told: list[str]
) -> None:
    assert isinstance(error, AsyncMQError)
    assert isinstance(error, builtin)
    assert [word for word in told if word not in str(error)] == []


def test_the_drawn_tree_is_the_real_one() -> None:
    bases: dict[str, set[str]] = {}
    parents = ["AsyncMQError"]
    for branch, name, builtins in DRAWN.findall(exceptions.__doc__ or ""):
        depth = len(branch) // 4
        parents[depth:] = [name]
        bases[name] = {parents[depth - 1]} | (set(builtins.split(", ")) if builtins else set())
    assert bases == {
        name: {base.__name__ for base in error.__bases__}
        for name, error in EVERY.items()
        if name != "AsyncMQError"
    }


def test_every_error_is_exported() -> None:
    assert sorted([*EVERY, "FailedAttempt"]) == sorted(exceptions.__all__)


@pytest.mark.parametrize("name", sorted(set(EVERY) - {"AsyncMQError", "BackendError"}))
def test_every_error_says_when_it_is_raised(name: str) -> None:
    assert EVERY[name].__doc__


def test_what_went_wrong_can_be_read_by_a_program() -> None:
    failed = JobFailed("a", "failed", "ValueError: no")
    assert (failed.job_id, failed.state, failed.error) == ("a", "failed", "ValueError: no")
    bulk = BulkAddFailed({0: "a"}, {1: failed})
    assert (bulk.added, bulk.errors) == ({0: "a"}, {1: failed})
    large = PayloadTooLarge("job 'a'", 2, 1)
    assert (large.size, large.limit) == (2, 1)
    missing = JobNotFound("work", "a")
    assert (missing.queue, missing.job_id) == ("work", "a")
    assert NotSerializable("argument 0", "no").what == "argument 0"


@pytest.mark.parametrize(
    "error",
    [
        JobFailed("a", "failed", "no"),
        JobNotFound("work", "a"),
        PayloadTooLarge("job", 2, 1),
        ConnectionFailed("nats://a", "refused"),
        Unconfirmed("the write", 2.5),
        BulkAddFailed({0: "a"}, {1: JobNotFound("work", "b")}),
        Retry("busy", delay=2),
        Fail("hopeless"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_error_survives_a_process_boundary(error: AsyncMQError) -> None:
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error)
    assert str(again) == str(error)
    assert vars(again).keys() == vars(error).keys()
    assert [str(value) for value in vars(again).values()] == [
        str(value) for value in vars(error).values()
    ]


def test_the_seconds_of_an_unconfirmed_write_are_those_that_were_asked_for() -> None:
    """What is left of them when it is sent is a little less."""
    assert "not confirmed within 1.5 s:" in str(Unconfirmed("the write", 1.49999))
    assert "not answered within 0.25 s:" in str(Unconfirmed("the read", 0.25, read=True))
