"""Bulks that are sent while they are built: nothing of them is stored before all are checked."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import count
from typing import Any

import anyio
import pytest

from asyncmq_nats.backends.base import Backend, Staged, Write
from asyncmq_nats.calls import Call
from asyncmq_nats.exceptions import (
    BulkAddFailed,
    InvalidArgument,
    NotSerializable,
    PayloadTooLarge,
    StorageFull,
)
from asyncmq_nats.middleware import Middleware
from asyncmq_nats.queues import Queue
from tests.receiver import until
from tests.running import PATIENCE, has, make_queue, only, run_jobs


async def echo(value: Any = None) -> Any:
    return value


async def mail(to: str, times: int, *, urgent: bool = False) -> None:
    """Send a mail some times."""


class WatchedStage:
    """Counts what is sent early, committed and dropped."""

    def __init__(self, staged: Staged, stages: "list[WatchedStage]") -> None:
        self._staged = staged
        self.sizes: list[int] = []
        self.end = ""
        self.earlier = [each.end for each in stages]
        """How the ones before it had ended when it began."""
        stages.append(self)

    async def add(self, *writes: Write) -> None:
        self.sizes.append(len(writes))
        await self._staged.add(*writes)

    async def commit(self) -> int:
        sequence = await self._staged.commit()
        self.end = "committed"
        return sequence

    def drop(self) -> None:
        self.end = self.end or "dropped"
        self._staged.drop()


@pytest.fixture
def stages(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> list[WatchedStage]:
    stages: list[WatchedStage] = []
    stage = backend.stage
    monkeypatch.setattr(backend, "stage", lambda log: WatchedStage(stage(log), stages))
    return stages


def entries(count: int, **options: Any) -> list[dict[str, Any]]:
    return [{"task_id": "echo", "args": [number], **options} for number in range(count)]


async def test_a_bulk_is_sent_while_it_is_built(
    backend: Backend, stages: list[WatchedStage]
) -> None:
    queue = make_queue(backend, echo=echo)
    seen: list[int] = []

    def slowly() -> Iterator[dict[str, Any]]:
        for number, entry in enumerate(entries(6300)):
            seen.append(sum(map(sum, (stage.sizes for stage in stages))))
            yield entry if number % 2 else entry | {"priority": 1}

    ids = await queue.add_bulk(slowly())
    assert [sum(stage.sizes) for stage in stages] == [1000] * 5  # the rest goes as it is
    assert {stage.end for stage in stages} == {"committed"}
    assert (seen[249], seen[250], seen[3100], seen[-1]) == (0, 250, 3000, 5000)
    assert len(set(ids)) == 6300
    await has(queue, 6300)
    jobs = await queue.get_jobs(["waiting"], asc=True)
    by_id = {job["id"]: job["args"] for job in jobs}
    assert [by_id[job_id] for job_id in ids] == [[number] for number in range(6300)]


def mails(count: int, **options: Any) -> list[dict[str, Any]]:
    return [
        {"task_id": "mail", "args": [f"user {n}", n], "kwargs": {"urgent": True}, **options}
        for n in range(count)
    ]


@pytest.mark.parametrize("as_calls", [False, True])
async def test_each_batch_of_a_series_is_stored_while_the_next_is_built(
    backend: Backend, stages: list[WatchedStage], as_calls: bool
) -> None:
    queue = make_queue(backend, mail=mail)
    given: list[Any] = mails(8200)
    if as_calls:
        given = [Call("mail", "work", each["args"], each["kwargs"]) for each in given]
    ids = await queue.add_bulk(given)
    assert [sum(stage.sizes) for stage in stages] == [1000] * 8 + [200]
    assert {stage.end for stage in stages} == {"committed"}
    stored = [stage.earlier.count("committed") for stage in stages[5:]]
    assert all(number >= least for least, number in enumerate(stored, 1))
    await has(queue, 8200)
    jobs = {job["id"]: job for job in await queue.get_jobs(["waiting"])}
    assert [jobs[job_id]["args"] for job_id in ids] == [[f"user {n}", n] for n in range(8200)]
    assert {str(job["kwargs"]) for job in jobs.values()} == {"{'urgent': True}"}


@pytest.mark.parametrize("refused", [{2}, {0, 8}, set(range(9))])
async def test_a_batch_of_a_series_that_is_refused_is_told(
    backend: Backend, monkeypatch: pytest.MonkeyPatch, refused: set[int]
) -> None:
    queue, stage = make_queue(backend, mail=mail), backend.stage
    begun = count()

    class Full(WatchedStage):
        async def commit(self) -> int:
            raise StorageFull("the log", "it is full")

    monkeypatch.setattr(
        backend,
        "stage",
        lambda log: (Full if next(begun) in refused else WatchedStage)(stage(log), []),
    )
    with pytest.raises(StorageFull if len(refused) == 9 else BulkAddFailed) as caught:
        await queue.add_bulk(mails(8200))
    await has(queue, 8200 - sum(200 if batch == 8 else 1000 for batch in refused))
    if isinstance(caught.value, BulkAddFailed):
        assert {index // 1000 for index in caught.value.errors} == refused
        assert len(caught.value.errors) + len(caught.value.added) == 8200
        for index, job_id in [*caught.value.added.items()][::700]:
            job = await queue.get_job(job_id)
            assert job is not None
            assert job["args"][1] == index


@pytest.mark.parametrize(
    ("other", "error"),
    [
        ({"args": ["x", 1, 2, 3]}, None),
        ({"args": ["x" * 2_000_000, 1]}, PayloadTooLarge),
        ({"args": ["\ud800", 1]}, NotSerializable),
        ({"args": ["x", float("nan")]}, NotSerializable),
        ({"task_id": 3}, ValueError),
    ],
)
async def test_one_entry_of_another_kind_ends_a_series(
    backend: Backend, stages: list[WatchedStage], other: dict[str, Any], error: Any
) -> None:
    queue, entries = make_queue(backend, mail=mail), mails(7000)
    entries[6500] |= other
    if error is None:
        await queue.add_bulk(entries)
        await has(queue, 7000)
        return
    with pytest.raises(error) as caught:
        await queue.add_bulk(entries)
    notes = getattr(caught.value, "__notes__", [])
    assert any("job 6500" in text for text in (*notes, str(caught.value)))
    assert {stage.end for stage in stages} == {"dropped"}
    await only(queue)


async def test_a_series_of_jobs_that_are_too_large_is_refused(
    backend: Backend, stages: list[WatchedStage]
) -> None:
    queue = make_queue(backend, mail=mail)
    with pytest.raises(PayloadTooLarge) as caught:
        await queue.add_bulk([{"task_id": "mail", "args": ["x" * 2_000_000, 1]}] * 300)
    assert "job 0" in str(caught.value.__notes__)
    assert stages == []
    large = "x" * (backend.max_body // 2)
    await queue.add_bulk([{"task_id": "mail", "args": [large, n]} for n in range(260)])
    await only(queue, waiting=260)


async def test_a_call_for_another_queue_is_refused(backend: Backend) -> None:
    queue = make_queue(backend, mail=mail)
    calls: list[Call[None]] = [Call("mail", "work", ["a", n]) for n in range(1200)]
    with pytest.raises(InvalidArgument, match="other"):
        await queue.add_bulk([*calls, Call("mail", "other", ["a", 1])])
    await only(queue)


async def test_a_series_that_is_cancelled_leaves_no_batch_open(
    backend: Backend, stages: list[WatchedStage], monkeypatch: pytest.MonkeyPatch
) -> None:
    queue = make_queue(backend, mail=mail)
    with anyio.CancelScope() as scope:
        add = WatchedStage.add

        async def cancel(stage: WatchedStage, *writes: Write) -> None:
            await add(stage, *writes)
            if len(stages) == 3:
                scope.cancel()

        monkeypatch.setattr(WatchedStage, "add", cancel)
        await queue.add_bulk(mails(8000))
    assert len(stages) == 3
    assert {stage.end for stage in stages} <= {"committed", "dropped"}
    assert stages[2].end == "dropped"
    # A batch whose commit was on its way may still be stored.
    await until(queue.queue_stats, lambda stats: stats["waiting"] in (0, 1000, 2000))


@pytest.mark.parametrize("delay", [0.2, 3600])
async def test_delayed_jobs_are_sent_while_they_are_built(
    backend: Backend, stages: list[WatchedStage], delay: float
) -> None:
    queue = make_queue(backend, echo=echo)
    ids = await queue.add_bulk(entries(1400, delay=delay))
    assert [(sum(stage.sizes), stage.end) for stage in stages] == [
        (1000, "committed"),
        (400, "committed"),
    ]
    if delay > 1:
        jobs = await queue.get_delayed(asc=True)
        assert [job["id"] for job in jobs] == ids
        assert all(abs(job["delay_until"] - job["created_at"] - delay) < 1 for job in jobs)
    else:
        await run_jobs(queue)
        await only(queue, completed=1400)


async def test_a_small_bulk_is_one_write(backend: Backend, stages: list[WatchedStage]) -> None:
    queue = make_queue(backend, echo=echo)
    await queue.add_bulk(entries(249))
    assert stages == []
    await queue.add_bulk(entries(251))
    assert [stage.sizes for stage in stages] == [[250, 1]]
    await has(queue, 500)


@pytest.mark.parametrize("index", [249, 250, 999, 1000, 1700])
@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        ({"task_id": "echo", "args": [object()]}, NotSerializable),
        ({"task_id": "echo", "retries": -1}, InvalidArgument),
        ({"task_id": "echo", "unknown": 1}, ValueError),
    ],
)
async def test_a_wrong_entry_leaves_nothing_of_what_was_sent(
    backend: Backend, stages: list[WatchedStage], index: int, wrong: dict[str, Any], error: Any
) -> None:
    queue = make_queue(backend, echo=echo)
    with pytest.raises(error) as caught:
        await queue.add_bulk([*entries(index), wrong, *entries(700)])
    notes = getattr(caught.value, "__notes__", [])
    assert any(f"job {index}" in text for text in (*notes, str(caught.value)))
    assert {stage.end for stage in stages} <= {"dropped"}
    assert len(stages) == (index + 750) // 1000
    await queue.add_bulk(entries(3))
    await has(queue, 3)


@pytest.mark.parametrize(
    "other",
    [{"delay": 3600}, {"job_id": "chosen"}, {"deduplication": {"id": "x"}}, {"depends_on": ["p"]}],
)
async def test_a_bulk_with_other_jobs_is_sent_when_it_is_known(
    backend: Backend, stages: list[WatchedStage], other: dict[str, Any]
) -> None:
    queue = make_queue(backend, echo=echo)
    await queue.add("echo", job_id="p", delay=3600)
    ids = await queue.add_bulk([*entries(700), {"task_id": "echo", **other}, *entries(700)])
    assert [(stage.sizes, stage.end) for stage in stages] == [([250, 250], "dropped")]
    assert len(set(ids)) == 1401
    await has(queue, 1402)


async def test_jobs_with_ids_or_parents_are_not_sent_early(
    backend: Backend, stages: list[WatchedStage]
) -> None:
    queue = make_queue(backend, echo=echo)
    await queue.add("echo", job_id="p", delay=3600)
    named = [{"task_id": "echo", "job_id": f"job {number}"} for number in range(300)]
    assert await queue.add_bulk(named) == await queue.add_bulk(named)
    await queue.add_bulk(entries(300, depends_on=["p"]))
    assert stages == []
    await only(queue, waiting=300, delayed=1, **{"waiting-children": 300})


async def test_a_middleware_sees_the_jobs_before_they_are_sent(
    backend: Backend, stages: list[WatchedStage]
) -> None:
    class Stamp(Middleware):
        async def enqueue(self, queue: str, jobs: Any, call_next: Any) -> Any:
            assert stages == []
            return await call_next([replace(job, args=["stamped"]) for job in jobs])

    queue = Queue("work", backend, middleware=[Stamp()])
    await queue.add_bulk(entries(600))
    assert stages == []
    assert [job["args"] for job in await queue.get_waiting()] == [["stamped"]] * 600


async def test_a_cancelled_bulk_adds_nothing(backend: Backend, stages: list[WatchedStage]) -> None:
    queue = make_queue(backend, echo=echo)
    with anyio.CancelScope() as scope:

        def until_cancelled() -> Iterator[dict[str, Any]]:
            for number, entry in enumerate(entries(2000)):
                if number == 1600:
                    scope.cancel()
                yield entry

        await queue.add_bulk(until_cancelled())
    assert [stage.end for stage in stages] == ["dropped", "dropped"]
    await queue.add_bulk(entries(2))
    await has(queue, 2)


async def test_the_list_of_a_bulk_may_change_meanwhile(backend: Backend) -> None:
    queue, given = make_queue(backend, echo=echo), entries(1200)

    async def clear() -> None:
        await anyio.lowlevel.checkpoint()
        given.clear()

    with anyio.fail_after(PATIENCE):
        async with anyio.create_task_group() as group:
            group.start_soon(clear)
            assert len(await queue.add_bulk(given)) == 1200
    await has(queue, 1200)


async def test_a_bulk_to_a_log_that_was_removed_makes_it_again(
    backend: Backend, twin: Backend
) -> None:
    queue = make_queue(backend, echo=echo)
    await queue.add_bulk(entries(1))
    other = make_queue(twin, echo=echo)
    await twin.delete_log(queue._subjects.ready_log)
    ids = await queue.add_bulk(entries(600))
    await only(other, waiting=600)
    await run_jobs(queue)
    assert sorted(job["id"] for job in await other.get_completed()) == sorted(ids)


async def test_bulks_side_by_side(backend: Backend) -> None:
    queues: list[Queue] = [make_queue(backend, f"q{number}", echo=echo) for number in range(4)]
    with anyio.fail_after(PATIENCE):
        async with anyio.create_task_group() as group:
            for queue in queues * 2:
                group.start_soon(queue.add_bulk, entries(2500))
    for queue in queues:
        await has(queue, 5000)
