import asyncio
from datetime import timedelta
from zoneinfo import ZoneInfo

import business
import pytest
from business import Bank, Mailbox
from fastapi.testclient import TestClient
from shop import app, charge

from asyncmq_nats.testing import assert_enqueued


@pytest.fixture(autouse=True)
def at_noon(amq_clock):
    tomorrow = amq_clock.now().astimezone(ZoneInfo("Europe/Berlin")) + timedelta(days=1)
    asyncio.run(amq_clock.advance_to(tomorrow.replace(hour=12, minute=0, second=0, microsecond=0)))
    business.reset()


@pytest.fixture
def advance(amq_clock):
    return lambda time: asyncio.run(amq_clock.advance(time))


def place_order(order, cents):
    with TestClient(app) as client:
        assert client.post("/orders", json={"id": order, "cents": cents}).status_code == 202


def test_a_request_enqueues_the_charge(amq_clock):
    place_order("A1", 500)
    assert_enqueued(charge, args=["A1", 500])
    assert Bank.charged == {}


def test_a_charge_is_tried_again_each_minute(advance):
    Bank.down = 2
    place_order("A1", 500)
    advance("119s")
    assert Bank.charged == {}
    advance("1s")
    assert Bank.charged == {"A1": 500}


def test_a_reminder_comes_an_hour_after_the_charge(advance):
    place_order("A1", 500)
    advance("59m")
    assert (Bank.charged, Mailbox.sent) == ({"A1": 500}, [])
    advance("1m")
    assert Mailbox.sent == ["How do you like A1?"]


def test_the_day_is_closed_at_two_in_the_night(advance):
    place_order("A1", 500)
    place_order("A2", 700)
    advance("13h59m")
    assert len(Mailbox.sent) == 2
    advance("1m")
    assert Mailbox.sent[2:] == ["2 orders, 1200 cents"]
