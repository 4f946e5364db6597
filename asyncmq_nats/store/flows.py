"""The jobs that a job depends on, read from the job upwards. Reads only."""

from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final

from asyncmq_nats.exceptions import AssetMissing
from asyncmq_nats.jobs import Job
from asyncmq_nats.store.many import for_each
from asyncmq_nats.store.queue_store import QueueStore
from asyncmq_nats.store.reads import Inspection
from asyncmq_nats.wire.keys import decode_token, encode_token

__all__ = ["Flow", "read_flow"]

READS_UNDER_WAY: Final = 32


@dataclass(frozen=True, slots=True)
class Flow:
    """A job with all that it depends on, directly and indirectly.

    `jobs`: by id; `None` for one that was removed, or whose outcome was kept no longer. Each has
    the ids of those that it waits for in `depends_on`. `awaited_by`: jobs that wait for `job_id`
    directly, or did. `complete`: whether all are there, and not only the first ones.
    """

    job_id: str
    jobs: dict[str, dict[str, Any] | None]
    awaited_by: list[str]
    complete: bool


async def read_flow(
    store: QueueStore, inspection: Inspection, job_id: str, limit: int
) -> Flow | None:
    """Return the flow of a job, up to `limit` jobs; `None` if there is no such job."""
    first = await inspection.find(job_id)
    if first is None:
        return None
    found: dict[str, Job | None] = {job_id: first}
    ahead = list(dict.fromkeys(first.depends_on))
    while ahead and len(found) < limit:
        part = ahead[: limit - len(found)]
        read: dict[str, Job | None] = {}

        async def look(parent: str, read: dict[str, Job | None] = read) -> None:
            read[parent] = await inspection.find(parent)

        await for_each(look, part, limit=READS_UNDER_WAY)
        found |= {parent: read[parent] for parent in part}
        parents = [p for job in read.values() if job is not None for p in job.depends_on]
        ahead = [p for p in dict.fromkeys([*ahead[len(part) :], *parents]) if p not in found]
    waiting = list(first.children)
    with suppress(AssetMissing):
        waiting += [
            decode_token(store.keys.parse(record.subject).child)
            for record in await store.last(store.keys.edge(encode_token(job_id), "*"))
            if not record.marker
        ]
    jobs = {each: None if job is None else job.to_dict() for each, job in found.items()}
    return Flow(job_id, jobs, list(dict.fromkeys(waiting)), not ahead)
