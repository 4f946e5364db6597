"""Reads that all browsers share: a page costs the server the same for one viewer and for fifty."""

import time
from collections.abc import Awaitable, Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar, cast

import anyio

__all__ = ["SharedReads"]

T = TypeVar("T")
FRESH_FOR: Final = 1.0
"""How long a value is used again, in seconds."""
COST_RATIO: Final = 20.0
"""A value is used for at least this many times as long as its read took."""
MAX_AGE: Final = 60.0
"""No value is older, however long it took to read."""
MAX_VALUES: Final = 2_000


@dataclass(slots=True)
class _Value:
    value: Any = None
    until: float = 0.0
    lock: anyio.Lock = field(default_factory=anyio.Lock)


class SharedReads:
    """Values that were read a moment ago. One reader at a time reads again; the others wait for it.

    How long a value is used depends on what it costs to read: so all browsers together make the
    dashboard read for one twentieth of the time at most, however many queues there are.
    """

    def __init__(self) -> None:
        self._values: dict[Hashable, _Value] = {}

    async def get(
        self, key: Hashable, read: Callable[[], Awaitable[T]], *, fresh_for: float = FRESH_FOR
    ) -> T:
        """Return the value of a key; read it if there is none or it is out of date.

        `fresh_for`: for how many seconds it is used again at least.
        """
        if key not in self._values and len(self._values) >= MAX_VALUES:
            self._values.pop(next(iter(self._values)))
        entry = self._values.setdefault(key, _Value())
        async with entry.lock:
            start = time.monotonic()
            if start >= entry.until:
                entry.value = await read()
                end = time.monotonic()
                entry.until = end + min(MAX_AGE, max(fresh_for, COST_RATIO * (end - start)))
        return cast(T, entry.value)

    def forget(self) -> None:
        """Discard all values: something has just been changed."""
        self._values.clear()
