"""The process of tasks with `process=True`: the other end of `processes`.

Nothing else imports this.
"""

import asyncio
import importlib
import inspect
import logging
import os
import pickle
import sys
import threading
import traceback
from collections.abc import Awaitable, Sequence
from dataclasses import replace
from multiprocessing import spawn
from queue import SimpleQueue
from typing import Any, BinaryIO

from asyncmq_nats.exceptions import NotSerializable
from asyncmq_nats.retries import Failure
from asyncmq_nats.runtime.processes import LENGTH
from asyncmq_nats.wire.arguments import Arguments
from asyncmq_nats.wire.codec import dump_json

__all__ = ["main"]

OUTPUT, ERROR = 1, 2


def main(answers: int) -> None:
    """Run the functions that the worker names, until it is gone.

    `answers`: the descriptor for them.
    """
    # The pipe of requests belongs to no one else: a task that reads the standard input finds it
    # empty.
    requests = os.fdopen(os.dup(0), "rb")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    if answers == OUTPUT:  # no pipe of its own: both outputs share one
        answers = os.dup(OUTPUT)
        os.dup2(ERROR, OUTPUT)
    os.set_inheritable(answers, False)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        options = {"line_buffering": True, "errors": "backslashreplace"}
        stream.reconfigure(**options)  # type: ignore[union-attr]
    _serve(requests, _Answers(answers))


def _serve(requests: BinaryIO, answers: "_Answers") -> None:
    setup = _read(requests)
    if setup is None:
        return
    calls: SimpleQueue[Any] = SimpleQueue()
    threading.Thread(target=_read_calls, args=(requests, calls), daemon=True).start()
    logging.root.addHandler(_Handler(answers))
    logging.root.setLevel(setup["level"])
    problem: BaseException | None = None
    try:
        spawn.prepare(setup["prepare"])
    except BaseException as error:  # the program's own code
        problem = error
    while True:
        _, end, *what = calls.get()
        result = Failure.of(problem, 0.0) if problem is not None else _call(*what)
        _flush(end)
        if isinstance(result, Failure):
            answers.send("failure", _portable(result))
        else:
            answers.send("result", result)


def _read_calls(requests: BinaryIO, calls: "SimpleQueue[Any]") -> None:
    while (message := _read(requests)) is not None:
        calls.put(message)
    os._exit(1)  # the worker is gone: another one runs the job


def _read(requests: BinaryIO) -> Any:
    head = requests.read(LENGTH.size)
    if len(head) < LENGTH.size:
        return None
    return pickle.loads(requests.read(*LENGTH.unpack(head)))


def _call(
    module: str, qualname: str, args: Sequence[Any], kwargs: dict[str, Any], validate: bool
) -> bytes | Failure:
    try:
        function, arguments = _find(module, qualname, validate=validate)
        args, kwargs = arguments.read(args, kwargs)
        result = function(*args, **kwargs)
        if inspect.isawaitable(result):
            result = asyncio.run(_awaited(result))
        return dump_json({"result": result}, f"the result of {qualname}")
    except NotSerializable as error:  # another attempt would end like this one
        return replace(Failure.of(error, 0.0), final=True)
    except BaseException as error:  # its class may be unknown in the worker
        return Failure.of(error, 0.0)


def _portable(failure: Failure) -> tuple[Failure, bytes]:
    """Return a failure for the worker, and beside it the exception, if it can be sent."""
    try:
        pickled = pickle.dumps(failure.exception)
    except Exception:  # the user's class, or what it holds
        pickled = b""
    return replace(failure, exception=None), pickled


def _find(module: str, qualname: str, *, validate: bool) -> tuple[Any, Arguments]:
    found: Any = (
        sys.modules["__mp_main__"]
        if module == "__main__" and "__mp_main__" in sys.modules
        else importlib.import_module(module)
    )
    for name in qualname.split("."):
        found = getattr(found, name)
    entry: Any = getattr(found, "entry", None)  # the name of a `@task` is its TaskWrapper
    if isinstance(getattr(entry, "arguments", None), Arguments):
        return entry.function, entry.arguments
    return found, Arguments(found, validate=validate)


async def _awaited(value: Awaitable[Any]) -> Any:
    return await value


def _flush(end: str) -> None:
    """Flush the output of the task, and mark its end."""
    for stream, descriptor in ((sys.stdout, OUTPUT), (sys.stderr, ERROR)):
        try:
            stream.flush()
            os.write(descriptor, f"{end}\n".encode())
        except (OSError, ValueError):  # the task has closed it
            continue


class _Answers:
    """The pipe to the worker, for the threads of a task too."""

    def __init__(self, descriptor: int) -> None:
        self._pipe = os.fdopen(descriptor, "wb")
        self._lock = threading.Lock()

    def send(self, kind: str, value: object) -> None:
        body = pickle.dumps((kind, value))
        with self._lock:
            self._pipe.write(LENGTH.pack(len(body)) + body)
            self._pipe.flush()


class _Handler(logging.Handler):
    """Sends what is logged to the worker, which has the handlers for it."""

    def __init__(self, answers: _Answers) -> None:
        super().__init__()
        self._answers = answers

    def emit(self, record: logging.LogRecord) -> None:
        trace = (
            None
            if record.exc_info is None
            else "".join(traceback.format_exception(*record.exc_info))
        )
        fields: dict[str, Any] = {
            name: getattr(record, name)
            for name in (
                "name",
                "levelno",
                "levelname",
                "created",
                "pathname",
                "lineno",
                "funcName",
            )
        }
        fields |= {"msg": record.getMessage(), "exc_text": trace, "process": os.getpid()}
        self._answers.send("log", fields)
