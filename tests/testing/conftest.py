"""Fixtures of the toolkit's own tests."""

import pytest

from asyncmq_nats.testing import VirtualBackend, VirtualClock


@pytest.fixture
def clock() -> VirtualClock:
    """A clock that begins at a round time: a Monday, at noon in UTC."""
    return VirtualClock(1_767_614_400)


@pytest.fixture
def backend(clock: VirtualClock) -> VirtualBackend:
    """A virtual backend on the clock."""
    return VirtualBackend(clock)
