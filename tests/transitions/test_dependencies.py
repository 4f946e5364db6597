"""Jobs that wait for others: `depends_on`, results of parents, parents that fail, follow-ups.

The tests run on both backends.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import anyio
import pytest

from asyncmq_nats.backends.base import Backend, Record
from asyncmq_nats.context import current_job
from asyncmq_nats.exceptions import InvalidArgument, JobFailed, JobNotFound
from asyncmq_nats.flow import FlowProducer
from asyncmq_nats.jobs import Job, new_job
from asyncmq_nats.queues import Queue
from asyncmq_nats.retries import Failure
from asyncmq_nats.runtime.registry import TaskRegistry
from asyncmq_nats.settings import Settings
from asyncmq_nats.states import State
from asyncmq_nats.tasks import task
from asyncmq_nats.transitions.bulk import add_many
from tests.receiver import Receiver, holds, until
from tests.running import PATIENCE, counted, has, make_queue, only, outcome, race, run_jobs, running

POLICIES = [("wait", "waiting-children"), ("fail", "failed"), ("run", "completed")]


async def echo(value: Any = None) -> Any:
    return value


async def fail() -> None:
    raise ValueError("no")


async def read_parents() -> dict[str, Any]:
    return await current_job().parent_results()


def queue_of(backend: Backend, **tasks: Any) -> Queue:
    return make_queue(backend, echo=echo, fail=fail, read_parents=read_parents, **tasks)


async def run_and_look(queue: Queue, *job_ids: str) -> list[str | None]:
    """Run what can be run and return the states of the jobs."""
    async with running(queue):
        await nothing_moves(queue)
    return [await queue.get_job_state(job_id) for job_id in job_ids]


async def nothing_moves(queue: Queue) -> None:
    """Wait until no job can be run any more: only jobs that wait for others are left."""

    async def busy() -> int:
        return await queue.get_job_count_by_types("waiting", "active", "delayed")

    for _ in range(2):  # a job that moves may be overlooked once
        await until(busy, lambda count: count == 0)
        await counted(queue)


# -- waiting


async def test_a_child_waits_for_its_parents_and_sees_their_results(backend: Backend) -> None:
    queue = queue_of(backend)
    first, second = await queue.add_bulk(
        [{"task_id": "echo", "args": [number]} for number in (1, 2)]
    )
    child = await queue.add("read_parents", depends_on=[first, second])
    assert await queue.get_job_state(child) == "waiting-children"
    await has(queue, 3)
    async with running(queue):
        assert await queue.wait_for(child, timeout=PATIENCE) == {first: 1, second: 2}
    job = await queue.get_job(child)
    assert job is not None
    assert job["depends_on"] == [first, second]


async def test_a_child_runs_only_when_the_last_parent_is_done(backend: Backend) -> None:
    opened = anyio.Event()
    queue = queue_of(backend, hold=opened.wait)
    quick, slow = await queue.add("echo"), await queue.add("hold")
    child = await queue.add("read_parents", depends_on=[quick, slow])
    async with running(queue):
        await queue.wait_for(quick, timeout=PATIENCE)
        assert await queue.get_job_state(child) == "waiting-children"
        opened.set()
        assert list(await queue.wait_for(child, timeout=PATIENCE)) == [quick, slow]


async def test_bulk_entries_may_depend_on_jobs(backend: Backend) -> None:
    queue = queue_of(backend)
    parent = await queue.add("echo", ["parent"])
    children = await queue.add_bulk(
        [{"task_id": "read_parents", "depends_on": [parent]} for _ in range(100)]
        + [{"task_id": "echo"}]
    )
    await has(queue, 100, "waiting-children")
    await run_jobs(queue)
    assert [await queue.get_job_result(child) for child in children] == [
        {parent: "parent"}
    ] * 100 + [None]


async def test_tasks_are_enqueued_with_dependencies(backend: Backend) -> None:
    registry = TaskRegistry()
    first = task("work", name="first", registry=registry)(echo)
    then = task("work", name="then", registry=registry)(read_parents)
    parent = await first.enqueue("result", backend=backend)
    child = await then.enqueue(backend=backend, depends_on=[parent])
    async with running(Queue("work", backend, registry=registry)):
        assert await Queue("work", backend).wait_for(child, timeout=PATIENCE) == {parent: "result"}


async def test_one_id_instead_of_a_list_and_an_id_twice_mean_one_parent(backend: Backend) -> None:
    queue = queue_of(backend)
    parent = await queue.add("echo", ["x"])
    named = await queue.add("read_parents", depends_on=parent)
    twice = await queue.add("read_parents", depends_on=[parent, parent])
    await run_jobs(queue)
    assert await queue.get_job_result(named) == await queue.get_job_result(twice) == {parent: "x"}


@pytest.mark.parametrize("unknown", [["nobody"], ["known", "nobody"]])
async def test_an_unknown_parent_is_an_error_and_adds_nothing(
    backend: Backend, unknown: list[str]
) -> None:
    queue = queue_of(backend)
    await queue.add("echo", job_id="known")
    with pytest.raises(JobNotFound, match="nobody"):
        await queue.add("echo", depends_on=unknown)
    with pytest.raises(JobNotFound, match="nobody"):
        await queue.add_bulk([{"task_id": "echo"}, {"task_id": "echo", "depends_on": unknown}])
    await has(queue, 1)


async def test_a_parent_of_another_queue_is_unknown(backend: Backend) -> None:
    parent = await make_queue(backend, "other").add("echo")
    with pytest.raises(JobNotFound, match="work"):
        await queue_of(backend).add("echo", depends_on=[parent])


async def test_a_job_cannot_wait_for_itself(backend: Backend) -> None:
    with pytest.raises(JobNotFound):
        await queue_of(backend).add("echo", job_id="mine", depends_on=["mine"])


async def test_an_unknown_policy_is_an_error(backend: Backend) -> None:
    queue = queue_of(backend)
    with pytest.raises(InvalidArgument, match="on_parent_failure"):
        await queue.add("echo", depends_on=[await queue.add("echo")], on_parent_failure="ignore")


async def test_a_delayed_child_waits_for_both(backend: Backend) -> None:
    queue = queue_of(backend)
    parent = await queue.add("echo")
    before = backend.now()
    soon, later = [
        await queue.add("echo", depends_on=[parent], delay=delay) for delay in (0.5, 3600)
    ]
    async with running(queue):
        await queue.wait_for(soon, timeout=PATIENCE)
        assert backend.now() - before > 0.45
        assert await queue.get_job_state(later) == "delayed"


async def test_a_child_with_an_id_of_its_own_is_added_once(backend: Backend, twin: Backend) -> None:
    queues = [queue_of(handle) for handle in (backend, twin)]
    parent = await queues[0].add("echo", ["x"])
    adds = [
        lambda number=number: queues[number % 2].add(
            "read_parents", depends_on=[parent], job_id="child"
        )
        for number in range(20)
    ]
    assert set(await race(*adds)) == {"child"}
    await has(queues[0], 1, "waiting-children")
    await run_jobs(queues[0])
    assert await queues[0].get_job_result("child") == {parent: "x"}
    await has(queues[0], 2, "completed")


async def test_large_results_of_parents_are_read_when_they_are_wanted(backend: Backend) -> None:
    queue = queue_of(backend)
    large = "x" * 400_000
    parents = await queue.add_bulk([{"task_id": "echo", "args": [large]}] * 4)
    child = await queue.add("measure", depends_on=parents)

    async def measure() -> dict[str, int]:
        return {
            parent: len(result) for parent, result in (await current_job().parent_results()).items()
        }

    queue = queue_of(backend, measure=measure)
    async with running(queue):
        assert await queue.wait_for(child, timeout=PATIENCE) == dict.fromkeys(parents, 400_000)


# -- parents that have ended already


async def test_a_child_of_a_completed_parent_runs_at_once(backend: Backend) -> None:
    queue = queue_of(backend)
    parent = await queue.add("echo", ["early"])
    async with running(queue):
        await queue.wait_for(parent, timeout=PATIENCE)
        child = await queue.add("read_parents", depends_on=[parent])
        assert await queue.wait_for(child, timeout=PATIENCE) == {parent: "early"}


async def test_a_child_of_an_ordinary_parent_runs(backend: Backend) -> None:
    queue = queue_of(backend)
    parent = await queue.add("echo")
    child = await queue.add("echo", ["ran"], depends_on=[parent])
    await run_jobs(queue)
    assert await queue.get_job_result(child) == "ran"


@pytest.mark.parametrize(("policy", "state"), POLICIES)
async def test_a_parent_that_has_failed_before_is_treated_like_one_that_fails(
    backend: Backend, policy: str, state: str
) -> None:
    queue = queue_of(backend)
    parent = await queue.add("fail")
    await run_jobs(queue)
    child = await queue.add("read_parents", depends_on=[parent], on_parent_failure=policy)
    assert await run_and_look(queue, child) == [state]


# -- parents that do not complete


@pytest.mark.parametrize(("policy", "state"), POLICIES)
@pytest.mark.parametrize("end", ["failed", "expired", "cancelled"])
async def test_the_child_says_what_a_parent_that_does_not_complete_means(
    backend: Backend, policy: str, state: str, end: str
) -> None:
    queue = queue_of(backend)
    parent = await queue.add("fail", ttl=0.000001 if end == "expired" else None)
    child = await queue.add("read_parents", depends_on=[parent], on_parent_failure=policy)
    if end == "cancelled":
        assert await queue.cancel_job(parent)
    assert await run_and_look(queue, parent, child) == [end, state]
    job = await queue.get_job(child)
    assert job is not None
    if policy == "fail":
        assert parent in job["last_error"]
    if policy == "run":
        assert job["result"] == {}


async def test_failure_cascades_as_far_as_the_children_want_it(backend: Backend) -> None:
    queue = queue_of(backend)
    root = await queue.add("fail")
    policies = ["fail", "fail", "fail", "run", "fail"]
    chain = [root]
    for policy in policies:
        chain.append(await queue.add("echo", depends_on=[chain[-1]], on_parent_failure=policy))
    aside = await queue.add("echo", depends_on=[chain[2]])
    states = await run_and_look(queue, *chain, aside)
    assert states == [
        "failed",
        "failed",
        "failed",
        "failed",
        "completed",
        "completed",
        "waiting-children",
    ]


async def test_a_child_that_runs_all_the_same_waits_for_its_other_parents(backend: Backend) -> None:
    opened = anyio.Event()

    async def hold() -> str:
        await opened.wait()
        return "held"

    queue = queue_of(backend, hold=hold)
    failing, slow = await queue.add("fail"), await queue.add("hold")
    child = await queue.add("read_parents", depends_on=[failing, slow], on_parent_failure="run")
    async with running(queue):
        await outcome(queue, failing)
        assert await queue.get_job_state(child) == "waiting-children"
        opened.set()
        assert await queue.wait_for(child, timeout=PATIENCE) == {slow: "held"}


async def test_retrying_a_failed_parent_by_hand_releases_the_children_that_wait(
    backend: Backend,
) -> None:
    broken = True

    async def flaky() -> str:
        if broken:
            raise ValueError("not yet")
        return "repaired"

    queue = queue_of(backend, flaky=flaky)
    parent = await queue.add("flaky")
    children = [await queue.add("read_parents", depends_on=[parent]) for _ in range(3)]
    async with running(queue):
        assert (await outcome(queue, parent))["status"] == "failed"
        children.append(await queue.add("read_parents", depends_on=[parent]))
        broken = False
        assert await queue.retry_job(parent)
        for child in children:
            assert await queue.wait_for(child, timeout=PATIENCE) == {parent: "repaired"}


async def test_a_child_waits_while_its_parent_is_retried(backend: Backend) -> None:
    runs: list[str] = []

    async def flaky() -> str:
        runs.append("parent")
        if len(runs) < 3:
            raise ValueError("not yet")
        return "third time"

    queue = queue_of(backend, flaky=flaky)
    parent = await queue.add("flaky", retries=2, backoff=0.01)
    child = await queue.add("read_parents", depends_on=[parent])
    async with running(queue):
        assert await queue.wait_for(child, timeout=PATIENCE) == {parent: "third time"}


@pytest.mark.parametrize("place", ["delayed", "waiting-children"])
async def test_a_waiter_learns_of_a_cancelled_job_though_the_canceller_died(
    backend: Backend, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue = queue_of(backend)
    root = await queue.add("echo", delay=3600)
    parent = root if place == "delayed" else await queue.add("echo", depends_on=[root])
    child = await queue.add("echo", ["ran"], depends_on=[parent], on_parent_failure="run")

    async def die(token: str) -> None:
        raise ConnectionError(token)

    with monkeypatch.context() as patch:
        patch.setattr(queue._administration._dependencies, "release", die)
        with pytest.raises(ConnectionError):
            await queue.cancel_job(parent)
    async with running(queue):
        assert await queue.wait_for(child, timeout=PATIENCE) == "ran"
        await until(queue.queue_stats, lambda stats: stats["waiting"] == 0)
    assert await queue.get_job_state(parent) == "cancelled"
    await only(queue, completed=1, cancelled=1, delayed=int(place != "delayed"))


async def test_a_cancelled_child_does_not_run_and_does_not_hinder_the_others(
    backend: Backend,
) -> None:
    queue = queue_of(backend)
    parent = await queue.add("echo")
    first, second, third = [await queue.add("echo", depends_on=[parent]) for _ in range(3)]
    assert await queue.cancel_job(first)
    assert await queue.remove_job(second)
    assert await run_and_look(queue, parent, first, second, third) == [
        "completed",
        "cancelled",
        None,
        "completed",
    ]


async def test_a_parent_that_was_removed_can_be_added_again(backend: Backend) -> None:
    queue = queue_of(backend)
    await queue.add("echo", job_id="parent")
    child = await queue.add("read_parents", depends_on=["parent"])
    assert await queue.remove_job("parent")
    assert await queue.get_job_state("parent") is None
    await queue.add("echo", ["again"], job_id="parent")
    async with running(queue):
        assert await queue.wait_for(child, timeout=PATIENCE) == {"parent": "again"}


async def test_nothing_is_left_of_a_dependency_that_is_over(backend: Backend) -> None:
    queue = queue_of(backend)
    parent = await queue.add("echo")
    for _ in range(3):
        await queue.add("echo", depends_on=[parent])
    await run_jobs(queue)
    await until(
        lambda: backend.last("KV_amq_work_scheduler", "$KV.amq_work_scheduler.*.*.awaited.*"),
        lambda edges: not edges,
    )


# -- races


async def test_a_child_that_is_added_while_its_parent_completes_runs(
    backend: Backend, twin: Backend
) -> None:
    queue, producer = queue_of(backend), queue_of(twin)
    queue.concurrency = 10
    children: list[str] = []
    async with running(queue):
        for _ in range(40):
            parents = await producer.add_bulk(
                [{"task_id": "echo", "args": [number]} for number in range(5)]
            )
            adds = [
                partial(producer.add, "read_parents", depends_on=waits_for)
                for waits_for in (*([each] for each in parents), parents)
            ]
            children += await race(*adds)
        for child in children:
            assert await queue.wait_for(child, timeout=PATIENCE)
    await has(queue, 40 * 5 + len(children), "completed")


async def test_parents_that_end_at_the_same_time_release_their_child_once(
    backend: Backend, twin: Backend
) -> None:
    runs: list[str] = []

    async def count() -> int:
        runs.append(current_job().id)
        return len(await current_job().parent_results())

    queues = [queue_of(handle, count=count) for handle in (backend, twin)]
    children = []
    for _ in range(10):
        parents = await queues[0].add_bulk([{"task_id": "echo"}] * 10)
        children.append(await queues[0].add("count", depends_on=parents))
    async with running(queues[0]), running(queues[1]):
        for child in children:
            assert await queues[0].wait_for(child, timeout=PATIENCE) == 10
    assert sorted(runs) == sorted(children)


@pytest.mark.slow
async def test_many_children_of_one_job_are_released(backend: Backend) -> None:
    queue = queue_of(backend)
    queue.concurrency = 100
    parent = await queue.add("echo")
    for _ in range(2):
        await queue.add_bulk([{"task_id": "echo", "depends_on": [parent]}] * 450)
    await run_jobs(queue)
    await only(queue, completed=901)


# -- losses


class TestLosses:
    @pytest.fixture
    def settings(self) -> Settings:
        return Settings(stalled_after=0.5, publish_timeout=10)

    async def test_a_failure_cascades_although_the_worker_was_lost_half_way(
        self, backend: Backend
    ) -> None:
        """Parent and child have outcomes, the grandchild does not know: a redelivery tells it."""
        queue = queue_of(backend)
        parent = await queue.add("fail")
        child = await queue.add("echo", depends_on=[parent], on_parent_failure="fail")
        grandchild = await queue.add("echo", depends_on=[child], on_parent_failure="fail")
        receiver = Receiver(backend, "amq_work", extend=False)
        await receiver.pull("tier_5")
        runner = queue.runner()
        lifecycle = runner._lifecycle
        release_one, told = lifecycle.dependencies._release_one, []

        async def only_once(token: str, known: Sequence[Record] = ()) -> list[str]:
            told.append(await release_one(token, known))
            return []

        lifecycle.dependencies._release_one = only_once  # type: ignore[method-assign]
        attempt = lifecycle.open(receiver.deliveries[0])
        ended: list[Any] = []

        lifecycle.on_settled = lambda _, write, result: ended.append((write, result))
        await lifecycle.fail(attempt, Failure("no", "", backend.now()))
        await holds(lambda: bool(ended))  # the answer comes by a plain callback
        await lifecycle.settled(attempt, *ended[0])
        assert told == [[child]]
        assert await queue.get_job_state(child) == "failed"
        assert await queue.get_job_state(grandchild) == "waiting-children"
        async with running(queue):
            assert (await outcome(queue, grandchild))["status"] == "failed"


# -- follow-ups


async def test_follow_ups_are_added_with_the_outcome(backend: Backend) -> None:
    added: list[str] = []

    async def parent() -> str:
        added.append(current_job().add("echo", ["follow"], priority=7))
        added.append(current_job().add("echo", ["later"], delay=3600))
        return "done"

    queue = queue_of(backend, parent=parent)
    job_id = await queue.add("parent")
    async with running(queue):
        assert await queue.wait_for(job_id, timeout=PATIENCE) == "done"
        assert await queue.wait_for(added[0], timeout=PATIENCE) == "follow"
        assert await queue.get_job_state(added[1]) == "delayed"


async def test_a_follow_up_does_not_exist_before_the_outcome_does(backend: Backend) -> None:
    opened, added = anyio.Event(), anyio.Event()
    ids: list[str] = []

    async def parent() -> None:
        ids.append(current_job().add("echo"))
        added.set()
        await opened.wait()

    queue = queue_of(backend, parent=parent)
    job_id = await queue.add("parent")
    async with running(queue):
        with anyio.fail_after(PATIENCE):
            await added.wait()
        assert await queue.get_job_state(ids[0]) is None
        opened.set()
        await queue.wait_for(job_id, timeout=PATIENCE)
        assert await queue.get_job_state(ids[0]) is not None


@pytest.mark.parametrize("retries", [0, 2])
async def test_a_failing_attempt_adds_no_follow_up(backend: Backend, retries: int) -> None:
    runs: list[str] = []

    async def parent() -> None:
        runs.append(current_job().add("echo", [len(runs)]))
        if retries == 0 or len(runs) <= retries:
            raise ValueError("no")

    queue = queue_of(backend, parent=parent)
    await queue.add("parent", retries=retries)
    await run_jobs(queue)
    states = [await queue.get_job_state(job_id) for job_id in runs]
    assert states == ([None] if retries == 0 else [None, None, "completed"])
    await has(queue, (1 if retries == 0 else 2), *State)


async def test_a_cancelled_job_adds_no_follow_up(backend: Backend) -> None:
    added = anyio.Event()

    async def parent() -> None:
        current_job().add("echo")
        added.set()
        await anyio.sleep_forever()

    queue = queue_of(backend, parent=parent)
    job_id = await queue.add("parent")
    async with running(queue):
        with anyio.fail_after(PATIENCE):
            await added.wait()
        assert await queue.cancel_job(job_id)
        await nothing_moves(queue)
    await has(queue, 1, *State)


async def test_a_follow_up_may_depend_on_other_jobs(backend: Backend) -> None:
    added: list[str] = []

    async def parent(other: str) -> None:
        added.append(current_job().add("read_parents", depends_on=[other]))

    queue = queue_of(backend, parent=parent)
    other = await queue.add("echo", ["x"], delay=0.2)
    await queue.add("parent", [other])
    await run_jobs(queue)
    async with running(queue):
        assert await queue.wait_for(added[0], timeout=PATIENCE) == {other: "x"}


async def test_follow_ups_may_depend_on_each_other_and_on_the_job_that_adds_them(
    backend: Backend,
) -> None:
    added: list[str] = []

    async def parent() -> str:
        job = current_job()
        added.append(job.add("echo", ["first"], depends_on=[job.id]))
        added.append(job.add("read_parents", depends_on=[added[0], job.id]))
        return "parent"

    queue = queue_of(backend, parent=parent)
    job_id = await queue.add("parent")
    async with running(queue):
        await queue.wait_for(job_id, timeout=PATIENCE)
        assert await queue.wait_for(added[1], timeout=PATIENCE) == {
            added[0]: "first",
            job_id: "parent",
        }


async def test_a_follow_up_of_an_unknown_job_fails_the_job(backend: Backend) -> None:
    runs: list[str] = []

    async def parent() -> None:
        runs.append(current_job().add("echo", depends_on=["nobody"]))

    queue = queue_of(backend, parent=parent)
    job_id = await queue.add("parent")
    async with running(queue):
        with pytest.raises(JobFailed, match="nobody"):
            await queue.wait_for(job_id, timeout=PATIENCE)
    assert len(runs) == 1


async def test_a_job_with_children_may_have_follow_ups(backend: Backend) -> None:
    added: list[str] = []

    async def parent() -> str:
        added.extend(current_job().add("echo", [number]) for number in range(3))
        return "parent"

    queue = queue_of(backend, parent=parent)
    job_id = await queue.add("parent")
    child = await queue.add("read_parents", depends_on=[job_id])
    async with running(queue):
        assert await queue.wait_for(child, timeout=PATIENCE) == {job_id: "parent"}
        assert [await queue.wait_for(follow_up, timeout=PATIENCE) for follow_up in added] == [
            0,
            1,
            2,
        ]


async def test_hundreds_of_follow_ups_are_committed_at_once(backend: Backend) -> None:
    async def parent() -> None:
        for _ in range(900):
            current_job().add("echo", delay=3600)

    queue = queue_of(backend, parent=parent)
    job_id = await queue.add("parent")
    async with running(queue):
        await queue.wait_for(job_id, timeout=PATIENCE)
    await has(queue, 900, "delayed")


async def test_one_follow_up_too_many_fails_the_job(backend: Backend) -> None:
    async def parent() -> None:
        for _ in range(901):
            current_job().add("echo")

    queue = queue_of(backend, parent=parent)
    job_id = await queue.add("parent")
    async with running(queue):
        with pytest.raises(JobFailed, match="900"):
            await queue.wait_for(job_id, timeout=PATIENCE)
    await has(queue, 1, *State)


# -- repeat_every


async def test_a_job_repeats_after_each_success(backend: Backend) -> None:
    runs: list[str] = []
    enough = anyio.Event()

    async def beat() -> None:
        runs.append(current_job().id)
        if len(runs) == 3:
            enough.set()

    queue = queue_of(backend, beat=beat)
    job_id = await queue.add("beat", repeat_every=0.05)
    async with running(queue):
        with anyio.fail_after(PATIENCE):
            await enough.wait()
    assert runs[0] == job_id
    assert len(set(runs)) == len(runs) >= 3
    await until(
        lambda: queue.get_job_count_by_types("waiting", "delayed", "active"),
        lambda count: count == 1,
    )


async def test_a_job_that_fails_repeats_no_more(backend: Backend) -> None:
    queue = queue_of(backend)
    await queue.add("fail", repeat_every=0.05)
    await run_jobs(queue)
    await only(queue, failed=1)


@pytest.mark.parametrize("interval", [0, 0.01, -1, "soon", float("nan")])
async def test_an_interval_that_cannot_be_kept_is_an_error(backend: Backend, interval: Any) -> None:
    with pytest.raises(ValueError, match="every"):
        await queue_of(backend).add("echo", repeat_every=interval)
    with pytest.raises(ValueError, match="every"):
        await queue_of(backend).add_bulk(
            [{"task_id": "echo"}, {"task_id": "echo", "repeat_every": interval}]
        )
    with pytest.raises(ValueError, match="every"):
        await FlowProducer(backend).add_flow("work", [Job("echo", repeat_every=interval)])
    with pytest.raises(ValueError, match="every"):
        await queue_of(backend).enqueue({"task_id": "echo", "repeat_every": interval})
    await has(queue_of(backend), 0)


@pytest.mark.parametrize("interval", [0, "soon"])
async def test_an_interval_of_a_foreign_job_that_cannot_be_kept_fails_it_and_harms_no_worker(
    backend: Backend, interval: Any
) -> None:
    queue = queue_of(backend)
    job = new_job(task_id="echo", repeat_every=interval)
    await queue._assets.declare()
    (job_id,) = await add_many(queue._additions, [job])
    async with running(queue):
        with pytest.raises(JobFailed, match="repeat_every"):
            await queue.wait_for(job_id, timeout=PATIENCE)
        assert await queue.wait_for(await queue.add("echo", ["on"]), timeout=PATIENCE) == "on"


async def test_a_task_is_enqueued_to_repeat(backend: Backend) -> None:
    runs: list[int] = []
    registry = TaskRegistry()

    @task("work", name="beat", registry=registry)
    async def beat(number: int) -> None:
        runs.append(number)

    await beat.enqueue(7, backend=backend, repeat_every=0.05)
    async with running(Queue("work", backend, registry=registry)):
        await until(lambda: _copy(runs), lambda seen: len(seen) >= 2)
    assert set(runs) == {7}


async def _copy(items: list[int]) -> list[int]:
    return list(items)
