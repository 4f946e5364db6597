"""`JobHandle`: the id of a job that can be asked about its job."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, Generic, Self, TypeVar

from pydantic import GetCoreSchemaHandler
from pydantic_core import core_schema

from asyncmq_nats.events import Event
from asyncmq_nats.queues import Queue
from asyncmq_nats.states import State
from asyncmq_nats.wire.arguments import Results

__all__ = ["JobHandle"]

R_co = TypeVar("R_co", covariant=True)


class JobHandle(str, Generic[R_co]):
    """The id of a job, a `str` like any other, that knows its queue and what its task returns.

    A copy of it, and what is pickled, is the plain id.
    """

    _queue: Queue
    _results: Results

    def __new__(cls, job_id: str, queue: Queue, results: Results) -> Self:
        """Return the handle of a job of this queue.

        `results`: how what its task returns is read.
        """
        handle = super().__new__(cls, job_id)
        handle._queue, handle._results = queue, results
        return handle

    @classmethod
    def __get_pydantic_core_schema__(
        cls, source: Any, handler: GetCoreSchemaHandler
    ) -> core_schema.CoreSchema:
        """Have pydantic take it for a text, also as the argument of another job."""
        return handler(str)

    def __reduce__(self) -> tuple[type[str], tuple[str]]:
        """Pickle and copy it as the id: a connection cannot travel."""
        return str, (self.id,)

    @property
    def id(self) -> str:
        """The plain id."""
        return str(self)

    @property
    def queue(self) -> Queue:
        """The queue of the job."""
        return self._queue

    async def result(self, timeout: float | None = None) -> R_co:
        """Wait until the job ends and return its result, as the task's annotation says.

        Raises:
            JobFailed: it ended as failed, expired or cancelled.
            JobNotFound: there is no such job, or its outcome was kept no longer.
            TimeoutError: it has not ended within `timeout` seconds; with 0 or less: it has not
                ended.
            InvalidResult: the result is not what the annotation says.
        """
        value: R_co = self._results.read(await self._queue.wait_for(self.id, timeout), self.id)
        return value

    async def state(self) -> State | None:
        """Return the state of the job, or `None` if there is no such job."""
        state = await self._queue.get_job_state(self.id)
        return None if state is None else State(state)

    async def details(self) -> dict[str, Any] | None:
        """Return all of the job as a dict, as `Queue.get_job` does, or `None`."""
        return await self._queue.get_job(self.id)

    async def cancel(self) -> bool:
        """Cancel the job, also while it runs; see `Queue.cancel_job`.

        Return whether there was such a job.
        """
        return await self._queue.cancel_job(self.id)

    async def retry(self) -> bool:
        """Run the job again if it failed, expired or was cancelled, or now if it is delayed.

        See `Queue.retry_job`.
        """
        return await self._queue.retry_job(self.id)

    async def events(self, *names: str) -> AsyncGenerator[Event, None]:
        """Yield what happens to the job from now on, until it has ended; see `Queue.events`."""
        async with aclosing(self._queue.events(*names, job_id=self.id)) as events:
            async for event in events:
                yield event
