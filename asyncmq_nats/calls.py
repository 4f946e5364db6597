"""`Call`: a call of a task as a value, for whatever adds jobs. No I/O."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Generic, TypeVar

from asyncmq_nats._arguments import build_addition
from asyncmq_nats._new_jobs import whole_job
from asyncmq_nats.exceptions import InvalidArgument
from asyncmq_nats.jobs import Job

__all__ = ["Call", "written"]

R_co = TypeVar("R_co", covariant=True)

NOT_IN_FOLLOW_UPS: Final = ("job_id", "deduplication", "repeat_every")


@dataclass(frozen=True, slots=True, eq=False)
class Call(Generic[R_co]):
    """A call of a task that is not added yet.

    It is made by `send.call("ada@…")` or `send.options(delay=5).call("ada@…")`. `Queue.add_call`,
    `Queue.add_bulk`, `FlowProducer.add_flow` and `current_job().add` take it, as often as you like.
    Its arguments are plain data already, checked when it was made.
    """

    task_id: str
    queue: str
    """The name of the queue that it is for."""
    args: Sequence[Any] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    """The other parameters of `Queue.add` that were given.

    In a flow, `depends_on` may have other calls.
    """

    @property
    def fields(self) -> dict[str, Any]:
        """The parameters of `Queue.add`, without a deduplication."""
        fields = {"task_id": self.task_id, "args": self.args, "kwargs": self.kwargs, **self.options}
        fields.pop("deduplication", None)
        for parent in fields.get("depends_on") or ():
            if isinstance(parent, Call):
                raise InvalidArgument(
                    "depends_on: only a call in a flow can wait for another call, others for ids",
                    parent,
                )
        return fields

    def require_queue(self, name: str) -> None:
        """Check that the call is for this queue.

        Raises:
            InvalidArgument: it is for another one, whose workers know its task.
        """
        if self.queue != name:
            raise InvalidArgument(
                f"the call of task {self.task_id!r} is for queue {self.queue!r}: "
                f"use its options(queue={name!r}) if the workers of that queue run it",
                name,
            )

    def follow_up(self, now: float, latest: float, meta: Mapping[str, str]) -> Job:
        """Return the job as one that a task adds. `meta`: that of its job.

        `now`, `latest`: see `build_addition`.

        Raises:
            InvalidArgument: it has an option that no follow-up takes.
        """
        for name in NOT_IN_FOLLOW_UPS:
            if self.options.get(name) is not None:
                raise InvalidArgument(f"a follow-up job takes no {name}", self.options[name])
        given = {"meta": meta, **self.fields}
        return whole_job(build_addition(now, latest, write=written, **given))


def written(
    task_id: str, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[list[Any], dict[str, Any]]:
    """Return arguments that are plain data already: those of a `Call`."""
    return list(args), dict(kwargs)
