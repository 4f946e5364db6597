"""The promises of `backends/base.py` about logs, records and writes, for every backend.

The other parts of the contract: `test_backend_contract_timers.py`, `…_leases.py`, `…_credit.py`,
`…_signals.py`.
"""

import logging
import re
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import partial

import anyio
import pytest

from asyncmq_nats.backends.base import (
    Backend,
    Consumer,
    Expect,
    Log,
    Record,
    Settled,
    Signal,
    Write,
)
from asyncmq_nats.exceptions import AssetMissing, BackendError, PayloadTooLarge, WriteRefused
from tests.receiver import PATIENCE, holds, until

NOTES = Log("notes", ("notes.>",), timers=True)
KEYS = Log("KV_keys", ("$KV.keys.>",), timers=True)
"""Delete markers are a thing of keys: a header on any other record makes it none."""


@pytest.fixture(autouse=True)
async def notes(backend: Backend) -> None:
    await backend.declare_log(NOTES)


async def subjects(backend: Backend, filter: str = "notes.>") -> list[str]:
    return [record.subject for record in await backend.last("notes", filter)]


# -- life


async def test_connecting_twice_is_harmless(backend: Backend) -> None:
    await backend.connect()
    assert await backend.list_logs("") == ["notes"]


async def test_first_use_connects(make_backend: Callable[[], Backend]) -> None:
    unconnected = make_backend()
    assert await unconnected.list_logs("none") == []
    await unconnected.close()


async def test_closing_twice_is_harmless(make_backend: Callable[[], Backend]) -> None:
    unconnected = make_backend()
    await unconnected.close()
    await unconnected.connect()
    await unconnected.close()
    await unconnected.close()


async def test_a_block_of_code_connects_and_closes(make_backend: Callable[[], Backend]) -> None:
    async with make_backend() as backend:
        received: list[Signal] = []
        await backend.subscribe("news", received.append)
    await backend.publish("news")
    await backend.list_logs("")
    assert received == []
    await backend.close()


async def test_a_backend_tells_whether_it_is_connected(
    make_backend: Callable[[], Backend],
) -> None:
    backend = make_backend()
    await backend.close()
    assert not backend.is_connected
    await backend.connect()
    assert backend.is_connected
    assert 0.0 <= await backend.ping() < PATIENCE
    assert backend.reconnects == 0
    await backend.close()
    assert not backend.is_connected


async def test_a_server_is_described(backend: Backend) -> None:
    await backend.write("notes", Write("notes.a", b"12345"))
    facts = await backend.describe_server()
    if facts is not None:  # in memory there is none
        assert re.fullmatch(r"\d+\.\d+\.\d+", facts.version)
        assert backend.max_body <= facts.max_body
        assert facts.clock_offset is not None
        assert abs(facts.clock_offset) < 2
        assert facts.stored_bytes is not None
        assert facts.max_stored_bytes is None or facts.stored_bytes < facts.max_stored_bytes


async def test_to_ask_what_is_refused_has_no_effects(backend: Backend, twin: Backend) -> None:
    heard: list[Signal] = []
    await twin.subscribe("news.>", heard.append)
    state = await backend.describe_log("notes")
    assert await backend.find_refused(["notes.a", "notes.b"], ["news.*", "notes.>"]) == []
    await backend.publish("news.told")
    await holds(lambda: bool(heard))
    assert [signal.subject for signal in heard] == ["news.told"]
    assert await backend.describe_log("notes") == state


async def test_now_is_unix_time(backend: Backend) -> None:
    assert abs(backend.now() - time.time()) < 2


async def test_handles_share_the_store(backend: Backend, twin: Backend) -> None:
    await backend.write("notes", Write("notes.a", b"1"))
    assert [record.body for record in await twin.last("notes", "notes.a")] == [b"1"]


# -- logs


async def test_declaring_a_log_again_is_harmless(
    backend: Backend, twin: Backend, caplog: pytest.LogCaptureFixture
) -> None:
    await backend.write("notes", Write("notes.a", b"1"))
    for handle in (backend, twin):
        await handle.declare_log(NOTES)
    assert await subjects(backend) == ["notes.a"]
    assert caplog.records == []


async def test_a_log_with_other_settings_stays_and_a_warning_names_the_difference(
    backend: Backend, twin: Backend, caplog: pytest.LogCaptureFixture
) -> None:
    await twin.declare_log(replace(NOTES, subjects=("notes.>", "more.>")))
    (warning,) = caplog.records
    assert warning.levelno == logging.WARNING
    assert "notes" in warning.getMessage()
    assert "more.>" in warning.getMessage()
    for writes in ([Write("more.a", b"")], [Write("notes.a", b""), Write("more.a", b"")]):
        with pytest.raises(BackendError, match=r"does not take .?more\.a"):
            await backend.write("notes", *writes)


async def test_delete_log_says_whether_it_was_there(backend: Backend) -> None:
    assert await backend.delete_log("notes")
    assert not await backend.delete_log("notes")
    assert await backend.list_logs("") == []


async def test_a_log_takes_its_records_and_consumers_away(backend: Backend) -> None:
    await backend.write("notes", Write("notes.a", b"1"))
    await backend.declare_consumer("notes", Consumer("counter", ("notes.>",)))
    await backend.delete_log("notes")
    await backend.declare_log(NOTES)
    assert await subjects(backend) == []
    assert await backend.list_consumers("notes") == []


async def test_a_log_that_was_made_again_has_another_incarnation(
    backend: Backend, twin: Backend
) -> None:
    first = await backend.incarnation("notes")
    await backend.write("notes", Write("notes.a", b""))
    assert first is not None
    assert await backend.incarnation("notes") == await twin.incarnation("notes") == first
    await twin.delete_log("notes")
    assert await backend.incarnation("notes") is None
    await twin.declare_log(NOTES)
    assert await backend.incarnation("notes") not in (None, first)


async def test_a_log_is_described(backend: Backend) -> None:
    empty = await backend.describe_log("notes")
    await backend.write("notes", Write("notes.a", b"12345"))
    await backend.write("notes", Write("notes.b", b""))
    state = await backend.describe_log("notes")
    assert empty is not None
    assert state is not None
    assert (empty.records, empty.bytes, empty.last_sequence) == (0, 0, 0)
    assert (state.records, state.last_sequence) == (2, 2)
    assert state.bytes >= len("notes.anotes.b12345")
    assert (state.replicas, state.replicas_behind, state.max_bytes) == (1, 0, None)
    assert (state.has_leader, state.peers) == (True, ())
    assert await backend.describe_log("nothing") is None


async def test_what_is_not_as_declared_is_told_and_changed(backend: Backend, twin: Backend) -> None:
    await backend.declare_consumer("notes", Consumer("reader", ("notes.>",), lease=30))
    wanted = [Consumer("reader", ("notes.>",), lease=40), Consumer("none", ("notes.a",), lease=40)]
    for name in ("notes", "nothing"):  # what is not there does not differ
        assert await backend.compare(replace(NOTES, name=name), [wanted[1]], backend.settings) == []
    (difference,) = await twin.compare(NOTES, wanted, twin.settings)
    assert difference.can_change
    assert "reader" in difference.asset
    assert difference.found != difference.wanted
    assert await twin.change(NOTES, wanted, twin.settings) == [difference]
    assert await backend.compare(NOTES, wanted, backend.settings) == []
    assert await backend.change(NOTES, wanted, backend.settings) == []
    assert await backend.list_consumers("notes") == ["reader"]


async def test_a_log_is_declared_again_once_its_loss_is_known(
    backend: Backend, twin: Backend
) -> None:
    await backend.incarnation("notes")
    await backend.declare_consumer("notes", Consumer("counter", ("notes.>",)))
    await twin.delete_log("notes")
    assert await backend.incarnation("notes") is None
    await backend.declare_log(NOTES)
    await backend.declare_consumer("notes", Consumer("counter", ("notes.>",)))
    assert await twin.list_logs("") == ["notes"]
    assert await twin.list_consumers("notes") == ["counter"]


async def test_a_log_is_declared_again_once_a_write_has_missed_it(
    backend: Backend, twin: Backend
) -> None:
    write = Write("notes.a", b"")
    for many in (False, True):
        await twin.delete_log("notes")
        if many:
            (missed,) = await backend.write_each("notes", [write])
            assert isinstance(missed, AssetMissing)
        else:
            with pytest.raises(AssetMissing):
                await backend.write("notes", write)
        await backend.declare_log(NOTES)
        assert await backend.write("notes", write) == 1


async def test_list_logs_goes_by_prefix_and_is_sorted(backend: Backend) -> None:
    for name in ("no_b", "other", "no_a"):
        await backend.declare_log(Log(name, (f"{name}.>",)))
    assert await backend.list_logs("no_") == ["no_a", "no_b"]


NAMES_A_LOG: dict[str, Callable[[Backend], Awaitable[object]]] = {
    "declare_consumer": lambda backend: backend.declare_consumer(
        "none", Consumer("counter", ("none.>",))
    ),
    "list_consumers": lambda backend: backend.list_consumers("none"),
    "look_up": lambda backend: backend.look_up("none", "counter"),
    "pause": lambda backend: backend.pause("none", "counter", time.time() + 60),
    "resume": lambda backend: backend.resume("none", "counter"),
    "pause_consumer": lambda backend: backend.pause("notes", "none", time.time() + 60),
    "write": lambda backend: backend.write("none", Write("none.a", b"")),
    "write_batch": lambda backend: backend.write(
        "none", Write("none.a", b""), Write("none.b", b"")
    ),
    "last": lambda backend: backend.last("none", "none.>"),
    "page": lambda backend: backend.page("none", "none.>"),
    "page_back": lambda backend: backend.page_back("none", "none.>"),
    "latest": lambda backend: backend.latest("none", "none.>"),
    "count": lambda backend: backend.count("none"),
    "count matches": lambda backend: backend.count("none", "notes.*"),
    "list_subjects": lambda backend: backend.list_subjects("none", "none.>"),
    "last_sequence": lambda backend: backend.last_sequence("none"),
    "delete": lambda backend: backend.delete("none", 1),
    "delete_many": lambda backend: backend.delete_many("none", [1, 2]),
    "purge": lambda backend: backend.purge("none", "none.>"),
}


@pytest.mark.parametrize("operation", NAMES_A_LOG.values(), ids=NAMES_A_LOG)
async def test_a_missing_asset_raises(
    backend: Backend, operation: Callable[[Backend], Awaitable[object]]
) -> None:
    with pytest.raises(AssetMissing), anyio.fail_after(PATIENCE):
        await operation(backend)


# -- records


async def test_sequences_count_from_1_and_are_never_reused(backend: Backend) -> None:
    assert await backend.write("notes", Write("notes.a", b"")) == 1
    assert await backend.write("notes", Write("notes.b", b"")) == 2
    await backend.purge("notes", "notes.>")
    assert await backend.write("notes", Write("notes.a", b"")) == 3


async def test_a_record_is_what_was_written(backend: Backend) -> None:
    before = backend.now()
    await backend.declare_log(KEYS)
    sequence = await backend.write("KV_keys", Write("$KV.keys.a", b"\x00body", marker=True))
    (record,) = await backend.last("KV_keys", "$KV.keys.a")
    assert record == Record("$KV.keys.a", b"\x00body", sequence, record.time, marker=True)
    assert before - 1 < record.time < backend.now() + 1


async def test_what_is_in_a_log_is_counted_and_listed(backend: Backend) -> None:
    assert await backend.last_sequence("notes") == await backend.count("notes") == 0
    assert await backend.list_subjects("notes", "notes.>") == []
    await backend.write("notes", *(Write(f"notes.{name}", b"") for name in ("a.1", "b.1", "a.2")))
    last = await backend.write("notes", Write("notes.b.1", b""))
    assert sorted(await backend.list_subjects("notes", "notes.a.*")) == ["notes.a.1", "notes.a.2"]
    assert (await backend.count("notes"), await backend.last_sequence("notes")) == (3, last)
    await backend.delete("notes", last)
    assert (await backend.count("notes"), await backend.last_sequence("notes")) == (2, last)


async def test_the_records_that_match_a_filter_are_counted(backend: Backend) -> None:
    await backend.declare_log(KEYS)
    names = ("a.1", "b.1", "b.2", "a.2", "a.3")
    writes = [Write(f"$KV.keys.{name}", b"x" * 5000) for name in names]
    for write in writes:
        await backend.write("KV_keys", write)
    await backend.write("KV_keys", writes[0])  # replaces the first
    for filter, expected in (("a.*", 3), ("b.*", 2), ("*.2", 2), ("a.3", 1), ("c.*", 0), (">", 5)):
        assert await backend.count("KV_keys", f"$KV.keys.{filter}") == expected


async def test_each_of_many_writes_is_stored_or_refused_by_itself(backend: Backend) -> None:
    kept = await backend.write("notes", Write("notes.7", b"kept"))
    writes = [Write(f"notes.{n}", b"%d" % n, Expect(f"notes.{n}")) for n in range(1200)]
    results = await backend.write_each("notes", writes)
    assert isinstance(results[7], WriteRefused)
    sequences = {n: result for n, result in enumerate(results) if n != 7}
    stored = {record.subject: record for record in await backend.last("notes", "notes.>")}
    assert len(stored) == 1200
    assert (stored["notes.7"].sequence, stored["notes.7"].body) == (kept, b"kept")
    assert {n: stored[f"notes.{n}"].sequence for n in sequences} == sequences
    assert {n: stored[f"notes.{n}"].body for n in sequences} == {n: b"%d" % n for n in sequences}
    large = Write("notes.large", b"x" * (backend.max_body + 1))
    refused, stored_too = await backend.write_each("notes", [large, Write("notes.after", b"")])
    assert isinstance(refused, PayloadTooLarge)
    assert isinstance(stored_too, int)
    assert await backend.write_each("notes", []) == []


async def test_overwrite_replaces(backend: Backend) -> None:
    await backend.write("notes", Write("notes.a", b"1"))
    sequence = await backend.write("notes", Write("notes.a", b"2"))
    assert [
        (record.body, record.sequence) for record in await backend.page("notes", "notes.>")
    ] == [(b"2", sequence)]


@pytest.mark.parametrize(
    ("filter", "expected"),
    [
        ("notes.a.1", ["notes.a.1"]),
        ("notes.*.1", ["notes.b.1", "notes.a.1"]),
        ("notes.a.*", ["notes.a.1"]),
        ("notes.a.>", ["notes.a.1.x", "notes.a.1"]),
        ("notes.>", ["notes.b.1", "notes.a.1.x", "notes.a.1", "notes.a"]),
        ("notes.*", ["notes.a"]),
        ("notes.c", []),
    ],
)
async def test_a_filter_has_one_token_for_a_star_and_one_or_more_for_an_arrow(
    backend: Backend, filter: str, expected: list[str]
) -> None:
    await backend.write(
        "notes",
        *(Write(subject, b"") for subject in ("notes.b.1", "notes.a.1.x", "notes.a.1", "notes.a")),
    )
    await backend.declare_consumer("notes", Consumer("counter", (filter,)))
    assert await subjects(backend, filter) == expected
    assert [record.subject for record in await backend.page("notes", filter)] == expected
    counter = await backend.look_up("notes", "counter")
    assert counter is not None
    assert counter.pending == len(expected)
    assert await backend.purge("notes", filter) == len(expected)


async def test_last_takes_any_filter_and_returns_each_record_once_by_sequence(
    backend: Backend,
) -> None:
    await backend.declare_log(KEYS)
    await backend.write(
        "KV_keys", *(Write(f"$KV.keys.{name}", b"", marker=name == "c") for name in "abcd")
    )
    await backend.write("KV_keys", Write("$KV.keys.a", b"again"))
    found = await backend.last("KV_keys", "$KV.keys.a", "$KV.keys.*", "$KV.keys.c")
    assert [(record.subject, record.sequence, record.marker) for record in found] == [
        ("$KV.keys.b", 2, False),
        ("$KV.keys.c", 3, True),
        ("$KV.keys.d", 4, False),
        ("$KV.keys.a", 5, False),
    ]


async def test_what_is_written_beside_a_record_stays_when_that_is_removed(backend: Backend) -> None:
    for number in range(50):
        older = await backend.write("notes", Write("notes.a", b"older", beside=bool(number % 2)))
        newer = await backend.write(
            "notes", Write("notes.a", b"newer", expect=Expect("notes.a", older), beside=True)
        )
        await backend.delete("notes", older)
        [record] = await backend.last("notes", "notes.>")
        assert (record.sequence, record.body) == (newer, b"newer")
        assert await backend.count("notes") == 1
        await backend.delete("notes", newer)
        assert await backend.last("notes", "notes.>") == []


async def test_latest_is_the_matching_record_with_the_highest_sequence(backend: Backend) -> None:
    assert await backend.latest("notes", "notes.>") is None
    await backend.write(
        "notes", *(Write(f"notes.{name}", name.encode()) for name in ("a", "b", "c.d", "e"))
    )
    await backend.write("notes", Write("notes.b", b"again", marker=True))
    for filter, expected in (
        ("notes.>", 5),
        ("notes.*", 5),
        ("notes.c.*", 3),
        ("notes.a", 1),
        ("notes.*.*", 3),
    ):
        record = await backend.latest("notes", filter)
        assert record is not None
        assert record.sequence == expected
        await backend.write("notes", Write("notes.none", b"", expect=Expect(filter, expected)))
        await backend.delete("notes", await backend.last_sequence("notes"))
    assert await backend.latest("notes", "notes.none") is None


async def test_last_returns_all_however_many(backend: Backend) -> None:
    for first in (0, 1000):
        await backend.write(
            "notes", *(Write(f"notes.{number}", b"") for number in range(first, first + 1000))
        )
    found = await backend.last("notes", "notes.>")
    assert [record.sequence for record in found] == list(range(1, 2001))


@pytest.mark.parametrize("mostly", [False, True])
@pytest.mark.parametrize("every", [1, 2, 3, 50, 1000])
async def test_the_hint_that_most_records_match_changes_no_page(
    backend: Backend, every: int, mostly: bool
) -> None:
    for start in range(0, 400, 100):
        await backend.write(
            "notes",
            *(
                Write(f"notes.{'a' if n % every == 0 else 'b'}.{n}", b"%d" % n)
                for n in range(start, start + 100)
            ),
        )
    await backend.delete("notes", 5)
    expected = [n for n in range(400) if n % every == 0 and n != 4]
    for limit in (1, 70, 500):
        page = await backend.page("notes", "notes.a.*", limit=limit, mostly=mostly)
        assert [int(record.body) for record in page] == expected[:limit]
        page = await backend.page(
            "notes", "notes.a.*", from_sequence=202, limit=limit, mostly=mostly
        )
        assert [int(record.body) for record in page] == [n for n in expected if n > 200][:limit]


async def fill(backend: Backend, matches: Callable[[int], bool], count: int) -> list[int]:
    """Write `count` records, each with an index entry before it.

    Return the sequences of those that match `notes.a.*`.
    """
    writes: list[Write] = []
    for n in range(count):
        kind = "a" if matches(n) else "b"
        if kind == "a":
            writes.append(Write(f"notes.index.{n}", b""))
        writes.append(Write(f"notes.{kind}.{n}", b""))
    for start in range(0, len(writes), 1000):
        await backend.write("notes", *writes[start : start + 1000])
    return [record.sequence for record in await backend.page("notes", "notes.a.*", limit=count)]


@pytest.mark.parametrize("index", [None, "notes.index.*"])
@pytest.mark.parametrize(
    "matches",
    [lambda n: True, lambda n: n % 3 == 0, lambda n: n in {7, 8, 2990}, lambda n: n > 5900],
    ids=["all", "a third", "three", "the last"],
)
async def test_a_list_is_read_in_both_orders_page_by_page(
    backend: Backend, matches: Callable[[int], bool], index: str | None
) -> None:
    expected = await fill(backend, matches, 6000)
    for gap in range(10, 400):
        await backend.delete("notes", gap)
    expected = [sequence for sequence in expected if not 10 <= sequence < 400]
    forwards: list[int] = []
    while page := await backend.page(
        "notes",
        "notes.a.*",
        from_sequence=forwards[-1] + 1 if forwards else 1,
        limit=700,
        mostly=True,
        index=index,
    ):
        forwards += [record.sequence for record in page]
    assert forwards == expected
    backwards: list[int] = []
    while page := await backend.page_back(
        "notes", "notes.a.*", before=backwards[-1] if backwards else None, limit=700, index=index
    ):
        backwards += [record.sequence for record in page]
    assert backwards == expected[::-1]


async def test_a_match_is_found_where_a_read_ends_between_it_and_its_index_entry(
    backend: Backend,
) -> None:
    """A list is read in parts of some sequences; other programs may write between the two."""
    for start in range(0, 2_700, 900):
        await backend.write("notes", *(Write(f"notes.b.{start + n}", b"") for n in range(900)))
    await backend.write("notes", Write("notes.index.1", b""))
    await backend.write("notes", *(Write(f"notes.c.{n}", b"") for n in range(3)))
    match = await backend.write("notes", Write("notes.a.1", b""))
    await backend.write("notes", *(Write(f"notes.d.{n}", b"") for n in range(900)))
    for start in range(match - 2_053, match - 2_043):
        page = await backend.page(
            "notes", "notes.a.*", from_sequence=start, mostly=True, index="notes.index.*"
        )
        assert [record.sequence for record in page] == [match], start


async def test_a_list_is_read_backwards_over_a_long_gap(backend: Backend) -> None:
    sequences = await fill(backend, lambda n: True, 6000)
    await backend.purge("notes", "notes.>", before=sequences[-3])
    for number in range(3000):
        await backend.write("notes", Write("notes.b", b"%d" % number))
    page = await backend.page_back("notes", "notes.a.*", limit=4)
    assert [record.sequence for record in page] == sequences[:-4:-1]
    assert await backend.page_back("notes", "notes.a.*", before=1) == []


async def test_many_records_are_removed_by_their_sequences(backend: Backend) -> None:
    await fill(backend, lambda n: True, 1000)
    sequences = list(range(3, 900))
    assert await backend.delete_many("notes", [1, *sequences, 1, 1_000_000]) == [1, *sequences]
    assert await backend.delete_many("notes", sequences) == []
    assert await backend.delete_many("notes", []) == []


async def test_an_index_entry_stands_before_what_it_is_for(backend: Backend) -> None:
    await backend.write("notes", Write("notes.a", b"body", ttl=60, index="notes.index.a"))
    entry, record = await backend.last("notes", "notes.>")
    assert [entry.subject, record.subject] == ["notes.index.a", "notes.a"]
    assert entry.body == b""


async def test_page_after_page_shows_every_matching_record_once(backend: Backend) -> None:
    await backend.write(
        "notes",
        *(Write(f"notes.{'a' if number % 2 else 'b'}.{number}", b"") for number in range(25)),
    )
    pages = []
    sequence = 0
    while page := await backend.page("notes", "notes.a.*", from_sequence=sequence + 1, limit=5):
        pages.append([record.sequence for record in page])
        sequence = page[-1].sequence
    assert pages == [[2, 4, 6, 8, 10], [12, 14, 16, 18, 20], [22, 24]]


async def test_delete_says_whether_the_record_was_there(backend: Backend) -> None:
    sequence = await backend.write("notes", Write("notes.a", b""))
    assert await backend.delete("notes", sequence)
    assert not await backend.delete("notes", sequence)
    assert await subjects(backend) == []


async def test_a_discard_removes(backend: Backend) -> None:
    sequence = await backend.write("notes", Write("notes.a", b""))
    backend.discard("notes", sequence)
    await until(lambda: backend.count("notes"), lambda count: count == 0)


async def test_purge_removes_what_matches(backend: Backend) -> None:
    await backend.write("notes", *(Write(f"notes.{name}", b"") for name in ("a.1", "b.1", "a.2")))
    assert await backend.purge("notes", "notes.a.*") == 2
    assert await subjects(backend) == ["notes.b.1"]


@pytest.mark.parametrize(("before", "left"), [(0, 4), (1, 4), (3, 3), (5, 2), (99, 0)])
async def test_purge_before_a_sequence_spares_that_one_and_what_follows(
    backend: Backend, before: int, left: int
) -> None:
    await backend.write(
        "notes",
        *(Write(f"notes.{name}", b"") for name in ("a.1", "b.1", "a.2", "b.2", "a.3", "a.4")),
    )
    assert await backend.purge("notes", "notes.a.*", before=before) == 4 - left
    assert len(await subjects(backend, "notes.a.*")) == left
    assert len(await subjects(backend, "notes.b.*")) == 2


@pytest.mark.parametrize(
    ("keep", "left"),
    [
        (0, []),
        (1, ["notes.a.3"]),
        (2, ["notes.a.2", "notes.a.3"]),
        (9, ["notes.a.1", "notes.a.2", "notes.a.3"]),
    ],
)
async def test_purge_keep_spares_the_last_ones(
    backend: Backend, keep: int, left: list[str]
) -> None:
    await backend.write(
        "notes", *(Write(f"notes.{name}", b"") for name in ("a.1", "a.2", "b.1", "a.3", "b.2"))
    )
    assert await backend.purge("notes", "notes.a.*", keep=keep) == 3 - len(left)
    assert await subjects(backend, "notes.a.*") == left


# -- writes


async def test_a_body_of_max_body_is_taken(backend: Backend) -> None:
    await backend.write(
        "notes",
        Write("notes.a", b"x" * backend.max_body, expect=Expect("notes.a"), message_id="a" * 40),
    )
    assert await subjects(backend) == ["notes.a"]


async def test_a_larger_body_is_refused(backend: Backend) -> None:
    def settle(settled: Settled) -> None:
        raise AssertionError(settled)

    large = Write("notes.a", b"x" * (backend.max_body + 1))
    with pytest.raises(PayloadTooLarge):
        await backend.write("notes", Write("notes.b", b""), large)
    with pytest.raises(PayloadTooLarge):
        backend.send("notes", large, settle)
    assert await subjects(backend) == []


async def test_first_expectation_wins(backend: Backend, twin: Backend) -> None:
    won: list[int] = []

    async def contend(handle: Backend, number: int) -> None:
        try:
            await handle.write("notes", Write(f"notes.a.{number}", b"", expect=Expect("notes.a.>")))
        except WriteRefused:
            return
        won.append(number)

    with anyio.fail_after(PATIENCE):
        async with anyio.create_task_group() as group:
            for number in range(10):
                group.start_soon(contend, (backend, twin)[number % 2], number)
    assert await subjects(backend) == [f"notes.a.{number}" for number in won]
    assert len(won) == 1


async def test_an_expectation_is_of_the_last_matching_record(backend: Backend) -> None:
    await backend.write("notes", Write("notes.a.1", b""))
    last = await backend.write("notes", Write("notes.a.2", b""))
    await backend.write("notes", Write("notes.b.1", b""))
    for wrong in (0, last - 1, last + 1):
        with pytest.raises(WriteRefused):
            await backend.write("notes", Write("notes.a.3", b"", expect=Expect("notes.a.*", wrong)))
    await backend.write("notes", Write("notes.a.3", b"", expect=Expect("notes.a.*", last)))


async def test_an_expectation_ignores_what_was_removed(backend: Backend) -> None:
    first = await backend.write("notes", Write("notes.a.1", b""))
    second = await backend.write("notes", Write("notes.a.2", b""))
    await backend.delete("notes", second)
    third = await backend.write("notes", Write("notes.a.3", b"", expect=Expect("notes.a.*", first)))
    await backend.purge("notes", "notes.a.*")
    assert (
        await backend.write("notes", Write("notes.a.4", b"", expect=Expect("notes.a.*", 0)))
        == third + 1
    )


async def test_a_marker_counts_as_a_record(backend: Backend) -> None:
    marker = await backend.write("notes", Write("notes.a", b"", marker=True, ttl=60))
    with pytest.raises(WriteRefused):
        await backend.write("notes", Write("notes.b", b"", expect=Expect("notes.*", 0)))
    await backend.write("notes", Write("notes.b", b"", expect=Expect("notes.*", marker)))


async def test_batch_is_all_or_nothing(backend: Backend) -> None:
    await backend.write("notes", Write("notes.taken", b"old"))
    for place in range(3):
        batch = [Write("notes.a", b""), Write("notes.b", b"")]
        batch.insert(place, Write("notes.taken", b"new", expect=Expect("notes.taken", 0)))
        with pytest.raises(WriteRefused):
            await backend.write("notes", *batch)
    (record,) = await backend.last("notes", "notes.>")
    assert (record.body, record.sequence) == (b"old", 1)


async def test_a_batch_is_written_in_order_and_returns_the_last_sequence(backend: Backend) -> None:
    assert (
        await backend.write("notes", *(Write(f"notes.{number}", b"") for number in range(1000)))
        == 1000
    )
    assert await subjects(backend) == [f"notes.{number}" for number in range(1000)]


async def test_a_batch_has_between_1_and_1000_writes(backend: Backend) -> None:
    with pytest.raises(BackendError):
        await backend.write("notes")
    with pytest.raises(BackendError):
        await backend.write("notes", *(Write(f"notes.{number}", b"") for number in range(1001)))
    assert await subjects(backend) == []


async def test_every_write_of_a_batch_expects_the_log_before_it(backend: Backend) -> None:
    claim = await backend.write("notes", Write("notes.done.a.claim", b""))
    await backend.write(
        "notes",
        Write("notes.done.a.completed", b"", expect=Expect("notes.done.a.>", claim)),
        Write("notes.done.a.claim", b"", marker=True, ttl=60),
        Write("notes.later.b.released", b"", expect=Expect("notes.later.b.>", 0)),
    )
    assert await subjects(backend) == [
        "notes.done.a.completed",
        "notes.done.a.claim",
        "notes.later.b.released",
    ]


async def test_a_batch_cannot_expect_a_subject_that_it_has_written(backend: Backend) -> None:
    with pytest.raises(WriteRefused):
        await backend.write(
            "notes", Write("notes.a", b""), Write("notes.b", b"", expect=Expect("notes.a", 0))
        )
    assert await subjects(backend) == []


async def test_message_id_makes_repetition_harmless(backend: Backend, twin: Backend) -> None:
    write = Write("notes.a", b"1", message_id="m1")
    first = await backend.write("notes", write)
    await backend.write("notes", Write("notes.a", b"2", message_id="m2"))
    assert await twin.write("notes", write) == first
    assert await twin.write("notes", replace(write, subject="notes.b")) == first
    assert [(record.subject, record.body) for record in await backend.last("notes", "notes.>")] == [
        ("notes.a", b"2")
    ]


async def test_message_id_outlives_its_record(backend: Backend) -> None:
    write = Write("notes.a", b"1", message_id="m1")
    first = await backend.write("notes", write)
    await backend.purge("notes", "notes.>")
    assert await backend.write("notes", write) == first
    assert await subjects(backend) == []


async def test_message_id_of_a_refused_write_is_free(backend: Backend) -> None:
    write = Write("notes.b", b"", message_id="m1")
    await backend.write("notes", Write("notes.a", b""))
    with pytest.raises(WriteRefused):
        await backend.write("notes", replace(write, expect=Expect("notes.a", 0)))
    with pytest.raises(WriteRefused):
        await backend.write("notes", write, Write("notes.a", b"", expect=Expect("notes.a", 0)))
    assert await backend.write("notes", write) == 2


async def test_a_known_message_id_refuses_a_batch(backend: Backend) -> None:
    await backend.write("notes", Write("notes.a", b"1", message_id="m1"))
    with pytest.raises(WriteRefused):
        await backend.write(
            "notes",
            Write("notes.a", b"2", message_id="m1"),
            Write("notes.b", b"2", message_id="m2"),
        )
    assert [(record.subject, record.body) for record in await backend.last("notes", "notes.>")] == [
        ("notes.a", b"1")
    ]


async def test_sends_are_written_in_order_and_settled_with_their_sequences(
    backend: Backend,
) -> None:
    settled: dict[int, Settled] = {}
    done = anyio.Event()

    def settle(number: int, result: Settled) -> None:
        settled[number] = result
        if len(settled) == 20:
            done.set()

    for number in range(20):
        backend.send("notes", Write(f"notes.{number}", b""), partial(settle, number))
    assert await backend.write("notes", Write("notes.last", b"")) == 21
    with anyio.fail_after(PATIENCE):
        await done.wait()
    assert settled == {number: number + 1 for number in range(20)}


async def test_a_send_that_fails_is_settled_with_the_reason(backend: Backend) -> None:
    settled: list[Settled] = []
    done = anyio.Event()

    def settle(result: Settled) -> None:
        settled.append(result)
        if len(settled) == 2:
            done.set()

    await backend.write("notes", Write("notes.a", b""))
    backend.send("notes", Write("notes.a", b"", expect=Expect("notes.a", 0)), settle)
    backend.send("none", Write("none.a", b""), settle)
    with anyio.fail_after(PATIENCE):
        await done.wait()
    assert {type(result) for result in settled} == {WriteRefused, AssetMissing}


# -- batches that are sent while they are made


async def test_a_staged_batch_is_stored_as_a_whole_when_it_is_committed(
    backend: Backend, twin: Backend
) -> None:
    staged = backend.stage("notes")
    writes = [Write(f"notes.{number:03}", b"%d" % number) for number in range(1000)]
    for start in range(0, 1000, 300):
        await staged.add(*writes[start : start + 300])
    assert await twin.last("notes", "notes.>") == []
    await twin.write("notes", Write("notes.meanwhile", b""))
    assert await staged.commit() == 1001
    staged.drop()
    records = await twin.last("notes", "notes.*")
    assert [(each.subject, each.body) for each in records[1:]] == [
        (write.subject, write.body) for write in writes
    ]


async def test_a_staged_batch_that_is_dropped_stores_nothing(backend: Backend) -> None:
    for _ in range(120):  # a server has room for 50 open batches
        staged = backend.stage("notes")
        await staged.add(Write("notes.a", b"1"), Write("notes.b", b"2"))
        await staged.add(Write("notes.c", b"3"))
        staged.drop()
        staged.drop()
    began = time.monotonic()
    await backend.write("notes", Write("notes.x", b""), Write("notes.y", b""))
    assert time.monotonic() - began < 3  # not after the seconds of a batch that is left open
    assert await subjects(backend) == ["notes.x", "notes.y"]


async def test_a_staged_batch_of_one_write_or_of_too_many(backend: Backend) -> None:
    staged = backend.stage("notes")
    await staged.add(Write("notes.a", b"1"))
    await staged.commit()
    assert await subjects(backend) == ["notes.a"]
    with pytest.raises(BackendError, match="0 writes in one batch"):
        await backend.stage("notes").commit()
    staged = backend.stage("notes")
    for start in (0, 501):
        await staged.add(*[Write(f"notes.{n}", b"") for n in range(start, start + 501)])
    with pytest.raises(BackendError, match="1002 writes in one batch"):
        await staged.commit()
    assert await subjects(backend) == ["notes.a"]


async def test_a_staged_batch_keeps_its_expectations(backend: Backend) -> None:
    last = await backend.write("notes", Write("notes.a", b"1"))
    for expect, stored in ((Expect("notes.a", last + 7), False), (Expect("notes.a", last), True)):
        staged = backend.stage("notes")
        await staged.add(Write("notes.b", b"2"))
        await staged.add(Write("notes.a", b"2", expect=expect), Write("notes.c", b"2"))
        if stored:
            await staged.commit()
        else:
            with pytest.raises(WriteRefused):
                await staged.commit()
    assert {
        each.subject: each.body for each in await backend.last("notes", "notes.>")
    } == dict.fromkeys(("notes.a", "notes.b", "notes.c"), b"2")


async def test_a_staged_write_may_be_too_large(backend: Backend) -> None:
    staged = backend.stage("notes")
    await staged.add(Write("notes.a", b""), Write("notes.b", bytes(backend.max_body + 1)))
    await staged.add(Write("notes.c", b""))
    with pytest.raises(PayloadTooLarge):
        await staged.commit()
    assert await subjects(backend) == []


async def test_a_staged_batch_to_a_log_that_is_not_there(backend: Backend) -> None:
    await backend.delete_log("notes")
    staged = backend.stage("notes")
    await staged.add(Write("notes.a", b""), Write("notes.b", b""))
    with pytest.raises(AssetMissing):
        await staged.commit()


async def test_the_writes_of_a_batch_have_their_index_entries(backend: Backend) -> None:
    writes = [Write(f"notes.{name}", b"", index=f"notes.index.{name}", ttl=60) for name in "abcd"]
    await backend.write("notes", *writes[:2])
    staged = backend.stage("notes")
    await staged.add(writes[2])
    await staged.add(writes[3])
    await staged.commit()
    found = set(await subjects(backend))
    assert found == {subject for each in writes for subject in (each.subject, each.index)}
