"""The same change to all jobs that match a filter, or to those of some ids."""

from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from typing import Final

from anyio import CancelScope
from anyio.lowlevel import checkpoint_if_cancelled

from asyncmq_nats._concurrency import open_task_group
from asyncmq_nats.states import OUTCOMES, State
from asyncmq_nats.store.many import for_each
from asyncmq_nats.store.search import Found
from asyncmq_nats.transitions.clean import Cleanup, Progress

__all__ = [
    "ACTION_STATES",
    "JOBS_PER_PAGE",
    "ActOnFound",
    "Action",
    "Applied",
    "apply_to_ids",
    "apply_to_matches",
]

ACTIONS_UNDER_WAY: Final = 32
JOBS_PER_PAGE: Final = 2_000
"""Small jobs that are acted on together: an interruption waits for them."""


class Action(StrEnum):
    """The actions that can be applied to many jobs at once."""

    RETRY = "retry"
    CANCEL = "cancel"
    REMOVE = "remove"
    PROMOTE = "promote"


ACTION_STATES: Final[dict[str, tuple[State, ...]]] = {
    Action.RETRY: (State.FAILED, State.EXPIRED),
    Action.CANCEL: (State.WAITING, State.ACTIVE, State.DELAYED, State.WAITING_CHILDREN),
    Action.REMOVE: (State.WAITING, State.DELAYED, State.WAITING_CHILDREN, *OUTCOMES),
    Action.PROMOTE: (State.DELAYED,),
}
"""The states that are searched when the filter names none."""


@dataclass(frozen=True, slots=True)
class Applied:
    """The result of `Queue.apply`.

    `matched`: jobs that match. `done`: those that were changed; the others had moved on, or could
    not be changed. `until`: the time before which they reached their state (Unix seconds): with it
    as the filter's `until`, a run that was interrupted goes on, and finds none that reached it
    since.
    """

    matched: int
    done: int
    until: float | None = None


Act = Callable[[str], Awaitable[bool]]
ActOnFound = Callable[[Sequence[Found]], Awaitable[set[str]]]
"""Changes many jobs, and returns the ids of those that it has changed."""


@dataclass(slots=True)
class _Tally:
    progress: Progress | None
    matched: int = 0
    done: int = 0
    wide: bool = False
    """Whether one of them has many parents, which have records of their own."""

    async def act(self, act: Act, job_ids: Sequence[str]) -> None:
        async def act_on(job_id: str) -> None:
            with CancelScope(shield=True):  # so that an interruption is told the exact number
                was_done = await act(job_id)  # first: `+=` reads its left side before it awaits
                self.done += was_done
                self.count(1)

        await for_each(act_on, job_ids, limit=ACTIONS_UNDER_WAY)

    async def act_on_found(
        self, found: Sequence[Found], act_on_many: ActOnFound | None, act: Act
    ) -> None:
        done = set[str]()
        if act_on_many is not None:
            with CancelScope(shield=True):  # as above, and no job is left half done
                done = await act_on_many(found)
                self.done += len(done)
                self.count(len(done))
        ids = [each.job_id for each in found]
        await self.act(act, [job_id for job_id in ids if job_id not in done])

    def count(self, matched: int) -> None:
        self.matched += matched
        if self.progress is not None and matched:
            self.progress(self.matched)


async def apply_to_ids(
    job_ids: Iterable[str], act: Act, *, dry_run: bool, progress: Progress | None
) -> Applied:
    """Apply an action to some jobs, each once."""
    tally, ids = _Tally(progress), list(dict.fromkeys(job_ids))
    if dry_run:
        return Applied(len(ids), 0)
    for start in range(0, len(ids), ACTIONS_UNDER_WAY):
        await tally.act(act, ids[start : start + ACTIONS_UNDER_WAY])
    return Applied(tally.matched, tally.done)


async def apply_to_matches(
    pages: AsyncIterator[list[Found]],
    act: Act | Cleanup,
    *,
    act_on_many: ActOnFound | None = None,
    until: float,
    dry_run: bool,
    limit: int | None,
    progress: Progress | None,
) -> Applied:
    """Apply an action to the jobs of a search; to remove them, give the `Cleanup`.

    `act_on_many`: called first with each page; `act` is called for the jobs that it left.
    The `Cleanup` removes the very records that were found: a job that has been retried since stays.
    """
    tally = _Tally(progress)

    async def act_on(found: Sequence[Found]) -> None:
        if dry_run:
            tally.count(len(found))
        elif isinstance(act, Cleanup):
            await _remove(act, found, tally)
        elif found:
            await tally.act_on_found(found, act_on_many, act)

    page = await anext(pages, None)
    while page is not None:
        found = page if limit is None else page[: limit - tally.matched]
        if limit is not None and tally.matched + len(found) >= limit:
            await act_on(found)
            break
        page = await _act_and_read(partial(act_on, found), pages)
    if isinstance(act, Cleanup) and tally.wide:
        await act.remove_orphans()
    return Applied(tally.matched, tally.done, until)


async def _act_and_read(
    act: Callable[[], Awaitable[None]], pages: AsyncIterator[list[Found]]
) -> list[Found] | None:
    """Act on one page while the next one is read, and return that; `None` if there is none."""
    page: list[Found] | None = None

    async def read() -> None:
        nonlocal page
        page = await anext(pages, None)

    async with open_task_group() as group:
        group.start_soon(read)
        await act()
    await checkpoint_if_cancelled()  # only the reading was: it has no page to show for it
    return page


async def _remove(cleanup: Cleanup, found: Sequence[Found], tally: _Tally) -> None:
    tally.wide |= any(b'"wide"' in each.record.body and bool(each.job.wide) for each in found)
    if found:  # a page is of one source
        records = [each.record for each in found]
        with CancelScope(shield=True):
            removed = await cleanup.remove_records(found[0].source, records)
            tally.done += len(removed)
            tally.count(len(found))
