"""Removing many jobs at once: clean, drain, obliterate."""

from contextlib import suppress
from math import inf

from asyncmq_nats.backends.base import Backend, Expect, Write
from asyncmq_nats.exceptions import WriteRefused
from asyncmq_nats.states import OUTCOMES, Place, State
from asyncmq_nats.store.topology import QueueAssets
from asyncmq_nats.wire.keys import QueueSubjects, decode_token, tier_name

__all__ = ["Cleanup"]

from asyncmq_nats.transitions.cancel import PLACES_OF, is_delayed
from asyncmq_nats.transitions.waits import Waits


class Cleanup:
    """Removes many jobs of one queue."""

    def __init__(self, backend: Backend, subjects: QueueSubjects, assets: QueueAssets) -> None:
        self._backend = backend
        self._subjects = subjects
        self._assets = assets

    async def clean(self, state: State, older_than: float | None) -> int:
        """Remove the jobs that came to a state before a time (Unix seconds), or all of them; return how many.

        For outcomes one look-up and one purge, whatever their number. A job that waits is removed record by record, since those that run
        are in the same tier.
        """
        if state in (State.WAITING, State.ACTIVE):
            return len(await self.clean_jobs(state, inf if older_than is None else older_than, 0))
        filters = (
            [self._subjects.outcomes(state)]
            if state in OUTCOMES
            else [self._subjects.place(p) for p in PLACES_OF[state]]
        )
        removed = sum([await self._purge(filter, older_than) for filter in filters])
        if state is State.WAITING_CHILDREN:
            await Waits(self._backend, self._subjects).remove_orphans()
        return removed

    async def _purge(self, filter: str, older_than: float | None) -> int:
        before = None
        if older_than is not None:
            end = (
                await self._backend.last_sequence(self._subjects.bucket_log) + 1
            )  # what comes after this is too young
            before = (
                await self._backend.first_since(self._subjects.bucket_log, filter, older_than)
                or end
            )
        return await self._backend.purge(self._subjects.bucket_log, filter, before=before)

    async def _drain_tiers(self, older_than: float = inf, limit: int = 0) -> list[str]:
        """Remove the jobs that wait to be run and that no worker has, at most `limit` (0: all); return their ids."""
        log = self._subjects.ready_log
        removed: list[str] = []
        for priority in await self._assets.list_tiers():
            tier = await self._backend.look_up(log, tier_name(priority))
            start = 1 if tier is None else tier.delivered_sequence + 1
            while page := await self._backend.page(
                log, self._subjects.tier(priority), from_sequence=start, limit=500, mostly=True
            ):
                for record in page:
                    if limit and len(removed) == limit:
                        return removed
                    if record.time < older_than and await self._backend.delete(
                        log, record.sequence
                    ):
                        removed.append(decode_token(self._subjects.split_ready(record.subject)[1]))
                start = page[-1].sequence + 1
        return removed

    async def drain(self, *, include_delayed: bool) -> list[str]:
        """Remove the jobs that wait to be run, and if wished those that are delayed; return their ids. Jobs that run stay."""
        removed = await self._drain_tiers()
        if not include_delayed:
            return removed + await self._remove_released()
        for place in (Place.RELEASED, Place.DELAYED):
            removed += await self._remove_matching(self._subjects.place(place))
        return removed

    async def _remove_released(self) -> list[str]:
        """Remove the jobs that are about to become ready, and leave those that were released a little before their time."""
        log, filter, start = self._subjects.bucket_log, self._subjects.place(Place.RELEASED), 1
        ids: list[str] = []
        while page := await self._backend.page(log, filter, from_sequence=start, limit=500):
            due = [
                record
                for record in page
                if not record.marker and not is_delayed(record, self._subjects, self._backend.now())
            ]
            removed = [record for record in due if await self._backend.delete(log, record.sequence)]
            ids += [decode_token(self._subjects.token(record.subject)) for record in removed]
            start = page[-1].sequence + 1
        return ids

    async def _remove_matching(self, filter: str) -> list[str]:
        ids: list[str] = []
        start = 1
        while page := await self._backend.page(
            self._subjects.bucket_log, filter, from_sequence=start, limit=1000, mostly=True
        ):
            ids += [
                decode_token(self._subjects.token(record.subject))
                for record in page
                if not record.marker
            ]
            start = page[-1].sequence + 1
        await self._backend.purge(self._subjects.bucket_log, filter, before=start)
        return ids

    async def clean_jobs(self, state: State, older_than: float, limit: int) -> list[str]:
        """Remove up to `limit` (0: any number of) jobs that came to a state before a time, the oldest first; return their ids."""
        filters = (
            [self._subjects.outcomes(state)]
            if state in OUTCOMES
            else [self._subjects.place(p) for p in PLACES_OF.get(state, ())]
        )
        ids = await self._drain_tiers(older_than, limit) if state is State.WAITING else []
        for filter in filters:
            start = 1
            while page := await self._backend.page(
                self._subjects.bucket_log, filter, from_sequence=start, limit=1000, mostly=True
            ):
                old = [record for record in page if record.time < older_than and not record.marker]
                old = old[: limit - len(ids)] if limit else old
                if not old:
                    break
                ids += [decode_token(self._subjects.token(record.subject)) for record in old]
                start = old[-1].sequence + 1
                await self._backend.purge(self._subjects.bucket_log, filter, before=start)
        if state is State.WAITING_CHILDREN:
            await Waits(self._backend, self._subjects).remove_orphans()
        return ids

    async def obliterate(self) -> None:
        """Remove everything of the queue: all jobs, repeatables, windows, a pause.

        Its assets stay, for the workers that run, and so does its secret: they make ids with it.
        """
        log, key = self._subjects.bucket_log, self._subjects.secret
        secrets = await self._backend.last(log, key)
        await self._backend.purge(self._subjects.ready_log, self._subjects.all_ready)
        await self._backend.purge(log, self._subjects.all_bucket)
        for secret in secrets:
            with suppress(WriteRefused):  # a worker was faster
                await self._backend.write(log, Write(key, secret.body, Expect(key)))
