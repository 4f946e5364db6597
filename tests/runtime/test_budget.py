"""The bound on what a process has under way: waiters take turns, and no room leaks."""

import asyncio

import anyio
import pytest

from asyncmq_nats.backends.nats.budget import MAX_BATCHES, Budget, Load

BATCH = Load(1, 2, 100)


@pytest.fixture
async def full() -> Budget:
    """A budget that has no room for another batch."""
    budget = Budget()
    for _ in range(MAX_BATCHES):
        await budget.take(BATCH, 1.0)
    return budget


async def queue_up(budget: Budget) -> "asyncio.Task[None]":
    task = asyncio.create_task(budget.take(BATCH, 60.0))
    await anyio.lowlevel.checkpoint()
    return task


async def has_room(budget: Budget, count: int) -> bool:
    """Take room for `count` batches, and return whether none is left after them."""
    for _ in range(count):
        await budget.take(BATCH, 0.0)
    try:
        await budget.take(BATCH, 0.0)
    except TimeoutError:
        return True
    return False


async def test_waiters_are_admitted_in_order(full: Budget) -> None:
    first, second = [await queue_up(full) for _ in range(2)]
    full.release(BATCH)
    await first
    assert not second.done()
    full.release(BATCH)
    await second


async def test_a_timeout_takes_no_room(full: Budget) -> None:
    with pytest.raises(TimeoutError):
        await full.take(BATCH, 0.0)
    full.release(BATCH)
    assert await has_room(full, 1)


@pytest.mark.parametrize("released_first", [True, False])
async def test_a_waiter_that_is_cancelled_while_room_is_released_takes_none(
    full: Budget, released_first: bool
) -> None:
    waiting = await queue_up(full)
    if released_first:
        full.release(BATCH)
        waiting.cancel()
    else:
        waiting.cancel()
        full.release(BATCH)
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert await has_room(full, 1)


async def test_a_cancelled_waiter_does_not_hold_up_those_behind_it(full: Budget) -> None:
    first, second, third = [await queue_up(full) for _ in range(3)]
    second.cancel()
    with pytest.raises(asyncio.CancelledError):
        await second
    first.cancel()
    full.release(BATCH)
    with pytest.raises(asyncio.CancelledError):
        await first
    with anyio.fail_after(5):
        await third


async def test_a_load_larger_than_the_budget_goes_alone() -> None:
    budget, huge = Budget(), Load(0, 1, 2**40)
    await budget.take(huge, 1.0)
    other = await queue_up(budget)
    assert not other.done()
    budget.release(huge)
    await other
