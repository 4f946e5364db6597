"""Tasks in processes of their own: for work that would keep the interpreter busy."""

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from anyio import CapacityLimiter, to_process
from pydantic import ConfigDict, validate_call

__all__ = ["run_in_process"]


async def run_in_process(function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], limiter: CapacityLimiter) -> Any:
    """Run a function, found again by module and name, in one of this process's warm worker processes, and return its result.

    On cancellation the process is killed. The result comes back by pickle.
    """
    where = function.__module__, function.__qualname__
    return await to_process.run_sync(_call, *where, tuple(args), dict(kwargs), cancellable=True, limiter=limiter)


def _call(module: str, qualname: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run in the child: find the function, turn the arguments into what it is annotated with, and call it."""
    found: Any = sys.modules["__mp_main__"] if module == "__main__" else importlib.import_module(module)
    for name in qualname.split("."):
        found = getattr(found, name)
    function = getattr(found, "__wrapped__", found)  # the decorated name is a TaskWrapper
    return validate_call(config=ConfigDict(arbitrary_types_allowed=True))(function)(*args, **kwargs)
