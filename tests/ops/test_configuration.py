"""Settings of a live queue.

What a person stores wins, then the last process that applies its own.
"""

import time
from collections.abc import Callable
from functools import partial

import anyio
import anyio.lowlevel
import pytest

from asyncmq_nats.backends.base import Backend, Record, Signal
from asyncmq_nats.backends.nats import room
from asyncmq_nats.backends.nats.backend import NATSBackend
from asyncmq_nats.backends.nats.embedded.server import EmbeddedServer
from asyncmq_nats.exceptions import InvalidArgument, ServerUnsuitable, StorageFull, WriteRefused
from asyncmq_nats.queues import Queue
from asyncmq_nats.settings import Settings
from tests.receiver import PATIENCE, holds, until
from tests.running import make_queue, only, outcome, running

Make = Callable[..., NATSBackend]


@pytest.fixture
def settings() -> Settings:
    return Settings(stalled_after=30, heartbeat_interval=0.5, shutdown_timeout=5)


@pytest.fixture
def make(server: EmbeddedServer) -> Make:
    """Maker of a process with settings of its own."""

    def make(**values: object) -> NATSBackend:
        chosen = Settings.model_validate({"heartbeat_interval": 0.5, **values})
        return NATSBackend(server.url, settings=chosen)

    return make


async def no_op(text: str = "") -> None:
    pass


async def test_a_lease_that_is_stored_is_that_of_all_tiers_and_processes(
    backend: Backend, twin: Backend
) -> None:
    queue, other = make_queue(backend, no_op=no_op), Queue("work", twin)
    await queue.add("no_op", priority=1)
    await queue.add("no_op")
    changed = await queue.configure(stalled_after=7)
    assert len(changed) == 2
    assert {each.can_change for each in changed} == {True}
    assert await other.get_configuration() == {"stalled_after": 7.0}
    assert await other.find_drift() == []  # it has another setting, which does not count
    assert await other.apply_settings() == []
    assert len(await other.configure(reset=["stalled_after"])) == 2
    assert await queue.get_configuration() == {}
    assert await queue.find_drift() == []


async def test_whether_the_server_tells_that_jobs_wait_can_be_applied(make: Make) -> None:
    for tells in (True, False, True):
        told: list[str] = []
        async with make(waiting_events=tells) as backend, make(waiting_events=not tells) as other:
            queue = make_queue(other, no_op=no_op)
            await queue.add("no_op")
            drift = await Queue("work", backend).find_drift()
            assert [(each.key, each.can_change) for each in drift] in ([], [("republish", True)])
            await Queue("work", backend).apply_settings()
            assert await Queue("work", backend).find_drift() == []
            await backend.subscribe(queue._subjects.event("*", "*"), partial(note, told))
            await queue.cancel_job(await queue.add("no_op"))
            await holds(partial(bool, told))
            assert any(".waiting." in subject for subject in told) == tells


def note(told: list[str], signal: Signal) -> None:
    told.append(signal.subject)


async def test_a_running_worker_takes_up_what_is_stored(backend: Backend, twin: Backend) -> None:
    queue = make_queue(backend, no_op=no_op)
    async with running(queue):
        await queue.add_bulk([{"task_id": "no_op"}] * 5)
        await only(queue, completed=5)
        await Queue("work", twin).configure(completed_keep=2, failed_ttl="none")
        await only(queue, completed=2)


async def test_a_job_that_runs_is_not_run_twice_when_its_lease_becomes_shorter(
    backend: Backend, twin: Backend
) -> None:
    started: list[str] = []

    async def wait() -> None:
        started.append("wait")
        await anyio.sleep(3.0)

    queue = make_queue(backend, wait=wait)
    second = make_queue(twin, wait=wait)
    async with running(queue):
        job_id = await queue.add("wait")
        await until(lambda: queue.get_job_count_by_types("active"), lambda count: count == 1)
        async with running(second):
            await second.configure(stalled_after=2)
            assert (await outcome(queue, job_id))["status"] == "completed"
    assert started == ["wait"]


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"storage": "memory"}, "a queue can keep the settings stalled_after, completed_ttl"),
        ({"stalled_after": 1.0}, "at least 2 s"),
        ({"stalled_after": "soon"}, "stalled_after: Input should be a valid number"),
        ({"completed_keep": 0}, "completed_keep: Input should be greater than or equal to 1"),
        ({"reset": ["nothing"]}, "a queue can keep"),
    ],
)
async def test_what_is_no_setting_of_a_queue_is_refused(
    values: dict[str, object], problem: str, nats_backend: NATSBackend
) -> None:
    queue = Queue("work", nats_backend)
    with pytest.raises(InvalidArgument, match=problem):
        await queue.configure(**values)  # type: ignore[arg-type]
    assert await nats_backend.list_logs("amq_work") == []


async def test_the_last_process_that_applies_its_settings_decides_unless_some_are_stored(
    make: Make,
) -> None:
    async with make() as plain, make(apply=True, stalled_after=10) as first:
        queue = Queue("work", plain)
        await queue.add("no_op")
        async with running(make_queue(first, no_op=no_op)):
            await only(queue, completed=1)
            assert [(each.key, each.found) for each in await queue.find_drift()] == [
                ("ack_wait", 10_000_000_000)
            ]
            async with make(apply=True, stalled_after=20) as second, running(make_queue(second)):
                # The first one has seen it at several heartbeats by now, and does not change it.
                (worker, _) = await until(queue.list_workers, lambda found: len(found) == 2)
                await until(
                    queue.list_workers,
                    lambda found: all(each.heartbeat > worker.heartbeat + 1 for each in found),
                )
                (difference,) = await queue.find_drift()
                assert difference.found == 20_000_000_000
        await queue.configure(stalled_after=40)
        async with make(apply=True, stalled_after=10) as third, running(make_queue(third)):
            assert await queue.find_drift() == []
            assert await Queue("work", third).find_drift() == []


async def test_without_being_told_to_a_worker_changes_nothing(
    make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    async with make() as plain, make(stalled_after=10) as other:
        queue = Queue("work", plain)
        await queue.add("no_op")
        async with running(make_queue(other, no_op=no_op)):
            await only(queue, completed=1)
        assert await queue.find_drift() == []
        (difference,) = await Queue("work", other).find_drift()
        assert (difference.asset, difference.can_change) == ("consumer tier_5 of amq_work", True)
    assert "consumer tier_5 of amq_work exists with other settings" in caplog.text


async def test_limits_and_compression_change_and_change_back(make: Make) -> None:
    async with make() as backend:
        queue = Queue("work", backend)
        await queue.add_bulk([{"task_id": "no_op", "args": ["x" * 1000]}] * 50)
        await queue.add("later", delay=3600)
        changed = await queue.configure(
            ready_max_bytes=10_000_000, bucket_max_bytes=20_000_000, compression="s2"
        )
        assert {(each.asset.split()[1], each.key) for each in changed} == {
            ("amq_work", "max_bytes"),
            ("amq_work", "discard"),
            ("amq_work", "compression"),
            ("KV_amq_work_scheduler", "max_bytes"),
            ("KV_amq_work_scheduler", "compression"),
        }
        await only(queue, waiting=50, delayed=1)
        reset = ["ready_max_bytes", "bucket_max_bytes", "compression"]
        assert len(await queue.configure(reset=reset)) == 5
        assert await queue.find_drift() == []
        await only(queue, waiting=50, delayed=1)


async def test_a_size_that_would_cost_jobs_is_refused_and_not_stored(make: Make) -> None:
    async with make(bucket_max_bytes=5000, apply=True) as greedy, make() as backend:
        queue = Queue("work", backend)
        await queue.add_bulk([{"task_id": "no_op", "args": ["x" * 1000], "delay": 3600}] * 50)
        for name in ("bucket_max_bytes", "ready_max_bytes"):
            await queue.add_bulk([{"task_id": "no_op", "args": ["x" * 1000]}] * 5)
            with pytest.raises(InvalidArgument, match="must leave a tenth free"):
                await queue.configure(**{name: 5000})  # type: ignore[arg-type]
        assert await queue.get_configuration() == {}
        with anyio.fail_after(PATIENCE):
            # A worker that is told to apply such a size runs all the same.
            async with running(make_queue(greedy, no_op=no_op)):
                await only(queue, delayed=50, completed=10)


async def fill(queue: Queue, delay: float | None = None) -> None:
    for _ in range(1000):
        await queue.add("no_op", ["x" * 1000], delay=delay)


async def test_a_queue_that_is_full_can_be_configured(make: Make) -> None:
    async with make() as backend:
        queue = Queue("work", backend)
        await queue.configure(ready_max_bytes=20_000)
        with pytest.raises(StorageFull):
            await fill(queue)
        assert len(await queue.configure(stalled_after=40)) == 1
        assert len(await queue.apply_settings()) == 0
        assert len(await queue.configure(ready_max_bytes=20_500)) == 1
        with pytest.raises(InvalidArgument, match="must leave a tenth free"):
            await queue.configure(ready_max_bytes=20_000)
        assert len(await queue.configure(reset=["ready_max_bytes"])) == 2


async def test_a_limit_that_another_process_sets_or_raises_costs_no_delayed_job(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "LIMIT_LIFETIME", 0.05)
    async with make() as producer, make() as admin:
        queue, other = Queue("work", producer), Queue("work", admin)
        first = await queue.add("no_op", delay=3600)
        await other.configure(bucket_max_bytes=400_000)

        async def add() -> bool:
            await queue.add("no_op", delay=3600)
            return bool(producer._fills._fills["KV_amq_work_scheduler"].limit)

        await until(add, bool)
        with pytest.raises(StorageFull):
            await fill(queue, delay=3600)
        assert await queue.get_job_state(first) == "delayed"
        for process in (other, queue):  # by another process, then by its own
            size = (await process.get_configuration())["bucket_max_bytes"] + 100_000
            full = producer._fills._fills["KV_amq_work_scheduler"]
            full.size, full.read_at = full.limit, time.monotonic()  # to the last byte
            await process.configure(bucket_max_bytes=size)
            await until(partial(adds, queue), bool)
            with pytest.raises(StorageFull):
                await fill(queue, delay=3600)
        assert await queue.get_job_state(first) == "delayed"


async def adds(queue: Queue) -> bool:
    try:
        await queue.add("no_op", delay=3600)
    except StorageFull:
        return False
    return True


async def test_a_configuration_that_is_not_stored_is_an_error(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with make() as backend:
        queue = Queue("work", backend)
        await queue.configure(completed_keep=5)
        refusals = [WriteRefused("KV_amq_work_scheduler", "another process wrote")] * 100

        async def refuse(*_: object) -> int:
            raise refusals.pop()

        with monkeypatch.context() as patch:
            patch.setattr(backend, "write", refuse)
            with pytest.raises(WriteRefused):
                await queue.configure(completed_keep=6)
        assert await queue.get_configuration() == {"completed_keep": 5}


async def test_what_was_stored_is_applied_though_a_replica_does_not_know_it_yet(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with make() as backend:
        queue = Queue("work", backend)
        await queue.add("no_op")
        old = await backend.last("KV_amq_work_scheduler", queue._subjects.configuration)

        async def last(*_: object) -> list[Record]:
            return old

        with monkeypatch.context() as patch:
            patch.setattr(backend, "last", last)
            (changed,) = await queue.configure(stalled_after=40)
        assert changed.wanted == 40_000_000_000
        assert await queue.find_drift() == []


async def test_what_the_server_cannot_change_is_said(make: Make) -> None:
    async with make() as backend, make(storage="memory", replicas=3) as other:
        await Queue("work", backend).add("no_op")
        drift = await Queue("work", other).find_drift()
        assert {each.key: each.can_change for each in drift} == {
            "storage": False,
            "num_replicas": True,
        }
        with pytest.raises(ServerUnsuitable, match="ASYNCMQ_NATS_REPLICAS"):
            await Queue("work", other).apply_settings()


async def test_a_malformed_record_is_passed_over(make: Make) -> None:
    async with make() as backend:
        queue = Queue("work", backend)
        await queue.configure(completed_keep=5)
        client = backend._require_connection().client
        bad = b'{"completed_keep": "many", "tomorrow": 1, "completed_ttl": 7, "failed_keep": 8}'
        for body, left in (
            (b"no json", {}),
            (b"[1]", {}),
            (b'{"completed_keep": "many", "tomorrow": 1}', {}),
            (bad, {"completed_ttl": 7.0, "failed_keep": 8}),  # also what comes after
        ):
            client.post(queue._subjects.configuration.encode(), body, b"")
            await client.barrier()
            assert await queue.get_configuration() == left
        await queue.configure(reset=["completed_ttl", "failed_keep"])
        await queue.configure(completed_keep=6)
        assert await queue.get_configuration() == {"completed_keep": 6}
