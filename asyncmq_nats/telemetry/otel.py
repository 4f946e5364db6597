"""Traces and metrics by OpenTelemetry, after its conventions for messaging. Needs the extra `otel`.

`instrument()` makes spans of additions, runs and ends of jobs. The context of a trace travels in
the `meta` of a job (`traceparent`, `tracestate`, `baggage`), so programs in other languages can
take part. Without an SDK that is set up, OpenTelemetry drops all spans and metrics.
"""

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import Any, Final
from urllib.parse import urlsplit

from opentelemetry import context as contexts
from opentelemetry import metrics, propagate, trace
from opentelemetry.trace import Link, Span, SpanKind, Status, StatusCode

from asyncmq_nats._clock import NANOSECONDS
from asyncmq_nats.context import JobContext
from asyncmq_nats.jobs import Job
from asyncmq_nats.middleware import (
    AddJobs,
    Ending,
    Middleware,
    RunTask,
    add_middleware,
    remove_middleware,
)
from asyncmq_nats.settings import settings

__all__ = ["OpenTelemetryMiddleware", "TraceFields", "instrument"]

NAME: Final = "asyncmq_nats"
CONTEXT_KEY: Final = "opentelemetry"
"""Under this name the context of a run is kept until its end, if its span is recorded."""
BUCKET_BOUNDS: Final = (
    0.005,
    0.01,
    0.025,
    0.05,
    0.075,
    0.1,
    0.25,
    0.5,
    0.75,
    1.0,
    2.5,
    5.0,
    7.5,
    10.0,
)
"""Upper bounds of the histograms in seconds: those of the conventions."""
API: Final = ("opentelemetry.trace", "opentelemetry.metrics")
LOOK_INTERVAL: Final = 0.1
"""Seconds for which it is taken as known whether there is an SDK."""
FAILURES: Final = frozenset({"failed", "retrying"})
NO_CONTEXT: Final = contexts.Context()
DEFAULT_PORT: Final = 4222


def instrument(
    queue: str | None = None,
    *,
    tracer_provider: trace.TracerProvider | None = None,
    meter_provider: metrics.MeterProvider | None = None,
    continue_trace: bool = True,
) -> "OpenTelemetryMiddleware":
    """Make spans and metrics of the jobs of a queue, or of all queues, in this process.

    Call it before workers start. Return what `uninstrument` takes back.

    Args:
        queue: its name; `None` for all.
        tracer_provider: instead of the global one.
        meter_provider: likewise.
        continue_trace: whether a run is part of the trace in which the job was added. If not, it
            begins a trace of its own, with a link to that one: for jobs that run long after.
    """
    middleware = OpenTelemetryMiddleware(
        tracer_provider, meter_provider, continue_trace=continue_trace
    )
    add_middleware(middleware, queue)
    return middleware


class OpenTelemetryMiddleware(Middleware):
    """Spans and metrics of jobs; see `instrument`, which takes the same arguments."""

    def __init__(
        self,
        tracer_provider: trace.TracerProvider | None = None,
        meter_provider: metrics.MeterProvider | None = None,
        *,
        continue_trace: bool = True,
    ) -> None:
        self._tracer = trace.get_tracer(NAME, tracer_provider=tracer_provider)
        meter = metrics.get_meter(NAME, meter_provider=meter_provider)
        self._providers = tracer_provider, meter_provider
        self._is_traced = self._is_metered = True
        self._look_at = 0.0
        self._continue_trace = continue_trace
        self._common: dict[str, Any] = {"messaging.system": "nats", **_server()}
        # The attributes that spans and metrics share: made once, and never changed.
        self._attributes_of = cache(self._make_attributes)
        self._operation_seconds = meter.create_histogram(
            "messaging.client.operation.duration",
            "s",
            "Duration of adding jobs and of storing their ends.",
            explicit_bucket_boundaries_advisory=BUCKET_BOUNDS,
        )
        self._process_seconds = meter.create_histogram(
            "messaging.process.duration",
            "s",
            "Duration of a run of a task.",
            explicit_bucket_boundaries_advisory=BUCKET_BOUNDS,
        )
        self._sent = meter.create_counter(
            "messaging.client.sent.messages", "{message}", "Jobs that were added."
        )
        self._consumed = meter.create_counter(
            "messaging.client.consumed.messages", "{message}", "Runs of tasks."
        )

    def uninstrument(self) -> None:
        """Undo `instrument`. Workers that run keep it."""
        remove_middleware(self)

    # -- see `Middleware`

    async def enqueue(self, queue: str, jobs: Sequence[Job], add: AddJobs) -> list[str]:
        """Add jobs within a span, and send its context along with each."""
        attributes = self._attributes_of("send", queue)
        with self._tracer.start_as_current_span(
            f"send {queue}", kind=SpanKind.PRODUCER, attributes=attributes
        ) as span:
            if span.is_recording():
                span.set_attributes(_of_jobs(jobs))
            carrier: dict[str, str] = {}
            propagate.inject(carrier)
            sent = [replace(job, meta={**job.meta, **carrier}) for job in jobs] if carrier else jobs
            with self._measured(span, attributes):
                ids = await add(sent)
        self._sent.add(len(jobs), attributes)
        return ids

    async def run(self, context: JobContext, call: RunTask) -> Any:
        """Run a task within a span."""
        begun = time.perf_counter()
        if begun >= self._look_at:
            self._look(begun)
        if not (self._is_traced or self._is_metered or context.meta):
            return await call()
        queue, task = context.queue, context.task_id
        attributes = self._attributes_of("process", queue, task)
        parent = sender = _sender(context)
        links: list[Link] | None = None
        if not self._continue_trace:
            linked = trace.get_current_span(sender).get_span_context()
            parent, links = NO_CONTEXT, [Link(linked)] if linked.is_valid else []
        span = self._tracer.start_span(
            f"process {queue}", parent, SpanKind.CONSUMER, attributes, links
        )
        here = trace.set_span_in_context(span, sender)
        token = contexts.attach(here)
        if span.is_recording():
            span.set_attributes(_of_run(context))
            context.notes[CONTEXT_KEY] = here
        begun = time.perf_counter()
        try:
            return await call()
        except BaseException as error:
            attributes = {**attributes, "error.type": _blame(span, error)}
            raise
        finally:
            seconds = time.perf_counter() - begun
            contexts.detach(token)
            span.end()
            if self._is_metered:
                self._consumed.add(1, attributes)
                self._process_seconds.record(seconds, attributes)

    def end(self, context: JobContext, ending: Ending) -> None:
        """Make a span for the storing of a run's outcome, if the run's own span is recorded."""
        parent = context.notes.get(CONTEXT_KEY)
        has_span = self._is_traced and (parent is not None or not ending.started_at)
        if not (has_span or self._is_metered):
            return
        queue = context.queue
        seconds = max(0.0, context.now() - ending.ended_at)
        attributes = self._attributes_of("settle", queue)
        if ending.state in FAILURES:
            attributes = {**attributes, "error.type": ending.error_type or "_OTHER"}
        self._operation_seconds.record(seconds, attributes)
        if not has_span:
            return
        if parent is None:  # it did not run
            parent = _sender(context)
        span = self._tracer.start_span(
            f"settle {context.queue}",
            parent,
            SpanKind.CLIENT,
            {
                **attributes,
                "asyncmq.state": ending.state,
                "asyncmq.task": context.task_id,
                **_of_run(context),
            },
            start_time=time.time_ns() - int(seconds * NANOSECONDS),
        )
        if ending.state == "failed":
            span.set_status(Status(StatusCode.ERROR, ending.error))
        span.end()

    # -- parts

    def _look(self, now: float) -> None:
        """See whether anything hears of spans and metrics: an SDK may be set up at any time."""
        traces, meters = self._providers
        self._is_traced = not _does_nothing(traces or trace.get_tracer_provider())
        self._is_metered = not _does_nothing(meters or metrics.get_meter_provider())
        self._look_at = now + LOOK_INTERVAL

    def _make_attributes(self, name: str, queue: str, task: str | None = None) -> dict[str, Any]:
        attributes = {
            **self._common,
            "messaging.operation.name": name,
            "messaging.operation.type": name,
            "messaging.destination.name": queue,
        }
        return attributes if task is None else attributes | {"asyncmq.task": task}

    @contextmanager
    def _measured(self, span: Span, attributes: dict[str, Any]) -> Iterator[None]:
        begun = time.perf_counter()
        try:
            yield
        except BaseException as error:
            kind = type(error).__qualname__
            attributes = {**attributes, "error.type": kind}
            span.set_attribute("error.type", kind)
            raise
        finally:
            self._operation_seconds.record(time.perf_counter() - begun, attributes)


def _does_nothing(provider: trace.TracerProvider | metrics.MeterProvider) -> bool:
    """Return whether a provider is one of the API's own, which stand in for an SDK."""
    return type(provider).__module__.startswith(API)


def _sender(context: JobContext) -> contexts.Context:
    """Return the trace context that came with the job."""
    meta = context.meta
    return propagate.extract(meta) if meta else NO_CONTEXT


def _server() -> dict[str, Any]:
    """Return the address of the first server of the settings, as the conventions name it."""
    first = settings.servers[0]
    parts = urlsplit(first if "://" in first else f"nats://{first}")
    return {
        "server.address": parts.hostname or "localhost",
        "server.port": parts.port or DEFAULT_PORT,
    }


def _of_jobs(jobs: Sequence[Job]) -> dict[str, Any]:
    if len(jobs) != 1:
        return {"messaging.batch.message_count": len(jobs)}
    return {"messaging.message.id": jobs[0].job_id, "asyncmq.task": jobs[0].task_id}


def _of_run(context: JobContext) -> dict[str, Any]:
    return {
        "messaging.message.id": context.id,
        "asyncmq.attempt": context.attempt,
        "asyncmq.worker": context.worker,
    }


def _blame(span: Span, error: BaseException) -> str:
    """Note on a span what its task raised; return the kind of it."""
    kind = type(error).__qualname__
    if span.is_recording():
        if isinstance(error, Exception):
            span.record_exception(error)
            span.set_status(Status(StatusCode.ERROR, f"{kind}: {error}"))
        span.set_attribute("error.type", kind)
    return kind


class TraceFields(logging.Filter):
    """Puts `trace_id` and `span_id` into each record, in hexadecimal; `""` outside a trace.

    Add it to a handler, beside `telemetry.logs.JobFields`.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        """Fill in the fields."""
        found = trace.get_current_span().get_span_context()
        known = found.is_valid
        record.trace_id = trace.format_trace_id(found.trace_id) if known else ""
        record.span_id = trace.format_span_id(found.span_id) if known else ""
        return True
