"""Traces and metrics by OpenTelemetry.

Spans, attributes, and the context that travels with a job.
"""

import logging
from collections.abc import Awaitable, Callable, Iterator, Mapping
from typing import Any, cast

import anyio
import pytest
from opentelemetry import propagate, trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from asyncmq_nats import Fail, Job, Queue, current_job
from asyncmq_nats.backends.base import Backend, Write
from asyncmq_nats.context import JobContext
from asyncmq_nats.middleware import Ending, Middleware
from asyncmq_nats.runtime.registry import TaskRegistry
from asyncmq_nats.telemetry.otel import OpenTelemetryMiddleware, TraceFields, instrument
from tests.running import make_queue, only, run_jobs, running


class Spans:
    """The spans and the metrics that were recorded."""

    def __init__(self) -> None:
        self._exporter = InMemorySpanExporter()
        self.traces = TracerProvider()
        self.traces.add_span_processor(SimpleSpanProcessor(self._exporter))
        self._reader = InMemoryMetricReader()
        self.meters = MeterProvider([self._reader])

    def named(self, name: str) -> list[ReadableSpan]:
        return [span for span in self._exporter.get_finished_spans() if span.name == name]

    def names(self) -> list[str]:
        return [span.name for span in self._exporter.get_finished_spans()]

    def points(self, name: str, **attributes: str) -> list[Any]:
        """Return the points of a metric whose attributes have these values (`_` for `.`)."""
        data = self._reader.get_metrics_data()
        assert data is not None
        return [
            point
            for resource in data.resource_metrics
            for scope in resource.scope_metrics
            for metric in scope.metrics
            if metric.name == name
            for point in metric.data.data_points
            if attributes.items() <= {k.replace(".", "_"): v for k, v in _of(point).items()}.items()
        ]


def _of(traced: Any) -> Mapping[str, Any]:
    found: Mapping[str, Any] = traced.attributes or {}
    return found


@pytest.fixture
def spans() -> Spans:
    return Spans()


@pytest.fixture
def middleware(spans: Spans) -> Iterator[OpenTelemetryMiddleware]:
    made = instrument(tracer_provider=spans.traces, meter_provider=spans.meters)
    yield made
    made.uninstrument()


@pytest.mark.usefixtures("middleware")
async def test_the_spans_of_a_job_are_one_trace(backend: Backend, spans: Spans) -> None:
    inner: list[int] = []

    async def work() -> None:
        inner.append(trace.get_current_span().get_span_context().span_id)

    queue = make_queue(backend, work=work)
    with spans.traces.get_tracer("test").start_as_current_span("request") as request:
        job_id = await queue.add("work")
    await run_jobs(queue)
    [send], [process], [settle] = (
        spans.named(f"{name} work") for name in ("send", "process", "settle")
    )
    for span in (send, process, settle):
        assert span.context.trace_id == request.get_span_context().trace_id
        assert _of(span)["messaging.system"] == "nats"
        assert _of(span)["messaging.destination.name"] == "work"
        assert _of(span)["messaging.message.id"] == job_id
        assert _of(span)["asyncmq.task"] == "work"
        assert (_of(span)["server.address"], _of(span)["server.port"]) == ("127.0.0.1", 4222)
    parents = [span.parent and span.parent.span_id for span in (send, process, settle)]
    assert parents == [
        request.get_span_context().span_id,
        send.context.span_id,
        process.context.span_id,
    ]
    assert (send.kind, process.kind, settle.kind) == (
        SpanKind.PRODUCER,
        SpanKind.CONSUMER,
        SpanKind.CLIENT,
    )
    assert inner == [process.context.span_id]
    assert _of(settle)["asyncmq.state"] == "completed"
    assert _of(process)["asyncmq.attempt"] == 1


@pytest.mark.usefixtures("middleware")
async def test_each_attempt_is_a_span_of_the_same_trace(backend: Backend, spans: Spans) -> None:
    async def flaky() -> None:
        if current_job().attempt == 1:
            raise ValueError("not yet")
        raise Fail("never")

    queue = make_queue(backend, flaky=flaky)
    await queue.add("flaky", retries=5)
    await run_jobs(queue)
    [send], attempts = spans.named("send work"), spans.named("process work")
    assert [_of(span)["asyncmq.attempt"] for span in attempts] == [1, 2]
    assert [_of(span)["error.type"] for span in attempts] == ["ValueError", "Fail"]
    assert {span.status.status_code for span in attempts} == {StatusCode.ERROR}
    assert {span.parent and span.parent.span_id for span in attempts} == {send.context.span_id}
    assert [event.name for span in attempts for event in span.events] == ["exception"] * 2
    states = [_of(span)["asyncmq.state"] for span in spans.named("settle work")]
    assert states == ["retrying", "failed"]


@pytest.mark.usefixtures("middleware")
async def test_a_follow_up_is_a_part_of_the_run_that_added_it(
    backend: Backend, spans: Spans
) -> None:
    async def first() -> None:
        current_job().add("second")

    async def second() -> None: ...

    queue = make_queue(backend, first=first, second=second)
    await queue.add("first")
    await run_jobs(queue)
    first_run, second_run = spans.named("process work")
    _, added = spans.named("send work")
    assert added.parent is not None
    assert added.parent.span_id == first_run.context.span_id
    assert second_run.parent is not None
    assert second_run.parent.span_id == added.context.span_id


@pytest.mark.usefixtures("middleware")
async def test_many_jobs_are_one_span_with_their_number(backend: Backend, spans: Spans) -> None:
    async def work() -> None: ...

    queue = make_queue(backend, work=work)
    await queue.add_bulk([{"task_id": "work"}] * 3)
    await run_jobs(queue)
    [send] = spans.named("send work")
    assert _of(send)["messaging.batch.message_count"] == 3
    assert {span.parent and span.parent.span_id for span in spans.named("process work")} == {
        send.context.span_id
    }


async def test_a_run_can_have_a_trace_of_its_own_with_a_link(
    backend: Backend, spans: Spans
) -> None:
    async def work() -> None: ...

    middleware = instrument(
        "work", tracer_provider=spans.traces, meter_provider=spans.meters, continue_trace=False
    )
    try:
        queue = make_queue(backend, work=work)
        await queue.add("work")
        await run_jobs(queue)
    finally:
        middleware.uninstrument()
    [send], [process] = spans.named("send work"), spans.named("process work")
    assert process.parent is None
    assert process.context.trace_id != send.context.trace_id
    assert [link.context.span_id for link in process.links] == [send.context.span_id]


@pytest.mark.usefixtures("middleware")
async def test_a_job_of_another_program_goes_on_with_its_trace(
    backend: Backend, spans: Spans
) -> None:
    async def work() -> None: ...

    queue = make_queue(backend, work=work)
    sender = f"00-{'a' * 32}-{'b' * 16}-01"
    await queue._assets.declare()
    body = b'{"v":1,"id":"1","task":"work","meta":{"traceparent":"%b"}}' % sender.encode()
    await backend.write("amq_work", Write("amq.work.ready.5.1", body))
    async with running(queue):
        await only(queue, completed=1)
    [process] = spans.named("process work")
    assert format(process.context.trace_id, "032x") == "a" * 32
    assert process.parent is not None
    assert format(process.parent.span_id, "016x") == "b" * 16


@pytest.mark.usefixtures("middleware")
async def test_an_expired_job_has_an_end_and_no_run(backend: Backend, spans: Spans) -> None:
    queue = make_queue(backend)
    await queue.add("work", ttl=0.0)
    await run_jobs(queue)
    assert spans.named("process work") == []
    [settle], [send] = spans.named("settle work"), spans.named("send work")
    assert _of(settle)["asyncmq.state"] == "expired"
    assert settle.context.trace_id == send.context.trace_id


@pytest.mark.usefixtures("middleware")
async def test_an_addition_that_is_refused_is_an_error(backend: Backend, spans: Spans) -> None:
    queue = make_queue(backend)
    with pytest.raises(LookupError):
        await queue.add("work", depends_on=["no such job"])
    [send] = spans.named("send work")
    assert _of(send)["error.type"] == "JobNotFound"
    assert send.status.status_code is StatusCode.ERROR
    assert spans.points("messaging.client.sent.messages") == []


@pytest.mark.usefixtures("middleware")
async def test_metrics_have_the_names_of_the_conventions(backend: Backend, spans: Spans) -> None:
    async def work() -> None: ...

    async def fail() -> None:
        raise Fail("no")

    queue = make_queue(backend, work=work, fail=fail)
    await queue.add_bulk([{"task_id": "work"}] * 3)
    await queue.add("fail")
    await run_jobs(queue)
    queue_is = {"messaging_destination_name": "work"}
    [sent] = spans.points("messaging.client.sent.messages", **queue_is)
    assert sent.value == 4
    consumed = spans.points("messaging.client.consumed.messages", **queue_is)
    assert sum(point.value for point in consumed) == 4
    [failed] = spans.points("messaging.process.duration", error_type="Fail")
    assert failed.count == 1
    operations = spans.points(
        "messaging.client.operation.duration", messaging_operation_name="settle"
    )
    assert sum(point.count for point in operations) == 4


@pytest.mark.usefixtures("middleware")
async def test_records_of_a_task_have_the_ids_of_its_trace(
    backend: Backend, spans: Spans, caplog: pytest.LogCaptureFixture
) -> None:
    def work() -> None:
        logging.getLogger("tests.otel").warning("from a thread")

    caplog.handler.addFilter(TraceFields())
    queue = make_queue(backend, work=work)
    await queue.add("work")
    await run_jobs(queue)
    [process] = spans.named("process work")
    [record] = [r for r in caplog.records if r.name == "tests.otel"]
    assert record.trace_id == format(process.context.trace_id, "032x")  # type: ignore[attr-defined]
    assert record.span_id == format(process.context.span_id, "016x")  # type: ignore[attr-defined]
    logging.getLogger("tests.otel").warning("outside")
    assert caplog.records[-1].trace_id == ""  # type: ignore[attr-defined]


@pytest.mark.usefixtures("middleware")
async def test_a_cancelled_run_ends_its_span(backend: Backend, spans: Spans) -> None:
    started = anyio.Event()

    async def endless() -> None:
        started.set()
        await anyio.sleep_forever()

    queue = make_queue(backend, endless=endless)
    async with running(queue):
        job_id = await queue.add("endless")
        await started.wait()
        await queue.cancel_job(job_id)
        await only(queue, cancelled=1)
    [process] = spans.named("process work")
    assert _of(process)["error.type"] == "CancelledError"


class Services:
    """The worker of a context: it tells the time by the server's clock."""

    def now(self) -> float:
        return 100.5

    now_at_most = now


class Source:
    """A job of the task `work`."""

    job = Job("work")
    head = job


def queue_of(
    backend: Backend, middleware: Middleware, work: Callable[[], Awaitable[None]]
) -> Queue:
    registry = TaskRegistry()
    registry.register(work, queue="work", name="work")
    return Queue("work", backend, registry=registry, middleware=[middleware])


async def test_the_duration_of_an_end_is_by_the_clock_of_the_server(spans: Spans) -> None:
    middleware = OpenTelemetryMiddleware(spans.traces, spans.meters)
    context = JobContext("1", "work", Source(), cast("Any", Services()))
    middleware.end(context, Ending("completed", 99.0, 100.0))
    [point] = spans.points("messaging.client.operation.duration")
    assert point.sum == 0.5


async def test_a_run_that_is_not_sampled_carries_its_trace_on(
    backend: Backend, spans: Spans
) -> None:
    inner: list[trace.SpanContext] = []

    async def work() -> None:
        inner.append(trace.get_current_span().get_span_context())

    middleware = OpenTelemetryMiddleware(spans.traces, spans.meters)
    queue = queue_of(backend, middleware, work)
    sender = f"00-{'a' * 32}-{'b' * 16}-00"
    await Queue("work", backend).add("work", meta={"traceparent": sender})
    await run_jobs(queue)
    assert spans.names() == []
    assert format(inner[0].trace_id, "032x") == "a" * 32
    assert not inner[0].trace_flags.sampled
    [consumed] = spans.points("messaging.client.consumed.messages")
    assert consumed.value == 1


async def test_without_an_sdk_the_trace_is_carried_on_all_the_same(backend: Backend) -> None:
    inner: list[str] = []

    async def work() -> None:
        carrier: dict[str, str] = {}
        propagate.inject(carrier)
        inner.append(carrier.get("traceparent", ""))

    queue = queue_of(backend, OpenTelemetryMiddleware(), work)
    sender = f"00-{'a' * 32}-{'b' * 16}-01"
    await queue.add("work", meta={"traceparent": sender})
    await queue.add("work")
    await run_jobs(queue)
    assert inner == [sender, ""]


async def test_an_sdk_may_be_set_up_late(
    backend: Backend, spans: Spans, monkeypatch: pytest.MonkeyPatch
) -> None:
    middleware = OpenTelemetryMiddleware()

    async def work() -> None: ...

    queue = queue_of(backend, middleware, work)
    await queue.add("work")
    await run_jobs(queue)
    monkeypatch.setattr(trace, "_TRACER_PROVIDER", spans.traces)
    middleware._look_at = 0.0
    await queue.add("work")
    await run_jobs(queue)
    assert spans.names() == ["send work", "process work", "settle work"]
