"""The promises about signals, for every backend. See `test_backend_contract.py`."""

import anyio
import pytest

from asyncmq_nats.backends.base import Backend, Expect, Log, Signal, Timer, Write
from asyncmq_nats.exceptions import PayloadTooLarge, WriteRefused
from tests.receiver import PATIENCE


class Listener:
    """The signals of a subscription."""

    def __init__(self) -> None:
        self.signals: list[Signal] = []
        self._changed = anyio.Event()

    def hear(self, signal: Signal) -> None:
        self.signals.append(signal)
        self._changed.set()
        self._changed = anyio.Event()

    async def wait_for(self, count: int) -> list[Signal]:
        """Return the signals as soon as there are `count`."""
        with anyio.fail_after(PATIENCE):
            while len(self.signals) < count:
                await self._changed.wait()
        return self.signals


async def test_a_signal_reaches_every_listener(backend: Backend, twin: Backend) -> None:
    exact, wild, rest = Listener(), Listener(), Listener()
    for subject, listener in (("control.a.b", exact), ("control.*.b", wild), ("control.>", rest)):
        await backend.subscribe(subject, listener.hear)
    await twin.publish("control.x.c", b"1")
    await twin.publish("control.a.b", b"2")
    await twin.publish("control.x.b")
    assert await exact.wait_for(1) == [Signal("control.a.b", b"2")]
    assert await wild.wait_for(2) == [Signal("control.a.b", b"2"), Signal("control.x.b", b"")]
    assert [signal.body for signal in await rest.wait_for(3)] == [b"1", b"2", b""]


async def test_a_signal_is_not_stored(backend: Backend) -> None:
    listener = Listener()
    await backend.publish("control.a", b"too early")
    await backend.subscribe("control.a", listener.hear)
    await backend.publish("control.a", b"now")
    assert await listener.wait_for(1) == [Signal("control.a", b"now")]


async def test_unsubscribing_ends_the_signals(backend: Backend) -> None:
    left, stayed = Listener(), Listener()
    subscription = await backend.subscribe("control.a", left.hear)
    await backend.subscribe("control.a", stayed.hear)
    await subscription.unsubscribe()
    await backend.publish("control.a")
    await stayed.wait_for(1)
    assert left.signals == []


async def test_a_callback_that_fails_is_logged_and_hears_the_next_signal(
    backend: Backend, caplog: pytest.LogCaptureFixture
) -> None:
    listener = Listener()

    def hear(signal: Signal) -> None:
        listener.hear(signal)
        if signal.body == b"bad":
            raise ValueError(signal.body)

    await backend.subscribe("control.a", hear)
    await backend.publish("control.a", b"bad")
    await backend.publish("control.a", b"good")
    assert [signal.body for signal in await listener.wait_for(2)] == [b"bad", b"good"]
    (record,) = caplog.records
    assert "a callback for signals on control.a failed" in record.getMessage()


async def test_a_signal_that_is_too_large_is_refused_or_dropped_with_a_warning(
    backend: Backend, caplog: pytest.LogCaptureFixture
) -> None:
    listener, large = Listener(), b"x" * (backend.max_body + 1025)
    await backend.subscribe("control.a", listener.hear)
    with pytest.raises(PayloadTooLarge):
        await backend.publish("control.a", large)
    assert caplog.records == []
    backend.signal("control.a", large)
    assert "signals were not sent" in caplog.text
    backend.signal("control.a", b"small")
    assert [signal.body for signal in await listener.wait_for(1)] == [b"small"]


async def test_a_request_returns_the_first_answer(backend: Backend, twin: Backend) -> None:
    asked = Listener()
    await backend.subscribe("control.ping", asked.hear)

    async def answer() -> None:
        (signal,) = await asked.wait_for(1)
        assert (signal.body, signal.reply != "") == (b"who?", True)
        await backend.publish(signal.reply, b"me")
        await backend.publish(signal.reply, b"me too")

    with anyio.fail_after(PATIENCE):
        async with anyio.create_task_group() as group:
            group.start_soon(answer)
            assert await twin.request("control.ping", b"who?", timeout=PATIENCE) == b"me"


async def test_a_request_without_an_answer_returns_none(backend: Backend) -> None:
    assert await backend.request("control.nobody", timeout=0.1) is None
    await backend.subscribe("control.silent", lambda _: None)
    with anyio.fail_after(PATIENCE):
        assert await backend.request("control.silent", timeout=0.1) is None


async def test_an_answer_may_be_empty(backend: Backend) -> None:
    asked = Listener()
    await backend.subscribe("control.ping", asked.hear)

    async def answer() -> None:
        (signal,) = await asked.wait_for(1)
        await backend.publish(signal.reply)

    async with anyio.create_task_group() as group:
        group.start_soon(answer)
        assert await backend.request("control.ping", timeout=PATIENCE) == b""


async def test_republish_signals_every_record_that_is_stored(
    backend: Backend, twin: Backend
) -> None:
    listener = Listener()
    await backend.declare_log(
        Log(
            "bucket",
            ("bucket.>",),
            timers=True,
            republish=("bucket.*.*.*", "event.{{wildcard(3)}}.{{wildcard(2)}}"),
        )
    )
    await twin.subscribe("event.>", listener.hear)
    await backend.write(
        "bucket", Write("bucket.done.a.completed", b"1"), Write("bucket.other", b"not this")
    )
    await backend.write(
        "bucket",
        Write(
            "bucket.later.b.delayed", b"2", timer=Timer(backend.now(), "bucket.later.b.released")
        ),
    )
    assert await listener.wait_for(3) == [
        Signal("event.completed.a", b"1"),
        Signal("event.delayed.b", b"2"),
        Signal("event.released.b", b"2"),
    ]


async def test_a_refused_or_repeated_write_signals_nothing(backend: Backend) -> None:
    listener = Listener()
    await backend.declare_log(
        Log("bucket", ("bucket.>",), republish=("bucket.*", "event.{{wildcard(1)}}"))
    )
    await backend.subscribe("event.>", listener.hear)
    for _ in range(2):
        await backend.write("bucket", Write("bucket.a", b"", message_id="m1"))
    with pytest.raises(WriteRefused):
        await backend.write(
            "bucket", Write("bucket.b", b""), Write("bucket.c", b"", expect=Expect("bucket.a", 0))
        )
    await backend.write("bucket", Write("bucket.fence", b""))
    assert [signal.subject for signal in await listener.wait_for(2)] == ["event.a", "event.fence"]
