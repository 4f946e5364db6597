"""Confirms the ends of attempts: outcome → confirmed → children told → acknowledged.

The only place that counts attempts whose end is not confirmed yet.
"""

from collections.abc import Callable

from asyncmq_nats._concurrency import Spawner
from asyncmq_nats._logging import get_logger
from asyncmq_nats.backends.base import Delivery, Settled, Write
from asyncmq_nats.exceptions import AsyncMQError
from asyncmq_nats.store.announcing import WorkerEvents
from asyncmq_nats.transitions.claim import Attempt, settle_delivery
from asyncmq_nats.transitions.finish import Lifecycle

__all__ = ["Completer"]

logger = get_logger(__name__)


class Completer:
    """Settles the attempts of one worker. `on_change` is called when one is settled."""

    def __init__(
        self,
        lifecycle: Lifecycle,
        events: WorkerEvents,
        spawner: Spawner,
        on_change: Callable[[], None],
    ) -> None:
        self._lifecycle = lifecycle
        self._events = events
        self._spawner = spawner
        self._on_change = on_change
        self._stopped = False
        lifecycle.on_settled = self._on_settled
        self.leases_lost = 0
        """Leases that ran out although the job was here."""
        self._attempts: dict[int, Attempt] = {}
        """Those that have started and whose end is not confirmed, by the sequence of the job."""

    def stop(self) -> None:
        """Resolve nothing more: the worker has ended. What comes is left to its lease."""
        self._stopped = True

    @property
    def pending(self) -> int:
        """How many attempts have started and have no confirmed end."""
        return len(self._attempts)

    def begin(self, attempt: Attempt) -> None:
        """Count an attempt that starts: its final write, or `finish`, settles it. Repeatable."""
        self._attempts[attempt.delivery.sequence] = attempt

    def finish(self, attempt: Attempt) -> None:
        """Count an attempt as settled: called directly for one without a final write."""
        self._attempts.pop(attempt.delivery.sequence, None)
        self._on_change()

    def renew_lease(self, delivery: Delivery) -> bool:
        """Take a delivery as the new lease of a job that runs or ends here, if it is one.

        Its lease had run out although this worker lives, or the server was killed and lost it.
        """
        attempt = self._attempts.get(delivery.sequence)
        if attempt is None:
            return False
        logger.warning(
            "job %s was redelivered while this worker has it: its lease is renewed",
            attempt.head.job_id,
        )
        attempt.delivery.abandon()
        attempt.delivery = delivery
        self.leases_lost += 1
        return True

    def _on_settled(self, attempt: Attempt, write: Write, result: Settled) -> None:
        """Take the answer of the server. Called by the backend: must not block."""
        if isinstance(result, int) and not self._lifecycle.has_sequel(attempt, write):
            if attempt.claim_sequence or attempt.leftovers:
                self._lifecycle.clean_up(attempt, write)
            attempt.delivery.ack()
            self.finish(attempt)
            self._tell_end(attempt, write)
        elif self._stopped:
            attempt.delivery.abandon()
        else:
            self._spawner.spawn(self._resolve, attempt, write, result)

    def _tell_end(self, attempt: Attempt, write: Write) -> None:
        if (on_end := attempt.on_end) is not None:
            attempt.on_end = None  # it holds the attempt: left to the garbage collector otherwise
            on_end(attempt.head.task_id)
        self._events.tell_end(self._spawner, attempt.token, write)

    async def _resolve(self, attempt: Attempt, write: Write, result: Settled) -> None:
        try:
            disposition = await self._lifecycle.settled(attempt, write, result)
            settle_delivery(attempt.delivery, disposition)
            if attempt.is_recorded:
                self._tell_end(attempt, write)
        except AsyncMQError as error:
            logger.error(
                "job %s: the end of its attempt is not stored: %s", attempt.head.job_id, error
            )
            attempt.delivery.abandon()
        except BaseException:  # the worker ends, or has a fault: its lease must not be extended
            attempt.delivery.abandon()
            raise
        finally:
            self.finish(attempt)
