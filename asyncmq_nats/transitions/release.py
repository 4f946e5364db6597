"""Jobs that wait for others.

A parent's end and the children that wait for it are in one log, and each write expects the other's absence: no interleaving loses a
wake-up.

A child that waits is `later.<child>.parked` with the parents that are still open. The parent knows it either from its own body (`children`:
a flow, added as a whole) or from an edge `done.<parent>.awaited.<child>` (added later). Releasing is repeatable: whoever finds an outcome
with children that are still parked releases them, and the parent's message is acknowledged last.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final

import anyio

from asyncmq_nats._concurrency import Turns
from asyncmq_nats.backends.base import Backend, Expect, Record, Timer, Write
from asyncmq_nats.events import READY
from asyncmq_nats.exceptions import BackendError, JobNotFound, WriteRefused
from asyncmq_nats.jobs import Job
from asyncmq_nats.states import Place, State
from asyncmq_nats.store.announcing import announce
from asyncmq_nats.store.commit import LAG, look_for, pause_after_refusal
from asyncmq_nats.wire.codec import dump_json, load_json
from asyncmq_nats.wire.keys import QueueSubjects, decode_token, encode_token

__all__ = ["MARKER_TTL", "Dependencies", "delayed_write"]

LEAD: Final = 0.4
"""A timer is set so much early, since the server looks at its timers every 0.25 s; the promoter waits out the rest."""
MARKER_TTL: Final = 1.0
CHUNK: Final = 200
SWEPT: Final = 20


@dataclass(frozen=True, slots=True)
class Parent:
    """A job as those who depend on it see it."""

    id: str
    state: State | None
    """Its outcome; `None` while it has none."""
    result: Any
    last: int
    """Sequence of the last record about its end, the edges to those who wait for it among them."""


class Dependencies:
    """The edges between the jobs of one queue."""

    def __init__(self, backend: Backend, subjects: QueueSubjects) -> None:
        self._backend = backend
        self._subjects = subjects
        self._log = subjects.bucket_log
        self._lock = Turns()

    # -- a child is added

    async def park(self, job: Job) -> tuple[Job, list[Write]]:
        """Return the job with what is known of its parents, and the writes that park it; none if all its parents are done.

        Raises:
            JobNotFound: a parent is not in this queue.
        """
        parents = [
            await self._look_up(parent_id) for parent_id in dict.fromkeys(job.depends_on or ())
        ]
        ignored = job.on_parent_failure == "run"
        waiting = [
            parent
            for parent in parents
            if parent.state is None or (parent.state is not State.COMPLETED and not ignored)
        ]
        results: dict[str, Any] = {}
        for parent in parents:
            if parent.state is State.COMPLETED and self.fits(results, parent.result):
                results[parent.id] = parent.result
        job = replace(job, parents=[parent.id for parent in waiting], parent_results=results)
        if not waiting:
            return job, []
        token = encode_token(job.job_id)
        edges = [
            Write(
                self._subjects.edge(encode_token(p.id), token),
                b"{}",
                Expect(self._subjects.done_all(encode_token(p.id)), p.last),
            )
            for p in waiting
        ]
        parked = Write(
            self._subjects.later(token, Place.PARKED),
            job.encode(),
            Expect(self._subjects.later_all(token)),
        )
        failed = [parent.id for parent in waiting if parent.state is not None]
        if failed and job.on_parent_failure == "fail":
            return job, [await self._failed_at_once(job, token, failed[0])]
        return job, [*edges, parked]

    async def _failed_at_once(self, job: Job, token: str, parent_id: str) -> Write:
        """Return the write of a new job's failure.

        Raises:
            WriteRefused: a job with its id has ended already.
        """
        last, records = await self._read_ends(token)
        if self._outcome_in(records) is not None:
            raise WriteRefused(self._log, f"job {job.job_id!r} has ended")
        return replace(
            self._failed_child(load_json(job.encode()), token, parent_id),
            expect=Expect(self._subjects.done_all(token), last),
        )

    def fits(self, stored: Mapping[str, Any], result: Any) -> bool:
        """Return whether a parent's result can be stored with the child, so that it outlives the parent's record: up to half a message."""
        return len(dump_json(stored)) + len(dump_json(result)) < self._backend.max_body // 2

    async def _look_up(self, parent_id: str) -> Parent:
        parent = await look_for(partial(self._find_parent, parent_id))
        if parent is None:
            raise JobNotFound(self._subjects.queue, parent_id)
        return parent

    async def _find_parent(self, parent_id: str) -> Parent | None:
        token, subjects = encode_token(parent_id), self._subjects
        last, records = await self._read_ends(token)
        live = [
            record
            for record in records
            if not (
                record.marker
                or subjects.is_edge(record.subject)
                or subjects.is_claim(record.subject)
            )
        ]
        if not live and not await self._is_ready(token):
            return None
        outcome = self._outcome_in(live)
        if outcome is None:
            return Parent(parent_id, None, None, last)
        return Parent(
            parent_id,
            subjects.outcome_state(outcome.subject),
            load_json(outcome.body).get("result"),
            last,
        )

    async def _read_ends(self, token: str) -> tuple[int, list[Record]]:
        """Return the sequence of the last record about a job's end, and, as they were then or later, the records but for most edges.

        What comes between the two reads refuses the edge. But the second one must not be answered by a replica that knows less.
        """
        last, records = 0, list[Record]()
        for pause in LAG:
            await anyio.sleep(pause)
            latest = await self._backend.latest(self._log, self._subjects.done_all(token))
            also = [] if latest is None else [latest.subject]
            records = await self._backend.last(
                self._log, self._subjects.ends(token), self._subjects.later_all(token), *also
            )
            last = 0 if latest is None else latest.sequence
            if latest is None or any(
                record.subject == latest.subject and record.sequence >= last for record in records
            ):
                break
        return last, records

    async def _is_ready(self, token: str) -> bool:
        return bool(
            await self._backend.last(self._subjects.ready_log, self._subjects.ready_any(token))
        )

    # -- a parent has ended

    async def release(self, token: str) -> None:
        """Let the children of a job that has ended know: run them, fail them, or leave them waiting, as each wants it. Repeatable."""
        ended = [token]
        while ended:
            ended += await self._release_one(ended.pop())

    async def _release_one(self, token: str) -> list[str]:
        """Return the children that have ended because this parent failed."""
        subjects = self._subjects
        records = await self._look_until(
            [subjects.done_all(token)], lambda found: self._outcome_in(found) is not None
        )
        outcome = self._outcome_in(records)
        if outcome is None:
            raise BackendError(
                f"the outcome of job {decode_token(token)!r} is not to be seen: those who wait for it are told later"
            )
        data, state = load_json(outcome.body), subjects.outcome_state(outcome.subject)
        edges = [
            record for record in records if subjects.is_edge(record.subject)
        ]  # all of them: none is added after an outcome
        children = [encode_token(child) for child in data.get("children", ())]
        children += [record.subject.rpartition(".")[2] for record in edges]
        parent = Parent(decode_token(token), state, data.get("result"), outcome.sequence)
        failed: list[str] = []
        for start in range(0, len(children), CHUNK):
            failed += await self._release_chunk(
                parent, outcome.subject, children[start : start + CHUNK]
            )
        if edges and state is State.COMPLETED:
            await self._backend.purge(self._log, subjects.edge(token, "*"))
        return failed

    def _outcome_in(self, records: Sequence[Record]) -> Record | None:
        return next(
            (
                record
                for record in records
                if not record.marker and self._subjects.outcome_state(record.subject)
            ),
            None,
        )

    async def _look_until(
        self, filters: Sequence[str], seen: Callable[[Sequence[Record]], bool]
    ) -> list[Record]:
        """Return the last records of the filters, once they are such as they must be: each look may ask a replica that lags behind."""
        records: list[Record] = []
        for pause in LAG:
            await anyio.sleep(pause)
            records = await self._backend.last(self._log, *filters)
            if seen(records):
                break
        return records

    async def _release_chunk(
        self, parent: Parent, outcome: str, children: Sequence[str]
    ) -> list[str]:
        """Tell some children; return those that have ended by it."""
        changes = await self._change(parent, outcome, children)
        freed, ended = [], []
        for token, writes in changes.items():
            if any(self._subjects.outcome_state(write.subject) for write in writes):
                ended.append(token)
            elif len(writes) > 1:  # its last parent: it leaves where it was parked
                freed.append(token)
        for token in freed:
            await announce(self._backend, self._subjects, READY, decode_token(token))
        return ended + await self._failed_before(
            parent, [child for child in children if child not in changes]
        )

    async def _change(
        self, parent: Parent, outcome: str, children: Sequence[str]
    ) -> dict[str, list[Write]]:
        """Write what the end of a parent means for some children; return it by child. Repeated until nobody else changes them meanwhile."""
        async with self._lock:  # many parents of one child that end in this process take turns: each would refuse the others
            while True:
                keys = [self._subjects.later(child, Place.PARKED) for child in children]
                # Whoever knows of the outcome knows of the children that were parked before it.
                records = await self._look_until(
                    [outcome, *keys],
                    lambda found: any(record.subject == outcome for record in found),
                )
                parked = [
                    record for record in records if record.subject != outcome and not record.marker
                ]
                changes = {
                    self._subjects.token(record.subject): self._changes(record, parent)
                    for record in parked
                }
                writes = [write for child in changes.values() for write in child]
                try:
                    last = await self._backend.write(self._log, *writes) if writes else 0
                except (
                    WriteRefused
                ):  # one of them was cancelled, or another parent of it ended elsewhere: look again
                    await pause_after_refusal()
                    continue
                break
        await self._sweep(last, writes)
        return changes

    async def _failed_before(self, parent: Parent, children: Sequence[str]) -> list[str]:
        """Return the children that this parent's failure has ended already: the worker was lost before it told their children."""
        if parent.state is State.COMPLETED or not children:
            return []
        keys = [self._subjects.outcome(child, State.FAILED) for child in children]
        records = [
            record for record in await self._backend.last(self._log, *keys) if not record.marker
        ]
        return [
            self._subjects.token(r.subject)
            for r in records
            if load_json(r.body).get("last_error") == _blame(parent.id)
        ]

    async def write_and_sweep(self, *writes: Write) -> None:
        """Write a batch, and remove its markers, unless they are many."""
        await self._sweep(await self._backend.write(self._log, *writes), writes)

    async def _sweep(self, last: int, writes: Sequence[Write]) -> None:
        """Remove the markers of a batch, unless they are many: they would be counted as records for the second that they live."""
        # The sequences of a batch are consecutive.
        markers = [last - number for number, write in enumerate(reversed(writes)) if write.marker]
        if len(markers) <= SWEPT:
            for sequence in markers:
                await self._backend.delete(self._log, sequence)

    def _changes(self, record: Record, parent: Parent) -> list[Write]:
        """Return the writes that tell one parked child of the end of a parent."""
        data, token = load_json(record.body), self._subjects.token(record.subject)
        waits_for = list(data.get("parents", ()))
        if parent.id not in waits_for:
            return []
        expect = Expect(record.subject, record.sequence)
        if parent.state is not State.COMPLETED:
            policy = data.get("on_parent_failure", "wait")
            if policy == "fail":
                return [
                    Write(record.subject, b"", expect, ttl=MARKER_TTL, marker=True),
                    self._failed_child(data, token, parent.id),
                ]
            if policy != "run":
                return []
        elif self.fits(data, parent.result):
            data.setdefault("parent_results", {})[parent.id] = parent.result
        waits_for.remove(parent.id)
        data["parents"] = waits_for
        if waits_for:
            return [Write(record.subject, dump_json(data), expect)]
        return [
            Write(record.subject, b"", expect, ttl=MARKER_TTL, marker=True),
            self._freed(data, token),
        ]

    def _freed(self, data: Mapping[str, Any], token: str) -> Write:
        """Return the write that lets a child go whose parents are all done: to its time, if it has one that is still to come."""
        now = self._backend.now()
        return delayed_write(
            self._subjects, token, dump_json(data), (data.get("delay_until") or now, now)
        )

    def _failed_child(self, data: Mapping[str, Any], token: str, parent_id: str) -> Write:
        fields = {
            "status": State.FAILED,
            "last_error": _blame(parent_id),
            "finished_at": self._backend.now(),
        }
        body = dump_json(dict(data) | fields)
        return Write(
            self._subjects.outcome(token, State.FAILED),
            body,
            ttl=self._backend.settings.failed_ttl,
            beside=True,
            index=self._subjects.index(token, State.FAILED),
        )

    # -- a child runs

    async def results(self, job: Job) -> dict[str, Any]:
        """Return the results of the jobs that a job depends on, by id; those that did not complete are left out."""
        missing = [parent for parent in job.depends_on or () if parent not in job.parent_results]
        keys = [self._subjects.outcome(encode_token(parent), State.COMPLETED) for parent in missing]
        records = await look_for(partial(self._backend.last, self._log, *keys)) if keys else []
        read = {
            decode_token(self._subjects.token(r.subject)): load_json(r.body).get("result")
            for r in records
            if not r.marker
        }
        return {
            parent: (job.parent_results | read)[parent]
            for parent in job.depends_on or ()
            if parent in job.parent_results or parent in read
        }


def _blame(parent_id: str) -> str:
    return f"job {parent_id!r}, which this one depends on, did not complete"


def delayed_write(
    subjects: QueueSubjects,
    token: str,
    body: bytes,
    times: tuple[float, float],
    expect: Expect | None = None,
) -> Write:
    """Return the write that has a job wait until its time, when the server releases it. `times`: then and now (Unix seconds).

    One whose time is near is released at once: the promoter waits for it, whereas a timer set in the past would be late.
    """
    run_at, now = times
    if run_at - LEAD <= now:  # beside: a promoter may be removing the record of the attempt before
        return Write(subjects.later(token, Place.RELEASED), body, expect, beside=True)
    timer = Timer(run_at - LEAD, subjects.later(token, Place.RELEASED))
    return Write(subjects.later(token, Place.DELAYED), body, expect, timer=timer)
