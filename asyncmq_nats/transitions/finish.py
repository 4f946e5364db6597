"""Every transition of a job, and the only writer of its records.

The rules, explained in `docs/architecture.md`: 1. destination first, then source; 2. the first delivery trusts, a redelivery verifies and
claims; 3. what ends an attempt is fenced, and the first outcome wins.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Final

from asyncmq_nats._logging import get_logger
from asyncmq_nats.backends.base import Backend, Delivery, Expect, Record, Settled, Write
from asyncmq_nats.events import STALLED
from asyncmq_nats.exceptions import (
    BackendError,
    InvalidJob,
    NotSerializable,
    PayloadTooLarge,
    WriteRefused,
)
from asyncmq_nats.jobs import WIRE_VERSION, Job, JobHead, new_job_id
from asyncmq_nats.retries import Failure, add_failure
from asyncmq_nats.schedules import parse_every
from asyncmq_nats.states import OUTCOMES, Place, State
from asyncmq_nats.store.announcing import announce
from asyncmq_nats.store.commit import pause_after_refusal
from asyncmq_nats.store.progress import ProgressReports
from asyncmq_nats.store.topology import QueueAssets
from asyncmq_nats.transitions.add import Additions
from asyncmq_nats.transitions.claim import AFTERLIFE, Attempt, Claim, Verdict, leave
from asyncmq_nats.transitions.release import MARKER_TTL, delayed_write
from asyncmq_nats.wire.codec import dump_json, load_json, splice
from asyncmq_nats.wire.keys import (
    LONGEST_TOKEN,
    QueueSubjects,
    decode_token,
    encode_token,
    fit_token,
    is_token,
)

__all__ = ["Lifecycle"]

logger = get_logger(__name__)

SettleEnd = Callable[[Write, Settled], None]
"""Learns whether the write that ends an attempt was confirmed or refused."""

OUR_JOBS: Final = b'{"v":1,"id":"'
"""What the jobs begin with that this library writes."""
OUTCOME_FIELDS: Final = (
    "status", "result", "last_error", "error_traceback", "active_since", "finished_at", "worker", "stalls",
)  # fmt: skip
"""What a job has only because of what became of it."""
ARGUMENT_FIELDS: Final = (
    "v", "args", "kwargs", "parent_results", "errors", "error_traceback", "backoff", "priority", "retries", "depends_on", "parents",
)  # fmt: skip
"""What an outcome can do without."""


class Lifecycle:
    """The transitions of the jobs of one queue."""

    def __init__(
        self, backend: Backend, subjects: QueueSubjects, assets: QueueAssets, worker: str = ""
    ) -> None:
        self._backend = backend
        self._subjects = subjects
        self._assets = assets
        self._settings = backend.settings
        self._additions = Additions(backend, subjects, assets)
        self.dependencies = self._additions.dependencies
        self._worker = worker
        self._worker_json = dump_json(worker)
        self.progress = ProgressReports(self._send_progress)

    def now(self) -> float:
        """Return the server's time."""
        return self._backend.now()

    # -- begin

    def open(self, delivery: Delivery) -> Attempt:
        """Return the attempt that a delivery stands for. If it is not the first one of its job, `verify` it.

        Raises:
            InvalidJob: the message is not a job; `reject` it.
        """
        body, token = delivery.body, delivery.subject.rpartition(".")[2]
        if not is_token(token):
            raise InvalidJob(
                f"its id, the last token of its subject, must be UTF-8 and at most {LONGEST_TOKEN:,} bytes"
            )
        if body.startswith(OUR_JOBS):
            try:
                return Attempt(delivery, token, JobHead.decode(body), body=body)
            except InvalidJob:  # others may begin like this too, and leave out what we do not
                pass
        body = self._as_ours(delivery, token)
        return Attempt(delivery, token, JobHead.decode(body), body=body)

    def _as_ours(self, delivery: Delivery, token: str) -> bytes:
        """Return a job of a foreign producer as we would have written it: id and priority of the subject, all that must be there."""
        Job.decode(delivery.body)
        data = load_json(delivery.body)
        for name in OUTCOME_FIELDS:
            data.pop(name, None)
        priority, _ = self._subjects.split_ready(delivery.subject)
        known = {"v": data.pop("v", WIRE_VERSION), "id": decode_token(token), "priority": priority}
        try:
            return dump_json(
                known
                | {"created_at": delivery.time}
                | {key: value for key, value in data.items() if key not in known}
            )
        except NotSerializable as error:  # 1e999 is a number of JSON, and infinite when read
            raise InvalidJob(str(error)) from None

    async def verify(self, attempt: Attempt) -> Attempt | Verdict:
        """Rule 2: find out what an earlier delivery came to, and claim the job if it came to nothing; or return why it is not to be run."""
        token, subjects = attempt.token, self._subjects
        while True:
            records = await self._backend.last(
                subjects.bucket_log, subjects.later_all(token), subjects.done_all(token)
            )
            done = [
                record
                for record in records
                if not subjects.is_later(record.subject, Place.RELEASED) and self._is_done(record)
            ]
            edges = any(subjects.is_edge(record.subject) for record in done)
            if any(not record.marker and subjects.outcome_state(record.subject) for record in done):
                if edges or attempt.head.children:
                    await self.dependencies.release(token)
                return Verdict.DONE
            later = [
                record for record in records if not self._is_done(record) and not record.marker
            ]
            if any(_order(record) > attempt.job.order for record in later):
                return Verdict.DONE
            claim = next(
                (
                    Claim.decode(r.body)
                    for r in done
                    if subjects.is_claim(r.subject) and not r.marker
                ),
                None,
            )
            if claim is not None and claim.order >= attempt.order:
                return claim.verdict
            ours = Claim(self._worker, *attempt.order, stalls=attempt.count_stalls(claim))
            last = max((record.sequence for record in done), default=0)
            write = Write(
                subjects.claim(token), ours.encode(), Expect(subjects.done_all(token), last)
            )
            try:
                sequence = await self._backend.write(subjects.bucket_log, write)
            except WriteRefused:
                await pause_after_refusal()
                continue
            if (
                claim is None
                or claim.message != attempt.delivery.sequence
                or ours.stalls > claim.stalls
            ):
                await announce(
                    self._backend, subjects, STALLED, attempt.head.job_id, stalls=ours.stalls
                )
            leftovers = tuple(record.subject for record in later)
            head = replace(attempt.head, stalls=ours.stalls)
            return Attempt(
                attempt.delivery,
                token,
                head,
                sequence,
                claimed=True,
                leftovers=leftovers,
                awaited=edges,
                body=attempt.body,
            )

    def _is_done(self, record: Record) -> bool:
        return self._subjects.is_done(record.subject)

    # -- end

    async def complete(self, attempt: Attempt, result: Any, settle: SettleEnd) -> None:
        """Record the result. `settle` learns of the confirmation or the refusal; see `settled`.

        Raises:
            NotSerializable: the result is not JSON.
            PayloadTooLarge: the outcome is too large for the server.
        """
        write = self._completed(attempt, result)
        if attempt.claimed or attempt.companions:
            await self._write_claimed(attempt, write, settle)
        else:
            self._backend.send(self._subjects.bucket_log, write, partial(settle, write))

    async def accompany(self, attempt: Attempt, follow_ups: Sequence[Job], result: Any) -> None:
        """Have the jobs that a task added while it ran, and its own next run if it repeats, committed together with its result.

        Raises:
            JobNotFound: one of them depends on a job that is not in this queue.
            InvalidJob: it repeats at no interval that can be kept.
            TooManyPriorities, NotSerializable, PayloadTooLarge: as for `Queue.add`.
        """
        if follow_ups or attempt.head.repeat_every is not None:
            attempt.make_companions = partial(
                self._follow_up_writes, attempt.job, follow_ups, result
            )
            attempt.companions = await attempt.make_companions()

    async def _follow_up_writes(
        self, job: Job, follow_ups: Sequence[Job], result: Any
    ) -> tuple[Write, ...]:
        children = {
            each.job_id: [
                other.job_id for other in follow_ups if each.job_id in (other.depends_on or ())
            ]
            for each in follow_ups
        }
        jobs = [replace(each, children=children[each.job_id]) for each in follow_ups]
        if job.repeat_every is not None:
            jobs.append(self._next_run(job))
        for priority in {each.priority for each in jobs}:
            await self._assets.declare_tier(priority)
        return tuple(
            [
                write
                for each in jobs
                for write in await self._additions.linked_writes(
                    each, children, {job.job_id: result}
                )
            ]
        )

    def _next_run(self, job: Job) -> Job:
        now = self._backend.now()
        try:
            run_at = now + parse_every(job.repeat_every or 0.0)
        except (TypeError, ValueError) as error:
            raise InvalidJob(f"repeat_every: {error}") from None
        again = replace(
            job, job_id=new_job_id(), created_at=now, delay_until=run_at, custom_id=False
        )
        return replace(
            again, retries=0, errors=[], stalls=0, depends_on=None, parent_results={}, children=[]
        )

    async def fail(self, attempt: Attempt, failure: Failure, settle: SettleEnd) -> None:
        """Record a failure for good."""
        job = add_failure(attempt.job, failure)
        fields = {
            "errors": job.errors,
            "retries": job.retries,
            "last_error": failure.error,
            "error_traceback": failure.traceback,
        }
        await self._write_claimed(
            attempt, self._outcome(attempt, State.FAILED, fields, "the failure"), settle
        )

    async def expire(self, attempt: Attempt, settle: SettleEnd) -> None:
        """Record that the job's time to live was over before it started."""
        error = f"its time to live of {attempt.head.ttl:g} s was over before this attempt started"
        await self._write_claimed(
            attempt,
            self._outcome(attempt, State.EXPIRED, {"last_error": error}, "the expiry"),
            settle,
        )

    async def retry(
        self, attempt: Attempt, failure: Failure, delay: float, settle: SettleEnd
    ) -> None:
        """Schedule the next attempt, `delay` seconds from now."""
        job = replace(add_failure(attempt.job, failure), stalls=0, status=State.WAITING)
        await self._reschedule(
            attempt, job, self._backend.now() + delay if delay > 0 else None, settle
        )

    async def postpone(self, attempt: Attempt, settle: SettleEnd) -> None:
        """Move a ready job whose time is still to come to where delayed jobs wait."""
        await self._reschedule(attempt, attempt.job, attempt.head.delay_until, settle)

    async def _reschedule(
        self, attempt: Attempt, job: Job, run_at: float | None, settle: SettleEnd
    ) -> None:
        data = load_json(attempt.body)
        data |= {
            "id": job.job_id,
            "created_at": job.created_at,
            "priority": job.priority,
            "retries": job.retries,
            "errors": job.errors,
        }
        data["delay_until"] = run_at
        expect = self._fence(attempt)
        if run_at is None:
            write = Write(
                self._subjects.later(attempt.token, Place.RELEASED),
                dump_json(data),
                expect,
                beside=True,
            )
        else:
            write = delayed_write(
                self._subjects,
                attempt.token,
                dump_json(data),
                (run_at, self._backend.now()),
                expect,
            )
        await self._write_claimed(attempt, write, settle)

    async def reject(self, delivery: Delivery, problem: InvalidJob) -> None:
        """Record a message that is not a job as failed, with what it was, so that it is neither lost nor delivered for ever."""
        token = fit_token(delivery.subject.rpartition(".")[2])
        now = self._backend.now()
        record = {
            "v": 1, "id": decode_token(token), "task": "?", "created_at": delivery.time, "status": State.FAILED, "last_error": str(problem),
            "finished_at": now, "worker": self._worker, "body": delivery.body[:100_000].decode("utf-8", "replace"),
        }  # fmt: skip
        write = Write(
            self._subjects.outcome(token, State.FAILED),
            dump_json(record),
            ttl=self._settings.failed_ttl,
            beside=True,
        )
        while True:
            records = await self._backend.last(
                self._subjects.bucket_log, self._subjects.done_all(token)
            )
            live = [record for record in records if not record.marker]
            if any(self._subjects.outcome_state(record.subject) for record in live):
                logger.warning(
                    "%.200r: not a job, and there is an outcome already: dropped", delivery.subject
                )
                break
            last = max((record.sequence for record in records), default=0)
            claims = [
                Write(r.subject, b"", ttl=MARKER_TTL, marker=True)
                for r in live
                if self._subjects.is_claim(r.subject)
            ]
            try:
                await self._backend.write(
                    self._subjects.bucket_log,
                    replace(write, expect=Expect(self._subjects.done_all(token), last)),
                    *claims,
                )
            except (
                WriteRefused
            ):  # something was added, or a replica was asked that lags behind: look again
                await pause_after_refusal()
                continue
            if any(self._subjects.is_edge(record.subject) for record in live):
                await self.dependencies.release(token)
            break
        delivery.ack()

    def _completed(self, attempt: Attempt, result: Any) -> Write:
        """Return the write of a result: the job as it came, byte for byte, and what it came to."""
        what = f"the result of task {attempt.head.task_id!r}"
        members = b'"status":"completed","result":%b,"active_since":%r,"finished_at":%r,"worker":%b' % (
            dump_json(result, what), attempt.started_at, self._backend.now(), self._worker_json,
        )  # fmt: skip
        if attempt.head.stalls:
            members += b',"stalls":%d' % attempt.head.stalls
        record = splice(attempt.body, members)
        if len(record) > self._backend.max_body:
            raise PayloadTooLarge(what, len(record), self._backend.max_body)
        subject = self._subjects.outcome(attempt.token, State.COMPLETED)
        return Write(
            subject,
            record,
            self._fence(attempt),
            ttl=self._settings.completed_ttl,
            beside=True,
            when_full=partial(without_arguments, record),
        )

    def _outcome(self, attempt: Attempt, state: State, fields: dict[str, Any], what: str) -> Write:
        """Return the write of an outcome other than a result."""
        fields = {"status": state, **fields, "active_since": attempt.started_at or None}
        fields |= {"finished_at": self._backend.now(), "worker": self._worker}
        if attempt.head.stalls:
            fields["stalls"] = attempt.head.stalls
        record = dump_json(load_json(attempt.body) | fields, what)
        if len(record) > self._backend.max_body:
            record = dump_json(
                {
                    "id": attempt.head.job_id,
                    "task": attempt.head.task_id,
                    "truncated": True,
                    "max_retries": 0,
                }
                | fields,
                what,
            )
        subject = self._subjects.outcome(attempt.token, state)
        return Write(
            subject,
            record,
            self._fence(attempt),
            ttl=self._settings.failed_ttl,
            beside=True,
            when_full=partial(without_arguments, record),
        )

    def _fence(self, attempt: Attempt) -> Expect:
        return Expect(self._subjects.done_all(attempt.token), attempt.expect)

    async def _write_claimed(self, attempt: Attempt, write: Write, settle: SettleEnd) -> None:
        """Write the end of an attempt, together with the removal of its claim and of what is left of it in transit."""
        removals = self._removals(attempt, write)
        if not removals:  # repeated until stored, however long the store is full
            self._backend.send(self._subjects.bucket_log, write, partial(settle, write))
            return
        try:
            settle(write, await self._backend.write(self._subjects.bucket_log, write, *removals))
        except PayloadTooLarge:
            raise
        except BackendError as error:
            settle(write, error)

    def _removals(self, attempt: Attempt, write: Write) -> list[Write]:
        outcome = self._subjects.outcome_state(write.subject)
        companions = list(attempt.companions) if outcome is State.COMPLETED else []
        if not attempt.claimed:
            return companions
        leftovers = [
            Write(subject, b"", ttl=MARKER_TTL, marker=True)
            for subject in attempt.leftovers
            if subject != write.subject
        ]
        claim = self._subjects.claim(attempt.token)
        if outcome is not None:
            return [*companions, Write(claim, b"", ttl=MARKER_TTL, marker=True), *leftovers]
        # Beside a retry a claim stays, void for its message: what a worker of this one that was frozen says of its end comes to it.
        stays = Claim(self._worker, *attempt.order, stalls=attempt.head.stalls, released=True)
        return [*leftovers, Write(claim, stays.encode(), ttl=AFTERLIFE)]

    # -- for the tasks that run

    def report_progress(self, job: Job, progress: float, data: Any) -> None:
        """Store how far a running job is, and tell its listeners. Sent, not confirmed; from any thread.

        Raises:
            NotSerializable: the data is not JSON.
            PayloadTooLarge: it does not fit into a message.
        """
        what = "the progress data"
        body = dump_json({"id": job.job_id, "progress": progress, "data": data}, what)
        if len(body) > self._backend.max_body:
            raise PayloadTooLarge(what, len(body), self._backend.max_body)
        self.progress.report(encode_token(job.job_id), body)

    def _send_progress(self, token: str, body: bytes) -> None:
        write = Write(self._subjects.progress(token), body, ttl=self._settings.progress_ttl)
        self._backend.send(self._subjects.bucket_log, write, lambda _: None)
        self._backend.signal(self._subjects.event("progress", token), body)

    async def results_of_parents(self, job: Job) -> dict[str, Any]:
        """Return the results of the jobs that a job depends on, by id; those that did not complete are left out."""
        return await self.dependencies.results(job)

    # -- for the queue

    async def trim(self) -> None:
        """Remove the oldest outcomes of the kinds of which only the last so many are kept."""
        for state in OUTCOMES:
            keep = (
                self._settings.completed_keep
                if state is State.COMPLETED
                else self._settings.failed_keep
            )
            if keep is not None:
                await self._backend.purge(
                    self._subjects.bucket_log, self._subjects.outcomes(state), keep=keep
                )

    async def cancelled_among(self, job_ids: Sequence[str]) -> list[str]:
        """Return those of the jobs that were cancelled."""
        keys = [self._subjects.outcome(encode_token(job_id), State.CANCELLED) for job_id in job_ids]
        records = await self._backend.last(self._subjects.bucket_log, *keys) if keys else []
        return [
            decode_token(self._subjects.token(record.subject))
            for record in records
            if not record.marker
        ]

    async def is_cancelled(self, job_id: str) -> bool:
        """Return whether the job has ended as cancelled."""
        return bool(await self.cancelled_among([job_id]))

    # -- after a refusal

    async def settled(self, attempt: Attempt, write: Write, result: Settled) -> Verdict:
        """Decide what a confirmed or refused end of an attempt means; a write that may be repeated is repeated here (rule 3)."""
        verdict: Verdict | None = None
        for times in range(20):
            if not isinstance(result, WriteRefused):
                break
            if times:
                await pause_after_refusal()
            records = await self._backend.last(
                self._subjects.bucket_log, self._subjects.done_all(attempt.token)
            )
            attempt.awaited = any(self._subjects.is_edge(record.subject) for record in records)
            attempt.claimed |= any(
                self._subjects.is_claim(record.subject) and not record.marker for record in records
            )
            verdict = self._judge(attempt, write.body, records)
            ended = any(
                self._subjects.outcome_state(record.subject) and not record.marker
                for record in records
            )
            if verdict is Verdict.DONE and ended:
                break
            if verdict is not None:
                return verdict
            attempt.expect = max((record.sequence for record in records), default=0)
            write = replace(write, expect=self._fence(attempt))
            result = await self._write_again(attempt, write)
        if isinstance(result, BackendError) and verdict is not Verdict.DONE:
            logger.error(
                "job %s: its end could not be recorded, it will be delivered again: %s",
                attempt.head.job_id,
                result,
            )
            return Verdict.STALE
        if (attempt.awaited or attempt.head.children) and self._subjects.outcome_state(
            write.subject
        ) is not None:
            await self.dependencies.release(attempt.token)
        return Verdict.DONE

    async def _write_again(self, attempt: Attempt, write: Write) -> Settled:
        if attempt.make_companions is not None:
            attempt.companions = await attempt.make_companions()
        try:
            return await self._backend.write(
                self._subjects.bucket_log, write, *self._removals(attempt, write)
            )
        except BackendError as error:
            return error

    def _judge(self, attempt: Attempt, body: bytes, records: Sequence[Record]) -> Verdict | None:
        """Return what the records that refused a write say about it; `None`: it may be written again, expecting them."""
        for record in records:
            if record.marker:
                continue
            if self._subjects.outcome_state(record.subject) is not None:
                if record.body != body:
                    logger.warning(
                        "job %s ended otherwise meanwhile: this worker's end of it is dropped",
                        attempt.head.job_id,
                    )
                return Verdict.DONE
            if (
                self._subjects.is_claim(record.subject)
                and (claim := Claim.decode(record.body)).order > attempt.order
            ):
                logger.warning(
                    "job %s was taken over by another worker: this worker's end of it is dropped",
                    attempt.head.job_id,
                )
                return claim.verdict
        return None

    # -- hand back

    async def hand_back(self, attempt: Attempt) -> None:
        """Give a job that did not end back to the queue, without counting it as stalled."""
        claim = Claim(
            self._worker, *attempt.order, stalls=attempt.head.stalls, released=True
        ).encode()
        subjects, verdict = self._subjects, None
        while verdict is None:
            try:
                await self._backend.write(
                    subjects.bucket_log,
                    Write(
                        subjects.claim(attempt.token), claim, self._fence(attempt), ttl=AFTERLIFE
                    ),
                )
            except WriteRefused:  # another worker is in charge, the job has ended, or there is a claim of an earlier message
                records = await self._backend.last(
                    subjects.bucket_log, subjects.done_all(attempt.token)
                )
                verdict = self._judge(attempt, claim, records)
                attempt.expect = max((record.sequence for record in records), default=0)
                await pause_after_refusal()
            else:
                attempt.delivery.nak()
                return
        leave(attempt.delivery, verdict)


def without_arguments(record: bytes) -> bytes:
    """Return an outcome as it is stored in a full store: a job that is ready takes more room."""
    data = load_json(record)
    for name in ARGUMENT_FIELDS:
        data.pop(name, None)
    return dump_json(data | {"truncated": True, "max_retries": 0})


def _order(record: Record) -> tuple[int, int]:
    """Return which attempt a record in transit is of; junk is of none."""
    try:
        return Job.decode(record.body).order
    except InvalidJob:
        return -1, -1
