"""The types of the public names: read by mypy in its normal run, never executed."""

# pyright: standard, reportUnnecessaryTypeIgnoreComment=error

from collections.abc import Awaitable, Callable, Mapping
from contextlib import aclosing
from datetime import date
from typing import TYPE_CHECKING, Any, assert_type

from asyncmq_nats import InMemoryBackend, Queue, Worker, task
from asyncmq_nats.events import Event, event_emitter
from asyncmq_nats.handles import JobHandle
from asyncmq_nats.tasks import TaskWrapper

if TYPE_CHECKING:
    backend = InMemoryBackend()
    queue = Queue("work", backend)

    # -- tasks

    @task("work", retries=3, backoff=2)
    async def send(address: str, *, on: date | None = None) -> str:
        return f"{address}, {on}"

    @task(queue="work", process=True)
    def count(text: str) -> int:
        return len(text)

    @task("work", 1, 60, True)
    async def report(pages: int, report_progress: Callable[..., Awaitable[None]]) -> float:
        await report_progress(0.5, {"of": pages})
        return 1.0

    @task("work", progress=True)
    def report_from_a_thread(pages: int, report_progress: Callable[..., object]) -> float:
        report_progress(0.5)
        return 1.0

    @task("work")
    async def anything(*args: int, **kwargs: date) -> None: ...

    async def call_here() -> None:
        assert_type(await send("ada", on=date(2030, 1, 1)), str)
        assert_type(await count("three"), int)
        assert_type(await report(7), float)
        assert_type(await report_from_a_thread(7), float)
        await send(7)  # type: ignore[arg-type]
        await send()  # type: ignore[call-arg]
        await count("three", "four")  # type: ignore[call-arg]

    async def add() -> None:
        assert_type(await send.enqueue("ada", on=date(2030, 1, 1)), JobHandle[str])
        assert_type(await count.delay(text="three"), JobHandle[int])
        assert_type(await count.send("three", backend=None), JobHandle[int])
        await send.enqueue(
            "ada",
            backend=backend,
            delay=0.5,
            priority=1,
            depends_on=["a"],
            on_parent_failure="run",
            job_id="b",
        )
        await send.enqueue("ada", delay=1, repeat_every="5m")
        await send.enqueue("ada", priority=1, repeat_every=60)
        await send.enqueue("ada", depends_on=["a"], on_parent_failure="fail")
        await send.enqueue("ada", repeat_every="1h", job_id="b")
        await send.enqueue("ada", job_id="b")
        await report.enqueue(7)
        await anything.enqueue(1, 2, first=date(2030, 1, 1), backend=backend)
        await send.enqueue(7)  # type: ignore[call-overload]
        await send.enqueue("ada", of=7)  # type: ignore[call-overload]
        await send.enqueue("ada", backend=backend, delay="soon")  # type: ignore[call-overload]
        await queue.add("send", ["ada"], repeat_every="5m")
        await queue.add("send", ["ada"], repeat_every=300)

    def take_tasks(wrapper: TaskWrapper[[str], int], any_task: TaskWrapper[..., Any]) -> str:
        take_tasks(count, send)
        return wrapper.task_id + any_task.task_id

    # -- events

    async def hear(data: dict[str, Any]) -> None: ...

    def hear_in_a_thread(data: Mapping[str, object]) -> int:
        return len(data)

    def deaf() -> None: ...

    @event_emitter.on("job:completed")
    async def decorated(data: dict[str, Any]) -> None: ...

    @event_emitter.on("job:failed")
    def decorated_too(data: dict[str, Any]) -> None: ...

    async def listen() -> None:
        assert_type(await event_emitter.on("job:completed", hear)({}), None)
        assert_type(event_emitter.on("job:completed", hear_in_a_thread)({}), int)
        assert_type(await decorated({}), None)
        assert_type(decorated_too({}), None)
        event_emitter.off("job:completed", hear)
        event_emitter.on("job:completed", deaf)  # type: ignore[type-var]
        event_emitter.on("job:completed")(deaf)  # type: ignore[type-var]
        event_emitter.off("job:completed", deaf)  # type: ignore[arg-type]

    async def follow() -> None:
        async with aclosing(queue.events("job:failed")) as events:
            async for event in events:
                assert_type(event, Event)

    # -- hooks

    @queue.on_startup
    async def prepare(worker_id: str) -> int:
        return len(worker_id)

    @Worker(queue).on_shutdown
    def tidy_up() -> None: ...

    async def call_hooks() -> None:
        assert_type(await prepare("a"), int)
        tidy_up()
