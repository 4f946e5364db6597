"""Follow-ups: jobs that a task adds while it runs, and its own next run if it repeats.

The outcome holds them, so they exist exactly if it does. The worker stores them after the outcome
is confirmed and before it acknowledges; the next worker, if that one dies, finds them in the
outcome. More than fit into it are committed with it in one atomic batch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from asyncmq_nats.exceptions import InvalidJob
from asyncmq_nats.jobs import Job, new_job_id
from asyncmq_nats.schedules import parse_every
from asyncmq_nats.store.queue_store import QueueStore
from asyncmq_nats.transitions.add import Additions
from asyncmq_nats.transitions.claim import FollowUps
from asyncmq_nats.transitions.plan import PLAN_JOBS, decode_jobs, encode_jobs, tie
from asyncmq_nats.wire.codec import load_json

__all__ = ["FOLLOW_UPS", "FollowUpJobs"]

FOLLOW_UPS = "follow_ups"
"""The member of an outcome that holds them."""


class FollowUpJobs:
    """The follow-ups of the jobs of one queue."""

    def __init__(self, store: QueueStore, additions: Additions) -> None:
        self._store = store
        self._additions = additions

    async def prepare(self, job: Job, follow_ups: Sequence[Job], result: Any) -> FollowUps:
        """Return the follow-ups of a job that completes. `result`: its result.

        Prepare a batch again when it was refused: its expectations of other jobs may have changed.

        Raises:
            JobNotFound: one depends on a job that is not in this queue.
            InvalidJob: the job repeats at no interval that can be kept.
            TooManyPriorities, NotSerializable, PayloadTooLarge: as for `Queue.add`.
        """
        jobs = tie(follow_ups)
        if job.repeat_every is not None:
            jobs.append(self._next_run(job))
        for priority in {each.priority for each in jobs}:
            await self._store.assets.declare_tier(priority)
        planned = await self._additions.plans.plan(jobs, {job.job_id: result})
        for each in planned:
            self._additions.check_size(each)
        members = b'"%b":%b' % (FOLLOW_UPS.encode(), encode_jobs(planned))
        if len(planned) <= PLAN_JOBS and len(members) < self._store.backend.max_body // 4:
            return FollowUps(planned, members)
        writes = await self._additions.batch_of(planned, {job.job_id: result})
        return FollowUps(planned, batch=tuple(writes))

    def _next_run(self, job: Job) -> Job:
        now = self._store.now()
        try:
            every = parse_every(job.repeat_every or 0.0)
        except (TypeError, ValueError) as error:
            raise InvalidJob(f"repeat_every: {error}") from None
        every = max(every, self._store.backend.settings.min_repeat_interval)
        run_at = self._store.now_at_most() + every
        again = replace(
            job, job_id=new_job_id(), created_at=now, delay_until=run_at, custom_id=False
        )
        return replace(
            again,
            retries=0,
            errors=[],
            stalls=0,
            depends_on=[],
            parent_results={},
            children=[],
            wide_children={},
        )

    async def carry_out(self, follow_ups: FollowUps) -> None:
        """Store the follow-ups that a confirmed outcome holds."""
        if follow_ups.members:
            await self._additions.plans.carry_out(follow_ups.jobs)

    async def carry_out_again(self, outcome: bytes, job: Mapping[str, Any]) -> None:
        """Store the follow-ups that an outcome holds, unless they are there: its worker was lost.

        `job`: the job as it came. Follow-ups in a job of another producer are ignored.
        """
        if b'"follow_ups"' not in outcome or FOLLOW_UPS in job:
            return
        jobs = decode_jobs(load_json(outcome).get(FOLLOW_UPS))
        await self._additions.plans.carry_out(jobs, repeated=True)
