"""Jobs that have not started are changed by hand: never lost, never there twice."""

from functools import partial
from typing import Any

import anyio
import pytest

from asyncmq_nats import InvalidArgument, JobFilter, JobNotFound, PayloadTooLarge, Queue
from asyncmq_nats.backends.base import Backend
from asyncmq_nats.exceptions import WrongState
from tests.receiver import PATIENCE, until
from tests.running import counted, make_queue, only, outcome, race, run_jobs, running


class Notes:
    """A task that notes what it was called with."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    async def note(self, value: Any = None, **more: Any) -> Any:
        self.calls.append(value if not more else (value, more))
        return value


async def test_a_promoted_job_runs_now_and_once(backend: Backend) -> None:
    notes = Notes()
    queue = make_queue(backend, note=notes.note)
    job_id = await queue.add("note", ["a"], delay=10_000, retries=2)
    assert await queue.promote(job_id)
    assert await queue.get_job_state(job_id) == "waiting"
    assert not await queue.promote(job_id)
    await run_jobs(queue)
    job = await outcome(queue, job_id)
    assert (job["status"], job["max_retries"], notes.calls) == ("completed", 2, ["a"])


async def test_promotion_keeps_the_attempts_that_were_made(backend: Backend) -> None:
    async def fail() -> None:
        raise RuntimeError("no")

    queue = make_queue(backend, fail=fail)
    job_id = await queue.add("fail", retries=1, backoff=10_000)
    async with running(queue):
        await until(partial(queue.get_job_state, job_id), lambda state: state == "delayed")
        assert await queue.promote(job_id)
        job = await outcome(queue, job_id)
    assert (job["status"], len(job["errors"])) == ("failed", 2)


async def test_many_who_promote_a_job_make_it_run_once(backend: Backend, twin: Backend) -> None:
    notes = Notes()
    queue = make_queue(backend, note=notes.note)
    others = [queue, Queue("work", twin)]
    for number in range(10):
        await queue.add("note", [number], delay=0.6, job_id=f"n-{number}")
    async with running(queue):
        for number in range(10):
            await race(*(partial(each.promote, f"n-{number}") for each in others * 2))
        await only(queue, completed=10)
    assert sorted(notes.calls) == list(range(10))


async def test_a_job_is_rescheduled_later_and_sooner(backend: Backend) -> None:
    notes = Notes()
    queue = make_queue(backend, note=notes.note)
    first, second = [await queue.add("note", [n], delay=5000) for n in (1, 2)]
    later = backend.now() + 9000
    assert await queue.reschedule(first, later)
    job = await queue.get_job(first)
    assert job is not None
    assert (job["status"], job["delay_until"]) == ("delayed", later)
    assert await queue.reschedule(second, backend.now() + 0.7)
    async with running(queue):
        assert await queue.wait_for(second, PATIENCE) == 2
        assert await queue.reschedule(first, 0.0)
        assert await queue.wait_for(first, PATIENCE) == 1
    assert notes.calls == [2, 1]
    assert not await queue.reschedule(first, later)
    assert not await queue.reschedule("no-such-job", later)
    with pytest.raises(InvalidArgument):
        await queue.reschedule(first, 1e300)


async def test_a_delayed_job_runs_with_the_arguments_it_was_given_last(backend: Backend) -> None:
    notes = Notes()
    queue = make_queue(backend, note=notes.note)
    job_id = await queue.add("note", ["old"], delay=3600)
    before = await queue.get_job(job_id)
    await queue.edit(job_id, args=["new"], kwargs={"more": 1})
    after = await queue.get_job(job_id)
    assert before is not None
    assert after is not None
    assert after == before | {"args": ["new"], "kwargs": {"more": 1}}
    assert await queue.reschedule(job_id, backend.now() + 0.5)
    await run_jobs(queue)
    assert notes.calls == [("new", {"more": 1})]


async def test_a_child_is_edited_while_it_waits(backend: Backend) -> None:
    notes = Notes()
    queue = make_queue(backend, note=notes.note)
    parent = await queue.add("note", ["parent"])
    child = await queue.add("note", ["child"], depends_on=[parent])
    await queue.edit(child, args=["edited"])
    await run_jobs(queue)
    await outcome(queue, child)
    assert notes.calls == ["parent", "edited"]


async def test_a_waiting_job_is_edited_only_in_a_paused_queue(backend: Backend) -> None:
    notes = Notes()
    queue = make_queue(backend, concurrency=1, note=notes.note)
    first = await queue.add("note", [1])
    await queue.add("note", [2])
    with pytest.raises(WrongState, match="pause the queue first"):
        await queue.edit(first, args=[10])
    await queue.pause()
    await queue.edit(first, args=[10])
    await only(queue, waiting=2)
    await queue.resume()
    await run_jobs(queue)
    await only(queue, completed=2)
    assert notes.calls == [2, 10]  # what is edited is the last of its priority


async def test_a_job_that_starts_while_it_is_edited_runs_again_and_counts_once(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The queue is resumed at the worst moment: the outcome of the old arguments is refused."""
    started, end = anyio.Event(), anyio.Event()
    seen: list[str] = []

    async def hold(value: str) -> str:
        seen.append(value)
        started.set()
        if value == "old":
            await end.wait()
        return value

    queue = make_queue(backend, hold=hold)
    job_id = await queue.add("hold", ["old"])
    await queue.pause()
    async with running(queue):

        async def resume_at_the_worst_moment(priority: int) -> bool:
            await queue.resume()
            await started.wait()
            return True

        monkeypatch.setattr(queue._edits, "_is_held_back", resume_at_the_worst_moment)
        await queue.edit(job_id, args=["new"])
        end.set()
        await only(queue, completed=1)
        assert await queue.get_job_result(job_id) == "new"
    assert seen == ["old", "new"]


async def test_a_job_that_has_started_is_not_edited(backend: Backend) -> None:
    started, end = anyio.Event(), anyio.Event()

    async def hold() -> None:
        started.set()
        await end.wait()

    queue = make_queue(backend, hold=hold)
    job_id = await queue.add("hold")
    async with running(queue):
        await started.wait()
        await queue.pause()
        with pytest.raises(WrongState, match="is active"):
            await queue.edit(job_id, args=[1])
        end.set()
        await queue.wait_for(job_id, PATIENCE)
    with pytest.raises(WrongState, match="is completed"):
        await queue.edit(job_id, args=[1])
    with pytest.raises(JobNotFound):
        await queue.edit("no-such-job", args=[1])


async def test_arguments_that_cannot_be_are_refused(backend: Backend) -> None:
    queue = make_queue(backend)
    job_id = await queue.add("t", [1], delay=1000)
    with pytest.raises(PayloadTooLarge, match=r"job .* of task 't'"):
        await queue.edit(job_id, args=["x" * 2_000_000])
    with pytest.raises(TypeError):
        await queue.edit(job_id, args=[object()])
    job = await queue.get_job(job_id)
    assert job is not None
    assert job["args"] == [1]


async def test_edits_and_starts_that_meet_lose_nothing(backend: Backend, twin: Backend) -> None:
    """Each job runs once, with the last arguments of which its editor was told that they are in.

    Or with the next ones, when its time came meanwhile: that edit is not confirmed.
    """
    notes = Notes()
    queue = make_queue(backend, concurrency=5, note=notes.note)
    other = Queue("work", twin)
    told = dict.fromkeys(range(20), 0)
    for number in range(20):
        await queue.add("note", [[number, 0]], delay=1 + number / 100, job_id=f"n-{number}")

    async def edit(number: int) -> None:
        for version in range(1, 200):
            try:
                await other.edit(f"n-{number}", args=[[number, version]])
            except WrongState:
                return
            told[number] = version

    async with running(queue):
        await race(*(partial(edit, number) for number in range(20)))
        await only(queue, completed=20)
    assert sorted(number for number, _ in notes.calls) == list(range(20))
    assert all(0 <= version - told[number] <= 1 for number, version in notes.calls)


# -- many at once


async def test_an_action_meets_each_job_once(backend: Backend) -> None:
    """Jobs that fail again at once are not retried again by the same call."""
    notes = Notes()

    async def fail(number: int) -> None:
        notes.calls.append(number)
        raise RuntimeError("again")

    queue = make_queue(backend, concurrency=10, fail=fail)
    await queue.add_bulk([{"task_id": "fail", "args": [n]} for n in range(150)])
    await run_jobs(queue)
    seen: list[int] = []
    async with running(queue):
        result = await queue.apply(JobFilter(state="failed"), "retry", progress=seen.append)
        assert (result.matched, result.done) == (150, 150)
        await only(queue, failed=150)
    assert sorted(notes.calls) == sorted([*range(150)] * 2)
    assert seen[-1] == 150
    assert result.until is not None
    again = await queue.apply(JobFilter(state="failed", until=result.until), "retry")
    assert again.matched == 0


async def test_a_dry_run_changes_nothing(backend: Backend) -> None:
    queue = make_queue(backend)
    await queue.add_bulk([{"task_id": "t", "delay": 1000}] * 30)
    await counted(queue)
    for action in ("promote", "cancel", "remove"):
        assert (await queue.apply(JobFilter(), action, dry_run=True)).matched == 30
    assert (await queue.apply(["a", "b", "a"], "cancel", dry_run=True)).matched == 2
    await only(queue, delayed=30)


async def test_actions_act_on_what_matches_and_on_nothing_else(backend: Backend) -> None:
    queue = make_queue(backend)
    await queue.add_bulk([{"task_id": "a", "delay": 1000}] * 10)
    await queue.add_bulk([{"task_id": "b", "delay": 1000}] * 10)
    await queue.add_bulk([{"task_id": "a"}] * 5)
    await counted(queue)
    assert (await queue.apply(JobFilter(task="a"), "promote", limit=4)).done == 4
    assert (await queue.apply(JobFilter(task="b"), "cancel")).done == 10
    assert (await queue.apply(JobFilter(task="a", state="delayed"), "remove")).done == 6
    await only(queue, waiting=9, cancelled=10)
    assert (await queue.apply(JobFilter(until=0), "remove")).matched == 0
    await only(queue, waiting=9, cancelled=10)
    run_at = backend.now() + 500
    await queue.add("c", delay=1000)
    await counted(queue)
    result = await queue.apply(JobFilter(task="c"), partial(queue.reschedule, run_at=run_at))
    assert result.done == 1
    await counted(queue)
    assert (await queue.list_delayed())[0].run_at == run_at


async def test_ids_that_are_not_there_are_counted(backend: Backend) -> None:
    queue = make_queue(backend)
    job_id = await queue.add("t", delay=1000)
    result = await queue.apply([job_id, "other", job_id], "cancel")
    assert (result.matched, result.done) == (2, 1)


async def test_an_action_for_other_states_is_refused(backend: Backend) -> None:
    queue = make_queue(backend)
    with pytest.raises(InvalidArgument, match="promote is for jobs that are delayed"):
        await queue.apply(JobFilter(state="failed"), "promote")
    with pytest.raises(InvalidArgument, match="action must be one of retry"):
        await queue.apply(JobFilter(), "explode")
    with pytest.raises(InvalidArgument):
        await queue.apply("an-id", "retry")


async def test_removal_by_filter_spares_what_was_retried_since(
    backend: Backend, twin: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail() -> None:
        raise RuntimeError("no")

    queue = make_queue(backend, fail=fail)
    job_id = await queue.add("fail")
    await run_jobs(queue)
    other, remove = Queue("work", twin), queue._cleanup.remove_records

    async def remove_late(*args: Any) -> list[str]:
        assert await other.retry_job(job_id)
        return await remove(*args)

    monkeypatch.setattr(queue._cleanup, "remove_records", remove_late)
    result = await queue.apply(JobFilter(state="failed"), "remove")
    assert (result.matched, result.done) == (1, 0)
    await only(queue, waiting=1)
