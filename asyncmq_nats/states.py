"""The words for where a job is. Every stored or shown state is spelled here and nowhere else."""

from enum import StrEnum

__all__ = ["JOB_STATES", "OUTCOMES", "Bucket", "State"]


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


class Bucket(StrEnum):
    """Count buckets of AsyncMQ and BullMQ that are no state of ours; they always count 0."""

    PAUSED = "paused"
    PRIORITIZED = "prioritized"


OUTCOMES = (State.COMPLETED, State.FAILED, State.EXPIRED, State.CANCELLED)
"""States that end a job."""

JOB_STATES = tuple(State)
"""All states, in the order of a job's life."""
