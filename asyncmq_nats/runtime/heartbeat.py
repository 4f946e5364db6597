"""The heartbeat of a worker: it renews its entry, and checks for missed signals."""

from collections.abc import Awaitable, Callable, Sequence
from typing import Final

from asyncmq_nats._clock import SYSTEM_CLOCK, Clock
from asyncmq_nats._logging import Throttle, get_logger
from asyncmq_nats.exceptions import AsyncMQError, ConnectionLost

__all__ = ["Heartbeat"]

logger = get_logger(__name__)

WARNING_INTERVAL: Final = 30.0

Step = Callable[[], Awaitable[object]]


class Heartbeat:
    """The steps of one worker's heartbeat.

    A step that fails does not keep the others from their turn.
    """

    def __init__(
        self, worker: str, interval: float, steps: Sequence[Step], clock: Clock = SYSTEM_CLOCK
    ) -> None:
        self._worker = worker
        self._clock = clock
        self._interval = interval
        self._steps = [(step, Throttle(WARNING_INTERVAL)) for step in steps]

    async def run(self) -> None:
        """Beat until cancelled.

        Raises:
            ConnectionLost: the connection was closed for good.
        """
        while True:
            await self._clock.sleep(self._interval)
            await self.beat()

    async def beat(self) -> None:
        """Take all steps once."""
        for step, warnings in self._steps:
            try:
                await step()
            except ConnectionLost as error:
                logger.critical("worker %s ends: %s", self._worker, error)
                raise
            except AsyncMQError as error:
                if times := warnings.note():
                    text = "worker %s: a part of its heartbeat failed (%d times): %s"
                    logger.warning(text, self._worker, times, error)
