from datetime import UTC, datetime

import business
import pytest
import time_machine
from business import Bank, Mailbox
from httpx import ASGITransport, AsyncClient
from moving import Clock
from saq import Worker
from shop import app, queue, settings

NOON = datetime(2030, 7, 1, 10, tzinfo=UTC)  # in Berlin
pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend():
    return "asyncio"


@pytest.fixture
async def clock():
    business.reset()
    await queue.redis.flushdb()
    with time_machine.travel(NOON, tick=False) as traveller:
        yield Clock(Worker(**settings, dequeue_timeout=0.1), traveller)
    await queue.disconnect()


async def place_order(order, cents):
    async with AsyncClient(transport=ASGITransport(app), base_url="http://shop") as client:
        response = await client.post("/orders", json={"id": order, "cents": cents})
    assert response.status_code == 202
    return response.json()["job"]


async def test_a_request_enqueues_the_charge(clock):
    job = await queue.job(await place_order("A1", 500))
    assert (job.function, job.kwargs) == ("charge", {"order": "A1", "cents": 500})
    assert Bank.charged == {}


async def test_a_charge_is_tried_again_each_minute(clock):
    Bank.down = 2
    await place_order("A1", 500)
    await clock.advance(119)
    assert Bank.charged == {}
    await clock.advance(1)
    assert Bank.charged == {"A1": 500}


async def test_a_reminder_comes_an_hour_after_the_charge(clock):
    await place_order("A1", 500)
    await clock.advance(59 * 60)
    assert (Bank.charged, Mailbox.sent) == ({"A1": 500}, [])
    await clock.advance(60)
    assert Mailbox.sent == ["How do you like A1?"]


async def test_the_day_is_closed_at_two_in_the_night(clock):
    await place_order("A1", 500)
    await place_order("A2", 700)
    await clock.advance(13 * 3600 + 59 * 60)
    assert len(Mailbox.sent) == 2
    await clock.advance(60)
    assert Mailbox.sent[2:] == ["2 orders, 1200 cents"]
