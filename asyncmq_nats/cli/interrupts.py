"""Ctrl-C: a command lets what is under way end, and a question ends at once."""

import asyncio
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

import anyio

__all__ = ["cancelled_by_sigint", "interrupt", "on_sigint"]


@contextmanager
def on_sigint(handle: Callable[[], object]) -> Iterator[None]:
    """Have SIGINT call `handle` while the block runs; not outside of the main thread.

    A program that ignores SIGINT goes on to: a shell that has a job in the background says so.
    """
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return
    signal.signal(signal.SIGINT, lambda *_: handle())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def interrupt() -> NoReturn:
    """End the command at once."""
    raise KeyboardInterrupt


@contextmanager
def cancelled_by_sigint(scope: anyio.CancelScope) -> Iterator[None]:
    """Have SIGINT cancel a scope, so that what is shielded ends; a second one ends at once.

    asyncio would cancel the task itself, which tears what is shielded.
    """
    loop = asyncio.get_running_loop()

    def cancel() -> None:
        if scope.cancel_called:
            interrupt()
        loop.call_soon_threadsafe(scope.cancel)

    with on_sigint(cancel):
        yield
