"""The health of a worker: whether it should live on, and whether it takes jobs."""

from dataclasses import dataclass
from typing import Any, Final

__all__ = ["Check", "WorkerHealth", "judge_health"]

MOST_SILENCE: Final = 30.0
"""Seconds for which the server may not answer a pull: it sends a heartbeat each five seconds."""
MOST_OVERDUE: Final = 30.0
"""Seconds by which the promoter may be late with a job whose time has come."""
MOST_BLOCKED: Final = 30.0
"""Seconds for which the event loop may be blocked."""


@dataclass(frozen=True, slots=True)
class Check:
    """The result of one check. `vital`: whether a restart of the process may mend it."""

    name: str
    ok: bool
    vital: bool
    detail: str = ""


@dataclass(frozen=True, slots=True)
class WorkerHealth:
    """The health of one worker."""

    worker: str
    queue: str
    checks: tuple[Check, ...]

    @property
    def is_alive(self) -> bool:
        """Whether it should live on: a restart would mend nothing."""
        return all(check.ok for check in self.checks if check.vital)

    @property
    def is_ready(self) -> bool:
        """Whether it takes jobs."""
        return all(check.ok for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """Return it as a dict for JSON."""
        return {
            "worker": self.worker,
            "queue": self.queue,
            "alive": self.is_alive,
            "ready": self.is_ready,
            "checks": {
                check.name: {"ok": check.ok} | ({"detail": check.detail} if check.detail else {})
                for check in self.checks
            },
        }


def judge_health(
    worker: str,
    queue: str,
    *,
    connected: bool,
    taking: bool,
    silent_for: float,
    overdue: float,
    blocked_for: float,
) -> WorkerHealth:
    """Return the health of a worker.

    Args:
        worker: its id.
        queue: its queue.
        connected: whether it has a connection.
        taking: whether it has started, and does not stop.
        silent_for: seconds for which the server has not answered a pull.
        overdue: seconds for which a job waits for the promoter whose time has come.
        blocked_for: seconds since the event loop ran last.
    """

    def late(seconds: float, most: float) -> str:
        return f"{seconds:.0f} s, {most:g} s are the most" if seconds > most else ""

    # Without a connection nothing answers, and a restart would not help.
    pulls = silent_for <= MOST_SILENCE or not connected
    promoter = overdue <= MOST_OVERDUE or not connected
    return WorkerHealth(
        worker,
        queue,
        (
            Check("connected", connected, vital=False),
            Check("taking_jobs", taking, vital=False),
            Check("pulls_answered", pulls, vital=True, detail=late(silent_for, MOST_SILENCE)),
            Check("promoter", promoter, vital=True, detail=late(overdue, MOST_OVERDUE)),
            Check(
                "event_loop",
                blocked_for <= MOST_BLOCKED,
                vital=True,
                detail=late(blocked_for, MOST_BLOCKED),
            ),
        ),
    )
