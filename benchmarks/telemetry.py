"""The cost of the history and of OpenTelemetry in CPU time per job, with no-op jobs.

    python benchmarks/telemetry.py [--jobs 4000] [--rounds 9]

Needs the extras `embedded` and `otel`, and opentelemetry-sdk. The jobs are added first; then each
way runs its own queue in this process, in turn, in an order that is turned each round. The CPU
time of this process is what counts. Ratios are of one round, the table shows their medians; on a
machine that does other work the least of each way says more. `with spans`: the SDK samples every
span and drops it at the exporter; `no SDK`: OpenTelemetry is called and does nothing.
"""

import argparse
import statistics
import time
from collections.abc import Sequence
from typing import Final

import anyio
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult

from asyncmq_nats import NATSBackend, Queue, Settings
from asyncmq_nats.runtime.program import run_program
from asyncmq_nats.runtime.registry import TaskRegistry
from asyncmq_nats.telemetry.otel import OpenTelemetryMiddleware

PLAIN: Final = "nothing"
HISTORY: Final = "the history"
NO_SDK: Final = "OpenTelemetry, no SDK"
SPANS: Final = "OpenTelemetry, with spans"
WAYS: Final = (PLAIN, HISTORY, NO_SDK, SPANS)


class Dropped(SpanExporter):
    """Takes spans, as an exporter does, and forgets them."""

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        return SpanExportResult.SUCCESS


class Bench:
    """The queues of one server, and the CPU time of each way by round."""

    def __init__(self, url: str, jobs: int) -> None:
        self._url = url
        self._jobs = jobs
        self._left = 0
        self._over = anyio.Event()
        self._registry = TaskRegistry()
        self._registry.register(self._no_operation, queue="bench", name="no_operation")
        self._traces = TracerProvider()
        self._traces.add_span_processor(BatchSpanProcessor(Dropped()))
        self.seconds: dict[str, list[float]] = {way: [] for way in WAYS}

    async def _no_operation(self, number: int) -> int:
        self._left -= 1
        if self._left == 0:
            self._over.set()
        return number

    async def run(self, way: str, number: int) -> float:
        """Run the jobs of a queue of its own, and return the CPU seconds per job."""
        settings = Settings(storage="memory", metrics=way == HISTORY, any_task=True)
        middleware = []
        if way == NO_SDK:
            middleware = [OpenTelemetryMiddleware()]
        elif way == SPANS:
            middleware = [OpenTelemetryMiddleware(self._traces, MeterProvider())]
        async with NATSBackend(self._url, settings=settings) as backend:
            name = f"bench{WAYS.index(way)}_{number}"
            queue = Queue(
                name, backend, concurrency=16, registry=self._registry, middleware=middleware
            )
            entries = [{"task_id": "no_operation", "args": [n]} for n in range(self._jobs)]
            await queue.add_bulk(entries)
            self._left, self._over = self._jobs, anyio.Event()
            async with anyio.create_task_group() as group:
                begun = time.process_time()
                runner = queue.runner()
                await group.start(runner.run)
                await self._over.wait()
                used = time.process_time() - begun
                runner.stop()
            await queue.obliterate(force=True)
        return used / self._jobs


async def main(jobs: int, rounds: int) -> None:
    async with NATSBackend.embedded() as backend:
        bench = Bench(backend.url, jobs)
        for way in WAYS:  # not counted: code is loaded, memory is taken
            await bench.run(way, rounds)
        for number in range(rounds):
            turn = number % len(WAYS)
            for way in WAYS[turn:] + WAYS[:turn]:
                bench.seconds[way].append(await bench.run(way, number))
    least = min(bench.seconds[PLAIN])
    print("| with | CPU per job, µs, least | beside nothing | median | beside nothing |")
    print("| --- | --- | --- | --- | --- |")
    for way in WAYS:
        pairs = zip(bench.seconds[way], bench.seconds[PLAIN], strict=True)
        ratio = statistics.median(mine / plain for mine, plain in pairs)
        best, cpu = min(bench.seconds[way]), statistics.median(bench.seconds[way])
        print(
            f"| {way} | {1e6 * best:.1f} | {100 * (best / least - 1):+.1f} % "
            f"| {1e6 * cpu:.1f} | {100 * (ratio - 1):+.1f} % |"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--jobs", type=int, default=4_000)
    parser.add_argument("--rounds", type=int, default=9)
    given = parser.parse_args()
    run_program(lambda: main(given.jobs, given.rounds))
