"""The states of a job. Every stored or shown state is spelled here and nowhere else."""

from enum import StrEnum

__all__ = ["COUNT_BUCKETS", "JOB_STATES", "OUTCOMES", "Bucket", "Place", "State"]


class State(StrEnum):
    """The state of a job for users (AsyncMQ `State`, plus `CANCELLED` and `WAITING_CHILDREN`)."""

    WAITING = "waiting"
    ACTIVE = "active"
    DELAYED = "delayed"
    WAITING_CHILDREN = "waiting-children"
    COMPLETED = "completed"
    FAILED = "failed"
    EXPIRED = "expired"
    CANCELLED = "cancelled"


class Place(StrEnum):
    """The place of a job in transit, in the scheduler bucket."""

    DELAYED = "delayed"
    PARKED = "parked"
    RELEASED = "released"


class Bucket(StrEnum):
    """Count buckets of AsyncMQ and BullMQ that are no state of ours; they always count 0."""

    PAUSED = "paused"
    PRIORITIZED = "prioritized"


OUTCOMES = (State.COMPLETED, State.FAILED, State.EXPIRED, State.CANCELLED)
"""States that end a job."""

JOB_STATES = tuple(State)
"""All states, in the order of a job's life."""

COUNT_BUCKETS: tuple[State | Bucket, ...] = (
    State.WAITING,
    State.ACTIVE,
    State.COMPLETED,
    State.FAILED,
    State.DELAYED,
    State.WAITING_CHILDREN,
    Bucket.PAUSED,
    Bucket.PRIORITIZED,
)
"""The states that AsyncMQ's `get_job_counts` counts by default."""
