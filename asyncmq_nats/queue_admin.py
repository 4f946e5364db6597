"""The methods of `Queue` that clean up, and those about deduplication."""

from functools import partial

from asyncmq_nats.backends.base import Backend
from asyncmq_nats.exceptions import InvalidArgument
from asyncmq_nats.parameters import checked_number, checked_seconds
from asyncmq_nats.patience import look_for
from asyncmq_nats.queue_base import QueueBase
from asyncmq_nats.states import State

__all__ = ["QueueAdmin", "list_queues"]


async def list_queues(backend: Backend) -> list[str]:
    """Return the names of the queues on a backend (AsyncMQ `list_queues`)."""
    prefix = f"{backend.settings.prefix}_"
    return [name.removeprefix(prefix) for name in await backend.list_logs(prefix)]


def _checked_state(state: str) -> State:
    if state not in set(State):
        raise InvalidArgument(f"state must be one of {', '.join(State)}", state)
    return State(state)


class QueueAdmin(QueueBase):
    """Cleaning up, and deduplication."""

    async def clean(self, state: str, older_than: float | None = None) -> None:
        """Remove the jobs in a state (AsyncMQ `Queue.clean`). Jobs that run stay.

        Args:
            state: such as `completed`.
            older_than: only those that came to that state before, in Unix seconds: for outcomes, that ended before.

        Raises:
            InvalidArgument: there is no such state, or `older_than` is no number.
        """
        wanted, before = _checked_state(state), None if older_than is None else checked_seconds(older_than, "older_than")
        await self._assets.declare()
        await self._administration.clean(wanted, before)

    async def clean_jobs(self, grace: float, limit: int = 0, state: str = State.COMPLETED) -> list[str]:
        """Remove the jobs that came to a state more than `grace` seconds ago, at most `limit` (0: all), and return their ids."""
        wanted, seconds, most = _checked_state(state), checked_seconds(grace, "grace"), checked_number(limit, "limit")
        await self._assets.declare()
        return await self._administration.clean_jobs(wanted, self.backend.now() - seconds, most)

    async def remove_job(self, job_id: str) -> bool:
        """Remove a job in any state but `active`. Return whether it was removed. Jobs that depend on it go on waiting.

        A job that a stopping worker handed back is `active` until another worker fetches it; `cancel_job` ends it. One that a worker is
        making ready at this moment may run as well.
        """
        await self._assets.declare()
        return await look_for(partial(self._administration.remove, job_id))

    async def drain(self, include_delayed: bool = False) -> list[str]:
        """Remove the jobs that wait, and if wished those that are delayed; return their ids. Jobs that run stay."""
        await self._assets.declare()
        return await self._administration.drain(include_delayed=include_delayed)

    async def obliterate(self, *, force: bool = False) -> list[str]:
        """Remove everything: jobs in all states, repeatables, windows, a pause; return the ids of the jobs.

        Raises:
            RuntimeError: jobs are active, and not `force`: they run, or a stopping worker handed them back and no other has fetched them.
        """
        await self._assets.declare_all()
        counts = await self._inspection.count_by_state()
        if counts[State.ACTIVE] and not force:
            raise RuntimeError(f"queue {self.name!r} has {counts[State.ACTIVE]} active jobs: wait for them, or pass force=True")
        ids = [job.job_id for state in State async for job in self._inspection.read(state)]
        await self._administration.obliterate()
        await self._controls.resume()
        return ids

    async def get_deduplication_job_id(self, deduplication_id: str) -> str | None:
        """Return the id of the job that owns a deduplication window, or `None`."""
        await self._assets.declare()
        return await self._deduplicator.owner(deduplication_id)

    async def get_debounce_job_id(self, deduplication_id: str) -> str | None:
        """Same as `get_deduplication_job_id`, under AsyncMQ's older name."""
        return await self.get_deduplication_job_id(deduplication_id)

    async def remove_deduplication_key(self, deduplication_id: str) -> bool:
        """End a deduplication window. Return whether there was one."""
        await self._assets.declare()
        return await self._deduplicator.remove(deduplication_id)
