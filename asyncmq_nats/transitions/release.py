"""Jobs that wait for others are told when one of these has ended.

A parent's end and the edges to the children that wait for it are in one log, and each write
expects the other's absence: no interleaving loses a wake-up.

A child that waits is `later.<child>.parked` with the parents that are still open, or with many of
them in parts beside it (`waits.py`). The parent knows it from its own body (`children`: a flow) or
from an edge `done.<parent>.awaited.<child>` (added later). Releasing is repeatable: the worker
that finds an outcome tells the children, and acknowledges the parent's message last.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, Final

from asyncmq_nats.backends.base import Record, Write
from asyncmq_nats.exceptions import BackendError, InvalidJob
from asyncmq_nats.jobs import Job
from asyncmq_nats.states import State
from asyncmq_nats.store.commit import look_for
from asyncmq_nats.store.many import for_each
from asyncmq_nats.store.queue_store import QueueStore
from asyncmq_nats.store.records import MARKER_TTL, delayed_write, without_markers
from asyncmq_nats.transitions.parked import ParkedJobs
from asyncmq_nats.transitions.waits import Parent, Wait, place_of, texts
from asyncmq_nats.wire.codec import load_json
from asyncmq_nats.wire.keys import decode_token, encode_token

__all__ = ["MARKER_TTL", "Dependencies", "delayed_write"]

CHILDREN_PER_READ: Final = 100
"""Each needs two filters."""
DELETE_LIMIT: Final = 20
"""Above this number, records are removed by a purge, and markers by their time to live."""


class Dependencies:
    """The edges between the jobs of one queue."""

    def __init__(self, store: QueueStore) -> None:
        self._store = store
        self._keys = store.keys
        self.parked = ParkedJobs(store)

    async def release(self, token: str, known: Sequence[Record] = ()) -> None:
        """Tell the children of a job that it has ended: each runs, fails, or goes on waiting.

        Repeatable. The children of those that fail for it are told as well.

        Args:
            token: of the job.
            known: its outcome and all its edges, if the caller knows them: they are not read then.

        Raises:
            BackendError: its outcome is not visible.
        """
        ended = await self._release_one(token, known)
        while ended:
            ended += await self._release_one(ended.pop())

    async def _release_one(self, token: str, known: Sequence[Record] = ()) -> list[str]:
        """Return the children that have ended because this parent failed."""
        keys = self._keys
        records = known or await self._store.last_when(
            lambda found: self._outcome_in(found) is not None, keys.done_all(token)
        )
        outcome = self._outcome_in(records)
        if outcome is None:
            raise BackendError(
                f"the outcome of job {decode_token(token)!r} is not visible yet: "
                "those that wait for it are told later"
            )
        data = _json(outcome.body)
        parent = Parent(
            decode_token(token),
            keys.outcome_state(outcome.subject),
            data.get("result"),
            outcome.sequence,
            outcome.subject,
        )
        # These are all edges: none is added after an outcome.
        edges = [record for record in records if keys.is_edge(record.subject)]
        children = self._children(data, edges)
        failed = await self._tell(parent, [each for each, place in children.items() if not place])
        failed += await self._tell_wide(
            parent, {c: place for c, place in children.items() if place}
        )
        if parent.completed:
            await self._remove_edges(token, edges)
        return failed

    def _children(self, data: dict[str, Any], edges: Sequence[Record]) -> dict[str, str]:
        """Return the tokens of the children; those with many parents with the part of this one."""
        places = data.get("wide_children")
        places = places if isinstance(places, dict) else {}
        children = {
            encode_token(child): place_of(places.get(child))
            for child in texts(data.get("children"))
        }
        for edge in edges:
            child = self._keys.parse(edge.subject).child
            children[child] = place_of(_json(edge.body).get("wait"))
        return children

    async def _tell(self, parent: Parent, children: Sequence[str]) -> list[str]:
        failed: list[str] = []

        async def tell(child: str) -> None:
            if await self.parked.tell(parent, child, found[child]):
                failed.append(child)

        for start in range(0, len(children), CHILDREN_PER_READ):
            part = children[start : start + CHILDREN_PER_READ]
            found = await self.parked.read(parent.outcome, part)
            await for_each(tell, part)
        return failed

    async def _tell_wide(self, parent: Parent, children: dict[str, str]) -> list[str]:
        failed: list[str] = []

        async def tell(child: str) -> None:
            if await self.parked.tell_wide(parent, child, children[child]) is Wait.FAILS:
                failed.append(child)

        await for_each(tell, list(children))
        return failed

    async def _remove_edges(self, token: str, edges: Sequence[Record]) -> None:
        if len(edges) > DELETE_LIMIT:
            await self._store.purge(self._keys.edge(token, "*"))
        else:
            await for_each(self._store.delete, edges)

    def _outcome_in(self, records: Sequence[Record]) -> Record | None:
        return next(
            (
                record
                for record in without_markers(records)
                if self._keys.outcome_state(record.subject)
            ),
            None,
        )

    async def forget(self, token: str) -> None:
        """Remove the parts of a job with many parents that was removed or cancelled."""
        await self.parked.waits.remove(token)

    async def write_and_sweep(self, *writes: Write) -> None:
        """Write a batch, and remove its markers, unless they are many.

        They would count as records for the second that they live.
        """
        last = await self._store.write(*writes)
        # The sequences of a batch are consecutive.
        markers = [last - number for number, write in enumerate(reversed(writes)) if write.marker]
        if len(markers) <= DELETE_LIMIT:
            delete = partial(self._store.backend.delete, self._keys.bucket_log)
            await for_each(delete, markers)

    async def results(self, job: Job) -> dict[str, Any]:
        """Return the results of the jobs that a job depends on, by id; only of those completed."""
        missing = [parent for parent in job.depends_on or () if parent not in job.parent_results]
        keys = [self._keys.outcome(encode_token(parent), State.COMPLETED) for parent in missing]
        records = await look_for(partial(self._store.last_of_many, keys)) if keys else []
        read = {
            decode_token(self._keys.token(record.subject)): _json(record.body).get("result")
            for record in without_markers(records)
        }
        known = job.parent_results | read
        return {parent: known[parent] for parent in job.depends_on or () if parent in known}


def _json(body: bytes) -> dict[str, Any]:
    """Return the object in a record; of junk nothing."""
    try:
        return load_json(body)
    except InvalidJob:
        return {}
