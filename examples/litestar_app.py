"""Litestar: requests add jobs, and a worker in the same process runs them.

Needs litestar and uvicorn. ASYNCMQ_NATS_SERVERS=nats://127.0.0.1:4222 uvicorn --app-dir examples
litestar_app:app
"""

from dataclasses import dataclass
from typing import Any

from litestar import Litestar, get, post
from litestar.exceptions import NotFoundException

from asyncmq_nats import Queue, Worker, task
from asyncmq_nats.contrib.web import lifespan


@dataclass
class Order:
    customer: str
    total: float


@task(queue="litestar-shop", retries=3)
async def send_receipt(order: Order) -> str:
    return f"{order.customer} pays {order.total:.2f}"


queue = Queue("litestar-shop")


@post("/orders", status_code=202)
async def place_order(data: Order) -> dict[str, str]:
    return {"job": await send_receipt.enqueue(data)}


@get("/jobs/{job_id:str}")
async def show_job(job_id: str) -> dict[str, Any]:
    job = await queue.get_job(job_id)
    if job is None:
        raise NotFoundException("no such job")
    return {"state": job["status"], "result": job["result"]}


app = Litestar(
    [place_order, show_job],
    lifespan=[lifespan(queue, worker=Worker(queue, concurrency=10))],
)
