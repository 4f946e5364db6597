"""What the bucket has of a job, classified. Decides nothing."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from asyncmq_nats.backends.base import Expect, Record
from asyncmq_nats.exceptions import InvalidJob
from asyncmq_nats.states import Place, State
from asyncmq_nats.wire.codec import load_json
from asyncmq_nats.wire.keys import Key, Kind, QueueSubjects

__all__ = [
    "Snapshot",
    "Stage",
    "count_reruns",
    "filters_of",
    "snapshots_of",
]

Stage = Literal["unfinished", "ended"]


@dataclass(slots=True)
class Snapshot:
    """The records of one job in the bucket.

    Markers are counted in `last_end` and left out elsewhere.
    """

    token: str
    end_filter: str
    """The filter `done.<id>.>`, which every write about the end of the job expects."""
    outcome: Record | None = None
    state: State | None = None
    """The state of the outcome; `None` while there is none."""
    claim: Record | None = None
    edges: list[Record] = field(default_factory=list)
    """Children that wait for this job, except those of its own flow."""
    later: dict[Place, Record] = field(default_factory=dict)
    last_later: int = 0
    """Sequence of the last record of the job in transit, 0 if there is none."""
    last_end: int = 0
    """Sequence of the last record about the end of the job, 0 if there is none."""

    @property
    def fence(self) -> Expect:
        """The condition that nothing about the end of the job has changed since this was read."""
        return Expect(self.end_filter, self.last_end)

    @property
    def ended(self) -> bool:
        """Whether the job has an outcome."""
        return self.outcome is not None

    @property
    def exists(self) -> bool:
        """Whether there is a job: a claim or an edge alone does not count."""
        return self.ended or bool(self.later)

    def ended_since(self, reruns: int) -> bool:
        """Return whether it has an outcome of this run or a later one; see `Job.reruns`."""
        return self.outcome is not None and count_reruns(self.outcome.body) >= reruns

    @property
    def is_rerun(self) -> bool:
        """Whether a record is of a later run than the outcome: a retry by hand is under way."""
        if self.outcome is None:
            return False
        reruns = count_reruns(self.outcome.body)
        return any(count_reruns(record.body) > reruns for record in self.later.values())

    @classmethod
    def of(cls, token: str, records: Sequence[Record], keys: QueueSubjects) -> "Snapshot":
        """Return the snapshot of one job from records. Records of other jobs are skipped."""
        snapshot = cls(token, keys.done_all(token))
        for record in records:
            key = keys.parse(record.subject)
            if key.token != token:
                continue
            if keys.is_done(record.subject):
                snapshot.last_end = max(snapshot.last_end, record.sequence)
            else:
                snapshot.last_later = max(snapshot.last_later, record.sequence)
            if not record.marker:
                snapshot._take(record, key)
        return snapshot

    def _take(self, record: Record, key: Key) -> None:
        if key.kind is Kind.OUTCOME:
            self.outcome, self.state = record, key.state
        elif key.kind is Kind.CLAIM:
            self.claim = record
        elif key.kind is Kind.EDGE:
            self.edges.append(record)
        elif key.place is not None:
            self.later[key.place] = record


def count_reruns(body: bytes) -> int:
    """Return how often a job was retried by hand; 0 for a body that is not a job."""
    try:
        reruns = load_json(body).get("reruns")
    except InvalidJob:
        return 0
    return reruns if isinstance(reruns, int) else 0


def filters_of(tokens: Iterable[str], keys: QueueSubjects) -> list[str]:
    """Return the filters for the records of some jobs, without the edges to their children."""
    return [each for token in tokens for each in (keys.later_all(token), keys.ends(token))]


def snapshots_of(
    tokens: Iterable[str], records: Iterable[Record], keys: QueueSubjects
) -> dict[str, Snapshot]:
    """Return the snapshots of some jobs from records of any, by token."""
    grouped: dict[str, list[Record]] = {}
    for record in records:
        grouped.setdefault(keys.parse(record.subject).token, []).append(record)
    return {token: Snapshot.of(token, grouped.get(token, ()), keys) for token in tokens}
