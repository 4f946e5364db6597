"""The repeatables that a worker's code declares: stored at its start, removed with the last code.

Each worker tells in its entry which ones it declares, and does so before it stores them. One that
started after a definition was last changed, and does not declare it, removes it as soon as no
running worker declares it.
"""

from collections.abc import Mapping

from asyncmq_nats._logging import get_logger
from asyncmq_nats.runtime.control import list_workers
from asyncmq_nats.store.queue_store import QueueStore
from asyncmq_nats.transitions.definition import Definition
from asyncmq_nats.transitions.repeat import Repeatables

__all__ = ["Declarations"]

logger = get_logger(__name__)


class Declarations:
    """The declarations of one worker's code, by id."""

    def __init__(self, store: QueueStore, definitions: Mapping[str, Definition]) -> None:
        self._backend = store.backend
        self._queue = store.keys.queue
        self._definitions = dict(definitions)
        self._repeatables = Repeatables(store)
        self._since = 0.0
        self._others: set[str] = set()
        """Ids that other code declared before this worker started."""

    @property
    def ids(self) -> list[str]:
        """Ids of what is declared."""
        return list(self._definitions)

    async def store(self, since: float) -> None:
        """Store what is declared. `since`: when the worker entered the list of workers.

        Raises:
            PayloadTooLarge: a job is too large for the server.
        """
        self._since = since
        for definition in self._definitions.values():
            await self._repeatables.upsert(definition)
        self._others = set(await self._repeatables.read_declared()) - self._definitions.keys()
        await self.retire()

    async def retire(self) -> None:
        """Remove what no running worker declares any more."""
        if not self._others:
            return
        declared = await self._declared()
        if declared is None:
            return
        for rid in self._others - declared:
            removed = await self._repeatables.retire(rid, self._since)
            self._others.discard(rid)
            if removed is None:
                continue
            if rid in (await self._declared() or ()):  # a worker entered meanwhile, and found it
                await self._repeatables.upsert(removed)
            else:
                logger.info(
                    "repeatable %s of queue %s is removed: no code declares it", rid, self._queue
                )

    async def _declared(self) -> set[str] | None:
        """Return the ids that running workers declare; `None` if one of them does not tell."""
        workers = await list_workers(self._backend, self._queue)
        if any(worker.repeatables is None for worker in workers):
            return None
        return {rid for worker in workers for rid in worker.repeatables or ()}
