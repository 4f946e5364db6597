"""The application with asyncmq-nats."""

from business import Bank, Mailbox
from fastapi import FastAPI
from pydantic import BaseModel

from asyncmq_nats import Backoff, Queue, current_job, task
from asyncmq_nats.contrib.web import lifespan

queue = Queue("shop")
app = FastAPI(lifespan=lifespan(queue))


class Order(BaseModel):
    id: str
    cents: int


@app.post("/orders", status_code=202)
async def place_order(order: Order) -> dict[str, str]:
    return {"job": await charge.enqueue(order.id, order.cents)}


@task("shop", retries=5, backoff=Backoff(kind="fixed", delay=60), retry_on=ConnectionError)
async def charge(order: str, cents: int) -> None:
    Bank.charge(order, cents)
    current_job().add(remind.options(delay=3600).call(order))


@task("shop")
async def remind(order: str) -> None:
    Mailbox.sent.append(f"How do you like {order}?")


@task("shop", name="close_day")
async def close_day() -> None:
    job = current_job()
    parts = [job.add(book.call(order, cents)) for order, cents in Bank.charged.items()]
    job.add(report.options(depends_on=parts).call())


@task("shop")
async def book(order: str, cents: int) -> int:
    return cents


@task("shop")
async def report() -> None:
    booked = await current_job().parent_results()
    Mailbox.sent.append(f"{len(booked)} orders, {sum(booked.values())} cents")


queue.add_repeatable("close_day", cron="0 2 * * *", timezone="Europe/Berlin")
