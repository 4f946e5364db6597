"""A queue as lines of JSON, and back: each job with all that is stored of it, and the repeatables.

Repeatable: a job whose id is there is left as it is.
"""

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from asyncmq_nats.exceptions import InvalidArgument, InvalidJob, JobNotFound, WriteRefused
from asyncmq_nats.jobs import Job
from asyncmq_nats.states import OUTCOMES, State
from asyncmq_nats.store.many import for_each
from asyncmq_nats.store.search import Found
from asyncmq_nats.transitions.add import Additions
from asyncmq_nats.transitions.clean import Progress
from asyncmq_nats.transitions.move import write_outcome

__all__ = ["FORMAT", "Imported", "Importer", "export_jobs", "split_line"]

FORMAT: Final = 1
IMPORTS_UNDER_WAY: Final = 32


@dataclass(frozen=True, slots=True)
class Imported:
    """The result of `Queue.import_jobs`: added jobs, and those whose ids existed."""

    added: int
    existing: int


async def export_jobs(pages: AsyncIterator[list[Found]]) -> AsyncIterator[dict[str, Any]]:
    """Yield a line for each job: its state, when it reached it, and its record."""
    async for page in pages:
        for found in page:
            try:
                job = found.stored()
            except InvalidJob:
                continue
            yield {"state": found.state, "at": found.record.time, "job": job}


def split_line(line: Mapping[str, Any]) -> tuple[State, dict[str, Any]] | None:
    """Return the state and the job of a line; `None` for a line of another kind.

    Raises:
        InvalidArgument: it is no line of an export, or of a newer format.
    """
    if "repeatable" in line:
        return None
    if "format" in line:
        if line["format"] != FORMAT:
            raise InvalidArgument(f"the export must be of format {FORMAT}", line["format"])
        return None
    state, job = line.get("state"), line.get("job")
    if state not in set(State) or not isinstance(job, Mapping) or not job.get("id"):
        raise InvalidArgument("a line of an export must have a state and a job", dict(line))
    return State(str(state)), dict(job)


class Importer:
    """Adds the jobs of an export to a queue."""

    def __init__(self, additions: Additions, progress: Progress | None) -> None:
        self._additions = additions
        self._progress = progress
        self._added = self._existing = 0
        self._waiting: dict[str, Job] = {}
        """Jobs that wait for others, by id: they are added after those."""

    async def add(self, jobs: Sequence[tuple[State, dict[str, Any]]]) -> None:
        """Add some jobs, many at a time; those that wait for others when `finish` is called."""
        missing = await self._additions.plans.missing([str(job["id"]) for _, job in jobs])
        new = [(state, job) for state, job in jobs if job["id"] in missing]
        old = [(state, job) for state, job in jobs if job["id"] not in missing]
        self._existing += len(old)
        waiting = [str(job["id"]) for state, job in old if state is State.WAITING_CHILDREN]
        await self._additions.link_again(waiting)
        await for_each(self._add_one, new, limit=IMPORTS_UNDER_WAY)
        self._tell()

    async def _add_one(self, entry: tuple[State, dict[str, Any]]) -> None:
        state, data = entry
        if state in OUTCOMES:
            try:
                await write_outcome(self._additions, data, state)
            except WriteRefused:  # a job with that id has appeared
                self._existing += 1
            else:
                self._added += 1
            return
        job = replace(Job.from_dict(data), custom_id=True, children=[], wide_children={})
        if state is State.WAITING_CHILDREN:
            self._waiting[job.job_id] = replace(job, parents=[], wide="")
            return
        await self._additions.add(replace(job, depends_on=[], parents=[], wide=""))
        self._added += 1

    async def finish(self) -> Imported:
        """Add the jobs that wait for others, each after those. Return what was added in all."""
        while self._waiting:
            ready = [
                job
                for job in self._waiting.values()
                if self._waiting.keys().isdisjoint(job.depends_on)
            ]
            for job in ready or list(self._waiting.values()):
                await self._add_waiting(job)
                del self._waiting[job.job_id]
            self._tell()
        return Imported(self._added, self._existing)

    async def _add_waiting(self, job: Job) -> None:
        """Add a job without those of its parents whose outcome is not there any more."""
        while True:
            try:
                await self._additions.add(job)
            except JobNotFound as missing:
                left = [parent for parent in job.depends_on if parent != missing.job_id]
                job = replace(job, depends_on=left)
            else:
                self._added += 1
                return

    def _tell(self) -> None:
        if self._progress is not None:
            self._progress(self._added + self._existing)
