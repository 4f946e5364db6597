"""The application with Celery and Redis."""

import os

from business import Bank, Mailbox
from celery import Celery, chord
from celery.schedules import crontab
from fastapi import FastAPI
from pydantic import BaseModel

queue = Celery("shop", broker=os.environ["BROKER"], backend=os.environ["RESULTS"])
queue.conf.update(
    # By default a job is gone when its worker dies.
    task_acks_late=True,
    task_reject_on_worker_lost=True,
    # By default Redis delivers a job again that has waited for an hour, as the reminder does.
    broker_transport_options={"visibility_timeout": 7200},
    timezone="Europe/Berlin",
    beat_schedule={"night": {"task": "close_day", "schedule": crontab(hour=2, minute=0)}},
)
app = FastAPI()


class Order(BaseModel):
    id: str
    cents: int


@app.post("/orders", status_code=202)
def place_order(order: Order) -> dict[str, str]:
    return {"job": charge.delay(order.id, order.cents).id}


@queue.task(autoretry_for=[ConnectionError], default_retry_delay=60, max_retries=5)
def charge(order, cents):
    Bank.charge(order, cents)
    remind.apply_async([order], countdown=3600)


@queue.task
def remind(order):
    Mailbox.sent.append(f"How do you like {order}?")


@queue.task(name="close_day")
def close_day():
    chord([book.s(order, cents) for order, cents in Bank.charged.items()], report.s()).delay()


@queue.task
def book(order, cents):
    return cents


@queue.task
def report(booked):
    Mailbox.sent.append(f"{len(booked)} orders, {sum(booked)} cents")
