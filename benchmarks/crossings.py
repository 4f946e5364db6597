"""How often a job crosses from module to module, from `add` to its outcome, in memory.

    python benchmarks/crossings.py [--list]

A crossing is a call of a function in one module by a function in another; a coroutine that goes on
after a wait is no call. The backend counts as one module: what happens inside of the in-memory one
does not happen on a server; the count with its modules told apart is in parentheses. Counted by
`sys.setprofile`, after the queue is declared. Another release: `PYTHONPATH=<its checkout>`.
"""

import argparse
import statistics
import sys
from collections import Counter
from types import FrameType
from typing import Any, Final

import anyio

from asyncmq_nats import InMemoryBackend, Queue
from asyncmq_nats.tasks import TaskRegistry
from asyncmq_nats.workers import Worker

PACKAGE: Final = "asyncmq_nats."
BACKENDS: Final = "asyncmq_nats.backends"
JOBS: Final = 21
SETTLE_SECONDS: Final = 0.05
"""How long the worker may take to end with a job, in seconds, before the next one."""

registry = TaskRegistry()


async def work(value: int) -> int:
    return value


registry.register(work, queue="bench", name="work")


class Profile:
    """Counts the crossings while it is on."""

    def __init__(self) -> None:
        self.crossings: Counter[tuple[str, str]] = Counter()
        self.inside = 0
        """Crossings between modules of the backend."""
        self.modules: set[str] = set()
        self._seen: set[int] = set()
        self._frames: list[FrameType] = []  # kept, so that no id is used again

    def __call__(self, frame: FrameType, event: str, _: Any) -> None:
        if event != "call":
            return
        module = frame.f_globals.get("__name__", "")
        if not module.startswith(PACKAGE) or id(frame) in self._seen:
            return
        self._seen.add(id(frame))
        self._frames.append(frame)
        caller = "" if frame.f_back is None else frame.f_back.f_globals.get("__name__", "")
        self._note(caller, module)

    def _note(self, caller: str, module: str) -> None:
        self.modules.add(one_backend(module))
        if not caller.startswith(PACKAGE) or caller == module:
            return
        if one_backend(caller) == one_backend(module):
            self.inside += 1
        else:
            self.crossings[one_backend(caller), one_backend(module)] += 1


def one_backend(module: str) -> str:
    return BACKENDS if module.startswith(BACKENDS) else module


async def profile_job(queue: Queue, options: dict[str, Any]) -> Profile:
    """Add one job and wait until nothing of it is left to do."""
    profile = Profile()
    sys.setprofile(profile)
    try:
        await queue.add("work", [1], **options)
        await anyio.sleep(SETTLE_SECONDS)  # no reading: it would be counted as well
    finally:
        sys.setprofile(None)
    return profile


async def main(list_all: bool) -> None:
    queue = Queue("bench", InMemoryBackend(), registry=registry)
    worker = Worker(queue)
    async with anyio.create_task_group() as group:
        await group.start(worker.run)
        for what, chosen in (("a plain job", False), ("a job with a chosen id", True)):
            profiles = []
            for number in range(JOBS + 3):
                options = {"job_id": f"job-{number}"} if chosen else {}
                profiles.append(await profile_job(queue, options))
            counts = [sum(profile.crossings.values()) for profile in profiles[3:]]
            typical = min(profiles[3:], key=lambda each: sum(each.crossings.values()))
            inside = statistics.median(profile.inside for profile in profiles[3:])
            modules = statistics.median(len(profile.modules) for profile in profiles[3:])
            middle = statistics.median(counts)
            print(
                f"{what:24} {middle:4.0f} crossings ({middle + inside:.0f}), {modules:.0f} modules"
            )
            if list_all:
                for (caller, module), times in typical.crossings.most_common():
                    print(f"  {times:3} {caller} -> {module}")
        stats = await queue.queue_stats()
        assert stats["completed"] == 2 * (JOBS + 3), stats
        worker.stop()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--list", action="store_true", help="each pair of modules")
    anyio.run(main, parser.parse_args().list)
