"""Values as people read them, what is hidden, groups of failures, pictures of flows."""

import functools
from typing import Any

import pytest

from asyncmq_nats import InvalidArgument, task
from asyncmq_nats.contrib.dashboard.failures import FailureGroups
from asyncmq_nats.contrib.dashboard.graph import draw
from asyncmq_nats.contrib.dashboard.redaction import (
    MASK,
    Redactor,
    Shown,
    restore_hidden,
)
from asyncmq_nats.contrib.dashboard.words import (
    ago,
    call_preview,
    cron_in_words,
    duration,
    every_in_words,
    number,
    short_error,
    signature_of_error,
)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 ms"),
        (0.0421, "42 ms"),
        (1.25, "1.2 s"),
        (42, "42 s"),
        (60, "1 min"),
        (95, "1 min 35 s"),
        (1_500, "25 min"),
        (3_700, "1 h 1 min"),
        (90_000, "1 d 1 h"),
        (-5, "-5.0 s"),
        (-0.0001, "0 ms"),
        (None, "–"),
        (float("inf"), "–"),
    ],
)
def test_durations_have_two_units_at_most(seconds: float | None, text: str) -> None:
    assert duration(seconds) == text


def test_times_are_told_from_now() -> None:
    assert ago(100, 160) == "1 min ago"
    assert ago(160, 100) == "in 1 min"
    assert ago(100, 100.4) == "now"
    assert ago(None, 100) == "–"


def test_numbers_have_their_thousands_apart() -> None:
    assert number(1_234_567) == "1,234,567"
    assert number(0.125) == "0.12"
    assert number(None) == "–"


@pytest.mark.parametrize(
    ("cron", "words"),
    [
        ("0 7 * * mon-fri", "At 07:00, Monday through Friday"),
        ("*/5 * * * *", "Every 5 minutes"),
        ("0 7 * * mon 15", "At 07:00:15, only on Monday"),
        ("@daily", "At 00:00"),
        ("", ""),
        (None, ""),
        ("not a cron", ""),
    ],
)
def test_cron_is_told_in_words(cron: str | None, words: str) -> None:
    assert cron_in_words(cron) == words


def test_intervals_are_told_in_words() -> None:
    assert every_in_words(60) == "Every minute"
    assert every_in_words(7_200) == "Every 2 hours"
    assert every_in_words(0.5) == "Every 500 ms"


def test_calls_are_shortened() -> None:
    assert call_preview(["a", 1], {"b": None}) == '"a", 1, b=null'
    assert len(call_preview(["x" * 1000], {})) == 120


# -- what is hidden


def test_values_under_secret_keys_are_hidden() -> None:
    job: dict[str, Any] = {
        "task": "t",
        "args": [{"user": "ada", "Api-Key": "k"}, "plain"],
        "kwargs": {"password": {"a": 1}, "list": [{"ACCESS_TOKEN": "t"}], "passenger": "x"},
        "result": {"secretary": "hidden as well", "ok": True},
    }
    shown = Redactor().job("q", job)
    assert shown["args"] == [{"user": "ada", "Api-Key": MASK}, "plain"]
    assert shown["kwargs"] == {
        "password": MASK,
        "list": [{"ACCESS_TOKEN": MASK}],
        "passenger": "x",
    }
    assert shown["result"] == {"secretary": MASK, "ok": True}
    assert job["kwargs"]["password"] == {"a": 1}


def decorated(function: Any) -> Any:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return wrapper


def log_in(user: str, password: str) -> None: ...


def follow(report_progress: Any, user: str, password: str) -> None: ...


@pytest.mark.parametrize(
    ("function", "options"),
    [(log_in, {}), (decorated(log_in), {}), (follow, {"progress": True})],
    ids=["plain", "decorated", "with progress"],
)
def test_an_argument_is_hidden_by_the_name_of_its_parameter(
    monkeypatch: pytest.MonkeyPatch, function: Any, options: dict[str, Any]
) -> None:
    monkeypatch.setattr("asyncmq_nats.tasks.TASK_REGISTRY._tasks", {})
    task("q", name="log in", **options)(function)
    job: dict[str, Any] = {"task": "log in", "args": ["ada", "hunter2"], "kwargs": {}}
    assert Redactor().job("q", job)["args"] == ["ada", MASK]
    assert Redactor().job("q", job | {"task": "other"})["args"] == ["ada", "hunter2"]


def test_what_goes_with_a_job_is_hidden_as_its_arguments_are() -> None:
    job = {"task": "t", "meta": {"session_token": "t"}, "progress_data": [{"cookie": "c"}]}
    shown = Redactor().job("q", job)
    assert shown["meta"] == {"session_token": MASK}
    assert shown["progress_data"] == [{"cookie": MASK}]


def test_arguments_in_the_audit_log_are_hidden() -> None:
    # A command line has them as text.
    given = {"kwargs": '{"password": "p"}', "kwarg": "['pin=1']", "args": "[1]", "arguments": "x"}
    shown = Redactor().details({"state": "failed", "token": "t"} | given)
    assert shown == {"state": "failed", "token": MASK} | dict.fromkeys(given, MASK)


def test_a_hook_says_what_is_shown() -> None:
    seen: list[Shown] = []

    def hook(value: Any, where: Shown) -> Any:
        seen.append(where)
        return value.replace("4111", "****") if isinstance(value, str) else value

    job = {
        "task": "pay",
        "args": [1],
        "last_error": "card 4111",
        "error_traceback": "card 4111",
        "errors": [{"error": "card 4111", "traceback": "x 4111", "attempt": 1}],
    }
    shown = Redactor(hook=hook).job("q", job)
    assert "4111" not in str(shown)
    assert {where.field for where in seen} == {"args", "error", "traceback"}
    assert {(where.queue, where.task) for where in seen} == {("q", "pay")}


def test_a_value_without_end_is_cut() -> None:
    deep: Any = "x"
    for _ in range(100):
        deep = [deep]
    assert MASK in str(Redactor().hide(deep))


def test_what_was_hidden_in_a_form_stays_as_it_is_stored() -> None:
    stored = {"to": "ada", "password": "p", "secret": None, "list": [{"token": "t"}, 2]}
    edited = {
        "to": "eve",
        "password": MASK,
        "secret": MASK,
        "list": [{"token": MASK}, 3, 4],
        "new": 1,
    }
    assert restore_hidden(edited, Redactor().hide(stored), stored) == {
        "to": "eve",
        "password": "p",
        "secret": None,
        "list": [{"token": "t"}, 3, 4],
        "new": 1,
    }


@pytest.mark.parametrize(
    "edited", [{"moved": MASK}, {"to": MASK}, {"to": [{"a": MASK}]}, {"password": [MASK]}]
)
def test_what_was_hidden_is_found_at_its_place_only(edited: Any) -> None:
    stored = {"to": "ada", "password": "p"}
    with pytest.raises(InvalidArgument, match="can only stay where it was"):
        restore_hidden(edited, Redactor().hide(stored), stored)


def test_what_a_hook_changed_or_left_out_stays_as_it_is_stored() -> None:
    stored = {"card": "4111 1111", "name": "ada", "pin": 7, "items": [{"card": "4222"}]}
    shown = {"card": "(card)", "name": "ada", "items": [{"card": "(card)"}]}
    edited = shown | {"name": "eve"}
    assert restore_hidden(edited, shown, stored) == stored | {"name": "eve"}
    assert restore_hidden({"card": "new"}, shown, stored) == {"card": "new", "pin": 7}


# -- failures


def failed(
    job_id: str, task: str, error: str | None, at: float = 1.0
) -> tuple[str, dict[str, Any]]:
    return "q", {"id": job_id, "task": task, "last_error": error, "finished_at": at}


def test_errors_that_differ_in_numbers_ids_and_texts_are_one_kind() -> None:
    grouping = FailureGroups()
    jobs = [
        failed("a", "send", "KeyError: 'ada'", 5.0),
        failed("b", "send", "KeyError: 'eve'", 9.0),
        failed("c", "send", "TimeoutError: 17 s", 2.0),
        failed("d", "send", "TimeoutError: 3 s\nmore", 1.0),
        failed("e", "send", "TimeoutError: 4.5 s", 3.0),
        failed("f", "other", "KeyError: 'x'"),
        failed("g", "send", None),
    ]
    ids = [grouping.add(*each).id for each in jobs]
    groups = grouping.largest_first()
    assert [(g.task, g.signature, g.count, sorted(g.job_ids)) for g in groups] == [
        ("send", "TimeoutError: ‹n› s", 3, ["c", "d", "e"]),
        ("send", "KeyError: ‹text›", 2, ["a", "b"]),
        ("other", "KeyError: ‹text›", 1, ["f"]),
        ("send", "no error was told", 1, ["g"]),
    ]
    assert ids[0] == ids[1] == groups[1].id
    assert (grouping.count, grouping.oldest, grouping.newest) == (7, 1.0, 9.0)
    assert (groups[1].first, groups[1].last, groups[1].example) == (5.0, 9.0, "KeyError: 'eve'")
    assert len({group.id for group in groups}) == 4


def test_ids_and_addresses_are_no_part_of_a_kind() -> None:
    one = "no user 7f9c2ba4-e88f-4d11-9a3c-0242ac120002 at 0x7F1e"
    other = "no user 11111111-2222-3333-4444-555555555555 at 0xdead"
    assert signature_of_error(one) == signature_of_error(other) == "no user ‹id› at ‹address›"
    assert short_error("\n first\nsecond") == "first"
    assert short_error(None) == ""


# -- pictures of flows


def test_a_job_is_drawn_right_of_its_parents() -> None:
    drawing = draw({"d": ["b", "c"], "a": [], "b": ["a"], "c": ["a"], "e": ["a", "d"]})
    x = {node.id: node.x for node in drawing.nodes}
    assert x["a"] < x["b"] == x["c"] < x["d"] < x["e"]
    assert {(edge.parent, edge.child) for edge in drawing.edges} == {
        ("a", "b"),
        ("a", "c"),
        ("b", "d"),
        ("c", "d"),
        ("a", "e"),
        ("d", "e"),
    }
    places = {(node.x, node.y) for node in drawing.nodes}
    assert len(places) == 5
    assert all(0 <= node.x <= drawing.width - drawing.node_width for node in drawing.nodes)
    assert all(0 <= node.y <= drawing.height - drawing.node_height for node in drawing.nodes)


def test_jobs_are_drawn_beside_their_parents_so_that_lines_do_not_cross() -> None:
    drawing = draw({"a": [], "b": [], "of b": ["b"], "of a": ["a"]})
    y = {node.id: node.y for node in drawing.nodes}
    assert (y["a"] < y["b"]) == (y["of a"] < y["of b"])


def test_a_circle_and_unknown_parents_do_not_matter() -> None:
    drawing = draw({"a": ["b", "gone"], "b": ["a"]})
    assert {node.id for node in drawing.nodes} == {"a", "b"}
    assert draw({}).nodes == []
