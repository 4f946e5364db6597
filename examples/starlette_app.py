"""Starlette: requests add jobs, and a worker in the same process runs them.

Needs starlette and uvicorn. ASYNCMQ_NATS_SERVERS=nats://127.0.0.1:4222 uvicorn --app-dir examples
starlette_app:app
"""

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from asyncmq_nats import Queue, Worker, task
from asyncmq_nats.contrib.web import lifespan


@task(queue="starlette-shop", retries=3)
async def send_receipt(customer: str, total: float) -> str:
    return f"{customer} pays {total:.2f}"


queue = Queue("starlette-shop")


async def place_order(request: Request) -> JSONResponse:
    order = await request.json()
    job_id = await send_receipt.enqueue(order["customer"], order["total"])
    return JSONResponse({"job": job_id}, 202)


async def show_job(request: Request) -> JSONResponse:
    job = await queue.get_job(request.path_params["job_id"])
    if job is None:
        return JSONResponse({"error": "no such job"}, 404)
    return JSONResponse({"state": job["status"], "result": job["result"]})


app = Starlette(
    lifespan=lifespan(queue, worker=Worker(queue, concurrency=10)),
    routes=[
        Route("/orders", place_order, methods=["POST"]),
        Route("/jobs/{job_id}", show_job),
    ],
)
