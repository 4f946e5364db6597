from datetime import UTC, datetime

import business
import pytest
import time_machine
from business import Bank, Mailbox
from fastapi.testclient import TestClient
from moving import Clock
from shop import app, charge, queue

NOON = datetime(2030, 7, 1, 10, tzinfo=UTC)  # in Berlin


@pytest.fixture
def clock():
    business.reset()
    with time_machine.travel(NOON, tick=False) as traveller:
        clock = Clock(queue, traveller)
        clock.jobs().clear()
        yield clock


def place_order(order, cents):
    with TestClient(app) as client:
        assert client.post("/orders", json={"id": order, "cents": cents}).status_code == 202


def test_a_request_enqueues_the_charge(clock):
    place_order("A1", 500)
    (job,) = clock.jobs()
    assert (job.headers["task"], job.payload[0]) == (charge.name, ["A1", 500])
    assert Bank.charged == {}


def test_a_charge_is_tried_again_each_minute(clock):
    Bank.down = 2
    place_order("A1", 500)
    clock.advance(119)
    assert Bank.charged == {}
    clock.advance(1)
    assert Bank.charged == {"A1": 500}


def test_a_reminder_comes_an_hour_after_the_charge(clock):
    place_order("A1", 500)
    clock.advance(59 * 60)
    assert (Bank.charged, Mailbox.sent) == ({"A1": 500}, [])
    clock.advance(60)
    assert Mailbox.sent == ["How do you like A1?"]


def test_the_day_is_closed_at_two_in_the_night(clock):
    place_order("A1", 500)
    place_order("A2", 700)
    clock.advance(13 * 3600 + 59 * 60)
    assert len(Mailbox.sent) == 2
    clock.advance(60)
    assert Mailbox.sent[2:] == ["2 orders, 1200 cents"]
