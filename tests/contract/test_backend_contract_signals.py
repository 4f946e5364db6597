"""The promises about signals and watched logs, for every backend: `test_backend_contract.py`."""

import anyio
import pytest

from asyncmq_nats.backends.base import Backend, Expect, Log, Record, Signal, Timer, Write
from asyncmq_nats.exceptions import PayloadTooLarge, WriteRefused
from tests.receiver import PATIENCE, holds


class Listener:
    """The signals of a subscription."""

    def __init__(self) -> None:
        self.signals: list[Signal] = []
        self._changed = anyio.Event()

    @property
    def bodies(self) -> list[bytes]:
        return [signal.body for signal in self.signals]

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


async def test_who_sends_a_signal_learns_that_no_one_hears_it(
    backend: Backend, twin: Backend
) -> None:
    unheard: list[str] = []

    def send(name: str) -> None:
        backend.signal("control.a.b", name.encode(), lambda: unheard.append(name))

    send("first")
    await holds(lambda: unheard == ["first"])
    listener, other = Listener(), Listener()
    await twin.subscribe("control.a", other.hear)
    subscription = await twin.subscribe("control.*.b", listener.hear)
    send("second")
    assert [signal.body for signal in await listener.wait_for(1)] == [b"second"]
    await subscription.unsubscribe()
    await twin.ping()  # the server knows
    send("third")
    await holds(lambda: unheard[1:] == ["third"])
    assert (len(listener.signals), other.signals) == (1, [])


# -- watched logs

JOBS = Log("jobs", ("jobs.>",), work_queue=True)


class Watcher(Listener):
    """The records that a watch has handed out."""

    def see(self, record: Record) -> None:
        self.records.append(record)
        self.hear(Signal(record.subject, record.body))

    def __init__(self) -> None:
        super().__init__()
        self.records: list[Record] = []


async def test_a_watch_hands_out_what_is_stored_from_then_on_in_order(
    backend: Backend, twin: Backend
) -> None:
    watcher = Watcher()
    await backend.declare_log(JOBS)
    before = await backend.write("jobs", Write("jobs.a.1", b"before"))
    (old,) = await backend.last("jobs", "jobs.a.1")
    watching = await backend.watch("jobs", "jobs.*.*", watcher.see)
    for number in range(3):
        await twin.write("jobs", Write(f"jobs.a.{number}", b"%d" % number))
    await twin.write("jobs", *[Write(f"jobs.other_{n}", b"no match") for n in range(700)])
    await twin.write("jobs", *[Write(f"jobs.b.{n}", b"%d" % n) for n in range(3, 1003)])
    await watcher.wait_for(1003)
    assert watcher.bodies == [b"%d" % number for number in range(1003)]
    assert watcher.records[0] == (await backend.last("jobs", "jobs.a.0"))[0]
    assert not watching.covers(before, old.time)
    assert all(watching.covers(each.sequence, each.time) for each in watcher.records)
    await watching.unsubscribe()


async def test_a_watch_of_an_empty_log_covers_what_comes(backend: Backend) -> None:
    watcher = Watcher()
    await backend.declare_log(JOBS)
    watching = await backend.watch("jobs", "jobs.>", watcher.see)
    sequence = await backend.write("jobs", Write("jobs.a", b"1"))
    await watcher.wait_for(1)
    assert watching.covers(sequence, watcher.records[0].time)
    await watching.unsubscribe()


async def test_a_watch_may_be_of_one_subject(backend: Backend) -> None:
    watcher = Watcher()
    await backend.declare_log(JOBS)
    watching = await backend.watch("jobs", "jobs.*.b", watcher.see)
    for subject in ("jobs.1.a", "jobs.1.b", "jobs.2.a", "jobs.2.b"):
        await backend.write("jobs", Write(subject, subject.encode()))
    await watcher.wait_for(2)
    assert watcher.bodies == [b"jobs.1.b", b"jobs.2.b"]
    await watching.unsubscribe()


async def test_a_watch_goes_on_with_a_log_that_is_made_later_or_again(backend: Backend) -> None:
    watcher = Watcher()
    watching = await backend.watch("jobs", "jobs.>", watcher.see)
    for time, writes in ((1, 3), (2, 1)):
        await backend.declare_log(JOBS)
        for number in range(writes):
            await backend.write("jobs", Write(f"jobs.{number}", b"%d" % time))
        await watcher.wait_for(3 if time == 1 else 4)
        await backend.delete_log("jobs")
    assert watcher.bodies == [b"1", b"1", b"1", b"2"]
    await watching.unsubscribe()


async def test_a_watch_that_has_ended_hands_out_nothing(backend: Backend) -> None:
    left, stayed = Watcher(), Watcher()
    await backend.declare_log(JOBS)
    watching = await backend.watch("jobs", "jobs.>", left.see)
    other = await backend.watch("jobs", "jobs.>", stayed.see)
    await watching.unsubscribe()
    await backend.write("jobs", Write("jobs.a", b"1"))
    await stayed.wait_for(1)
    await other.unsubscribe()
    assert left.signals == []


async def test_a_watch_whose_callback_fails_goes_on(
    backend: Backend, caplog: pytest.LogCaptureFixture
) -> None:
    watcher = Watcher()

    def see(record: Record) -> None:
        watcher.see(record)
        if record.body == b"bad":
            raise ValueError(record.body)

    await backend.declare_log(JOBS)
    watching = await backend.watch("jobs", "jobs.>", see)
    for body in (b"bad", b"good"):
        await backend.write("jobs", Write(f"jobs.{body.decode()}", body))
    await watcher.wait_for(2)
    assert watcher.bodies == [b"bad", b"good"]
    (record,) = caplog.records
    assert "a callback for" in record.getMessage()
    await watching.unsubscribe()
