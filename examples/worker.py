"""A worker: runs the jobs of the queue of tasks.py until SIGTERM or Ctrl-C.

    ASYNCMQ_NATS_SERVERS   addresses of the NATS servers (nats://127.0.0.1:4222)
    CONCURRENCY            jobs at a time (10)
    LOG_LEVEL              DEBUG, INFO, WARNING or ERROR (INFO)

When asked to stop, it takes no more jobs, lets those that run finish for
ASYNCMQ_NATS_SHUTDOWN_TIMEOUT seconds, and hands the rest back.
"""

import logging
import os
import sys

import tasks

from asyncmq_nats import Queue
from asyncmq_nats.exceptions import BackendError


def read_concurrency() -> int:
    text = os.environ.get("CONCURRENCY") or "10"
    if not text.isdecimal() or int(text) < 1:
        sys.exit(f"CONCURRENCY must be a whole number from 1 on, not {text!r}")
    return int(text)


def read_log_level() -> str:
    level = (os.environ.get("LOG_LEVEL") or "INFO").upper()
    if level not in logging.getLevelNamesMapping():
        sys.exit(f"LOG_LEVEL must be one of DEBUG, INFO, WARNING and ERROR, not {level!r}")
    return level


def main() -> None:
    logging.basicConfig(
        level=read_log_level(), format="%(asctime)s %(levelname)-7s %(name)s: %(message)s"
    )
    queue = Queue(tasks.QUEUE, concurrency=read_concurrency())
    try:
        queue.start()
    except BackendError as error:  # no server, or not one that will do
        sys.exit(str(error))


if __name__ == "__main__":
    main()
