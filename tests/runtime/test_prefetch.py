"""How many jobs a worker asks for: invariants that hold whatever it has measured before."""

import math
from collections import deque

import pytest
from hypothesis import given
from hypothesis import settings as given_settings
from hypothesis import strategies as st

from asyncmq_nats.runtime.prefetch import (
    MAX_PREFETCH,
    Throughput,
    TierView,
    starts_late,
    tiers_to_ask,
)

COUNTS = st.integers(0, 1_000)
TIERS = st.lists(
    st.builds(TierView, st.integers(), COUNTS, COUNTS),
    max_size=8,
    unique_by=lambda tier: tier.priority,
).map(lambda tiers: sorted(tiers, key=lambda tier: tier.priority))
RATES = st.floats(0, 1e6)
SLOTS = st.integers(1, 1_000)
THROUGHPUTS = st.builds(
    Throughput,
    rate=RATES,
    still_seconds=st.floats(0, 1e6),
    refill_seconds=st.floats(1e-6, 0.1),
    prefetch=st.integers(0, MAX_PREFETCH),
    may_grow=st.booleans(),
)


# -- which tiers


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


# -- how far ahead


@given(THROUGHPUTS, SLOTS)
def test_a_prefetch_is_worth_a_fifth_of_a_second_at_most(
    throughput: Throughput, concurrency: int
) -> None:
    rate = throughput.rate
    assert 0 <= throughput.decide_prefetch(concurrency) <= min(MAX_PREFETCH, math.ceil(rate * 0.2))


@given(THROUGHPUTS, SLOTS, st.integers(1, 8))
def test_a_prefetch_at_most_doubles_with_each_answered_pull(
    throughput: Throughput, concurrency: int, pulls: int
) -> None:
    throughput.may_grow = False
    for _ in range(pulls):
        before = throughput.prefetch
        for _ in range(3):
            assert throughput.decide_prefetch(concurrency) <= before
        throughput.learn_refill(0.1)
        throughput.rate = 1e6
        for _ in range(3):
            assert throughput.decide_prefetch(concurrency) <= max(4, 2 * before)


@pytest.mark.parametrize("refill", [0.0001, 0.002, 0.1])
def test_jobs_much_longer_than_a_round_trip_are_not_prefetched(refill: float) -> None:
    throughput = Throughput(rate=0.4 / refill, refill_seconds=refill, prefetch=512, may_grow=True)
    assert throughput.decide_prefetch(10) == 0


def test_short_jobs_are_prefetched_for_two_round_trips() -> None:
    throughput = Throughput(rate=1_000, refill_seconds=0.03, prefetch=512)
    assert throughput.decide_prefetch(10) == 60


def test_very_short_jobs_are_prefetched_for_ten_milliseconds() -> None:
    throughput = Throughput(rate=10_000, refill_seconds=0.001, prefetch=512)
    assert throughput.decide_prefetch(10) == 100


def test_a_prefetch_begins_small_whatever_the_first_milliseconds_show() -> None:
    throughput = Throughput()
    throughput.learn_starts(1000, 0.005, full=True)
    throughput.learn_refill(0.001)
    assert throughput.decide_prefetch(100) <= 4


def test_nothing_is_prefetched_while_nothing_starts() -> None:
    throughput = Throughput(rate=1_000, refill_seconds=0.002, prefetch=4)
    for _ in range(20):
        throughput.learn_starts(0, 0.05, full=True)
    assert throughput.decide_prefetch(10) == 0


# -- no measurement lasts


@given(THROUGHPUTS, COUNTS, st.floats(0.005, 1e4), st.booleans())
def test_a_rate_stays_between_what_was_known_and_what_was_seen(
    throughput: Throughput, started: int, seconds: float, full: bool
) -> None:
    """So a process that stood still, whose starts per second are few, never expects more."""
    known, seen = throughput.rate, started / seconds
    throughput.learn_starts(started, seconds, full=full)
    assert min(known, seen) * 0.999 <= throughput.rate <= max(known, seen) * 1.001


@given(THROUGHPUTS, st.floats(0, 1e6))
def test_one_slow_answer_counts_for_a_tenth_of_a_second_at_most(
    throughput: Throughput, seconds: float
) -> None:
    known = throughput.refill_seconds
    throughput.learn_refill(seconds)
    assert throughput.refill_seconds <= known + 0.2 * 0.1


@given(THROUGHPUTS, SLOTS, st.floats(10, 20_000), st.floats(0.0002, 0.04), st.floats(0.005, 0.05))
def test_after_three_normal_seconds_the_prefetch_is_right_whatever_was_measured_before(
    throughput: Throughput, concurrency: int, rate: float, refill: float, interval: float
) -> None:
    owed, prefetch = 0.0, 0
    for _ in range(math.ceil(3 / interval)):
        owed += rate * interval
        started, owed = int(owed), owed % 1
        throughput.learn_starts(started, interval, full=False)
        throughput.learn_refill(refill)
        prefetch = throughput.decide_prefetch(concurrency)
    right = min(rate * max(2 * refill, 0.01), MAX_PREFETCH)
    if rate * interval < 2:  # starts come one by one: the rate swings around the right one
        assert prefetch <= 2 * right + 4
    else:
        assert prefetch <= 1.6 * right + 1
        assert prefetch >= 0.6 * right or rate * refill < 1


class Simulation:
    """A worker with a backlog: slots, jobs of `seconds`, starts and pulls that take their time."""

    def __init__(self, throughput: Throughput, slots: int, seconds: float, pull: float) -> None:
        self.throughput, self.slots, self.seconds, self.pull = throughput, slots, seconds, pull
        self.busy: deque[float] = deque()
        self.answers: deque[tuple[float, float, int]] = deque()
        self.held = self.outstanding = self.started = 0
        self.step = 0.0005
        self.most_per_step = 5  # a start costs 100 µs

    def run(self, begin: float, end: float) -> int:
        """Return how many jobs start."""
        before = self.started
        now = begin
        while now < end:
            while self.answers and self.answers[0][0] <= now:
                _, asked, count = self.answers.popleft()
                self.held += count
                self.outstanding -= count
                self.throughput.learn_refill(now - asked)
            while self.busy and self.busy[0] <= now:
                self.busy.popleft()
            starting = min(self.held, self.slots - len(self.busy), self.most_per_step)
            self.held -= starting
            self.started += starting
            self.busy.extend([now + self.seconds] * starting)
            full = len(self.busy) == self.slots
            self.throughput.learn_starts(starting, self.step, full=full)
            self._ask(now)
            now += self.step
        return self.started - before

    def _ask(self, now: float) -> None:
        capacity = self.slots + self.throughput.decide_prefetch(self.slots)
        view = TierView(5, self.outstanding, 1, self.held)
        for _, count in tiers_to_ask([view], capacity - len(self.busy), capacity):
            self.outstanding += count
            self.answers.append((now + self.pull, now, count))


@given_settings(max_examples=30)
@given(
    THROUGHPUTS,
    st.sampled_from([1, 3, 10, 100]),
    st.sampled_from([0.0, 0.001, 0.05]),
    st.sampled_from([0.001, 0.01, 0.03, 0.1]),
)
def test_a_worker_comes_to_the_same_rate_whatever_was_measured_before(
    throughput: Throughput, slots: int, seconds: float, pull: float
) -> None:
    rested = Simulation(Throughput(), slots, seconds, pull)
    rested.run(0, 3)
    goal = rested.run(3, 4)
    simulation = Simulation(throughput, slots, seconds, pull)
    simulation.run(0, 3)
    assert simulation.run(3, 4) >= 0.8 * goal
    possible = min(slots / max(seconds, simulation.step), (slots + MAX_PREFETCH) / pull)
    assert goal >= 0.55 * min(possible, simulation.most_per_step / simulation.step)
    assert simulation.held <= MAX_PREFETCH + slots


# -- which jobs others should get


@given(st.integers(-1_000, 1_000), st.floats(0, 100), st.integers(1, 100), RATES)
def test_what_was_held_longer_or_starts_later_is_late_as_well(
    place: int, held: float, deliveries: int, rate: float
) -> None:
    if starts_late(place, held, deliveries, rate):
        assert starts_late(place, held * 2 + 1, deliveries, rate)
        assert starts_late(place + 1, held, deliveries, rate)
        assert starts_late(place, held, deliveries, rate / 2)


@given(st.integers(0, MAX_PREFETCH), THROUGHPUTS, SLOTS, st.floats(0, 0.5))
def test_what_was_prefetched_is_not_late(
    place: int, throughput: Throughput, concurrency: int, held: float
) -> None:
    if place < throughput.decide_prefetch(concurrency) - 1:
        assert not starts_late(place, held, 1, throughput.expected_rate(concurrency))


@given(st.integers(0, 1_000), RATES)
def test_a_job_that_comes_again_is_held_longer_each_time(place: int, rate: float) -> None:
    assert not starts_late(place, 0.0, 1, rate)
    for deliveries in range(1, 6):
        assert not starts_late(place, 0.049 * 2 ** (deliveries - 1), deliveries, rate)
    assert starts_late(place, 7.0, 2**31, rate), "but not for ever"


def test_a_job_is_late_where_nothing_starts() -> None:
    throughput = Throughput(rate=5_000)
    assert not starts_late(0, 0.1, 1, throughput.expected_rate(1))
    for _ in range(10):
        throughput.learn_starts(0, 0.05, full=True)
    assert starts_late(0, 0.1, 1, throughput.expected_rate(1))


def test_a_job_with_a_free_slot_is_not_late() -> None:
    assert not starts_late(-1, 0.1, 1, 0.0)
    assert starts_late(-1, 0.9, 1, 0.0), "but something keeps it from starting"
