"""A released job becomes ready: the reads, the writes and the decisions of a promoter.

`runtime/promoter.py` has the loop. A promotion is a write to the job's tier that expects nothing
there, then the removal of the released record. Both can be repeated by any promoter: the message
id is the same in all of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Final

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as validated

from asyncmq_nats.backends.base import Expect, Record, Write
from asyncmq_nats.exceptions import InvalidJob, NotSerializable
from asyncmq_nats.jobs import LATEST_TIME
from asyncmq_nats.states import Place, State
from asyncmq_nats.store.queue_store import QueueStore
from asyncmq_nats.store.secret import keyed_id
from asyncmq_nats.transitions.claim import CLAIM_TTL, Claim
from asyncmq_nats.wire.codec import dump_json, load_json
from asyncmq_nats.wire.keys import PRIORITY_LIMIT, QueueSubjects, decode_token, is_token

__all__ = [
    "Finding",
    "Released",
    "finish_rerun",
    "is_older",
    "judge",
    "promotion",
    "promotion_id",
    "read_released",
    "refusal_outcome",
    "without_time",
]


@validated(frozen=True, config=ConfigDict(extra="ignore"))
class Head:
    """The fields of a job that a promoter needs. A worker records all other faults of the job."""

    priority: int = Field(default=5, gt=-PRIORITY_LIMIT, lt=PRIORITY_LIMIT)
    retries: int = Field(default=0, ge=0)
    reruns: int = Field(default=0, ge=0)
    put_offs: int = Field(default=0, ge=0)
    custom_id: bool = False
    delay_until: float | None = Field(default=None, allow_inf_nan=False, le=LATEST_TIME)


HEADS: Final = TypeAdapter(Head).validator


@dataclass(slots=True)
class Released:
    """A released record, read. `body`: of the ready message, without the time that has come."""

    token: str
    priority: int
    order: tuple[int, int]
    custom_id: bool
    run_at: float | None
    body: bytes
    waits: bool = False
    """Whether it still waits for other jobs: its producer died while it linked it to them."""


def read_released(token: str, body: bytes) -> Released:
    """Return what the released record of a job says. `token`: that of its key.

    Raises:
        InvalidJob: its key has no id, or it is not a job.
    """
    if not is_token(token):
        raise InvalidJob("its key has no token that can be an id")
    data = load_json(body)
    try:
        head: Head = HEADS.validate_python(data)
        if "delay_until" in data:  # it would only be looked at again
            del data["delay_until"]
            body = dump_json(data)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
        raise InvalidJob(f"{problem['loc'][0]}: {problem['msg']}") from None
    except NotSerializable as error:
        raise InvalidJob(str(error)) from None
    order = (head.reruns, head.retries + head.put_offs)
    waits = bool(data.get("parents") or data.get("wide"))
    return Released(token, head.priority, order, head.custom_id, head.delay_until, body, waits)


def without_time(body: bytes) -> bytes:
    """Return the body of a ready job without the time from which on it may run.

    Raises:
        InvalidJob: it has a number that JSON has not.
    """
    data = load_json(body)
    data.pop("delay_until", None)
    try:
        return dump_json(data)
    except NotSerializable as error:
        raise InvalidJob(str(error)) from None


def promotion_id(secret: bytes, sequence: int, time: float) -> str:
    """Return the message id under which a record is promoted: the same in every promoter.

    The server knows it for two minutes: so a record that is promoted twice makes one ready job,
    also when the job has run in between.

    Args:
        secret: of the queue, see `QueueSecret`.
        sequence: of the record.
        time: when the server stored the record, in Unix seconds.
    """
    return keyed_id(secret, "released", str(sequence), repr(time))


def promotion(
    keys: QueueSubjects, token: str, priority: int, body: bytes, message_id: str
) -> Write:
    """Return the write that makes a job ready."""
    return Write(
        keys.ready(priority, token),
        body,
        Expect(keys.ready_any(token)),
        message_id=message_id,
    )


class Finding(Enum):
    """The state of a released record that was in hand."""

    CURRENT = auto()
    """It is still there, and the job has not ended."""
    ENDED = auto()
    """The job has an outcome."""
    RERUN = auto()
    """The job has an outcome of an earlier run: it was retried by hand, and that is unfinished."""
    SUPERSEDED = auto()
    """There is a record of a later attempt."""
    GONE = auto()
    """There is no record: it was promoted, removed or cancelled, or a replica lags behind."""


def judge(
    keys: QueueSubjects, released: Released, sequence: int, records: Sequence[Record]
) -> Finding:
    """Return the finding of a job's last records about a released record with that sequence."""
    current = superseded = False
    for record in records:
        key = keys.parse(record.subject)
        if key.token != released.token:
            continue
        if key.state is not None and not record.marker:
            later_run = 0 <= order_of(record.body)[0] < released.order[0]
            return Finding.RERUN if later_run else Finding.ENDED
        if key.place is Place.RELEASED:
            superseded |= record.sequence > sequence
            current |= record.sequence == sequence and not record.marker
        elif key.place is Place.DELAYED and not record.marker:
            superseded |= order_of(record.body) > released.order
    if superseded:
        return Finding.SUPERSEDED
    return Finding.CURRENT if current else Finding.GONE


def order_of(body: bytes) -> tuple[int, int]:
    """Return which run and which attempt a record is of: `(reruns, retries + put_offs)`.

    The same as `Job.order`, or a redelivery would be acknowledged in favour of a record that a
    promoter drops in favour of that delivery. A record that is not a job is earlier than any job.
    """
    try:
        data = load_json(body)
    except InvalidJob:
        return (-1, 0)
    reruns, *attempts = (data.get(name, 0) for name in ("reruns", "retries", "put_offs"))
    if isinstance(reruns, int) and all(isinstance(count, int) for count in attempts):
        return (reruns, sum(attempts))
    return (-1, 0)


def is_older(ready: Record, released: Released) -> bool:
    """Return whether what is ready is of an earlier attempt than a released record of the job."""
    if order_of(ready.body) < released.order:
        return True
    # A foreign job that was put off; or ours, made ready early, and then its end will be found.
    return load_json(ready.body).get("delay_until") is not None


async def finish_rerun(store: QueueStore, token: str, records: Sequence[Record]) -> None:
    """Finish a retry by hand whose process died: fence the earlier run, then remove its outcome.

    Raises:
        WriteRefused: the end of the job has changed since `records` were read.
    """
    keys = store.keys
    outcomes = [r for r in records if not r.marker and keys.outcome_state(r.subject)]
    ends = [record.sequence for record in records if keys.is_done(record.subject)]
    claim = Claim.on_all_until(await store.backend.last_sequence(keys.ready_log))
    expect = Expect(keys.done_all(token), max(ends))
    fence = Write(keys.claim(token), claim.encode(), expect, ttl=CLAIM_TTL)
    await store.write(fence)
    for outcome in outcomes:
        await store.delete(outcome)


def refusal_outcome(
    keys: QueueSubjects, token: str, error: str, now: float, ttl: float | None
) -> Write:
    """Return the outcome of a record that no ready message can hold."""
    body = {
        "id": decode_token(token),
        "task": "?",
        "status": State.FAILED,
        "last_error": error,
        "created_at": now,
        "finished_at": now,
    }
    key = keys.outcome(token, State.FAILED)
    index = keys.index(token, State.FAILED)
    return Write(key, dump_json(body), Expect(keys.done_all(token)), ttl=ttl, index=index)
