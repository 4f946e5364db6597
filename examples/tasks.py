"""The tasks of worker.py and producer.py.

Both import this module, so both know them by the same names.
"""

import logging
from datetime import date

import anyio

from asyncmq_nats import task

QUEUE = "examples"

logger = logging.getLogger(__name__)


@task(queue=QUEUE, retries=3, backoff=2)
async def send_message(address: str, text: str) -> str:
    """An async task: many run at a time in one worker.

    After a failure it is tried three times more, 2, 4 and 8 seconds later.
    """
    await anyio.sleep(0.05)  # a mail server would be spoken to here
    logger.info("message to %s: %s", address, text)
    return f"sent to {address}"


@task(queue=QUEUE)
def count_words(text: str) -> int:
    """A sync task: it runs in a thread."""
    return len(text.split())


@task(queue=QUEUE, ttl=60)
async def report(day: date) -> str:
    """The annotation makes a date of the string in the job.

    A job that has not started after a minute expires.
    """
    return f"{day:%A}, day {day.timetuple().tm_yday} of {day.year}"
