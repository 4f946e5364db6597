"""New jobs as they are added: encoded, with what their writes need. No I/O, and no checks."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final, TypeAlias

from asyncmq_nats.exceptions import NotSerializable
from asyncmq_nats.jobs import WIRE_VERSION, Job, encoded_options
from asyncmq_nats.wire.codec import dump_json

__all__ = ["Addition", "JobTemplate", "NewJob", "whole_job"]

OWN: Final = frozenset(
    {"job_id", "args", "kwargs", "created_at", "delay_until", "meta", "_encoded"}
)
"""What each job of a template has for itself."""


class JobTemplate:
    """What new jobs with the same task and options have in common, checked and encoded once."""

    __slots__ = ("_fields", "_options", "custom_id", "priority", "task_id")

    def __init__(self, job: Job) -> None:
        """`job`: a valid one that depends on no other."""
        self.task_id = job.task_id
        self.priority = job.priority
        self.custom_id = job.custom_id
        self._fields = {name: value for name, value in vars(job).items() if name not in OWN}
        self._options = b""  # made when first needed: many a job stays the only one of its kind

    def encode(self, own: dict[str, Any]) -> bytes:
        """Return the record of a job. `own`: the members that are not of its options.

        Raises:
            NotSerializable: JSON cannot hold it.
        """
        options = self._options
        if not options:
            plain = self.fill({"delay_until": None, "meta": {}})
            options = self._options = dump_json(encoded_options(plain))[1:]
        return b"%b,%b" % (dump_json(own)[:-1], options)

    def fill(self, own: dict[str, Any]) -> Job:
        """Return all of a job. `own`: the fields that it has for itself."""
        job: Job = object.__new__(Job)
        fields = {
            name: value.copy() if isinstance(value, dict | list) else value  # none share them
            for name, value in self._fields.items()
        }
        vars(job).update(fields | own)
        return job


@dataclass(slots=True, eq=False)
class NewJob:
    """A job that is to be added, encoded: to make a whole `Job` takes three times as long.

    Its values are valid, but for what JSON cannot hold: `encode` tells of that.
    """

    template: JobTemplate
    job_id: str
    args: list[Any]
    kwargs: dict[str, Any]
    created_at: float
    delay_until: float | None = None
    meta: dict[str, str] = field(default_factory=dict)
    _body: bytes = field(init=False)
    depends_on: ClassVar[Sequence[str]] = ()

    def __post_init__(self) -> None:
        own = {
            "v": WIRE_VERSION,
            "id": self.job_id,
            "task": self.template.task_id,
            "args": self.args,
            "kwargs": self.kwargs,
            "created_at": self.created_at,
        }
        if self.delay_until is not None:
            own["delay_until"] = self.delay_until
        if self.meta:
            own["meta"] = self.meta
        try:
            self._body = self.template.encode(own)
        except NotSerializable:
            self._body = b""

    @property
    def task_id(self) -> str:
        """See `Job`."""
        return self.template.task_id

    @property
    def priority(self) -> int:
        """See `Job`."""
        return self.template.priority

    @property
    def custom_id(self) -> bool:
        """See `Job`."""
        return self.template.custom_id

    def encode(self) -> bytes:
        """Return the record of the job; see `Job.encode`.

        Raises:
            NotSerializable: an argument is not JSON; the message names it.
        """
        return self._body or self.whole().encode()

    def whole(self) -> Job:
        """Return all of it."""
        own = {
            "job_id": self.job_id,
            "args": self.args,
            "kwargs": self.kwargs,
            "created_at": self.created_at,
            "delay_until": self.delay_until,
            "meta": self.meta,
        }
        return self.template.fill(own)


Addition: TypeAlias = Job | NewJob
"""A job that is to be added. It depends on others only as a `Job`."""


def whole_job(job: Addition) -> Job:
    """Return the job as one that has all of its fields."""
    return job if isinstance(job, Job) else job.whole()
