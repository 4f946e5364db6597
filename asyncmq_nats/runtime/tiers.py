"""The tiers of a worker: whether jobs of each priority wait at the server. No I/O."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

from asyncmq_nats.runtime.prefetch import TierView
from asyncmq_nats.wire.keys import tier_name, tier_priority

__all__ = ["FRESH_SECONDS", "Tier", "Tiers"]

FRESH_SECONDS: Final = 0.05
"""Seconds for which the counts of a tier hold while credit for it brings nothing."""
LOOK_TIMEOUT: Final = 1.0
"""Jobs of a lower tier wait this long for the answer whether a higher one has any."""


@dataclass(slots=True)
class Tier:
    """The counts of one tier. Times are monotonic seconds, 0 if it has not happened.

    `pending`: jobs that waited behind the last delivery. `heard`: when the server said so.
    `empty`: when it said that there are none. `looked`: when it was asked, if the answer is due.
    """

    pending: int = 0
    heard: float = 0.0
    empty: float = 0.0
    looked: float = 0.0

    def known_pending(self, now: float, outstanding: int) -> int:
        """Return `pending`, or 0 if credit brought nothing for a while: others took the jobs."""
        return self.pending if not outstanding or now - self.heard < FRESH_SECONDS else 0

    def may_have_jobs(self, now: float, outstanding: int) -> bool:
        """Return whether jobs wait at the server, or may do so: a look is not answered yet."""
        return self.known_pending(now, outstanding) > 0 or (
            outstanding > 0 and self.looked > 0 and now - self.looked < LOOK_TIMEOUT
        )

    def on_delivery(self, now: float, pending: int) -> None:
        """Take in what a delivery says."""
        self.pending, self.heard, self.looked = pending, now, 0.0

    def on_lapse(self, now: float) -> None:
        """Take in that credit came back: nothing more is there."""
        self.pending, self.empty, self.looked = 0, now, 0.0


@dataclass(slots=True)
class Tiers:
    """The tiers of a queue. `outstanding`: credit that the server holds for a consumer."""

    outstanding: Callable[[str], int]
    known: dict[int, Tier] = field(default_factory=dict)
    _priorities: dict[str, int] = field(default_factory=dict)

    def add(self, priority: int, pending: int, now: float) -> Tier:
        """Return a tier, noted with this if it was not known."""
        return self.known.setdefault(priority, Tier(pending, now))

    def priority_of(self, consumer: str) -> int:
        """Return the priority of a tier's consumer."""
        priority = self._priorities.get(consumer)
        if priority is None:
            priority = self._priorities[consumer] = tier_priority(consumer) or 0
        return priority

    def credit(self, priority: int) -> int:
        """Return the credit that the server holds for a tier."""
        return self.outstanding(tier_name(priority))

    @property
    def may_become_stale(self) -> bool:
        """Whether the counts may become wrong with time alone."""
        return len(self.known) > 1 and any(
            tier.pending or tier.looked for tier in self.known.values()
        )

    def better_may_come(self, best: int, now: float) -> bool:
        """Return whether jobs of a higher tier than `best` wait at the server, or may do so."""
        return any(
            priority < best and tier.may_have_jobs(now, self.credit(priority))
            for priority, tier in self.known.items()
        )

    def may_have_jobs(self, now: float) -> bool:
        """Return whether jobs of any tier wait at the server, or may do so."""
        return any(
            tier.may_have_jobs(now, self.credit(priority)) for priority, tier in self.known.items()
        )

    def view(self, now: float, held: Mapping[int, int]) -> list[TierView]:
        """Return the tier states for `prefetch`, first the tier that runs first.

        `held`: jobs by priority.
        """
        views: list[TierView] = []
        total = 0
        for priority in sorted(self.known):
            outstanding = self.credit(priority)
            total += held.get(priority, 0)
            pending = self.known[priority].known_pending(now, outstanding)
            views.append(TierView(priority, outstanding, pending, total))
        return views
