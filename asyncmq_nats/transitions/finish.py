"""The end of an attempt: complete, fail, expire, retry, postpone.

What ends an attempt is one write, and the server rejects it if another worker has the job. After
it is confirmed, the claim and other leftovers are deleted, children are told, and the message is
acknowledged last: a crash in between is repeated by the redelivery.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any, Final

from asyncmq_nats._logging import get_logger
from asyncmq_nats.backends.base import Delivery, Expect, Record, Settled, Write
from asyncmq_nats.context import JobLogLine
from asyncmq_nats.exceptions import BackendError, InvalidJob, PayloadTooLarge, WriteRefused
from asyncmq_nats.jobs import Job
from asyncmq_nats.retries import Failure, add_failure
from asyncmq_nats.states import OUTCOMES, Place, State
from asyncmq_nats.store.commit import commit, pause_after_refusal
from asyncmq_nats.store.job_logs import JobLogs, cut_line
from asyncmq_nats.store.progress import ProgressReports
from asyncmq_nats.store.queue_store import QueueStore
from asyncmq_nats.store.records import delayed_write, outcome_body, without_markers
from asyncmq_nats.store.snapshot import Snapshot
from asyncmq_nats.transitions.claim import Attempt, Disposition
from asyncmq_nats.transitions.deliver import Deliveries
from asyncmq_nats.wire.codec import dump_json, dump_number, load_json, splice
from asyncmq_nats.wire.keys import decode_token, encode_token, fit_token, last_token

__all__ = ["PUT_OFF_FIELDS", "Lifecycle"]

logger = get_logger(__name__)

OnSettled = Callable[[Attempt, Write, Settled], None]
"""Called when the write that ends an attempt was confirmed or rejected. Must not block."""
MIN_PUT_OFF_SECONDS = 1.0
MAX_PUT_OFF_SECONDS = 60.0
"""How long a job that cannot be run here is put off at a time."""
MAX_REASON_LENGTH = 2_000
PUT_OFF_FIELDS = ("put_off_since", "put_off_reason", "snoozes")
"""Fields that tell why a job waits: the next attempt drops them."""
ARGUMENT_FIELDS = (
    "v",
    "args",
    "kwargs",
    "parent_results",
    "errors",
    "error_traceback",
    "backoff",
    "priority",
    "retries",
    "depends_on",
    "parents",
)
"""Fields that an outcome can do without."""
MAX_REJECTIONS = 20
"""How often the end of an attempt is written again after it was rejected."""

COMPLETED_MEMBERS: Final = (
    b'"status":"completed","result":%b,"active_since":%b,"finished_at":%b,"worker":%b'
)


class Lifecycle(Deliveries):
    """The transitions of the jobs of one queue that a worker makes."""

    def __init__(self, store: QueueStore, worker: str = "") -> None:
        super().__init__(store, worker)
        self.progress = ProgressReports(self._send_progress)
        self.logs = JobLogs(
            self._send_lines, self._assets.settings.job_log_lines, lambda: store.backend.max_body
        )
        self.on_progress: Callable[[bytes], None] = lambda report: None
        """Told of each progress report that was sent."""
        self.on_settled: OnSettled = lambda attempt, write, result: None
        """Told what became of each final write; see `settled`."""
        self._worker_json = dump_json(worker)

    def now(self) -> float:
        """Return the server's time."""
        return self._backend.now()

    def now_at_most(self) -> float:
        """Return the latest time that the server's clock may show now: delays count from it."""
        return self._backend.now_at_most()

    # -- end

    def complete(self, attempt: Attempt, result: Any) -> None:
        """Record the result. `on_settled` learns of the confirmation or the refusal.

        Raises:
            NotSerializable: the result is not JSON.
            PayloadTooLarge: the outcome is too large for the server.
        """
        self._send(attempt, self._completed(attempt, result))

    async def complete_with_follow_ups(self, attempt: Attempt, result: Any) -> None:
        """Record the result with the jobs of `accompany`; see `complete`."""
        if attempt.follow_ups is not None and attempt.follow_ups.batch:
            write = self._completed(attempt, result)
            await self._write_batch(attempt, write, attempt.follow_ups.batch)
        else:
            self.complete(attempt, result)

    async def accompany(self, attempt: Attempt, follow_ups: Sequence[Job], result: Any) -> None:
        """Have the jobs that a task added while it ran added with its result; see `follow_up.py`.

        Raises:
            JobNotFound, InvalidJob, TooManyPriorities, NotSerializable, PayloadTooLarge: as for
                `FollowUpJobs.prepare`.
        """
        if follow_ups or attempt.head.repeat_every is not None:
            prepare = partial(self._follow_ups.prepare, attempt.job, follow_ups, result)
            attempt.follow_ups = await prepare()
            if attempt.follow_ups.batch:
                attempt.prepare_again = prepare

    async def fail(self, attempt: Attempt, failure: Failure) -> None:
        """Record a failure for good."""
        job = add_failure(attempt.job, failure)
        fields = {
            "errors": job.errors,
            "retries": job.retries,
            "last_error": failure.error,
            "error_traceback": failure.traceback,
        }
        self._send(attempt, self._outcome(attempt, State.FAILED, fields, "the failure"))

    async def expire(self, attempt: Attempt, failure: Failure | None = None) -> None:
        """Record that the job expired: its time to live was over, or its task said so."""
        error = (
            f"its time to live of {attempt.head.ttl or 0:g} s was over before this attempt started"
            if failure is None
            else failure.error
        )
        outcome = self._outcome(attempt, State.EXPIRED, {"last_error": error}, "the expiry")
        self._send(attempt, outcome)

    async def retry(self, attempt: Attempt, failure: Failure, delay: float) -> None:
        """Schedule the next attempt, `delay` seconds from now."""
        job = add_failure(attempt.job, failure)
        run_at = self._backend.now_at_most() + delay if delay > 0 else None
        await self._reschedule(attempt, _fields_of_next(job), run_at)

    async def snooze(self, attempt: Attempt, delay: float) -> None:
        """Have the job run again in `delay` seconds, as its task wishes; no retry is counted."""
        job = attempt.job
        fields = _fields_of_next(job) | {"put_offs": job.put_offs + 1, "snoozes": job.snoozes + 1}
        run_at = self._backend.now_at_most() + delay if delay > 0 else None
        await self._reschedule(attempt, fields, run_at)

    async def postpone(self, attempt: Attempt) -> None:
        """Move a ready job whose time is still to come to where delayed jobs wait."""
        await self._reschedule(attempt, _fields_of_next(attempt.job), attempt.head.delay_until)

    async def put_off(self, attempt: Attempt, reason: str) -> float | None:
        """Delay a job that this worker cannot run, but another may; no retry is counted.

        Return by how many seconds: they grow with the time for which it has been put off. `None`:
        that was `unknown_task_timeout`, and nothing was written.
        """
        job, now = attempt.job, self._backend.now()
        since = now if job.put_off_since is None else min(job.put_off_since, now)
        left = since + self._assets.settings.unknown_task_timeout - now
        if left <= 0:
            return None
        delay = min(max(MIN_PUT_OFF_SECONDS, now - since), MAX_PUT_OFF_SECONDS, left)
        fields = {
            "id": job.job_id,
            "created_at": job.created_at,
            "priority": self._keys.split_ready(attempt.delivery.subject)[0],
            "put_offs": job.put_offs + 1,
            "put_off_since": since,
            "put_off_reason": reason[:MAX_REASON_LENGTH],
        }
        await self._reschedule(attempt, fields, self._backend.now_at_most() + delay)
        return delay

    async def _reschedule(
        self, attempt: Attempt, fields: dict[str, Any], run_at: float | None
    ) -> None:
        data = load_json(attempt.body)
        for name in PUT_OFF_FIELDS:  # it was run since
            data.pop(name, None)
        data |= fields | {"delay_until": run_at}
        expect = self._fence(attempt)
        if run_at is None:
            write = Write(
                self._keys.later(attempt.token, Place.RELEASED),
                dump_json(data),
                expect,
                beside=True,
            )
        else:
            write = delayed_write(
                self._keys,
                attempt.token,
                dump_json(data),
                (run_at, self._backend.now()),
                expect,
            )
        self._send(attempt, write)

    async def reject(self, delivery: Delivery, problem: InvalidJob) -> None:
        """Record a message that is not a job as failed, with its body.

        Then it is neither lost nor delivered for ever.
        """
        token = fit_token(last_token(delivery.subject))
        now = self._backend.now()
        record = {
            "v": 1,
            "id": decode_token(token),
            "task": "?",
            "created_at": delivery.time,
            "status": State.FAILED,
            "last_error": str(problem),
            "finished_at": now,
            "worker": self.worker,
            "body": delivery.body[:100_000].decode("utf-8", "replace"),
        }
        write = Write(
            self._keys.outcome(token, State.FAILED),
            dump_json(record),
            ttl=self._assets.settings.failed_ttl,
            beside=True,
            index=self._keys.index(token, State.FAILED),
        )

        async def record_failure() -> Snapshot:
            snapshot = await self._store.read_snapshot(token)
            if not snapshot.ended:
                fenced = replace(write, expect=snapshot.fence)
                await self._store.write(fenced)
            return snapshot

        found = await commit(record_failure)
        if found.ended:
            logger.warning("message %.200r is not a job, and its id has an outcome: dropped", token)
        else:
            if found.claim is not None:
                self._backend.discard(self._keys.bucket_log, found.claim.sequence)
            if found.edges:
                await self.dependencies.release(token)
        delivery.ack()

    def _completed(self, attempt: Attempt, result: Any) -> Write:
        """Return the write of a result: the job as it came, byte for byte, and its end."""
        what = _result_of(attempt.head.task_id)
        members = COMPLETED_MEMBERS % (
            dump_json(result, what),
            dump_number(attempt.started_at),
            dump_number(attempt.ended_at or self._backend.now()),
            self._worker_json,
        )
        if attempt.follow_ups is not None and attempt.follow_ups.members:
            members = attempt.follow_ups.members + b"," + members
        if attempt.stalls:
            members += b',"stalls":%d' % attempt.stalls
        record = splice(attempt.body, members)
        if len(record) > self._backend.max_body:
            raise PayloadTooLarge(what, len(record), self._backend.max_body)
        subject = self._keys.outcome(attempt.token, State.COMPLETED)
        return Write(
            subject,
            record,
            self._fence(attempt),
            ttl=self._assets.settings.completed_ttl,
            beside=True,
            when_full=without_arguments,
        )

    def _outcome(self, attempt: Attempt, state: State, fields: dict[str, Any], what: str) -> Write:
        """Return the write of an outcome other than a result."""
        fields = {"status": state, **fields, "active_since": attempt.started_at or None}
        fields |= {"finished_at": self._end_of(attempt), "worker": self.worker}
        if attempt.stalls:
            fields["stalls"] = attempt.stalls
        record = outcome_body(load_json(attempt.body), fields, self._backend.max_body, what)
        subject = self._keys.outcome(attempt.token, state)
        return Write(
            subject,
            record,
            self._fence(attempt),
            ttl=self._assets.settings.failed_ttl,
            beside=True,
            index=self._keys.index(attempt.token, state),
            when_full=without_arguments,
        )

    def _end_of(self, attempt: Attempt) -> float:
        return attempt.ended_at or self._backend.now()

    def _fence(self, attempt: Attempt) -> Expect:
        return Expect(self._keys.done_all(attempt.token), attempt.expect)

    def _send(self, attempt: Attempt, write: Write) -> None:
        settle = partial(self.on_settled, attempt, write)
        self._backend.send(self._keys.bucket_log, write, settle)

    async def _write_batch(
        self, attempt: Attempt, write: Write, follow_ups: Sequence[Write]
    ) -> None:
        """Write an outcome and its many follow-ups, which do not fit into it, in one batch."""
        try:
            self.on_settled(attempt, write, await self._store.write(write, *follow_ups))
        except PayloadTooLarge:
            raise
        except BackendError as error:
            self.on_settled(attempt, write, error)

    # -- for the tasks that run

    def report_progress(self, job: Job, progress: float, data: Any) -> None:
        """Store the progress of a running job, and tell its listeners.

        The write is not confirmed. It may be called from any thread.

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
        write = Write(self._keys.progress(token), body, ttl=self._assets.settings.progress_ttl)
        self._backend.send(self._keys.bucket_log, write, lambda _: None)
        self._backend.signal(self._keys.event("progress", token), body)
        self.on_progress(body)

    def keep_line(self, job_id: str, line: JobLogLine) -> None:
        """Keep a line with a running job. It may be called from any thread."""
        line = replace(line, level=line.level[:20], message=cut_line(line.message))
        self.logs.add(encode_token(job_id), line)

    def _send_lines(self, token: str, attempt: int, body: bytes) -> None:
        key = self._keys.job_log(token, attempt)
        write = Write(key, body, ttl=self._assets.settings.job_log_ttl)
        self._backend.send(self._keys.bucket_log, write, lambda _: None)

    async def results_of_parents(self, job: Job) -> dict[str, Any]:
        """Return the results of the jobs that a job depends on, by id.

        Jobs that did not complete are left out.
        """
        return await self.dependencies.results(job)

    # -- for the queue

    async def trim(self) -> None:
        """Remove the oldest outcomes of the kinds of which only a number is kept."""
        for state in OUTCOMES:
            keep = (
                self._assets.settings.completed_keep
                if state is State.COMPLETED
                else self._assets.settings.failed_keep
            )
            if keep is not None:
                await self._backend.purge(
                    self._keys.bucket_log, self._keys.outcomes(state), keep=keep
                )

    async def cancelled_among(self, job_ids: Sequence[str]) -> list[str]:
        """Return those of the jobs that were cancelled."""
        keys = [self._keys.outcome(encode_token(job_id), State.CANCELLED) for job_id in job_ids]
        records = await self._store.last(*keys) if keys else []
        return [
            decode_token(self._keys.token(record.subject)) for record in without_markers(records)
        ]

    async def is_cancelled(self, job_id: str) -> bool:
        """Return whether the job has ended as cancelled."""
        return bool(await self.cancelled_among([job_id]))

    # -- after the write

    def clean_up(self, attempt: Attempt, write: Write) -> None:
        """Delete the claim and the leftovers of an attempt whose end is confirmed.

        It is not awaited: a claim that stays expires after a day, and means nothing beside an
        outcome.
        """
        log, ended = self._keys.bucket_log, self._keys.outcome_state(write.subject)
        for key, sequence in (attempt.leftovers or {}).items():
            if key != write.subject:
                self._backend.discard(log, sequence)
        # After a retry a claim stays if an earlier worker may still be frozen: it voids the
        # outcome that this worker writes when it wakes up.
        if attempt.claim_sequence and (ended or attempt.delivery.deliveries == 1):
            self._backend.discard(log, attempt.claim_sequence)

    def has_sequel(self, attempt: Attempt, write: Write) -> bool:
        """Return whether follow-ups are to be added, or children told, of this end."""
        if not (attempt.awaited or attempt.head.children or attempt.follow_ups):
            return False
        return self._keys.outcome_state(write.subject) is not None

    async def settled(self, attempt: Attempt, write: Write, result: Settled) -> Disposition:
        """Decide what a confirmed or rejected end of an attempt means, and finish it.

        A rejected write is written again if the attempt still has the job.
        """
        disposition: Disposition | None = None
        edges, ours = list[Record](), isinstance(result, int)
        for rejections in range(MAX_REJECTIONS):
            if not isinstance(result, WriteRefused):
                break
            if rejections:
                await pause_after_refusal()
            snapshot = await self._store.read_snapshot(attempt.token)
            disposition, edges = self._judge_end(attempt, write, snapshot), snapshot.edges
            if disposition is Disposition.ACK and snapshot.outcome is not None:
                ours = snapshot.outcome.body == write.body
                break
            if disposition is not None:
                return disposition
            self._expect(attempt, snapshot)
            write = replace(write, expect=self._fence(attempt))
            result = await self._write_again(attempt, write)
        if isinstance(result, BackendError) and disposition is not Disposition.ACK:
            logger.error(
                "job %s: could not record its outcome; it will be redelivered: %s",
                attempt.head.job_id,
                result,
            )
            return Disposition.ABANDON
        self.clean_up(attempt, write)
        attempt.is_recorded = ours = ours or isinstance(result, int)
        if self.has_sequel(attempt, write):
            await self._follow(attempt, write, result, edges, ours=ours)
        return Disposition.ACK

    async def _follow(
        self,
        attempt: Attempt,
        write: Write,
        result: Settled,
        edges: Sequence[Record],
        *,
        ours: bool,
    ) -> None:
        """Carry out the effects of an outcome: add its follow-ups, tell its children."""
        completed = self._keys.outcome_state(write.subject) is State.COMPLETED
        if ours and completed and attempt.follow_ups is not None:
            await self._follow_ups.carry_out(attempt.follow_ups)
        if attempt.awaited or attempt.head.children:
            known: list[Record] = []
            if isinstance(result, int) and (edges or not attempt.awaited):
                # An outcome that was accepted was stored after all edges that were read.
                known = [Record(write.subject, write.body, result, 0.0), *edges]
            await self.dependencies.release(attempt.token, known)

    def _judge_end(self, attempt: Attempt, write: Write, snapshot: Snapshot) -> Disposition | None:
        if snapshot.outcome is not None and snapshot.outcome.body != write.body:
            logger.warning(
                "job %s already has a different outcome; discarding this worker's result",
                attempt.head.job_id,
            )
        if snapshot.ended:
            attempt.awaited = bool(snapshot.edges)
        return self.judge(attempt, snapshot)

    @staticmethod
    def _expect(attempt: Attempt, snapshot: Snapshot) -> None:
        attempt.expect = snapshot.last_end
        attempt.awaited = bool(snapshot.edges)
        if snapshot.claim is not None:
            attempt.claim_sequence = snapshot.claim.sequence

    async def _write_again(self, attempt: Attempt, write: Write) -> Settled:
        batch: tuple[Write, ...] = ()
        if attempt.prepare_again is not None:
            attempt.follow_ups = await attempt.prepare_again()
            if self._keys.outcome_state(write.subject) is State.COMPLETED:
                batch = attempt.follow_ups.batch
        try:
            return await self._store.write(write, *batch)
        except BackendError as error:
            return error


@lru_cache(maxsize=256)
def _result_of(task_id: str) -> str:
    return f"the result of task {task_id!r}"


def without_arguments(record: bytes) -> bytes:
    """Return an outcome for a full store: without its optional fields."""
    data = load_json(record)
    for name in ARGUMENT_FIELDS:
        data.pop(name, None)
    return dump_json(data | {"truncated": True, "max_retries": 0})


def _fields_of_next(job: Job) -> dict[str, Any]:
    """Return the fields of this attempt that the next one needs."""
    return {
        "id": job.job_id,
        "created_at": job.created_at,
        "priority": job.priority,
        "retries": job.retries,
        "errors": job.errors,
    }
