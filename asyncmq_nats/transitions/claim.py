"""One delivery of a job to a worker, its claim on the job, and what became of it."""

import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from enum import Enum, auto
from typing import Final

from asyncmq_nats.backends.base import Delivery, Write
from asyncmq_nats.exceptions import InvalidJob
from asyncmq_nats.jobs import Job, JobHead
from asyncmq_nats.wire.codec import dump_json, load_json

__all__ = ["AFTERLIFE", "Attempt", "Claim", "FollowUps", "Verdict", "leave"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class FollowUps:
    """What is added with the outcome of a job."""

    jobs: list[Job] = field(default_factory=list)
    members: bytes = b""
    """To be put into the outcome; empty if they are a batch with it."""
    batch: tuple[Write, ...] = ()
    """Writes to be committed with the outcome in one batch; empty if it holds them."""


@dataclass(slots=True)
class Attempt:
    """One delivery of a job to this worker, and what its final write has to expect."""

    delivery: Delivery
    token: str
    head: JobHead
    expect: int = 0
    """Sequence of the last record about the job's end: 0 on a first delivery, the claim's on a redelivery."""
    claimed: bool = False
    leftovers: tuple[str, ...] = ()
    """Records of the job in transit, to be removed together with the end of the attempt."""
    awaited: bool = False
    """Whether other jobs were seen to wait for this one."""
    companions: tuple[Write, ...] = ()
    """What is committed together with the outcome: follow-up jobs."""
    follow_ups: FollowUps | None = None
    """Jobs that are added with its result."""
    make_companions: Callable[[], Awaitable[FollowUps]] | None = field(default=None, repr=False)
    """Makes them anew, since what they expect of other jobs may have changed."""
    started_at: float = 0.0
    body: bytes = field(default=b"", repr=False)
    _job: Job | None = field(default=None, repr=False)

    @property
    def job(self) -> Job:
        """All of the job.

        Raises:
            InvalidJob: a part that is not needed to run it is malformed.
        """
        if self._job is None:
            self._job = replace(Job.decode(self.body), stalls=self.head.stalls)
        return self._job

    @property
    def order(self) -> tuple[int, int]:
        """Which of two attempts at a job is the later one."""
        return self.delivery.sequence, self.delivery.deliveries

    def count_stalls(self, claim: "Claim | None") -> int:
        """Return how often the job's worker was lost, now that it is delivered again. A claim that was released is no loss."""
        if claim is None or claim.message != self.delivery.sequence:
            return 1
        return claim.stalls + (0 if claim.released else 1)


AFTERLIFE: Final = 86_400.0
"""For so long (seconds) a claim outlasts its attempt, if the job goes on."""
LAST_DELIVERY: Final = 2**31
"""No message is delivered so often."""


@dataclass(frozen=True, slots=True)
class Claim:
    """A worker's word that it runs a job that was delivered before."""

    worker: str
    message: int
    """Sequence of the ready message: a claim on an earlier one is void."""
    delivery: int
    stalls: int
    released: bool = False

    @classmethod
    def on_all_until(cls, message: int) -> "Claim":
        """Return the claim that takes the job from whoever has a delivery of this message or of an earlier one: it has begun anew."""
        return cls("", message, LAST_DELIVERY, stalls=0, released=True)

    @property
    def order(self) -> tuple[int, int]:
        """Which of two claims, or of a claim and a delivery, is the later one."""
        return self.message, self.delivery

    @property
    def verdict(self) -> "Verdict":
        """What is to be done with an earlier delivery."""
        return Verdict.DONE if self.delivery == LAST_DELIVERY else Verdict.STALE

    def encode(self) -> bytes:
        """Return the record."""
        return dump_json(
            {
                "worker": self.worker,
                "message": self.message,
                "delivery": self.delivery,
                "stalls": self.stalls,
                "released": self.released,
            }
        )

    @classmethod
    def decode(cls, body: bytes) -> "Claim":
        """Return the claim of a record; one that is malformed claims nothing."""
        try:
            data = load_json(body)
        except InvalidJob:
            data = {}
        message, delivery, stalls = (data.get(name) for name in ("message", "delivery", "stalls"))
        if not (isinstance(message, int) and isinstance(delivery, int) and isinstance(stalls, int)):
            logger.warning("a claim is malformed, and passed over: %.200r", body)
            return cls("", 0, 0, 0)
        return cls(str(data.get("worker")), message, delivery, stalls, data.get("released") is True)


class Verdict(Enum):
    """What became of a delivery that was not run, or of a write that was refused."""

    DONE = auto()
    """The job has its outcome, or goes on elsewhere: the message may go."""
    STALE = auto()
    """Another worker is in charge: touch nothing."""


def leave(delivery: Delivery, verdict: Verdict) -> None:
    """Let go of a delivery that is not run, or that has been."""
    if verdict is Verdict.DONE:
        delivery.ack()
    else:
        delivery.abandon()
