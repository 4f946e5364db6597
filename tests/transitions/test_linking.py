"""A job that depends on others is added, and their ends meet it at every step, on both backends."""

from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any

import anyio
import pytest

from asyncmq_nats.backends.base import Backend, Record, Write
from asyncmq_nats.context import current_job
from asyncmq_nats.exceptions import AsyncMQError, PayloadTooLarge, Unconfirmed
from asyncmq_nats.flow import FlowProducer
from asyncmq_nats.jobs import Job
from asyncmq_nats.queues import Queue
from asyncmq_nats.settings import Settings
from asyncmq_nats.transitions import parked, plan
from tests.receiver import until
from tests.running import (
    PATIENCE,
    counted,
    has,
    make_queue,
    only,
    outcome,
    run_jobs,
    running,
    wait_until_done,
)

BUCKET = "KV_amq_work_scheduler"
KEY = "$KV.amq_work_scheduler."
WIDE = 70
"""Parents of a child that has more than one record can keep."""


@pytest.fixture
def settings() -> Settings:
    return Settings(stalled_after=0.5, publish_timeout=10, shutdown_timeout=5)


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have promoters take up what a producer left after a moment."""
    monkeypatch.setattr(parked, "LINK_TIMEOUT", 0.6)
    monkeypatch.setattr(plan, "PLAN_TIMEOUT", 0.6)


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


async def live(backend: Backend, pattern: str) -> list[Record]:
    return [each for each in await backend.last(BUCKET, KEY + pattern) if not each.marker]


async def nothing_is_left(backend: Backend) -> None:
    """Wait until no record of a job that waits is left, nor of its parts, edges or plan."""
    for pattern in ("later.>", "wait.>", "done.*.awaited.*", "plan.*", "fire.*"):
        await until(partial(live, backend, pattern), lambda found: not found)


async def run_what_can(queue: Queue) -> None:
    """Run the jobs of the queue until only such are left that wait for others."""

    async def busy() -> int:
        return await queue.get_job_count_by_types("waiting", "active", "delayed")

    async with running(queue):
        for _ in range(2):  # a job that moves may be overlooked once
            await until(busy, lambda count: count == 0)
            await counted(queue)


async def know_secret(queue: Queue) -> None:
    """Make the secret of the queue, so that its write is not counted."""
    await queue._assets.declare()
    await queue._additions.dependencies.parked.secret.get()


async def add_parents(queue: Queue, count: int) -> list[str]:
    return await queue.add_bulk([{"task_id": "echo", "args": [n]} for n in range(count)])


Step = Callable[..., Awaitable[Any]]
STEPS = ["connect", "settle"]


def before(
    step: str, queue: Queue, monkeypatch: pytest.MonkeyPatch, act: Callable[[], Awaitable[Any]]
) -> None:
    """Do something between two messages of an add: before the edges, or after them."""
    holder: Any = {
        "connect": queue._additions.plans.links,
        "settle": queue._additions.dependencies.parked,
    }[step]
    real: Step = getattr(holder, step)

    async def late(*args: Any, **kwargs: Any) -> Any:
        monkeypatch.setattr(holder, step, real)
        await act()
        return await real(*args, **kwargs)

    monkeypatch.setattr(holder, step, late)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("count", [1, 3, WIDE])
async def test_parents_that_end_while_their_child_is_added_are_not_missed(
    step: str, count: int, backend: Backend, twin: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue, other = queue_of(backend), queue_of(twin)
    parents = await add_parents(queue, count)
    before(step, queue, monkeypatch, lambda: run_what_can(other))
    child = await queue.add("read_parents", depends_on=parents)
    async with running(other):
        result = await queue.wait_for(child, timeout=PATIENCE)
    assert result == {parent: number for number, parent in enumerate(parents)}
    await nothing_is_left(backend)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("count", [1, WIDE])
@pytest.mark.parametrize(
    ("policy", "state"), [("wait", "waiting-children"), ("fail", "failed"), ("run", "completed")]
)
async def test_a_parent_that_fails_while_its_child_is_added_means_what_the_child_says(
    step: str,
    count: int,
    policy: str,
    state: str,
    backend: Backend,
    twin: Backend,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    queue, other = queue_of(backend), queue_of(twin)
    parents = [await queue.add("fail"), *await add_parents(queue, count - 1)]
    before(step, queue, monkeypatch, lambda: run_what_can(other))
    child = await queue.add("read_parents", depends_on=parents, on_parent_failure=policy)
    await run_what_can(other)
    assert await queue.get_job_state(child) == state


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("count", [1, WIDE])
async def test_a_child_that_is_cancelled_while_it_is_added_does_not_run(
    step: str, count: int, backend: Backend, twin: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue, other = queue_of(backend), queue_of(twin)
    parents = await add_parents(queue, count)
    before(step, queue, monkeypatch, lambda: other.cancel_job("child"))
    assert await queue.add("read_parents", job_id="child", depends_on=parents) == "child"
    await run_jobs(other)
    assert await queue.get_job_state("child") == "cancelled"
    assert await live(backend, "later.>") == []


@pytest.mark.parametrize("count", [2, WIDE])
@pytest.mark.parametrize("way", ["add", "flow"])
async def test_parents_that_end_in_two_processes_release_their_child_once(
    way: str, count: int, backend: Backend, twin: Backend
) -> None:
    runs: list[int] = []

    async def note() -> None:
        runs.append(len(await current_job().parent_results()))

    queues = [queue_of(handle, note=note) for handle in (backend, twin)]
    if way == "add":
        child = await queues[0].add("note", depends_on=await add_parents(queues[0], count))
    else:
        jobs = [Job("echo") for _ in range(count)]
        jobs.append(Job("note", depends_on=[job.job_id for job in jobs]))
        child = (await FlowProducer(backend).add_flow("work", jobs))[-1]
    async with running(queues[0]), running(queues[1]):
        await queues[0].wait_for(child, timeout=PATIENCE)
    assert runs == [count]
    await nothing_is_left(backend)


async def test_a_child_of_many_waits_for_a_parent_that_is_retried_by_hand(
    backend: Backend,
) -> None:
    broken = True

    async def flaky() -> str:
        if broken:
            raise ValueError("not yet")
        return "repaired"

    queue = queue_of(backend, flaky=flaky)
    parents = [await queue.add("flaky"), *await add_parents(queue, WIDE)]
    child = await queue.add("read_parents", depends_on=parents)
    async with running(queue):
        assert (await outcome(queue, parents[0]))["status"] == "failed"
        await until(lambda: queue.get_job_count_by_types("completed"), lambda n: n == WIDE)
        assert await queue.get_job_state(child) == "waiting-children"
        broken = False
        assert await queue.retry_job(parents[0])
        result = await queue.wait_for(child, timeout=PATIENCE)
    assert (len(result), result[parents[0]]) == (WIDE + 1, "repaired")
    await nothing_is_left(backend)


@pytest.mark.parametrize("count", [2, WIDE])
async def test_a_cancelled_child_that_is_retried_by_hand_waits_for_its_parents_again(
    count: int, backend: Backend
) -> None:
    queue = queue_of(backend)
    parents = await add_parents(queue, count)
    child = await queue.add("read_parents", depends_on=parents)
    assert await queue.cancel_job(child)
    assert await queue.retry_job(child)
    assert await queue.get_job_state(child) == "waiting-children"
    async with running(queue):
        result = await queue.wait_for(child, timeout=PATIENCE)
    assert result == {parent: number for number, parent in enumerate(parents)}


@pytest.mark.parametrize("way", ["remove", "cancel", "clean", "clean_jobs", "obliterate"])
async def test_nothing_is_left_of_a_child_of_many_that_is_taken_away(
    way: str, backend: Backend
) -> None:
    queue = queue_of(backend)
    child = await queue.add("read_parents", depends_on=await add_parents(queue, WIDE))
    assert len(await live(backend, f"wait.{child}.>")) == 3
    await counted(queue)
    if way == "remove":
        assert await queue.remove_job(child)
    elif way == "cancel":
        assert await queue.cancel_job(child)
    elif way == "clean":
        await queue.clean("waiting-children")
    elif way == "clean_jobs":
        assert await queue.clean_jobs(0, 10, "waiting-children") == [child]
    else:
        await queue.obliterate(force=True)
    assert await live(backend, "wait.>") == []
    await run_jobs(queue)
    assert await queue.get_job_state(child) == ("cancelled" if way == "cancel" else None)


# -- sizes


async def test_a_job_may_depend_on_a_thousand(backend: Backend) -> None:
    queue = queue_of(backend)
    parents = await add_parents(queue, 1000)
    child = await queue.add("read_parents", depends_on=parents)
    (other,) = await queue.add_bulk([{"task_id": "read_parents", "depends_on": parents}])
    await has(queue, 2, "waiting-children")
    assert await queue.cancel_job(parents[0])
    assert await queue.get_job_state(child) == "waiting-children"
    assert {each["id"] for each in await queue.get_jobs("waiting-children")} == {child, other}


async def test_a_job_of_a_flow_may_depend_on_13_000(backend: Backend) -> None:
    queue = queue_of(backend)
    parents = [Job("echo") for _ in range(13_000)]
    child = Job("read_parents", depends_on=[parent.job_id for parent in parents])
    await FlowProducer(backend).add_flow("work", [*parents, child])
    assert await queue.get_job_state(child.job_id) == "waiting-children"
    open_parents = await queue._additions.dependencies.parked.waits.open_parents(
        child.job_id, (await _record(backend, child.job_id)).wide
    )
    assert open_parents == {parent.job_id for parent in parents}


async def _record(backend: Backend, job_id: str) -> Job:
    (record,) = await live(backend, f"later.{job_id}.parked")
    return Job.decode(record.body)


async def test_more_parents_than_a_message_holds_are_an_error_that_says_so(
    backend: Backend,
) -> None:
    queue = queue_of(backend)
    parent = await queue.add("echo")
    many = [parent, *(f"job-{number}" + "x" * 60 for number in range(16_000))]
    with pytest.raises(PayloadTooLarge, match="16,001 jobs"):
        await queue.add("echo", depends_on=many)
    await has(queue, 1)


# -- the producer dies


class Deaths:
    """Has a process die when it is about to write, or has just written, for the n-th time."""

    def __init__(self, backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
        self.writes = 0
        self._at: float = float("inf")
        self._stored = self._once = False
        real = backend.write

        async def write(log: str, *writes: Write) -> int:
            if "workers" in log:
                return await real(log, *writes)
            self.writes += 1
            if self.writes > self._at and not self._once:
                raise Unconfirmed("the write", 0)
            if self.writes != self._at:
                return await real(log, *writes)
            if self._stored:
                await real(log, *writes)
            raise Unconfirmed("the write", 0)

        monkeypatch.setattr(backend, "write", write)

    def die(self, at: int, *, stored: bool, once: bool = False) -> None:
        """Die with the write of that number, counted from now. `once`: it comes back at once."""
        self.writes, self._at, self._stored, self._once = 0, at, stored, once

    def revive(self) -> None:
        """Let all writes pass again."""
        self._at = float("inf")


@pytest.mark.parametrize("count", [2, WIDE])
@pytest.mark.parametrize("stored", [False, True])
async def test_of_an_add_whose_producer_dies_nothing_is_left_or_a_job_that_runs(
    count: int,
    stored: bool,
    backend: Backend,
    twin: Backend,
    monkeypatch: pytest.MonkeyPatch,
    soon: None,
) -> None:
    queue, other = queue_of(backend), queue_of(twin)
    await know_secret(queue)
    deaths = Deaths(backend, monkeypatch)
    children: dict[str, list[str]] = {}
    for at in (1, 2, 4, count + 5):
        parents = await add_parents(queue, count)
        children[f"child-{at}"] = parents
        deaths.die(at, stored=stored)
        try:
            await queue.add("read_parents", job_id=f"child-{at}", depends_on=parents)
        except AsyncMQError:
            assert deaths.writes >= at
        deaths.revive()
    states = {child: await queue.get_job_state(child) for child in children}
    assert set(states.values()) <= {None, "waiting-children"}
    assert (states["child-1"] is None) is not stored
    async with running(other):
        for child, parents in children.items():
            if states[child] is not None:
                result = await queue.wait_for(child, timeout=PATIENCE)
                assert result == {parent: number for number, parent in enumerate(parents)}
        await wait_until_done(queue)
    await nothing_is_left(backend)


async def test_a_job_whose_producer_died_waits_for_its_parents_while_no_worker_is_there(
    backend: Backend, monkeypatch: pytest.MonkeyPatch, soon: None
) -> None:
    queue = queue_of(backend)
    parent = await queue.add("echo", delay=3600)
    before("settle", queue, monkeypatch, _die)
    with pytest.raises(Unconfirmed):
        await queue.add("read_parents", job_id="child", depends_on=[parent])
    await until(lambda: live(backend, "later.child.released"), lambda found: len(found) == 1)
    assert await queue.get_job_state("child") == "waiting-children"
    await counted(queue)
    assert [job["id"] for job in await queue.get_jobs("waiting-children")] == ["child"]
    await only(queue, delayed=1, **{"waiting-children": 1})
    await queue.drain()
    await queue.clean("waiting")
    assert await queue.get_job_state("child") == "waiting-children"
    async with running(queue):
        await until(lambda: live(backend, "later.child.parked"), lambda found: len(found) == 1)
        await until(lambda: live(backend, "later.child.released"), lambda found: not found)
        assert await queue.get_job_state("child") == "waiting-children"


async def _die() -> None:
    raise Unconfirmed("the write", 0)


@pytest.fixture
def never(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have promoters take up nothing that a producer left."""
    monkeypatch.setattr(parked, "LINK_TIMEOUT", 3600.0)


Again = Callable[[Queue, dict[str, Any]], Awaitable[Any]]


async def add_again(queue: Queue, fields: dict[str, Any]) -> Any:
    return await queue.add("read_parents", **fields)


async def add_again_in_bulk(queue: Queue, fields: dict[str, Any]) -> Any:
    return await queue.add_bulk([{"task_id": "read_parents", **fields}, {"task_id": "echo"}])


async def child_runs_after(parents: Sequence[str], queue: Queue) -> None:
    """Run the jobs of a queue: its child gets the results of these parents."""
    async with running(queue):
        result = await queue.wait_for("child", timeout=PATIENCE)
        assert result == {parent: number for number, parent in enumerate(parents)}
        await wait_until_done(queue)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("ended", [False, True])
@pytest.mark.parametrize("count", [2, WIDE])
@pytest.mark.parametrize("again", [add_again, add_again_in_bulk])
@pytest.mark.parametrize("window", [{}, {"deduplication": {"id": "window", "ttl": 3600}}])
async def test_a_job_whose_producer_died_is_linked_by_the_next_that_adds_it(
    window: dict[str, Any],
    again: Again,
    count: int,
    ended: bool,
    step: str,
    backend: Backend,
    twin: Backend,
    monkeypatch: pytest.MonkeyPatch,
    never: None,
) -> None:
    queue, other = queue_of(backend), queue_of(twin)
    parents = await add_parents(queue, count)
    fields = {"job_id": "child", "depends_on": parents, **window}
    with monkeypatch.context() as patch:
        before(step, queue, patch, _die)
        with pytest.raises(Unconfirmed):
            await add_again(queue, fields)
    if ended:
        await run_what_can(other)
    await again(other, fields)
    await child_runs_after(parents, other)
    if not window:
        await nothing_is_left(backend)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("count", [2, WIDE])
async def test_two_producers_link_one_job_at_once(
    count: int,
    step: str,
    backend: Backend,
    twin: Backend,
    monkeypatch: pytest.MonkeyPatch,
    never: None,
) -> None:
    queue, other = queue_of(backend), queue_of(twin)
    parents = await add_parents(queue, count)
    fields = {"job_id": "child", "depends_on": parents}
    before(step, queue, monkeypatch, lambda: add_again(other, fields))
    await add_again(queue, fields)
    await child_runs_after(parents, other)
    await nothing_is_left(backend)


@pytest.mark.parametrize("again", [add_again, add_again_in_bulk])
@pytest.mark.parametrize("count", [2, WIDE, 120])
async def test_a_job_is_linked_whose_first_message_was_sent_twice(
    count: int, again: Again, backend: Backend, monkeypatch: pytest.MonkeyPatch, never: None
) -> None:
    queue = queue_of(backend)
    parents = await add_parents(queue, count)
    real = backend.write

    async def write_twice(log: str, *writes: Write) -> int:
        if any(write.timer is not None for write in writes):
            monkeypatch.setattr(backend, "write", real)
            await real(log, *writes)
        return await real(log, *writes)

    monkeypatch.setattr(backend, "write", write_twice)
    await again(queue, {"depends_on": parents})
    async with running(queue):
        await wait_until_done(queue)
    await only(queue, completed=count + 1 + (again is add_again_in_bulk))


async def test_an_import_that_died_is_gone_on_with(
    backend: Backend, monkeypatch: pytest.MonkeyPatch, never: None
) -> None:
    queue = queue_of(backend)
    parents = await add_parents(queue, 2)
    child = await queue.add("read_parents", depends_on=parents)
    lines = [line async for line in queue.export()]
    target = make_queue(backend, "target", echo=echo, read_parents=read_parents)
    with monkeypatch.context() as patch:
        before("connect", target, patch, _die)
        with pytest.raises(Unconfirmed):
            await target.import_jobs(lines)
    assert (await target.import_jobs(lines)).existing == 3
    async with running(target):
        assert await target.wait_for(child, timeout=PATIENCE) == dict(
            zip(parents, range(2), strict=True)
        )


async def test_a_job_that_fails_with_its_parent_is_told_when_it_is_added_again(
    backend: Backend, twin: Backend, monkeypatch: pytest.MonkeyPatch, never: None
) -> None:
    queue, other = queue_of(backend), queue_of(twin)
    parent = await queue.add("fail")
    fields = {"job_id": "child", "depends_on": [parent], "on_parent_failure": "fail"}
    with monkeypatch.context() as patch:
        before("connect", queue, patch, _die)
        with pytest.raises(Unconfirmed):
            await add_again(queue, fields)
    grandchild = await queue.add("echo", depends_on=["child"], on_parent_failure="fail")
    await run_what_can(other)
    await add_again(other, fields)
    assert [await queue.get_job_state(each) for each in ("child", grandchild)] == ["failed"] * 2
    assert not await live(backend, "later.>")


@pytest.mark.parametrize("stored", [False, True])
async def test_a_flow_whose_producer_dies_is_there_as_a_whole_or_not_at_all(
    stored: bool,
    backend: Backend,
    twin: Backend,
    monkeypatch: pytest.MonkeyPatch,
    soon: None,
) -> None:
    queue, other = queue_of(backend), queue_of(twin)
    outside = await queue.add("echo", ["outside"])
    await know_secret(queue)
    deaths = Deaths(backend, monkeypatch)
    flows = []
    for at in range(1, 12):
        roots = [Job("echo", args=[number]) for number in range(3)]
        child = Job("read_parents", depends_on=[*(root.job_id for root in roots), outside])
        last = Job("read_parents", depends_on=[child.job_id])
        deaths.die(at, stored=stored)
        try:
            await FlowProducer(backend).add_flow("work", [*roots, child, last])
        except Unconfirmed:
            assert deaths.writes >= at
        deaths.revive()
        flows.append((at == 1 and not stored, [*roots, child, last]))
    async with running(other):
        for nothing, jobs in flows:
            if not nothing:
                await until(
                    partial(queue.get_job_state, jobs[-1].job_id), lambda state: state is not None
                )
                result = await queue.wait_for(jobs[-1].job_id, timeout=PATIENCE)
                values = {root.job_id: number for number, root in enumerate(jobs[:3])}
                assert result == {jobs[-2].job_id: values | {outside: "outside"}}
        await wait_until_done(queue)
    nothing_of = [jobs for nothing, jobs in flows if nothing]
    for jobs in nothing_of:
        assert [await queue.get_job_state(job.job_id) for job in jobs] == [None] * 5
    await has(queue, 1 + 5 * (11 - len(nothing_of)), "completed")
    await nothing_is_left(backend)


# -- the worker dies


class TestFollowUps:
    @pytest.fixture
    def counted(self) -> list[str]:
        return []

    @pytest.mark.parametrize("stored", [False, True])
    @pytest.mark.parametrize("at", [1, 2, 3, 4])
    async def test_follow_ups_are_added_once_though_the_worker_is_lost_after_the_outcome(
        self,
        at: int,
        stored: bool,
        backend: Backend,
        monkeypatch: pytest.MonkeyPatch,
        counted: list[str],
    ) -> None:
        died: list[int] = []

        async def parent() -> str:
            job = current_job()
            first = job.add("note", ["first"])
            job.add("note", ["second"], depends_on=[first, job.id])
            job.add("note", ["third"], delay=0.6)
            if not died:
                died.append(at)
                deaths.die(at, stored=stored, once=True)
            return "parent"

        async def note(word: str) -> None:
            counted.append(word)

        queue = queue_of(backend, parent=parent, note=note)
        await know_secret(queue)
        job_id = await queue.add("parent")
        child = await queue.add("read_parents", depends_on=[job_id])
        deaths = Deaths(backend, monkeypatch)
        async with running(queue):
            assert await queue.wait_for(child, timeout=PATIENCE) == {job_id: "parent"}
            await until(lambda: _copy(counted), lambda words: len(words) >= 3)
            await wait_until_done(queue)
        assert sorted(counted) == ["first", "second", "third"]
        await only(queue, completed=5)

    async def test_a_success_that_is_refused_adds_no_follow_up(
        self, backend: Backend, twin: Backend, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async def parent() -> str:
            current_job().add("echo")
            return "parent"

        queue, other = queue_of(backend, parent=parent), queue_of(twin)
        real = queue.runner

        def runner(**options: Any) -> Any:
            made = real(**options)
            complete = made._lifecycle.complete_with_follow_ups

            async def late(*args: Any) -> None:
                assert await other.cancel_job(job_id)
                await complete(*args)

            monkeypatch.setattr(made._lifecycle, "complete_with_follow_ups", late)
            return made

        monkeypatch.setattr(queue, "runner", runner)
        job_id = await queue.add("parent")
        await run_jobs(queue)
        await only(queue, cancelled=1)


async def _copy(items: list[str]) -> list[str]:
    return list(items)


# -- what others wrote


@pytest.mark.parametrize(
    "members",
    [
        b'"parents":5',
        b'"parents":["parent",7]',
        b'"parents":{"parent":1}',
        b'"parents":["parent"],"parent_results":[1]',
        b'"parents":["parent"],"wide":"x"',
        b'"wide":"00000000.99999"',
        b'"parents":["parent"],"delay_until":"soon"',
        b'"parents":["parent"],"priority":"high"',
    ],
)
async def test_junk_in_a_child_does_not_hurt_its_parent(members: bytes, backend: Backend) -> None:
    queue = queue_of(backend)
    await queue.add("echo", job_id="parent")
    body = b'{"v":1,"id":"child","task":"echo","depends_on":["parent"],%b}' % members
    await backend.write(
        BUCKET,
        Write(KEY + "later.child.parked", body),
        Write(KEY + "done.parent.awaited.child", b"["),
    )
    sound = await queue.add("read_parents", depends_on=["parent"])
    async with running(queue):
        assert await queue.wait_for(sound, timeout=PATIENCE) == {"parent": None}
    assert await queue.get_job_state("parent") == "completed"


@pytest.mark.parametrize(
    "members",
    [
        b'"children":null',
        b'"children":["gone","child"],"wide_children":7',
        b'"children":["child"],"wide_children":{"child":"x.y.z"}',
        b'"children":["child",%b]' % (b'"' + b"x" * 5000 + b'"'),
        b'"children":[%b]' % b",".join(b'"%d"' % number for number in range(20_000)),
    ],
)
async def test_junk_in_a_parent_does_not_hurt_the_worker(members: bytes, backend: Backend) -> None:
    queue = queue_of(backend)
    await queue._assets.declare()
    body = b'{"v":1,"id":"parent","task":"echo","created_at":1,%b}' % members
    await backend.write("amq_work", Write("amq.work.ready.5.parent", body))
    async with running(queue):
        with anyio.fail_after(PATIENCE):
            job = await outcome(queue, "parent")
        assert job["status"] in ("completed", "failed")
        assert await queue.wait_for(await queue.add("echo", ["on"]), timeout=PATIENCE) == "on"


@pytest.mark.parametrize("count", [1, WIDE])
async def test_a_child_is_told_of_an_earlier_end_by_a_replica_that_lacks_it_still(
    backend: Backend, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    """It has the parent's end, and is asked just after the child was stored."""
    queue, stale, real = queue_of(backend), 0, backend.last
    parents = await add_parents(queue, count)

    async def last(log: str, *filters: str) -> list[Record]:
        nonlocal stale
        found = await real(log, *filters)
        if stale and any(".child" in filter for filter in filters):
            stale -= 1
            return [record for record in found if ".child" not in record.subject]
        return found

    async def end_parents() -> None:
        nonlocal stale
        await run_what_can(queue)
        stale = 3 * count

    monkeypatch.setattr(type(backend), "reads_may_lag", property(lambda _: True))
    monkeypatch.setattr(backend, "last", last)
    before("connect", queue, monkeypatch, end_parents)
    await queue.add("echo", ["told"], job_id="child", depends_on=parents)
    assert stale < 3 * count
    stale = 0
    [released] = await live(backend, "later.>")
    assert released.subject == KEY + "later.child.released"
    async with running(queue):
        assert await queue.wait_for("child", timeout=PATIENCE) == "told"
