"""Many jobs at once: parsed bulk entries, and batches that are all or nothing."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from types import MappingProxyType
from typing import Any, Final

import anyio
import anyio.lowlevel

from asyncmq_nats._arguments import WriteArguments, build_addition, checked_call, write_plainly
from asyncmq_nats._concurrency import open_task_group
from asyncmq_nats._new_jobs import Addition, JobTemplate, NewJob
from asyncmq_nats.backends.base import Staged
from asyncmq_nats.calls import Call, written
from asyncmq_nats.exceptions import AsyncMQError, BulkAddFailed, WriteRefused
from asyncmq_nats.jobs import new_job_id
from asyncmq_nats.store.commit import REPLICA_LAG_DELAYS, look_for, pause_after_refusal
from asyncmq_nats.transitions.add import BATCH_LIMIT, Additions, is_independent, is_plain
from asyncmq_nats.transitions.deduplicate import Window, take_window
from asyncmq_nats.transitions.series import SIMPLE, ClassesOf, Series, find_series

__all__ = ["NONE_STAGED", "Bulk", "EntryBuilder", "add_many", "check_entries"]

BATCHES_UNDER_WAY: Final = 5
PIECE: Final = 250
"""Jobs of a bulk that are sent together while the next ones are built; divides `BATCH_LIMIT`."""
STAGED_BATCHES: Final = 5
"""Batches of a bulk that are sent before all of it is known; others have room beside them."""
NONE_STAGED: Final[Mapping[int, Staged]] = MappingProxyType({})
ENTRY_KEYS: Final = frozenset(
    {
        "task_id",
        "args",
        "kwargs",
        "retries",
        "ttl",
        "backoff",
        "priority",
        "delay",
        "job_id",
        "jobId",
        "timeout",
        "depends_on",
        "on_parent_failure",
        "repeat_every",
        "meta",
        "deduplication",
        "debounce",
    }
)


class Bulk:
    """The jobs of one `add_bulk`. Nothing is stored before all entries are known to be sound.

    Of a series (see `series.py`) that is known before a job is built: each batch is stored while
    the next one is built. Of others, if all are plain or all are delayed, batches are sent
    meanwhile, and `add_many` commits them.
    """

    def __init__(
        self,
        additions: Additions,
        write: WriteArguments = write_plainly,
        queue: str = "",
        *,
        classes_of: ClassesOf = lambda *_: None,
        early: bool = True,
    ) -> None:
        """`early`: jobs may be sent as they are built. Not if a middleware sees them first."""
        self._additions, backend = additions, additions.store.backend
        self._builder = EntryBuilder(backend.now(), write, queue, latest=backend.now_at_most())
        self._classes_of = classes_of
        self._queue = queue
        self._early = early
        self.jobs: list[Addition] = []
        self.staged: dict[int, Staged] = {}
        """Batches that are on their way, by the index of their first job."""
        self.checked = 0
        """How many of the jobs were checked."""

    @property
    def windows(self) -> Mapping[int, Window]:
        """The deduplication windows, by index."""
        return self._builder.windows

    async def add_series(self, entries: Sequence[Mapping[str, Any] | Call[Any]]) -> list[str]:
        """Add the jobs of many entries that are a series, and return their ids.

        Of others return none: nothing was added.

        Raises:
            BulkAddFailed, AsyncMQError: as for `add_many`.
            ValueError, TypeError: as for `build`; nothing was added.
        """
        series = await self._find_series(entries) if self._early else []
        if not series or not self._is_sound(entries[0], series):
            return []
        errors: dict[int, Exception] = {}
        room = anyio.Semaphore(BATCHES_UNDER_WAY)

        async def commit(first: int, jobs: Sequence[Addition]) -> None:
            staged = self.staged.pop(first)
            try:
                await _try_batch(self._additions, first, jobs, staged, errors)
            finally:
                staged.drop()
                room.release()

        async with open_task_group() as group:
            for part in series:
                await room.acquire()
                first = len(self.jobs)
                await self._stage_series(first, part)
                group.start_soon(commit, first, self.jobs[first:])
        return _ids(self.jobs, errors)

    async def _find_series(self, entries: Sequence[Mapping[str, Any] | Call[Any]]) -> list[Series]:
        """Return what batches of the entries have in common; none if they are no series."""
        found: list[Series] = []
        for first in range(0, len(entries) if len(entries) >= PIECE else 0, BATCH_LIMIT):
            part = find_series(
                self._as_dicts(entries[first : first + BATCH_LIMIT]), self._classes_of
            )
            if part is None or (found and part.options != found[0].options):
                return []
            found.append(part)
            await anyio.lowlevel.checkpoint()
        return found

    def _as_dicts(self, entries: Sequence[Mapping[str, Any] | Call[Any]]) -> Sequence[Any]:
        """Return entries that are calls as dicts; none if one is for another queue."""
        if type(entries[0]) is not Call:
            return entries
        calls = [each for each in entries if type(each) is Call and each.queue == self._queue]
        return [
            {"task_id": each.task_id, "args": each.args, "kwargs": each.kwargs, **each.options}
            for each in (calls if len(calls) == len(entries) else ())
        ]

    def _is_sound(self, entry: Mapping[str, Any] | Call[Any], series: Sequence[Series]) -> bool:
        """Return whether no entry of a series can be refused. `entry`: the first.

        Raises:
            ValueError, TypeError: as for `build`.
        """
        job = self._builder.build(0, self._as_dicts([entry])[0])
        most = len(job.encode()) + max(part.most_bytes for part in series)
        return self._builder.can_repeat and most <= self._additions.size_limit

    async def _stage_series(self, first: int, series: Series) -> None:
        """Build and send a batch."""
        in_bucket = self._builder.delay_until is not None
        staged = self.staged[first] = await self._additions.stage(in_bucket=in_bucket)
        calls = series.calls()
        while jobs := [self._builder.repeat(*call) for call in islice(calls, PIECE)]:
            self.jobs += jobs
            await staged.add(*await self._additions.early_writes(jobs))

    async def build(self, entries: Iterable[Mapping[str, Any] | Call[Any]]) -> None:
        """Build the jobs of the entries.

        Raises:
            ValueError, TypeError: an entry is malformed, or its job cannot be stored; a note of the
                error names the entry.
        """
        build = self._builder.build
        left = enumerate(entries if isinstance(entries, Iterator) else tuple(entries))
        while jobs := [build(index, entry) for index, entry in islice(left, PIECE)]:
            first = len(self.jobs)
            self.jobs += jobs
            if self._early and (first or len(jobs) == PIECE):
                await self._send(first, jobs)

    async def _send(self, first: int, jobs: Sequence[Addition]) -> None:
        if not self._can_be_sent(jobs):
            self.drop()
            return
        check_entries(self._additions, jobs, first)
        self.checked += len(jobs)
        batch = first - first % BATCH_LIMIT
        if batch == first and len(self.staged) < STAGED_BATCHES:
            in_bucket = not is_plain(self.jobs[0])
            self.staged[batch] = await self._additions.stage(in_bucket=in_bucket)
        if batch in self.staged:
            await self.staged[batch].add(*await self._additions.early_writes(jobs))
        else:
            await anyio.lowlevel.checkpoint()

    def _can_be_sent(self, jobs: Sequence[Addition]) -> bool:
        """Return whether no job of the bulk has to be looked at first, and all go to one log."""
        if self.windows or not all(map(is_independent, jobs)):
            return False
        plain = is_plain(self.jobs[0])
        return all(is_plain(job) == plain for job in jobs)

    def drop(self) -> None:
        """Store nothing of what was sent and not committed, and send no more."""
        self._early = False
        while self.staged:
            self.staged.popitem()[1].drop()


class EntryBuilder:
    """Builds the jobs of entries. Options that are those of the last one are not checked again."""

    def __init__(
        self,
        now: float,
        write: WriteArguments = write_plainly,
        queue: str = "",
        *,
        latest: float | None = None,
    ) -> None:
        """`now`, `latest`: see `build_addition`."""
        self._now, self._latest = now, latest
        self._write = write
        self._queue = queue
        self._options: dict[str, Any] = {}
        self._classes: list[type] = []
        self._template: JobTemplate | None = None
        self.delay_until: float | None = None
        """When the last job may run, in Unix seconds; `None`: at once."""
        self.windows: dict[int, Window] = {}

    def build(self, index: int, entry: Mapping[str, Any] | Call[Any]) -> Addition:
        """Return the job of an entry, and note its deduplication window."""
        options: dict[str, Any] = {}
        template = self._template
        if type(entry) is dict:
            options = entry.copy()
            args, kwargs = options.pop("args", None), options.pop("kwargs", None)
            # The classes come first: what is equal to a number need not be one.
            if (
                template is not None
                and [*map(type, options.values())] == self._classes
                and options == self._options
            ):
                try:
                    args, kwargs = checked_call(self._write, template.task_id, args, kwargs)
                except (ValueError, TypeError) as error:
                    error.add_note(_note(index))
                    raise
                return NewJob(template, new_job_id(), args, kwargs, self._now, self.delay_until)
        is_call = isinstance(entry, Call)
        fields = {} if isinstance(entry, Call) else _checked_entry(entry, index)
        try:
            if isinstance(entry, Call):
                entry.require_queue(self._queue)
                fields = entry.fields | {"deduplication": entry.options.get("deduplication")}
            window = take_window(fields)
            write = written if is_call else self._write
            job = build_addition(self._now, self._latest, write=write, **fields)
        except (ValueError, TypeError) as error:
            error.add_note(_note(index))
            raise
        if window is not None:
            self.windows[index] = window
        self._remember(options, job)
        return job

    def _remember(self, options: dict[str, Any], job: Addition) -> None:
        """Keep the options of a job, if they make another one like it."""
        classes = [*map(type, options.values())]
        alike = not job.custom_id and not job.depends_on and SIMPLE.issuperset(classes)
        self._options, self._classes = options, classes
        if not options or not alike:
            self._template = None
        else:
            self._template = job.template if isinstance(job, NewJob) else JobTemplate(job)
        self.delay_until = job.delay_until

    @property
    def can_repeat(self) -> bool:
        """Whether other arguments make a job like the last one."""
        return self._template is not None

    def repeat(self, args: list[Any], kwargs: dict[str, Any]) -> NewJob:
        """Return a job like the last one, with other arguments, which are plain data."""
        assert self._template is not None
        return NewJob(self._template, new_job_id(), args, kwargs, self._now, self.delay_until)


def check_entries(additions: Additions, jobs: Sequence[Addition], first: int = 0) -> None:
    """Check that every job can be stored, before any of them is. `first`: the index of the first.

    Raises:
        InvalidJobId, NotSerializable, PayloadTooLarge: one cannot; a note of the error says which.
    """
    limit = additions.size_limit
    for index, job in enumerate(jobs, first):
        try:
            additions.check(job, limit)
        except (ValueError, TypeError) as error:
            error.add_note(_note(index))
            raise


def _note(index: int) -> str:
    return f"in job {index} of add_bulk"


def _checked_entry(entry: Mapping[str, Any], index: int) -> dict[str, Any]:
    if type(entry) is not dict and not isinstance(entry, Mapping):
        raise TypeError(f"job {index} must be a mapping, not {type(entry).__name__}")
    if not entry.keys() <= ENTRY_KEYS:
        unknown = sorted(str(key) for key in entry if key not in ENTRY_KEYS)
        known = ", ".join(sorted(ENTRY_KEYS))
        raise ValueError(f"job {index} has unknown keys: {', '.join(unknown)} (known: {known})")
    if not isinstance(entry.get("task_id"), str):
        raise ValueError(f"job {index} needs a task_id, a str")
    fields = dict(entry)
    alias = fields.pop("jobId", None)
    if alias is not None:
        fields.setdefault("job_id", alias)
    return fields


async def add_many(
    additions: Additions, jobs: Sequence[Addition], staged: Mapping[int, Staged] = NONE_STAGED
) -> list[str]:
    """Add the jobs and return their ids in order.

    Up to 1,000 are all or nothing; more go in batches of 1,000, each all or nothing. `staged`: of
    `Bulk`.

    Raises:
        BulkAddFailed: of more than 1,000, some batches were added and some were not; it says which.
        AsyncMQError: none was added.
    """
    # Each dependency is a write. A job with more than fit is added alone.
    most = max((len(job.depends_on or ()) for job in jobs), default=0)
    size = BATCH_LIMIT // (1 + most) or 1
    batches = [(first, jobs[first : first + size]) for first in range(0, len(jobs), size)]
    errors: dict[int, Exception] = {}
    # Batches of jobs that wait for the same one would refuse each other.
    limit = anyio.CapacityLimiter(1 if any(job.depends_on for job in jobs) else BATCHES_UNDER_WAY)

    async def add_batch(first: int, batch: Sequence[Addition]) -> None:
        async with limit:
            await _try_batch(additions, first, batch, staged.get(first), errors)

    async with open_task_group() as group:
        for first, batch in batches:
            group.start_soon(add_batch, first, batch)
    return _ids(jobs, errors)


def _ids(jobs: Sequence[Addition], errors: Mapping[int, Exception]) -> list[str]:
    """Return the ids of jobs that were added. `errors`: of those that were not, by index.

    Raises:
        BulkAddFailed: some were not; it says which.
        AsyncMQError: none was added.
    """
    if len(errors) == len(jobs) and errors:
        raise errors[0]
    if errors:
        raise BulkAddFailed(
            {index: job.job_id for index, job in enumerate(jobs) if index not in errors},
            dict(sorted(errors.items())),
        )
    return [job.job_id for job in jobs]


async def _try_batch(
    additions: Additions,
    first: int,
    jobs: Sequence[Addition],
    staged: Staged | None,
    errors: dict[int, Exception],
) -> None:
    """Add one batch. Note an error for each of its jobs; `first`: the index of the first."""
    try:
        await _add_batch(additions, jobs, staged)
    except AsyncMQError as error:
        errors.update(dict.fromkeys(range(first, first + len(jobs)), error))


async def _add_batch(
    additions: Additions, batch: Sequence[Addition], staged: Staged | None
) -> None:
    """Add one batch.

    Jobs with a chosen id that exists are left out, also when one appears while this runs, and so is
    what is stored.
    """
    while True:
        chosen = {job.job_id for job in batch if job.custom_id}
        missing = await additions.plans.missing(chosen)
        new = await _without_existing(additions, batch, chosen - missing.keys())
        if not new:
            return
        try:
            await additions.add_batch(new, missing, staged)
        except WriteRefused:  # a job of it is there, or its confirmation was lost
            # A repetition is refused by its own first sending, if the server stored that and was
            # lost before it said so.
            unique = not any(job.custom_id or job.depends_on for job in new)
            if await look_for(
                partial(additions.are_stored, new),
                REPLICA_LAG_DELAYS if unique else REPLICA_LAG_DELAYS[:1],
            ):
                await additions.resume(new)
                return
            if unique:
                raise
            batch, staged = new, None
            await pause_after_refusal()
        else:
            return


async def _without_existing(
    additions: Additions, batch: Sequence[Addition], existing: Iterable[str]
) -> list[Addition]:
    """Return the jobs whose ids are new; tell of the others."""
    seen, new, repeated = set(existing), list[Addition](), list[Addition]()
    if not seen and len({job.job_id for job in batch}) == len(batch):
        return list(batch)
    for job in batch:
        (repeated if job.job_id in seen else new).append(job)
        seen.add(job.job_id)
    await additions.repeat(repeated)
    return new
