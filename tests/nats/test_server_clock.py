"""The server's clock: what its time stamps prove, and that it is not moved without need."""

import math
import time
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncmq_nats.backends.nats import server_clock
from asyncmq_nats.backends.nats.connection import Connection, format_time
from asyncmq_nats.backends.nats.server_clock import LIFETIME, LONGEST_ERROR, ServerClock
from asyncmq_nats.settings import Settings

OFFSET = 1_767_614_400.0
"""Seconds from the monotonic clock to the server's."""
ways = st.floats(0, 0.08)
"""Seconds from the client to the server, or back."""
EXACT = 1e-6


class Machine:
    """The clocks of a client's machine. `wrong`: by how much the wall clock is ahead."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, wrong: float = 0.0) -> None:
        self.monotonic, self.wrong = 1000.0, wrong
        clocks = SimpleNamespace(
            monotonic=lambda: self.monotonic, time=lambda: self.monotonic + OFFSET + self.wrong
        )
        monkeypatch.setattr(server_clock, "time", clocks)
        self.clock = ServerClock()

    def ask(self, there: float = 0.0, back: float = 0.0, *, server: float = OFFSET) -> None:
        """Have the clock learn from a request that takes so long there and back."""
        sent = self.monotonic
        stamp = sent + there + server
        self.monotonic += there + back
        self.clock.learn(stamp, sent, self.monotonic)

    @property
    def error(self) -> float:
        return self.clock.now() - self.monotonic - OFFSET

    @property
    def bounds(self) -> tuple[float, float]:
        """By how much the bounds are ahead of the server's clock."""
        server = self.monotonic + OFFSET
        return self.clock.now_at_least() - server, self.clock.now_at_most() - server


@given(st.floats(-0.01, 0.01), st.lists(st.tuples(ways, ways), min_size=1))
def test_the_time_is_within_the_bounds_whatever_the_network_does(
    wrong: float, trips: list[tuple[float, float]]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        machine = Machine(patch, wrong)
        for there, back in trips:
            before, least = machine.error, machine.bounds[0]
            machine.ask(there, back)
            low, high = machine.bounds
            assert least - EXACT <= low <= EXACT
            assert high >= -EXACT
            assert low - EXACT <= machine.error <= high + EXACT
            if low <= before <= high:
                assert machine.error == pytest.approx(before, abs=EXACT)


def test_what_the_bounds_allow_is_not_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, wrong=0.001)
    for there, back in [(0.01, 0.002), (0.002, 0.03), (0.004, 0.004)]:
        machine.ask(there, back)
        assert machine.error == pytest.approx(0.001, abs=EXACT)
    machine.ask(0.0002, 0.0002)
    assert abs(machine.error) <= 0.0002 + EXACT


def test_a_wrong_clock_of_this_machine_is_put_right(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, wrong=-3600)
    assert (machine.error, machine.bounds[0]) == (-3600, -math.inf)
    machine.ask(0.01, 0.02)
    assert abs(machine.error) <= 0.015 + EXACT


def test_a_server_whose_clock_is_set_is_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch)
    machine.ask(0.001, 0.001)
    for step in (5.0, -5.0):
        machine.ask(0.001, 0.001, server=OFFSET + step)
        assert machine.error == pytest.approx(step, abs=0.002)


def test_old_bounds_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clocks drift: the bounds of a minute ago may exclude the time."""
    machine = Machine(monkeypatch)
    machine.ask()
    machine.ask(0.01, 0.01)
    assert machine.bounds == pytest.approx((0, 0), abs=EXACT)
    machine.monotonic += LIFETIME
    machine.ask(0.01, 0.01)
    assert machine.bounds == pytest.approx((-0.01, 0.01), abs=EXACT)


def test_no_network_makes_a_delay_much_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as a process that was stopped between a request and its reply."""
    machine = Machine(monkeypatch)
    assert machine.bounds[1] == pytest.approx(0, abs=EXACT)
    machine.ask(0.0, 30.0)
    assert machine.bounds[0] < -29
    assert machine.bounds[1] <= LONGEST_ERROR + EXACT


def test_a_clock_of_this_machine_that_is_far_off_is_told_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    connection = Connection(Settings(), {"servers": ["nats://127.0.0.1:4222"]})
    for _ in range(2):
        sent = time.monotonic()
        connection._learn_time(format_time(time.time() - 60), sent, time.monotonic())
    [record] = caplog.records
    assert "the clock of this machine is 60.0 s off" in record.getMessage()
