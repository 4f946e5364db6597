"""What else happens when a worker starts and stops."""

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from asyncmq_nats._logging import get_logger

__all__ = ["Hook", "Hooks"]

logger = get_logger(__name__)

Hook = Callable[..., Any]
"""A function, sync or async, or an object that is called like one. It is given those of the keywords `backend`, `worker_id` and `queue` that it takes."""


@dataclass(slots=True)
class Hooks:
    """The hooks of a queue's workers, and what they are given."""

    given: dict[str, Any] = field(default_factory=dict)
    on_startup: list[Hook] = field(default_factory=list)
    on_shutdown: list[Hook] = field(default_factory=list)

    async def start(self, worker: str) -> None:
        """Call what was registered for the start, in order; an error ends the worker before it runs a job."""
        for hook in self.on_startup:
            await self._call(hook, worker)

    async def stop(self, worker: str) -> None:
        """Call what was registered for the stop, in reverse order. An error is logged, and the others are called."""
        for hook in reversed(self.on_shutdown):
            try:
                await self._call(hook, worker)
            except Exception:
                logger.exception("worker %s: shutdown hook %r failed", worker, hook)

    async def _call(self, hook: Hook, worker: str) -> None:
        given = self.given | {"worker_id": worker}
        result = hook(**{name: given[name] for name in _taken_names(hook, given)})
        if inspect.isawaitable(result):
            await result


def _taken_names(hook: Hook, names: Iterable[str]) -> list[str]:
    """Return those of the keywords that the hook takes, as it is called, whatever it wraps."""
    try:
        parameters = inspect.signature(hook, follow_wrapped=False).parameters
    except (ValueError, TypeError):  # one that is written in C and does not say
        return []
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        wrapped = getattr(hook, "__wrapped__", None)
        return list(names) if wrapped is None else _taken_names(wrapped, names)
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [name for name in names if name in parameters and parameters[name].kind in by_name]
