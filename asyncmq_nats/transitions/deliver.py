"""Turns a delivery into an attempt, or gives it back to the queue.

`parse_delivery` reads the message; `inspect_redelivery` finds out what earlier deliveries did;
`claim` voids them; `hand_back` returns a job that did not end.
"""

from collections.abc import Mapping
from dataclasses import replace
from math import isfinite
from typing import Any

from asyncmq_nats._logging import get_logger
from asyncmq_nats.backends.base import Delivery, Expect, Record, Write
from asyncmq_nats.events import STALLED
from asyncmq_nats.exceptions import BackendError, InvalidJob, NewerJob, NotSerializable
from asyncmq_nats.jobs import WIRE_VERSION, Job, JobHead
from asyncmq_nats.store.announcing import announce
from asyncmq_nats.store.commit import pause_after_refusal
from asyncmq_nats.store.queue_store import QueueStore
from asyncmq_nats.store.snapshot import Snapshot
from asyncmq_nats.transitions.add import Additions
from asyncmq_nats.transitions.claim import (
    CLAIM_TTL,
    Attempt,
    Claim,
    Disposition,
    settle_delivery,
)
from asyncmq_nats.transitions.follow_up import FollowUpJobs
from asyncmq_nats.wire.codec import dump_json, load_json
from asyncmq_nats.wire.keys import LONGEST_TOKEN, decode_token, is_token, last_token

__all__ = ["OUTCOME_FIELDS", "Deliveries"]

logger = get_logger(__name__)

OUR_JOBS: bytes = b'{"v":1,"id":"'
"""The first bytes of every job that this library writes."""
OUTCOME_FIELDS = (
    "status",
    "result",
    "last_error",
    "error_traceback",
    "active_since",
    "finished_at",
    "worker",
    "stalls",
    "follow_ups",
)
"""Fields that only an outcome has."""


class Deliveries:
    """The transitions of deliveries before they run, or instead."""

    def __init__(self, store: QueueStore, worker: str = "") -> None:
        self._store = store
        self._backend = store.backend
        self._keys = store.keys
        self._assets = store.assets
        self._additions = Additions(store)
        self.dependencies = self._additions.dependencies
        self._follow_ups = FollowUpJobs(store, self._additions)
        self.worker = worker
        self.handed_back = 0
        """Jobs that were returned to the queue."""

    def open(self, delivery: Delivery) -> Attempt:
        """Return the attempt that a delivery stands for. Check a redelivery with `inspect`.

        The head of a job of a newer version of the format says so: `put_off` that one.

        Raises:
            InvalidJob: the message is not a job; `reject` it.
        """
        token, body = last_token(delivery.subject), delivery.body
        if not is_token(token):
            raise InvalidJob(
                "its id, the last token of its subject, must be UTF-8 and at most "
                f"{LONGEST_TOKEN:,} bytes"
            )
        try:
            if body.startswith(OUR_JOBS) and (head := _read_ours(body)) is not None:
                same = "%" not in token and head.job_id == token
                if same or head.job_id == decode_token(token):
                    return Attempt(delivery, token, head, body)
            body = self._normalize(delivery, token)
            return Attempt(delivery, token, JobHead.decode(body), body)
        except NewerJob as problem:
            return _as_newer(delivery, token, problem.version)

    def _normalize(self, delivery: Delivery, token: str) -> bytes:
        """Return a foreign job as this library writes it: id and priority of the subject win."""
        data = load_json(delivery.body)
        if isinstance(version := data.get("v"), int) and version > WIRE_VERSION:
            raise NewerJob(version, WIRE_VERSION)
        Job.decode(delivery.body)
        for name in OUTCOME_FIELDS:
            data.pop(name, None)
        priority, _ = self._keys.split_ready(delivery.subject)
        known = {"v": data.pop("v", WIRE_VERSION), "id": decode_token(token), "priority": priority}
        rest = {key: value for key, value in data.items() if key not in known}
        try:
            return dump_json(known | {"created_at": delivery.time} | rest)
        except NotSerializable as error:  # 1e999 is valid JSON and infinite when read
            raise InvalidJob(str(error)) from None

    # -- redeliveries

    async def inspect(self, attempt: Attempt) -> Disposition | None:
        """Find out what earlier deliveries of the job did; `None`: it is to be run.

        `attempt.lost` says whether a worker was lost while it may have run the job: then it needs
        a claim before it runs.
        """
        snapshot = await self._store.read_snapshot(attempt.token)
        if snapshot.outcome is not None:
            job = load_json(attempt.body)
            await self._follow_ups.carry_out_again(snapshot.outcome.body, job)
            if snapshot.edges or attempt.head.children:
                await self.dependencies.release(attempt.token)
            return Disposition.ACK
        if any(_order(record) > attempt.job.order for record in snapshot.later.values()):
            return Disposition.ACK  # its retry was scheduled; only the ack was lost
        claim = None if snapshot.claim is None else Claim.decode(snapshot.claim.body)
        if claim is not None and claim.outranks(attempt.order):
            return claim.disposition
        self._take(attempt, snapshot, claim)
        return None

    def _take(self, attempt: Attempt, snapshot: Snapshot, claim: Claim | None) -> None:
        attempt.count_losses(claim, self._backend.now(), self._assets.settings.stalled_after)
        if attempt.known is not None:
            attempt.known = replace(attempt.known, stalls=attempt.stalls)
        attempt.expect = snapshot.last_end
        attempt.claim_sequence = 0 if snapshot.claim is None else snapshot.claim.sequence
        attempt.awaited = bool(snapshot.edges)
        attempt.leftovers = {record.subject: record.sequence for record in snapshot.later.values()}

    async def claim(self, attempt: Attempt) -> bool:
        """Claim a job that is about to run. Return whether nothing has changed since `inspect`."""
        if not await self._write_claim(attempt, released=False):
            return False
        if attempt.stalls and attempt.lost:
            job_id, stalls = attempt.head.job_id, attempt.stalls
            await announce(self._store, STALLED, job_id, stalls=stalls)
        return True

    async def _write_claim(self, attempt: Attempt, *, released: bool) -> bool:
        claim = attempt.claim(self.worker, released=released)
        expect = Expect(self._keys.done_all(attempt.token), attempt.expect)
        key = self._keys.claim(attempt.token)
        write = Write(key, claim.encode(), expect, ttl=CLAIM_TTL)
        sequence = await self._store.write_if_expected(write)
        if sequence is None:
            return False
        attempt.expect = attempt.claim_sequence = sequence
        return True

    def mark_running(self, attempt: Attempt) -> None:
        """Claim a job that has run for a while, so that the loss of this worker counts as a stall.

        The write is not awaited. An outcome that overtakes it is confirmed by a second try.
        """
        claim = attempt.claim(self.worker)
        expect = Expect(self._keys.done_all(attempt.token), attempt.expect)

        def on_settled(result: int | BackendError) -> None:
            if isinstance(result, int):
                attempt.expect = attempt.claim_sequence = result

        attempt.claim_sent = True
        key = self._keys.claim(attempt.token)
        write = Write(key, claim.encode(), expect, ttl=CLAIM_TTL)
        self._backend.send(self._keys.bucket_log, write, on_settled)

    async def verify(self, attempt: Attempt) -> Attempt | Disposition:
        """Do `inspect`, and `claim` the job if a worker was lost with it."""
        while True:
            disposition = await self.inspect(attempt)
            if disposition is not None:
                return disposition
            if not attempt.lost or await self.claim(attempt):
                return attempt
            await pause_after_refusal()

    # -- hand back

    async def hand_back(self, attempt: Attempt) -> None:
        """Return a job that did not end to the queue. It does not count as stalled."""
        while not await self._write_claim(attempt, released=True):
            snapshot = await self._store.read_snapshot(attempt.token)
            disposition = self.judge(attempt, snapshot)
            if disposition is not None:
                settle_delivery(attempt.delivery, disposition)
                return
            attempt.expect = snapshot.last_end
            await pause_after_refusal()
        attempt.delivery.nak()
        self.handed_back += 1

    def judge(self, attempt: Attempt, snapshot: Snapshot) -> Disposition | None:
        """Return the verdict of the records that refused a write.

        `None`: the attempt still has the job, and may write again with new expectations.
        """
        if snapshot.ended:
            return Disposition.ACK
        claim = None if snapshot.claim is None else Claim.decode(snapshot.claim.body)
        if claim is not None and claim.order > attempt.order:
            logger.warning(
                "job %s: another worker has claimed it; discarding this worker's result",
                attempt.head.job_id,
            )
            return claim.disposition
        return None


def _read_ours(body: bytes) -> JobHead | None:
    """Return the head of a job; `None` if a foreign job only begins the same way."""
    try:
        return JobHead.decode(body)
    except NewerJob:
        raise
    except InvalidJob:
        return None


def _order(record: Record) -> tuple[int, int]:
    """Return which attempt a record in transit is of; junk is of none."""
    try:
        return Job.decode(record.body).order
    except InvalidJob:
        return -1, -1


def _as_newer(delivery: Delivery, token: str, version: int) -> Attempt:
    """Return the attempt at a job of a newer version, with its readable fields.

    Its body is kept as it is.
    """
    job_id = decode_token(token)
    try:
        job = Job.decode(delivery.body, job_id=job_id, created_at=delivery.time)
    except InvalidJob:
        job = _as_known(load_json(delivery.body), job_id, delivery.time)
    head = JobHead(
        task_id=job.task_id,
        job_id=job_id,
        created_at=job.created_at,
        children=job.children,
        v=version,
    )
    attempt = Attempt(delivery, token, head, delivery.body)
    attempt.known = job
    return attempt


def _as_known(data: Mapping[str, Any], job_id: str, created_at: float) -> Job:
    """Return the put-off fields of a job of a newer version."""
    since, times = data.get("put_off_since"), data.get("put_offs")
    return Job(
        task_id="?",
        job_id=job_id,
        created_at=created_at,
        put_offs=times if isinstance(times, int) and times >= 0 else 0,
        put_off_since=float(since) if isinstance(since, float) and isfinite(since) else None,
    )
