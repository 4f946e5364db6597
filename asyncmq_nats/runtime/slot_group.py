"""The queues of one worker: their order, their shared slots, and the number of their jobs.

A worker of one queue has no group, unless it ends after some number of jobs.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, Protocol

from asyncmq_nats.transitions.claim import Attempt

__all__ = ["Member", "Probation", "SlotGroup"]


MAX_CATCH_UP: Final = 64
"""Starts that a queue may make up for, which had no jobs in hand when it was its turn."""

MAX_DEBT: Final = 8
"""Starts by which a queue may fall behind while its jobs are on their way from the server."""


@dataclass(slots=True)
class Probation:
    """The suspect that runs in this process, and until when none starts beside it.

    The queues of one worker share it: a job that kills the process takes down the jobs of all.
    `free_at`, `waiting_since`: monotonic seconds.
    """

    current: Attempt | None = None
    free_at: float = 0.0
    exclusive: bool = False
    waiting_since: float = 0.0


class Member(Protocol):
    """The slots of one queue, as the group sees them."""

    @property
    def is_open(self) -> bool:
        """Whether it may run jobs: it has started, and was not told to stop."""

    @property
    def is_running(self) -> bool:
        """Whether a job of it runs."""

    @property
    def expects_jobs(self) -> bool:
        """Whether the server has jobs for it, as far as is known, and it waits for them."""

    def start_next(self) -> bool:
        """Start one job. Return whether there was one that may start.

        If one may start later although no job ends, it sees to it that `SlotGroup.fill` is called.
        """

    def note_free_slot(self) -> None:
        """Decide again how many jobs to ask for: a slot of another queue is free."""


@dataclass(slots=True)
class _Share:
    member: Member
    cost: float
    """The cost of a start: 1 / weight."""
    used: float = 0.0
    """The starts so far, each by its cost. The queue with the least is next."""


@dataclass(slots=True)
class SlotGroup:
    """Starts the jobs of several queues.

    Args:
        slots: how many run at a time in all of them; `None`: each queue has its own.
        is_strict: whether a queue waits for those before it, in the order in which they joined.
            Otherwise each gets a share of the starts, by its weight.
        jobs_left: how many may start; `None` is no limit.
        on_last: called when the last one of these has started.
    """

    slots: int | None = None
    is_strict: bool = False
    jobs_left: int | None = None
    on_last: Callable[[], None] = lambda: None
    probation: Probation = field(default_factory=Probation)
    started: int = 0
    """Jobs that have started, of all queues."""
    _busy: int = 0
    _used: float = 0.0
    """The cost so far of the queue that started last: a queue that was idle begins there."""
    _shares: list[_Share] = field(default_factory=list)
    _is_filling: bool = False
    _fill_again: bool = False
    _has_begun: bool = False

    def join(self, member: Member, weight: float = 1.0) -> None:
        """Add a queue. In strict order, the first one to join is the first to be served."""
        self._shares.append(_Share(member, 1.0 / weight))

    def is_last(self, member: Member) -> bool:
        """Return whether the queue is the last in order: none waits for it."""
        return self._shares[-1].member is member

    @property
    def is_alone(self) -> bool:
        """Whether no job of any queue runs."""
        return not any(share.member.is_running for share in self._shares)

    def limit(self, room: int) -> int:
        """Return how many jobs may start, if one queue has room for that many."""
        if self.slots is not None:
            room = min(room, self.slots - self._busy)
        if self.jobs_left is not None:
            room = min(room, self.jobs_left)
        return room

    def occupy(self) -> None:
        """Count a job that starts."""
        self._busy += 1
        self.started += 1
        if self.jobs_left is not None:
            self.jobs_left -= 1
            if self.jobs_left == 0:
                self.on_last()

    def release(self, member: Member) -> None:
        """Count a job of this queue that has ended."""
        self._busy -= 1
        if self.slots is not None:
            for share in self._shares:
                if share.member is not member:
                    share.member.note_free_slot()

    def fill(self) -> None:
        """Start jobs while slots are free.

        May be called from any callback, also by what it calls.
        """
        self._fill_again = True
        if self._is_filling:
            return
        # None starts before all queues can: the first one to be ready is not the first in order.
        self._has_begun = self._has_begun or all(share.member.is_open for share in self._shares)
        if not self._has_begun:
            return
        self._is_filling = True
        try:
            while self._fill_again:
                self._fill_again = False
                self._fill_once()
        finally:
            self._is_filling = False

    def _fill_once(self) -> None:
        waiting = [share for share in self._shares if share.member.is_open]
        while waiting and self.limit(1) > 0:
            share = waiting[0] if self.is_strict else min(waiting, key=lambda each: each.used)
            if share.member.start_next():
                self._count(share)
            elif self._is_owed(share) and share.member.expects_jobs:
                break
            else:
                waiting.remove(share)

    def _is_owed(self, share: _Share) -> bool:
        """Return whether a slot is kept for a job of this queue that is on its way."""
        return self.is_strict or share.used + MAX_DEBT * share.cost < self._used

    def _count(self, share: _Share) -> None:
        """Count a start. A queue that was idle makes up for a few of its starts, not for all."""
        share.used = max(share.used, self._used - MAX_CATCH_UP * share.cost)
        self._used = max(self._used, share.used)
        share.used += share.cost
