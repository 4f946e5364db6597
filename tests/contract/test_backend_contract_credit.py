"""The promises about credit, pullers and pauses, for every backend.

See `test_backend_contract.py`.
"""

import time
from functools import partial

import anyio
import pytest

from asyncmq_nats.backends.base import Backend, Consumer, ConsumerState, Log, Write
from tests.receiver import PATIENCE, Receiver, until

SHORT = 0.1
JOBS = Log("jobs", ("jobs.>",), work_queue=True)
ONE = Consumer("one", ("jobs.1.*",), lease=60)
TWO = Consumer("two", ("jobs.2.*",), lease=60)


@pytest.fixture(autouse=True)
async def jobs(backend: Backend) -> None:
    await backend.declare_log(JOBS)
    for consumer in (ONE, TWO):
        await backend.declare_consumer("jobs", consumer)


@pytest.fixture
async def receiver(backend: Backend) -> Receiver:
    return Receiver(backend, "jobs")


async def add(backend: Backend, *names: str) -> int:
    return await backend.write("jobs", *(Write(f"jobs.{name}", name.encode()) for name in names))


async def look_up(backend: Backend, consumer: str) -> ConsumerState:
    state = await backend.look_up("jobs", consumer)
    assert state is not None
    return state


# -- credit


def heard_more(receiver: Receiver, lapses: int) -> bool:
    return bool(receiver.deliveries) or len(receiver.lapses) > lapses


async def test_without_credit_nothing_is_delivered(backend: Backend, receiver: Receiver) -> None:
    await add(backend, "1.a", "2.a")
    await receiver.pull("two")
    await until(lambda: look_up(backend, "one"), lambda state: state.pending == 1)
    assert len(receiver.deliveries) == 1


async def test_a_puller_that_is_answered_is_not_silent(
    backend: Backend, receiver: Receiver
) -> None:
    assert receiver.puller.silent_for == 0.0
    await receiver.pull_rest("one", wait=SHORT)
    assert receiver.puller.silent_for == 0.0
    await add(backend, "1.a")
    await receiver.pull("one")
    assert receiver.puller.silent_for == 0.0
    await receiver.puller.close()
    assert receiver.puller.silent_for == 0.0


async def test_credit_is_never_exceeded(backend: Backend, receiver: Receiver) -> None:
    await add(backend, *(f"1.{number:03}" for number in range(50)))
    await receiver.puller.request("one", 3, wait=PATIENCE)
    await receiver.puller.request("one", 4, wait=PATIENCE)
    assert receiver.puller.outstanding("one") <= 7
    assert [delivery.sequence for delivery in await receiver.take(7)] == list(range(1, 8))
    assert receiver.puller.outstanding("one") == 0
    await until(
        lambda: look_up(backend, "one"), lambda state: (state.pending, state.leased) == (43, 7)
    )
    assert len(receiver.deliveries) == 7
    assert receiver.lapses == []


async def test_a_waiting_request_is_served_when_records_come(
    backend: Backend, twin: Backend, receiver: Receiver
) -> None:
    await receiver.puller.request("one", 2, wait=PATIENCE)
    await add(twin, "1.a")
    (first,) = await receiver.take()
    assert receiver.puller.outstanding("one") == 1
    await add(twin, "1.b")
    (second,) = await receiver.take()
    assert (first.body, second.body) == (b"1.a", b"1.b")
    assert receiver.puller.outstanding("one") == 0


async def test_pulls_that_wait_are_counted_of_all_workers(
    backend: Backend, twin: Backend, receiver: Receiver
) -> None:
    other = Receiver(twin, "jobs")

    async def waiting(count: int) -> None:
        await until(lambda: look_up(backend, "one"), lambda state: state.waiting_pulls == count)

    await waiting(0)
    await receiver.puller.request("one", 3, wait=PATIENCE)
    await waiting(1)
    await other.puller.request("one", 1, wait=PATIENCE)
    await other.puller.request("one", 5, wait=PATIENCE)
    await other.puller.request("two", 1, wait=PATIENCE)
    await waiting(3)
    await receiver.puller.withdraw()
    await waiting(2)
    await add(backend, *(f"1.{number}" for number in range(6)))
    await other.take(6)
    await waiting(0)
    await receiver.puller.request("one", 1, wait=SHORT)
    await receiver.wait_for(lambda: bool(receiver.lapses))
    await waiting(0)


async def test_credit_that_is_withdrawn_brings_nothing(
    backend: Backend, receiver: Receiver
) -> None:
    await add(backend, "1.a")
    await receiver.puller.request("one", 3, wait=PATIENCE)
    await receiver.take()
    await receiver.puller.withdraw()
    assert receiver.puller.outstanding("one") == 0
    await add(backend, "1.b")
    # Credit of the first puller would be served first.
    (second,) = await Receiver(backend, "jobs").pull("one")
    assert (second.body, second.deliveries) == (b"1.b", 1)
    assert (len(receiver.deliveries), receiver.lapses) == (1, [])
    await add(backend, "1.c")
    await receiver.puller.request("one", 1, wait=PATIENCE)
    (third,) = await receiver.take()
    assert (third.body, third.deliveries) == (b"1.c", 1)


async def test_what_is_on_its_way_comes_before_credit_is_withdrawn(
    backend: Backend, receiver: Receiver
) -> None:
    await add(backend, *(f"1.{number}" for number in range(50)))
    await receiver.puller.request("one", 80, wait=PATIENCE)
    await receiver.puller.withdraw()
    came = len(receiver.deliveries)
    assert (await look_up(backend, "one")).leased == came
    rest = await Receiver(backend, "jobs").pull_rest("one")
    assert len(rest) == 50 - came
    assert len(receiver.deliveries) == came


async def test_a_puller_that_closes_while_credit_is_withdrawn_delivers_all_that_was_on_its_way(
    backend: Backend,
) -> None:
    for number in range(10):
        await add(backend, *(f"1.{number}-{place}" for place in range(50)))
        receiver = Receiver(backend, "jobs")
        await receiver.puller.request("one", 30, wait=PATIENCE)
        async with anyio.create_task_group() as group:
            group.start_soon(receiver.puller.withdraw)
            await anyio.lowlevel.checkpoint()
            await receiver.puller.close()
            came = len(receiver.deliveries)
        assert len(receiver.deliveries) == came
        rest = await Receiver(backend, "jobs").pull("one", 50 - came)
        # Also what the server could not deliver any more comes for the first time now.
        assert {delivery.deliveries for delivery in rest} == {1}
        assert len({delivery.sequence for delivery in [*receiver.deliveries, *rest]}) == 50
        for delivery in [*receiver.deliveries, *rest]:
            delivery.ack()


async def test_credit_lapses_after_its_time(backend: Backend, receiver: Receiver) -> None:
    await add(backend, "1.a")
    start = time.monotonic()
    await receiver.puller.request("one", 3, wait=0.3)
    await receiver.wait_for(lambda: receiver.lapses == ["one"])
    assert time.monotonic() - start > 0.29
    assert len(receiver.deliveries) == 1
    assert receiver.puller.outstanding("one") == 0
    await add(backend, "1.b")
    await until(lambda: look_up(backend, "one"), lambda state: state.pending == 1)


async def test_a_request_without_wait_takes_what_is_there(
    backend: Backend, receiver: Receiver
) -> None:
    await add(backend, "1.a", "1.b")
    await receiver.puller.request("one", 5, wait=0)
    await receiver.wait_for(lambda: receiver.lapses == ["one"])
    assert [delivery.body for delivery in receiver.deliveries] == [b"1.a", b"1.b"]
    assert receiver.puller.outstanding("one") == 0


async def test_callbacks_never_come_from_inside_a_request(backend: Backend) -> None:
    await add(backend, "1.a")
    inside = False
    seen: list[bool] = []
    done = anyio.Event()

    def note() -> None:
        seen.append(inside)
        if len(seen) == 2:
            done.set()

    puller = backend.puller("jobs", lambda _: note(), lambda _: note())
    inside = True
    await puller.request("one", 2, wait=0)
    inside = False
    with anyio.fail_after(PATIENCE):
        await done.wait()
    assert seen == [False, False]


async def test_one_puller_serves_many_consumers(backend: Backend, receiver: Receiver) -> None:
    await add(backend, "1.a", "2.a")
    await receiver.puller.request("one", 2, wait=PATIENCE)
    await receiver.puller.request("two", 3, wait=PATIENCE)
    deliveries = await receiver.take(2)
    assert sorted((delivery.consumer, delivery.body) for delivery in deliveries) == [
        ("one", b"1.a"),
        ("two", b"2.a"),
    ]
    assert (
        receiver.puller.outstanding("one"),
        receiver.puller.outstanding("two"),
        receiver.puller.outstanding("none"),
    ) == (1, 2, 0)


async def test_pullers_share_what_comes(backend: Backend, twin: Backend) -> None:
    receivers = [Receiver(backend, "jobs"), Receiver(twin, "jobs")]
    for receiver in receivers:
        await receiver.puller.request("one", 10, wait=PATIENCE)
    for handle in (backend, twin):
        await handle.list_logs("")  # an answer says that the requests before it are in
    await add(backend, *(f"1.{number}" for number in range(10)))
    for receiver in receivers:
        await receiver.take(5)
    sequences = [delivery.sequence for receiver in receivers for delivery in receiver.deliveries]
    assert sorted(sequences) == list(range(1, 11))


async def test_a_request_for_a_missing_consumer_lapses(receiver: Receiver) -> None:
    await receiver.puller.request("none", 2, wait=PATIENCE)
    await receiver.wait_for(lambda: receiver.lapses == ["none"])
    assert receiver.puller.outstanding("none") == 0


async def test_credit_lapses_with_its_consumer_which_is_declared_again(
    backend: Backend, twin: Backend, receiver: Receiver
) -> None:
    await receiver.puller.request("one", 2, wait=60)
    await backend.list_logs("")
    await twin.delete_log("jobs")
    await twin.declare_log(JOBS)
    await add(twin, "1.a")
    # A server that says nothing when the stream goes is noticed by its silence: two heartbeats,
    # some grace and a look, 13 s in all.
    await receiver.wait_for(lambda: "one" in receiver.lapses, patience=20)
    assert receiver.puller.outstanding("one") == 0
    with anyio.fail_after(PATIENCE):
        while not receiver.deliveries:
            lapses = len(receiver.lapses)
            await receiver.puller.request("one", 2, wait=1)
            await receiver.wait_for(partial(heard_more, receiver, lapses))
    assert receiver.deliveries[0].body == b"1.a"


async def test_a_closed_puller_hands_back_what_comes(
    backend: Backend, twin: Backend, receiver: Receiver
) -> None:
    await receiver.puller.request("one", 5, wait=PATIENCE)
    await backend.list_logs("")
    await receiver.puller.close()
    assert receiver.puller.outstanding("one") == 0
    await add(backend, "1.a", "1.b", "1.c")
    other = Receiver(twin, "jobs")
    deliveries = await other.pull("one", 3)
    assert sorted(delivery.body for delivery in deliveries) == [b"1.a", b"1.b", b"1.c"]
    assert receiver.deliveries == []


# -- pauses


async def test_pause_stops_deliveries_and_not_leases(backend: Backend, receiver: Receiver) -> None:
    await add(backend, "1.a", "1.b", "2.a")
    (in_hand,) = await receiver.pull("one")
    await backend.pause("jobs", "one", backend.now() + 60)
    assert (await look_up(backend, "one")).paused
    assert await receiver.pull_rest("one") == []
    assert await receiver.pull_rest("one", wait=SHORT) == []
    assert [delivery.body for delivery in await receiver.pull("two")] == [b"2.a"]
    in_hand.ack()
    await until(
        lambda: look_up(backend, "one"), lambda state: (state.pending, state.leased) == (1, 0)
    )


async def test_a_pause_holds_redeliveries_back(backend: Backend, receiver: Receiver) -> None:
    await add(backend, "1.a")
    (delivery,) = await receiver.pull("one")
    await backend.pause("jobs", "one", backend.now() + 60)
    delivery.nak()
    assert await receiver.pull_rest("one", wait=SHORT) == []


async def test_after_a_resume_a_new_request_is_served(
    backend: Backend, twin: Backend, receiver: Receiver
) -> None:
    await backend.pause("jobs", "one", backend.now() + 60)
    await add(backend, "1.a")
    await twin.resume("jobs", "one")
    assert not (await look_up(backend, "one")).paused
    await receiver.pull("one")


async def test_a_resume_serves_the_credit_requested_before(
    backend: Backend, twin: Backend, receiver: Receiver
) -> None:
    await receiver.puller.request("one", 1, wait=PATIENCE)
    await backend.pause("jobs", "one", backend.now() + 60)
    await add(backend, "1.a")
    await twin.resume("jobs", "one")
    await receiver.take()


async def test_a_pause_ends_by_itself(backend: Backend, receiver: Receiver) -> None:
    until_time = backend.now() + 0.4
    await backend.pause("jobs", "one", until_time)
    await receiver.puller.request("one", 1, wait=PATIENCE)
    await add(backend, "1.a")
    await receiver.take()
    assert backend.now() > until_time - 0.05
    assert not (await look_up(backend, "one")).paused


async def test_a_consumer_may_begin_paused(backend: Backend, receiver: Receiver) -> None:
    await backend.declare_consumer(
        "jobs", Consumer("three", ("jobs.3.*",), lease=60, paused_until=backend.now() + 60)
    )
    await add(backend, "3.a")
    assert (await look_up(backend, "three")).paused
    assert await receiver.pull_rest("three", wait=SHORT) == []
    await backend.resume("jobs", "three")
    await receiver.pull("three")
