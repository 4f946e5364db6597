"""The jobs that a worker has fetched and has no slot for yet. No I/O."""

import heapq
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from asyncmq_nats.backends.base import Delivery

__all__ = ["Buffer"]

Entry = tuple[int, int, int, float, Delivery]
"""Priority, sequence, number of the delivery, when it came (monotonic seconds), delivery."""
Late = Callable[[int, float, int], bool]
"""Whether a job starts late, by its place, the seconds in hand, and the number of its delivery."""


@dataclass(slots=True)
class Buffer:
    """Fetched jobs without a slot, the next to run first: by tier, then by age."""

    heap: list[Entry] = field(default_factory=list)
    counts: Counter[int] = field(default_factory=Counter)
    """By priority."""

    def push(self, priority: int, delivery: Delivery, now: float) -> None:
        """Add a job."""
        self.counts[priority] += 1
        heapq.heappush(self.heap, (priority, delivery.sequence, delivery.deliveries, now, delivery))

    def pop(self) -> Delivery:
        """Take out the next to run."""
        entry = heapq.heappop(self.heap)
        self.counts[entry[0]] -= 1
        return entry[4]

    def count_late(self, is_late: Late, now: float) -> Counter[int]:
        """Return by priority how many jobs start late."""
        return Counter(entry[0] for entry in self._find_late(is_late, now))

    def pop_late(self, is_late: Late, now: float, limits: dict[int, int]) -> list[Delivery]:
        """Take out the first jobs that start late, of each priority as many as its limit says."""
        chosen: set[int] = set()
        left = dict(limits)
        for entry in self._find_late(is_late, now):
            if left.get(entry[0], 0) > 0:
                left[entry[0]] -= 1
                chosen.add(id(entry))
        ordered = sorted(self.heap)
        self.heap = [entry for entry in ordered if id(entry) not in chosen]
        self.counts = Counter(entry[0] for entry in self.heap)
        return [entry[4] for entry in ordered if id(entry) in chosen]

    def _find_late(self, is_late: Late, now: float) -> list[Entry]:
        return [
            entry
            for place, entry in enumerate(sorted(self.heap))
            if is_late(place, now - entry[3], entry[2])
        ]

    def pop_all(self) -> list[Delivery]:
        """Take out all."""
        entries, self.heap = self.heap, []
        self.counts.clear()
        return [entry[4] for entry in entries]
