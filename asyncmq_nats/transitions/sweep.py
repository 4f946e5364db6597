"""A cancel, or a retry by hand, of many jobs that a search has found.

Their records are known, so nothing is read first: single writes, many under way at a time, each
of which expects that nothing about the end of its job has changed. What is refused, and what is
not plain, is left to the caller, who takes the way of one job (`cancel.py`). If this process dies
in between, a cancelled job may still run, and its result is refused; a promoter goes on with a
retry that was released, and any other can be repeated.
"""

from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from asyncmq_nats.backends.base import Expect, Write
from asyncmq_nats.exceptions import AsyncMQError, InvalidJob, WriteRefused
from asyncmq_nats.states import OUTCOMES, Place, State
from asyncmq_nats.store.queue_store import QueueStore
from asyncmq_nats.store.records import without_markers
from asyncmq_nats.store.search import Found
from asyncmq_nats.store.snapshot import count_reruns
from asyncmq_nats.transitions.cancel import Administration
from asyncmq_nats.transitions.claim import CLAIM_TTL, Claim
from asyncmq_nats.transitions.timers import is_ringing, remove_overtaken
from asyncmq_nats.wire.codec import load_json

__all__ = ["Sweep"]

PART: Final = 128
"""Jobs between two of their writes at a time: those are left half done if this process dies."""
NOT_PLAIN: Final = ("children", "wide_children", "wide", "truncated")
"""Members of a job of which more is to be done than to write its records."""


@dataclass(frozen=True, slots=True)
class _Item:
    """A job that was found. `data`: what its record says."""

    found: Found
    token: str
    data: dict[str, Any]

    @property
    def sequence(self) -> int:
        return self.found.record.sequence


class Sweep:
    """Changes many jobs of one queue. Each call returns the ids of those that it has changed."""

    def __init__(self, store: QueueStore, administration: Administration) -> None:
        self._store = store
        self._backend = store.backend
        self._keys = store.keys
        self._administration = administration

    async def cancel(self, found: Sequence[Found]) -> set[str]:
        """Cancel jobs that wait or are delayed, and that no other job waits for."""

        def is_meant(each: Found) -> bool:
            if each.source.place is Place.DELAYED:
                return not is_ringing(self._store, each.record)
            return each.job.status is State.WAITING

        return await self._in_parts(self._cancel_some, filter(is_meant, found))

    async def retry(self, found: Sequence[Found]) -> set[str]:
        """Run jobs again that ended badly."""

        def is_meant(each: Found) -> bool:
            return each.job.status in OUTCOMES and each.job.status is not State.COMPLETED

        return await self._in_parts(self._retry_some, filter(is_meant, found))

    async def _in_parts(
        self, act: Callable[[list[_Item]], Awaitable[list[_Item]]], found: Iterator[Found]
    ) -> set[str]:
        items = [item for each in found if (item := self._read(each)) is not None]
        done: set[str] = set()
        for start in range(0, len(items), PART):
            acted_on = await act(items[start : start + PART])
            done.update(item.found.job.job_id for item in acted_on)
        return done

    def _read(self, found: Found) -> _Item | None:
        try:
            data = load_json(found.record.body)
        except InvalidJob:
            return None
        if any(data.get(name) for name in NOT_PLAIN):
            return None
        return _Item(found, self._keys.token(found.record.subject), data)

    # -- cancel

    async def _cancel_some(self, part: list[_Item]) -> list[_Item]:
        cancelled, error = await self._write(part, self._cancellation)
        ready = [item.sequence for item in cancelled if item.found.source.tier is not None]
        removed = set(await self._backend.delete_many(self._keys.ready_log, ready))
        await self._remove_rest(self._keys.bucket_log, self._keys.later_all, cancelled)
        # Nothing of a job becomes ready while its message of an earlier attempt is there.
        moved = [
            item
            for item in cancelled
            if item.found.source.tier is None or item.sequence not in removed
        ]
        await self._remove_rest(self._keys.ready_log, self._keys.ready_any, moved)
        await remove_overtaken(self._store, [item.found.record for item in cancelled])
        if error is not None:
            raise error
        return cancelled

    def _cancellation(self, item: _Item) -> Write:
        is_delayed = item.found.source.place is Place.DELAYED
        return self._administration.cancellation(
            item.token,
            item.data,
            Expect(self._keys.done_all(item.token)),
            removes=item.found.record.subject if is_delayed else None,
        )

    async def _remove_rest(
        self, log: str, filter: Callable[[str], str], cancelled: Sequence[_Item]
    ) -> None:
        """Remove what else is there of cancelled jobs; what a retry has made of them since stays.

        Before this, a worker may have put its job off, or a timer may have released it.
        """
        reruns = {item.token: count_reruns(item.found.record.body) for item in cancelled}
        records = await self._store.last_of_many(map(filter, reruns))
        left = [
            record.sequence
            for record in without_markers(records)
            if count_reruns(record.body) <= reruns[self._keys.token(record.subject)]
        ]
        await self._backend.delete_many(log, left)

    # -- retry

    async def _retry_some(self, part: list[_Item]) -> list[_Item]:
        log, keys = self._keys.bucket_log, self._keys
        claim = Claim.on_all_until(await self._backend.last_sequence(keys.ready_log)).encode()

        def fence(item: _Item) -> Write:
            expect = Expect(keys.done_all(item.token), item.sequence)
            return Write(keys.claim(item.token), claim, expect, ttl=CLAIM_TTL)

        def release(item: _Item) -> Write:
            key, expect = keys.later(item.token, Place.RELEASED), keys.later_all(item.token)
            body = self._administration.renewed(item.data)
            return Write(key, body, Expect(expect), beside=True)

        fenced, error = await self._write(part, fence)
        released, second = await self._write(fenced, release)
        await self._backend.delete_many(log, [item.sequence for item in released])
        if error is not None or second is not None:
            raise error or second  # type: ignore[misc]
        return released

    async def _write(
        self, items: Sequence[_Item], write: Callable[[_Item], Write]
    ) -> tuple[list[_Item], AsyncMQError | None]:
        """Return those whose write was stored, and the first error that is no refusal."""
        writes, stored, error = [write(item) for item in items], [], None
        results = await self._backend.write_each(self._keys.bucket_log, writes)
        for item, result in zip(items, results, strict=True):
            if isinstance(result, int):
                stored.append(item)
            elif not isinstance(result, WriteRefused):
                error = error or result
        return stored, error
