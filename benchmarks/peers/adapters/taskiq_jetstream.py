"""taskiq-nats on JetStream: no results, which is taskiq's default. The worker is `taskiq worker`.

Delayed jobs are put into a schedule source; `taskiq scheduler`, a process of its own, sends them.
"""

import os
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

from adapter import CONCURRENCY, QUEUE, URL, Adapter, become, main, meter
from taskiq import AsyncTaskiqDecoratedTask, TaskiqScheduler
from taskiq_nats import NATSKeyValueScheduleSource, PullBasedJetStreamBroker


async def no_operation(number: int, due: float) -> int:
    return meter.note(number, due)


def make_broker(queue: str) -> PullBasedJetStreamBroker:
    broker = PullBasedJetStreamBroker(
        URL, subject=f"jobs.{queue}", stream_name=queue, durable=queue
    )
    broker.register_task(no_operation, task_name="no_operation")
    return broker


broker = make_broker(QUEUE or "jobs")
source = NATSKeyValueScheduleSource(URL)
scheduler = TaskiqScheduler(broker, [source])


class Taskiq(Adapter):
    packages = "taskiq", "taskiq-nats", "nats-py"

    async def connect(self) -> None:
        self._tasks: dict[str, AsyncTaskiqDecoratedTask[..., int]] = {}

    async def _task(self, queue: str) -> AsyncTaskiqDecoratedTask[..., int]:
        if queue not in self._tasks:
            broker = make_broker(queue)
            await broker.startup()
            task = broker.find_task("no_operation")
            assert task is not None
            self._tasks[queue] = task
        return self._tasks[queue]

    async def add(self, queue: str, number: int) -> None:
        await (await self._task(queue)).kiq(number, 0.0)

    async def add_due(self, queue: str, jobs: int, due: float) -> None:
        task = await self._task(queue)
        await source.startup()
        for number in range(jobs):
            when = datetime.fromtimestamp(due, UTC)
            await task.schedule_by_time(source, when, number, due)

    def work(self) -> None:
        quiet = "--log-level", "WARNING"
        if QUEUE == "due":
            # It looks for new schedules each minute by default: jobs would be half a minute late.
            program = str(Path(sys.executable).with_name("taskiq"))
            options = "taskiq_jetstream:scheduler", "--update-interval", "1", *quiet
            folder = str(Path(__file__).parent)
            subprocess.Popen(
                [program, "scheduler", *options],
                cwd=folder,
                env=os.environ | {"PYTHONPATH": folder},
            )
        tasks = str(CONCURRENCY)
        options = "--workers", "1", "--max-async-tasks", tasks, *quiet
        become("taskiq", "worker", "taskiq_jetstream:broker", *options)


if __name__ == "__main__":
    main(Taskiq())
