"""Leases are extended from a thread with an event loop and a connection of its own.

A task that blocks the worker's event loop must not lose its lease: its job would run twice.
"""

import asyncio
import threading
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Final

import nats
import nats.errors
from nats.aio.client import Client

from asyncmq_nats._logging import get_logger

__all__ = ["LeaseKeeper"]

logger = get_logger(__name__)

SHORTEST_LEASE: Final = 2.0
"""That of the promoter."""
EXTENSION: Final = b"+WPI"


class LeaseKeeper:
    """Extends every lease it holds, each third of its length."""

    def __init__(self, options: Mapping[str, Any], lease: float) -> None:
        self._options = dict(options)
        self._every = min(lease, SHORTEST_LEASE) / 3
        self.held: dict[bytes, None] = {}
        """The reply subjects of the deliveries whose leases are extended."""
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._serving: asyncio.Task[None] | None = None
        self._stopping = False
        self._ready = threading.Event()

    async def start(self) -> None:
        """Start the thread, unless it runs, and wait for its first attempt to connect."""
        if self._thread is None:
            self._thread = threading.Thread(
                target=self._run, name="asyncmq-nats-leases", daemon=True
            )
            self._thread.start()
            await asyncio.get_running_loop().run_in_executor(None, self._ready.wait, 5.0)

    async def stop(self) -> None:
        """End the thread, and wait for that."""
        thread = self._thread
        self.abandon()
        if thread is not None:
            await asyncio.get_running_loop().run_in_executor(None, thread.join, 5.0)

    def abandon(self) -> None:
        """Have the thread end soon."""
        self._thread, self._stopping = None, True
        if self._loop is not None and self._serving is not None:
            with suppress(RuntimeError):  # it has ended already
                self._loop.call_soon_threadsafe(self._serving.cancel)

    def _run(self) -> None:
        try:
            with suppress(asyncio.CancelledError):  # by `abandon`
                asyncio.run(self._serve())
        except Exception:
            logger.exception(
                "leases are no longer extended: jobs longer than `stalled_after` may run twice"
            )
        finally:
            self._ready.set()

    async def _serve(self) -> None:
        self._loop, self._serving = asyncio.get_running_loop(), asyncio.current_task()
        if self._stopping:
            return
        client = await nats.connect(
            **{
                **self._options,
                "allow_reconnect": True,
                "error_cb": _on_error,
                "name": "asyncmq-nats leases",
            }
        )
        self._ready.set()
        try:
            while True:
                await asyncio.sleep(self._every)
                await self._extend_all(client)
        finally:
            try:
                await client.close()
            except (nats.errors.Error, OSError) as error:  # the server went away first
                logger.debug("closing the connection that extends the leases: %s", error)

    async def _extend_all(self, client: Client) -> None:
        for reply in list(
            self.held
        ):  # the main thread adds and removes meanwhile; `list` of a dict is atomic
            try:
                await client.publish(reply.decode(), EXTENSION)
            except nats.errors.Error as error:
                logger.warning("lease of %s not extended: %s", reply.decode(), error)
                return


async def _on_error(error: Exception) -> None:
    logger.debug("connection that extends the leases: %s", error)
