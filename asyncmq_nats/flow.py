"""`FlowProducer`: jobs that depend on each other, added as a whole."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from graphlib import CycleError, TopologicalSorter
from typing import Any
from uuid import UUID

from asyncmq_nats._arguments import build_addition
from asyncmq_nats._new_jobs import whole_job
from asyncmq_nats.backends import default_backend
from asyncmq_nats.backends.base import Backend
from asyncmq_nats.calls import Call, written
from asyncmq_nats.exceptions import InvalidArgument, InvalidFlow
from asyncmq_nats.jobs import Job, new_job_id
from asyncmq_nats.queues import Queue
from asyncmq_nats.schedules import parse_every

__all__ = ["FlowProducer"]


class FlowProducer:
    """Adds flows (AsyncMQ `FlowProducer`)."""

    def __init__(self, backend: Backend | None = None) -> None:
        self.backend = backend if backend is not None else default_backend()

    async def add_flow(self, queue: str, jobs: Sequence[Job | Call[Any]]) -> list[str]:
        """Add jobs that depend on each other, or on jobs in the queue. Return their ids in order.

        A job may be the `call` of a task; its `depends_on` may have other calls of the flow.

        Up to 1,000 writes (a job is one, and so is each dependency on a job outside the flow) are
        all or nothing. A larger flow is added in such parts, each job after those that wait for it:
        should the producer die between two parts, the jobs of the later ones are missing, and those
        that wait for them wait for ever.

        Raises:
            InvalidFlow: two jobs have one id, or they depend on each other in a circle.
            InvalidArgument: a call is for another queue, or waits for one that is not in the flow.
            JobNotFound: one depends on a job that is neither in the flow nor in the queue.
            ValueError: the `repeat_every` of one is no interval.
        """
        await self.backend.connect()
        built = _build(jobs, queue, (self.backend.now(), self.backend.now_at_most()))
        for job in built:
            if job.repeat_every is not None:
                parse_every(job.repeat_every)
        flow = [replace(job, retries=0, custom_id=not _is_random(job.job_id)) for job in built]
        order = _children_first({job.job_id: job for job in flow}, flow)
        plain = {
            job.job_id for job, given in zip(built, jobs, strict=True) if isinstance(given, Call)
        }
        await Queue(queue, self.backend).add_linked(order, plain=plain)
        return [job.job_id for job in built]


def _build(jobs: Sequence[Job | Call[Any]], queue: str, times: tuple[float, float]) -> list[Job]:
    """Return the jobs of a flow, each call as a job with an id.

    `times`: `now` and `latest`, see `build_addition`.
    """
    ids: dict[int, str] = {}
    for call in jobs:
        if isinstance(call, Call):
            call.require_queue(queue)
            if (window := call.options.get("deduplication")) is not None:
                raise InvalidArgument("a job of a flow takes no deduplication", window)
            if id(call) in ids:
                raise InvalidFlow("a call is twice in the flow: make one for each job")
            ids[id(call)] = call.options.get("job_id") or new_job_id()
    return [_job_of(job, ids, times) if isinstance(job, Call) else job for job in jobs]


def _job_of(call: Call[Any], ids: Mapping[int, str], times: tuple[float, float]) -> Job:
    given = call.options.get("depends_on") or ()
    parents = [given] if isinstance(given, str) else given
    names = []
    for parent in parents:
        if isinstance(parent, Call) and id(parent) not in ids:
            raise InvalidArgument(
                "depends_on: a call that is waited for must be in the flow", parent
            )
        names.append(ids[id(parent)] if isinstance(parent, Call) else parent)
    options = {**call.options, "depends_on": names}
    job = build_addition(*times, write=written, **replace(call, options=options).fields)
    return replace(whole_job(job), job_id=ids[id(call)])


def _is_random(job_id: str) -> bool:
    try:
        UUID(job_id)
    except ValueError:
        return False
    return True


def _children_first(by_id: Mapping[str, Job], flow: Sequence[Job]) -> list[Job]:
    """Return the jobs so that each comes after those that wait for it."""
    if len(by_id) < len(flow):
        raise InvalidFlow("two jobs of the flow have the same id")
    children: dict[str, list[str]] = {job_id: [] for job_id in by_id}
    for job in flow:
        for parent in dict.fromkeys(job.depends_on or ()):
            if parent in children:
                children[parent].append(job.job_id)
    try:
        return [by_id[job_id] for job_id in TopologicalSorter(children).static_order()]
    except CycleError as error:
        raise InvalidFlow(
            f"the jobs of the flow wait for each other in a circle: {' -> '.join(error.args[1])}"
        ) from None
