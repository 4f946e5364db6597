"""The application with SAQ and Redis."""

import os
import time
from contextlib import asynccontextmanager
from zoneinfo import ZoneInfo

from business import Bank, Mailbox
from fastapi import FastAPI
from pydantic import BaseModel
from saq import CronJob, Queue

queue = Queue.from_url(os.environ["REDIS"])


@asynccontextmanager
async def lifespan(app):
    await queue.connect()
    yield
    await queue.disconnect()


app = FastAPI(lifespan=lifespan)


class Order(BaseModel):
    id: str
    cents: int


@app.post("/orders", status_code=202)
async def place_order(order: Order) -> dict[str, str]:
    job = await queue.enqueue(
        "charge", order=order.id, cents=order.cents, retries=6, retry_delay=60
    )
    return {"job": job.key}


async def charge(ctx, *, order, cents):
    Bank.charge(order, cents)
    await queue.enqueue("remind", order=order, scheduled=time.time() + 3600)


async def remind(ctx, *, order):
    Mailbox.sent.append(f"How do you like {order}?")


async def close_day(ctx):
    orders = [{"order": order, "cents": cents} for order, cents in Bank.charged.items()]
    booked = await queue.map("book", orders)
    Mailbox.sent.append(f"{len(booked)} orders, {sum(booked)} cents")


async def book(ctx, *, order, cents):
    return cents


settings = {
    "queue": queue,
    "functions": [charge, remind, book],
    "cron_jobs": [CronJob(close_day, cron="0 2 * * *", timeout=3600, retries=3)],
    "cron_tz": ZoneInfo("Europe/Berlin"),
}
