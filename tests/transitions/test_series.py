"""Entries of a bulk that differ in their arguments alone: it is known that none is refused."""

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncmq_nats._new_jobs import whole_job
from asyncmq_nats.runtime.registry import TaskRegistry
from asyncmq_nats.transitions.bulk import EntryBuilder
from asyncmq_nats.transitions.series import Series, find_series

NOW = 1_700_000_000.125


async def mail(to: str, times: int, share: float = 0.5, *, urgent: bool = False) -> str:
    return f"{to} {times} {share} {urgent}"


async def echo(value: Any = None) -> Any:
    return value


registry = TaskRegistry()
registry.register(mail, queue="work", name="mail")
registry.register(echo, queue="work", name="echo")


def series_of(entries: Sequence[Any]) -> Series | None:
    return find_series(entries, registry.plain_classes)


texts = st.text(st.characters() | st.characters(categories=["Cs"]), max_size=30)
values = (
    st.integers()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | texts
    | st.booleans()
    | st.none()
    | st.lists(st.integers(), max_size=2)
)
options = st.fixed_dictionaries(
    {"task_id": st.sampled_from(["mail", "echo", "unknown"])},
    optional={
        "retries": st.integers(-1, 2),
        "delay": st.sampled_from([1, 1.0, float("inf"), -1]),
        "priority": st.sampled_from([5, 7]),
        "meta": st.just({"a": "b"}),
        "job_id": st.just("chosen"),
        "unknown": st.just(1),
    },
)


@st.composite
def bulks(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Some are series; many are nearly."""
    same = draw(options)
    columns = draw(
        st.lists(st.sampled_from([st.integers(), texts, st.floats(), values]), max_size=3)
    )
    names = draw(st.lists(st.sampled_from(["to", "times", "share", "urgent", "x"]), unique=True))
    entries: list[dict[str, Any]] = []
    for _ in range(draw(st.integers(1, 4))):
        entry = dict(draw(options)) if draw(st.integers(0, 9)) == 9 else dict(same)
        without = draw(st.booleans())
        if columns or not without:
            entry["args"] = [draw(column) for column in columns]
        if names:
            entry["kwargs"] = {name: draw(st.integers(0, 9) | values) for name in names}
        entries.append(entry)
    return entries


@given(bulks())
def test_no_entry_of_a_series_is_refused(entries: list[dict[str, Any]]) -> None:
    series = series_of(entries)
    if series is None:
        return
    alone, together = (EntryBuilder(NOW, registry.write) for _ in range(2))
    try:
        together.build(0, entries[0])
        bare = together.build(0, entries[0] | {"args": [], "kwargs": {}})
    except (ValueError, TypeError):  # an option that all of them have
        return
    assert series.count == len(entries)
    calls = list(series.calls())
    assert len(calls) == len(entries)
    for index, (entry, call) in enumerate(zip(entries, calls, strict=True)):
        job = alone.build(index, entry)
        assert (job.args, job.kwargs) == call
        assert [*map(type, job.args)] == [*map(type, call[0])]
        assert len(job.encode()) <= len(bare.encode()) + series.most_bytes
        if together.can_repeat:
            like = whole_job(together.repeat(*call))
            assert vars(like) | {"job_id": "", "_encoded": None} == vars(whole_job(job)) | {
                "job_id": "",
                "_encoded": None,
            }


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"args": [1]}, {"args": [2]}),
        ({"args": [1, "ä"]}, {"args": (2, "")}),
        ({"args": []}, {}),
        ({"kwargs": {"to": "a", "times": 1}}, {"kwargs": {"times": 2, "to": "b"}}),
        ({"args": [1]}, {"args": ["a"]}),
        ({"args": [1]}, {"args": [True]}),
        ({"args": [1.0]}, {"args": [float("nan")]}),
        ({"args": ["a"]}, {"args": ["\ud800"]}),
        ({"args": [1]}, {"args": [2**65]}),
        ({"args": [1]}, {"args": [[2]]}),
        ({"args": [1]}, {"args": [2, 3]}),
        ({"args": [1], "retries": 1}, {"args": [2], "retries": 2}),
        ({"args": [1], "retries": 1}, {"args": [2], "retries": True}),
        ({"args": [1], "meta": {}}, {"args": [2], "meta": {}}),
        ({"args": [1]}, {"args": [2], "retries": 0}),
        ({"args": None}, {"args": None}),
        ({"args": "ab"}, {"args": "cd"}),
        ({"kwargs": {1: 1}}, {"kwargs": {1: 2}}),
    ],
)
def test_which_entries_are_a_series(first: dict[str, Any], second: dict[str, Any]) -> None:
    entries = [{"task_id": "unknown"} | first, {"task_id": "unknown"} | second]
    found = series_of(entries)
    assert (found is not None) == (second == {"args": [2]} and first == {"args": [1]})
    assert series_of([entries[0], 3]) is None


def test_a_task_says_of_what_classes_its_arguments_are() -> None:
    def calls(*args: Any, **kwargs: Any) -> list[dict[str, Any]]:
        return [{"task_id": "mail", "args": list(args), "kwargs": kwargs}] * 2

    assert series_of(calls("a", 1)) is not None
    assert series_of(calls("a", 1, 2)) is not None  # an int for a float
    assert series_of(calls("a", 1, urgent=True)) is not None
    assert series_of(calls("a", "1")) is None
    assert series_of(calls("a", 1, urgent=1)) is None
    assert series_of(calls("a", 1, 0.5, 4)) is None
    assert series_of([{"task_id": "echo", "args": [1]}] * 2) is None  # `Any`: not known before
