"""The jobs that a worker has in hand without a slot, and what it knows of the tiers. What to ask for and to start: see `intake`."""

import heapq
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Final

from asyncmq_nats.backends.base import Delivery
from asyncmq_nats.runtime.prefetch import Pace, should_hand_back

__all__ = ["FRESH", "Held", "Tier"]

FRESH: Final = 0.05
"""What is known of a tier holds for so many seconds while credit for it brings nothing."""
LOOK_TIMEOUT: Final = 1.0
"""For so long at most, jobs of a lower tier wait for the answer whether a higher one has any."""


@dataclass(slots=True)
class Held:
    """Jobs in hand that have no slot yet, the next to run first: by tier, then by age."""

    heap: list[tuple[int, int, int, float, Delivery]] = field(default_factory=list)
    counts: Counter[int] = field(default_factory=Counter)
    """By tier."""

    def push(self, priority: int, delivery: Delivery) -> None:
        """Take one in."""
        self.counts[priority] += 1
        heapq.heappush(
            self.heap,
            (priority, delivery.sequence, delivery.deliveries, time.monotonic(), delivery),
        )

    def pop(self) -> Delivery:
        """Take out the next to run."""
        entry = heapq.heappop(self.heap)
        self.counts[entry[0]] -= 1
        return entry[4]

    def pop_stuck(self, pace: Pace, concurrency: int, quiet: float) -> list[Delivery]:
        """Take out those for which no slot will come soon."""
        now = time.monotonic()
        ordered = sorted(self.heap)
        stuck = {
            id(entry)
            for place, entry in enumerate(ordered)
            if should_hand_back(now - entry[3], pace, concurrency, place, quiet)
        }
        self.heap = [entry for entry in ordered if id(entry) not in stuck]
        self.counts = Counter(entry[0] for entry in self.heap)
        return [entry[4] for entry in ordered if id(entry) in stuck]

    def pop_all(self) -> list[Delivery]:
        """Take out all."""
        entries, self.heap = self.heap, []
        self.counts.clear()
        return [entry[4] for entry in entries]


@dataclass(slots=True)
class Tier:
    """What is known of a tier: how many jobs waited behind its last delivery, and when that was heard (monotonic seconds).

    `empty`: when it was found to have none. `looked`: since when the answer to a look is awaited, 0 if none is.
    """

    pending: int = 0
    heard: float = 0.0
    empty: float = 0.0
    looked: float = 0.0

    def known_pending(self, now: float, outstanding: int) -> int:
        """Return the number, unless credit has brought nothing for a while: then others have taken what was there."""
        return self.pending if not outstanding or now - self.heard < FRESH else 0

    def may_have_jobs(self, now: float, outstanding: int) -> bool:
        """Return whether jobs of it wait at the server, or may do so: a look is not answered yet."""
        return self.known_pending(now, outstanding) > 0 or (
            outstanding > 0 and self.looked > 0 and now - self.looked < LOOK_TIMEOUT
        )

    def hear(self, now: float, pending: int) -> None:
        """Take in what a delivery says."""
        self.pending, self.heard, self.looked = pending, now, 0.0

    def hear_lapse(self, now: float) -> None:
        """Take in that credit came back: nothing more is there."""
        self.pending, self.empty, self.looked = 0, now, 0.0
