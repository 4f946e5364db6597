"""Tasks in processes of their own: for work that would keep the interpreter busy.

A process runs one task at a time and is kept for the next one. It talks to its worker by a pipe
that no task sees: what a task and its own children write to the standard output and error goes to
the worker's, line by line.
"""

import asyncio
import logging
import os
import pickle
import signal
import struct
import subprocess
import sys
from asyncio.subprocess import Process
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from multiprocessing import spawn
from pathlib import Path
from typing import Any, Final, TextIO
from uuid import uuid4
from weakref import WeakKeyDictionary

import anyio
from anyio import CapacityLimiter

from asyncmq_nats._logging import get_logger
from asyncmq_nats.exceptions import ProcessDied
from asyncmq_nats.retries import FailedElsewhere, Failure
from asyncmq_nats.wire.codec import load_json

__all__ = ["close_processes", "hold_processes", "run_in_process"]

logger = get_logger(__name__)

LENGTH: Final = struct.Struct("!Q")
CHILD_PROGRAM: Final = """\
import sys
sys.path[:] = {path!r}
from asyncmq_nats.runtime.process_child import main
main({answers})
"""
LINE_LIMIT: Final = 64 * 1024
"""The longest line of output that is passed on as one, in bytes."""
OUTPUT_TIMEOUT: Final = 1.0
"""How long the last output of a task is waited for, in seconds."""
SHARES_PIPES: Final = os.name == "posix"
"""Whether a process can be given one pipe more than its three."""


async def run_in_process(
    function: Callable[..., Any],
    job_id: str,
    arguments: tuple[Sequence[Any], Mapping[str, Any]],
    limiter: CapacityLimiter,
    *,
    validate: bool = True,
) -> Any:
    """Run a function, found again by module and name, in a process, and return its result.

    Cancellation kills the process and its children. The result comes back as JSON, an exception as
    text.

    Raises:
        FailedElsewhere: the function raised something.
        ProcessDied: the process ended before the function did.
    """
    async with limiter:
        pool = _pools.setdefault(asyncio.get_running_loop(), [])
        alive = [child for child in pool if child.is_usable]
        child = alive[-1] if alive else await _Child.start()
        pool[:] = [each for each in pool if each is not child]
        try:
            answer = await child.call(
                job_id, (function.__module__, function.__qualname__, *arguments, validate)
            )
        except BaseException:
            with anyio.CancelScope(shield=True):
                await child.kill()
            raise
        if child.is_usable:
            pool.append(child)
        else:
            await child.kill()
    if isinstance(answer, Failure):
        raise FailedElsewhere(answer)
    return load_json(answer)["result"]


def hold_processes() -> None:
    """Count a user of the processes of this event loop: a worker that starts."""
    loop = asyncio.get_running_loop()
    _users[loop] = _users.get(loop, 0) + 1


async def close_processes() -> None:
    """Count a user less. With the last one, end the processes that are kept for the next task."""
    loop = asyncio.get_running_loop()
    _users[loop] = _users.get(loop, 1) - 1
    if _users[loop] <= 0:
        for child in _pools.pop(loop, ()):
            await child.kill()


class _Child:
    """A process that runs one task after the other."""

    def __init__(self, process: Process, answers: asyncio.StreamReader) -> None:
        self._process = process
        self._answers = answers
        self._job_id = ""
        self._is_whole = True
        self._out_of_memory = _count_oom_kills()
        streams = [(process.stderr, "stderr")]
        if SHARES_PIPES:
            streams.append((process.stdout, "stdout"))
        self._outputs = [
            _Output(stream, name, self) for stream, name in streams if stream is not None
        ]

    @property
    def is_usable(self) -> bool:
        """Whether another task may run in it: it lives, and its outputs are as they were."""
        return self._process.returncode is None and self._is_whole

    @property
    def job_id(self) -> str:
        """The job that it runs, or ran last."""
        return self._job_id

    @classmethod
    async def start(cls) -> "_Child":
        reading, writing = os.pipe() if SHARES_PIPES else (-1, 1)
        try:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                *subprocess._args_from_interpreter_flags(),  # type: ignore[attr-defined]
                "-c",
                CHILD_PROGRAM.format(path=sys.path, answers=writing),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                pass_fds=(writing,) if SHARES_PIPES else (),
                # A group of its own: Ctrl-C is for the worker, and what a task starts ends with it.
                start_new_session=SHARES_PIPES,
            )
        except BaseException:
            if SHARES_PIPES:
                os.close(reading)
            raise
        finally:
            if SHARES_PIPES:
                os.close(writing)
        answers = process.stdout
        if SHARES_PIPES:
            answers = asyncio.StreamReader()
            protocol = asyncio.StreamReaderProtocol(answers)
            pipe = os.fdopen(reading, "rb", 0)
            await asyncio.get_running_loop().connect_read_pipe(lambda: protocol, pipe)
        assert answers is not None
        child = cls(process, answers)
        child._send(_preparation())
        return child

    async def call(self, job_id: str, what: tuple[Any, ...]) -> bytes | Failure:
        """Run a function there, and return its result as JSON, or what went wrong."""
        self._job_id, end = job_id, uuid4().hex
        ended = [output.expect(end) for output in self._outputs]
        try:
            self._send((job_id, end, *what))
            assert self._process.stdin is not None
            await self._process.stdin.drain()
            answer = await self._receive()
        except (ConnectionError, asyncio.IncompleteReadError):
            raise ProcessDied(f"{what[0]}.{what[1]}", await self._cause_of_death()) from None
        with anyio.move_on_after(OUTPUT_TIMEOUT) as scope:
            for event in ended:
                await event.wait()
        self._is_whole = not scope.cancelled_caught
        return answer

    async def _receive(self) -> bytes | Failure:
        while True:
            (size,) = LENGTH.unpack(await self._answers.readexactly(LENGTH.size))
            kind, value = pickle.loads(await self._answers.readexactly(size))
            if kind == "log":
                _log(self._job_id, value)
            elif kind == "failure":
                return _with_exception(*value)
            else:
                answer: bytes = value
                return answer

    def _send(self, message: object) -> None:
        body = pickle.dumps(message)
        assert self._process.stdin is not None
        self._process.stdin.write(LENGTH.pack(len(body)) + body)

    async def _cause_of_death(self) -> str:
        self._kill_group()  # its children
        code = await self._process.wait()
        if code == -signal.SIGKILL and _count_oom_kills() > self._out_of_memory:
            return "was killed by the system, since memory ran out"
        if code == -signal.SIGKILL:
            return "was killed by SIGKILL: by hand, or by the system when memory ran out"
        if code < 0:
            return f"was killed by {_signal_name(-code)}"
        return f"ended with exit code {code} before the task did: by os._exit, or by an extension"

    def _kill_group(self) -> None:
        with suppress(ProcessLookupError, PermissionError):
            if SHARES_PIPES:
                os.killpg(self._process.pid, signal.SIGKILL)
            else:
                self._process.kill()

    async def kill(self) -> None:
        """End the process and its children."""
        self._kill_group()
        await self._process.wait()
        for output in self._outputs:
            await output.close()
        with anyio.move_on_after(OUTPUT_TIMEOUT):
            await self._answers.read()
        transport = self._process._transport  # type: ignore[attr-defined]
        transport.close()


class _Output:
    """Passes a child's output on, a line at a time, with the id of the job."""

    def __init__(self, stream: asyncio.StreamReader, name: str, child: _Child) -> None:
        self._stream = stream
        self._name = name
        self._child = child
        self._end = b""
        self._ended = anyio.Event()
        self._task = asyncio.get_running_loop().create_task(self._pass_on())

    def expect(self, end: str) -> anyio.Event:
        """Return what is set when that line has come: the task has ended."""
        self._end, self._ended = end.encode(), anyio.Event()
        return self._ended

    async def close(self) -> None:
        """Stop, when the rest has come."""
        with anyio.move_on_after(OUTPUT_TIMEOUT) as scope:
            await asyncio.wait([self._task])
        if scope.cancelled_caught:
            self._task.cancel()

    async def _pass_on(self) -> None:
        rest = b""
        while chunk := await self._stream.read(LINE_LIMIT):
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                self._line(line)
            if len(rest) > LINE_LIMIT:
                self._line(rest)
                rest = b""
        if rest:
            self._line(rest)

    def _line(self, line: bytes) -> None:
        if self._end and line.endswith(self._end):
            line = line.removesuffix(self._end)
            self._ended.set()
            if not line:
                return
        target: TextIO | None = getattr(sys, self._name)
        if target is not None:
            text = line.decode("utf-8", "backslashreplace")
            with suppress(OSError, ValueError):
                target.write(f"[job {self._child.job_id}] {text}\n")
                target.flush()


_pools: "WeakKeyDictionary[asyncio.AbstractEventLoop, list[_Child]]" = WeakKeyDictionary()
"""The idle processes of each event loop."""
_users: "WeakKeyDictionary[asyncio.AbstractEventLoop, int]" = WeakKeyDictionary()
"""How many workers of each event loop run."""


def _preparation() -> dict[str, Any]:
    """Return what a process needs to find the functions of this one, as `multiprocessing` does."""
    data = spawn.get_preparation_data("task")
    data.pop("authkey", None)
    levels = [
        logger.level
        for logger in logging.root.manager.loggerDict.values()
        if isinstance(logger, logging.Logger) and logger.level
    ]
    return {"prepare": data, "level": min([logging.root.level, *levels])}


def _log(job_id: str, record: dict[str, Any]) -> None:
    logger = logging.getLogger(record["name"])
    if logger.isEnabledFor(record["levelno"]):
        made = logging.makeLogRecord(record | {"job_id": job_id})
        made.msg = f"[job {job_id}] {made.msg}"
        logger.handle(made)


def _with_exception(failure: Failure, pickled: bytes) -> Failure:
    """Return a failure with what was raised in the process, if it can be made again here."""
    if not pickled:
        return failure
    try:
        error = pickle.loads(pickled)
    except Exception as problem:  # the class is the user's code
        logger.debug("%s stays in its process: %r", failure.kind, problem)
        return failure
    return replace(failure, exception=error) if isinstance(error, BaseException) else failure


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _count_oom_kills() -> int:
    """Return how many processes the system has killed since memory ran out.

    Return 0 where it does not say.
    """
    with suppress(OSError, ValueError):
        for line in Path("/proc/vmstat").read_text().splitlines():
            name, _, count = line.partition(" ")
            if name == "oom_kill":
                return int(count)
    return 0
