"""Jobs move to another queue, and queues are saved and restored.

Nothing is lost, nothing is there twice.
"""

from typing import Any

import pytest

from asyncmq_nats import InMemoryBackend, InvalidArgument, JobFilter, Queue
from asyncmq_nats.backends.base import Backend, Write
from asyncmq_nats.exceptions import ConnectionLost, QueueNotPaused
from asyncmq_nats.runtime.registry import TaskRegistry
from asyncmq_nats.transitions.move import Mover
from tests.running import counted, has, make_queue, only, run_jobs, running


async def echo(value: Any = None) -> Any:
    return value


async def fail() -> None:
    raise RuntimeError("no")


def other_queue(backend: Backend) -> tuple[Queue, list[Any]]:
    """Return a queue whose task notes what it runs."""
    seen: list[Any] = []
    registry = TaskRegistry()

    async def note(value: Any = None) -> Any:
        seen.append(value)
        return value

    registry.register(note, queue="other", name="echo")
    return Queue("other", backend, registry=registry), seen


async def interrupt(
    queue: Queue, target: Queue, where: JobFilter | None = None, *, at: tuple[Any, str]
) -> None:
    """Begin a move whose mover dies `at` a step: a method, given by its owner and its name."""

    async def die(*_: Any) -> None:
        raise ConnectionLost("nowhere")

    await counted(queue)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(*at, die)
        with pytest.raises(ConnectionLost):
            await queue.move(target, where)
    await counted(queue)
    await counted(target)


async def filled(backend: Backend) -> Queue:
    """Return a paused queue with jobs in each state that can be moved."""
    queue = make_queue(backend, echo=echo, fail=fail)
    await queue.add("echo", ["done"], job_id="done")
    await queue.add("fail", job_id="failed")
    await run_jobs(queue)
    await queue.pause()
    await queue.add("echo", ["soon"], delay=5000, job_id="soon")
    await queue.add("echo", ["late"], delay=5000, job_id="late")
    await queue.add_bulk([{"task_id": "echo", "args": [number]} for number in range(20)])
    await counted(queue)
    return queue


async def test_jobs_of_all_states_move(backend: Backend) -> None:
    queue = await filled(backend)
    target, seen = other_queue(backend)
    result = await queue.move(target)
    assert (result.matched, result.moved) == (24, 24)
    await only(queue)
    assert await target.get_job_result("done") == "done"
    failed = await target.get_job("failed")
    assert failed is not None
    assert failed["last_error"] == "RuntimeError: no"
    assert await target.promote("soon")
    async with running(target):
        await only(target, completed=22, failed=1, delayed=1)
    assert sorted(seen, key=str) == sorted([*range(20), "soon"], key=str)
    late = await target.get_job("late")
    assert late is not None
    assert late["args"] == ["late"]


async def test_only_what_matches_moves(backend: Backend) -> None:
    queue = await filled(backend)
    target, _ = other_queue(backend)
    assert (await queue.move(target, JobFilter(state=["failed", "delayed"]))).moved == 3
    await only(queue, waiting=20, completed=1)
    await only(target, failed=1, delayed=2)


async def test_jobs_that_wait_move_only_out_of_a_paused_queue(backend: Backend) -> None:
    queue = make_queue(backend)
    target, _ = other_queue(backend)
    await queue.add("echo")
    await counted(queue)
    with pytest.raises(QueueNotPaused, match="pause it first"):
        await queue.move(target)
    with pytest.raises(InvalidArgument, match="another queue"):
        await queue.move(Queue("work", backend))
    with pytest.raises(InvalidArgument, match="can be moved"):
        await queue.move(target, JobFilter(state="active"))


async def test_flows_and_ids_that_are_taken_stay(backend: Backend) -> None:
    queue = make_queue(backend)
    target, _ = other_queue(backend)
    await queue.pause()
    parent = await queue.add("echo", delay=1000)
    await queue.add("echo", depends_on=[parent])
    await queue.add("echo", ["here"], delay=1000, job_id="taken")
    await target.add("echo", ["there"], delay=1000, job_id="taken")
    await counted(queue)
    result = await queue.move(target)
    assert (result.matched, result.moved) == (2, 0)
    await only(queue, delayed=2, **{"waiting-children": 1})
    kept = await target.get_job("taken")
    assert kept is not None
    assert kept["args"] == ["there"]


@pytest.mark.parametrize("step", ["_end_and_release", "_release", "_remove_outcome"])
async def test_a_move_that_was_interrupted_is_finished_by_the_next(
    backend: Backend, step: str
) -> None:
    """Wherever the mover dies: each job runs once, at the one or at the other queue."""
    queue = await filled(backend)
    target, seen = other_queue(backend)

    await interrupt(queue, target, JobFilter(state=["waiting", "delayed"]), at=(Mover, step))
    await queue.move(target, JobFilter(state=["waiting", "delayed"]))
    assert await target.promote("soon")
    async with running(target):
        await only(target, completed=21, delayed=1)
    assert sorted(seen, key=str) == sorted([*range(20), "soon"], key=str)
    await has(queue, 0, "waiting", "delayed")


async def test_a_move_goes_on_after_a_cancellation_that_was_torn(backend: Backend) -> None:
    """The mover is killed after the job has ended here, and before its message is gone."""
    queue = make_queue(backend, echo=echo)
    target, seen = other_queue(backend)
    await queue.add("echo", ["once"])
    await queue.pause()

    await interrupt(queue, target, at=(queue._administration, "_finish_cancellation"))
    await has(queue, 1, "waiting")
    await queue.move(target)
    await only(queue)
    async with running(target):
        await only(target, completed=1)
    assert seen == ["once"]


async def test_a_hold_that_another_mover_finishes_meanwhile_is_not_lost(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two movers meet at a hold: the one that comes second to the cancellation leaves it alone."""
    queue = make_queue(backend, echo=echo)
    target, seen = other_queue(backend)
    await queue.add("echo", ["once"], delay=5000)

    await interrupt(queue, target, at=(Mover, "_end_and_release"))
    cancel = queue._administration.cancel

    async def cancel_second(job_id: str, reason: str) -> bool:
        await cancel(job_id, reason)
        return await cancel(job_id, reason)

    monkeypatch.setattr(queue._administration, "cancel", cancel_second)
    await queue.move(target)
    await only(queue)
    await counted(target)
    (held,) = await target.list_delayed()
    assert await target.promote(held.job_id)
    await run_jobs(target)
    assert seen == ["once"]


async def test_a_hold_that_is_released_meanwhile_does_not_end_the_move(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue = make_queue(backend)
    target, _ = other_queue(backend)
    await queue.add("echo", delay=5000)
    release = Mover._release

    async def release_second(self: Mover, *given: Any) -> None:
        await release(self, *given)
        await release(self, *given)

    monkeypatch.setattr(Mover, "_release", release_second)
    await counted(queue)
    result = await queue.move(target, JobFilter(state="delayed"))
    assert (result.matched, result.moved) == (1, 0)
    await only(target, delayed=1)


async def test_queues_of_one_name_on_two_servers_do_not_finish_each_others_moves() -> None:
    here, elsewhere = InMemoryBackend(), InMemoryBackend()
    queue, namesake = make_queue(here, echo=echo), make_queue(elsewhere, echo=echo)
    target, seen = other_queue(InMemoryBackend())
    await queue.add("echo", ["once"], delay=5000)

    await interrupt(queue, target, at=(Mover, "_release"))
    await namesake.add("echo", delay=5000)
    assert (await namesake.move(target)).moved == 1
    await queue.move(target)
    assert all([await target.promote(held.job_id) for held in await target.list_delayed()])
    await run_jobs(target)
    assert sorted(seen, key=str) == [None, "once"]


async def test_a_move_to_a_third_queue_leaves_the_end_of_an_interrupted_one(
    backend: Backend,
) -> None:
    """By that outcome the hold is released: elsewhere, it would be read as a cancellation."""
    queue = make_queue(backend, echo=echo)
    target, seen = other_queue(backend)
    third = make_queue(backend, "third")
    await queue.add("echo", ["once"], delay=5000, job_id="x")

    await interrupt(queue, target, at=(Mover, "_release"))
    assert (await queue.move(third)).moved == 0
    await only(third)
    await queue.move(target)
    await only(queue)
    assert await target.promote("x")
    await run_jobs(target)
    assert seen == ["once"]


async def test_a_hold_is_kept_when_nothing_tells_what_became_of_its_job(backend: Backend) -> None:
    queue = make_queue(backend, echo=echo)
    target, _ = other_queue(backend)
    await queue.add("echo", delay=5000, job_id="x")

    await interrupt(queue, target, at=(Mover, "_release"))
    assert await queue.remove_job("x")  # or its time to live is over
    await queue.move(target)
    await only(target, delayed=1)


async def test_what_is_no_job_stays_and_the_rest_moves(backend: Backend) -> None:
    queue = await filled(backend)
    target, _ = other_queue(backend)
    keys = queue._subjects
    await backend.write(keys.ready_log, Write(keys.ready(5, "junk"), b"junk"))
    await counted(queue)
    result = await queue.move(target)
    assert (result.matched, result.moved) == (25, 24)
    await only(queue, waiting=1)


async def test_a_queue_is_saved_and_restored(backend: Backend) -> None:
    queue = await filled(backend)
    await queue.upsert_repeatable("echo", every="1h", name="hourly", args=["tick"])
    await queue.upsert_repeatable("echo", cron="0 4 * * *", timezone="Europe/Berlin")
    await queue.pause_repeatable("hourly")
    parent = await queue.add("echo", ["parent"], delay=5000)
    child = await queue.add("echo", ["child"], depends_on=[parent, "done"])
    await counted(queue)
    lines = [line async for line in queue.export()]
    target, seen = other_queue(backend)
    told: list[int] = []
    result = await target.import_jobs(lines, progress=told.append)
    assert (result.added, result.existing, told[-1]) == (26, 0, 26)
    again = await target.import_jobs(lines)
    assert (again.added, again.existing) == (0, 26)
    await only(target, **await queue.queue_stats())
    for job_id in ("done", "failed", "late", child):
        before, after = await queue.get_job(job_id), await target.get_job(job_id)
        assert before is not None
        assert before == after
    paused = {info.job_def["id"]: info.paused for info in await target.list_repeatables()}
    assert paused == {info.job_def["id"]: info.paused for info in await queue.list_repeatables()}
    assert await target.promote("soon")
    assert await target.promote(parent)
    async with running(target):
        await only(target, completed=24, failed=1, delayed=1)
    assert sorted(seen, key=str) == sorted([*range(20), "soon", "parent", "child"], key=str)


async def test_lines_of_something_else_are_refused(backend: Backend) -> None:
    target, _ = other_queue(backend)
    lines: list[Any] = [
        {"state": "waiting"},
        {"state": "odd", "job": {"id": "a"}},
        {"format": 99},
        "x",
        {"repeatable": "x"},
        {"repeatable": {"id": "a", "every": 60}},
        {"repeatable": {"id": "a", "task_id": "echo", "every": 60, "colour": "red"}},
    ]
    for line in lines:
        with pytest.raises(InvalidArgument):
            await target.import_jobs([line])
    assert await target.list_repeatables() == []
