"""Jobs that may have killed a worker run one at a time, so that the one that does it is found.

A job that was lost with its worker runs again with no other suspect beside it. The run whose loss
would end it as failed begins alone: nothing else runs in this worker.
"""

from collections import deque
from collections.abc import Callable
from typing import Final

from asyncmq_nats.runtime.slot_group import Probation
from asyncmq_nats.transitions.claim import Attempt

__all__ = ["Suspects"]

PROBATION_SECONDS: Final = 1.0
"""Seconds that a suspect has to survive before the next one starts beside it."""
LAST_PROBATION_SECONDS: Final = 5.0
"""Likewise for the last run of a suspect, in which nothing at all starts beside it."""


class Suspects:
    """The line of suspects of one queue in a worker. `now`: monotonic seconds.

    `is_alone` says whether no other job runs in the worker.
    """

    def __init__(
        self,
        max_stalls: int,
        is_alone: Callable[[], bool],
        now: Callable[[], float],
        probation: Probation | None = None,
    ) -> None:
        self._max_stalls = max_stalls
        self._is_alone = is_alone
        self._now = now
        self._line: deque[Attempt] = deque()
        self._probation = probation or Probation()

    def __len__(self) -> int:
        return len(self._line)

    @property
    def exist(self) -> bool:
        """Whether a suspect waits or runs, in any queue of the worker."""
        probation = self._probation
        return bool(self._line or probation.current is not None or probation.waiting_since)

    def enter(self, attempt: Attempt) -> None:
        """Put a suspect at the end of the line."""
        self._line.append(attempt)

    def next(self) -> Attempt | None:
        """Take the next suspect out of the line if it may start now."""
        if not self._line or self._is_occupied:
            return None
        attempt, now, probation = self._line[0], self._now(), self._probation
        exclusive = attempt.losses + 1 >= self._max_stalls
        if exclusive and not self._is_alone():
            probation.waiting_since = probation.waiting_since or now
            if now - probation.waiting_since < LAST_PROBATION_SECONDS:
                return None
        probation.waiting_since = 0.0
        probation.current, probation.exclusive = self._line.popleft(), exclusive
        probation.free_at = now + (LAST_PROBATION_SECONDS if exclusive else PROBATION_SECONDS)
        return attempt

    def leave(self, attempt: Attempt) -> None:
        """Note that a suspect has ended."""
        if attempt is self._probation.current:
            self._probation.current, self._probation.exclusive = None, False
            self._probation.free_at = 0.0

    @property
    def holds_others(self) -> bool:
        """Whether no other job may start now: a last run waits for its turn, or has begun."""
        probation = self._probation
        return probation.waiting_since > 0 or (probation.exclusive and self._is_occupied)

    @property
    def wait(self) -> float | None:
        """Seconds after which `next` should be asked again, if no job ends before; else `None`."""
        probation = self._probation
        if probation.waiting_since:
            return max(0.0, probation.waiting_since + LAST_PROBATION_SECONDS - self._now())
        if self._line or probation.exclusive:
            return max(0.0, probation.free_at - self._now()) if probation.current else 0.0
        return None

    def clear(self) -> list[Attempt]:
        """Take out all that wait."""
        attempts = list(self._line)
        self._line.clear()
        return attempts

    @property
    def _is_occupied(self) -> bool:
        probation = self._probation
        return probation.current is not None and self._now() < probation.free_at
