"""The records of one job in the bucket, read and classified once. Decides nothing."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from asyncmq_nats._clock import brief_pause
from asyncmq_nats.backends.base import Backend, Expect, Record
from asyncmq_nats.exceptions import InvalidJob
from asyncmq_nats.states import Place, State
from asyncmq_nats.store.commit import REPLICA_LAG_DELAYS
from asyncmq_nats.wire.codec import load_json
from asyncmq_nats.wire.keys import Key, Kind, QueueSubjects

__all__ = [
    "Snapshot",
    "Stage",
    "count_reruns",
    "group_by_job",
    "read_end",
    "read_snapshot",
    "read_stage",
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


async def read_snapshot(backend: Backend, keys: QueueSubjects, token: str) -> Snapshot:
    """Read all records of one job in the bucket.

    On a cluster, a replica may answer that lags behind.
    """
    records = await backend.last(keys.bucket_log, keys.later_all(token), keys.done_all(token))
    return Snapshot.of(token, records, keys)


async def read_stage(backend: Backend, keys: QueueSubjects, token: str) -> Stage | None:
    """Return whether a job has ended; `None` if there is none, or it moved during the two reads.

    Its edges, which may be thousands, are not read.
    """
    records = await backend.last(keys.bucket_log, keys.later_all(token), keys.ends(token))
    snapshot = Snapshot.of(token, records, keys)
    if snapshot.exists:
        return "ended" if snapshot.ended else "unfinished"
    return "unfinished" if await backend.last(keys.ready_log, keys.ready_any(token)) else None


def count_reruns(body: bytes) -> int:
    """Return how often a job was retried by hand; 0 for a body that is not a job."""
    try:
        reruns = load_json(body).get("reruns")
    except InvalidJob:
        return 0
    return reruns if isinstance(reruns, int) else 0


def group_by_job(records: Iterable[Record], keys: QueueSubjects) -> dict[str, list[Record]]:
    """Return the records by the token of the job that their keys are about."""
    grouped: dict[str, list[Record]] = {}
    for record in records:
        grouped.setdefault(keys.parse(record.subject).token, []).append(record)
    return grouped


async def read_end(backend: Backend, keys: QueueSubjects, token: str) -> Snapshot:
    """Read the records of one job in the bucket without most of its edges, which may be thousands.

    `last_end` is exact, also when it is an edge: a write that expects it is refused if anything
    came since. The second read is repeated until its replica knows what the first one knew.
    """
    latest: Record | None = None
    records: list[Record] = []
    for pause in REPLICA_LAG_DELAYS:
        await brief_pause(pause)
        latest = await backend.latest(keys.bucket_log, keys.done_all(token))
        filters = [keys.ends(token), keys.later_all(token)]
        if latest is not None:
            filters.append(latest.subject)
        records = await backend.last(keys.bucket_log, *filters)
        if latest is None or any(
            record.subject == latest.subject and record.sequence >= latest.sequence
            for record in records
        ):
            break
    snapshot = Snapshot.of(token, records, keys)
    snapshot.last_end = 0 if latest is None else latest.sequence
    return snapshot
