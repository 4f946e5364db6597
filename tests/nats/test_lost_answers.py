"""A write whose confirmation was lost with the connection is not stored twice.

Whatever has become of it meanwhile.
"""

from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import anyio
import pytest

from asyncmq_nats.backends.base import Backend, Expect, Log, Settled, Timer, Write
from asyncmq_nats.backends.nats.backend import NATSBackend
from asyncmq_nats.backends.nats.embedded.server import EmbeddedServer
from asyncmq_nats.exceptions import ConnectionLost, Unconfirmed, WriteRefused
from asyncmq_nats.flow import FlowProducer
from asyncmq_nats.jobs import Job
from asyncmq_nats.queues import Queue
from asyncmq_nats.settings import Settings
from tests.nats.relay import Relay, relaying
from tests.receiver import holds, until
from tests.running import PATIENCE, make_queue, running, wait_until_done

BUCKET = rb"PUB \$KV\.amq_work_scheduler"
READY = rb"PUB amq\.work\.ready"


@pytest.fixture
def settings() -> Settings:
    return Settings(stalled_after=600, publish_timeout=40, shutdown_timeout=0.1)


@pytest.fixture
async def relay(server: EmbeddedServer) -> AsyncIterator[Relay]:
    async with relaying(server) as relay:
        yield relay


@pytest.fixture
async def distant(relay: Relay, settings: Settings) -> AsyncIterator[NATSBackend]:
    """A backend that is connected by the relay."""
    async with NATSBackend(relay.url, settings=settings) as backend:
        yield backend


class Later:
    """The result of a call that goes on in the background."""

    def __init__(self) -> None:
        self.result: Any = None
        self.error: Exception | None = None

    async def run(self, call: Callable[[], Awaitable[Any]]) -> None:
        try:
            self.result = await call()
        except Exception as error:
            self.error = error


# -- the seam


@pytest.fixture
async def notes(nats_backend: NATSBackend) -> NATSBackend:
    await nats_backend.declare_log(Log("notes", ("notes.>",), timers=True))
    return nats_backend


async def write_losing(
    relay: Relay,
    call: Callable[[], Awaitable[Any]],
    meanwhile: Callable[[], Awaitable[Any]],
    *,
    deaf: bool = False,
) -> Later:
    """Lose the first write of a call, or its answer, do something else, and let the call end."""
    (relay.lose_request if deaf else relay.lose_answer)(rb"PUB notes\.")
    later = Later()
    with anyio.fail_after(PATIENCE):
        async with anyio.create_task_group() as group:
            group.start_soon(later.run, call)
            await relay.lost.wait()
            await meanwhile()
            await relay.cut()
    return later


async def stored(backend: Backend, *filters: str) -> list[int]:
    """Wait until all are there, and return their sequences."""
    records = await until(
        lambda: backend.last("notes", *filters), lambda found: len(found) == len(filters)
    )
    return [record.sequence for record in records]


@pytest.mark.parametrize("kind", ["plain", "timer"])
async def test_a_write_is_not_repeated_when_what_it_expects_holds_again(
    kind: str, notes: NATSBackend, distant: NATSBackend, relay: Relay
) -> None:
    timer = Timer(notes.now() + 3600, "notes.fired") if kind == "timer" else None
    write = Write("notes.a.1", b"a", Expect("notes.a.>"), timer=timer)

    async def remove() -> None:
        (sequence,) = await stored(notes, "notes.a.1")
        await notes.delete("notes", sequence)

    later = await write_losing(relay, lambda: distant.write("notes", write), remove)
    assert (later.result, later.error) == (1, None)
    assert await notes.last_sequence("notes") == 1


async def test_a_batch_is_not_repeated_when_what_it_expects_holds_again(
    notes: NATSBackend, distant: NATSBackend, relay: Relay
) -> None:
    batch = [Write(f"notes.{name}.1", b"", Expect(f"notes.{name}.>")) for name in "abc"]

    async def remove() -> None:
        for sequence in await stored(notes, *(write.subject for write in batch)):
            await notes.delete("notes", sequence)

    later = await write_losing(relay, lambda: distant.write("notes", *batch), remove)
    assert (later.result, later.error) == (3, None)
    assert await notes.last_sequence("notes") == 3


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("deaf", [False, True])
async def test_a_write_that_rests_on_what_was_read_elsewhere_is_not_sent_on_another_connection(
    deaf: bool, count: int, notes: NATSBackend, distant: NATSBackend, relay: Relay
) -> None:
    """It is confirmed if it was stored, and else refused."""
    writes = [Write(f"notes.{name}", b"", Expect(f"notes.{name}"), once=True) for name in "abc"]
    writes = writes[:count]

    async def remove() -> None:
        if not deaf:
            for sequence in await stored(notes, *(write.subject for write in writes)):
                await notes.delete("notes", sequence)

    later = await write_losing(relay, lambda: distant.write("notes", *writes), remove, deaf=deaf)
    if deaf:
        assert isinstance(later.error, WriteRefused)
        assert "the connection was lost, and notes.a was not stored" in str(later.error)
    else:
        assert (later.result, later.error) == (count, None)
    assert await notes.last_sequence("notes") == (0 if deaf else count)


@pytest.mark.parametrize("deaf", [False, True])
async def test_a_send_that_rests_on_what_was_read_elsewhere_is_sent_once(
    deaf: bool, notes: NATSBackend, distant: NATSBackend, relay: Relay
) -> None:
    write, settled = Write("notes.a", b"", message_id="one", once=True), list[Settled]()

    async def send() -> None:
        distant.send("notes", write, settled.append)
        await holds(lambda: bool(settled))

    later = await write_losing(relay, send, anyio.lowlevel.checkpoint, deaf=deaf)
    assert later.error is None
    assert [type(each) for each in settled] == [WriteRefused if deaf else int]
    assert await notes.last_sequence("notes") == (0 if deaf else 1)


async def commit_in_two(backend: NATSBackend, writes: list[Write]) -> int:
    """Stage all but the last of the writes, and commit them with it."""
    staged = backend.stage("notes")
    await staged.add(*writes[:-1])
    await staged.add(writes[-1])
    return await staged.commit()


async def test_a_staged_batch_is_not_stored_twice(
    notes: NATSBackend, distant: NATSBackend, relay: Relay
) -> None:
    batch = [Write(f"notes.{name}", b"") for name in "abc"]

    async def remove() -> None:
        for sequence in await stored(notes, *(write.subject for write in batch)):
            await notes.delete("notes", sequence)

    relay.lose_answer(rb"Nats-Batch-Commit")
    later = Later()
    with anyio.fail_after(PATIENCE):
        async with anyio.create_task_group() as group:
            group.start_soon(later.run, lambda: commit_in_two(distant, batch))
            await relay.lost.wait()
            await remove()
            await relay.cut()
    assert (later.result, later.error) == (3, None)
    assert await notes.last_sequence("notes") == 3


@pytest.mark.parametrize("lost", [rb"notes\.a ", rb"notes\.c ", rb"Nats-Batch-Commit"])
async def test_a_staged_batch_of_which_a_part_is_lost_is_sent_again(
    lost: bytes, notes: NATSBackend, distant: NATSBackend, relay: Relay
) -> None:
    batch = [Write(f"notes.{name}", b"") for name in "abcde"]

    async def commit() -> int:
        staged = distant.stage("notes")
        await staged.add(*batch[:2])
        await staged.add(*batch[2:4])
        if relay.lost.is_set():  # with the connection: what comes now goes by the next one
            await relay.cut()
        await staged.add(batch[4])
        return await staged.commit()

    relay.lose_request(lost)
    later = Later()
    with anyio.fail_after(PATIENCE):
        async with anyio.create_task_group() as group:
            group.start_soon(later.run, commit)
            await relay.lost.wait()
            await relay.cut()
    assert (later.result, later.error) == (5, None)
    found = await notes.last("notes", "notes.>")
    assert [record.subject for record in found] == [write.subject for write in batch]


@pytest.mark.parametrize("size", [1, 3])
async def test_a_repetition_that_its_own_first_sending_refuses_is_confirmed(
    size: int, notes: NATSBackend, distant: NATSBackend, relay: Relay
) -> None:
    await notes.write("notes", Write("notes.first", b""))
    batch = [
        Write(f"notes.{name}.1", b"", Expect(f"notes.{name}.>"), marker=True, ttl=60)
        for name in "abc"
    ][:size]

    async def wait() -> None:
        await stored(notes, *(write.subject for write in batch))

    later = await write_losing(relay, lambda: distant.write("notes", *batch), wait)
    assert (later.result, later.error) == (1 + size, None)
    assert await notes.last_sequence("notes") == 1 + size


async def test_none_of_many_writes_is_repeated_when_what_it_expects_holds_again(
    notes: NATSBackend, distant: NATSBackend, relay: Relay
) -> None:
    writes = [Write(f"notes.{n}", b"", Expect(f"notes.{n}")) for n in range(700)]

    async def remove() -> None:
        (sequence,) = await stored(notes, "notes.0")
        await notes.delete("notes", sequence)

    later = await write_losing(relay, lambda: distant.write_each("notes", writes), remove)
    assert later.error is None
    assert sorted(later.result) == list(range(1, 701))
    assert await notes.last_sequence("notes") == 700


@pytest.mark.parametrize("size", [1, 2])
async def test_what_another_one_wrote_is_not_taken_for_the_own_write(
    size: int, notes: NATSBackend, distant: NATSBackend, relay: Relay
) -> None:
    """Markers are all the same."""
    await notes.write("notes", Write("notes.a", b"a"))
    marker = Write("notes.a", b"", Expect("notes.a", 1), marker=True, ttl=60)
    batch = [Write("notes.b", b"b", Expect("notes.b")), marker][-size:]

    async def write() -> None:
        await notes.write("notes", marker)

    later = await write_losing(relay, lambda: distant.write("notes", *batch), write, deaf=True)
    assert isinstance(later.error, WriteRefused)
    assert await notes.last_sequence("notes") == 2


@pytest.mark.parametrize("foreign", [False, True])
async def test_a_write_that_is_not_awaited_is_told_from_others_by_its_body(
    foreign: bool, notes: NATSBackend, distant: NATSBackend, relay: Relay
) -> None:
    settled: list[Settled] = []
    done = anyio.Event()

    def settle(result: Settled) -> None:
        settled.append(result)
        done.set()

    async def send() -> None:
        distant.send("notes", Write("notes.a", b"", Expect("notes.a")), settle)
        await done.wait()

    async def write() -> None:
        await (
            notes.write("notes", Write("notes.a", b"another", ttl=60))
            if foreign
            else stored(notes, "notes.a")
        )

    await write_losing(relay, send, write, deaf=foreign)
    assert [type(result) for result in settled] == [WriteRefused] if foreign else settled == [1]


# -- jobs


class Runs:
    """A task that counts how often it ran, by its argument."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    async def __call__(self, name: str) -> None:
        self.counts[name] += 1


async def add_delayed(queue: Queue) -> None:
    await queue.add("note", ["a"], delay=0.1)


async def add_deduplicated(queue: Queue) -> None:
    await queue.add("note", ["a"], deduplication={"id": "window"})


async def add_in_bulk(queue: Queue) -> None:
    await queue.add_bulk(
        [{"task_id": "note", "args": ["a"], "delay": 0.1}, {"task_id": "note", "args": ["b"]}]
    )


async def add_custom(queue: Queue) -> None:
    await queue.add("note", ["a"], job_id="own")


async def add_flow(queue: Queue) -> None:
    first = Job(task_id="note", args=["a"])
    await FlowProducer(queue.backend).add_flow(
        "work", [first, Job(task_id="note", args=["b"], depends_on=[first.job_id])]
    )


async def add_custom_flow(queue: Queue) -> None:
    jobs = [
        Job(task_id="note", args=["a"], job_id="first"),
        Job(task_id="note", args=["b"], job_id="second", depends_on=["first"]),
    ]
    await FlowProducer(queue.backend).add_flow("work", jobs)


@pytest.mark.parametrize(
    ("add", "jobs", "lost"),
    [
        (add_delayed, 1, BUCKET),
        (add_deduplicated, 1, READY),
        (add_custom, 1, BUCKET),
        (add_in_bulk, 2, BUCKET),
        (add_flow, 2, BUCKET),
        (add_custom_flow, 2, BUCKET),
    ],
)
async def test_a_job_that_has_run_meanwhile_does_not_run_again(
    add: Callable[[Queue], Awaitable[None]],
    jobs: int,
    lost: bytes,
    nats_backend: NATSBackend,
    distant: NATSBackend,
    relay: Relay,
) -> None:
    runs = Runs()
    near, far = (make_queue(backend, note=runs.__call__) for backend in (nats_backend, distant))
    await far._assets.declare_all()
    later = Later()
    async with running(near):
        relay.lose_answer(lost)
        with anyio.fail_after(PATIENCE):
            async with anyio.create_task_group() as group:
                group.start_soon(later.run, lambda: add(far))
                await until(near.get_completed, lambda completed: len(completed) == jobs)
                await relay.cut()
        await wait_until_done(near)
    assert later.error is None
    assert set(runs.counts.values()) == {1}


@pytest.mark.parametrize("way", ["add", "add_bulk", "add with a parent", "add_bulk with a parent"])
async def test_a_job_that_another_producer_has_added_meanwhile_does_not_run_again(
    way: str, nats_backend: NATSBackend, distant: NATSBackend, relay: Relay
) -> None:
    """The first try of one producer is lost; by its second, the other one's job has ended."""
    runs, later, go = Runs(), Later(), anyio.Event()
    near, far = (
        make_queue(backend, note=runs.__call__, block=go.wait)
        for backend in (nats_backend, distant)
    )
    await far._assets.declare_all()
    with_parent = way.endswith("a parent")
    more: dict[str, Any] = {"depends_on": [await near.add("block")]} if with_parent else {}

    async def add(queue: Queue) -> list[str]:
        if way.startswith("add_bulk"):
            entries = [{"task_id": "note", "args": [name], "job_id": name} for name in "ab"]
            return await queue.add_bulk([each | more for each in entries])
        return [await queue.add("note", ["b"], job_id="b", **more)]

    async with running(near):
        relay.lose_request(rb"PUB \$KV\.amq_work_scheduler\.later")
        with anyio.fail_after(PATIENCE):
            async with anyio.create_task_group() as group:
                group.start_soon(later.run, lambda: add(far))
                await relay.lost.wait()
                ids = await add(near)
                go.set()
                await until(
                    near.get_completed,
                    lambda completed: len(completed) == len(ids) + with_parent,
                )
                await wait_until_done(near)
                stored = await nats_backend.last_sequence("KV_amq_work_scheduler")
                await relay.cut()
        await wait_until_done(near)
    assert (later.result, later.error) == (ids, None)
    assert runs.counts == dict.fromkeys(ids, 1)
    assert await nats_backend.last_sequence("KV_amq_work_scheduler") == stored


async def test_a_flow_of_chosen_ids_that_has_moved_on_is_not_refused(
    nats_backend: NATSBackend, distant: NATSBackend, relay: Relay
) -> None:
    started, free, later = anyio.Event(), anyio.Event(), Later()

    async def note(name: str) -> None:
        started.set()
        await free.wait()

    near, far = (make_queue(backend, note=note) for backend in (nats_backend, distant))
    await far._assets.declare_all()
    with anyio.fail_after(PATIENCE):
        async with running(near):
            relay.lose_answer(BUCKET)
            async with anyio.create_task_group() as group:
                group.start_soon(later.run, lambda: add_custom_flow(far))
                await started.wait()  # the second one is still parked, and refuses the repetition
                await relay.cut()
            free.set()
            await near.wait_for("second")
    assert later.error is None


async def test_a_job_that_another_promoter_made_ready_and_that_has_run_does_not_become_ready_again(
    nats_backend: NATSBackend, distant: NATSBackend, relay: Relay
) -> None:
    runs, busy, free = Runs(), anyio.Event(), anyio.Event()

    async def block() -> None:
        busy.set()
        await free.wait()

    near, far = (
        make_queue(backend, concurrency=1, note=runs.__call__, block=block)
        for backend in (nats_backend, distant)
    )
    with anyio.fail_after(PATIENCE):
        async with running(far):
            await near.add("block")
            await busy.wait()  # it promotes, and does not run
            relay.lose_answer(rb"PUB amq\.work\.ready")
            job_id = await near.add("note", ["a"], job_id="own")
            await relay.lost.wait()
            async with running(near):
                await near.wait_for(job_id)
                await relay.cut()
                free.set()
                await wait_until_done(near)
    assert runs.counts == {"a": 1}


async def test_a_job_that_was_not_cancelled_is_not_reported_as_cancelled(
    nats_backend: NATSBackend, distant: NATSBackend, relay: Relay
) -> None:
    """The first sending was lost, and the repetition refused by a marker.

    The marker is of the process that moved the job.
    """
    near, far = (make_queue(backend) for backend in (nats_backend, distant))
    job_id = await near.add("note", delay=3600)
    await far._assets.declare_all()
    later = Later()
    relay.lose_request(rb"PUB \$KV\.amq_work_scheduler\.done")
    with anyio.fail_after(PATIENCE):
        async with anyio.create_task_group() as group:
            group.start_soon(later.run, lambda: far.cancel_job(job_id))
            await relay.lost.wait()
            key = f"$KV.amq_work_scheduler.later.{job_id}.delayed"
            await nats_backend.write("KV_amq_work_scheduler", Write(key, b"", marker=True, ttl=60))
            await relay.cut()
    assert (later.result, later.error) == (False, None)
    assert await near.get_job_state(job_id) != "cancelled"


# -- signals


@pytest.mark.parametrize("connected", [True, False])
async def test_a_subscription_outlives_the_connection_on_which_it_was_begun(
    connected: bool, nats_backend: NATSBackend, distant: NATSBackend, relay: Relay
) -> None:
    heard, later = anyio.Event(), Later()

    async def is_reconnecting() -> bool:
        return distant._require_connection().client.is_reconnecting

    with anyio.fail_after(PATIENCE):
        async with anyio.create_task_group() as group:
            if connected:
                relay.lose_answer(b"SUB news")
            else:
                await relay.cut()
                await until(is_reconnecting, bool)
            group.start_soon(later.run, lambda: distant.subscribe("news", lambda _: heard.set()))
            if connected:
                await relay.lost.wait()
                await relay.cut()
        assert later.error is None
        await nats_backend.publish("news")
        await heard.wait()


async def test_a_subscription_without_an_answer_is_an_error(relay: Relay) -> None:
    async with NATSBackend(relay.url, settings=Settings(publish_timeout=0.1)) as backend:
        relay.lose_answer(b"SUB news")
        with (
            anyio.fail_after(PATIENCE),
            pytest.raises(Unconfirmed, match="the subscription to news was not answered within"),
        ):
            await backend.subscribe("news", lambda _: None)


async def test_a_subscription_ends_with_its_backend(distant: NATSBackend, relay: Relay) -> None:
    later = Later()
    relay.lose_answer(b"SUB news")
    with anyio.fail_after(PATIENCE):
        async with anyio.create_task_group() as group:
            group.start_soon(later.run, lambda: distant.subscribe("news", lambda _: None))
            await relay.lost.wait()
            await distant.close()
    assert isinstance(later.error, ConnectionLost)


# -- closing


@pytest.mark.parametrize("size", [1, 2])
async def test_a_write_under_way_ends_with_its_backend(
    size: int, notes: NATSBackend, distant: NATSBackend, relay: Relay
) -> None:
    writes = [Write(f"notes.{number}", b"") for number in range(size)]
    later = Later()
    relay.lose_answer(rb"PUB notes\.")
    with anyio.fail_after(PATIENCE):
        async with anyio.create_task_group() as group:
            group.start_soon(later.run, lambda: distant.write("notes", *writes))
            await relay.lost.wait()
            await distant.close()
    assert isinstance(later.error, ConnectionLost)


async def test_a_send_under_way_is_settled_when_its_backend_closes(
    notes: NATSBackend, distant: NATSBackend, relay: Relay
) -> None:
    settled: list[Settled] = []
    relay.lose_answer(rb"PUB notes\.")
    distant.send("notes", Write("notes.a", b""), settled.append)
    with anyio.fail_after(PATIENCE):
        await relay.lost.wait()
        await distant.close()
    assert [type(result) for result in settled] == [ConnectionLost]


@pytest.mark.parametrize("deaf", [False, True])
async def test_many_removals_whose_answers_are_lost_are_repeated(
    deaf: bool, notes: NATSBackend, distant: NATSBackend, relay: Relay
) -> None:
    count = 1_500
    for start in range(0, count, 500):
        await notes.write("notes", *(Write(f"notes.{start + n}", b"") for n in range(500)))
    await distant.connect()
    (relay.lose_request if deaf else relay.lose_answer)(rb"MSG\.DELETE")
    later = Later()
    with anyio.fail_after(PATIENCE):
        async with anyio.create_task_group() as group:
            sequences = range(1, count + 1)
            group.start_soon(later.run, lambda: distant.delete_many("notes", sequences))
            await relay.lost.wait()
            await relay.cut()
    assert later.error is None
    assert later.result == list(range(1, count + 1))
    assert await notes.count("notes") == 0


async def test_a_removal_under_way_opens_no_closed_backend(
    nats_backend: NATSBackend, server: EmbeddedServer
) -> None:
    later = Later()

    async def is_connected() -> bool:
        return nats_backend._require_connection().client.is_connected

    server.kill()
    await until(is_connected, lambda connected: not connected)
    with anyio.fail_after(PATIENCE):
        async with anyio.create_task_group() as group:
            group.start_soon(later.run, lambda: nats_backend.delete_many("notes", [1, 2]))
            await anyio.wait_all_tasks_blocked()
            await nats_backend.close()
            server.start()
    assert isinstance(later.error, ConnectionLost)
    assert nats_backend._connection is None
