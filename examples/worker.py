"""A worker: runs the jobs of the queue of tasks.py until SIGTERM or Ctrl-C.

    ASYNCMQ_NATS_SERVERS   addresses of the NATS servers (nats://127.0.0.1:4222)
    CONCURRENCY            jobs at a time (10)
    LOG_LEVEL              INFO

When asked to stop, it takes no more jobs, lets those that run finish for ASYNCMQ_NATS_SHUTDOWN_TIMEOUT seconds, and hands the rest back.
"""

import logging
import os
import sys

import tasks

from asyncmq_nats import Queue
from asyncmq_nats.exceptions import BackendError


def main() -> None:
    logging.basicConfig(level=os.environ.get("LOG_LEVEL", "INFO"), format="%(asctime)s %(levelname)-7s %(name)s: %(message)s")
    queue = Queue(tasks.QUEUE, concurrency=int(os.environ.get("CONCURRENCY", "10")))
    try:
        queue.start()
    except BackendError as error:  # no server, or not one that will do
        sys.exit(str(error))


if __name__ == "__main__":
    main()
