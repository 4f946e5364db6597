"""A clock that a test moves: Celery has none.

It takes jobs from the broker in memory and runs what is due, and has the scheduler look.
"""

import time
from datetime import datetime
from queue import Empty

from celery.beat import Scheduler
from celery.worker.request import Request


class Clock:
    def __init__(self, app, traveller):
        self._app = app
        self._traveller = traveller
        self._beat = Scheduler(app=app)
        self._waiting = []

    def jobs(self):
        """Return the messages that wait."""
        with self._app.connection_for_write() as connection:
            queue = connection.SimpleQueue("celery")
            try:
                while True:
                    self._waiting.append(queue.get(block=False))
            except Empty:
                return self._waiting

    def advance(self, seconds):
        """Move the time, and run in order what is due until then."""
        end = time.time() + seconds
        while True:
            pause = self._beat.tick()
            self._run_due()
            now = time.time()
            if now >= end:
                return
            times = [_due(job) for job in self.jobs()]
            self._traveller.move_to(min(end, now + max(pause, 0.01), *times))

    def _run_due(self):
        while due := [job for job in self.jobs() if _due(job) <= time.time()]:
            job = min(due, key=_due)
            self._waiting.remove(job)
            Request(job, app=self._app).execute()


def _due(job):
    eta = job.headers["eta"]
    return datetime.fromisoformat(eta).timestamp() if eta else 0.0
