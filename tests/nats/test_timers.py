"""Many timers go off at one instant, while their jobs are changed: what was promised holds.

nats-server reads the records that are due, and stores what they release a little later: what is
written over them in between is taken away with the timers.
"""

from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import anyio
import pytest

from asyncmq_nats import JobFilter, Queue
from asyncmq_nats.backends.nats.backend import NATSBackend
from asyncmq_nats.exceptions import WrongState
from asyncmq_nats.states import Place
from asyncmq_nats.store.records import TIMER_LEAD
from tests.receiver import holds, until
from tests.running import make_queue, race, running

TIMERS = 4_000
"""Enough that the server takes some tenths of a second to store what they release."""
CHANGED = 10
SECONDS = 2.0

Change = Callable[[Queue, list[str]], Awaitable[set[str]]]


async def add_jobs(queue: Queue) -> list[str]:
    """Add jobs whose timers go off at one instant, and return the ids of those that do so last."""
    entries = [{"task_id": "note", "args": [0], "delay": SECONDS}] * TIMERS
    return (await queue.add_bulk(entries))[-CHANGED:]


async def args_of(queue: Queue, job_id: str) -> list[Any]:
    job = await queue.get_job(job_id)
    assert job is not None
    args: list[Any] = job["args"]
    return args


async def wait_for_the_first(queue: Queue) -> None:
    """Wait until the server has released the first of the jobs."""
    log, released = queue._subjects.bucket_log, queue._subjects.place(Place.RELEASED)
    await until(partial(queue.backend.page, log, released, limit=1), bool)


async def wait_for_all(queue: Queue) -> None:
    log, delayed = queue._subjects.bucket_log, queue._subjects.place(Place.DELAYED)
    await until(partial(queue.backend.page, log, delayed, limit=1), lambda page: not page)


async def test_an_edit_that_was_confirmed_is_not_lost(nats_backend: NATSBackend) -> None:
    queue = Queue("work", nats_backend)
    ids = await add_jobs(queue)
    told = dict.fromkeys(ids, 0)

    async def edit(job_id: str) -> None:
        for version in range(1, 100_000):
            try:
                await queue.edit(job_id, args=[version])
            except WrongState:
                return
            told[job_id] = version

    await race(*(partial(edit, job_id) for job_id in ids))
    await wait_for_all(queue)
    for job_id in ids:
        assert await args_of(queue, job_id) in ([told[job_id]], [told[job_id] + 1])
    assert min(told.values()) > 0


def hold_up_writes(queue: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the writes of the queue, begun in time, reach the server when its timers go off."""

    def held_up(call: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        async def hold_up(*args: Any) -> Any:
            await wait_for_the_first(queue)
            return await call(*args)

        return hold_up

    for name in ("write", "write_each", "delete", "delete_many"):
        monkeypatch.setattr(queue.backend, name, held_up(getattr(queue.backend, name)))


async def come_late(queue: Queue, monkeypatch: pytest.MonkeyPatch, in_time: bool) -> None:
    """Have a change come when the timers go off. `in_time`: it begins before, and takes so long."""
    if in_time:
        hold_up_writes(queue, monkeypatch)
    else:
        await wait_for_the_first(queue)


async def test_an_edit_whose_timer_overtakes_it_is_not_confirmed(
    nats_backend: NATSBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue = Queue("work", nats_backend)
    ids = await add_jobs(queue)
    hold_up_writes(queue, monkeypatch)
    confirmed = []

    async def edit(job_id: str) -> None:
        try:
            await queue.edit(job_id, args=[1])
            confirmed.append(job_id)
        except WrongState:
            pass

    await race(*(partial(edit, job_id) for job_id in ids))
    await wait_for_all(queue)
    for job_id in confirmed:
        assert await args_of(queue, job_id) == [1]


@pytest.mark.parametrize("in_time", [False, True])
async def test_a_job_that_was_put_off_at_its_time_is_not_released(
    nats_backend: NATSBackend, monkeypatch: pytest.MonkeyPatch, in_time: bool
) -> None:
    queue = Queue("work", nats_backend)
    ids = await add_jobs(queue)
    await come_late(queue, monkeypatch, in_time)
    later = nats_backend.now() + 1000
    put_off = await race(*(partial(queue.reschedule, job_id, later) for job_id in ids))
    await until(queue.queue_stats, lambda stats: stats["delayed"] == sum(put_off))
    delayed = {job["id"] for job in await queue.list_jobs("delayed")}
    assert delayed == {job_id for job_id, was in zip(ids, put_off, strict=True) if was}


async def test_the_newest_call_replaces_one_whose_timer_goes_off(nats_backend: NATSBackend) -> None:
    queue = Queue("work", nats_backend)
    window = {"id": "key", "replace": True}
    run_at = nats_backend.now() + SECONDS
    await queue.add_bulk([{"task_id": "note", "delay": SECONDS}] * TIMERS)
    job_id = await queue.add("note", [0], delay=SECONDS, deduplication=window)
    await wait_for_the_first(queue)
    newest = 0
    while nats_backend.now() < run_at - 0.1:
        newest += 1
        assert await queue.add("note", [newest], delay=SECONDS, deduplication=window) == job_id
    await wait_for_all(queue)
    assert await args_of(queue, job_id) == [newest]
    assert newest > 0


async def retry_at_their_time(queue: Queue) -> list[str]:
    """Retry jobs when their timers go off, and return their ids.

    A slow machine may come when they are due: then they are not delayed any more, so once more.
    """
    for _ in range(10):
        ids = await add_jobs(queue)
        job = await queue.get_job(ids[0])
        assert job is not None
        await wait_for_the_first(queue)
        if all(await race(*(partial(queue.retry_job, job_id) for job_id in ids))):
            return ids
        assert queue.backend.now() >= job["delay_until"]
        await queue.obliterate(force=True)
    pytest.fail("this machine is too slow")


async def test_a_job_that_is_retried_at_its_time_is_released_once(
    nats_backend: NATSBackend,
) -> None:
    queue = Queue("work", nats_backend)
    ids = await retry_at_their_time(queue)
    await wait_for_all(queue)
    for job_id in ids:
        job = await queue.get_job(job_id)
        assert job is not None
        assert (job["status"], job["delay_until"]) == ("waiting", None)


async def cancel(queue: Queue, ids: list[str]) -> set[str]:
    return {job_id for job_id in ids if await queue.cancel_job(job_id)}


async def remove(queue: Queue, ids: list[str]) -> set[str]:
    return {job_id for job_id in ids if await queue.remove_job(job_id)}


async def remove_delayed(queue: Queue, ids: list[str]) -> set[str]:
    return {job_id for job_id in ids if await queue.remove_delayed(job_id)}


async def drain(queue: Queue, ids: list[str]) -> set[str]:
    return {*await queue.drain(include_delayed=True)}


async def cancel_all(queue: Queue, ids: list[str]) -> set[str]:
    """Cancel those that a search finds while they move."""
    result = await queue.apply(JobFilter(state="delayed"), "cancel")
    assert result.done <= TIMERS
    return {job["id"] for job in await queue.list_jobs("cancelled")}


@pytest.mark.parametrize("in_time", [False, True])
@pytest.mark.parametrize("change", [cancel, remove, remove_delayed, drain, cancel_all])
async def test_a_job_that_was_taken_out_at_its_time_is_not_released(
    nats_backend: NATSBackend, monkeypatch: pytest.MonkeyPatch, change: Change, in_time: bool
) -> None:
    queue = Queue("work", nats_backend)
    ids = await add_jobs(queue)
    await come_late(queue, monkeypatch, in_time)
    taken = await change(queue, ids)
    await wait_for_all(queue)
    await anyio.sleep(0.3)  # the last that was due may yet be stored
    log, released = queue._subjects.bucket_log, queue._subjects.place(Place.RELEASED)
    left = {queue._subjects.token(each.subject) for each in await queue.backend.last(log, released)}
    assert not taken & left
    if change not in (cancel_all, remove_delayed):  # these spare a job whose time has come
        assert taken >= {*ids}


# -- schedules


async def pause(queue: Queue) -> None:
    assert await queue.pause_repeatable("tick")


async def remove_schedule(queue: Queue) -> None:
    assert await queue.remove_repeatable("tick")


async def change_schedule(queue: Queue) -> None:
    await queue.upsert_repeatable("tick", every=1, args=[1], name="tick")


@pytest.mark.parametrize("in_time", [False, True])
@pytest.mark.parametrize("change", [pause, remove_schedule, change_schedule])
async def test_a_schedule_that_is_changed_at_its_tick_is_as_it_was_changed(
    nats_backend: NATSBackend,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[Queue], Awaitable[None]],
    in_time: bool,
) -> None:
    ran = list[int]()

    async def tick(value: int) -> None:
        ran.append(value)

    async def note(value: int) -> None:
        pass

    queue = make_queue(nats_backend, concurrency=100, tick=tick, note=note)
    first = nats_backend.now() + SECONDS
    entries = [{"task_id": "note", "args": [0], "delay": SECONDS + 1 - 0.3 + TIMER_LEAD}] * TIMERS
    await queue.add_bulk(entries)
    await queue.upsert_repeatable("tick", every=1, args=[0], name="tick", start=first)
    async with running(queue):
        await holds(lambda: bool(ran))
        other = Queue("work", nats_backend.copy())
        await come_late(other, monkeypatch, in_time)
        await change(other)
        await other.backend.close()
        # The tick that was due may be carried out.
        await until(queue.queue_stats, lambda stats: stats["completed"] >= TIMERS)
        await until(queue.queue_stats, lambda stats: stats["waiting"] + stats["active"] == 0)
        ran.clear()
        if change is change_schedule:
            await holds(lambda: len(ran) >= 2)
        else:
            await anyio.sleep(2.2)
    assert {*ran} == ({1} if change is change_schedule else set())
