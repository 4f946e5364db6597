"""One queue, as everything that works on it shares it: its backend, its names and its assets."""

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

from asyncmq_nats._clock import brief_pause
from asyncmq_nats.backends.base import Backend, ConsumerState, Delivery, Record, Write
from asyncmq_nats.exceptions import WriteRefused
from asyncmq_nats.store.commit import REPLICA_LAG_DELAYS
from asyncmq_nats.store.many import split_filters
from asyncmq_nats.store.snapshot import Snapshot, Stage, filters_of, snapshots_of
from asyncmq_nats.store.topology import QueueAssets
from asyncmq_nats.wire.keys import QueueSubjects, tier_name

__all__ = ["QueueStore"]


@dataclass(frozen=True, slots=True)
class QueueStore:
    """The records of one queue. The first filter or subject of a call tells which log is meant."""

    backend: Backend
    keys: QueueSubjects
    assets: QueueAssets

    @classmethod
    def of(cls, backend: Backend, queue: str) -> "QueueStore":
        """Return the store of the queue with that name. Nothing is declared yet."""
        keys = QueueSubjects(backend.settings.prefix, queue)
        return cls(backend, keys, QueueAssets(backend, keys))

    def now(self) -> float:
        """Return the server's time."""
        return self.backend.now()

    def now_at_most(self) -> float:
        """Return the latest time that the server's clock may show now: delays count from it."""
        return self.backend.now_at_most()

    async def last(self, *filters: str) -> list[Record]:
        """Return the last record of each subject that matches any of the filters, of one log."""
        return await self.backend.last(self.keys.log_of(filters[0]), *filters)

    async def last_of_many(self, filters: Iterable[str]) -> list[Record]:
        """Do `last` in parts, with any number of filters. Another replica may answer each part."""
        records: list[Record] = []
        for part in split_filters(filters):
            records += await self.last(*part)
        return records

    async def last_when(
        self, seen: Callable[[Sequence[Record]], bool], *filters: str
    ) -> list[Record]:
        """Do `last`, again while a replica lags behind what `seen` looks for."""
        records: list[Record] = []
        for pause in REPLICA_LAG_DELAYS:
            await brief_pause(pause)
            records = await self.last(*filters)
            if seen(records):
                break
        return records

    async def write(self, *writes: Write) -> int:
        """Write all or nothing, and return the last sequence; see `Backend.write`."""
        return await self.backend.write(self.keys.log_of(writes[0].subject), *writes)

    async def write_if_expected(self, *writes: Write) -> int | None:
        """Write, and return the sequence; `None` if what it expects does not hold."""
        try:
            return await self.write(*writes)
        except WriteRefused:
            return None

    async def delete(self, record: Record | Delivery) -> bool:
        """Remove this very record. Return whether it was there, or may have been."""
        return await self.backend.delete(self.keys.log_of(record.subject), record.sequence)

    async def purge(self, filter: str) -> int:
        """Remove all matching records, and return their number."""
        return await self.backend.purge(self.keys.log_of(filter), filter)

    async def look_up_tier(self, priority: int) -> ConsumerState | None:
        """Return the state of the consumer of a priority, `None` if it has none."""
        return await self.backend.look_up(self.keys.ready_log, tier_name(priority))

    # -- what the bucket has of a job

    async def read_snapshot(self, token: str) -> Snapshot:
        """Read all records of one job in the bucket; a replica may answer that lags behind."""
        records = await self.last(self.keys.later_all(token), self.keys.done_all(token))
        return Snapshot.of(token, records, self.keys)

    async def read_snapshots(self, tokens: Collection[str]) -> dict[str, Snapshot]:
        """Read the records of some jobs without the edges to their children, by token."""
        records = await self.last_of_many(filters_of(tokens, self.keys))
        return snapshots_of(tokens, records, self.keys)

    async def read_stage(self, token: str) -> Stage | None:
        """Return whether a job has ended; `None` if there is none, or it moved during the reads.

        Its edges, which may be thousands, are not read.
        """
        snapshot = (await self.read_snapshots([token]))[token]
        if snapshot.exists:
            return "ended" if snapshot.ended else "unfinished"
        return "unfinished" if await self.last(self.keys.ready_any(token)) else None

    async def read_end(self, token: str) -> Snapshot:
        """Read the records of one job without most of its edges, which may be thousands.

        `last_end` is exact, also when it is an edge: a write that expects it is refused if anything
        came since. The second read is repeated until its replica knows what the first one knew.
        """
        keys = self.keys
        latest: Record | None = None
        records: list[Record] = []
        for pause in REPLICA_LAG_DELAYS:
            await brief_pause(pause)
            latest = await self.backend.latest(keys.bucket_log, keys.done_all(token))
            filters = [keys.ends(token), keys.later_all(token)]
            if latest is not None:
                filters.append(latest.subject)
            records = await self.last(*filters)
            if latest is None or any(
                record.subject == latest.subject and record.sequence >= latest.sequence
                for record in records
            ):
                break
        snapshot = Snapshot.of(token, records, keys)
        snapshot.last_end = 0 if latest is None else latest.sequence
        return snapshot
