"""`FlowProducer`: jobs that depend on each other, added as a whole."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from graphlib import CycleError, TopologicalSorter
from uuid import UUID

from asyncmq_nats.backends import default_backend
from asyncmq_nats.backends.base import Backend
from asyncmq_nats.exceptions import InvalidFlow
from asyncmq_nats.jobs import Job
from asyncmq_nats.queues import Queue
from asyncmq_nats.schedules import parse_every

__all__ = ["FlowProducer"]


class FlowProducer:
    """Adds flows (AsyncMQ `FlowProducer`)."""

    def __init__(self, backend: Backend | None = None) -> None:
        self.backend = backend if backend is not None else default_backend()

    async def add_flow(self, queue: str, jobs: Sequence[Job]) -> list[str]:
        """Add jobs that depend on each other, or on jobs in the queue. Return their ids in order.

        Up to 1,000 writes (a job is one, and so is each dependency on a job outside the flow) are
        all or nothing. A larger flow is added in
        such parts, each job after those that wait for it: should the producer die between two
        parts, the jobs of the later ones are missing, and those that wait for them wait for ever.

        Raises:
            InvalidFlow: two jobs have one id, or they depend on each other in a circle.
            JobNotFound: one depends on a job that is neither in the flow nor in the queue.
            ValueError: the `repeat_every` of one is no interval.
        """
        for job in jobs:
            if job.repeat_every is not None:
                parse_every(job.repeat_every)
        flow = [replace(job, retries=0, custom_id=not _is_random(job.job_id)) for job in jobs]
        order = _children_first({job.job_id: job for job in flow}, flow)
        await Queue(queue, self.backend).add_linked(order)
        return [job.job_id for job in jobs]


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
