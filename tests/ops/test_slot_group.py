"""The order of starts of several queues in one worker. No server, no clock."""

from collections import Counter

from asyncmq_nats.runtime.slot_group import MAX_CATCH_UP, SlotGroup


class Slots:
    """A member of a group, with `jobs` to run."""

    def __init__(self, group: SlotGroup, name: str, started: list[str], jobs: int = 1000) -> None:
        self.group, self.name, self.started, self.jobs = group, name, started, jobs
        self.is_open = True
        self.running = 0
        self.expects_jobs = False
        self.told = 0

    @property
    def is_running(self) -> bool:
        return self.running > 0

    def start_next(self) -> bool:
        if not self.jobs:
            return False
        self.jobs -= 1
        self.running += 1
        self.group.occupy()
        self.started.append(self.name)
        return True

    def finish(self) -> None:
        self.running -= 1
        self.group.release(self)
        self.group.fill()

    def note_free_slot(self) -> None:
        self.told += 1


def run(group: SlotGroup, members: list[Slots], starts: int) -> None:
    """Let jobs end, one by one, until `starts` of them have started."""
    started = members[0].started
    group.fill()
    while len(started) < starts:
        next(member for member in members if member.name == started[-1]).finish()


def make(group: SlotGroup, *weights: float, jobs: int = 1000) -> tuple[list[Slots], list[str]]:
    started: list[str] = []
    members = [Slots(group, "abc"[index], started, jobs) for index in range(len(weights))]
    for member, weight in zip(members, weights, strict=True):
        group.join(member, weight)
    return members, started


def test_each_queue_gets_its_share_of_the_starts() -> None:
    group = SlotGroup(1)
    members, started = make(group, 3, 1)
    run(group, members, 40)
    assert Counter(started) == {"a": 30, "b": 10}
    assert "aaaa" not in "".join(started)  # and in turn, not in blocks


def test_a_queue_that_was_idle_makes_up_for_a_few_starts_only() -> None:
    group = SlotGroup(1)
    members, started = make(group, 1, 1, jobs=5000)
    members[1].jobs = 0
    run(group, members, 2000)
    members[1].jobs = 5000
    started.clear()
    members[0].finish()
    run(group, members, 1000)
    assert 500 <= Counter(started)["b"] <= 500 + MAX_CATCH_UP


def test_no_job_starts_before_all_queues_can_start_theirs() -> None:
    group = SlotGroup(1, is_strict=True)
    (first, _), started = make(group, 1, 1)
    first.is_open = False
    group.fill()
    assert started == []
    first.is_open = True
    group.fill()
    assert started == ["a"]
    first.is_open = False  # it stops
    first.finish()
    assert started == ["a", "b"]


def test_the_slots_are_shared() -> None:
    group = SlotGroup(4)
    members, started = make(group, 1, 1)
    group.fill()
    assert len(started) == 4
    assert group.limit(10) == 0
    members[0].finish()
    assert len(started) == 5
    assert members[1].told == 1  # it may ask for more


def test_in_strict_order_a_later_queue_waits_for_an_earlier_one() -> None:
    group = SlotGroup(2, is_strict=True)
    (first, second), started = make(group, 1, 1)
    first.jobs = 3
    run(group, [first, second], 5)
    assert started == ["a", "a", "a", "b", "b"]


def test_in_strict_order_a_slot_is_kept_for_a_job_that_is_on_its_way() -> None:
    group = SlotGroup(1, is_strict=True)
    (first, _), started = make(group, 1, 1)
    first.jobs, first.expects_jobs = 0, True
    group.fill()
    assert started == []
    first.expects_jobs = False
    group.fill()
    assert started == ["b"]


def test_no_more_jobs_start_than_there_may() -> None:
    ends: list[str] = []
    group = SlotGroup(None, jobs_left=5, on_last=lambda: ends.append("last"))
    members, started = make(group, 1, 1)
    group.fill()
    assert len(started) == 5
    members[0].finish()
    assert len(started) == 5
    assert ends == ["last"]


def test_what_a_start_calls_may_ask_for_more_starts() -> None:
    group = SlotGroup(3)
    members, started = make(group, 1, 1)
    plain = members[0].start_next

    def start_and_fill() -> bool:
        done = plain()
        group.fill()
        return done

    members[0].start_next = start_and_fill  # type: ignore[method-assign]
    group.fill()
    assert len(started) == 3
