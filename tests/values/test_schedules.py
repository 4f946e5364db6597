"""When a repeatable job runs next.

Valid and refused schedules, and the effects of clocks that change.
"""

import math
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from croniter import croniter
from hypothesis import assume, example, given
from hypothesis import strategies as st

from asyncmq_nats.schedules import (
    LONGEST_INTERVAL,
    MOST_MISSED,
    Schedule,
    definition_id,
    first_run,
    is_over,
    make_schedule,
    missed_ticks,
    next_run,
    next_run_after,
    parse_every,
)


def moment(text: str, zone: str = "UTC", *, fold: int = 0) -> float:
    return datetime.fromisoformat(text).replace(tzinfo=ZoneInfo(zone), fold=fold).timestamp()


def ticks(cron: str, zone: str, start: str, count: int) -> list[str]:
    """Return the first ticks after a local time, as what the clock of the zone shows."""
    schedule, at, shown = make_schedule(None, cron, zone), moment(start, zone), []
    for _ in range(count):
        at = next_run(schedule, at)
        local = datetime.fromtimestamp(at, ZoneInfo(zone))
        shown.append(f"{local:%m-%d %H:%M %z}")
    return shown


# -- intervals


@pytest.mark.parametrize(
    ("every", "seconds"),
    [
        (5, 5.0),
        (0.5, 0.5),
        (0.05, 0.05),
        ("90", 90.0),
        ("0.25", 0.25),
        ("1e2", 100.0),
        ("100ms", 0.1),
        ("30s", 30.0),
        ("5m", 300.0),
        ("2h", 7200.0),
        ("1d", 86_400.0),
        ("1w", 604_800.0),
        ("1h30m", 5400.0),
        ("1h 30m", 5400.0),
        (" 2 h ", 7200.0),
        ("1.5h", 5400.0),
    ],
)
def test_an_interval_is_a_number_or_a_text(every: float | str, seconds: float) -> None:
    assert parse_every(every) == pytest.approx(seconds)
    assert make_schedule(every, None) == Schedule(every=parse_every(every))


@pytest.mark.parametrize(
    "every",
    [
        0,
        -1,
        0.049,
        math.nan,
        math.inf,
        -math.inf,
        1e300,
        10**400,
        "0",
        "-5",
        "nan",
        "inf",
        "10ms",
        "99999w",
    ],
)
def test_an_interval_out_of_range_is_refused(every: float | str) -> None:
    with pytest.raises(ValueError, match=r"shortest interval is 0.05 s, the longest"):
        make_schedule(every, None)


@pytest.mark.parametrize(
    ("every", "position"),
    [
        ("5x", 0),
        ("m5", 0),
        ("", 0),
        ("soon", 0),
        ("1h30", 2),
        ("5m!", 2),
        ("1h 30", 3),
        ("1h 3o m", 3),
        ("* * * * *", 0),
        ("5M", 0),
    ],
)
def test_a_bad_interval_is_refused_with_its_position(every: str, position: int) -> None:
    with pytest.raises(ValueError, match="not an interval") as raised:
        make_schedule(every, None)
    assert str(raised.value).splitlines()[1:] == [f"  {every}", "  " + " " * position + "^"]


@pytest.mark.parametrize("every", [True, b"5m", [5], timedelta(seconds=5)])
def test_an_interval_of_another_type_is_refused(every: Any) -> None:
    with pytest.raises(TypeError, match="every must be"):
        make_schedule(every, None)


def test_either_an_interval_or_a_cron_expression_is_needed() -> None:
    for every, cron in ((None, None), (5, "* * * * *")):
        with pytest.raises(ValueError, match="either every="):
            make_schedule(every, cron)


@given(st.text(max_size=12))
def test_no_text_does_more_than_be_refused(text: str) -> None:
    for every, cron in ((text, None), (None, text)):
        try:
            schedule = make_schedule(every, cron)
        except ValueError:
            continue
        assert next_run(schedule, 1e9) > 1e9


# -- cron


@pytest.mark.parametrize(
    ("cron", "after", "following"),
    [
        ("*/5 * * * *", "2026-01-01T00:01", "2026-01-01T00:05"),
        ("0 9 * * mon-fri", "2026-01-02T09:00", "2026-01-05T09:00"),
        ("0 0 l * *", "2026-02-01T00:00", "2026-02-28T00:00"),
        ("0 0 29 2 *", "2026-01-01T00:00", "2028-02-29T00:00"),
        ("0 0 1 jan *", "2026-01-01T00:00", "2027-01-01T00:00"),
        ("0 0 * * sat#1", "2026-01-01T00:00", "2026-01-03T00:00"),
        ("0 0 * * 7", "2026-01-01T00:00", "2026-01-04T00:00"),
        ("* * * * * */15", "2026-01-01T00:00:01", "2026-01-01T00:00:15"),
        ("0 12 * * * 30", "2026-01-01T12:00:30", "2026-01-02T12:00:30"),
        ("@hourly", "2026-01-01T00:00", "2026-01-01T01:00"),
        ("@daily", "2026-01-01T00:00", "2026-01-02T00:00"),
        ("@midnight", "2026-01-01T00:00", "2026-01-02T00:00"),
        ("@weekly", "2026-01-01T00:00", "2026-01-04T00:00"),
        ("@monthly", "2026-01-01T00:00", "2026-02-01T00:00"),
        ("@yearly", "2026-01-01T00:00", "2027-01-01T00:00"),
        ("@Annually", "2026-01-01T00:00", "2027-01-01T00:00"),
    ],
)
def test_cron_expressions_have_five_or_six_fields_or_a_name(
    cron: str, after: str, following: str
) -> None:
    assert next_run(make_schedule(None, cron), moment(after)) == moment(following)


def test_the_last_day_beside_the_31st_skips_no_month() -> None:
    schedule, at, shown = make_schedule(None, "0 0 31,L * *"), moment("2026-01-01"), []
    for _ in range(4):
        at = next_run(schedule, at)
        shown.append(f"{datetime.fromtimestamp(at, UTC):%m-%d}")
    assert shown == ["01-31", "02-28", "03-31", "04-30"]


def test_a_step_of_the_size_of_its_field_is_taken() -> None:
    assert next_run(make_schedule(None, "*/60 * * * *"), moment("2026-01-01T00:01")) == moment(
        "2026-01-01T01:00"
    )


@pytest.mark.parametrize(
    ("every", "cron", "start", "now", "first"),
    [
        (60, None, None, 1000.0, 1060.0),
        (60, None, 5000.0, 1000.0, 5000.0),
        (60, None, 1000.0, 1000.0, 1000.0),
        (60, None, 1000.0, 1001.0, 1060.0),
        (60, None, 1000.0, 1060.0, 1120.0),
        (None, "* * * * *", None, 60.0, 120.0),
        (None, "* * * * *", 600.0, 60.0, 600.0),
        (None, "* * * * *", 600.5, 60.0, 660.0),
        (None, "* * * * *", 599.9, 60.0, 600.0),
        (None, "* * * * *", 30.0, 60.0, 120.0),
    ],
)
def test_a_series_begins_at_its_start(
    every: float | None, cron: str | None, start: float | None, now: float, first: float
) -> None:
    assert first_run(make_schedule(every, cron, start=start), now) == first


def test_a_series_is_over_after_its_end() -> None:
    schedule = make_schedule(60, None, end=1000.0)
    assert [is_over(schedule, at) for at in (999.0, 1000.0, 1000.1)] == [False, False, True]
    assert not is_over(make_schedule(60, None), 1e12)


@pytest.mark.parametrize(
    ("span", "error", "told"),
    [
        ({"start": "soon"}, TypeError, "start must be a time"),
        ({"end": True}, TypeError, "end must be a time"),
        ({"start": math.nan}, ValueError, "is no time"),
        ({"end": -1}, ValueError, "is no time"),
        ({"start": 10, "end": 9}, ValueError, "there would be no run"),
    ],
)
def test_a_bad_span_is_refused(span: dict[str, Any], error: type[Exception], told: str) -> None:
    with pytest.raises(error, match=told):
        make_schedule(60, None, **span)


def test_the_shortest_interval_is_a_setting() -> None:
    assert parse_every(5, shortest=5) == 5
    with pytest.raises(ValueError, match="the shortest interval is 5 s"):
        parse_every(4.9, shortest=5)
    with pytest.raises(ValueError, match=r"the shortest interval is 0.05 s"):
        parse_every(0.04, shortest=0.01)


def test_white_space_and_capitals_of_a_name_make_no_difference() -> None:
    assert make_schedule(None, " 0\t9  * * * ") == make_schedule(None, "0 9 * * *")
    assert make_schedule(None, " @Daily ") == make_schedule(None, "@daily")


@pytest.mark.parametrize(
    ("cron", "told", "mark"),
    [
        ("61 * * * *", "'61' is not a valid minute", "^^"),
        ("* 25 * * *", "'25' is not a valid hour", "  ^^"),
        ("* * 0 * *", "'0' is not a valid day of month", "    ^"),
        ("* * * 13 *", "'13' is not a valid month", "      ^^"),
        ("* * * * 9", "'9' is not a valid day of week", "        ^"),
        ("* * * * * 60", "'60' is not a valid second", "          ^^"),
        ("*/0 * * * *", "not a valid minute", "^^^"),
        ("1,,2 * * * *", "not a valid minute", "^^^^"),
        ("mon * * * *", "not a valid minute", "^^^"),
        ("*  *\t99 * *", "'99' is not a valid day of month", "     ^^"),
        ("H * * * *", "'H' is not a valid minute", "^"),
        ("0 r(1-5) * * *", "not a valid hour", "  ^^^^^^"),
        ("5 4 * *", "has 4 fields", "       ^"),
        ("0 0 * * * * 2026", "has 7 fields", " " * 16 + "^"),
        ("", "has 0 fields", "^"),
        ("0 0 30 2 *", "never comes true", "    ^^^^^^"),
        ("0 0 31 2,4 *", "never comes true", "    ^^^^^^^^"),
        ("*/90 * * * *", "a step of 90 is larger than the field, 0 to 59", "^^^^"),
        ("0 */25 * * *", "a step of 25 is larger than the field, 0 to 23", "  ^^^^"),
        ("0 0 1-5/32 * *", "a step of 32 is larger than the field, 1 to 31", "    ^^^^^^"),
        ("0 0 * */13 *", "a step of 13 is larger than the field, 1 to 12", "      ^^^^"),
        ("0 0 * * */8", "a step of 8 is larger than the field, 0 to 6", "        ^^^"),
        ("0 0 * * * 5,*/61", "a step of 61 is larger than the field, 0 to 59", "          ^^^^^^"),
    ],
)
def test_a_bad_expression_is_refused_with_its_position(cron: str, told: str, mark: str) -> None:
    with pytest.raises(ValueError, match="cron") as raised:
        make_schedule(None, cron)
    assert told in str(raised.value)
    assert str(raised.value).split("\n")[1:] == [f"  {cron}", f"  {mark}"]


@pytest.mark.parametrize("cron", ["@sometimes", "@reboot", "@every 5m", "@hourly 5"])
def test_an_unknown_name_is_refused(cron: str) -> None:
    with pytest.raises(ValueError, match=r"not a known alias.*@daily"):
        make_schedule(None, cron)


@pytest.mark.parametrize("cron", [5, b"* * * * *", ["*"] * 5])
def test_an_expression_of_another_type_is_refused(cron: Any) -> None:
    with pytest.raises(TypeError, match="cron must be a str"):
        make_schedule(None, cron)


@pytest.mark.parametrize(
    "zone", ["Mars/Olympus", "../etc/passwd", "Europe", "/etc/localtime", "Europe/Berlin\0"]
)
def test_an_unknown_time_zone_is_refused(zone: str) -> None:
    with pytest.raises(ValueError, match="is unknown: use an IANA name"):
        make_schedule(None, "* * * * *", zone)


def test_an_interval_has_no_time_zone() -> None:
    with pytest.raises(ValueError, match="timezone= goes with cron="):
        make_schedule(5, None, "Europe/Berlin")


# -- clocks that change: a skipped time comes later, a repeated one counts once


@pytest.mark.parametrize(
    ("cron", "zone", "start", "expected"),
    [
        (
            "30 2 * * *",
            "Europe/Berlin",
            "2026-03-28T00:00",
            ["03-28 02:30 +0100", "03-29 03:30 +0200", "03-30 02:30 +0200"],
        ),
        (
            "30 2 * * *",
            "America/New_York",
            "2026-03-07T00:00",
            ["03-07 02:30 -0500", "03-08 03:30 -0400", "03-09 02:30 -0400"],
        ),
        (
            "15 2 * * *",
            "Australia/Lord_Howe",
            "2026-10-03T00:00",
            ["10-03 02:15 +1030", "10-04 02:45 +1100", "10-05 02:15 +1100"],
        ),
        (
            "30 0 * * *",
            "Antarctica/Troll",
            "2026-03-29T00:00",
            ["03-29 00:30 +0000", "03-30 00:30 +0200"],
        ),
        # Those that are skipped run later each, also those that are late themselves when the next
        # one is asked for.
        (
            "10,50 2 * * *",
            "Europe/Berlin",
            "2026-03-29T00:00",
            ["03-29 03:10 +0200", "03-29 03:50 +0200", "03-30 02:10 +0200"],
        ),
        (
            "10,50 2,3 * * *",
            "Europe/Berlin",
            "2026-03-29T00:00",
            ["03-29 03:10 +0200", "03-29 03:50 +0200", "03-30 02:10 +0200"],
        ),
        (
            "30 2,3 * * *",
            "Europe/Berlin",
            "2026-03-29T00:00",
            ["03-29 03:30 +0200", "03-30 02:30 +0200", "03-30 03:30 +0200"],
        ),
        # One that is not skipped may come before one that is.
        (
            "20,40 2 * * *",
            "Australia/Lord_Howe",
            "2026-10-04T00:00",
            ["10-04 02:40 +1100", "10-04 02:50 +1100", "10-05 02:20 +1100"],
        ),
        (
            "30 * * * *",
            "Europe/Berlin",
            "2026-03-29T00:45",
            ["03-29 01:30 +0100", "03-29 03:30 +0200", "03-29 04:30 +0200"],
        ),
        (
            "0 0 * * *",
            "America/Santiago",
            "2026-09-05T00:00",
            ["09-06 01:00 -0300", "09-07 00:00 -0300"],
        ),
    ],
)
def test_what_the_clock_skips_comes_later(
    cron: str, zone: str, start: str, expected: list[str]
) -> None:
    assert ticks(cron, zone, start, len(expected)) == expected


@pytest.mark.parametrize(
    ("cron", "zone", "start", "expected"),
    [
        (
            "30 2 * * *",
            "Europe/Berlin",
            "2026-10-24T12:00",
            ["10-25 02:30 +0200", "10-26 02:30 +0100"],
        ),
        (
            "30 1 * * *",
            "America/New_York",
            "2026-10-31T12:00",
            ["11-01 01:30 -0400", "11-02 01:30 -0500"],
        ),
        (
            "45 1 * * *",
            "Australia/Lord_Howe",
            "2026-04-04T12:00",
            ["04-05 01:45 +1100", "04-06 01:45 +1030"],
        ),
        (
            "0 2-3 * * *",
            "Europe/Berlin",
            "2026-10-25T00:00",
            ["10-25 02:00 +0200", "10-25 03:00 +0100", "10-26 02:00 +0100"],
        ),
    ],
)
def test_what_the_clock_shows_twice_counts_once(
    cron: str, zone: str, start: str, expected: list[str]
) -> None:
    assert ticks(cron, zone, start, len(expected)) == expected


@pytest.mark.parametrize(
    ("cron", "zone", "start", "expected"),
    [
        (
            "*/30 * * * *",
            "Europe/Berlin",
            "2026-10-25T01:45",
            [
                "10-25 02:00 +0200",
                "10-25 02:30 +0200",
                "10-25 02:00 +0100",
                "10-25 02:30 +0100",
                "10-25 03:00 +0100",
            ],
        ),
        (
            "@hourly",
            "Europe/Berlin",
            "2026-10-25T01:45",
            ["10-25 02:00 +0200", "10-25 02:00 +0100", "10-25 03:00 +0100"],
        ),
        (
            "*/20 * * * *",
            "Australia/Lord_Howe",
            "2026-04-05T01:20",
            ["04-05 01:40 +1100", "04-05 01:40 +1030", "04-05 02:00 +1030", "04-05 02:20 +1030"],
        ),
        (
            "59 * * * *",
            "America/New_York",
            "2026-11-01T01:30",
            ["11-01 01:59 -0400", "11-01 01:59 -0500", "11-01 02:59 -0500"],
        ),
    ],
)
def test_what_runs_at_any_hour_goes_on_through_both(
    cron: str, zone: str, start: str, expected: list[str]
) -> None:
    assert ticks(cron, zone, start, len(expected)) == expected


def test_without_a_time_zone_it_is_utc() -> None:
    assert next_run(make_schedule(None, "0 9 * * *"), moment("2026-07-01T00:00")) == moment(
        "2026-07-01T09:00"
    )
    assert make_schedule(None, "0 9 * * *") == make_schedule(None, "0 9 * * *", "UTC")


CHANGES = {
    "Europe/Berlin": ["2026-03-29T01:00", "2026-10-25T01:00"],
    "America/New_York": ["2026-03-08T07:00", "2026-11-01T06:00"],
    "Australia/Lord_Howe": ["2026-10-03T15:30", "2026-04-04T15:00"],
    "Antarctica/Troll": ["2026-03-29T01:00", "2026-10-25T01:00"],
    "America/Santiago": ["2026-09-06T04:00", "2026-04-05T03:00"],
    "Africa/Casablanca": ["2026-02-15T02:00", "2026-03-22T02:00"],
    "Asia/Kolkata": ["2026-03-29T01:00"],
}
"""Moments in UTC at which the clocks of a zone are changed (those of one zone never are)."""

MINUTES = st.one_of(
    st.sampled_from(["*", "*/7", "*/20", "0", "0,30"]),
    st.lists(st.integers(0, 59), min_size=1, max_size=3).map(
        lambda minutes: ",".join(map(str, minutes))
    ),
)
HOURS = st.one_of(
    st.sampled_from(["*", "*/2", "1-3", "0-4/2"]),
    st.lists(st.integers(0, 4), min_size=1, max_size=2).map(
        lambda hours: ",".join(map(str, hours))
    ),
)
MOMENTS = st.sampled_from(
    [(zone, change) for zone, changes in CHANGES.items() for change in changes]
)


def all_ticks(cron: str, zone: ZoneInfo, start: datetime, end: datetime) -> list[float]:
    """Return the ticks of a span of what a clock shows, by the letter of the rule.

    Each time it shows, then when that is.
    """
    found: set[float] = set()
    for wall in iter_walls(cron, start, end):
        first, second = (wall.replace(tzinfo=zone, fold=fold).timestamp() for fold in (0, 1))
        found.add(first)
        if second > first and cron.split()[1].startswith("*"):
            found.add(second)
    return sorted(found)


def iter_walls(cron: str, start: datetime, end: datetime) -> list[datetime]:
    walls, times = [], croniter(cron, start)
    while (wall := times.get_next(datetime)) < end:
        walls.append(wall)
    return walls


@pytest.mark.slow
@given(place=MOMENTS, minutes=MINUTES, hours=HOURS, offset=st.integers(-4 * 3600, 4 * 3600))
@example(
    place=("Australia/Lord_Howe", "2026-10-03T15:30"), minutes="20,40", hours="2", offset=-3600
)
@example(place=("Europe/Berlin", "2026-03-29T01:00"), minutes="10,50", hours="2", offset=660)
def test_no_change_of_a_clock_loses_or_repeats_a_tick(
    place: tuple[str, str], minutes: str, hours: str, offset: int
) -> None:
    cron, zone = f"{minutes} {hours} * * *", ZoneInfo(place[0])
    change = moment(place[1])
    local = datetime.fromtimestamp(change, zone).replace(tzinfo=None)
    expected = [
        at
        for at in all_ticks(cron, zone, local - timedelta(days=1), local + timedelta(days=2))
        if change + offset < at < change + 86_400
    ]
    schedule, at, found = make_schedule(None, cron, place[0]), change + offset, []
    while (at := next_run(schedule, at)) < change + 86_400:
        found.append(at)
        assert len(found) <= len(expected)
    assert found == expected


@given(
    zone=st.sampled_from(sorted(CHANGES)),
    minutes=MINUTES,
    hours=HOURS,
    after=st.floats(moment("2025-01-01"), moment("2028-01-01")),
)
def test_the_next_run_is_later_than_what_it_comes_after(
    zone: str, minutes: str, hours: str, after: float
) -> None:
    schedule = make_schedule(None, f"{minutes} {hours} * * *", zone)
    first = next_run(schedule, after)
    second = next_run(schedule, first)
    assert after < first < second < after + 3 * 86_400
    assert first == int(first)


# -- series


@given(every=st.floats(0.05, 1e6), planned=st.floats(1e9, 2e9), late=st.floats(0, 1e7))
@example(every=0.1, planned=1.7e9, late=0.1)
@example(every=0.1, planned=1.7e9, late=0.0)
def test_an_interval_keeps_its_rhythm_however_late_it_is(
    every: float, planned: float, late: float
) -> None:
    schedule, now = make_schedule(every, None), planned + late
    following = next_run_after(schedule, planned, now)
    steps = (following - planned) / every
    assert steps == pytest.approx(round(steps), abs=1e-4)
    assert round(steps) >= 1
    assert now - 1e-6 <= following <= now + every + 1e-5


@given(every=st.floats(0.05, 1e4), early=st.floats(0, 0.5))
def test_a_tick_before_its_time_is_followed_by_the_next(every: float, early: float) -> None:
    assert next_run_after(make_schedule(every, None), 1e9, 1e9 - early) == pytest.approx(
        1e9 + every
    )


def test_after_an_outage_a_cron_series_goes_on_from_now() -> None:
    schedule = make_schedule(None, "0 * * * *")
    planned, now = moment("2026-01-01T05:00"), moment("2026-01-01T09:30")
    assert next_run_after(schedule, planned, now) == moment("2026-01-01T10:00")
    assert next_run_after(schedule, planned, planned - 0.2) == moment("2026-01-01T06:00")


def test_missed_ticks_are_all_from_the_planned_one_to_now() -> None:
    assert missed_ticks(make_schedule(10, None), 100.0, 135.0) == [100.0, 110.0, 120.0, 130.0]
    assert missed_ticks(make_schedule(10, None), 100.0, 100.0) == [100.0]
    assert missed_ticks(make_schedule(10, None), 100.0, 99.8) == [100.0]
    hours = missed_ticks(
        make_schedule(None, "0 * * * *"), moment("2026-01-01T05:00"), moment("2026-01-01T07:30")
    )
    assert hours == [moment(f"2026-01-01T0{hour}:00") for hour in (5, 6, 7)]


@given(every=st.floats(0.05, 100), late=st.floats(0, 1e6))
def test_the_tick_after_the_missed_ones_is_the_next(every: float, late: float) -> None:
    schedule, now = make_schedule(every, None), 1e9 + late
    missed = missed_ticks(schedule, 1e9, now)
    assume(len(missed) < MOST_MISSED)
    assert all(at <= now + 1e-6 for at in missed)
    assert next_run_after(schedule, missed[-1], now) == pytest.approx(missed[-1] + every, abs=1e-4)


def test_missed_ticks_are_no_flood() -> None:
    assert len(missed_ticks(make_schedule(0.05, None), 0.0, 1e9)) == MOST_MISSED


def test_the_longest_interval_has_a_next_run() -> None:
    assert (
        datetime.fromtimestamp(
            next_run(make_schedule(LONGEST_INTERVAL, None), moment("2026-01-01")), UTC
        ).year
        == 2125
    )


# -- identity


DEFINITION = {
    "task_id": "t",
    "args": [1, "ü"],
    "kwargs": {"b": {"y": 2.5, "x": 1}, "a": None},
    "every": 5.0,
    "cron": None,
    "timezone": "UTC",
    "job": {},
}


def test_the_same_definition_has_the_same_id() -> None:
    turned = dict(reversed(DEFINITION.items())) | {"kwargs": {"a": None, "b": {"x": 1, "y": 2.5}}}
    assert definition_id(turned) == definition_id(DEFINITION)
    assert definition_id(
        {key: value for key, value in DEFINITION.items() if value is not None}
    ) == definition_id(DEFINITION)


@pytest.mark.parametrize(
    "change",
    [
        {"task_id": "u"},
        {"args": [1]},
        {"args": ["ü", 1]},
        {"kwargs": {"a": None}},
        {"kwargs": {}},
        {"every": 6.0},
        {"every": None, "cron": "* * * * *"},
        {"timezone": "Europe/Berlin"},
        {"job": {"retries": 1}},
    ],
)
def test_another_definition_has_another_id(change: dict[str, Any]) -> None:
    assert definition_id(DEFINITION | change) != definition_id(DEFINITION)


def test_the_id_is_that_of_every_process_and_version() -> None:
    program = (
        f"from asyncmq_nats.schedules import definition_id; print(definition_id({DEFINITION!r}))"
    )
    other = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONHASHSEED": "7"},
    )
    # A fixed value: an id that changes with a release would make a second series of every
    # repeatable in store.
    assert other.stdout.strip() == definition_id(DEFINITION) == "c1187105f3e42d3be76e5552"
