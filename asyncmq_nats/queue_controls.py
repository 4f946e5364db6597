"""The methods of `Queue` that control: pause, resume, cancel, workers, hooks."""

from functools import partial
from typing import TypeVar

from asyncmq_nats.controls import WorkerInfo, list_workers
from asyncmq_nats.hooks import Hook
from asyncmq_nats.parameters import checked_seconds
from asyncmq_nats.patience import look_for
from asyncmq_nats.queue_base import QueueBase
from asyncmq_nats.states import State

__all__ = ["QueueControls"]

H = TypeVar("H", bound=Hook)


class QueueControls(QueueBase):
    """Pause, resume, cancel, workers, hooks."""

    async def pause(self, until: float | None = None) -> None:
        """Pause the queue: when this returns, no worker starts another job (AsyncMQ `Queue.pause`).

        Jobs that run go on, and jobs can be added. The server enforces it, for programs without this library too; it outlasts restarts.

        Args:
            until: Unix seconds at which the queue goes on by itself.
        """
        await self._controls.pause(until if until is None else checked_seconds(until, "until"))

    async def resume(self) -> None:
        """Let a paused queue go on, at once (AsyncMQ `Queue.resume`)."""
        await self._controls.resume()

    async def is_paused(self) -> bool:
        """Return whether the queue is paused, by `pause` or by another program that paused its consumers."""
        return await self._assets.is_paused()

    async def cancel_job(self, job_id: str) -> bool:
        """Cancel a job that has not ended: it becomes `cancelled` and does not run; if it runs, its task is cancelled.

        A sync task's thread cannot be interrupted: it goes on to its end unheeded, unless it looks at `current_job().cancel_requested`.
        Return whether there was such a job.
        """
        await self._assets.declare()
        if not await look_for(partial(self._administration.cancel, job_id)):
            return False
        await self._controls.signal_cancel(job_id)
        return True

    async def is_job_cancelled(self, job_id: str) -> bool:
        """Return whether the job was cancelled."""
        job = await self._inspection.find(job_id)
        return job is not None and job.status is State.CANCELLED

    async def list_workers(self) -> list[WorkerInfo]:
        """Return the running workers of this queue."""
        return await list_workers(self.backend, self.name)

    def on_startup(self, hook: H) -> H:
        """Have this queue's workers call a function, sync or async, before their first job; usable as a decorator.

        It is given those of the keywords `backend`, `worker_id` and `queue` that it takes. An error ends the worker.
        """
        self._hooks.on_startup.append(hook)
        return hook

    def on_shutdown(self, hook: H) -> H:
        """Likewise after their last job, the last one registered first."""
        self._hooks.on_shutdown.append(hook)
        return hook
