"""How many jobs a second ended in the last minute, read from a bounded number of outcomes."""

import pytest

from asyncmq_nats import InvalidArgument
from asyncmq_nats.backends.base import Backend
from asyncmq_nats.store import overview
from tests.running import make_queue, run_jobs


async def nothing() -> None:
    """Do nothing."""


async def test_jobs_that_ended_a_while_ago_are_not_counted(backend: Backend) -> None:
    queue = make_queue(backend, nothing=nothing)
    await queue.add_bulk([{"task_id": "nothing"}] * 12)
    await run_jobs(queue)
    rates = await queue.rates()
    assert rates == {"completed": 12 / 60, "failed": 0, "expired": 0, "cancelled": 0}
    assert (await queue.rates(1e-9))["completed"] == 0
    for period in (0, -1):
        with pytest.raises(InvalidArgument, match="period must be above 0 s"):
            await queue.rates(period)


async def test_a_sample_stands_for_all(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is never more than there are."""
    monkeypatch.setattr(overview, "RATE_SAMPLE", 5)
    monkeypatch.setattr(overview, "PAGE_SIZE", 5)
    queue = make_queue(backend, nothing=nothing)
    await queue.add_bulk([{"task_id": "nothing"}] * 12)
    await run_jobs(queue)
    assert 0 < (await queue.rates())["completed"] <= 12 / 60
