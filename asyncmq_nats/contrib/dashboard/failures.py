"""Failed jobs in groups of one task and one kind of error. Pure."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

from asyncmq_nats.contrib.dashboard.words import short_error, signature_of_error

__all__ = ["FailureGroup", "group_failures"]


@dataclass(slots=True)
class FailureGroup:
    """Failed jobs of one task whose errors differ in numbers, ids and quoted texts only."""

    queue: str
    task: str
    signature: str
    example: str
    """The newest error."""
    job_ids: list[str] = field(default_factory=list)
    first: float = 0.0
    last: float = 0.0
    """When the first and the last of them failed, in Unix seconds."""

    @property
    def id(self) -> str:
        """The key of the group within its queue."""
        text = f"{self.queue}\0{self.task}\0{self.signature}"
        return blake2b(text.encode(errors="replace"), digest_size=8).hexdigest()


def group_failures(jobs: Iterable[tuple[str, Mapping[str, Any]]]) -> list[FailureGroup]:
    """Return the groups of failed jobs, each given with its queue; the largest group first."""
    groups: dict[tuple[str, str, str], FailureGroup] = {}
    for queue, job in jobs:
        error = job.get("last_error")
        signature = signature_of_error(error)
        key = queue, str(job["task"]), signature
        at = float(job.get("finished_at") or job["created_at"])
        group = groups.get(key)
        if group is None:
            group = groups[key] = FailureGroup(*key, example=short_error(error), first=at, last=at)
        if at > group.last:
            group.last, group.example = at, short_error(error)
        group.first = min(group.first, at)
        group.job_ids.append(str(job["id"]))
    return sorted(groups.values(), key=lambda each: (-len(each.job_ids), -each.last))
