"""JSON as it is written and read here: strict, and fast."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from pydantic_core import PydanticSerializationError, from_json, to_json

from asyncmq_nats.exceptions import InvalidJob, NotSerializable

__all__ = [
    "dump_json",
    "dump_number",
    "find_non_finite",
    "load_json",
    "may_be_non_finite",
    "splice",
]

LONGEST_NUMBER: Final = 4_000
"""Readers of JSON take integers of some 4,300 digits, writers any."""
MAX_DEPTH: Final = 100
"""Readers of JSON take values in some 200 lists and objects, one in the other, writers more."""
RESERVED_DEPTH: Final = 8
"""Levels of nesting that may be put around a value later, as around a result for a child."""


dump_number: Final[Callable[[float], bytes]] = to_json
"""Return a finite number as JSON: in less than half of the time that its `repr` takes."""


def dump_json(value: Any, what: str = "the value") -> bytes:
    """Return the value as JSON, dates, UUIDs, enums, dataclasses and models included.

    Raises:
        NotSerializable: JSON cannot hold it, or it could be written but not read. NaN and
            infinities are no JSON: other languages' readers stop at them.
    """
    try:
        body = to_json(value)
        # Quick tests come first: to look for words and brackets takes longer than to encode.
        if (
            may_be_non_finite(body)
            or len(body) > LONGEST_NUMBER
            or (len(body) > 2 * MAX_DEPTH and body.count(b"[") + body.count(b"{") > MAX_DEPTH)
        ):
            _read_back(body, what)
    except (PydanticSerializationError, ValueError, RecursionError) as error:
        raise NotSerializable(what, str(error)) from None
    return body


def _read_back(body: bytes, what: str) -> None:
    value = from_json(b"[" * RESERVED_DEPTH + body + b"]" * RESERVED_DEPTH)
    if (bad := find_non_finite(value)) is not None:
        raise NotSerializable(what, f"{bad} is not a JSON number")


def splice(body: bytes, members: bytes) -> bytes:
    """Return the JSON object `body` with new members appended.

    Its own members stay as they are, byte for byte.
    """
    return (body if body[-1:] == b"}" else body.rstrip())[:-1] + b"," + members + b"}"


def load_json(body: bytes) -> dict[str, Any]:
    """Return a JSON object as a dict, with its unknown members.

    Raises:
        InvalidJob: it is not one.
    """
    try:
        value = from_json(body)
    except ValueError as error:
        raise InvalidJob(str(error)) from None
    if not isinstance(value, dict):
        raise InvalidJob("it is not an object")
    return value


def may_be_non_finite(body: bytes) -> bool:
    """Return whether there may be a number in the JSON that JSON has no word for."""
    # One letter is looked for by other means than a word, in a tenth of the time.
    return (b"N" in body and b"NaN" in body) or (b"I" in body and b"Infinity" in body)


def find_non_finite(value: object) -> float | None:
    """Return the first number in the value that JSON has no word for, or `None`."""
    if isinstance(value, float):
        return None if math.isfinite(value) else value
    if isinstance(value, Mapping):
        values: Sequence[object] = list(value.values())
    elif isinstance(value, list):
        values = value
    else:
        return None
    return next((bad for item in values if (bad := find_non_finite(item)) is not None), None)
