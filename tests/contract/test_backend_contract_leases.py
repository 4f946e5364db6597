"""The promises about consumers, deliveries and leases, for every backend.

See `test_backend_contract.py`.
"""

import time
from dataclasses import replace

import pytest

from asyncmq_nats.backends.base import Backend, Consumer, ConsumerState, Log, Write
from asyncmq_nats.exceptions import BackendError
from asyncmq_nats.settings import Settings
from tests.receiver import Receiver, until

LEASE = 0.5
SHORT = 0.1
JOBS = Log("jobs", ("jobs.>",), work_queue=True)
ONE = Consumer("one", ("jobs.1.*",), lease=60)
RUSHED = Consumer("rushed", ("jobs.9.*",), lease=LEASE)
HELD = Consumer("held", ("jobs.8.*",), lease=2 * LEASE)
NEWS = Log("news", ("news.>",))


@pytest.fixture
def settings() -> Settings:
    return Settings(stalled_after=LEASE)


@pytest.fixture(autouse=True)
async def jobs(backend: Backend) -> None:
    await backend.declare_log(JOBS)
    for consumer in (ONE, RUSHED, HELD):
        await backend.declare_consumer("jobs", consumer)


@pytest.fixture
async def receiver(backend: Backend) -> Receiver:
    return Receiver(backend, "jobs")


async def add(backend: Backend, *names: str) -> int:
    return await backend.write("jobs", *(Write(f"jobs.{name}", name.encode()) for name in names))


async def look_up(backend: Backend, consumer: str, log: str = "jobs") -> ConsumerState:
    state = await backend.look_up(log, consumer)
    assert state is not None
    return state


async def wait_until_empty(backend: Backend) -> None:
    await until(lambda: backend.last("jobs", "jobs.>"), lambda found: not found)


# -- declaring


async def test_declaring_a_consumer_again_is_harmless(
    backend: Backend, twin: Backend, caplog: pytest.LogCaptureFixture
) -> None:
    for handle in (backend, twin):
        await handle.declare_consumer("jobs", ONE)
        await handle.declare_consumer("jobs", replace(ONE, paused_until=backend.now() + 60))
    assert caplog.records == []
    assert not (await look_up(backend, "one")).paused


async def test_a_consumer_with_other_settings_stays_and_a_warning_names_the_difference(
    twin: Backend, caplog: pytest.LogCaptureFixture
) -> None:
    await twin.declare_consumer("jobs", replace(ONE, filters=("jobs.11.*",)))
    (warning,) = caplog.records
    assert warning.levelname == "WARNING"
    assert "jobs.11.*" in warning.getMessage()
    await add(twin, "11.a", "1.a")
    await until(lambda: look_up(twin, "one"), lambda state: state.pending == 1)


async def test_list_consumers_is_sorted(backend: Backend) -> None:
    assert await backend.list_consumers("jobs") == ["held", "one", "rushed"]


async def test_look_up_of_no_consumer_is_none(backend: Backend) -> None:
    assert await backend.look_up("jobs", "none") is None


async def test_consumers_of_a_work_queue_must_not_overlap(backend: Backend) -> None:
    with pytest.raises(BackendError):
        await backend.declare_consumer("jobs", Consumer("overlapping", ("jobs.*.a",), lease=60))


async def test_a_consumer_begins_with_the_oldest_record(
    backend: Backend, receiver: Receiver
) -> None:
    await add(backend, "3.a", "3.b", "4.a", "3.c")
    await backend.declare_consumer("jobs", Consumer("three", ("jobs.3.*",), lease=60))
    assert [delivery.body for delivery in await receiver.pull("three", 3)] == [
        b"3.a",
        b"3.b",
        b"3.c",
    ]


async def test_a_consumer_takes_what_matches_any_filter(backend: Backend) -> None:
    await backend.declare_log(NEWS)
    await backend.declare_consumer(
        "news", Consumer("promoter", ("news.later.*.released", "news.fire.*"), lease=60)
    )
    names = ("news.fire.a", "news.later.a.delayed", "news.later.a.released", "news.fire.a.b")
    await backend.write("news", *(Write(name, b"") for name in names))
    receiver = Receiver(backend, "news")
    assert [delivery.subject for delivery in await receiver.pull_rest("promoter", wait=SHORT)] == [
        "news.fire.a",
        "news.later.a.released",
    ]


# -- deliveries


async def test_a_delivery_tells_all_about_its_record(backend: Backend, receiver: Receiver) -> None:
    await add(backend, "1.a", "2.a", "1.b")
    deliveries = await receiver.pull("one", 2)
    (record,) = await backend.last("jobs", "jobs.1.a")
    first, second = deliveries
    assert (first.subject, first.body, first.sequence) == (
        record.subject,
        record.body,
        record.sequence,
    )
    assert first.time == pytest.approx(record.time, abs=1e-4)
    assert [
        (each.sequence, each.deliveries, each.consumer, each.pending) for each in (first, second)
    ] == [
        (1, 1, "one", 1),
        (3, 1, "one", 0),
    ]


async def test_look_up_knows_what_waits_and_what_is_leased(
    backend: Backend, receiver: Receiver
) -> None:
    await add(backend, "1.a", "1.b", "1.c")
    await until(
        lambda: look_up(backend, "one"),
        lambda state: state == ConsumerState(pending=3, leased=0, delivered_sequence=0),
    )
    first, _ = await receiver.pull("one", 2)
    await until(
        lambda: look_up(backend, "one"),
        lambda state: state == ConsumerState(pending=1, leased=2, delivered_sequence=2),
    )
    first.ack()
    assert (
        await until(lambda: look_up(backend, "one"), lambda state: state.leased == 1)
    ).delivered_sequence == 2


async def test_ack_removes_from_a_work_queue(backend: Backend, receiver: Receiver) -> None:
    await add(backend, "1.a")
    (delivery,) = await receiver.pull("one")
    delivery.ack()
    delivery.ack()
    await wait_until_empty(backend)
    await until(lambda: look_up(backend, "one"), lambda state: state == ConsumerState(0, 0, 1))


async def test_ack_leaves_the_record_in_any_other_log(backend: Backend) -> None:
    await backend.declare_log(NEWS)
    await backend.declare_consumer("news", Consumer("reader", ("news.>",), lease=LEASE))
    await backend.write("news", Write("news.a", b""))
    receiver = Receiver(backend, "news", extend=False)
    (delivery,) = await receiver.pull("reader")
    delivery.ack()
    assert await receiver.pull_rest("reader", wait=2 * LEASE) == []
    await until(
        lambda: look_up(backend, "reader", "news"), lambda state: state == ConsumerState(0, 0, 1)
    )
    assert len(await backend.last("news", "news.>")) == 1


async def test_silence_redelivers(backend: Backend, twin: Backend) -> None:
    silent = Receiver(backend, "jobs", extend=False)
    await add(backend, "9.a")
    start = time.monotonic()
    (first,) = await silent.pull("rushed")
    (second,) = await Receiver(twin, "jobs").pull("rushed")
    assert time.monotonic() - start > LEASE * 0.8
    assert (first.sequence, first.deliveries, second.sequence, second.deliveries) == (1, 1, 1, 2)


async def test_a_held_delivery_is_extended_while_the_event_loop_is_blocked(
    backend: Backend, twin: Backend
) -> None:
    await add(backend, "8.a")
    (delivery,) = await Receiver(backend, "jobs").pull("held")
    time.sleep(2.5 * LEASE)  # noqa: ASYNC251  the loop is to be blocked
    assert await Receiver(twin, "jobs").pull_rest("held", wait=2.5 * LEASE) == []
    delivery.ack()
    await wait_until_empty(backend)


async def test_an_abandoned_delivery_is_delivered_again(
    backend: Backend, receiver: Receiver
) -> None:
    await add(backend, "9.a")
    (delivery,) = await receiver.pull("rushed")
    delivery.abandon()
    delivery.abandon()
    (again,) = await receiver.pull("rushed")
    assert again.deliveries == 2


async def test_nak_redelivers_at_once(backend: Backend, receiver: Receiver) -> None:
    await add(backend, "1.a")
    (delivery,) = await receiver.pull("one")
    delivery.nak()
    (again,) = await receiver.pull("one")
    assert (again.sequence, again.deliveries) == (1, 2)


async def test_nak_with_delay_redelivers_after_it(backend: Backend, receiver: Receiver) -> None:
    await add(backend, "1.a")
    (delivery,) = await receiver.pull("one")
    start = time.monotonic()
    delivery.nak(0.3)
    assert (await look_up(backend, "one")).leased == 1
    (again,) = await receiver.pull("one")
    assert time.monotonic() - start > 0.29
    assert again.deliveries == 2


async def test_redelivery_precedes_new_records(backend: Backend, receiver: Receiver) -> None:
    await add(backend, "1.a", "1.b", "1.c")
    first, second = await receiver.pull("one", 2)
    # A server takes a request and a nak in either order; by the end of the pause it has taken both.
    await backend.pause("jobs", "one", backend.now() + LEASE)
    first.nak()
    second.nak()
    again = await receiver.pull("one", 3)
    assert [(delivery.body, delivery.deliveries) for delivery in again] == [
        (b"1.a", 2),
        (b"1.b", 2),
        (b"1.c", 1),
    ]


async def test_late_ack_is_accepted(backend: Backend, twin: Backend) -> None:
    await add(backend, "9.a")
    (late,) = await Receiver(backend, "jobs", extend=False).pull("rushed")
    (current,) = await Receiver(twin, "jobs").pull("rushed")
    assert current.deliveries == 2
    late.ack()
    await wait_until_empty(backend)
    current.ack()
    await until(lambda: look_up(backend, "rushed"), lambda state: state == ConsumerState(0, 0, 1))


async def test_overwriting_a_leased_record_ends_its_lease(
    backend: Backend, receiver: Receiver
) -> None:
    await add(backend, "1.a")
    (old,) = await receiver.pull("one")
    await add(backend, "1.a")
    await until(
        lambda: look_up(backend, "one"), lambda state: (state.pending, state.leased) == (1, 0)
    )
    old.ack()
    (new,) = await receiver.pull("one")
    assert (new.sequence, new.deliveries) == (2, 1)
    await until(lambda: look_up(backend, "one"), lambda state: state == ConsumerState(0, 1, 2))


async def test_the_purge_of_a_single_record_ends_its_lease(
    backend: Backend, receiver: Receiver
) -> None:
    await add(backend, "1.leased", "1.pending", *(f"7.{number}" for number in range(9)))
    await receiver.pull("one")
    for job in ("leased", "pending"):
        assert await backend.purge("jobs", f"jobs.*.{job}") == 1
    await until(
        lambda: look_up(backend, "one"), lambda state: (state.pending, state.leased) == (0, 0)
    )


@pytest.mark.parametrize("way", ["delete", "delete_many", "purge"])
async def test_what_is_removed_is_neither_pending_nor_leased(
    backend: Backend, receiver: Receiver, way: str
) -> None:
    await add(backend, "1.a", "1.b")
    (delivery,) = await receiver.pull("one")
    if way == "delete":
        for sequence in (1, 2):
            assert await backend.delete("jobs", sequence)
    elif way == "delete_many":
        assert await backend.delete_many("jobs", [1, 2]) == [1, 2]
    else:
        assert await backend.purge("jobs", "jobs.1.*") == 2
    await until(
        lambda: look_up(backend, "one"), lambda state: (state.pending, state.leased) == (0, 0)
    )
    delivery.nak()
    assert await receiver.pull_rest("one", wait=SHORT) == []


@pytest.mark.parametrize("removed", [1, 2])
async def test_a_purge_of_all_below_a_sequence_is_counted(
    removed: int, backend: Backend, receiver: Receiver
) -> None:
    await add(backend, "1.a", "1.b", "1.c", "1.d")
    assert await backend.purge("jobs", ">", before=removed + 1) == removed
    await until(
        lambda: look_up(backend, "one"),
        lambda state: (state.pending, state.leased) == (4 - removed, 0),
    )
    left = [delivery.sequence for delivery in await receiver.pull("one", 4 - removed)]
    assert left == list(range(removed + 1, 5))


async def test_leases_of_a_closed_backend_run_out(backend: Backend, twin: Backend) -> None:
    await add(backend, "8.a")
    await Receiver(backend, "jobs").pull("held")
    await backend.close()
    await twin.connect()
    (again,) = await Receiver(twin, "jobs").pull("held")
    assert again.deliveries == 2


async def test_a_closed_puller_still_extends_what_is_in_hand(
    backend: Backend, twin: Backend
) -> None:
    await add(backend, "8.a")
    receiver = Receiver(backend, "jobs")
    (delivery,) = await receiver.pull("held")
    await receiver.puller.close()
    assert await Receiver(twin, "jobs").pull_rest("held", wait=3 * LEASE) == []
    delivery.ack()
    await wait_until_empty(backend)
