"""The line of suspects: one at a time, and the last run of one begins alone.

No server, no clock.
"""

import pytest

from asyncmq_nats.jobs import JobHead
from asyncmq_nats.runtime.suspects import LAST_PROBATION_SECONDS, PROBATION_SECONDS, Suspects
from asyncmq_nats.transitions.claim import Attempt, Claim


class Message:
    """A delivery as far as an attempt needs it."""

    subject, body, consumer, pending = "amq.work.ready.5.a", b"", "tier_5", 0

    def __init__(self, sequence: int = 7, deliveries: int = 2, time: float = 0.0) -> None:
        self.sequence = sequence
        self.deliveries = deliveries
        self.first = deliveries == 1
        self.time = time
        self.stamp = 0

    def ack(self) -> None: ...
    def nak(self, delay: float = 0.0) -> None: ...
    def abandon(self) -> None: ...


class World:
    """The worker, as the line of suspects sees it."""

    def __init__(self, max_stalls: int = 3) -> None:
        self.time = 100.0
        self.alone = True
        self.line = Suspects(max_stalls, lambda: self.alone, lambda: self.time)


def attempt(losses: int = 0) -> Attempt:
    found = Attempt(Message(), "a", JobHead(task_id="t", job_id="a", created_at=0.0))
    found.stalls = losses
    return found


def test_suspects_run_one_after_the_other() -> None:
    world, first, second = World(), attempt(), attempt()
    world.line.enter(first)
    world.line.enter(second)
    assert world.line.next() is first
    assert world.line.next() is None
    assert not world.line.holds_others
    world.line.leave(first)
    assert world.line.next() is second


def test_a_suspect_that_survives_for_a_while_lets_the_next_one_start() -> None:
    world, first, second = World(), attempt(), attempt()
    world.line.enter(first)
    world.line.enter(second)
    assert world.line.next() is first
    assert world.line.wait == pytest.approx(PROBATION_SECONDS)
    world.time += PROBATION_SECONDS
    assert world.line.next() is second


def test_the_last_run_waits_until_it_is_alone_and_holds_others_meanwhile() -> None:
    world, last = World(), attempt(losses=2)
    world.alone = False
    world.line.enter(last)
    assert world.line.next() is None
    assert world.line.holds_others
    assert world.line.wait == pytest.approx(LAST_PROBATION_SECONDS)
    world.alone = True
    assert world.line.next() is last
    assert world.line.holds_others
    world.line.leave(last)
    assert not world.line.holds_others
    assert world.line.wait is None


def test_jobs_that_never_end_do_not_keep_the_last_run_waiting() -> None:
    world, last = World(), attempt(losses=2)
    world.alone = False
    world.line.enter(last)
    assert world.line.next() is None
    world.time += LAST_PROBATION_SECONDS
    assert world.line.next() is last
    world.time += LAST_PROBATION_SECONDS
    assert not world.line.holds_others


def test_a_loss_counts_only_if_the_job_had_a_claim() -> None:
    lease, late = 30.0, 1000.0
    unclaimed = attempt()
    unclaimed.count_losses(None, late, lease)
    assert (unclaimed.stalls, unclaimed.suspected, unclaimed.lost) == (0, True, True)
    claimed = attempt()
    claimed.count_losses(Claim("w", 7, 1, stalls=0, suspected=True), late, lease)
    assert (claimed.stalls, claimed.losses, claimed.lost) == (1, 2, True)


def test_a_job_that_was_handed_back_was_not_lost() -> None:
    handed_back = attempt()
    handed_back.count_losses(Claim("w", 7, 1, stalls=1, released=True), 1000.0, 30.0)
    assert (handed_back.stalls, handed_back.lost) == (1, False)


def test_a_worker_lost_after_a_hand_back_is_a_suspicion() -> None:
    again = Attempt(Message(deliveries=3), "a", JobHead(task_id="t", job_id="a", created_at=0.0))
    again.count_losses(Claim("w", 7, 1, stalls=0, released=True), 1000.0, 30.0)
    assert (again.stalls, again.suspected, again.lost) == (0, True, True)


def test_a_message_younger_than_a_lease_was_given_back_and_not_lost() -> None:
    young = attempt()
    young.count_losses(None, 29.0, 30.0)
    assert (young.losses, young.lost) == (0, False)


def test_a_claim_on_an_earlier_message_says_nothing() -> None:
    again = attempt()
    again.count_losses(Claim("w", 6, 1, stalls=2), 1000.0, 30.0)
    assert (again.stalls, again.suspected) == (0, True)


def test_a_delivery_of_which_the_server_may_have_lost_count_is_no_loss_of_a_worker() -> None:
    old = Attempt(Message(deliveries=1), "a", JobHead(task_id="t", job_id="a", created_at=0.0))
    old.count_losses(None, 1000.0, 30.0)
    assert (old.losses, old.lost) == (0, False)


@pytest.mark.parametrize(
    ("claimed", "released", "outranked"),
    [(1, False, True), (1, True, False), (2, False, True), (2, True, True), (0, False, False)],
)
def test_a_number_that_comes_again_after_a_hand_back_is_a_new_delivery(
    claimed: int, released: bool, outranked: bool
) -> None:
    claim = Claim("w", 7, claimed, stalls=0, released=released)
    assert claim.outranks((7, 1)) is outranked
    assert claim.outranks((6, 9))
    assert not claim.outranks((8, 1))
