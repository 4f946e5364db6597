"""FastAPI: requests add jobs, and a worker in the same process runs them.

Needs fastapi and uvicorn. ASYNCMQ_NATS_SERVERS=nats://127.0.0.1:4222 uvicorn --app-dir examples
fastapi_app:app

A worker of its own is `Worker(queue).start()` in another program; leave `worker=` out here then.
"""

from typing import Any

from fastapi import FastAPI, HTTPException
from pydantic import BaseModel

from asyncmq_nats import Queue, Worker, task
from asyncmq_nats.contrib.web import lifespan


class Order(BaseModel):
    customer: str
    total: float


@task(queue="fastapi-shop", retries=3)
async def send_receipt(order: Order) -> str:
    return f"{order.customer} pays {order.total:.2f}"


queue = Queue("fastapi-shop")
app = FastAPI(lifespan=lifespan(queue, worker=Worker(queue, concurrency=10)))


@app.post("/orders", status_code=202)
async def place_order(order: Order) -> dict[str, str]:
    return {"job": await send_receipt.enqueue(order)}


@app.get("/jobs/{job_id}")
async def show_job(job_id: str) -> dict[str, Any]:
    job = await queue.get_job(job_id)
    if job is None:
        raise HTTPException(404, "no such job")
    return {"state": job["status"], "result": job["result"]}
