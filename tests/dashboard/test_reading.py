"""Reads that all browsers share."""

import anyio
import anyio.lowlevel
import pytest

from asyncmq_nats.contrib.dashboard.reading import COST_RATIO, MAX_AGE, MAX_VALUES, SharedReads


class Clock:
    """A clock that stands still, and a read that takes its time by it."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.cost = 0.0
        self.reads = 0

    def monotonic(self) -> float:
        return self.now

    async def read(self) -> int:
        await anyio.lowlevel.checkpoint()
        self.now += self.cost
        self.reads += 1
        return self.reads


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("asyncmq_nats.contrib.dashboard.reading.time", clock)
    return clock


async def test_fifty_viewers_cost_what_one_costs(clock: Clock) -> None:
    reads, found = SharedReads(), list[int]()

    async def look() -> None:
        found.append(await reads.get("counts", clock.read))

    async with anyio.create_task_group() as group:
        for _ in range(50):
            group.start_soon(look)
    assert found == [1] * 50
    clock.now += 1.1
    assert await reads.get("counts", clock.read) == 2
    assert await reads.get("other", clock.read) == 3


async def test_reading_takes_a_twentieth_of_the_time_at_most(clock: Clock) -> None:
    reads, clock.cost = SharedReads(), 2.0
    await reads.get("counts", clock.read)
    clock.now += 2.0 * COST_RATIO - 0.1
    assert await reads.get("counts", clock.read) == 1
    clock.now += 0.1
    assert await reads.get("counts", clock.read) == 2
    assert COST_RATIO == 20


async def test_no_value_is_older_than_a_minute(clock: Clock) -> None:
    reads, clock.cost = SharedReads(), 30.0
    await reads.get("counts", clock.read)
    clock.now += MAX_AGE
    assert await reads.get("counts", clock.read) == 2


async def test_after_an_action_everything_is_read_again(clock: Clock) -> None:
    reads = SharedReads()
    await reads.get("counts", clock.read)
    reads.forget()
    assert await reads.get("counts", clock.read) == 2


async def test_a_read_that_failed_is_tried_again_by_the_next_one(clock: Clock) -> None:
    async def fail() -> int:
        raise ValueError("no answer")

    reads = SharedReads()
    with pytest.raises(ValueError, match="no answer"):
        await reads.get("counts", fail)
    assert await reads.get("counts", clock.read) == 1


async def test_values_do_not_add_up_without_end(clock: Clock) -> None:
    reads = SharedReads()
    for number in range(MAX_VALUES + 5):
        await reads.get(number, clock.read)
    assert len(reads._values) == MAX_VALUES
