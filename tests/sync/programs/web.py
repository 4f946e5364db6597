"""A Flask application for gunicorn: each request enqueues a job.

`PRELOAD=1`: so does its import.
"""

import os

from flask import Flask

from asyncmq_nats import NATSBackend, set_default_backend, task
from asyncmq_nats.sync import Queue, enqueue

set_default_backend(NATSBackend(os.environ["NATS"]))
queue = Queue("mail")


@task(queue="mail", name="send")
async def send(to: str) -> None: ...


app = Flask(__name__)
if os.environ.get("PRELOAD"):
    enqueue(send, "from the parent")


@app.get("/<to>")
def add(to: str) -> dict[str, object]:
    job_id = enqueue(send, to)
    job = queue.get_job(job_id)
    return {"id": job_id, "pid": os.getpid(), "args": job and job["args"]}
