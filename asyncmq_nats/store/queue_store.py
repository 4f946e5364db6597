"""One queue, as everything that works on it shares it: its backend, its names and its assets."""

from dataclasses import dataclass

from asyncmq_nats.backends.base import Backend, ConsumerState, Delivery, Record, Write
from asyncmq_nats.exceptions import WriteRefused
from asyncmq_nats.store.many import split_filters
from asyncmq_nats.store.topology import QueueAssets
from asyncmq_nats.wire.keys import QueueSubjects, tier_name

__all__ = ["QueueStore"]


@dataclass(frozen=True, slots=True)
class QueueStore:
    """The records of one queue. A filter or a subject tells which of the two logs is meant."""

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

    async def last(self, *filters: str) -> list[Record]:
        """Return the last record of each subject that matches any of the filters, of one log."""
        records: list[Record] = []
        for part in split_filters(filters):
            records += await self.backend.last(self.keys.log_of(part[0]), *part)
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
