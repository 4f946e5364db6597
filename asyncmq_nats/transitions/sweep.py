"""A cancel, or a retry by hand, of many jobs that a search has found.

Their records are known, so nothing is read first: many writes are under way at a time, each of
which expects that nothing about the end of its job has changed. What is refused, and what is not
plain, is left to the caller, who takes the way of one job (`cancel.py`). If this process dies in
between, a cancelled job may still run, and its result is refused; a promoter goes on with a retry
that was released, and any other can be repeated.
"""

from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, Final

from asyncmq_nats.backends.base import Expect, Write
from asyncmq_nats.exceptions import AsyncMQError, InvalidJob, PayloadTooLarge, WriteRefused
from asyncmq_nats.states import OUTCOMES, Place, State
from asyncmq_nats.store.many import for_each
from asyncmq_nats.store.queue_store import QueueStore
from asyncmq_nats.store.reads import Inspection
from asyncmq_nats.store.records import without_markers
from asyncmq_nats.store.search import Found
from asyncmq_nats.store.snapshot import count_reruns
from asyncmq_nats.transitions.cancel import Administration
from asyncmq_nats.transitions.claim import CLAIM_TTL, Claim
from asyncmq_nats.transitions.clean import PURGED_SHARE, is_idle
from asyncmq_nats.transitions.timers import is_ringing, remove_overtaken
from asyncmq_nats.wire.codec import load_json

__all__ = ["Sweep"]

PART: Final = 250
"""Jobs that are written together."""
PART_BYTES: Final = 4 * 1024 * 1024
"""The size of their records, about."""
PARTS_AT_ONCE: Final = 3
"""Parts under way, each in another step: their jobs are left half done if this process dies."""
SMALL_PART: Final = 50
"""Jobs of which single writes cost the server less than a batch: that takes it some 7 ms."""
NOT_PLAIN: Final = frozenset({"children", "wide_children", "wide", "truncated"})
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

    @property
    def reruns(self) -> int:
        reruns = self.data.get("reruns")
        return reruns if isinstance(reruns, int) else 0


Act = Callable[[list[_Item]], Awaitable[tuple[list[_Item], AsyncMQError | None]]]
"""Acts on jobs, and returns those that it has changed, and an error that is no refusal."""


class Sweep:
    """Changes many jobs of one queue. Each call returns the ids of those that it has changed.

    It is given one page of a search: records of one list, oldest first.
    """

    def __init__(
        self,
        store: QueueStore,
        administration: Administration,
        inspection: Inspection,
        signal_cancel: Callable[[str], Awaitable[None]],
    ) -> None:
        """`signal_cancel`: tells workers of a cancelled job that one of them may run."""
        self._store = store
        self._signal_cancel = signal_cancel
        self._inspection = inspection
        self._backend = store.backend
        self._keys = store.keys
        self._administration = administration

    async def cancel(self, found: Sequence[Found]) -> set[str]:
        """Cancel jobs that wait or are delayed, and that no other job waits for."""

        def is_meant(each: Found) -> bool:
            if each.source.place is Place.DELAYED:
                return not is_ringing(self._store, each.record)
            return each.state is State.WAITING

        items = self._read_all(filter(is_meant, found))
        if not await self._can_be_purged(items):
            return await self._in_parts(self._cancel_some, items)
        return await self._cancel_and_purge(items)

    async def retry(self, found: Sequence[Found]) -> set[str]:
        """Run jobs again that ended badly."""

        def is_meant(each: Found) -> bool:
            return each.state in OUTCOMES and each.state is not State.COMPLETED

        return await self._in_parts(self._retry_some, self._read_all(filter(is_meant, found)))

    def _read_all(self, found: Iterable[Found]) -> list[_Item]:
        return [item for each in found if (item := self._read(each)) is not None]

    def _read(self, found: Found) -> _Item | None:
        try:
            data = load_json(found.record.body)
        except InvalidJob:
            return None
        if any(data[name] for name in data.keys() & NOT_PLAIN):
            return None
        return _Item(found, found.token, data)

    async def _in_parts(self, act: Act, items: Sequence[_Item]) -> set[str]:
        done, error = await self._run_parts(act, items)
        if error is not None:
            raise error
        return {item.found.job_id for item in done}

    async def _run_parts(
        self, act: Act, items: Sequence[_Item]
    ) -> tuple[list[_Item], AsyncMQError | None]:
        """Act on parts, a few at a time. After an error those under way are finished."""
        done, errors = list[_Item](), list[AsyncMQError]()

        async def act_on(part: list[_Item]) -> None:
            if errors:
                return
            try:
                acted_on, error = await act(part)
            except AsyncMQError as failure:
                acted_on, error = [], failure
            done.extend(acted_on)
            if error is not None:
                errors.append(error)

        await for_each(act_on, list(_split(items)), limit=PARTS_AT_ONCE)
        return done, errors[0] if errors else None

    # -- cancel

    async def _cancel_some(self, part: list[_Item]) -> tuple[list[_Item], AsyncMQError | None]:
        cancelled, error = await self._write(part, self._cancellation)
        await self._remove(cancelled, set())
        return cancelled, error

    async def _cancel_and_purge(self, items: Sequence[_Item]) -> set[str]:
        write = partial(self._write, write=self._cancellation)
        cancelled, error = await self._run_parts(write, items)
        cancelled.sort(key=lambda item: item.sequence)
        purged, left = await self._purge(cancelled), cancelled
        if purged and not await self._inspection.count(f"later_{Place.RELEASED}"):
            # No worker had one of them when it was removed, so none has put it off or runs it.
            left = [item for item in cancelled if item.sequence not in purged]
        await self._remove(left, purged)
        if error is not None:
            raise error
        return {item.found.job_id for item in cancelled}

    async def _can_be_purged(self, items: Sequence[_Item]) -> bool:
        """Return whether to remove ready jobs by a purge: it costs less, and no worker is there.

        Not in a cluster, as for `Cleanup`. To the server a purge costs as much as the tier is long.
        """
        if not items or items[0].found.source.tier is None or self._backend.reads_may_lag:
            return False
        priority, _ = self._keys.split_ready(items[0].found.record.subject)
        tier = await self._store.look_up_tier(priority)
        return tier is not None and is_idle(tier) and len(items) >= tier.pending * PURGED_SHARE

    async def _purge(self, cancelled: Sequence[_Item]) -> set[int]:
        """Remove the first jobs of a tier by one purge, as far as all of them are cancelled ones.

        Return the sequences of those that it has certainly removed.
        """
        if not await self._can_be_purged(cancelled):
            return set()
        source = cancelled[0].found.source
        run = [cancelled[0].sequence]
        for one, next_one in pairwise(cancelled):
            if next_one.found.before != one.sequence:
                break
            run.append(next_one.sequence)
        # No record comes before the oldest one, and none was passed over between these.
        is_gapless = run[-1] - run[0] + 1 == len(run)
        for filter in (">", source.filter) if is_gapless else (source.filter,):
            oldest = await self._backend.page(source.log, filter, limit=1, mostly=True)
            if oldest and oldest[0].sequence == run[0]:
                purged = await self._backend.purge(source.log, filter, before=run[-1] + 1)
                return set(run) if purged == len(run) else set()
        return set()

    def _cancellation(self, item: _Item) -> Write:
        is_delayed = item.found.source.place is Place.DELAYED
        return self._administration.cancellation(
            item.token,
            item.data,
            Expect(self._keys.done_all(item.token)),
            removes=item.found.record.subject if is_delayed else None,
        )

    async def _remove(self, cancelled: Sequence[_Item], purged: set[int]) -> None:
        """Remove what is left of cancelled jobs. `purged`: ready jobs that are gone."""
        waited = [item.sequence for item in cancelled if item.found.source.tier is not None]
        left = [sequence for sequence in waited if sequence not in purged]
        removed = purged | set(await self._backend.delete_many(self._keys.ready_log, left))
        await self._remove_rest(self._keys.bucket_log, self._keys.later_all, cancelled)
        # Nothing of a job becomes ready while its message of an earlier attempt is there.
        moved = [
            item
            for item in cancelled
            if item.found.source.tier is None or item.sequence not in removed
        ]
        became_ready = await self._remove_rest(self._keys.ready_log, self._keys.ready_any, moved)
        await remove_overtaken(self._store, [item.found.record for item in cancelled])
        # A worker has what it runs: its message is there until that has ended.
        for item in cancelled:
            if item.found.source.tier is not None or item.token in became_ready:
                await self._signal_cancel(item.found.job_id)

    async def _remove_rest(
        self, log: str, filter: Callable[[str], str], cancelled: Sequence[_Item]
    ) -> set[str]:
        """Remove what else is there of cancelled jobs; what a retry has made of them since stays.

        Before this, a worker may have put its job off, or a timer may have released it. Return the
        tokens of the jobs of which something was there.
        """
        reruns = {item.token: item.reruns for item in cancelled}
        records = await self._store.last_of_many(map(filter, reruns))
        left = {
            record.sequence: token
            for record in without_markers(records)
            for token in [self._keys.token(record.subject)]
            if count_reruns(record.body) <= reruns[token]
        }
        await self._backend.delete_many(log, list(left))
        return set(left.values())

    # -- retry

    async def _retry_some(self, part: list[_Item]) -> tuple[list[_Item], AsyncMQError | None]:
        keys = self._keys
        claim = Claim.on_all_until(await self._backend.last_sequence(keys.ready_log)).encode()

        def fence(item: _Item) -> Write:
            expect = Expect(keys.done_all(item.token), item.sequence)
            return Write(keys.claim(item.token), claim, expect, ttl=CLAIM_TTL)

        def release(item: _Item) -> Write:
            key, expect = keys.later(item.token, Place.RELEASED), keys.later_all(item.token)
            body = self._administration.renewed(item.data)
            return Write(key, body, Expect(expect), beside=True)

        released, error = part, None
        writes = [write(item) for item in part for write in (fence, release)]
        if not await self._write_batch(part, writes):
            fenced, error = await self._write(part, fence)
            released, second = await self._write(fenced, release)
            error = error or second
        await self._backend.delete_many(keys.bucket_log, [item.sequence for item in released])
        return released, error

    async def _write_batch(self, part: Sequence[_Item], writes: Sequence[Write]) -> bool:
        """Write all in one batch, and return whether it was stored; if not, write one by one.

        In a cluster, older servers mix up what the writes of a batch expect.
        """
        if len(part) < SMALL_PART or self._backend.reads_may_lag:
            return False
        try:
            await self._backend.write(self._keys.bucket_log, *writes)
        except (WriteRefused, PayloadTooLarge):  # one of them is not as it was found
            return False
        return True

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


def _split(items: Iterable[_Item]) -> Iterator[list[_Item]]:
    part, size = list[_Item](), 0
    for item in items:
        more = len(item.found.record.body)
        if part and (len(part) == PART or size + more > PART_BYTES):
            yield part
            part, size = [], 0
        part.append(item)
        size += more
    if part:
        yield part
