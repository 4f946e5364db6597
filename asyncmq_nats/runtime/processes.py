"""Tasks in processes of their own: for work that would keep the interpreter busy."""

import importlib
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from anyio import CapacityLimiter, to_process
from pydantic import ConfigDict, validate_call

from asyncmq_nats.exceptions import NotSerializable
from asyncmq_nats.retries import FailedElsewhere, Failure
from asyncmq_nats.wire.codec import dump_json, load_json

__all__ = ["run_in_process"]


async def run_in_process(
    function: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    limiter: CapacityLimiter,
) -> Any:
    """Run a function, found again by module and name, in one of this process's warm worker processes, and return its result.

    On cancellation the process is killed. The result comes back as JSON, and an exception as what it says.

    Raises:
        FailedElsewhere: the function raised something.
    """
    where = function.__module__, function.__qualname__
    came_to = await to_process.run_sync(
        _call, *where, tuple(args), dict(kwargs), cancellable=True, limiter=limiter
    )
    if isinstance(came_to, Failure):
        raise FailedElsewhere(came_to)
    return load_json(came_to)["result"]


def _call(
    module: str, qualname: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> bytes | Failure:
    """Run in the child: find the function, turn the arguments into what it is annotated with, and call it."""
    # Ctrl-C in a terminal comes here too. It is the worker that it is for, and which decides what becomes of this process.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        found: Any = (
            sys.modules["__mp_main__"] if module == "__main__" else importlib.import_module(module)
        )
        for name in qualname.split("."):
            found = getattr(found, name)
        function = getattr(found, "__wrapped__", found)  # the decorated name is a TaskWrapper
        result = validate_call(config=ConfigDict(arbitrary_types_allowed=True))(function)(
            *args, **kwargs
        )
        return dump_json({"result": result}, f"the result of {qualname}")
    except NotSerializable as error:  # another attempt would come to the same
        return replace(Failure.of(error, 0.0), final=True)
    except BaseException as error:  # its class may be unknown in the worker
        return Failure.of(error, 0.0)
