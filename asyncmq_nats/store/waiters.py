"""The waiters in this process for the end of a job.

Signals wake them, and one periodic read for all of them.
"""

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from itertools import islice
from typing import Final
from weakref import WeakKeyDictionary

import anyio

from asyncmq_nats._logging import get_logger
from asyncmq_nats.backends.base import Signal, Subscription
from asyncmq_nats.exceptions import AsyncMQError
from asyncmq_nats.states import OUTCOMES
from asyncmq_nats.store.queue_store import QueueStore
from asyncmq_nats.wire.keys import last_token, split_event

__all__ = ["Waiter", "Waiters"]

logger = get_logger(__name__)

OWN_SUBSCRIPTIONS: Final = 64
"""The most waiters with a subscription each.

A shared one brings the outcomes of all jobs, also of those that no one here waits for.
"""
LOOK_INTERVAL: Final = 5.0
"""How long after a lost event an outcome is seen all the same, in seconds."""
FULL_READS: Final = 50
"""The waiters that look for themselves at each interval: they also see that a job was removed."""
IDS_PER_REQUEST: Final = 100


class Waiter:
    """A waiter for a job."""

    def __init__(self, token: str) -> None:
        self.token = token
        self.heard = False
        """Whether it has heard that the job has ended."""
        self.looks = False
        """Whether it should read the job itself."""
        self.woken = anyio.Event()

    def hear(self, signal: Signal) -> None:
        """Take an event of the job."""
        if split_event(signal.subject)[0] in OUTCOMES:
            self.wake(heard=True)

    def wake(self, *, heard: bool = False, looks: bool = False) -> None:
        """Wake the waiter."""
        self.heard |= heard
        self.looks |= looks
        self.woken.set()


class Waiters:
    """The waiters of one queue, in each event loop."""

    def __init__(self, store: QueueStore) -> None:
        self._store = store
        self._keys = store.keys
        self._crowds: WeakKeyDictionary[asyncio.AbstractEventLoop, _Crowd] = WeakKeyDictionary()

    @asynccontextmanager
    async def join(self, token: str) -> AsyncIterator[Waiter]:
        """Hear of the end of a job while the block runs, from its first line on."""
        crowd, waiter = self._crowd(), Waiter(token)
        crowd.add(waiter)
        own: Subscription | None = None
        try:
            if crowd.shared or len(crowd.waiting) > OWN_SUBSCRIPTIONS:
                await self._share(crowd)
            else:
                own = await self._store.backend.subscribe(self._keys.event("*", token), waiter.hear)
            yield waiter
        finally:
            crowd.remove(waiter)
            crowd.appoint(waiter)  # this one may have been the next
            with anyio.CancelScope(shield=True):
                if own is not None:
                    await own.unsubscribe()
                elif not crowd.waiting:
                    await self._stop_sharing(crowd)

    async def wait(self, waiter: Waiter) -> bool:
        """Return whether the waiter heard of an end; if not, it has to read the job itself."""
        crowd = self._crowd()
        while not (waiter.heard or waiter.looks):
            if crowd.leader is None:
                await self._lead(crowd, waiter)
            else:
                await waiter.woken.wait()
            waiter.woken = anyio.Event()
        heard, waiter.heard, waiter.looks = waiter.heard, False, False
        return heard

    async def _lead(self, crowd: "_Crowd", leader: Waiter) -> None:
        """Wait, and read for all others too, until its own job has ended.

        Then another waiter leads.
        """
        crowd.leader = leader
        try:
            while not leader.woken.is_set():
                with anyio.move_on_after(LOOK_INTERVAL):
                    await leader.woken.wait()
                    return
                await self._look(crowd)
        finally:
            crowd.leader = None
            crowd.appoint(leader)

    async def _look(self, crowd: "_Crowd") -> None:
        for waiter in crowd.next_ones(FULL_READS):
            waiter.wake(looks=True)
        tokens = list({waiter.token for waiter in crowd.waiting if not waiter.looks})
        try:
            for start in range(0, len(tokens), IDS_PER_REQUEST):
                crowd.tell(await self._ended_among(tokens[start : start + IDS_PER_REQUEST]))
        except AsyncMQError as error:  # those that look for themselves are told
            logger.debug(
                "queue %s: could not read the outcomes of awaited jobs: %s",
                self._keys.queue,
                error,
            )

    async def _ended_among(self, tokens: Sequence[str]) -> set[str]:
        keys = [self._keys.outcome(token, state) for token in tokens for state in OUTCOMES]
        records = await self._store.last(*keys)
        return {self._keys.token(each.subject) for each in records if not each.marker}

    async def _share(self, crowd: "_Crowd") -> None:
        async with crowd.sharing:
            if not crowd.shared:
                crowd.shared = [
                    await self._store.backend.subscribe(self._keys.event(state, "*"), crowd.hear)
                    for state in OUTCOMES
                ]

    async def _stop_sharing(self, crowd: "_Crowd") -> None:
        async with crowd.sharing:
            if not crowd.waiting:
                for subscription in crowd.shared:
                    await subscription.unsubscribe()
                crowd.shared = []

    def _crowd(self) -> "_Crowd":
        return self._crowds.setdefault(asyncio.get_running_loop(), _Crowd())


class _Crowd:
    """The waiters of one event loop."""

    def __init__(self) -> None:
        self.waiting: dict[Waiter, None] = {}
        self.by_token: dict[str, set[Waiter]] = {}
        self.leader: Waiter | None = None
        self.shared: list[Subscription] = []
        self.sharing = anyio.Lock()

    def hear(self, signal: Signal) -> None:
        """Take the outcome of any job."""
        self.tell({last_token(signal.subject)})

    def tell(self, ended: set[str]) -> None:
        """Wake the waiters for these jobs."""
        for token in ended & self.by_token.keys():
            for waiter in self.by_token[token]:
                waiter.wake(heard=True)

    def add(self, waiter: Waiter) -> None:
        """Add a waiter."""
        self.waiting[waiter] = None
        self.by_token.setdefault(waiter.token, set()).add(waiter)

    def remove(self, waiter: Waiter) -> None:
        """Remove a waiter."""
        del self.waiting[waiter]
        self.by_token[waiter.token].discard(waiter)
        if not self.by_token[waiter.token]:
            del self.by_token[waiter.token]

    def appoint(self, last: Waiter) -> None:
        """Have a waiter lead, if none does: the newest one, since it will probably stay longest."""
        successor = next((each for each in reversed(self.waiting) if each is not last), None)
        if self.leader is None and successor is not None:
            successor.wake()

    def next_ones(self, count: int) -> Iterator[Waiter]:
        """Yield the next waiters, and put them at the end of the line."""
        for waiter in list(islice(self.waiting, count)):
            del self.waiting[waiter]
            self.waiting[waiter] = None
            yield waiter
