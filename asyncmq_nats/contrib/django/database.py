"""Tasks of a worker and their connections to Django's databases."""

import functools
import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from asgiref.sync import sync_to_async
from django.db import close_old_connections

from asyncmq_nats.tasks import TaskRegistry

__all__ = ["close_old_connections_of_tasks"]


def close_old_connections_of_tasks(registry: TaskRegistry) -> None:
    """Have tasks begin and end as a request does.

    Connections that the database has closed are dropped before and after each task: nothing else
    closes those of a worker's threads. Tasks in a process of their own are left alone.
    """
    for task_id in list(registry):
        entry = registry[task_id]
        if not entry.process:
            registry[task_id] = replace(entry, function=_wrapped(entry.function))


def _wrapped(function: Callable[..., Any]) -> Callable[..., Any]:
    if inspect.iscoroutinefunction(function):

        @functools.wraps(function)
        async def call_async(*args: Any, **kwargs: Any) -> Any:
            await sync_to_async(close_old_connections)()
            try:
                return await function(*args, **kwargs)
            finally:
                await sync_to_async(close_old_connections)()

        return call_async

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        close_old_connections()
        try:
            return function(*args, **kwargs)
        finally:
            close_old_connections()

    return call
