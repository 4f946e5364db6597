"""The clock of the server, as far as a client can know it."""

import time
from math import inf
from typing import Final

__all__ = ["ServerClock"]

LIFETIME: Final = 60.0
"""Seconds after which older measurements no longer bound the offset: clocks drift."""
LONGEST_ERROR: Final = 0.1
"""Seconds that `now_at_most` is ahead of `now` at most, on whatever network."""


class ServerClock:
    """The server's time: the monotonic clock of this machine, and an offset.

    A time stamp of the server was made between a request and its reply, so each one bounds the
    offset on both sides. The offset moves only if the bounds exclude it, since the times of a
    process are subtracted from each other: a step forward between two of them is a job too early.
    """

    def __init__(self) -> None:
        # A pause between the two readings makes the difference too small.
        self.offset = max(time.time() - time.monotonic() for _ in range(3))
        """Seconds from the monotonic clock to the server's; at first, to this machine's."""
        self._low, self._high, self._until = -inf, inf, -inf

    def now(self) -> float:
        """Return the server's time, in Unix seconds."""
        return time.monotonic() + self.offset

    def now_at_least(self) -> float:
        """Return a time that the server's clock has reached; `-inf` before any measurement."""
        return time.monotonic() + self._low

    def now_at_most(self) -> float:
        """Return a time that the server's clock has not passed, 0.1 s after `now` at most.

        It is `now` before any measurement.
        """
        ahead = self._high - self.offset
        return self.now() + (0.0 if ahead == inf else min(ahead, LONGEST_ERROR))

    def learn(self, stamp: float, sent: float, received: float) -> None:
        """Bound the offset by a time stamp of the server.

        The server made it, in Unix seconds, between `sent` and `received`, in monotonic seconds.
        """
        low, high = stamp - received, stamp - sent
        if received < self._until and low <= self._high and high >= self._low:
            self._low, self._high = max(low, self._low), min(high, self._high)
        else:  # nothing is known, or no longer; or one of the clocks was set
            self._low, self._high, self._until = low, high, received + LIFETIME
        if not self._low <= self.offset <= self._high:
            self.offset = (self._low + self._high) / 2
