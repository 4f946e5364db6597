"""How many jobs a worker asks for: invariants that hold whatever it knows."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncmq_nats.runtime.prefetch import (
    MAX_PREFETCH,
    Pace,
    TierView,
    prefetch_target,
    should_hand_back,
    tiers_to_ask,
)

COUNTS = st.integers(0, 1_000)
TIERS = st.lists(
    st.builds(TierView, st.integers(), COUNTS, COUNTS),
    max_size=8,
    unique_by=lambda tier: tier.priority,
).map(lambda tiers: sorted(tiers, key=lambda tier: tier.priority))
SECONDS = st.floats(0, 1e6)
PACES = st.builds(Pace, SECONDS | st.just(math.inf), st.floats(1e-6, 0.1))


@given(TIERS, COUNTS, COUNTS)
def test_no_tier_is_asked_for_more_than_is_wanted(
    tiers: list[TierView], wanted: int, capacity: int
) -> None:
    outstanding = {tier.priority: tier.outstanding for tier in tiers}
    for priority, count in tiers_to_ask(tiers, wanted, max(wanted, capacity)):
        assert 0 < count <= wanted - outstanding[priority]


@given(TIERS, COUNTS, COUNTS)
def test_nothing_below_a_tier_that_has_jobs_is_asked(
    tiers: list[TierView], wanted: int, capacity: int
) -> None:
    asked = [priority for priority, _ in tiers_to_ask(tiers, wanted, max(wanted, capacity))]
    busy = [tier.priority for tier in tiers if tier.pending]
    assert all(priority <= busy[0] for priority in asked if busy)
    assert asked == sorted(set(asked))


@given(TIERS, st.integers(1, 1_000), COUNTS)
def test_what_is_wanted_is_asked_of_an_idle_tier(
    tiers: list[TierView], wanted: int, more: int
) -> None:
    asked = dict(tiers_to_ask(tiers, wanted, wanted + more))
    for tier in tiers:
        if tier.outstanding == 0:
            assert asked[tier.priority] == wanted
        if tier.pending:
            break


@given(TIERS, COUNTS)
def test_a_worker_that_wants_nothing_asks_nothing(tiers: list[TierView], capacity: int) -> None:
    assert tiers_to_ask(tiers, 0, capacity) == []


def test_a_small_refill_waits_for_others() -> None:
    assert tiers_to_ask([TierView(5, 90, 0)], 100, 100) == []
    assert tiers_to_ask([TierView(5, 60, 0)], 100, 100) == [(5, 40)]


def test_a_single_slot_is_refilled_at_once() -> None:
    assert tiers_to_ask([TierView(5, 0, 7)], 1, 1) == [(5, 1)]


def test_all_tiers_of_an_idle_queue_are_asked() -> None:
    assert tiers_to_ask([TierView(-1, 0, 0), TierView(5, 0, 0), TierView(9, 0, 0)], 3, 3) == [
        (-1, 3),
        (5, 3),
        (9, 3),
    ]


@given(st.integers(1, 10_000), PACES)
def test_prefetch_is_bounded(concurrency: int, pace: Pace) -> None:
    assert 0 <= prefetch_target(concurrency, pace) <= MAX_PREFETCH


@given(st.integers(1, 1_000), st.floats(1e-4, 100), st.floats(1e-4, 100), st.floats(1e-6, 0.1))
def test_longer_jobs_never_make_the_prefetch_larger(
    concurrency: int, one: float, other: float, refill: float
) -> None:
    short, long = sorted((one, other))
    assert prefetch_target(concurrency, Pace(long, refill)) <= prefetch_target(
        concurrency, Pace(short, refill)
    )


@pytest.mark.parametrize("seconds", [1.0, 600.0, math.inf])
def test_long_or_unknown_jobs_are_not_prefetched(seconds: float) -> None:
    assert prefetch_target(10, Pace(seconds, 0.002)) == 0


def test_short_jobs_are_prefetched_for_two_round_trips() -> None:
    assert prefetch_target(10, Pace(0.001, 0.002)) == 40


@given(st.lists(SECONDS, min_size=1, max_size=50))
def test_the_learnt_duration_is_between_the_shortest_and_the_longest(
    durations: list[float],
) -> None:
    pace = Pace()
    for seconds in durations:
        pace.learn_job(seconds)
    assert min(durations) <= pace.job_seconds * (1 + 1e-9)
    assert pace.job_seconds <= max(durations) * (1 + 1e-9)


def test_the_first_duration_is_taken_as_it_is() -> None:
    pace = Pace()
    pace.learn_job(4.0)
    assert pace.job_seconds == 4.0
    pace.learn_job(9.0)
    assert pace.job_seconds == pytest.approx(5.0)


@given(st.lists(SECONDS, max_size=50))
def test_one_slow_answer_does_not_make_the_refill_slow_for_long(answers: list[float]) -> None:
    pace = Pace()
    for seconds in answers:
        pace.learn_refill(seconds)
    assert 0 <= pace.refill_seconds <= 0.1


@given(SECONDS, PACES, st.integers(1, 1_000), st.integers(0, 1_000))
def test_who_was_held_longer_is_handed_back_no_later(
    held: float, pace: Pace, concurrency: int, position: int
) -> None:
    if should_hand_back(held, pace, concurrency, position):
        assert should_hand_back(held * 2 + 1, pace, concurrency, position)
        assert should_hand_back(held, pace, concurrency, position + 1)


@given(PACES, st.integers(1, 1_000), st.integers(0, 1_000))
def test_what_has_just_come_is_not_handed_back(pace: Pace, concurrency: int, position: int) -> None:
    assert not should_hand_back(0.0, pace, concurrency, position)


def test_a_job_behind_slow_ones_is_handed_back_at_once() -> None:
    assert should_hand_back(0.001, Pace(10.0), 1, 0)
    assert should_hand_back(0.001, Pace(0.001), 1, 0, quiet=0.1), (
        "the slots are taken by longer jobs than usual"
    )


def test_a_job_is_held_while_its_turn_is_near() -> None:
    pace = Pace(0.1)
    assert not should_hand_back(0.2, pace, 10, 20), "21 jobs ahead, a slot each 10 ms"
    assert should_hand_back(0.001, pace, 10, 29)
    assert should_hand_back(0.6, pace, 10, 0), "others passed it by"


def test_what_starts_take_beside_the_tasks_counts() -> None:
    pace = Pace(0.00001)
    assert not should_hand_back(0.1, pace, 100, 500)
    pace.learn_starts(50, 0.05, 500)
    assert pace.start_seconds == 0.001
    assert should_hand_back(0.1, pace, 100, 500)
    assert not should_hand_back(0.1, pace, 100, 200)
    pace.learn_starts(0, 0.05, 500)
    assert pace.start_seconds == 0.001, "no start tells nothing of how long one takes"
    pace.learn_starts(1, 0.05, 0)
    assert pace.start_seconds == 0.0, "with nothing in hand the server's supply sets the pace"


def test_nothing_is_prefetched_while_no_slot_becomes_free() -> None:
    assert prefetch_target(10, Pace(0.001, 0.002), quiet=1.0) == 0


@given(TIERS, COUNTS)
def test_what_is_in_hand_of_a_tier_takes_nothing_from_those_above(
    tiers: list[TierView], wanted: int
) -> None:
    views = [
        TierView(tier.priority, tier.outstanding, 0, held=5 * place)
        for place, tier in enumerate(tiers, start=1)
    ]
    asked = dict(tiers_to_ask(views, wanted, wanted))
    for place, view in enumerate(views, start=1):
        assert asked.get(view.priority, 0) <= max(0, wanted - 5 * place - view.outstanding)
    if views and not views[0].outstanding and wanted > 5:
        assert asked[views[0].priority] == wanted - 5
