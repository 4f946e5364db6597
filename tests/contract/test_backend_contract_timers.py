"""The promises about timers, times to live and counters, for every backend.

See `test_backend_contract.py`.
"""

import pytest

from asyncmq_nats.backends.base import (
    Backend,
    Consumer,
    ConsumerState,
    Expect,
    Log,
    Record,
    Timer,
    Write,
)
from asyncmq_nats.exceptions import BackendError
from tests.receiver import until

NOTES = Log("notes", ("notes.>",), timers=True)
GRID = 0.25
"""How late a timer may be."""


@pytest.fixture(autouse=True)
async def notes(backend: Backend) -> None:
    await backend.declare_log(NOTES)


async def subjects(backend: Backend, filter: str = "notes.>") -> list[str]:
    return [record.subject for record in await backend.last("notes", filter)]


async def counted(backend: Backend) -> int:
    state = await backend.look_up("notes", "counter")
    assert state is not None
    return state.pending


async def wait_for_record(backend: Backend, subject: str) -> Record:
    found = await until(lambda: backend.last("notes", subject), bool)
    return found[0]


# -- times to live


async def test_ttl_removes(backend: Backend) -> None:
    await backend.declare_consumer("notes", Consumer("counter", ("notes.>",)))
    start = backend.now()
    await backend.write("notes", Write("notes.a", b"", ttl=1), Write("notes.b", b""))
    await until(lambda: counted(backend), lambda count: count == 2)
    await until(lambda: counted(backend), lambda count: count == 1)
    assert backend.now() >= start + 1 - 0.05
    assert await subjects(backend) == ["notes.b"]


async def test_overwriting_ends_a_ttl(backend: Backend) -> None:
    await backend.write("notes", Write("notes.a", b"", ttl=1))
    await backend.write("notes", Write("notes.a", b"stays"))
    await backend.write("notes", Write("notes.fence", b"", ttl=1))
    await until(lambda: subjects(backend, "notes.fence"), lambda found: not found)
    assert await subjects(backend) == ["notes.a"]


# -- timers


async def test_timer_writes_its_target(backend: Backend) -> None:
    at = backend.now() + 0.4
    carrier = await backend.write(
        "notes", Write("notes.a.delayed", b"body", timer=Timer(at, "notes.a.released"))
    )
    assert await subjects(backend) == ["notes.a.delayed"]
    record = await wait_for_record(backend, "notes.a.released")
    assert record == Record("notes.a.released", b"body", record.sequence, record.time)
    assert record.sequence > carrier
    assert at - 0.01 <= record.time <= at + GRID + 0.5
    await until(lambda: subjects(backend), lambda found: found == ["notes.a.released"])


async def test_a_timer_of_the_past_goes_off_at_once(backend: Backend) -> None:
    await backend.write(
        "notes", Write("notes.a.delayed", b"", timer=Timer(backend.now() - 60, "notes.a.released"))
    )
    await wait_for_record(backend, "notes.a.released")
    await until(lambda: subjects(backend), lambda found: found == ["notes.a.released"])


async def test_a_timer_replaces_the_record_of_its_target(backend: Backend) -> None:
    await backend.write("notes", Write("notes.released", b"old"))
    await backend.write(
        "notes", Write("notes.delayed", b"new", timer=Timer(backend.now() + 0.2, "notes.released"))
    )
    await until(
        lambda: backend.last("notes", "notes.>"),
        lambda found: [record.body for record in found] == [b"new"],
    )


async def pass_time(backend: Backend, at: float) -> None:
    """Wait until a timer of `at`, and so every earlier one, has gone off."""
    await backend.write("notes", Write("notes.fence", b"", timer=Timer(at, "notes.passed")))
    await wait_for_record(backend, "notes.passed")


async def test_overwriting_a_timer_replaces_it(backend: Backend) -> None:
    soon, later = backend.now() + 0.3, backend.now() + 1.2
    await backend.write("notes", Write("notes.delayed", b"1", timer=Timer(soon, "notes.soon")))
    await backend.write("notes", Write("notes.delayed", b"2", timer=Timer(later, "notes.later")))
    record = await wait_for_record(backend, "notes.later")
    assert record.body == b"2"
    assert record.time >= later - 0.01
    await until(lambda: subjects(backend), lambda found: found == ["notes.later"])


async def test_overwriting_a_timer_with_a_plain_record_ends_it(backend: Backend) -> None:
    at = backend.now() + 0.3
    await backend.write("notes", Write("notes.delayed", b"1", timer=Timer(at, "notes.released")))
    await backend.write("notes", Write("notes.delayed", b"2"))
    await pass_time(backend, at + 2 * GRID)
    assert await subjects(backend, "notes.delayed") == ["notes.delayed"]
    assert await subjects(backend, "notes.released") == []


@pytest.mark.parametrize("way", ["delete", "purge"])
async def test_removing_a_timer_ends_it(backend: Backend, way: str) -> None:
    at = backend.now() + 0.3
    sequence = await backend.write(
        "notes", Write("notes.delayed", b"1", timer=Timer(at, "notes.released"))
    )
    if way == "delete":
        await backend.delete("notes", sequence)
    else:
        await backend.purge("notes", "notes.delayed")
    await pass_time(backend, at + 2 * GRID)
    assert await subjects(backend, "notes.released") == []


async def test_removes_takes_the_timer_away(backend: Backend) -> None:
    at = backend.now() + 0.3
    carrier = await backend.write(
        "notes", Write("notes.a.delayed", b"1", timer=Timer(at, "notes.a.released"))
    )
    now = Write(
        "notes.a.released", b"now", expect=Expect("notes.a.>", carrier), removes="notes.a.delayed"
    )
    sequence = await backend.write("notes", now)
    assert await subjects(backend) == ["notes.a.released"]
    await pass_time(backend, at + 2 * GRID)
    assert [
        (record.body, record.sequence) for record in await backend.last("notes", "notes.a.>")
    ] == [(b"now", sequence)]


async def test_removes_of_nothing_is_just_a_write(backend: Backend) -> None:
    await backend.write("notes", Write("notes.released", b"", removes="notes.none"))
    assert await subjects(backend) == ["notes.released"]


@pytest.mark.parametrize("target", ["elsewhere.released", "notes.delayed"])
async def test_a_timer_cannot_leave_its_log_nor_write_to_itself(
    backend: Backend, target: str
) -> None:
    with pytest.raises(BackendError):
        await backend.write(
            "notes", Write("notes.delayed", b"", timer=Timer(backend.now() + 60, target))
        )
    assert await subjects(backend) == []


async def test_a_log_without_timers_takes_neither_timer_nor_ttl(backend: Backend) -> None:
    await backend.declare_log(Log("plain", ("plain.>",)))
    for write in (
        Write("plain.a", b"", ttl=60),
        Write("plain.a", b"", timer=Timer(backend.now() + 60, "plain.b")),
    ):
        with pytest.raises(BackendError):
            await backend.write("plain", write)
    assert await backend.last("plain", "plain.>") == []


async def test_a_batch_may_carry_timers_and_ttls(backend: Backend) -> None:
    at = backend.now() + 0.3
    await backend.write(
        "notes",
        Write("notes.tick", b"next", timer=Timer(at, "notes.fire"), expect=Expect("notes.fire")),
        Write("notes.fired", b"", marker=True, ttl=1),
    )
    await wait_for_record(backend, "notes.fire")
    await until(lambda: subjects(backend), lambda found: found == ["notes.fire"])


# -- counters


async def test_counter_counts_overwrites_deletions_purges_and_timers(backend: Backend) -> None:
    await backend.declare_consumer(
        "notes", Consumer("counter", ("notes.*.released", "notes.*.parked"))
    )
    await backend.write("notes", *(Write(f"notes.{number}.parked", b"") for number in range(4)))
    await until(lambda: counted(backend), lambda count: count == 4)
    sequence = await backend.write("notes", Write("notes.0.parked", b"again"))
    await until(lambda: counted(backend), lambda count: count == 4)
    await backend.delete("notes", sequence)
    await until(lambda: counted(backend), lambda count: count == 3)
    await backend.purge("notes", "notes.1.>")
    await until(lambda: counted(backend), lambda count: count == 2)
    await backend.write(
        "notes", Write("notes.4.delayed", b"", timer=Timer(backend.now(), "notes.4.released"))
    )
    await until(
        lambda: backend.look_up("notes", "counter"), lambda state: state == ConsumerState(3, 0, 0)
    )


@pytest.mark.parametrize("filter", ["notes.1.>", "notes.*.parked", "notes.1.parked", "notes.1.*"])
async def test_counter_counts_the_purge_of_a_single_record(backend: Backend, filter: str) -> None:
    await backend.declare_consumer("notes", Consumer("counter", ("notes.*.parked",)))
    # nats-server 2.15.1 forgets to count what a filter with wildcards removes if that is exactly
    # one record. It finds that out by itself if it counts more than the log has, hence the others.
    await backend.write(
        "notes",
        *(Write(f"notes.{number}.delayed", b"") for number in range(2, 9)),
        Write("notes.1.parked", b""),
    )
    assert await backend.purge("notes", filter) == 1
    await until(lambda: counted(backend), lambda count: count == 0)


async def test_counter_counts_the_purge_of_all_but_the_last_or_up_to_a_sequence(
    backend: Backend,
) -> None:
    await backend.declare_consumer("notes", Consumer("counter", ("notes.*.parked",)))
    await backend.write(
        "notes", *(Write(f"notes.{number}.delayed", b"") for number in range(10, 20))
    )
    await backend.write("notes", *(Write(f"notes.{number}.parked", b"") for number in range(5)))
    assert await backend.purge("notes", "notes.*.parked", keep=4) == 1
    await until(lambda: counted(backend), lambda count: count == 4)
    assert await backend.purge("notes", "notes.*.parked", before=13) == 1
    await until(lambda: counted(backend), lambda count: count == 3)
    assert await backend.purge("notes", "notes.*.parked", keep=1) == 2
    await until(lambda: counted(backend), lambda count: count == 1)
