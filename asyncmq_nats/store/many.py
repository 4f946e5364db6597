"""Many requests: reads in parts that the server takes, calls with a bound on those under way."""

from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from typing import Final, TypeVar

from asyncmq_nats._concurrency import open_task_group
from asyncmq_nats.exceptions import AsyncMQError

__all__ = ["FILTERS_PER_READ", "for_each", "split_filters"]

Item = TypeVar("Item")

FILTERS_PER_READ: Final = 200
BYTES_PER_READ: Final = 100_000
CALLS_UNDER_WAY: Final = 64


def split_filters(filters: Iterable[str], *, most: int = FILTERS_PER_READ) -> Iterator[list[str]]:
    """Yield the filters in parts of up to `most` filters and 100 kB: a request has a size limit."""
    part: list[str] = []
    size = 0
    for filter in filters:
        if part and (len(part) == most or size + len(filter) > BYTES_PER_READ):
            yield part
            part, size = [], 0
        part.append(filter)
        size += len(filter)
    if part:
        yield part


async def for_each(
    call: Callable[[Item], Awaitable[object]],
    items: Sequence[Item],
    *,
    limit: int = CALLS_UNDER_WAY,
) -> None:
    """Call with each of the items, at most `limit` at a time.

    The first error cancels the others.
    """
    if len(items) == 1:
        await call(items[0])
        return
    left = iter(items)
    errors: list[AsyncMQError] = []

    async def work() -> None:
        for item in left:
            try:
                await call(item)
            except AsyncMQError as error:  # two that fail at once would be a group
                errors.append(error)
                group.cancel_scope.cancel()
                return

    async with open_task_group() as group:
        for _ in range(min(limit, len(items))):
            group.start_soon(work)
    if errors:
        raise errors[0]
