"""A job that depends on others is added: it is parked, and each open parent is told by an edge.

First the job is parked, with all its open parents and a timer; then an edge is written for each of
them, expecting that the parent has not ended; then the timer is taken off. A parent that ends in
between refuses its edge, and is taken out here. If the producer dies, one that adds the job again
goes on (`Links.resume`), or else the timer releases it, and a promoter does (`Links.link`).
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

from asyncmq_nats._clock import brief_pause
from asyncmq_nats._concurrency import KeyedTurns
from asyncmq_nats.backends.base import Delivery, Expect, Write
from asyncmq_nats.exceptions import InvalidJob, JobNotFound
from asyncmq_nats.jobs import Job
from asyncmq_nats.states import Place
from asyncmq_nats.store.commit import REPLICA_READ_DELAYS, pause_after_refusal
from asyncmq_nats.store.many import for_each
from asyncmq_nats.store.queue_store import QueueStore
from asyncmq_nats.store.snapshot import Snapshot
from asyncmq_nats.transitions.parked import ParkedJobs, linking_body
from asyncmq_nats.transitions.waits import NARROW_LIMIT, Parent, Wait, new_wide, places_of
from asyncmq_nats.wire.codec import dump_json, load_json
from asyncmq_nats.wire.keys import decode_token, encode_token

__all__ = ["Linking", "Links"]

EDGES_REMEMBERED: Final = 4096


@dataclass(slots=True)
class Linking:
    """The result of writing the edges of a job."""

    failed: bool = False
    """The job has ended as failed, for a parent."""
    closed: bool = False
    """It has many parents, and none of them is open any more."""
    known: dict[str, Parent] = field(default_factory=dict)


class Links:
    """Adds the jobs of one queue that depend on others."""

    def __init__(self, store: QueueStore, parked: ParkedJobs) -> None:
        self._store = store
        self._keys = store.keys
        self._turns = KeyedTurns()
        self._last_edges: dict[str, int] = {}
        self.parked = parked

    # -- what is known of parents

    async def find(self, job_ids: Collection[str]) -> dict[str, Parent]:
        """Return the jobs, by id.

        Raises:
            JobNotFound: one is not in this queue.
        """
        found: dict[str, Parent] = {}
        missing = list(dict.fromkeys(job_ids))
        for pause in REPLICA_READ_DELAYS:
            if not missing:
                break
            await brief_pause(pause)
            found |= await self._find(missing)
            missing = [job_id for job_id in missing if job_id not in found]
        if missing:
            raise JobNotFound(self._keys.queue, missing[0])
        return found

    async def _find(self, job_ids: Sequence[str]) -> dict[str, Parent]:
        """Look in the tiers first.

        Most parents wait to be run, and jobs go from there to the bucket.
        """
        tokens = {job_id: encode_token(job_id) for job_id in job_ids}
        filters = map(self._keys.ready_any, tokens.values())
        found = await self._store.last_of_many(filters)
        ready = {self._keys.token(record.subject) for record in found}
        rest = [token for token in tokens.values() if token not in ready]
        snapshots = await self._store.read_snapshots(rest)
        return {
            job_id: Parent(job_id, None) if token in ready else _parent(job_id, snapshots[token])
            for job_id, token in tokens.items()
            if token in ready or snapshots[token].exists
        }

    async def read_parents(self, job_ids: Collection[str]) -> dict[str, Parent]:
        """Return the jobs that are there, with the exact sequence of the last record of each."""
        parents: dict[str, Parent] = {}

        async def read(job_id: str) -> None:
            end = await self._store.read_end(encode_token(job_id))
            parents[job_id] = _parent(job_id, end)

        await for_each(read, list(await self.find(job_ids)))
        return parents

    def plan(
        self,
        job: Job,
        parents: Mapping[str, Parent],
        inside: Collection[str] = (),
        completed: Mapping[str, Any] | None = None,
    ) -> Job:
        """Return the job with what is known of those that it depends on.

        Its `parents` are those that are open, `parent_results` are the results that fit.

        Args:
            job: the new job.
            parents: what was read of those that are in the queue.
            inside: ids of the jobs that are added with it.
            completed: results of jobs that complete with it, by id.
        """
        if not job.depends_on:
            return job
        ids = list(dict.fromkeys(job.depends_on))
        ended = {each for each in ids if each in parents and _is_over(parents[each], job)}
        done = dict(completed or {})
        open_parents = [
            each for each in ids if each in inside or not (each in done or each in ended)
        ]
        done |= {each: parents[each].result for each in ended if parents[each].completed}
        wide = job.wide if open_parents else ""
        if not wide and len(open_parents) > NARROW_LIMIT:
            wide = new_wide(len(ids))
        results = self._fitting({each: done[each] for each in ids if each in done})
        return replace(job, parents=open_parents, parent_results=results, wide=wide)

    def _fitting(self, results: Mapping[str, Any]) -> dict[str, Any]:
        """Return the results that fit into half a message together."""
        room = self._store.backend.max_body // 2
        fitting: dict[str, Any] = {}
        for parent, result in results.items():
            size = len(dump_json({parent: result}))
            if size < room:
                room -= size
                fitting[parent] = result
        return fitting

    # -- park, and link

    async def park(self, job: Job, last: int = 0) -> int:
        """Store a job that waits, with a timer. Return the sequence of its record.

        `last`: of a record at its keys that is no job; see `Plans.missing`.

        Raises:
            WriteRefused: a job with its id is on its way.
        """
        token = encode_token(job.job_id)
        expect = Expect(self._keys.later_all(token), last)
        write = self.parked.parked_write(
            token, linking_body(job), expect, linking=True, parents=len(job.parents)
        )
        write.once = job.custom_id
        sequence = await self._store.write(write)
        if job.wide:
            await self.parked.waits.store(job)
        return sequence

    async def connect(
        self, job: Job, outside: Collection[str], known: Mapping[str, Parent]
    ) -> Linking:
        """Write the edges of a parked job to its parents; tell it of those that have ended."""
        token, places, came = encode_token(job.job_id), places_of(job), Linking()

        async def connect(parent_id: str) -> None:
            place = places.get(parent_id, "")
            parent = known.get(parent_id)
            if parent is None or not _decides(parent, job):
                parent = await self._write_edge(
                    job, token, place, parent or Parent(parent_id, None)
                )
            if parent is None:
                return
            if place:
                wait = await self.parked.tell_wide(parent, token, place, quietly=True)
                came.closed |= wait is Wait.CLOSED
                came.failed |= wait is Wait.FAILS
            elif await self.parked.tell(parent, token, quietly=True):
                came.failed = True

        await for_each(connect, list(outside))
        return came

    async def _write_edge(self, job: Job, child: str, place: str, parent: Parent) -> Parent | None:
        """Write that a job waits for another; or return that one, if it has ended instead.

        An edge that is accepted proves by what it expects that the parent has not ended.
        """
        token = encode_token(parent.id)
        body = dump_json({"wait": place}) if place else b"{}"
        async with self._turns.of(token):  # edges of one parent would refuse each other
            last, refused = self._last_edges.get(token, parent.last), False
            while True:
                write = Write(
                    self._keys.edge(token, child),
                    body,
                    Expect(self._keys.done_all(token), last),
                )
                sequence = await self._store.write_if_expected(write)
                if sequence is not None:
                    self._remember(token, sequence)
                    return None
                self._last_edges.pop(token, None)
                if refused:
                    await pause_after_refusal()
                refused = True
                end = await self._store.read_end(token)
                found = _parent(parent.id, end)
                if _decides(found, job):
                    return found
                last = found.last

    def _remember(self, token: str, sequence: int) -> None:
        if len(self._last_edges) >= EDGES_REMEMBERED:
            del self._last_edges[next(iter(self._last_edges))]
        self._last_edges[token] = sequence

    async def link(self, record: Delivery) -> list[str]:
        """Go on with a job that its timer released: its producer died while it wrote the edges.

        Return the token of the job if it has ended as failed, for a parent. The record is gone
        afterwards. Repeatable.

        Raises:
            WriteRefused: it has just moved on; look again.
        """
        token = self._keys.token(record.subject)
        job = Job.decode(record.body, job_id=decode_token(token))
        child = await self._store.read_snapshot(token)
        parked = child.later.get(Place.PARKED)
        if not await self._has_gone_on(child, job, record):
            if parked is None and job.wide and await self.parked.waits.is_closed(token, job.wide):
                data = load_json(record.body)
                data.pop("linking", None)
                await self.parked.free_wide(child, child.later[Place.RELEASED], data)
                return []
            if parked is None:
                await self._park_again(child, job, record)
            elif b'"linking"' not in parked.body:
                job = replace(job, depends_on=[])  # all edges are there
        else:
            job = replace(job, depends_on=[])
        await self._store.delete(record)
        return await self._connect_again(token, job) if job.depends_on else []

    async def resume(self, job_ids: Collection[str]) -> list[str]:
        """Write the edges that an earlier producer of these jobs has not written: it may be dead.

        Return the tokens of those that have ended as failed, for a parent. Repeatable.
        """
        failed: list[str] = []
        tokens = list(map(encode_token, job_ids))
        for token, child in (await self._store.read_snapshots(tokens)).items():
            parked = child.later.get(Place.PARKED)
            if parked is None or b'"linking"' not in parked.body:
                continue
            try:
                job = Job.decode(parked.body, job_id=decode_token(token))
            except InvalidJob:  # not ours
                continue
            failed += await self._connect_again(token, job)
        return failed

    async def _has_gone_on(self, child: Snapshot, job: Job, record: Delivery) -> bool:
        released = child.later.get(Place.RELEASED)
        if released is None or released.sequence != record.sequence:
            return True
        if child.ended_since(job.reruns) or Place.DELAYED in child.later:
            return True
        ready = await self._store.last(self._keys.ready_any(child.token))
        try:
            return any(Job.decode(record.body).order >= job.order for record in ready)
        except InvalidJob:
            return False

    async def _park_again(self, child: Snapshot, job: Job, record: Delivery) -> None:
        body = dump_json(load_json(record.body) | {"linking": True})
        expect, parents = (
            Expect(self._keys.later_all(child.token), child.last_later),
            job.depends_on,
        )
        write = self.parked.parked_write(
            child.token, body, expect, linking=True, parents=len(parents or ())
        )
        await self._store.write(write)

    async def _connect_again(self, token: str, job: Job) -> list[str]:
        parents = job.parents
        known = await self._find(list(dict.fromkeys(job.depends_on or ())))
        if job.wide:
            everyone = list(dict.fromkeys(job.depends_on or ()))
            await self.parked.waits.store(replace(job, parents=everyone))
            still_open = await self.parked.waits.open_parents(token, job.wide)
            parents = [
                each
                for each in everyone
                if each in still_open or (each in known and _decides(known[each], job))
            ]
        came = await self.connect(job, parents, known)
        if not came.failed:
            await self.parked.settle(job, 0, closed=came.closed)
        return [token] if came.failed else []


def _parent(job_id: str, end: Snapshot) -> Parent:
    if end.outcome is None:
        return Parent(job_id, None, None, end.last_end)
    try:
        result = load_json(end.outcome.body).get("result")
    except InvalidJob:
        result = None
    return Parent(job_id, end.state, result, end.last_end, end.outcome.subject)


def _is_over(parent: Parent, job: Job) -> bool:
    """Return whether a job need not wait for this parent."""
    return parent.completed or (parent.state is not None and job.on_parent_failure == "run")


def _decides(parent: Parent, job: Job) -> bool:
    """Return whether the state of a parent changes the job.

    If not, the job waits for a retry of the parent.
    """
    return parent.completed or (parent.state is not None and job.on_parent_failure != "wait")
