"""The cost of the history and of OpenTelemetry for a worker, in CPU time per job.

    python benchmarks/telemetry.py [--blocks 60] [--work 0.001] [--only traced] [--rates]

Needs the extras `embedded` and `otel`, and opentelemetry-sdk. One worker runs one queue of jobs
that do nothing, or compute for `--work` seconds. After each 500 jobs it is switched to another
way, so that all ways meet the same moments of a busy machine. The CPU time of this process counts,
the exporter's thread included. A ratio is of a block and of the block beside it in which the worker
does nothing more.

Jobs come from a traced producer: each has a `traceparent`, of a trace of its own. In `1 %` one of a
hundred was sampled, in `recorded` all were, and the SDK has a batch processor whose exporter drops
what it gets. `metrics`: with a reader. `bare`: not this library, but only the calls that the
conventions need for a job, as the least that OpenTelemetry costs: the context is read from the job
and attached, a span of the run and one of its end if recorded, two histograms and a counter.

`--rates`: jobs per second by the clock too, of a whole block, with the server's share of the time.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from typing import Any, Final

import anyio
from opentelemetry import context as contexts
from opentelemetry import metrics, propagate, trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace import SpanKind

from asyncmq_nats import NATSBackend, Queue, Settings
from asyncmq_nats.context import JobContext
from asyncmq_nats.middleware import Chain, Ending, Middleware, RunTask
from asyncmq_nats.runtime.program import run_program
from asyncmq_nats.runtime.registry import TaskRegistry
from asyncmq_nats.runtime.runner import Runner
from asyncmq_nats.telemetry.otel import BUCKET_BOUNDS, OpenTelemetryMiddleware

BLOCK: Final = 500
QUEUE: Final = "bench"


class Dropped(SpanExporter):
    """Takes spans, as an exporter does, and forgets them."""

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        return SpanExportResult.SUCCESS


class Bare(Middleware):
    """The calls of OpenTelemetry that a job needs, and nothing else."""

    def __init__(self, traces: TracerProvider | None, meters: MeterProvider | None) -> None:
        self._tracer = trace.get_tracer("bare", tracer_provider=traces)
        meter = metrics.get_meter("bare", meter_provider=meters)
        self._seconds = [
            meter.create_histogram(name, "s", explicit_bucket_boundaries_advisory=BUCKET_BOUNDS)
            for name in ("messaging.process.duration", "messaging.client.operation.duration")
        ]
        self._consumed = meter.create_counter("messaging.client.consumed.messages", "{message}")
        self._is_metered = meters is not None
        self._common = {
            "messaging.system": "nats",
            "messaging.operation.name": "process",
            "messaging.operation.type": "process",
            "messaging.destination.name": QUEUE,
            "server.address": "127.0.0.1",
            "server.port": 4222,
            "asyncmq.task": "work",
        }
        self._all = self._common | {
            "messaging.message.id": "a" * 22,
            "asyncmq.attempt": 1,
            "asyncmq.worker": "a" * 20,
        }

    async def run(self, context: JobContext, call: RunTask) -> Any:
        sender = propagate.extract(context.meta)
        span = self._tracer.start_span("process", sender, SpanKind.CONSUMER, self._all)
        here = trace.set_span_in_context(span, sender)
        token = contexts.attach(here)
        try:
            return await call()
        finally:
            contexts.detach(token)
            span.end()
            if span.is_recording() or span.get_span_context().trace_flags.sampled:
                self._tracer.start_span("settle", here, SpanKind.CLIENT, self._all).end()
            if self._is_metered:
                self._consumed.add(1, self._common)
                for histogram in self._seconds:
                    histogram.record(0.001, self._common)


class RunOnly(Middleware):
    async def run(self, context: JobContext, call: RunTask) -> Any:
        return await call()


class EndOnly(Middleware):
    def end(self, context: JobContext, ending: Ending) -> None: ...


class EndAwaited(Middleware):
    async def end(self, context: JobContext, ending: Ending) -> None: ...


@dataclass
class Way:
    """The work of the worker beside its jobs, and the CPU seconds of its blocks."""

    name: str
    middleware: Middleware | None = None
    history: bool = False
    seconds: list[float] = field(default_factory=list)
    taken: list[float] = field(default_factory=list)
    """Seconds by the clock of the same blocks, for each job."""


def tracer_provider() -> TracerProvider:
    provider = TracerProvider(sampler=ParentBased(TraceIdRatioBased(0.01)))
    provider.add_span_processor(BatchSpanProcessor(Dropped()))
    return provider


def meter_provider() -> MeterProvider:
    return MeterProvider([InMemoryMetricReader()])


def ways_untraced() -> list[Way]:
    return [
        Way("nothing"),
        Way("the history", history=True),
        Way("a middleware around runs", RunOnly()),
        Way("a plain function at ends", EndOnly()),
        Way("an async function at ends", EndAwaited()),
        Way("OpenTelemetry, no SDK", OpenTelemetryMiddleware()),
    ]


def ways_traced() -> list[Way]:
    bare, ours = Bare, OpenTelemetryMiddleware
    return [
        Way("nothing"),
        Way("OpenTelemetry, no SDK", ours()),
        Way("OpenTelemetry", ours(tracer_provider())),
        Way("OpenTelemetry, metrics", ours(tracer_provider(), meter_provider())),
        Way("bare, no SDK", bare(None, None)),
        Way("bare", bare(tracer_provider(), None)),
        Way("bare, metrics", bare(tracer_provider(), meter_provider())),
    ]


class Bench:
    """One worker, which is switched from way to way."""

    def __init__(self, ways: Sequence[Way], blocks: int, work: float) -> None:
        self._ways = ways
        self._turns = self._order(blocks)
        self._way: Way | None = None
        self._work = work
        self._since = self._begun = 0.0
        self._count = 0
        self._over = anyio.Event()
        self._runner: Runner
        self.jobs = BLOCK * (len(ways) * blocks + 2)
        self.registry = TaskRegistry()
        self.registry.register(self._task, queue=QUEUE, name="work")

    def _order(self, blocks: int) -> Iterator[Way]:
        for number in range(blocks):
            turn = number % len(self._ways)
            yield from self._ways[turn:] + self._ways[:turn]

    async def _task(self, number: int) -> int:
        self._count += 1
        if self._count % BLOCK == 0:
            self._switch()
        if self._work:
            until = time.perf_counter() + self._work
            while time.perf_counter() < until:
                pass
        return number

    def _switch(self) -> None:
        now = time.process_time()
        if self._way is not None:
            self._way.seconds.append((now - self._since) / BLOCK)
            self._way.taken.append((time.perf_counter() - self._begun) / BLOCK)
        self._way = next(self._turns, None)
        if self._way is None:
            self._over.set()
            return
        slots = self._runner._slots
        slots._recorder = self._recorder if self._way.history else None
        middleware = self._way.middleware
        slots._middleware = Chain.of(QUEUE, [] if middleware is None else [middleware])
        self._since, self._begun = time.process_time(), time.perf_counter()

    async def run(self, url: str, meta: Callable[[int], dict[str, str]]) -> None:
        settings = Settings(storage="memory")
        async with NATSBackend(url, settings=settings) as backend:
            queue = Queue(QUEUE, backend, concurrency=16, registry=self.registry)
            for start in range(0, self.jobs, 5_000):
                numbers = range(start, min(start + 5_000, self.jobs))
                await queue.add_bulk(
                    [{"task_id": "work", "args": [n], "meta": meta(n)} for n in numbers]
                )
            async with anyio.create_task_group() as group:
                self._runner = queue.runner()
                self._recorder = self._runner._slots._recorder
                await group.start(self._runner.run)
                await self._over.wait()
                self._runner.stop()
            await queue.obliterate(force=True)


def traceparent(flags: Iterator[str]) -> Callable[[int], dict[str, str]]:
    return lambda n: {"traceparent": f"00-{n + 1:032x}-{n + 1:016x}-{next(flags)}"}


def show_rates(title: str, ways: Sequence[Way]) -> None:
    print(f"\n| {title} | jobs/s, median | less, % |\n| --- | --- | --- |")
    for way in ways:
        ratio = statistics.median(p / m for m, p in zip(way.taken, ways[0].taken, strict=True))
        print(f"| {way.name} | {1 / statistics.median(way.taken):,.0f} | {100 * (1 - ratio):.1f} |")


def show(title: str, ways: Sequence[Way]) -> None:
    plain = ways[0].seconds
    least = statistics.quantiles(plain, n=4)[0]
    print(f"\n| {title} | CPU per job, µs, quartile | more, % | median | more, % |")
    print("| --- | --- | --- | --- | --- |")
    for way in ways:
        quartile, median = statistics.quantiles(way.seconds, n=4)[:2]
        ratio = statistics.median(m / p for m, p in zip(way.seconds, plain, strict=True))
        print(
            f"| {way.name} | {1e6 * quartile:.1f} | {100 * (quartile / least - 1):+.1f} "
            f"| {1e6 * median:.1f} | {100 * (ratio - 1):+.1f} |"
        )


async def main(blocks: int, work: float, only: str, rates: bool) -> None:
    rare = cycle(["01"] + 99 * ["00"])
    kinds: list[tuple[str, list[Way], Callable[[int], dict[str, str]]]] = [
        ("not traced", ways_untraced(), lambda n: {}),
        ("1 % recorded", ways_traced(), traceparent(rare)),
        ("all recorded", ways_traced(), traceparent(cycle(["01"]))),
    ]
    for title, ways, meta in kinds:
        if only not in title:
            continue
        bench = Bench(ways, blocks, work)
        async with NATSBackend.embedded() as backend:
            await bench.run(backend.url, meta)
        show(title, ways)
        if rates:
            show_rates(title, ways)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--blocks", type=int, default=60)
    parser.add_argument("--work", type=float, default=0.0)
    parser.add_argument("--only", default="", help="a part of the title of a table")
    parser.add_argument("--rates", action="store_true")
    given = parser.parse_args()
    run_program(lambda: main(given.blocks, given.work, given.only, given.rates))
