"""Jobs that match a filter, found page by page.

The first ones at once, never a whole queue in memory.
"""

from collections.abc import AsyncGenerator, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, Final

from asyncmq_nats.backends.base import Record
from asyncmq_nats.exceptions import AssetMissing
from asyncmq_nats.jobs import Job
from asyncmq_nats.search import JobFilter
from asyncmq_nats.states import State
from asyncmq_nats.store.pages import JobLists, Source
from asyncmq_nats.store.reads import PAGE_SIZE
from asyncmq_nats.wire.codec import load_json
from asyncmq_nats.wire.keys import decode_token

__all__ = ["Found", "Search"]

FIRST_PAGE: Final = 100
"""Records of the first page of each list: a small answer is a fast one."""


@dataclass(slots=True, eq=False)
class Found:
    """A job, and the record that it was found in.

    `before`: sequence of the record of the source that comes right before it, whether it matches or
    not; 0 for the first of a page.
    """

    source: Source
    record: Record
    state: State
    before: int
    _lists: JobLists = field(repr=False)
    _job: Job | None = None

    @property
    def token(self) -> str:
        """The token of the job."""
        return self._lists.token_in(self.source, self.record)

    @property
    def job_id(self) -> str:
        """The id of the job."""
        return decode_token(self.token)

    @property
    def job(self) -> Job:
        """All of the job: read when it is asked for, which takes longer than to find it."""
        if self._job is None:
            [self._job] = self._lists.jobs_in(self.source, [self.record], self.state)
        return self._job

    def stored(self) -> dict[str, Any]:
        """Return all that is stored of the job, with what its key and its record say.

        Raises:
            InvalidJob: it is no job: a stranger wrote it.
        """
        job = self.job
        known = {"id": job.job_id, "priority": job.priority, "created_at": job.created_at}
        return load_json(self.record.body) | known


class Search:
    """The search in one queue."""

    def __init__(self, lists: JobLists) -> None:
        self._lists = lists

    async def pages(
        self,
        where: JobFilter,
        states: Sequence[State],
        *,
        descending: bool,
        running: Collection[str] = (),
        largest: int = PAGE_SIZE,
    ) -> AsyncGenerator[list[Found], None]:
        """Yield what matches, a list for each page that was read; many of them may be empty.

        `states`: where to look, in this order. `running`: see `JobFilter.matches`. `largest`: see
        `JobLists.source_pages`.
        """
        bounds = await self._bounds(where)
        for state in states:
            sources = [bounds.within(source) for source in await self._lists.sources(state)]
            for source in reversed(sources) if descending else sources:
                async for records in self._lists.source_pages(
                    source, FIRST_PAGE, descending=descending, largest=largest
                ):
                    yield self._matching(source, records, state, where, running)

    def _matching(
        self,
        source: Source,
        records: Sequence[Record],
        state: State,
        where: JobFilter,
        running: Collection[str],
    ) -> list[Found]:
        found, before, lists = list[Found](), 0, self._lists
        for record in records:
            if not record.marker and where.may_match(record.subject, record.body):
                known = None if where.looks_into_jobs else lists.state_of(source, record, state)
                if known is not None:
                    if where.includes(known, record.time):
                        found.append(Found(source, record, known, before, lists))
                else:
                    found += [
                        Found(source, record, job.status, before, lists, job)
                        for job in lists.jobs_in(source, [record], state)
                        if where.matches(job, record.time, running)
                    ]
            before = record.sequence
        return found

    async def _bounds(self, where: JobFilter) -> "_Bounds":
        """Return the range of sequences that holds the records of the filter's times."""
        first: dict[str, int] = {}
        last: dict[str, int] = {}
        for log in self._lists.logs if (where.since, where.until) != (None, None) else ():
            with suppress(AssetMissing):
                if where.since is not None:
                    first[log] = await self._lists.first_sequence_since(log, where.since)
                if where.until is not None:
                    last[log] = await self._lists.first_sequence_since(log, where.until) - 1
        return _Bounds(first, last)


@dataclass(frozen=True, slots=True)
class _Bounds:
    """The first and the last sequence of each log that matter."""

    first: Mapping[str, int]
    last: Mapping[str, int]

    def within(self, source: Source) -> Source:
        """Return the part of a source that is within."""
        lasts = [end for end in (source.last, self.last.get(source.log)) if end is not None]
        first = max(source.first, self.first.get(source.log, 1))
        return replace(source, first=first, last=min(lasts, default=None))
