"""Blocking calls: the same `Queue` and `enqueue`, for Django, Flask and scripts (docs/sync.md).

One event loop in a thread of its own serves all threads of the process. It starts with the first
call, once more after a fork, and ends with the process. Nothing here runs jobs: workers are async.
"""

import asyncio
import atexit
import concurrent.futures
import functools
import importlib.util
import inspect
import os
import sys
import threading
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator
from contextvars import copy_context
from typing import Any, Concatenate, Final, Generic, ParamSpec, Protocol, Self, TypeVar, overload

from asyncmq_nats import queues
from asyncmq_nats.backends import backend_of_context, default_backend
from asyncmq_nats.backends.base import Backend
from asyncmq_nats.exceptions import BackendError, LoopRunning

__all__ = ["Queue", "close", "enqueue", "list_queues", "run"]

P = ParamSpec("P")
R = TypeVar("R")
Id = TypeVar("Id", bound=str, covariant=True)

THREAD_NAME: Final = "asyncmq-nats sync"
CLOSE_TIMEOUT: Final = 5.0
"""How long the end of the process may wait for the connections to close, in seconds."""


class Enqueues(Protocol[P, Id]):
    """A task, or anything else with an `enqueue` such as a task's."""

    @property
    def enqueue(self) -> Callable[P, Coroutine[Any, Any, Id]]:
        """Add a job."""


def run(function: Callable[P, Coroutine[Any, Any, R]], /, *args: P.args, **kwargs: P.kwargs) -> R:
    """Call an async function of this library, and return its result: `run(flow.add_flow, …)`.

    It runs in the event loop of this module, in the caller's context variables. A queue without a
    backend takes a connection of that loop. Ctrl-C cancels it.

    Raises:
        LoopRunning: an event loop runs in this thread.
    """
    name = getattr(function, "__qualname__", repr(function))
    check_no_loop(f"sync.run({name})", "await it instead")
    return _loop().call(functools.partial(function, *args, **kwargs), None)


def enqueue(task: Enqueues[P, Id], /, *args: P.args, **kwargs: P.kwargs) -> Id:
    """Add a job that runs the task with these arguments, and return its id: `task.enqueue`.

    Raises:
        LoopRunning: an event loop runs in this thread.
        NotSerializable, InvalidArgument, Unconfirmed: as for `asyncmq_nats.Queue.add`.
    """
    check_no_loop("sync.enqueue(task, …)", "use `await task.enqueue(…)` instead")
    return _loop().call(functools.partial(task.enqueue, *args, **kwargs), None)


def list_queues(backend: Backend | None = None) -> list[str]:
    """Return the names of the queues on a backend, by default the default one.

    Raises:
        LoopRunning: an event loop runs in this thread.
    """
    check_no_loop("sync.list_queues()", "use `await list_queues(backend)` instead")

    async def ask() -> list[str]:
        return await queues.list_queues(default_backend())

    return _loop().call(ask, backend)


def close() -> None:
    """End the event loop and its connections; the next call starts another one.

    Called at the exit of the process by itself. No call may be under way.

    Raises:
        LoopRunning: an event loop runs in this thread.
    """
    check_no_loop("sync.close()", "call it in a thread, by `asyncio.to_thread(close)`")
    _process.close()


def check_no_loop(call: str, instead: str) -> None:
    """Refuse to block a running event loop.

    Raises:
        LoopRunning: one runs in this thread.
    """
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return
    raise LoopRunning(call, instead)


class _Blocking(Generic[P, R]):
    """A method of `asyncmq_nats.Queue` that blocks."""

    def __init__(
        self, method: Callable[Concatenate[queues.Queue, P], Coroutine[Any, Any, R]]
    ) -> None:
        self._method = method
        self.__doc__ = method.__doc__

    @overload
    def __get__(self, queue: None, owner: type["Queue"]) -> Self: ...
    @overload
    def __get__(self, queue: "Queue", owner: type["Queue"]) -> Callable[P, R]: ...

    def __get__(self, queue: "Queue | None", owner: type["Queue"]) -> Self | Callable[P, R]:
        if queue is None:
            return self
        method = self._method

        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            name = method.__name__
            check_no_loop(f"sync.Queue.{name}()", f"use `await Queue.{name}(…)` instead")
            return queue._call(method, *args, **kwargs)

        return _named_as(method, call)

    @property
    def __signature__(self) -> inspect.Signature:
        """The signature of the async method: for `inspect.signature` and `help`."""
        return inspect.signature(self._method)


class _Iterating(Generic[P, R]):
    """A method of `asyncmq_nats.Queue` whose values are iterated: each `next` blocks."""

    def __init__(
        self, method: Callable[Concatenate[queues.Queue, P], AsyncGenerator[R, None]]
    ) -> None:
        self._method = method
        self.__doc__ = method.__doc__

    @overload
    def __get__(self, queue: None, owner: type["Queue"]) -> Self: ...
    @overload
    def __get__(
        self, queue: "Queue", owner: type["Queue"]
    ) -> Callable[P, Generator[R, None, None]]: ...

    def __get__(
        self, queue: "Queue | None", owner: type["Queue"]
    ) -> Self | Callable[P, Generator[R, None, None]]:
        if queue is None:
            return self
        method = self._method

        def call(*args: P.args, **kwargs: P.kwargs) -> Generator[R, None, None]:
            name = method.__name__
            check_no_loop(f"sync.Queue.{name}()", f"use `async for … in Queue.{name}(…)` instead")
            return queue._iterate(method, *args, **kwargs)

        return _named_as(method, call)


class Queue:
    """A queue whose methods block: `asyncmq_nats.Queue`, for threads without an event loop.

    Safe to share by threads, and across forks. Making one does no I/O. It adds jobs, waits for
    them, and administrates; it runs none.

    Args:
        name: as for `asyncmq_nats.Queue`, and so are the others.
        backend: where the jobs are; by default the default backend. A `NATSBackend` is copied, with
            a connection of its own, so the given one may serve another event loop.
        options: any other argument of `asyncmq_nats.Queue`.

    Raises:
        InvalidQueueName: the name cannot be part of a stream's name.
        InvalidArgument: an argument is of the wrong kind.
    """

    def __init__(self, name: str, backend: Backend | None = None, **options: Any) -> None:
        self.name = name
        self._backend = backend
        self._options = options
        self._made: tuple[_Loop, Backend, queues.Queue] | None = None
        queues.Queue(name, backend or default_backend(), **options)  # to check them

    def __repr__(self) -> str:
        return f"{type(self).__qualname__}({self.name!r})"

    def _call(
        self,
        method: Callable[Concatenate[queues.Queue, P], Coroutine[Any, Any, R]],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> R:
        async def call() -> R:
            return await method(self._queue(loop), *args, **kwargs)

        loop = _loop()
        return loop.call(call, self._backend)

    def _queue(self, loop: "_Loop") -> queues.Queue:
        """Return the queue of this process' event loop. Called in it."""
        backend = default_backend()  # that of this loop
        if self._made is None or self._made[:2] != (loop, backend):
            self._made = loop, backend, queues.Queue(self.name, backend, **self._options)
        return self._made[2]

    def _iterate(
        self,
        method: Callable[Concatenate[queues.Queue, P], AsyncGenerator[R, None]],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> Generator[R, None, None]:
        loop = _loop()

        async def begin() -> AsyncGenerator[R, None]:
            return method(self._queue(loop), *args, **kwargs)

        async def following() -> list[R]:
            async for value in values:
                return [value]
            return []

        values = loop.call(begin, self._backend)
        try:
            while found := loop.call(following, self._backend):
                yield found[0]
        finally:
            loop.call(values.aclose, self._backend)

    # The other methods are added below, untyped.
    events = _Iterating(queues.Queue.events)
    search = _Iterating(queues.Queue.search)
    add = _Blocking(queues.Queue.add)
    add_bulk = _Blocking(queues.Queue.add_bulk)
    add_linked = _Blocking(queues.Queue.add_linked)
    cancel_job = _Blocking(queues.Queue.cancel_job)
    clean = _Blocking(queues.Queue.clean)
    clean_jobs = _Blocking(queues.Queue.clean_jobs)
    count = _Blocking(queues.Queue.count)
    delay = _Blocking(queues.Queue.delay)
    drain = _Blocking(queues.Queue.drain)
    enqueue = _Blocking(queues.Queue.enqueue)
    enqueue_delayed = _Blocking(queues.Queue.enqueue_delayed)
    get_active = _Blocking(queues.Queue.get_active)
    get_completed = _Blocking(queues.Queue.get_completed)
    get_debounce_job_id = _Blocking(queues.Queue.get_debounce_job_id)
    get_deduplication_job_id = _Blocking(queues.Queue.get_deduplication_job_id)
    get_delayed = _Blocking(queues.Queue.get_delayed)
    get_due_delayed = _Blocking(queues.Queue.get_due_delayed)
    get_failed = _Blocking(queues.Queue.get_failed)
    get_job = _Blocking(queues.Queue.get_job)
    get_job_count_by_types = _Blocking(queues.Queue.get_job_count_by_types)
    get_job_counts = _Blocking(queues.Queue.get_job_counts)
    get_job_result = _Blocking(queues.Queue.get_job_result)
    get_job_state = _Blocking(queues.Queue.get_job_state)
    get_jobs = _Blocking(queues.Queue.get_jobs)
    get_paused = _Blocking(queues.Queue.get_paused)
    get_prioritized = _Blocking(queues.Queue.get_prioritized)
    get_waiting = _Blocking(queues.Queue.get_waiting)
    get_waiting_children = _Blocking(queues.Queue.get_waiting_children)
    is_job_cancelled = _Blocking(queues.Queue.is_job_cancelled)
    is_paused = _Blocking(queues.Queue.is_paused)
    list_delayed = _Blocking(queues.Queue.list_delayed)
    list_jobs = _Blocking(queues.Queue.list_jobs)
    list_page = _Blocking(queues.Queue.list_page)
    list_repeatables = _Blocking(queues.Queue.list_repeatables)
    list_workers = _Blocking(queues.Queue.list_workers)
    obliterate = _Blocking(queues.Queue.obliterate)
    pause = _Blocking(queues.Queue.pause)
    pause_repeatable = _Blocking(queues.Queue.pause_repeatable)
    queue_stats = _Blocking(queues.Queue.queue_stats)
    remove_deduplication_key = _Blocking(queues.Queue.remove_deduplication_key)
    remove_delayed = _Blocking(queues.Queue.remove_delayed)
    remove_job = _Blocking(queues.Queue.remove_job)
    remove_repeatable = _Blocking(queues.Queue.remove_repeatable)
    resume = _Blocking(queues.Queue.resume)
    resume_repeatable = _Blocking(queues.Queue.resume_repeatable)
    retry_job = _Blocking(queues.Queue.retry_job)
    send = _Blocking(queues.Queue.send)
    upsert_repeatable = _Blocking(queues.Queue.upsert_repeatable)
    wait_for = _Blocking(queues.Queue.wait_for)


def _named_as(method: Callable[..., Any], call: Callable[P, R]) -> Callable[P, R]:
    """Return the call with the name, the docstring and the signature of a bound method."""
    signature = inspect.signature(method)
    call.__name__, call.__doc__ = method.__name__, method.__doc__
    call.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=list(signature.parameters.values())[1:]
    )
    return call


def _add_others() -> None:
    """Add the methods of `asyncmq_nats.Queue` that have no line above."""
    for name, method in vars(queues.Queue).items():
        if name.startswith("_") or name == "run" or name in vars(Queue):
            continue
        if inspect.iscoroutinefunction(method):
            setattr(Queue, name, _Blocking(method))
        elif inspect.isasyncgenfunction(method):
            setattr(Queue, name, _Iterating(method))


_add_others()


class _Loop:
    """An event loop in a thread of its own, and the backends of its calls."""

    def __init__(self) -> None:
        self._ready = threading.Event()
        self._stop: asyncio.Event
        self._loop: asyncio.AbstractEventLoop
        self._backends: dict[int, tuple[Backend, Backend]] = {}
        """The user's backends by id, each with its copy on this loop."""
        self._lock = threading.Lock()
        self._pending: set[concurrent.futures.Future[Any]] = set()
        self._ended = False
        self._thread = threading.Thread(target=self._run, name=THREAD_NAME, daemon=True)
        self._thread.start()
        self._ready.wait()

    def _run(self) -> None:
        try:
            with asyncio.Runner(loop_factory=_loop_factory()) as runner:
                runner.run(self._serve())
        finally:
            self._end()

    async def _serve(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        self._ready.set()
        await self._stop.wait()
        for _, own in list(self._backends.values()):
            await own.close()

    def _end(self) -> None:
        """Tell the waiting callers that there will be no answer."""
        self._ready.set()
        with self._lock:
            self._ended = True
            pending = list(self._pending)
        for each in pending:
            if not each.done():
                each.set_exception(_closed())

    def call(self, function: Callable[[], Coroutine[Any, Any, R]], backend: Backend | None) -> R:
        """Call the function in the loop, in the caller's context, and return its result."""
        own = self._backend(default_backend() if backend is None else backend)
        context = copy_context()
        context.run(backend_of_context.set, own)
        done: concurrent.futures.Future[R] = concurrent.futures.Future()
        with self._lock:
            if self._ended:
                raise _closed()
            self._pending.add(done)
        tasks: list[asyncio.Task[None]] = []

        def start() -> None:
            tasks.append(self._loop.create_task(_carry_out(function, done), context=context))

        try:
            self._loop.call_soon_threadsafe(start)
            return done.result()
        except KeyboardInterrupt:
            self._loop.call_soon_threadsafe(lambda: tasks[0].cancel())
            raise
        finally:
            self._pending.discard(done)

    def _backend(self, given: Backend) -> Backend:
        """Return the backend of this loop for one of the user, which may serve another loop."""
        known = self._backends.get(id(given))
        if known is not None:
            return known[1]
        copy: Callable[[], Backend] | None = getattr(given, "copy", None)
        if copy is None or given is backend_of_context.get():
            return given
        with self._lock:
            return self._backends.setdefault(id(given), (given, copy()))[1]

    def close(self) -> None:
        """End the loop, and wait for a while until it has ended."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join(CLOSE_TIMEOUT)


async def _carry_out(
    function: Callable[[], Coroutine[Any, Any, R]], done: "concurrent.futures.Future[R]"
) -> None:
    try:
        result = await function()
    except asyncio.CancelledError:
        done.set_exception(_closed())
        raise
    except BaseException as error:
        done.set_exception(error)
    else:
        done.set_result(result)


def _closed() -> BackendError:
    return BackendError(
        "sync.close() was called, or the process ends, while a call was under way: what it wrote "
        "may or may not be stored; close when all threads are done"
    )


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """Return what makes the event loop: uvloop where it is installed."""
    if sys.platform == "win32" or importlib.util.find_spec("uvloop") is None:
        return None
    from uvloop import new_event_loop

    return new_event_loop


class _Process:
    """The loop of this process."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.loop: _Loop | None = None
        self.inherited: list[_Loop] = []
        """The loops of the processes that this one was forked from.

        They are kept: their connections are not ours to close.
        """

    def open(self) -> _Loop:
        """Return the loop, started if there is none."""
        with self.lock:
            if self.loop is None:
                self.loop = _Loop()
            return self.loop

    def close(self) -> None:
        """End the loop, if there is one."""
        with self.lock:
            loop, self.loop = self.loop, None
        if loop is not None:
            loop.close()

    def forget(self) -> None:
        """Start over in a process that was forked: the thread is not in it."""
        self.lock = threading.Lock()
        if self.loop is not None:
            self.inherited.append(self.loop)
            self.loop = None


_process = _Process()


def _loop() -> _Loop:
    return _process.loop or _process.open()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_process.forget)
atexit.register(_process.close)
