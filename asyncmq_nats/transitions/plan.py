"""Jobs that are added together: one record holds them all, and single writes carry it out.

The record is the transaction: the outcome of the job whose follow-ups they are, or `plan.<id>` for
a flow. A process that finds the record carries it out; what is there already is left alone. Jobs
that wait are stored before those that they wait for, so that no end is missed.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Final

from asyncmq_nats._new_jobs import Addition
from asyncmq_nats.backends.base import Delivery, Expect, Timer, Write
from asyncmq_nats.exceptions import InvalidJob, WriteRefused
from asyncmq_nats.jobs import Job, new_job_id
from asyncmq_nats.states import Place
from asyncmq_nats.store.commit import REPLICA_LAG_DELAYS, look_for
from asyncmq_nats.store.many import for_each
from asyncmq_nats.store.queue_store import QueueStore
from asyncmq_nats.store.records import MARKER_TTL, without_markers
from asyncmq_nats.store.secret import keyed_id
from asyncmq_nats.transitions.link import Links
from asyncmq_nats.transitions.parked import parked_body
from asyncmq_nats.transitions.release import Dependencies
from asyncmq_nats.transitions.waits import NARROW_LIMIT, new_wide, places_of
from asyncmq_nats.wire.codec import load_json
from asyncmq_nats.wire.keys import encode_token

__all__ = ["PLAN_JOBS", "Plans", "decode_jobs", "encode_jobs", "tie"]

PLAN_JOBS: Final = 50
"""More jobs than this go in atomic batches: those cost the same for one message and for fifty."""
PLAN_TIMEOUT: Final = 10.0
"""Seconds after which a promoter carries out a flow whose producer has not."""

FirstWrite = Callable[[Addition], Write]


def tie(jobs: Sequence[Job]) -> list[Job]:
    """Return jobs that depend on each other so that each knows its `children` among them."""
    children: dict[str, list[str]] = {job.job_id: [] for job in jobs}
    wide_children: dict[str, dict[str, str]] = {job.job_id: {} for job in jobs}
    wide: dict[str, str] = {}
    for job in jobs:
        parents = dict.fromkeys(job.depends_on or ())
        if len(parents) > NARROW_LIMIT and not children.keys().isdisjoint(parents):
            wide[job.job_id] = new_wide(len(parents))
            places = places_of(replace(job, wide=wide[job.job_id]))
            for parent in children.keys() & parents.keys():
                wide_children[parent][job.job_id] = places[parent]
        for parent in parents:
            if parent in children:
                children[parent].append(job.job_id)
    return [
        replace(
            job,
            children=children[job.job_id],
            wide_children=wide_children[job.job_id],
            wide=wide.get(job.job_id, ""),
        )
        for job in jobs
    ]


def encode_jobs(jobs: Sequence[Job]) -> bytes:
    """Return planned jobs as a JSON array."""
    return b"[%b]" % b",".join(job.encode() for job in jobs)


def decode_jobs(value: object) -> list[Job]:
    """Return the planned jobs in a record; junk among them is left out."""
    jobs = []
    for item in value if isinstance(value, list) else []:
        try:
            jobs.append(Job.from_dict(item))
        except (InvalidJob, TypeError, ValueError):
            continue
    return jobs


class Plans:
    """Adds several jobs of one queue that belong together."""

    def __init__(
        self, store: QueueStore, dependencies: Dependencies, first_write: FirstWrite
    ) -> None:
        self._store = store
        self._keys = store.keys
        self._first_write = first_write
        self._dependencies = dependencies
        self.links = Links(store, dependencies.parked)

    # -- what is there

    async def missing(self, job_ids: Collection[str]) -> dict[str, int]:
        """Return the ids that the queue has no job of, in any state.

        Their values are what the write that adds such a job expects: the sequence of the last
        record at its keys in transit, 0 if there is none. It is a marker, or junk.
        """
        ids = {encode_token(job_id): job_id for job_id in job_ids}
        found = await self._store.read_snapshots(ids)
        missing = {token: each.last_later for token, each in found.items() if not each.exists}
        filters = [self._keys.ready_any(token) for token in missing]
        for record in await self._store.last_of_many(filters):
            missing.pop(self._keys.token(record.subject), None)
        return {ids[token]: last for token, last in missing.items()}

    async def exists(self, job_id: str) -> bool:
        """Return whether the queue has a job with that id, in any state.

        An edge or a claim of a removed job does not count: a job with its id may be added.
        """
        return not await self.missing([job_id])

    async def _require_stored(self, job: Job, refused: WriteRefused) -> None:
        """Check a refusal: an earlier try has stored the job, or the refusal is an error."""
        if not await look_for(partial(self.exists, job.job_id), REPLICA_LAG_DELAYS):
            raise refused

    # -- plan

    async def plan(
        self, jobs: Sequence[Job], completed: Mapping[str, Any] | None = None
    ) -> list[Job]:
        """Return the jobs with what is known of those that they depend on; see `Links.plan`.

        Raises:
            JobNotFound: one depends on a job that is not in this queue.
        """
        inside, done = {job.job_id for job in jobs}, completed or {}
        known = await self.links.find(outside_of(jobs, inside | done.keys()))
        return [self.links.plan(job, known, inside, done) for job in jobs]

    async def add_flow(self, jobs: Sequence[Job]) -> bool:
        """Add planned jobs, all or none. Return whether they fit into one record."""
        record = b'{"jobs":%b}' % encode_jobs(jobs)
        if len(record) > self._store.backend.max_body:
            return False
        token = new_job_id()
        due = Timer(self._store.now() + PLAN_TIMEOUT, self._keys.plan_due(token))
        key = self._keys.plan(token)
        try:
            sequence = await self._store.write(Write(key, record, Expect(key, 0), timer=due))
        except WriteRefused:  # no other job has this key: its confirmation was lost
            found = await look_for(partial(self._store.last, key), REPLICA_LAG_DELAYS)
            if not found:
                raise
            sequence = found[0].sequence
        await self.carry_out(jobs)
        # A marker, since producers may not delete: it ends the timer as well.
        end = Write(key, b"", Expect(key, sequence), ttl=MARKER_TTL, marker=True)
        try:
            await self._store.write(end)
        except WriteRefused:  # a promoter has carried it out meanwhile
            await self._remove_zombies(jobs)
        return True

    async def _remove_zombies(self, jobs: Sequence[Job]) -> None:
        """Remove jobs that were parked here after a promoter had added them, and they had ended."""
        tokens = [encode_token(job.job_id) for job in jobs if job.waits_for_others]
        for child in (await self._store.read_snapshots(tokens)).values():
            parked = child.later.get(Place.PARKED)
            if child.ended and parked is not None:
                await self._store.delete(parked)

    # -- carry out

    async def carry_out_plan(self, record: Delivery) -> None:
        """Add the jobs of a flow whose producer died. Repeatable."""
        try:
            jobs = decode_jobs(load_json(record.body).get("jobs"))
        except InvalidJob:
            return
        await self.carry_out(jobs, repeated=True)

    async def carry_out(self, jobs: Sequence[Job], *, repeated: bool = False) -> None:
        """Store planned jobs, those that wait first.

        `repeated`: another process may have stored some of them, or all.
        """
        for priority in {job.priority for job in jobs}:
            await self._store.assets.declare_tier(priority)
        inside = {job.job_id for job in jobs}
        missing = await self.missing(inside) if repeated else inside
        new = [job for job in jobs if job.job_id in missing]
        waiting = [job for job in new if job.waits_for_others]
        outside = [job for job in waiting if set(job.parents) - inside]
        sequences = await self._park(waiting, {job.job_id for job in outside})
        if repeated:
            await self._complete_parts([job for job in jobs if job.job_id not in missing])
        failed = await self._connect(outside, inside, sequences)
        await for_each(self._start, [job for job in new if not job.waits_for_others])
        for job_id in failed:
            await self._dependencies.release(encode_token(job_id))

    async def _park(self, jobs: Sequence[Job], linked: Collection[str]) -> dict[str, int]:
        sequences: dict[str, int] = {}

        async def park(job: Job) -> None:
            try:
                if job.job_id in linked:
                    sequences[job.job_id] = await self.links.park(job)
                    return
                token = encode_token(job.job_id)
                write = Write(
                    self._keys.later(token, Place.PARKED),
                    parked_body(job),
                    Expect(self._keys.later_all(token)),
                    message_id=await self._message_id(job),
                )
                await self._store.write(write)
                if job.wide:
                    await self._dependencies.parked.waits.store(job)
            except WriteRefused as refused:  # an earlier try stored it
                await self._require_stored(job, refused)

        await for_each(park, jobs)
        return sequences

    async def _complete_parts(self, jobs: Sequence[Job]) -> None:
        """Store the parts of jobs with many parents that an earlier try may not have stored."""
        wide = [job for job in jobs if job.wide and job.parents]
        keys = [self._keys.later_all(encode_token(job.job_id)) for job in wide]
        records = await self._store.last_of_many(keys)
        waiting = {self._keys.token(record.subject) for record in without_markers(records)}
        await for_each(
            self._dependencies.parked.waits.store,
            [job for job in wide if encode_token(job.job_id) in waiting],
        )

    async def _connect(
        self, jobs: Sequence[Job], inside: Collection[str], sequences: Mapping[str, int]
    ) -> list[str]:
        failed: list[str] = []

        async def connect(job: Job) -> None:
            parents = [parent for parent in job.parents if parent not in inside]
            came = await self.links.connect(job, parents, {})
            if came.failed:
                failed.append(job.job_id)
            else:
                sequence = sequences.get(job.job_id, 0)
                await self._dependencies.parked.settle(job, sequence, closed=came.closed)

        await for_each(connect, jobs)
        return failed

    async def _start(self, job: Job) -> None:
        """Store a job that waits for no other."""
        write = self._first_write(job)
        if write.message_id is not None:  # it goes to its tier
            expect = Expect(self._keys.ready_any(encode_token(job.job_id)))
            write = replace(write, expect=expect, message_id=await self._message_id(job))
        log = self._keys.log_of(write.subject)
        try:
            await self._store.backend.write(log, write)
        except WriteRefused as refused:  # an earlier try stored it
            await self._require_stored(job, refused)

    async def _message_id(self, job: Job) -> str:
        """Return an id that each try has, and no stranger: he may know the job from an event."""
        return keyed_id(await self._dependencies.parked.secret.get(), "planned", job.job_id)


def outside_of(jobs: Sequence[Addition], inside: Collection[str]) -> list[str]:
    """Return the ids of those that the jobs depend on and that are not among `inside`."""
    ids = dict.fromkeys(parent for job in jobs for parent in job.depends_on or ())
    return [job_id for job_id in ids if job_id not in inside]
