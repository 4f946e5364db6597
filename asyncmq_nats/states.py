"""The words for where a job is. Every stored or shown state is spelled here and nowhere else."""

from enum import StrEnum

__all__ = ["COUNT_BUCKETS", "JOB_STATES", "OUTCOMES", "Bucket", "Place", "State"]


class State(StrEnum):
    """What a user sees of a job (AsyncMQ `State`, plus `CANCELLED` and `WAITING_CHILDREN`)."""

    WAITING = "waiting"
    ACTIVE = "active"
    DELAYED = "delayed"
    WAITING_CHILDREN = "waiting-children"
    COMPLETED = "completed"
    FAILED = "failed"
    EXPIRED = "expired"
    CANCELLED = "cancelled"


class Place(StrEnum):
    """Where a job in transit is, in the scheduler bucket."""

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
"""What AsyncMQ's `get_job_counts` counts when not told."""
