"""How many jobs a worker asks for, and of which tiers. Pure functions of values.

A worker asks for what it can start, and for a round trip's worth more while its jobs are shorter than a round trip.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

__all__ = [
    "MAX_PREFETCH",
    "Pace",
    "TierView",
    "prefetch_target",
    "should_hand_back",
    "slots_are_rare",
    "tiers_to_ask",
]

MAX_PREFETCH: Final = 512
RARE: Final = 0.05
MAX_HOLD: Final = 0.25
SMOOTHING: Final = 0.2


@dataclass(frozen=True, slots=True)
class TierView:
    """What the worker knows of a tier: credit the server holds for it, jobs that wait behind its last delivery, and jobs in hand.

    `held`: those of this tier and of higher ones; jobs of lower tiers in hand do not keep it from being asked.
    """

    priority: int
    outstanding: int
    pending: int
    held: int = 0


@dataclass(slots=True)
class Pace:
    """How fast jobs go, in seconds.

    Moving averages: how long a job takes, and how long the server takes to answer a pull that it can serve. `start_seconds`: lately, how
    long it took from the start of one held job to that of the next; 0 while none are held. It has in it what a job costs beside its task.
    """

    job_seconds: float = math.inf
    refill_seconds: float = 0.001
    start_seconds: float = 0.0

    def learn_job(self, seconds: float) -> None:
        """Take in the duration of one more job."""
        self.job_seconds = (
            seconds
            if math.isinf(self.job_seconds)
            else self.job_seconds + SMOOTHING * (seconds - self.job_seconds)
        )

    def learn_refill(self, seconds: float) -> None:
        """Take in the answer time of one more pull."""
        self.refill_seconds += SMOOTHING * (min(seconds, 0.1) - self.refill_seconds)

    def learn_starts(self, started: int, seconds: float, held: int) -> None:
        """Take in how many jobs have started in the last `seconds`, and how many are held now."""
        if not held:
            self.start_seconds = 0.0
        elif started:
            self.start_seconds = seconds / started


def _slot_seconds(concurrency: int, pace: Pace, quiet: float = 0.0) -> float:
    """Return how long it takes until a slot becomes free, and then the next one.

    `quiet`: for so many seconds all slots have been taken and none became free. That is evidence as well: the next one takes as long again.
    """
    usual = 0.0 if math.isinf(pace.job_seconds) else pace.job_seconds / max(1, concurrency)
    return max(usual, quiet)


def prefetch_target(concurrency: int, pace: Pace, quiet: float = 0.0) -> int:
    """Return how many jobs to hold beyond the free slots: as many as start while a pull is answered (Little's law), twice over.

    Jobs of a millisecond: a few per slot. Jobs much longer than a round trip: none, so that nothing is hostage here while another
    worker idles. `quiet`: see `_slot_seconds`.
    """
    if math.isinf(pace.job_seconds):
        return 0
    started_meanwhile = pace.refill_seconds / max(
        _slot_seconds(concurrency, pace, quiet), 1e-5 / concurrency
    )
    if started_meanwhile < 0.5:
        return 0
    return min(MAX_PREFETCH, math.ceil(2 * started_meanwhile))


def tiers_to_ask(tiers: Sequence[TierView], wanted: int, capacity: int) -> list[tuple[int, int]]:
    """Return (priority, count) for each pull to send. `tiers` in the order in which they run.

    `wanted`: jobs the worker could take in now if it held none. `capacity`: likewise if it ran none either; small refills are put off
    until a third of it is wanted, to save round trips. Every tier gets credit down to the first that is known to have jobs waiting: what
    is below it must not come.
    """
    pulls: list[tuple[int, int]] = []
    for tier in tiers:
        missing = wanted - tier.held - tier.outstanding
        if missing > 0 and (missing >= max(1, capacity // 3) or tier.outstanding == 0):
            pulls.append((tier.priority, missing))
        if tier.pending > 0:
            break
    return pulls


def slots_are_rare(concurrency: int, pace: Pace, quiet: float) -> bool:
    """Return whether no slot can be expected for a job that is held. `quiet`: see `_slot_seconds`."""
    return _slot_seconds(concurrency, pace, quiet) > RARE


def should_hand_back(
    held_seconds: float, pace: Pace, concurrency: int, position: int, quiet: float = 0.0
) -> bool:
    """Return whether another worker should get a job that is held for a slot.

    At once where slots become free rarely; otherwise when its turn is still far off, or has not come because others passed it by. Jobs that
    move up as expected stay, however many are held: to give them back costs far more than to run them. `quiet`: see `_slot_seconds`.
    """
    if held_seconds <= 0:
        return False
    until_start = max(_slot_seconds(concurrency, pace, quiet), pace.start_seconds) * (position + 1)
    return (
        slots_are_rare(concurrency, pace, quiet)
        or until_start > MAX_HOLD
        or held_seconds > 2 * MAX_HOLD
    )
