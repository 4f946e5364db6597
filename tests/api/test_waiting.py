"""Many that wait for the ends of jobs in one process."""

from collections.abc import Callable
from typing import Any

import anyio
import pytest

from asyncmq_nats.backends.base import Backend, Signal, Subscription
from asyncmq_nats.exceptions import JobNotFound
from asyncmq_nats.queues import Queue
from asyncmq_nats.store import waiters
from tests.receiver import holds
from tests.running import PATIENCE, make_queue, race, running


async def echo(value: Any = None) -> Any:
    return value


async def wait_for_all(queue: Queue, job_ids: list[str]) -> list[Any]:
    return await race(*[lambda each=each: queue.wait_for(each, PATIENCE) for each in job_ids])


@pytest.mark.parametrize("count", [1, 64, 300])
async def test_each_gets_the_result_of_its_own_job(backend: Backend, count: int) -> None:
    queue = make_queue(backend, concurrency=20, echo=echo)
    ids = await queue.add_bulk([{"task_id": "echo", "args": [n]} for n in range(count)])
    results: list[Any] = []
    async with anyio.create_task_group() as group:

        async def wait() -> None:
            results.extend(await wait_for_all(queue, ids))

        group.start_soon(wait)
        await holds(lambda: len(queue._waiters._crowd().waiting) >= count)
        async with running(queue):
            await holds(lambda: bool(results))
    assert results == list(range(count))
    crowd = queue._waiters._crowd()
    assert (crowd.waiting, crowd.by_token, crowd.shared, crowd.leader) == ({}, {}, [], None)


async def test_several_wait_for_one_job(backend: Backend) -> None:
    queue = make_queue(backend, echo=echo)
    job_id = await queue.add("echo", ["told"])
    async with running(queue):
        assert await wait_for_all(queue, [job_id] * 5) == ["told"] * 5


class TestLostEvents:
    @pytest.fixture(autouse=True)
    def deaf(self, backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
        """Make every event of an outcome one that is lost."""
        subscribe = backend.subscribe

        async def subscribe_in_vain(
            subject: str, on_signal: Callable[[Signal], None]
        ) -> Subscription:
            return await subscribe(subject, (lambda _: None) if ".event." in subject else on_signal)

        monkeypatch.setattr(backend, "subscribe", subscribe_in_vain)
        monkeypatch.setattr(waiters, "LOOK_INTERVAL", 0.2)
        monkeypatch.setattr(waiters, "FULL_READS", 2)

    async def test_the_ends_are_seen_all_the_same(self, backend: Backend) -> None:
        queue = make_queue(backend, concurrency=20, echo=echo)
        ids = await queue.add_bulk([{"task_id": "echo", "args": [n]} for n in range(120)])
        async with running(queue):
            assert await wait_for_all(queue, ids) == list(range(120))

    async def test_that_a_job_was_removed_is_seen_by_each(self, backend: Backend) -> None:
        queue = make_queue(backend, echo=echo)
        ids = await queue.add_bulk([{"task_id": "echo", "delay": 3600}] * 8)
        found: list[str] = []

        async def wait(job_id: str) -> None:
            with pytest.raises(JobNotFound):
                await queue.wait_for(job_id, PATIENCE)
            found.append(job_id)

        async with anyio.create_task_group() as group:
            for job_id in ids:
                group.start_soon(wait, job_id)
            await holds(lambda: len(queue._waiters._crowd().waiting) >= 8)
            for job_id in ids:
                assert await queue.remove_delayed(job_id)
        assert sorted(found) == sorted(ids)

    async def test_one_that_gives_up_leaves_the_look_to_another(self, backend: Backend) -> None:
        queue = make_queue(backend, echo=echo)
        job_id = await queue.add("echo", ["told"], delay=3600)
        with pytest.raises(TimeoutError):
            await queue.wait_for(job_id, timeout=0.05)
        async with running(queue), anyio.create_task_group() as group:
            results: list[Any] = []

            async def give_up() -> None:
                with pytest.raises(TimeoutError):
                    await queue.wait_for(job_id, timeout=0.3)
                assert await queue.promote(job_id)

            async def wait() -> None:
                results.append(await queue.wait_for(job_id, PATIENCE))

            group.start_soon(give_up)
            group.start_soon(wait)
        assert results == ["told"]


async def test_an_end_that_was_heard_and_is_not_seen_yet_is_looked_for_again(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A replica that lags behind may answer; only what was heard is worth more than one look."""
    monkeypatch.setattr(waiters, "LOOK_INTERVAL", 3600)
    queue = make_queue(backend, echo=echo)
    job_id = await queue.add("echo", ["x"])
    find, before = queue._inspection.find, await queue._inspection.find(job_id)
    stale = 3

    async def find_late(wanted: str) -> Any:
        nonlocal stale
        found = await find(wanted)
        if found is None or found.status != "completed" or not stale:
            return found
        stale -= 1
        return before

    monkeypatch.setattr(queue._inspection, "find", find_late)
    results: list[Any] = []

    async def wait() -> None:
        results.append(await queue.wait_for(job_id, PATIENCE))

    with anyio.fail_after(PATIENCE):
        async with anyio.create_task_group() as group:
            group.start_soon(wait)
            while not queue._waiters._crowd().leader:  # noqa: ASYNC110  nothing tells of it
                await anyio.sleep(0.01)
            async with running(queue):
                while not results:  # noqa: ASYNC110
                    await anyio.sleep(0.01)
    assert (results, stale) == (["x"], 0)
