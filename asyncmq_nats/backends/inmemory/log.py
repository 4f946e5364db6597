"""A log of the in-memory backend: its records, their subjects, their removal, and refusals."""

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Callable, Iterable, Set
from functools import partial
from heapq import nlargest
from operator import attrgetter
from typing import Final

from asyncmq_nats.backends.base import Consumer, Log, Record, Timer, Write
from asyncmq_nats.backends.filters import compile_filter, is_key, matches
from asyncmq_nats.backends.inmemory.consumers import Counter, Cursor
from asyncmq_nats.backends.inmemory.subject_tree import SubjectTree, transform
from asyncmq_nats.backends.inmemory.timers import Agenda, Alarm
from asyncmq_nats.exceptions import BackendError, PayloadTooLarge, WriteRefused

__all__ = ["MAX_BATCH", "MAX_BODY", "StoredLog"]

MAX_BODY: Final = 1_048_576
MAX_BATCH: Final = 1_000
DUPLICATE_WINDOW: Final = 120.0
SHORTEST_TTL: Final = 1.0
TOLERATED_DEAD: Final = 1_000

by_sequence: Final = attrgetter("sequence")


class Stored:
    """A record, with its timer and its time to live."""

    __slots__ = ("expiry", "record", "timer_alarm")

    def __init__(self, record: Record) -> None:
        self.record = record
        self.timer_alarm: Alarm | None = None
        self.expiry: Alarm | None = None


class StoredLog:
    """The records of one log. `signal` sends a republished record, `told` hears of each."""

    def __init__(
        self,
        declaration: Log,
        agenda: Agenda,
        signal: Callable[[str, bytes], object],
        told: Callable[[Record], None],
    ) -> None:
        self.declaration = declaration
        self.incarnation = f"{id(self)}-{agenda.now()}"
        self.consumers: dict[str, Counter | Cursor] = {}
        self._agenda = agenda
        self._signal = signal
        self._told = told
        self._records: dict[int, Stored] = {}
        self._subjects: SubjectTree[Stored] = SubjectTree()
        self._order: list[
            int
        ] = []  # sequences in order, those of removed records included until there are too many
        self._sequence = 0
        self._message_ids: OrderedDict[str, tuple[float, int]] = OrderedDict()

    @property
    def sequence(self) -> int:
        """The highest sequence given out."""
        return self._sequence

    @property
    def size(self) -> int:
        """Bytes of the subjects and bodies."""
        records = [stored.record for stored in self._records.values()]
        return sum(len(record.subject) + len(record.body) for record in records)

    def write(self, writes: tuple[Write, ...]) -> int:
        """Write all or nothing; see `Backend.write`."""
        self._check(writes)
        earlier: set[str] = set()
        for write in writes:
            self._check_expectation(write, earlier)
            earlier.add(write.subject)
        self._forget_message_ids()
        known = [
            self._message_ids[name][1]
            for write in writes
            if (name := write.message_id) is not None and name in self._message_ids
        ]
        if known and len(writes) > 1:
            raise WriteRefused(self.declaration.name, "a message id of the batch was used before")
        if known:
            return known[0]
        for write in writes:
            if write.removes is not None:
                self._drop(self._subjects.get(write.removes))
            if write.index is not None:
                self._store(Write(write.index, b"", ttl=write.ttl))
            self._store(write)
        return self._sequence

    def __len__(self) -> int:
        return len(self._records)

    def find(self, *filters: str) -> list[Record]:
        """Return the records that match any of the filters, by sequence."""
        found = {
            stored.record.sequence: stored.record
            for pattern in filters
            for stored in self._subjects.find(pattern)
        }
        return sorted(found.values(), key=by_sequence)

    def page(self, pattern: str, from_sequence: int, limit: int) -> list[Record]:
        """Return up to `limit` matching records from a sequence on."""
        start = bisect_left(self._order, from_sequence)
        return self._take(pattern, range(start, len(self._order)), limit)

    def page_back(self, pattern: str, before: int | None, limit: int) -> list[Record]:
        """Return up to `limit` matching records below a sequence, the newest first."""
        end = len(self._order) if before is None else bisect_left(self._order, before)
        return self._take(pattern, range(end - 1, -1, -1), limit)

    def _take(self, pattern: str, indexes: range, limit: int) -> list[Record]:
        page: list[Record] = []
        match = compile_filter(pattern).match
        for index in indexes:
            if len(page) >= limit:
                break
            stored = self._records.get(self._order[index])
            if stored is not None and match(stored.record.subject):
                page.append(stored.record)
        return page

    def delete(self, sequence: int) -> bool:
        """Remove one record. Return whether it was there."""
        return self._drop(self._records.get(sequence))

    def purge(self, pattern: str, before: int | None, keep: int | None) -> int:
        """Remove matching records; return how many."""
        doomed: Iterable[Record] = self.find(pattern)
        if before is not None:
            doomed = [record for record in doomed if record.sequence < before]
        if keep is not None:
            kept = {record.sequence for record in nlargest(keep, doomed, key=by_sequence)}
            doomed = [record for record in doomed if record.sequence not in kept]
        return sum([self.delete(record.sequence) for record in doomed])

    def clear(self) -> None:
        """Let go of everything: the log is deleted."""
        for consumer in self.consumers.values():
            if isinstance(consumer, Cursor):
                consumer.lapse_all()
        for stored in tuple(self._records.values()):
            self._drop(stored)

    def add_consumer(self, declaration: Consumer) -> None:
        """Add a consumer, which begins with the oldest record."""
        if self.declaration.work_queue:
            self._check_alone(declaration)
        consumer = (
            Counter(declaration, self._agenda)
            if declaration.lease is None
            else Cursor(declaration, declaration.lease, self._agenda, self._acked)
        )
        for stored in self._records.values():
            consumer.add(stored.record)
        self.consumers[declaration.name] = consumer

    def _check_alone(self, declaration: Consumer) -> None:
        if declaration.lease is None:
            raise BackendError(
                f"consumer {declaration.name!r} only counts, "
                f"and {self.declaration.name!r} is a work queue: "
                "count its tiers"
            )
        for other in self.consumers.values():
            if any(
                overlap(one, two)
                for one in declaration.filters
                for two in other.declaration.filters
            ):
                raise BackendError(
                    f"consumers {declaration.name!r} and {other.declaration.name!r} "
                    "of a work queue overlap"
                )

    def _check(self, writes: tuple[Write, ...]) -> None:
        if not 1 <= len(writes) <= MAX_BATCH:
            raise BackendError(
                f"{len(writes)} writes in one batch: "
                f"at least 1 and at most {MAX_BATCH:,} are possible"
            )
        if len({write.subject for write in writes}) < len(writes):
            raise BackendError(
                "two writes of one batch have the same subject: a log keeps one record of each"
            )
        for write in writes:
            if len(write.body) > MAX_BODY:
                raise PayloadTooLarge(f"the body for {write.subject!r}", len(write.body), MAX_BODY)
            if not matches(self.declaration.subjects, write.subject):
                raise BackendError(
                    f"log {self.declaration.name!r} does not take {write.subject!r}: "
                    "declare it with such subjects"
                )
            if (write.timer is not None or write.ttl is not None) and not self.declaration.timers:
                raise BackendError(f"log {self.declaration.name!r} was declared without timers")
            target = write.subject if write.timer is None else write.timer.target
            if not matches(self.declaration.subjects, target) or (
                write.timer is not None and target == write.subject
            ):
                raise BackendError(
                    f"a timer of log {self.declaration.name!r} cannot write to {target!r}"
                )

    def _check_expectation(self, write: Write, earlier: Set[str]) -> None:
        """Check the expectations against the log before the batch.

        As on the server, they cannot name a subject that the batch wrote earlier.
        """
        if write.expect is None:
            return
        if write.expect.filter in earlier:
            raise WriteRefused(
                self.declaration.name,
                f"the batch has written {write.expect.filter!r} before it is expected",
            )
        found = max(
            (stored.record.sequence for stored in self._subjects.find(write.expect.filter)),
            default=0,
        )
        if found != write.expect.sequence:
            expect = write.expect
            detail = f"the last record of {expect.filter!r} is {found}, not {expect.sequence}"
            raise WriteRefused(self.declaration.name, detail)

    def _store(self, write: Write) -> None:
        self._drop(self._subjects.get(write.subject))
        self._sequence += 1
        now = self._agenda.now()
        marker = write.marker and is_key(write.subject)
        record = Record(write.subject, write.body, self._sequence, now, marker)
        stored = self._records[record.sequence] = Stored(record)
        self._order.append(record.sequence)
        self._subjects.set(record.subject, stored)
        if write.message_id is not None:
            self._message_ids[write.message_id] = (now, record.sequence)
        if write.ttl is not None:
            stored.expiry = self._agenda.at(
                now + max(write.ttl, SHORTEST_TTL), partial(self._expire, stored)
            )
        if write.timer is not None:
            stored.timer_alarm = self._agenda.at(
                write.timer.at, partial(self._fire, stored, write.timer)
            )
        for consumer in self.consumers.values():
            consumer.add(record)
        if self.declaration.republish is not None:
            destination = transform(*self.declaration.republish, record.subject)
            if destination is not None:
                self._signal(destination, record.body)
        self._told(record)

    def _drop(self, stored: Stored | None) -> bool:
        """Remove a record, unless it is gone already. Return whether it was there."""
        if stored is None or self._records.pop(stored.record.sequence, None) is None:
            return False
        self._subjects.remove(stored.record.subject)
        self._agenda.cancel(stored.expiry)
        self._agenda.cancel(stored.timer_alarm)
        for consumer in self.consumers.values():
            consumer.remove(stored.record)
        if len(self._order) > 2 * len(self._records) + TOLERATED_DEAD:
            self._order = list(self._records)
        return True

    def _expire(self, stored: Stored) -> None:
        self._drop(stored)

    def _fire(self, stored: Stored, timer: Timer) -> None:
        self._drop(stored)
        self._store(Write(timer.target, stored.record.body))

    def _acked(self, sequence: int) -> None:
        if self.declaration.work_queue:
            self.delete(sequence)

    def _forget_message_ids(self) -> None:
        horizon = self._agenda.now() - DUPLICATE_WINDOW
        while self._message_ids and next(iter(self._message_ids.values()))[0] <= horizon:
            self._message_ids.popitem(last=False)


def overlap(one: str, two: str) -> bool:
    """Return whether some subject matches both filters."""
    first, second = one.split("."), two.split(".")
    for left, right in zip(first, second, strict=False):
        if ">" in (left, right):
            return True
        if left != right and "*" not in (left, right):
            return False
    return len(first) == len(second)
