"""One delivery of a job to a worker, and the claim that a redelivery needs.

The first delivery of a job is trusted: nothing is read before it runs. A redelivery is checked
against what is stored. A claim makes the server reject what an earlier worker writes later.
"""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum, auto
from typing import Final

from asyncmq_nats._logging import get_logger
from asyncmq_nats.backends.base import Delivery, Write
from asyncmq_nats.exceptions import InvalidJob
from asyncmq_nats.jobs import Job, JobHead
from asyncmq_nats.wire.codec import dump_json, load_json

__all__ = ["CLAIM_TTL", "Attempt", "Claim", "Disposition", "FollowUps", "settle_delivery"]

logger = get_logger(__name__)

CLAIM_TTL: Final = 86_400.0
"""Seconds after which a claim expires. Only a job that runs longer loses its protection."""
LAST_DELIVERY: Final = 2**31
"""No message is delivered this often."""


class Disposition(Enum):
    """The disposition of a delivery that is not run, or whose result was rejected."""

    ACK = auto()
    """The job has an outcome, or goes on elsewhere: acknowledge the message."""
    ABANDON = auto()
    """Another worker has the job: do nothing, an ack would take the message from that worker."""


def settle_delivery(delivery: Delivery, disposition: Disposition) -> None:
    """Acknowledge a delivery, or let its lease run out."""
    if disposition is Disposition.ACK:
        delivery.ack()
    else:
        delivery.abandon()


@dataclass(frozen=True, slots=True)
class Claim:
    """The record of a worker that it runs a job, or that it has handed it back."""

    worker: str
    message: int
    """Sequence of the ready message. A claim on an earlier message is void."""
    delivery: int
    stalls: int
    """The number of lost workers that certainly ran the job: they had a claim."""
    released: bool = False
    """Whether the job was handed back: then the end of this worker is no loss."""
    suspected: bool = False
    """Whether a worker without a claim was lost: the job may have run in it."""

    @classmethod
    def on_all_until(cls, message: int) -> "Claim":
        """Return the claim that voids every delivery of this message and of earlier ones."""
        return cls("", message, LAST_DELIVERY, stalls=0, released=True)

    @property
    def order(self) -> tuple[int, int]:
        """Orders claims and deliveries: the later one has the job."""
        return self.message, self.delivery

    def outranks(self, order: tuple[int, int]) -> bool:
        """Return whether the claim was made after the delivery of that order.

        After a hand-back, the same order is a new delivery: the server has forgotten the first one.
        """
        return self.order > order or (self.order == order and not self.released)

    @property
    def voids_all(self) -> bool:
        """Whether it is the claim of a retry by hand."""
        return self.delivery == LAST_DELIVERY

    @property
    def disposition(self) -> Disposition:
        """The verdict on an earlier delivery."""
        return Disposition.ACK if self.voids_all else Disposition.ABANDON

    def encode(self) -> bytes:
        """Return the record."""
        data = {
            "worker": self.worker,
            "message": self.message,
            "delivery": self.delivery,
            "stalls": self.stalls,
            "released": self.released,
        }
        return dump_json(data | {"suspected": True} if self.suspected else data)

    @classmethod
    def decode(cls, body: bytes) -> "Claim":
        """Return the claim of a record. A malformed record claims nothing."""
        try:
            data = load_json(body)
        except InvalidJob:
            data = {}
        message, delivery, stalls = (data.get(name) for name in ("message", "delivery", "stalls"))
        if not (isinstance(message, int) and isinstance(delivery, int) and isinstance(stalls, int)):
            logger.warning("malformed claim ignored: %.200r", body)
            return cls("", 0, 0, 0)
        worker, released = str(data.get("worker")), data.get("released") is True
        return cls(worker, message, delivery, stalls, released, data.get("suspected") is True)


@dataclass(frozen=True, slots=True)
class FollowUps:
    """The follow-ups that are added with the outcome of a job."""

    jobs: list[Job] = field(default_factory=list)
    members: bytes = b""
    """Members of the outcome; empty if the follow-ups are a batch with it."""
    batch: tuple[Write, ...] = ()
    """Writes to be committed with the outcome in one batch; empty if it holds them."""


@dataclass
class Attempt:
    """One delivery of a job to this worker, and the expectations of its final write.

    Without slots: what most attempts never set stays an attribute of the class.
    """

    delivery: Delivery
    token: str
    head: JobHead
    body: bytes = field(default=b"", repr=False)
    expect: int = field(default=0, init=False)
    """Sequence of the last record about the end of the job. 0 on a first delivery."""
    claim_sequence: int = field(default=0, init=False)
    """Sequence of the claim on the job, 0 if there is none. Deleted with the end of the job."""
    claim_sent: bool = field(default=False, init=False)
    leftovers: Mapping[str, int] | None = field(default=None, init=False)
    """Records of the job in transit, key → sequence: deleted with the end of the attempt."""
    stalls: int = field(default=0, init=False)
    suspected: bool = field(default=False, init=False)
    lost: bool = field(default=False, init=False)
    """Whether the worker of an earlier delivery was lost and may have run the job."""
    awaited: bool = field(default=False, init=False)
    """Whether edges to this job were seen: its children must be told of its end."""
    follow_ups: FollowUps | None = field(default=None, init=False)
    """Jobs that are added with its result."""
    prepare_again: Callable[[], Awaitable[FollowUps]] | None = field(
        default=None, init=False, repr=False
    )
    """Prepares a batch of follow-ups again: its expectations of other jobs may have changed."""
    started_at: float = field(default=0.0, init=False)
    ended_at: float = field(default=0.0, init=False)
    """When its task ended; 0 if it did not run."""
    is_recorded: bool = field(default=False, init=False)
    """Whether its final write was accepted, after it was rejected or had a sequel."""
    on_end: Callable[[str], None] | None = field(default=None, init=False, repr=False)
    """Called with its task when its end is confirmed."""
    known: Job | None = field(default=None, init=False, repr=False)
    """All of the job, once it was read."""

    @property
    def job(self) -> Job:
        """All of the job.

        Raises:
            InvalidJob: a part that is not needed to run it is malformed.
        """
        if self.known is None:
            job = Job.decode(self.body)
            # To replace a field takes three times as long as to read a job.
            self.known = job if job.stalls == self.stalls else replace(job, stalls=self.stalls)
        return self.known

    @property
    def order(self) -> tuple[int, int]:
        """Orders attempts and claims: the later one has the job."""
        return self.delivery.sequence, self.delivery.deliveries

    @property
    def losses(self) -> int:
        """The number of workers lost with the job, including one that may not have run it."""
        return self.stalls + self.suspected

    def count_losses(self, claim: Claim | None, now: float, lease: float) -> None:
        """Take over the losses that a redelivery finds. `lease`: seconds, `now`: server time."""
        message, deliveries = self.order
        if claim is None or claim.message != message:
            # A lease cannot have run out before the message is as old as a lease: it was a NAK.
            self.suspected = self.lost = deliveries > 1 and now - self.delivery.time >= lease
            return
        unclaimed = deliveries - claim.delivery > 1  # a delivery without a claim came between
        self.stalls = claim.stalls + (not claim.released)
        self.suspected = claim.suspected or (claim.released and unclaimed)
        self.lost = not claim.released or unclaimed

    def claim(self, worker: str, *, released: bool = False) -> Claim:
        """Return the claim of this attempt."""
        return Claim(worker, *self.order, self.stalls, released, self.suspected)
