"""Bulk entries that differ in their arguments alone. They are checked column by column.

What holds for a column holds for each of its values, and is found out many times faster than value
by value. So it is known before the first job is made that none will be refused.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat
from math import isfinite
from operator import itemgetter
from typing import Any, Final

__all__ = ["SIMPLE", "ClassesOf", "Series", "find_series"]

SIMPLE: Final = frozenset({str, int, float, type(None)})
"""Classes of options that are equal only to what means the same."""
OWN_KEYS: Final = ("args", "kwargs")
MOST_BITS: Final = 64
NUMBER_BYTES: Final = 32
"""No number of a series takes more as JSON, nor `null`, `true` or `false`."""
CHARACTER_BYTES: Final = 6
"""No character takes more as JSON."""
BETWEEN_BYTES: Final = 8
"""Quotes, a colon, a comma."""

ClassesOf = Callable[[str, int, tuple[str, ...]], Sequence[frozenset[type]] | None]
"""See `TaskRegistry.plain_classes`."""


@dataclass(frozen=True, slots=True)
class Series:
    """The calls of some entries: a column for each argument, first those by position."""

    options: tuple[tuple[str, type, Any], ...]
    """What else the entries have: keys, classes and values, the same in all of them."""
    count: int
    columns: Sequence[Sequence[Any]]
    names: tuple[str, ...]
    """Of the last columns."""
    most_bytes: int
    """No entry's arguments take more as JSON."""

    def calls(self) -> Iterator[tuple[list[Any], dict[str, Any]]]:
        """Yield the arguments of one entry after the other."""
        names, positions = self.names, len(self.columns) - len(self.names)
        rows = zip(*self.columns, strict=True) if self.columns else repeat((), self.count)
        for row in rows:
            yield [*row[:positions]], dict(zip(names, row[positions:], strict=True))


def find_series(entries: Sequence[Any], classes_of: ClassesOf) -> Series | None:
    """Return the calls of entries that are dicts with the same simple options.

    `None` if they are not, or if an argument is no number or text, or not in every entry.
    """
    if {*map(type, entries)} != {dict} or len({*map(tuple, entries)}) > 1:
        return None
    options = _options(entries)
    rows, named = _rows("args", entries, (list, tuple)), _rows("kwargs", entries, (dict,))
    if options is None or rows is None or named is None or len({*map(tuple, named)}) > 1:
        return None
    names = tuple(named[0]) if named else ()
    count = len(rows[0]) if rows else 0
    task = entries[0].get("task_id")
    if not isinstance(task, str) or {*map(type, names)} - {str}:
        return None
    classes = classes_of(task, count, names)
    columns = [[*map(itemgetter(key), rows)] for key in range(count)]
    columns += [[*map(itemgetter(key), named)] for key in names]
    if classes is None or len(classes) != len(columns):
        return None
    sizes = [_text_size(["".join(names)]), *map(_size, columns, classes)]
    known = [size + BETWEEN_BYTES for size in sizes if size is not None]
    if len(known) < len(sizes):
        return None
    return Series(options, len(entries), columns, names, sum(known))


def _options(entries: Sequence[Mapping[str, Any]]) -> tuple[tuple[str, type, Any], ...] | None:
    """Return the options that all entries have; `None` if one has another."""
    found: list[tuple[str, type, Any]] = []
    for key in entries[0]:
        if key not in OWN_KEYS:
            values = [*map(itemgetter(key), entries)]
            kinds = {*map(type, values)}
            if len(kinds) > 1 or not kinds <= SIMPLE or len({*values}) > 1:
                return None
            found.append((key, kinds.pop(), values[0]))
    return tuple(found)


def _rows(
    key: str, entries: Sequence[Mapping[str, Any]], kinds: Sequence[type]
) -> Sequence[Any] | None:
    """Return the arguments at this key, if there are as many in each entry."""
    if key not in entries[0]:
        return ()
    rows = [*map(itemgetter(key), entries)]
    found = {*map(type, rows)}
    if len(found) > 1 or not found.issubset(kinds) or len({*map(len, rows)}) > 1:
        return None
    return rows


def _size(column: Sequence[Any], classes: frozenset[type]) -> int | None:
    """Return how many bytes a value takes at most; `None` if one is not plain."""
    kinds = {*map(type, column)}
    if len(kinds) > 1 or not kinds <= classes:
        return None
    kind = kinds.pop()
    if kind is str:
        return _text_size(column)
    if kind is int and max(map(int.bit_length, column)) > MOST_BITS:
        return None
    return NUMBER_BYTES if kind is not float or all(map(isfinite, column)) else None


def _text_size(texts: Sequence[str]) -> int | None:
    """Return how many bytes a text takes at most; `None` if one is not of valid Unicode."""
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:
        return None
    return CHARACTER_BYTES * max(map(len, texts), default=0)
