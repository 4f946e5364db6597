"""Flows: jobs that depend on each other, added as a whole; on both backends."""

import random
from functools import partial
from typing import Any

import anyio
import pytest

from asyncmq_nats.backends.base import Backend, Write
from asyncmq_nats.context import current_job
from asyncmq_nats.exceptions import (
    BackendError,
    BulkAddFailed,
    InvalidFlow,
    JobNotFound,
    NotSerializable,
    Unconfirmed,
    WriteRefused,
)
from asyncmq_nats.flow import FlowProducer
from asyncmq_nats.jobs import Job
from asyncmq_nats.queues import Queue
from tests.running import (
    PATIENCE,
    Unsent,
    has,
    make_queue,
    only,
    outcome,
    race,
    run_jobs,
    running,
    wait_until_done,
)


async def echo(value: Any = None) -> Any:
    return value


async def fail() -> None:
    raise ValueError("no")


async def read_parents() -> dict[str, Any]:
    return await current_job().parent_results()


def queue_of(backend: Backend, **tasks: Any) -> Queue:
    return make_queue(
        backend, concurrency=20, echo=echo, fail=fail, read_parents=read_parents, **tasks
    )


def job(task_id: str = "echo", *parents: Job, **fields: Any) -> Job:
    return Job(
        task_id=task_id,
        depends_on=[parent.job_id for parent in parents],
        **({"max_retries": 0} | fields),
    )


# -- shapes


async def test_a_flow_of_one_job_runs(backend: Backend) -> None:
    queue = queue_of(backend)
    ids = await FlowProducer(backend).add_flow("work", [job(args=["alone"])])
    await run_jobs(queue)
    assert await queue.get_job_result(ids[0]) == "alone"


async def test_ids_come_in_the_order_given_and_parents_first(backend: Backend) -> None:
    parent = job(args=["parent"])
    child = job("read_parents", parent)
    grandchild = job("read_parents", child)
    jobs = [grandchild, parent, child]
    queue = queue_of(backend)
    assert await FlowProducer(backend).add_flow("work", jobs) == [each.job_id for each in jobs]
    await has(queue, 2, "waiting-children")
    async with running(queue):
        result = await queue.wait_for(grandchild.job_id, timeout=PATIENCE)
    assert result == {child.job_id: {parent.job_id: "parent"}}


async def test_fan_in(backend: Backend) -> None:
    parents = [job(args=[number]) for number in range(200)]
    child = job("read_parents", *parents)
    queue = queue_of(backend)
    await FlowProducer(backend).add_flow("work", [*parents, child])
    async with running(queue):
        result = await queue.wait_for(child.job_id, timeout=PATIENCE)
    assert result == {parent.job_id: number for number, parent in enumerate(parents)}


@pytest.mark.slow
async def test_fan_out_to_10_000_children_each_once(backend: Backend) -> None:
    runs: list[int] = []

    async def note(number: int) -> None:
        runs.append(number)

    queue = queue_of(backend, note=note)
    queue.concurrency = 200
    root = job()
    with anyio.fail_after(4 * PATIENCE):
        await FlowProducer(backend).add_flow(
            "work", [root, *(job("note", root, args=[number]) for number in range(10_000))]
        )
        async with running(queue):
            # Far cheaper than counting by state.
            while len(runs) < 10_000:  # noqa: ASYNC110
                await anyio.sleep(0.05)
            await wait_until_done(queue)
    assert sorted(runs) == list(range(10_000))
    await only(queue, completed=10_001)


async def test_a_flow_may_hang_on_jobs_outside_of_it(backend: Backend) -> None:
    queue = queue_of(backend)
    outside, ended = (
        await queue.add("echo", ["outside"], delay=0.2),
        await queue.add("echo", ["ended"]),
    )
    async with running(queue):
        await queue.wait_for(ended, timeout=PATIENCE)
        parent = job(args=["inside"])
        child = Job(task_id="read_parents", depends_on=[outside, ended, parent.job_id])
        await FlowProducer(backend).add_flow("work", [child, parent])
        assert await queue.wait_for(child.job_id, timeout=PATIENCE) == {
            outside: "outside",
            ended: "ended",
            parent.job_id: "inside",
        }


async def test_jobs_of_a_flow_keep_their_priority_delay_and_retries(backend: Backend) -> None:
    runs: list[str] = []

    async def flaky() -> str:
        runs.append("flaky")
        if len(runs) < 3:
            raise ValueError("not yet")
        return "third time"

    queue = queue_of(backend, flaky=flaky)
    parent = job("flaky", max_retries=2, backoff=0.01, priority=1)
    child = job("read_parents", parent, priority=9)
    later = job("echo", parent, delay_until=backend.now() + 3600)
    await FlowProducer(backend).add_flow("work", [parent, child, later])
    async with running(queue):
        assert await queue.wait_for(child.job_id, timeout=PATIENCE) == {parent.job_id: "third time"}
        assert await queue.get_job_state(later.job_id) == "delayed"
    found = [await queue.get_job(each.job_id) for each in (parent, child)]
    assert [each["priority"] for each in found if each] == [1, 9]


# -- what is no flow


@pytest.mark.parametrize("length", [1, 2, 5])
async def test_a_circle_is_refused(backend: Backend, length: int) -> None:
    ids = [f"job-{number}" for number in range(length)]
    jobs = [
        Job(task_id="echo", job_id=ids[number], depends_on=[ids[number - 1]])
        for number in range(length)
    ]
    jobs += [job(), Job(task_id="echo", depends_on=[ids[0]])]
    with pytest.raises(InvalidFlow, match="circle"):
        await FlowProducer(backend).add_flow("work", jobs)
    await has(queue_of(backend), 0)


async def test_two_jobs_with_one_id_are_refused(backend: Backend) -> None:
    with pytest.raises(InvalidFlow, match="same id"):
        await FlowProducer(backend).add_flow(
            "work", [Job(task_id="echo", job_id="x"), Job(task_id="echo", job_id="x")]
        )
    await has(queue_of(backend), 0)


async def test_an_id_that_exists_is_refused_and_nothing_is_added(backend: Backend) -> None:
    queue = queue_of(backend)
    await queue.add("echo", job_id="mine")
    parent = job()
    with pytest.raises(InvalidFlow, match="mine"):
        await FlowProducer(backend).add_flow("work", [parent, job("echo", parent, job_id="mine")])
    await has(queue, 1)


async def test_an_unknown_parent_is_an_error_and_nothing_is_added(backend: Backend) -> None:
    with pytest.raises(JobNotFound, match="nobody"):
        await FlowProducer(backend).add_flow(
            "work", [job(), Job(task_id="echo", depends_on=["nobody"])]
        )
    await has(queue_of(backend), 0)


async def test_an_unsound_job_adds_nothing(backend: Backend) -> None:
    parent = job()
    with pytest.raises(NotSerializable):
        await FlowProducer(backend).add_flow("work", [parent, job("echo", parent, args=[object()])])
    await has(queue_of(backend), 0)


async def test_an_empty_flow_is_nothing(backend: Backend) -> None:
    assert await FlowProducer(backend).add_flow("work", []) == []


# -- failures


@pytest.mark.parametrize(
    ("policy", "state"), [("wait", "waiting-children"), ("fail", "failed"), ("run", "completed")]
)
async def test_a_failing_job_of_a_flow_is_treated_as_its_children_want(
    backend: Backend, policy: str, state: str
) -> None:
    queue = queue_of(backend)
    root = job("fail")
    child = job("echo", root, on_parent_failure=policy)
    grandchild = job("echo", child, on_parent_failure=policy)
    await FlowProducer(backend).add_flow("work", [root, child, grandchild])
    async with running(queue):
        await outcome(queue, root.job_id)
        if policy != "wait":
            await outcome(queue, grandchild.job_id)
    assert [await queue.get_job_state(each.job_id) for each in (child, grandchild)] == [
        state,
        state,
    ]


async def test_retrying_the_failed_root_of_a_flow_by_hand_goes_on_with_it(backend: Backend) -> None:
    broken = True

    async def flaky() -> str:
        if broken:
            raise ValueError("not yet")
        return "repaired"

    queue = queue_of(backend, flaky=flaky)
    root = job("flaky")
    child = job("read_parents", root)
    await FlowProducer(backend).add_flow("work", [root, child])
    async with running(queue):
        assert (await outcome(queue, root.job_id))["status"] == "failed"
        broken = False
        assert await queue.retry_job(root.job_id)
        assert await queue.wait_for(child.job_id, timeout=PATIENCE) == {root.job_id: "repaired"}


async def test_cancelling_the_root_of_a_flow_fails_what_wants_to_fail(backend: Backend) -> None:
    queue = queue_of(backend)
    root = job(delay_until=backend.now() + 3600)
    child = job("echo", root, on_parent_failure="fail")
    grandchild = job("echo", child, on_parent_failure="fail")
    await FlowProducer(backend).add_flow("work", [root, child, grandchild])
    assert await queue.cancel_job(root.job_id)
    assert [await queue.get_job_state(each.job_id) for each in (root, child, grandchild)] == [
        "cancelled",
        "failed",
        "failed",
    ]


async def test_a_flow_that_hangs_on_a_failed_job_fails_as_far_as_it_wants(backend: Backend) -> None:
    queue = queue_of(backend)
    failed = await queue.add("fail")
    await run_jobs(queue)
    child = Job(task_id="echo", depends_on=[failed], on_parent_failure="fail")
    grandchild = job("echo", child, on_parent_failure="fail")
    stubborn = job("echo", child, on_parent_failure="run")
    await FlowProducer(backend).add_flow("work", [child, grandchild, stubborn])
    await run_jobs(queue)
    assert [await queue.get_job_state(each.job_id) for each in (child, grandchild, stubborn)] == [
        "failed",
        "failed",
        "completed",
    ]


# -- all or nothing


async def test_a_flow_of_1_000_jobs_is_one_write(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = watch_writes(backend, monkeypatch)
    root = job()
    await FlowProducer(backend).add_flow("work", [root, *(job("echo", root) for _ in range(999))])
    assert [len(batch) for batch in batches] == [1000]


async def test_a_refused_batch_of_a_larger_flow_is_planned_again(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A parent outside the flow has ended meanwhile: the batches before are there already."""
    real, sizes = backend.write, list[int]()

    async def write(log: str, *writes: Write) -> int:
        sizes.append(len(writes))
        if len(sizes) == 2:
            raise WriteRefused(log, "something else was written")
        return await real(log, *writes)

    monkeypatch.setattr(backend, "write", write)
    root = job()
    await FlowProducer(backend).add_flow("work", [root, *(job("echo", root) for _ in range(1500))])
    assert [size for size in sizes if size > 1] == [1000, 501, 501]
    await has(queue_of(backend), 1501, "waiting-children", "waiting")


async def test_a_flow_whose_confirmation_was_lost_is_no_error(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = backend.write

    async def write(log: str, *writes: Write) -> int:
        await real(log, *writes)
        raise WriteRefused(log, "the first sending was stored")

    root = job()
    with monkeypatch.context() as patch:
        patch.setattr(backend, "write", write)
        await FlowProducer(backend).add_flow("work", [root, job("echo", root)])
    await only(queue_of(backend), waiting=1, **{"waiting-children": 1})


async def test_of_a_larger_flow_nothing_runs_before_all_of_it_is_there(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = watch_writes(backend, monkeypatch, fail_at=2)
    root = job()
    with pytest.raises(Unconfirmed):
        await FlowProducer(backend).add_flow(
            "work", [root, *(job("echo", root) for _ in range(2500))]
        )
    assert len(batches) == 3
    await only(queue_of(backend), **{"waiting-children": 2000})


@pytest.mark.parametrize("stored", [False, True])
async def test_a_bulk_whose_confirmation_was_lost_is_no_error(
    backend: Backend, monkeypatch: pytest.MonkeyPatch, stored: bool
) -> None:
    """The server stored it and refuses the repetition.

    It never has a part: killed in the middle, it writes the rest when it is back.
    """
    real, sizes = backend.write, list[int]()

    async def write(log: str, *writes: Write) -> int:
        sizes.append(len(writes))
        if len(sizes) > 1:
            return await real(log, *writes)
        if stored:
            await real(log, *writes)
        raise WriteRefused(log, "duplicate message id")

    queue = queue_of(backend)
    await queue._assets.declare_all()
    with monkeypatch.context() as patch:
        patch.setattr(backend, "write", write)
        if not stored:
            with pytest.raises(WriteRefused):
                await queue.add_bulk([{"task_id": "echo"}] * 5)
            return
        ids = await queue.add_bulk([{"task_id": "echo"}] * 5)
    assert sizes == [5]
    await run_jobs(queue)
    assert sorted(job["id"] for job in await queue.get_completed()) == sorted(ids)


async def test_bulk_of_1_000_jobs_is_one_write(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue = queue_of(backend)
    parent = await queue.add("echo", delay=3600)
    batches = watch_writes(backend, monkeypatch)
    await queue.add_bulk([{"task_id": "echo"}] * 1000)
    await queue.add_bulk(
        [{"task_id": "echo", "delay": 60, "job_id": f"job-{number}"} for number in range(1000)]
    )
    await queue.add_bulk([{"task_id": "echo", "depends_on": [parent]} for _ in range(500)])
    assert [len(batch) for batch in batches] == [1000, 1000, 1000]


async def test_a_bulk_with_an_unsound_job_adds_nothing(backend: Backend) -> None:
    queue = queue_of(backend)
    with pytest.raises(NotSerializable):
        await queue.add_bulk(
            [{"task_id": "echo"}] * 1500 + [{"task_id": "echo", "args": [object()]}]
        )
    await has(queue, 0)


async def test_a_large_bulk_says_what_was_added(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue = queue_of(backend)
    await queue._assets.declare_all()
    watch_writes(backend, monkeypatch, fail_at=1)
    with pytest.raises(BulkAddFailed) as caught:
        await queue.add_bulk(
            [{"task_id": "echo", "job_id": f"job-{number}"} for number in range(2500)]
        )
    assert set(caught.value.added) | set(caught.value.errors) == set(range(2500))
    await has(queue, len(caught.value.added))


def watch_writes(
    backend: Backend, monkeypatch: pytest.MonkeyPatch, *, fail_at: int | None = None
) -> list[tuple[Write, ...]]:
    """Return a list that grows with each write of jobs.

    That of the number `fail_at` is not sent.
    """
    batches: list[tuple[Write, ...]] = []
    write = backend.write

    async def watched(log: str, *writes: Write) -> int:
        if "workers" in log:
            return await write(log, *writes)
        batches.append(writes)
        if fail_at == len(batches) - 1:
            raise Unconfirmed("the write", 0)
        return await write(log, *writes)

    monkeypatch.setattr(backend, "write", watched)
    monkeypatch.setattr(backend, "stage", lambda log: Unsent(partial(watched, log)))
    return batches


# -- races


async def test_two_producers_of_one_flow_make_one(backend: Backend, twin: Backend) -> None:
    async def add(handle: Backend) -> str:
        parent = job(job_id="parent", args=["x"])
        try:
            await FlowProducer(handle).add_flow(
                "work", [parent, job("read_parents", parent, job_id="child")]
            )
        except InvalidFlow:
            return "refused"
        return "added"

    actions = [lambda number=number: add((backend, twin)[number % 2]) for number in range(10)]
    assert sorted(await race(*actions)) == ["added"] + ["refused"] * 9
    queue = queue_of(backend)
    await run_jobs(queue)
    assert await queue.get_job_result("child") == {"parent": "x"}
    await has(queue, 2, "completed")


async def test_two_producers_of_500_ids_make_500_jobs(backend: Backend, twin: Backend) -> None:
    runs: list[int] = []

    async def note(number: int) -> None:
        runs.append(number)

    queues = [queue_of(handle, note=note) for handle in (backend, twin)]

    async def produce(queue: Queue, seed: int) -> None:
        order = list(range(500))
        random.Random(seed).shuffle(order)
        for number in order[:250]:
            assert await queue.add("note", [number], job_id=f"job-{number}") == f"job-{number}"
        rest = [
            {"task_id": "note", "args": [number], "job_id": f"job-{number}"}
            for number in order[250:]
        ]
        assert await queue.add_bulk(rest) == [entry["job_id"] for entry in rest]

    async with running(queues[0]):
        await race(lambda: produce(queues[0], 1), lambda: produce(queues[1], 2))
        await wait_until_done(queues[0])
    assert sorted(runs) == list(range(500))
    await only(queues[0], completed=500)


async def test_every_child_of_many_small_flows_runs_once(backend: Backend, twin: Backend) -> None:
    runs: list[str] = []

    async def note() -> int:
        runs.append(current_job().id)
        return len(await current_job().parent_results())

    queues = [queue_of(handle, note=note) for handle in (backend, twin)]
    flows = []
    for _ in range(100):
        parents = [job("note") for _ in range(4)]
        flows.append([*parents, job("note", *parents)])
    async with running(queues[0]), running(queues[1]):
        for flow in flows:
            await FlowProducer(backend).add_flow("work", flow)
        for flow in flows:
            assert await queues[0].wait_for(flow[-1].job_id, timeout=PATIENCE) == 4
    assert sorted(runs) == sorted(each.job_id for flow in flows for each in flow)


@pytest.mark.parametrize("seed", range(3))
async def test_a_random_graph_runs_in_order(backend: Backend, seed: int) -> None:
    chance = random.Random(seed)
    ended: set[str] = set()

    async def check(parents: list[str]) -> None:
        assert set(parents) <= ended
        ended.add(current_job().id)

    jobs: list[Job] = []
    for _ in range(100):
        parents = chance.sample(jobs, min(len(jobs), chance.randrange(4)))
        jobs.append(job("check", *parents, args=[[parent.job_id for parent in parents]]))
    queue = queue_of(backend, check=check)
    await FlowProducer(backend).add_flow("work", chance.sample(jobs, len(jobs)))
    await run_jobs(queue)
    assert ended == {each.job_id for each in jobs}


async def test_a_write_that_is_refused_for_ever_is_an_error(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuse(log: str, *writes: Write) -> int:
        raise WriteRefused(log, "always")

    producer = FlowProducer(backend)
    await producer.add_flow("work", [job()])
    monkeypatch.setattr(backend, "write", refuse)
    with pytest.raises(BackendError):
        await producer.add_flow("work", [job()])


async def test_an_outcome_without_its_arguments_still_tells_the_children(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("asyncmq_nats.jobs.OUTCOME_RESERVE", 500)

    async def refuse(value: str) -> None:
        raise ValueError("no " * 500)

    queue = queue_of(backend, refuse=refuse)
    root = job("refuse", args=["x" * (backend.max_body - 1_200)])
    child = job("echo", root, on_parent_failure="fail")
    await FlowProducer(backend).add_flow("work", [root, child])
    await run_jobs(queue)
    found = await queue.get_job(root.job_id)
    assert found is not None
    assert "xxx" not in str(found)
    assert await queue.get_job_state(child.job_id) == "failed"
