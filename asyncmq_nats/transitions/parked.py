"""Transitions of a job that waits for others when one of them has ended.

Each step is one message that expects what was read, so it can be repeated. While the edges of a
parked job are being written its record says `linking` and has a timer: if its producer dies, the
server releases it and a promoter goes on. Such a record leaves its place by a write that removes
the timer; another one is written where it goes, and then deleted.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, Final

from asyncmq_nats._concurrency import KeyedTurns
from asyncmq_nats._logging import get_logger
from asyncmq_nats.backends.base import Expect, Record, Timer, Write
from asyncmq_nats.events import READY
from asyncmq_nats.exceptions import InvalidJob, TooManyPriorities, WriteRefused
from asyncmq_nats.jobs import Job
from asyncmq_nats.states import Place, State
from asyncmq_nats.store.announcing import announce
from asyncmq_nats.store.commit import commit, pause_after_refusal
from asyncmq_nats.store.queue_store import QueueStore
from asyncmq_nats.store.records import MARKER_TTL, TIMER_LEAD, delayed_write
from asyncmq_nats.store.secret import QueueSecret
from asyncmq_nats.store.snapshot import Snapshot, filters_of, snapshots_of
from asyncmq_nats.transitions.promote import promotion_id
from asyncmq_nats.transitions.waits import Parent, Wait, Waits, texts
from asyncmq_nats.wire.codec import dump_json, load_json, splice
from asyncmq_nats.wire.keys import decode_token, encode_token

__all__ = [
    "LINK_TIMEOUT",
    "ParkedJobs",
    "blame",
    "linking_body",
    "parked_body",
]

logger = get_logger(__name__)

LINK_TIMEOUT: Final = 30.0
"""Seconds after which a promoter goes on with a job whose producer has not written all edges."""
LINK_TIMEOUT_PER_PARENT: Final = 0.02
"""Seconds more for each edge."""


def blame(parent_id: str) -> str:
    """Return the error of a job that fails with one that it depends on."""
    return f"job {parent_id!r}, which this one depends on, did not complete"


class ParkedJobs:
    """The jobs of one queue that wait for others."""

    def __init__(self, store: QueueStore) -> None:
        self._store = store
        self._keys = store.keys
        self._turns = KeyedTurns()
        self.secret = QueueSecret(store)
        self.waits = Waits(store)

    async def read(
        self, witness: str, children: Sequence[str], *, stored: bool = False
    ) -> dict[str, Snapshot]:
        """Read some children from a replica that has the record `witness`, and all before it.

        `stored`: the caller has just stored a child. A replica without any of it lags behind, too.
        """
        after = stored and self._store.backend.reads_may_lag
        records = await self._store.last_when(
            lambda found: (
                any(record.subject == witness for record in found)
                and (not after or any(record.subject != witness for record in found))
            ),
            witness,
            *filters_of(children, self._keys),
        )
        # The witness may be a part of the child, which is no record of it in transit.
        told = [record for record in records if record.subject != witness]
        return snapshots_of(children, told, self._keys)

    def parked_write(
        self, token: str, body: bytes, expect: Expect, *, linking: bool, parents: int = 0
    ) -> Write:
        """Return the write of a parked job; with a timer while its edges are being written.

        `parents`: how many edges. A promoter that comes too early would begin again and again.
        """
        key = self._keys.later(token, Place.PARKED)
        if not linking:
            return Write(key, body, expect)
        due = self._store.now() + LINK_TIMEOUT + parents * LINK_TIMEOUT_PER_PARENT
        timer = Timer(due, self._keys.later(token, Place.RELEASED))
        return Write(key, body, expect, timer=timer)

    def fits(self, stored: Mapping[str, Any], result: Any) -> bool:
        """Return whether a result can be stored with the child: up to half a message."""
        return len(dump_json(stored)) + len(dump_json(result)) < self._store.backend.max_body // 2

    # -- a parent has ended

    async def tell(
        self, parent: Parent, child: str, snapshot: Snapshot | None = None, *, quietly: bool = False
    ) -> bool:
        """Tell a parked child that a parent has ended. Repeatable.

        Return whether the child has ended as failed for it. `quietly`: the caller has just stored
        the child; no event that it is ready.
        """
        async with self._turns.of(child) as waited:
            known = None if waited else snapshot

            async def tell() -> bool:
                nonlocal known
                found = known or (await self.read(parent.outcome, [child], stored=quietly))[child]
                known = None  # for the next try: another parent has ended, or it was cancelled
                return await self._tell(parent, found, quietly=quietly)

            return await commit(tell)

    async def _tell(self, parent: Parent, child: Snapshot, *, quietly: bool) -> bool:
        parked = child.later.get(Place.PARKED)
        data = None if parked is None else await self._open(child, parked)
        if parked is None or data is None:
            return _failed_for(child, parent)
        open_parents = texts(data.get("parents"))
        if parent.id not in open_parents:
            return False
        if not parent.completed:
            policy = data.get("on_parent_failure", "wait")
            if policy == "fail":
                return await self._fail(child, data, parent)
            if policy != "run":
                return False
        elif self.fits(data, parent.result):
            results = data.get("parent_results")
            known = results if isinstance(results, dict) else {}
            data["parent_results"] = known | {parent.id: parent.result}
        data["parents"] = left = [other for other in open_parents if other != parent.id]
        if left:
            expect = Expect(parked.subject, parked.sequence)
            write = self.parked_write(
                child.token, dump_json(data), expect, linking="linking" in data
            )
            await self._store.write(write)
        else:
            await self._free(child, parked, data, quietly=quietly)
        return False

    async def tell_wide(
        self, parent: Parent, child: str, place: str, *, quietly: bool = False
    ) -> Wait:
        """Tell a child with many parents that one has ended. Repeatable.

        `FAILS`: the child has ended as failed for it. `quietly`: the caller has just stored the
        child, and releases it when no parent is open any more.
        """
        wait = await self.waits.take_out(child, place, parent, stored=quietly)
        if wait is Wait.CLOSED and not quietly:
            await self._finish_wide(child, place)
        if wait is Wait.FAILS:
            failed = await self._fail_wide(child, parent)
            if failed and not quietly:
                await self.waits.remove(child)
        elif wait is Wait.GONE and not parent.completed:
            failed = _failed_for((await self.read(parent.outcome, [child]))[child], parent)
        else:
            return wait
        return Wait.FAILS if failed else Wait.GONE

    async def _fail_wide(self, child: str, parent: Parent) -> bool:
        async def fail() -> bool:
            snapshot = (await self.read(parent.outcome, [child]))[child]
            parked = snapshot.later.get(Place.PARKED)
            data = None if parked is None else await self._open(snapshot, parked)
            if data is None:
                return _failed_for(snapshot, parent)
            return await self._fail(snapshot, data, parent)

        async with self._turns.of(child):
            return await commit(fail)

    async def _finish_wide(self, child: str, place: str) -> None:
        """Release a child whose last part is empty."""
        top = self._keys.wait(child, f"{place.partition('.')[0]}.top")

        async def finish() -> None:
            snapshot = (await self.read(top, [child]))[child]
            parked = snapshot.later.get(Place.PARKED)
            data = None if parked is None else await self._open(snapshot, parked)
            if parked is not None and data is not None:
                await self.free_wide(snapshot, parked, data)
            elif not snapshot.later:
                await self.waits.remove(child)

        async with self._turns.of(child):
            await commit(finish)

    async def free_wide(self, child: Snapshot, record: Record, data: dict[str, Any]) -> None:
        """Release a child without open parents: with the results that fit, from the parts."""
        results = await self.waits.results(child.token, str(data.get("wide")))
        room = self._store.backend.max_body // 2 - len(record.body)
        kept: dict[str, Any] = {}
        for parent, result in results.items():
            room -= len(dump_json({parent: result}))
            if room < 0:
                break
            kept[parent] = result
        data["parent_results"] = kept
        await self._free(child, record, data)
        await self.waits.remove(child.token)

    async def _open(self, child: Snapshot, parked: Record) -> dict[str, Any] | None:
        """Return the parked job; `None` if it has gone on or is junk.

        Delete its leftovers.
        """
        try:
            data = load_json(parked.body)
            order = Job.decode(parked.body).order
            moved_on = child.ended_since(order[0]) or any(
                Job.decode(record.body).order > order
                for place, record in child.later.items()
                if place is not Place.PARKED
            )
        except InvalidJob as problem:
            logger.warning(
                "parked job %.200r is malformed; leaving it alone: %s", parked.subject, problem
            )
            return None
        if moved_on:
            await self._store.delete(parked)
            return None
        return data

    # -- it goes

    async def _free(
        self, child: Snapshot, record: Record, data: dict[str, Any], *, quietly: bool = False
    ) -> None:
        """Let a child go whose parents are all done: to its tier, or until its time has come."""
        linking = data.pop("linking", None) is not None
        for name in ("parents", "wide"):
            data.pop(name, None)
        now, run_at = self._store.now(), data.get("delay_until")
        run_at = run_at if isinstance(run_at, int | float) and run_at > now else now
        if linking and run_at - TIMER_LEAD <= now:
            await self.hand_over(child, record, data)
        elif run_at > now:
            await self._delay(child, record, dump_json(data), (run_at, now), linking=linking)
        else:
            await self._make_ready(child.token, record, data)
        if not quietly:
            await announce(self._store, READY, decode_token(child.token))

    async def _delay(
        self,
        child: Snapshot,
        record: Record,
        body: bytes,
        times: tuple[float, float],
        *,
        linking: bool,
    ) -> None:
        expect = Expect(self._keys.later_all(child.token), child.last_later)
        await self._store.write(delayed_write(self._keys, child.token, body, times, expect))
        if linking:  # producers may not delete: a marker ends the timer as well
            marker = Write(record.subject, b"", ttl=MARKER_TTL, marker=True)
            await self._store.write(marker)
        else:
            await self._store.delete(record)

    async def hand_over(self, child: Snapshot, record: Record, data: Mapping[str, Any]) -> None:
        """Move a job from where it waits with a timer to the promoters, in one message."""
        write = Write(
            self._keys.later(child.token, Place.RELEASED),
            dump_json(data),
            Expect(self._keys.later_all(child.token), record.sequence),
            removes=record.subject,
            beside=True,
        )
        await self._store.write(write)

    async def _make_ready(self, token: str, record: Record, data: dict[str, Any]) -> None:
        data.pop("delay_until", None)
        body = dump_json(data)
        job = Job.decode(body)
        with suppress(TooManyPriorities):  # workers look for jobs whose tier is missing
            await self._store.assets.declare_tier(job.priority)
        write = Write(
            self._keys.ready(job.priority, token),
            body,
            Expect(self._keys.ready_any(token)),
            message_id=promotion_id(await self.secret.get(), record.sequence, record.time),
        )
        sequence = 0
        try:
            sequence = await self._store.write(write)
        except WriteRefused:  # it is there, or an older attempt is
            if await self._older_attempt_is_ready(token, job):
                raise  # its acknowledgement is on the way
        if not await self._store.delete(record) and sequence:
            await self._take_back(token, sequence)

    async def _older_attempt_is_ready(self, token: str, job: Job) -> bool:
        records = await self._store.last(self._keys.ready_any(token))
        try:
            return not records or Job.decode(records[-1].body).order < job.order
        except InvalidJob:
            return False

    async def _take_back(self, token: str, sequence: int) -> None:
        """Remove what was made ready if the job was cancelled.

        Its parked record was gone by then.
        """
        records = await self._store.last(self._keys.ends(token))
        if Snapshot.of(token, records, self._keys).ended:
            await self._store.backend.delete(self._keys.ready_log, sequence)

    async def _fail(self, child: Snapshot, data: Mapping[str, Any], parent: Parent) -> bool:
        """End a child as failed. Return whether it has, also if an earlier try did."""
        parked = child.later[Place.PARKED]
        end = await self._store.read_end(child.token)
        if not end.ended:
            write = self.failure(data, child.token, parent.id, end.fence)
            if "linking" in data:
                write = replace(write, removes=parked.subject)
            await self._store.write(write)
        if end.ended or "linking" not in data:
            await self._store.delete(parked)
        return not end.ended or _failed_for(end, parent)

    def failure(self, data: Mapping[str, Any], token: str, parent_id: str, expect: Expect) -> Write:
        """Return the write that ends a job as failed for a parent of it."""
        fields = {
            "status": State.FAILED,
            "last_error": blame(parent_id),
            "finished_at": self._store.now(),
        }
        body = dump_json({name: data[name] for name in data if name != "linking"} | fields)
        ttl = self._store.assets.settings.failed_ttl
        return Write(
            self._keys.outcome(token, State.FAILED),
            body,
            expect,
            ttl=ttl,
            beside=True,
            index=self._keys.index(token, State.FAILED),
        )

    # -- its edges are there

    async def settle(self, job: Job, sequence: int, *, closed: bool = False) -> None:
        """Take the timer off a job whose edges are all there.

        Args:
            job: as it was parked.
            sequence: of its parked record; 0: it is read.
            closed: it has many parents, and none of them is open any more.
        """
        token, body = encode_token(job.job_id), parked_body(job)
        key = self._keys.later(token, Place.PARKED)

        async def unlink(body: bytes, sequence: int) -> None:
            write = self.parked_write(token, body, Expect(key, sequence), linking=False)
            await self._store.write(write)

        async def read_and_unlink() -> None:
            child = (await self._store.read_snapshots([token]))[token]
            parked = child.later.get(Place.PARKED)
            data = None if parked is None else await self._open(child, parked)
            if parked is None or data is None or data.pop("linking", None) is None:
                return
            if closed:
                await self.hand_over(child, parked, data)
            else:
                await unlink(dump_json(data), parked.sequence)

        async with self._turns.of(token):
            if sequence and not closed:
                try:
                    await unlink(body, sequence)
                except WriteRefused:  # a parent has ended meanwhile, or it was cancelled
                    await pause_after_refusal()
                else:
                    return
            await commit(read_and_unlink)


def parked_body(job: Job) -> bytes:
    """Return the record of a job that waits, with its open `parents`, or many of them in parts."""
    if job.wide:
        return replace(job, parents=[]).encode()
    return job.encode()


def linking_body(job: Job) -> bytes:
    """Return the record of a job that waits, while its edges are being written."""
    return splice(parked_body(job), b'"linking":true')


def _failed_for(child: Snapshot, parent: Parent) -> bool:
    """Return whether a child has ended as failed for this parent."""
    if child.outcome is None or child.state is not State.FAILED:
        return False
    try:
        return load_json(child.outcome.body).get("last_error") == blame(parent.id)
    except InvalidJob:
        return False
