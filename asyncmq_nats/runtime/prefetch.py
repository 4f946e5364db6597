"""How many jobs a worker fetches ahead, of which tiers, and which of them start late. Pure.

Every estimate decays with a half-life of 100 ms, so nothing that was measured lasts. No decision
is taken here that another one cannot undo: see "Pull policy" in docs/architecture.md.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

__all__ = [
    "MAX_PREFETCH",
    "Throughput",
    "TierView",
    "starts_late",
    "tiers_to_ask",
]

MAX_PREFETCH: Final = 512
FIRST_PREFETCH: Final = 4
GROWTH_FACTOR: Final = 2
"""The prefetch grows by this factor at most with each pull that the server has answered."""
MAX_REFILL_SECONDS: Final = 0.1
"""A container with a CPU limit stands still for up to this long, and gets no answer meanwhile."""
MIN_PREFETCH_SECONDS: Final = 0.01
"""If there is a prefetch it is worth this many seconds of starts, to save pulls."""
MAX_PREFETCH_SECONDS: Final = 2 * MAX_REFILL_SECONDS
"""The prefetch is worth no more than this many seconds of starts."""
RATE_HALF_LIFE: Final = 0.1
REFILL_SMOOTHING: Final = 0.2
LATE_SECONDS: Final = 2 * MAX_PREFETCH_SECONDS
"""A job that starts here within this time stays here: twice what a full prefetch takes."""
MAX_HOLD_SECONDS: Final = 2 * LATE_SECONDS
MIN_HOLD_SECONDS: Final = 0.05
MAX_DOUBLINGS: Final = 7


@dataclass(frozen=True, slots=True)
class TierView:
    """The state of a tier.

    `outstanding`: credit that the server holds. `pending`: jobs that wait behind the last delivery.
    `held`: buffered jobs of this tier and of higher ones; those of lower tiers take no room from
    it.
    """

    priority: int
    outstanding: int
    pending: int
    held: int = 0


@dataclass(slots=True)
class Throughput:
    """How fast jobs start here, how fast the server answers, and how far ahead to fetch."""

    rate: float = 0.0
    """Starts per second, weighted by age: a start counts half after each `RATE_HALF_LIFE`."""
    still_seconds: float = 0.0
    """For how long all slots have been taken and nothing has started."""
    refill_seconds: float = 0.001
    """Moving average of the time until a pull that the server can serve brings a job.

    At most `MAX_REFILL_SECONDS`, so the prefetch is worth `MAX_PREFETCH_SECONDS` at most.
    """
    prefetch: int = 0
    """How many jobs to hold beyond the free slots, as last decided."""
    may_grow: bool = False
    """Whether a pull was answered since the prefetch last grew."""

    def learn_starts(self, started: int, seconds: float, *, full: bool) -> None:
        """Take in how many jobs have started in the last `seconds`. `full`: no slot is free."""
        kept = 0.5 ** (seconds / RATE_HALF_LIFE)
        self.rate = self.rate * kept + (1.0 - kept) * started / seconds
        self.still_seconds = self.still_seconds + seconds if full and not started else 0.0

    def learn_refill(self, seconds: float) -> None:
        """Take in the answer time of one more pull."""
        seconds = min(seconds, MAX_REFILL_SECONDS)
        self.refill_seconds += REFILL_SMOOTHING * (seconds - self.refill_seconds)
        self.may_grow = True

    def expected_rate(self, concurrency: int) -> float:
        """Return the starts per second to expect. That no slot became free is evidence too."""
        if self.still_seconds * self.rate > concurrency:
            return concurrency / self.still_seconds
        return self.rate

    def decide_prefetch(self, concurrency: int) -> int:
        """Return how many jobs to hold beyond the free slots, and remember it."""
        wanted = self._wanted_prefetch(concurrency)
        if wanted <= self.prefetch:
            self.prefetch = wanted
        elif self.may_grow:
            self.prefetch = min(wanted, max(FIRST_PREFETCH, GROWTH_FACTOR * self.prefetch))
            self.may_grow = False
        return self.prefetch

    def _wanted_prefetch(self, concurrency: int) -> int:
        """Return twice what starts while a pull is answered (Little's law), or in 10 ms.

        None if less than half a job starts meanwhile: a job that is long beside a round trip must
        not wait here while another worker idles.
        """
        rate = self.expected_rate(concurrency)
        if rate * self.refill_seconds < 0.5:
            return 0
        seconds = max(2 * self.refill_seconds, MIN_PREFETCH_SECONDS)
        return min(MAX_PREFETCH, math.ceil(rate * seconds))


def tiers_to_ask(tiers: Sequence[TierView], wanted: int, capacity: int) -> list[tuple[int, int]]:
    """Return (priority, count) for each pull to send. `tiers` in the order in which they run.

    `wanted`: jobs the worker could take now if it held none. `capacity`: likewise if it also ran
    none. A small refill waits until a third of the capacity is wanted, to save round trips. Every
    tier gets credit down to the first that has jobs waiting: nothing below it must come.
    """
    pulls: list[tuple[int, int]] = []
    for tier in tiers:
        missing = wanted - tier.held - tier.outstanding
        if missing > 0 and (missing >= max(1, capacity // 3) or tier.outstanding == 0):
            pulls.append((tier.priority, missing))
        if tier.pending > 0:
            break
    return pulls


def starts_late(place: int, held_seconds: float, deliveries: int, rate: float) -> bool:
    """Return whether another worker that waits should get a buffered job.

    `place`: how many start before it, less the free slots. `rate`: expected starts per second.
    A job is held longer each time it is delivered, so that none goes to and fro.
    """
    if held_seconds < MIN_HOLD_SECONDS * 2 ** min(deliveries - 1, MAX_DOUBLINGS):
        return False
    return place + 1 > rate * LATE_SECONDS or held_seconds > MAX_HOLD_SECONDS
