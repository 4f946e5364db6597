"""Failed jobs in groups of one task and one kind of error. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any, Final

from asyncmq_nats.contrib.dashboard.words import short_error, signature_of_error

__all__ = ["FailureGroup", "FailureGroups"]

KEPT_IDS: Final = 10
"""Ids of a group that are kept: of a million jobs a group is as small as of ten."""


@dataclass(slots=True)
class FailureGroup:
    """Failed jobs of one task whose errors differ in numbers, ids and quoted texts only."""

    queue: str
    task: str
    signature: str
    example: str
    """The newest error."""
    count: int = 0
    job_ids: list[str] = field(default_factory=list)
    """Those of the first jobs that were added: of the newest."""
    first: float = 0.0
    last: float = 0.0
    """When the first and the last of them failed, in Unix seconds."""

    @property
    def id(self) -> str:
        """The key of the group within its queue."""
        text = f"{self.queue}\0{self.task}\0{self.signature}"
        return blake2b(text.encode(errors="replace"), digest_size=8).hexdigest()


class FailureGroups:
    """Groups of failed jobs, to which one job after the other is added.

    `newest`, `oldest`: when the last and the first of them failed; 0 without any.
    """

    def __init__(self) -> None:
        self.count = 0
        self.newest = self.oldest = 0.0
        self._groups: dict[tuple[str, str, str], FailureGroup] = {}

    def add(self, queue: str, job: Mapping[str, Any]) -> FailureGroup:
        """Add a job, and return its group."""
        error = job.get("last_error")
        key = queue, str(job["task"]), signature_of_error(error)
        at = float(job.get("finished_at") or job["created_at"])
        group = self._groups.get(key)
        if group is None:
            group = FailureGroup(*key, example=short_error(error), first=at, last=at)
            self._groups[key] = group
        if at > group.last:
            group.last, group.example = at, short_error(error)
        group.first = min(group.first, at)
        group.count += 1
        if len(group.job_ids) < KEPT_IDS:
            group.job_ids.append(str(job["id"]))
        self.newest = max(self.newest, at)
        self.oldest = min(self.oldest or at, at)
        self.count += 1
        return group

    def largest_first(self) -> list[FailureGroup]:
        """Return the groups; of two of the same size, the one that grew last comes first."""
        return sorted(self._groups.values(), key=lambda each: (-each.count, -each.last))
