"""`deduplication`: windows in which a second job with the same key is not added.

The tests run on both backends.
"""

from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import pytest

from asyncmq_nats.backends.base import Backend, Record, Write
from asyncmq_nats.exceptions import ConnectionLost, JobNotFound, WriteRefused
from asyncmq_nats.queues import Queue
from tests.receiver import until
from tests.running import (
    PATIENCE,
    counted,
    has,
    make_queue,
    only,
    outcome,
    race,
    run_jobs,
    running,
    wait_until_done,
)

KEY = {"id": "key"}


async def echo(value: Any = None) -> Any:
    return value


async def fail() -> None:
    raise ValueError("no")


def queue_of(backend: Backend, **tasks: Any) -> Queue:
    return make_queue(backend, echo=echo, fail=fail, **tasks)


# -- what is no window


@pytest.mark.parametrize("window", ["key", 5, ["id"], [("id", "key")]])
async def test_a_window_is_a_mapping(backend: Backend, window: Any) -> None:
    with pytest.raises(TypeError, match="mapping"):
        await queue_of(backend).add("echo", deduplication=window)


@pytest.mark.parametrize(
    "window", [{}, {"id": ""}, {"id": "  "}, {"id": None}, {"id": 5}, {"ttl": 5}]
)
async def test_a_window_has_an_id(backend: Backend, window: Any) -> None:
    with pytest.raises(ValueError, match="needs an 'id'"):
        await queue_of(backend).add("echo", deduplication=window)


@pytest.mark.parametrize("ttl", ["5", [], True])
async def test_a_ttl_is_a_number(backend: Backend, ttl: Any) -> None:
    with pytest.raises(TypeError, match="ttl"):
        await queue_of(backend).add("echo", deduplication=KEY | {"ttl": ttl})


@pytest.mark.parametrize("ttl", [0, -1, float("nan"), float("inf"), 1e300])
async def test_a_ttl_is_above_0(backend: Backend, ttl: float) -> None:
    queue = queue_of(backend)
    with pytest.raises(ValueError, match="ttl"):
        await queue.add("echo", deduplication=KEY | {"ttl": ttl})
    await has(queue, 0)


async def test_unknown_keys_are_an_error(backend: Backend) -> None:
    with pytest.raises(ValueError, match="until"):
        await queue_of(backend).add("echo", deduplication=KEY | {"until": 5})


# -- simple: until the owner has ended


@pytest.mark.parametrize("name", ["deduplication", "debounce"])
async def test_while_the_owner_has_not_ended_no_other_job_is_added(
    backend: Backend, name: str
) -> None:
    queue = queue_of(backend)
    window: dict[str, Any] = {name: KEY}
    owner = await queue.add("echo", [1], **window)
    assert await queue.add("echo", [2], **window) == owner
    assert await queue.add("echo", [3], **{**window, name: {"id": "another"}}) != owner
    assert (
        await queue.get_deduplication_job_id("key")
        == await queue.get_debounce_job_id("key")
        == owner
    )
    await has(queue, 2)
    await run_jobs(queue)
    assert await queue.get_job_result(owner) == 1


@pytest.mark.parametrize("end", ["completed", "failed", "cancelled", "removed"])
async def test_the_window_is_over_when_the_owner_has_ended(backend: Backend, end: str) -> None:
    queue = queue_of(backend)
    owner = await queue.add("fail" if end == "failed" else "echo", deduplication=KEY)
    if end == "cancelled":
        await queue.cancel_job(owner)
    elif end == "removed":
        assert await queue.remove_job(owner)
    else:
        async with running(queue):
            await outcome(queue, owner)
    assert await queue.get_deduplication_job_id("key") is None
    second = await queue.add("echo", deduplication=KEY)
    assert second != owner
    assert await queue.get_deduplication_job_id("key") == second


async def test_the_window_lasts_while_the_owner_runs_and_is_retried(backend: Backend) -> None:
    started, opened = anyio.Event(), anyio.Event()
    runs: list[int] = []

    async def flaky() -> None:
        runs.append(1)
        if len(runs) == 1:
            started.set()
            await opened.wait()
            raise ValueError("not yet")

    queue = queue_of(backend, flaky=flaky)
    owner = await queue.add("flaky", retries=1, backoff=3600, deduplication=KEY)
    async with running(queue):
        with anyio.fail_after(PATIENCE):
            await started.wait()
        assert await queue.add("echo", deduplication=KEY) == owner
        opened.set()
        await until(lambda: queue.get_job_state(owner), lambda state: state == "delayed")
        assert await queue.add("echo", deduplication=KEY) == owner
        assert await queue.promote(owner)
        await queue.wait_for(owner, timeout=PATIENCE)
    assert await queue.add("echo", deduplication=KEY) != owner


# -- throttle: for a time


async def test_a_ttl_outlasts_its_owner_and_ends(backend: Backend) -> None:
    queue = queue_of(backend)
    async with running(queue):  # its start may take longer than the window
        before = backend.now()
        owner = await queue.add("echo", deduplication=KEY | {"ttl": 1.0})
        await queue.wait_for(owner, timeout=PATIENCE)
        assert await queue.add("echo", deduplication=KEY | {"ttl": 1.0}) == owner
    await until(lambda: queue.get_deduplication_job_id("key"), lambda found: found is None)
    assert backend.now() - before > 0.9
    second = await queue.add("echo", deduplication=KEY | {"ttl": 1.0})
    assert second != owner


async def test_a_ttl_ends_before_its_owner(backend: Backend) -> None:
    queue = queue_of(backend)
    owner = await queue.add("echo", delay=3600, deduplication=KEY | {"ttl": 0.3})
    await until(lambda: queue.get_deduplication_job_id("key"), lambda found: found is None)
    assert await queue.add("echo", deduplication=KEY) != owner
    assert await queue.get_job_state(owner) == "delayed"


async def test_extend_begins_the_window_again(backend: Backend) -> None:
    queue = queue_of(backend)
    window = KEY | {"ttl": 0.8, "extend": True}
    owners = [await queue.add("echo", deduplication=window)]
    begun = hit = backend.now()
    while (now := backend.now()) < begun + 1.2:  # longer than the window
        found = await queue.add("echo", deduplication=window)
        if backend.now() > hit + 0.7:  # this machine was too slow: the window may be over
            owners, begun = [*owners, found], now
        assert found == owners[-1]
        hit = now
        await anyio.sleep(0.05)
    await has(queue, len(set(owners)))


async def test_a_window_that_is_not_extended_ends_in_spite_of_hits(backend: Backend) -> None:
    queue = queue_of(backend)
    window = KEY | {"ttl": 0.3}
    owner = await queue.add("echo", deduplication=window)
    await until(lambda: queue.add("echo", deduplication=window), lambda found: found != owner)


# -- debounce and replace


async def test_debounce_swaps_what_is_still_delayed(backend: Backend) -> None:
    queue = queue_of(backend)
    window = KEY | {"ttl": 60, "replace": True, "extend": True}
    owner = await queue.add("echo", [0], delay=3600, deduplication=window)
    for number in (1, 2):
        assert await queue.add("echo", [number], delay=3600, deduplication=window) == owner
    await has(queue, 1, "delayed")
    last = backend.now()
    assert await queue.add("echo", [3], delay=1.2, deduplication=window) == owner
    async with running(queue):
        assert await queue.wait_for(owner, timeout=PATIENCE) == 3
    job = await queue.get_job(owner)
    assert job is not None
    assert job["active_since"] > last + 1.1
    await only(queue, completed=1)


@pytest.mark.parametrize("delay", [0.2, 1.0])
async def test_what_is_about_to_run_is_replaced_too(backend: Backend, delay: float) -> None:
    """A delayed job is released a little before its time."""
    queue = queue_of(backend)

    async def add_twice(number: int) -> tuple[str, str, float, float]:
        window, first = {"id": f"key-{number}", "replace": True}, backend.now()
        owner = await queue.add("echo", [0], delay=0.35, deduplication=window)
        second = backend.now()
        other = await queue.add("echo", [1], delay=delay, deduplication=window)
        return owner, other, second, backend.now() - first

    async with running(queue):
        owner, other, last, took = await add_twice(0)
        for number in range(1, 20):
            if took < 0.3:
                break
            owner, other, last, took = await add_twice(
                number
            )  # this machine is busy: the first one may have run before the second came
        assert owner == other
        assert await queue.wait_for(owner, timeout=PATIENCE) == 1
        await wait_until_done(queue)
    job = await queue.get_job(owner)
    assert job is not None
    assert job["active_since"] > last + delay - 0.1
    await counted(queue)
    stats = await queue.queue_stats()
    assert stats["completed"] == sum(stats.values())


async def test_replace_without_a_delay_keeps_the_time(backend: Backend) -> None:
    queue = queue_of(backend)
    window = KEY | {"replace": True}
    owner = await queue.add("echo", [0], delay=60, deduplication=window)
    await counted(queue)
    before = (await queue.list_delayed())[0].run_at
    assert await queue.add("echo", [1], priority=2, deduplication=window) == owner
    await counted(queue)
    delayed = await queue.list_delayed()
    assert [(info.job_id, info.run_at) for info in delayed] == [(owner, before)]
    assert (delayed[0].payload["args"], delayed[0].payload["priority"]) == ([1], 2)


async def test_what_is_not_delayed_any_more_is_not_replaced(backend: Backend) -> None:
    queue = queue_of(backend)
    owner = await queue.add("echo", [0], deduplication=KEY | {"replace": True})
    assert await queue.add("echo", [1], delay=60, deduplication=KEY | {"replace": True}) == owner
    await run_jobs(queue)
    assert await queue.get_job_result(owner) == 0


async def test_a_replacement_that_is_unsound_changes_nothing(backend: Backend) -> None:
    queue = queue_of(backend)
    window = KEY | {"replace": True}
    await queue.add("echo", [0], delay=60, deduplication=window)
    with pytest.raises(TypeError):
        await queue.add("echo", [object()], delay=60, deduplication=window)
    await counted(queue)
    assert (await queue.list_delayed())[0].payload["args"] == [0]


# -- ending a window by hand


async def test_removing_the_key_ends_the_window(backend: Backend) -> None:
    queue = queue_of(backend)
    owner = await queue.add("echo", deduplication=KEY | {"ttl": 60})
    assert await queue.remove_deduplication_key("key")
    assert not await queue.remove_deduplication_key("key")
    assert await queue.get_deduplication_job_id("key") is None
    assert await queue.add("echo", deduplication=KEY) != owner
    await has(queue, 2)


async def test_an_unknown_key_has_no_owner(backend: Backend) -> None:
    queue = queue_of(backend)
    assert await queue.get_deduplication_job_id("nothing") is None
    assert not await queue.remove_deduplication_key("nothing")


@pytest.mark.parametrize("key", ["a.b", "a b", "*", ">", "%", "é", "x" * 200])
async def test_any_text_is_a_key(backend: Backend, key: str) -> None:
    queue = queue_of(backend)
    owner = await queue.add("echo", deduplication={"id": key})
    assert await queue.add("echo", deduplication={"id": key}) == owner
    assert await queue.get_deduplication_job_id(key) == owner


# -- with other parameters


async def test_an_id_and_a_window_are_both_kept(backend: Backend) -> None:
    queue = queue_of(backend)
    assert await queue.add("echo", job_id="mine", deduplication=KEY) == "mine"
    assert await queue.add("echo", job_id="yours", deduplication=KEY) == "mine"
    assert await queue.add("echo", job_id="mine", deduplication={"id": "another"}) == "mine"
    assert await queue.add("echo", job_id="mine") == "mine"
    await has(queue, 1)


async def test_a_window_may_be_owned_by_a_job_that_waits_for_others(backend: Backend) -> None:
    queue = queue_of(backend)
    parent = await queue.add("echo", delay=0.3)
    owner = await queue.add("echo", ["ran"], depends_on=[parent], deduplication=KEY)
    assert await queue.add("echo", depends_on=[parent], deduplication=KEY) == owner
    async with running(queue):
        assert await queue.wait_for(owner, timeout=PATIENCE) == "ran"


async def test_bulk_entries_may_have_windows(backend: Backend) -> None:
    queue = queue_of(backend)
    owner = await queue.add("echo", deduplication=KEY)
    entries: list[dict[str, Any]] = [
        {"task_id": "echo", "deduplication": {"id": key}} for key in ("key", "new", "new")
    ]
    ids = await queue.add_bulk(
        [*entries, {"task_id": "echo", "debounce": {"id": "new"}}, {"task_id": "echo"}]
    )
    assert ids[0] == owner
    assert ids[1] == ids[2] == ids[3] == await queue.get_deduplication_job_id("new")
    assert len({*ids}) == 3
    await has(queue, 3)


# -- a producer that dies while it opens a window


@pytest.mark.parametrize("window", [KEY, KEY | {"ttl": 60}])
async def test_a_job_whose_producer_died_is_stored_by_the_next_producer(
    backend: Backend, twin: Backend, monkeypatch: pytest.MonkeyPatch, window: dict[str, Any]
) -> None:
    queue, other = queue_of(backend), queue_of(twin)
    await queue._assets.declare_all()

    async def dies(_: Any) -> str:
        raise ConnectionLost("nats://nowhere")

    with monkeypatch.context() as patch:
        patch.setattr(queue._additions, "add", dies)
        with pytest.raises(ConnectionLost):
            await queue.add("echo", ["first"], deduplication=window)
    await has(other, 0)
    owner = await other.add("echo", ["second"], deduplication=window)
    await has(other, 1)
    await run_jobs(other)
    assert await other.get_job_result(owner) == "first"


@pytest.mark.parametrize("delay", [None, 3600])
async def test_an_owner_that_is_still_in_its_window_costs_a_hit_no_more_reads(
    backend: Backend, monkeypatch: pytest.MonkeyPatch, delay: float | None
) -> None:
    queue, real, reads = queue_of(backend), backend.last, list[str]()
    await queue._assets.declare_all()

    async def last(log: str, *filters: str) -> list[Record]:
        reads.append(log)
        return await real(log, *filters)

    monkeypatch.setattr(backend, "last", last)

    async def is_taken_out() -> bool:
        (record,) = await real(queue._subjects.bucket_log, queue._subjects.deduplication("settled"))
        return b'"job":' not in record.body

    async def count_reads(key: str) -> int:
        reads.clear()
        await queue.add("echo", deduplication={"id": key})
        return len(reads)

    with monkeypatch.context() as patch:  # the write that takes the owner out is on its way
        patch.setattr(backend, "send", lambda *_, **__: None)
        await queue.add("echo", delay=delay, deduplication={"id": "on its way"})
        assert await count_reads("on its way") == (3 if delay is None else 2)
    await queue.add("echo", delay=delay, deduplication={"id": "settled"})
    await until(is_taken_out, bool)
    assert await count_reads("settled") == (3 if delay is None else 2)
    await has(queue, 2, "waiting" if delay is None else "delayed")


async def test_a_job_that_cannot_be_added_opens_no_window(backend: Backend) -> None:
    queue = queue_of(backend)
    with pytest.raises(JobNotFound):
        await queue.add("echo", depends_on=["missing"], deduplication=KEY)
    assert await queue.get_deduplication_job_id("key") is None
    assert await queue.add("echo", deduplication=KEY)
    await has(queue, 1)


async def test_a_window_makes_no_batch(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    queue, real, sizes = queue_of(backend), backend.write, list[int]()
    await queue._assets.declare_all()

    async def write(log: str, *writes: Write) -> int:
        sizes.append(len(writes))
        return await real(log, *writes)

    monkeypatch.setattr(backend, "write", write)
    window = KEY | {"ttl": 60, "extend": True, "replace": True}
    for number in range(3):
        await queue.add("echo", [number], delay=60, deduplication=window)
    assert set(sizes) == {1}


# -- races and cost


@pytest.mark.parametrize(
    "window", [KEY, KEY | {"ttl": 60}, KEY | {"ttl": 60, "extend": True, "replace": True}]
)
async def test_producers_that_race_add_one_job(
    backend: Backend, twin: Backend, window: dict[str, Any]
) -> None:
    queues = [queue_of(handle) for handle in (backend, twin)]
    adds: list[Callable[[], Awaitable[Any]]] = [
        lambda number=number: queues[number % 2].add(
            "echo", [number], delay=30, deduplication=window
        )  # type: ignore[misc]
        for number in range(30)
    ]
    assert len(set(await race(*adds))) == 1
    await has(queues[0], 1)


async def test_an_addition_whose_confirmation_was_lost_is_no_hit(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue, real = queue_of(backend), backend.write
    await queue._assets.declare_all()

    async def write(log: str, *writes: Write) -> int:
        await real(log, *writes)
        patch.undo()
        raise WriteRefused(log, "the first sending was stored")

    told: list[str] = []
    subscription = await backend.subscribe(
        "amq.work.event.*.*", lambda signal: told.append(signal.subject.split(".")[3])
    )
    with monkeypatch.context() as patch:
        patch.setattr(backend, "write", write)
        owner = await queue.add("echo", deduplication=KEY)
    await run_jobs(queue)
    await subscription.unsubscribe()
    assert await queue.get_job_result(owner) is None
    assert "completed" in told
    assert "debounced" not in told


@pytest.mark.slow
async def test_a_window_costs_the_same_in_a_queue_of_any_size(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue = queue_of(backend)
    queue.concurrency = 100
    calls: list[str] = []
    for name in (
        "last",
        "page",
        "write",
        "look_up",
        "list_consumers",
        "purge",
        "count",
        "list_subjects",
    ):
        real = getattr(backend, name)

        async def counted(
            *args: Any, name: str = name, real: Callable[..., Awaitable[Any]] = real, **kwargs: Any
        ) -> Any:
            calls.append(name)
            return await real(*args, **kwargs)

        monkeypatch.setattr(backend, name, counted)

    async def cost(key: str) -> tuple[int, int]:
        """The calls of an add that opens a window, and of one that hits it."""
        calls.clear()
        owner = await queue.add("echo", delay=3600, deduplication={"id": key})
        opened = len(calls)
        assert await queue.add("echo", deduplication={"id": key}) == owner
        return opened, len(calls) - opened

    await queue.add("echo")
    empty = await cost("first")
    await queue.add_bulk([{"task_id": "echo"}] * 1000)
    await queue.add_bulk([{"task_id": "echo", "delay": 3600}] * 1000)
    async with running(queue):
        await until(queue.queue_stats, lambda stats: stats["completed"] == 1001)
    assert await cost("second") == empty
    assert max(empty) <= 5
    assert "page" not in calls
