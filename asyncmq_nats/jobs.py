"""`Job` and its wire format.

One JSON object, the same for a job that waits and for its outcome (`docs/protocol.md`).
"""

import os
import random
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import MISSING, field, fields, replace
from dataclasses import dataclass as plain_dataclass
from functools import cache
from time import time, time_ns
from typing import Annotated, Any, Final, Literal, Self, get_type_hints

from pydantic import (
    AliasChoices,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
)
from pydantic.dataclasses import dataclass
from pydantic_core import SchemaValidator
from pydantic_core.core_schema import typed_dict_field, typed_dict_schema, with_default_schema

from asyncmq_nats.exceptions import (
    InvalidArgument,
    InvalidJob,
    InvalidJobId,
    NewerJob,
    NotSerializable,
    PayloadTooLarge,
)
from asyncmq_nats.states import OUTCOMES, State
from asyncmq_nats.wire.codec import dump_json, find_non_finite, may_be_non_finite
from asyncmq_nats.wire.keys import PRIORITY_LIMIT, check_job_id

__all__ = [
    "LATEST_TIME",
    "WIRE_VERSION",
    "Backoff",
    "DelayedInfo",
    "Job",
    "JobHead",
    "backoff_delay",
    "check_size",
    "encoded_options",
    "new_job",
    "new_job_id",
    "size_limit",
    "validate_custom_job_id",
]

WIRE_VERSION: Final = 1
OUTCOME_RESERVE: Final = 64 * 1024
IDS_AT_ONCE: Final = 64
RANDOM_BYTES: Final = 10
"""Random bytes for one id, of which 74 bits are used."""
VARIANTS: Final = {digit: "89ab"[int(digit, 16) & 3] for digit in "0123456789abcdef"}
"""Of a random digit, that of a UUID in the same place."""
ALIASES: Final = {
    "task_id": AliasChoices("task", "task_id"),
    "job_id": AliasChoices("id", "job_id"),
}
"""What fields of a job are called on the wire: the first one that is there."""
MAX_DELAY: Final = 365 * 86_400.0
"""The longest delay before a retry, in seconds."""
LATEST_TIME: Final = 250_000_000_000.0
"""No time is later than the year 9892."""


_tails: deque[str] = deque()
"""The random parts of ids to come: asking the system for many at once takes a third of the time."""
if hasattr(os, "register_at_fork"):  # else two processes would make the same ids
    os.register_at_fork(after_in_child=_tails.clear)


def new_job_id() -> str:
    """Return a fresh job id: a UUID of version 7 (RFC 9562), which begins with the time.

    So what the server keeps of jobs of one time lies together: random ids cost it a fifth more in a
    large queue.
    """
    try:
        tail = _tails.popleft()
    except IndexError:
        tail, *others = _random_tails()
        _tails.extend(others)
    digits = f"{time_ns() // 1_000_000:012x}"
    return f"{digits[:8]}-{digits[8:]}{tail}"


def _random_tails() -> list[str]:
    digits = os.urandom(RANDOM_BYTES * IDS_AT_ONCE).hex()
    parts = [digits[i : i + 2 * RANDOM_BYTES] for i in range(0, len(digits), 2 * RANDOM_BYTES)]
    return [f"-7{part[:3]}-{VARIANTS[part[3]]}{part[4:7]}-{part[7:19]}" for part in parts]


def validate_custom_job_id(job_id: object) -> str:
    """Return the id that a producer chose for a job.

    Raises:
        TypeError: it is no string (`InvalidJobId` is a `ValueError`; AsyncMQ raises `TypeError`
            here).
        InvalidJobId: it is empty, has digits only or a colon, or is longer than 200 bytes.
    """
    if not isinstance(job_id, str):
        raise TypeError(f"job_id must be a str, not {type(job_id).__name__}")
    if not job_id.strip():
        raise InvalidJobId(job_id, "it is empty")
    if job_id.isdigit():
        raise InvalidJobId(job_id, "it has digits only: put a word before it")
    if ":" in job_id:
        raise InvalidJobId(job_id, "it has a ':'")
    check_job_id(job_id)
    if len(job_id.encode()) > 200:
        raise InvalidJobId(job_id[:40] + "…", "it is longer than 200 bytes")
    return job_id


def size_limit(max_body: int, chosen: int | None = None) -> int:
    """Return how many bytes a new job may have: 64 KiB or an eighth is left for its outcome.

    `max_body`: bytes of a message; `chosen`: a smaller limit, that of the settings.
    """
    limit = max_body - min(OUTCOME_RESERVE, max_body // 8)
    return limit if chosen is None else min(limit, chosen)


def check_size(body: bytes, what: str, max_body: int, chosen: int | None = None) -> None:
    """Refuse a new job that is larger than `size_limit` allows.

    Raises:
        PayloadTooLarge: it is too large.
    """
    limit = size_limit(max_body, chosen)
    if len(body) > limit:
        raise PayloadTooLarge(what, len(body), limit)


@dataclass(frozen=True, slots=True, config=ConfigDict(extra="forbid"))
class Backoff:
    """How long to wait before the n-th retry (n = 1, 2, …), in seconds.

    See `retries.backoff_delay`. `fixed`: `delay` each time. `exponential`: `delay * factor ** (n -
    1)`. Never more than `maximum`. `jitter` (0 to 1) takes away a random share of up to this part,
    so that jobs that failed together do not come back together.
    """

    kind: Literal["fixed", "exponential"] = "exponential"
    delay: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    factor: float = Field(default=2.0, ge=1, allow_inf_nan=False)
    maximum: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    jitter: float = Field(default=0.0, ge=0, le=1)


def backoff_delay(
    backoff: float | Backoff, retry: int, share: Callable[[], float] = random.random
) -> float:
    """Return the seconds before the `retry`-th retry.

    A number is raised to the power of `retry` (AsyncMQ `Job.next_retry_delay`). `share`: where
    jitter takes its random number from 0 to 1.
    """
    try:
        if not isinstance(backoff, Backoff):
            return float(backoff**retry)
        delay = backoff.delay * (1.0 if backoff.kind == "fixed" else backoff.factor ** (retry - 1))
    except OverflowError:
        delay = MAX_DELAY
    if isinstance(backoff, Backoff):
        delay = min(delay, MAX_DELAY if backoff.maximum is None else backoff.maximum)
        delay *= 1.0 - backoff.jitter * share()
    return delay


@plain_dataclass(frozen=True)
class JobHead:
    """What a worker has to know of a job to run it.

    All of it, a `Job`, takes three times as long, and is read when it is needed.
    """

    task_id: Annotated[str, Field(min_length=1)]
    job_id: Annotated[str, Field(min_length=1)]
    created_at: Annotated[float, Field(allow_inf_nan=False)]
    args: list[Any] = field(default_factory=list)
    kwargs: dict[str, Any] = field(default_factory=dict)
    ttl: Annotated[float | None, Field(ge=0, allow_inf_nan=False)] = None
    timeout: Annotated[float | None, Field(gt=0, allow_inf_nan=False)] = None
    delay_until: Annotated[float | None, Field(allow_inf_nan=False, le=LATEST_TIME)] = None
    repeat_every: float | str | None = None
    children: list[str] | None = None
    stalls: int = 0
    retries: Any = 0
    meta: Any = None
    v: int = WIRE_VERSION

    def is_expired(self, now: float) -> bool:
        """Return whether its time to live is over."""
        return self.ttl is not None and now - self.created_at > self.ttl

    def may_run(self, now: float) -> bool:
        """Return whether it has not expired and its time has come."""
        if self.delay_until is not None and self.delay_until > now:
            return False
        return self.ttl is None or not self.is_expired(now)

    @classmethod
    def decode(cls, body: bytes) -> Self:
        """Return the head of the job in a message that this library wrote.

        Raises:
            InvalidJob: the body is not a job.
            NewerJob: it is of a newer version of the format.
        """
        members = _validate(_heads().validate_json, body)
        # What was read is its namespace, what the body has not is an attribute of the class: to
        # make it of its members takes as long as to read them.
        head = cls.__new__(cls)
        object.__setattr__(head, "__dict__", members)
        if may_be_non_finite(body):
            _check_numbers(head.args, head.kwargs)
        if head.v > WIRE_VERSION:
            raise NewerJob(head.v, WIRE_VERSION)
        return head


@dataclass(
    frozen=True, config=ConfigDict(extra="forbid")
)  # in the constructor; stored jobs may have more
class Job:
    """One job, and how far it is. Times are Unix seconds, durations seconds.

    `retries` counts the attempts that have failed, `max_retries` how many may follow the first: a
    job that failed for good has one more of the former. A job of another program that has even more
    runs once.
    `backoff`: a number *b* waits `b ** retries` before the next attempt, `None` not at all; or a
    `Backoff`. The names are AsyncMQ's; on the wire `task_id` is `task` and `job_id` is `id`.
    """

    task_id: str = Field(validation_alias=ALIASES["task_id"], min_length=1)
    args: list[Any] = Field(default_factory=list)
    kwargs: dict[str, Any] = Field(default_factory=dict)
    retries: int = Field(default=0, ge=0)
    max_retries: int = Field(default=3, ge=0)
    backoff: Annotated[float, Field(ge=0, allow_inf_nan=False)] | Backoff | None = 1.5
    ttl: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    job_id: Annotated[
        str, BeforeValidator(lambda value: new_job_id() if value is None else value)
    ] = Field(default_factory=new_job_id, validation_alias=ALIASES["job_id"], min_length=1)
    created_at: Annotated[
        float, BeforeValidator(lambda value: time() if value is None else value)
    ] = Field(default_factory=time, allow_inf_nan=False)
    priority: int = Field(default=5, gt=-PRIORITY_LIMIT, lt=PRIORITY_LIMIT)
    repeat_every: float | str | None = None
    depends_on: Annotated[
        list[str], BeforeValidator(lambda value: [] if value is None else value)
    ] = Field(default_factory=list)
    deduplication: dict[str, Any] | None = None
    active_since: float | None = None
    delay_until: float | None = Field(default=None, allow_inf_nan=False, le=LATEST_TIME)
    timeout: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """How long one attempt may run."""
    parents: list[str] = Field(default_factory=list)
    """The jobs in `depends_on` that have not completed yet."""
    children: list[str] = Field(default_factory=list)
    """Jobs that were added together with this one and depend on it."""
    wide: str = ""
    """`<token>.<parts>`: where the open parents are kept, if they are too many for `parents`."""
    wide_children: dict[str, str] = Field(default_factory=dict)
    """The jobs in `children` that have many parents, and the part in which this one is kept."""
    parent_results: dict[str, Any] = Field(default_factory=dict)
    on_parent_failure: Literal["wait", "fail", "run"] = "wait"
    """What becomes of this job when one that it depends on does not complete."""
    custom_id: bool = False
    """Whether the producer chose the id."""
    errors: list[dict[str, Any]] = Field(default_factory=list)
    """What went wrong in the last hundred attempts: `attempt`, `error`, `traceback`, `at`, `type`.

    The last five have all of the error and its traceback.
    """
    status: State = State.WAITING
    result: Any = None
    last_error: str | None = None
    error_traceback: str | None = None
    last_attempt: float | None = None
    progress: float | None = None
    progress_data: Any = None
    """The data of its task's last progress report."""
    finished_at: float | None = None
    worker: str | None = None
    stalls: int = 0
    """The number of workers that were lost while it ran."""
    reruns: int = Field(default=0, ge=0)
    """The number of retries by hand."""
    put_offs: int = Field(default=0, ge=0)
    """How often it was put off: by its task, or by a worker without its task or its version."""
    put_off_since: float | None = Field(default=None, allow_inf_nan=False)
    """When the first of these put-offs began."""
    put_off_reason: str | None = None
    snoozes: int = Field(default=0, ge=0)
    """How often in a row its task has put it off by `Snooze`."""
    meta: dict[str, str] = Field(default_factory=dict)
    """Strings of producers and middleware, such as the id of a request or of a trace."""
    v: int = WIRE_VERSION

    @property
    def id(self) -> str:
        """The id of the job (AsyncMQ `Job.id`)."""
        return self.job_id

    @property
    def waits_for_others(self) -> bool:
        """Whether a job that it depends on is still open."""
        return bool(self.parents or self.wide)

    @property
    def order(self) -> tuple[int, int]:
        """Orders records of the job: that of a later attempt is greater."""
        return self.reruns, self.retries + self.put_offs

    def is_expired(self, now: float | None = None) -> bool:
        """Return whether its time to live is over (AsyncMQ `Job.is_expired`)."""
        return (
            self.ttl is not None and (time() if now is None else now) - self.created_at > self.ttl
        )

    def is_early(self, now: float) -> bool:
        """Return whether its time is still to come."""
        return self.delay_until is not None and self.delay_until > now

    def next_retry_delay(self) -> float:
        """Return the seconds before the next retry (AsyncMQ `Job.next_retry_delay`).

        `retries` counts the attempt that has just failed.
        """
        return 0.0 if self.backoff is None else backoff_delay(self.backoff, self.retries)

    def to_dict(self) -> dict[str, Any]:
        """Return AsyncMQ's keys, and ours beside them (AsyncMQ `Job.to_dict`).

        `last_error` is one line, `error_traceback` all of it. `completed_at` and `failed_at` are
        there when the job has ended so.
        """
        fields: dict[str, Any] = {"id": self.job_id, "task": self.task_id}
        fields |= {name: getattr(self, name) for name in DICT_FIELDS}
        if self.active_since is not None:
            fields["active_since"] = self.active_since
            fields["last_attempt"] = self.last_attempt or self.active_since
        if self.progress is not None:
            fields |= {"progress": self.progress, "progress_data": self.progress_data}
        if self.status not in OUTCOMES:
            fields |= self._last_problem()
        fields["updated_at"] = self.finished_at or fields["last_attempt"] or self.created_at
        if self.status is State.COMPLETED:
            fields["completed_at"] = self.finished_at
        elif self.status in (State.FAILED, State.EXPIRED):
            fields["failed_at"] = self.finished_at
        return fields

    def _last_problem(self) -> dict[str, Any]:
        """Return why a job that is to be tried again did not complete, as one that ended has it."""
        if self.put_off_reason is not None:
            return {"last_error": self.put_off_reason}
        return _last_failure(self.errors[-1]) if self.errors else {}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Return the job of such a dict; unknown keys are passed over.

        Raises:
            InvalidJob: it lacks the task, or a value is of the wrong kind.
        """
        job: Self = _validate(JOBS.validate_python, dict(data))
        return job

    @classmethod
    def decode(
        cls, body: bytes, *, job_id: str | None = None, created_at: float | None = None
    ) -> Self:
        """Return the job in a message.

        The id and the time of the message stand in where the body has none; the id of the subject
        wins. A newer version of the format is read as far as this one knows it: a worker asks
        `JobHead` for the version.

        Raises:
            InvalidJob: the body is not a job.
        """
        job: Self = _validate(JOBS.validate_json, body)
        if may_be_non_finite(body):
            _check_numbers(job.args, job.kwargs)
        if job_id is not None and job.job_id != job_id:
            job = replace(job, job_id=job_id)
        if created_at is not None and b'"created_at"' not in body:
            job = replace(job, created_at=created_at)
        return job

    def encode(self) -> bytes:
        """Return the JSON of a job that has not ended.

        Fields with an unchanging default are left out. It is made once: later changes of the
        arguments do not count.

        Raises:
            NotSerializable: an argument is not JSON; the message names it.
        """
        encoded: bytes | None = self.__dict__.get("_encoded")
        if encoded is None:
            encoded = self.__dict__["_encoded"] = self._encode()
        return encoded

    def _encode(self) -> bytes:
        fields = {
            "v": self.v,
            "id": self.job_id,
            "task": self.task_id,
            "args": self.args,
            "kwargs": self.kwargs,
            "created_at": self.created_at,
            **encoded_options(self),
        }
        try:
            return dump_json(fields)
        except NotSerializable:
            self._blame_argument()
            raise

    def _blame_argument(self) -> None:
        for where, value in [
            *((f"argument {i}", arg) for i, arg in enumerate(self.args)),
            *((f"argument {k!r}", v) for k, v in self.kwargs.items()),
        ]:
            dump_json(value, f"{where} of task {self.task_id!r}")


def encoded_options(job: Job) -> dict[str, Any]:
    """Return the members of a job's JSON that are the same for jobs with the same options."""
    fields: dict[str, Any] = {
        "retries": job.retries,
        "max_retries": job.max_retries,
        "backoff": job.backoff,
        "priority": job.priority,
    }
    for name, default in OPTIONAL_FIELDS:
        value = job.__dict__[name]
        if value != default:
            fields[name] = value
    return fields


def new_job(**fields: Any) -> Job:
    """Return a job of these fields.

    Raises:
        InvalidArgument: a value is of the wrong kind; the message names it, as `Queue.add` does.
    """
    try:
        job: Job = JOBS.validate_python(fields)  # a quarter of what `Job(**fields)` takes
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        first, *rest = problem["loc"]
        where = ".".join(str(part) for part in (NAMES_IN_ADD.get(str(first), first), *rest))
        raise InvalidArgument(f"{where}: {problem['msg']}", problem["input"]) from None
    return job


@plain_dataclass(frozen=True, slots=True)
class DelayedInfo:
    """A delayed job (AsyncMQ `DelayedInfo`).

    `run_at`: when it runs, in Unix seconds. `payload`: the job as a dict.
    """

    job_id: str
    run_at: float
    payload: dict[str, Any]


NAMES_IN_ADD: Final = {
    "max_retries": "retries",
    "delay_until": "delay",
    "task": "task_id",
    "id": "job_id",
}
JOBS: Final = TypeAdapter(Job).validator
DICT_FIELDS: Final = (
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
    "errors",
    "finished_at",
    "worker",
    "stalls",
    "timeout",
    "meta",
    "snoozes",
)
OPTIONAL_FIELDS: Final[tuple[tuple[str, Any], ...]] = tuple(
    (name, getattr(Job("any"), name))
    for name in (
        "parents",
        "children",
        "wide",
        "wide_children",
        "parent_results",
        "ttl",
        "timeout",
        "repeat_every",
        "depends_on",
        "deduplication",
        "delay_until",
        "custom_id",
        "errors",
        "stalls",
        "on_parent_failure",
        "meta",
    )
)
"""The fields that are left out when they have their default, and this."""


def _last_failure(failure: Mapping[str, Any]) -> dict[str, Any]:
    """Return what AsyncMQ tells of the last failed attempt, out of an entry of `errors`."""
    at = failure.get("at")
    return {
        "last_error": str(failure.get("error", "")),
        "error_traceback": str(failure.get("traceback", "")),
        "last_attempt": at if isinstance(at, int | float) else None,
    }


@cache
def _heads() -> SchemaValidator:
    """Return what reads the members of a `JobHead`. Those with a plain default may be missing."""
    members = {}
    hints = get_type_hints(JobHead, include_extras=True)
    for each in fields(JobHead):
        schema = TypeAdapter(hints[each.name]).core_schema
        if each.default_factory is not MISSING:
            schema = with_default_schema(schema, default_factory=each.default_factory)
        required = each.default is MISSING and each.default_factory is MISSING
        alias = ALIASES.get(each.name)
        names = None if alias is None else alias.convert_to_aliases()
        members[each.name] = typed_dict_field(schema, required=required, validation_alias=names)
    return SchemaValidator(typed_dict_schema(members))


def _validate(validate: Callable[..., Any], value: Any) -> Any:
    try:
        return validate(value, extra="ignore")
    except ValidationError as error:
        raise InvalidJob(_first_problem(error)) from None


def _check_numbers(args: list[Any], kwargs: dict[str, Any]) -> None:
    if (bad := find_non_finite([args, kwargs])) is not None:
        raise InvalidJob(f"{bad} is not a JSON number")


def _first_problem(error: ValidationError) -> str:
    problem = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(str(part) for part in problem["loc"])
    return f"{where}: {problem['msg']}" if where else problem["msg"]
