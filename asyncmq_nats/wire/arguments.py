"""How the arguments of a task are written as JSON and read again, by its annotations.

Accepted values arrive equal (docs/arguments.md). Nothing here knows what a job is.
"""

import dataclasses
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, Final, cast

from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic_core import (
    InitErrorDetails,
    PydanticSerializationError,
    from_json,
    to_json,
    to_jsonable_python,
)

from asyncmq_nats.exceptions import InvalidCall, InvalidResult, NotSerializable
from asyncmq_nats.wire.signatures import (
    Call,
    Chain,
    Slot,
    adapter_of,
    make_adapter,
    return_annotation,
)

__all__ = ["PLAIN", "Arguments", "Results", "write_by_class"]

CACHED_SHAPES: Final = 256
"""Shapes (a number of positions, and names) that are kept per task; `**kwargs` has any number."""
EXACT_TYPES: Final[Mapping[Any, frozenset[type]]] = {
    int: frozenset({int}),
    str: frozenset({str}),
    bool: frozenset({bool}),
    float: frozenset({float, int}),
    int | None: frozenset({int, type(None)}),
    str | None: frozenset({str, type(None)}),
    bool | None: frozenset({bool, type(None)}),
    float | None: frozenset({float, int, type(None)}),
}
"""Annotations whose values JSON has itself: a value of these classes needs no trial."""
PLAIN: Final[frozenset[type]] = frozenset({str, int, float, bool, type(None)})
"""Classes of values that are data already."""
PLAIN_BITS: Final = 8_192
"""Readers of JSON take integers of more bits than these."""
SerializationErrors: Final = (PydanticSerializationError, ValueError, TypeError, RecursionError)


class Arguments:
    """The arguments of one function: written by its producer, read by its worker.

    Args:
        function: the one that is called, whatever it wraps.
        validate: whether the annotations count. If not, the function is given plain data.
        supplied: names of arguments that the worker gives.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        *,
        validate: bool = True,
        supplied: Iterable[str] = (),
    ) -> None:
        self._chain = Chain(function, frozenset(supplied))
        self._validate = validate
        self._shapes: dict[tuple[int, tuple[str, ...]], _Shape] = {}

    @property
    def names(self) -> frozenset[str]:
        """The names of all parameters, also of the functions that it wraps."""
        return self._chain.names

    def positions(self, count: int, names: Iterable[str]) -> tuple[str, ...]:
        """Return the parameters that take `count` positional arguments, beside those in `names`."""
        slots = self._chain.match(count, tuple(names)).slots[:count]
        return tuple(slot.key for slot in slots)

    def write(
        self, args: Sequence[Any], kwargs: Mapping[str, Any], task_id: str
    ) -> tuple[list[Any], dict[str, Any]]:
        """Return the arguments as plain data that arrives equal.

        Raises:
            NotSerializable: one would not; the message names it.
        """
        return self._shape(len(args), tuple(kwargs)).write(args, kwargs, task_id)

    def plain_classes(self, count: int, names: tuple[str, ...]) -> Sequence[frozenset[type]] | None:
        """Return the classes of the values that `write` passes on, by argument; `None`: of none."""
        return self._shape(count, names).plain_classes

    def read(
        self, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> tuple[Sequence[Any], dict[str, Any]]:
        """Return the arguments for the call, made of the plain data of a message.

        Raises:
            ValidationError: they are not what the function takes.
        """
        if not self._validate:
            return args, dict(kwargs)
        return self._shape(len(args), tuple(kwargs)).read(args, kwargs)

    def check(self, args: Sequence[Any], kwargs: Mapping[str, Any], task_id: str) -> None:
        """See that `read` takes these arguments, which are plain data already.

        Raises:
            InvalidCall: it does not; the message says why.
        """
        if self._validate:
            self._shape(len(args), tuple(kwargs)).check(args, kwargs, task_id)

    def _shape(self, count: int, names: tuple[str, ...]) -> "_Shape":
        shape = self._shapes.get((count, names))
        if shape is None:
            if len(self._shapes) >= CACHED_SHAPES:
                self._shapes.clear()
            call = self._chain.match(count, names)
            shape = _Shape(self._chain.title, call if self._validate else call.without_types())
            self._shapes[count, names] = shape
        return shape


class _Shape:
    """One way to call a function: a number of positions, and these names."""

    def __init__(self, title: str, call: Call) -> None:
        self._title = title
        self._call = call
        self._keys = tuple(slot.key for slot in call.slots)
        self._exact = [_exact_classes(slot.annotation) for slot in call.slots]
        self._all_exact = all(self._exact)
        self._as_read = [
            classes - {int} if float in classes else classes for classes in self._exact
        ]
        """The classes whose values are passed on as they are read: for a float, 1 becomes 1.0."""
        self._adapter = make_adapter(title, {slot.key: slot.annotation for slot in call.slots})
        self._typed = any(slot.annotation is not Any for slot in call.slots)

    # -- write

    @property
    def plain_classes(self) -> Sequence[frozenset[type]] | None:
        return self._exact if self._all_exact else None

    def write(
        self, args: Sequence[Any], kwargs: Mapping[str, Any], task_id: str
    ) -> tuple[list[Any], dict[str, Any]]:
        values = [*args, *kwargs.values()]
        if not self._all_exact or not all(map(_is_plain, values, self._exact)):
            values = self._write(values, task_id)
        if not kwargs:
            return values, {}
        return values[: len(args)], dict(zip(kwargs, values[len(args) :], strict=True))

    def _write(self, values: list[Any], task_id: str) -> list[Any]:
        given = dict(zip(self._keys, values, strict=True))
        if self._typed and (written := _round_trip(self._adapter, given)) is not None:
            return [written[key] for key in self._keys]
        # One of them does not arrive: find out which, one by one.
        return [
            self._write_one(slot, value, f"argument {_shown(slot)} of task {task_id!r}")
            for slot, value in zip(self._call.slots, values, strict=True)
        ]

    def _write_one(self, slot: Slot, value: Any, what: str) -> Any:
        if slot.annotation is Any:
            _require_json_equal(value, what)
            return value
        if _holds_iterator(value):
            raise NotSerializable(what, "it can be read once only: pass a list")
        adapter = make_adapter(self._title, {slot.key: slot.annotation})
        try:
            expected = adapter.validate_python({slot.key: value}, by_alias=True, by_name=True)
        except ValidationError as error:  # its worker may know better, if it arrives there
            _require_json_equal(value, what, _first_message(error))
            return value
        written = _round_trip(adapter, {slot.key: value})
        if written is None:
            raise NotSerializable(what, _difference(adapter, {slot.key: value}, expected, slot))
        return written[slot.key]

    # -- read

    def read(
        self, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> tuple[Sequence[Any], dict[str, Any]]:
        if self._is_plain(args, kwargs, self._as_read):
            values, named = args, dict(kwargs)
        else:
            given = self._validated(args, kwargs)
            values = [given[key] for key in self._keys]
            named = dict(zip(kwargs, values[len(args) :], strict=True))
            values = values[: len(args)]
        for name, make in self._call.defaults:
            named[name] = make()
        return values, named

    def _is_plain(
        self,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        classes: Sequence[frozenset[type]],
    ) -> bool:
        """Return whether all arguments are of these classes, and the function takes them."""
        return (
            self._all_exact
            and not self._call.problems
            and all(map(_is_plain, (*args, *kwargs.values()), classes))
        )

    def check(self, args: Sequence[Any], kwargs: Mapping[str, Any], task_id: str) -> None:
        if self._is_plain(args, kwargs, self._exact):
            return
        try:
            self._validated(args, kwargs)
        except ValidationError as error:
            raise InvalidCall(task_id, _all_messages(error)) from None

    def _validated(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        given = dict(zip(self._keys, (*args, *kwargs.values()), strict=True))
        if self._call.problems:
            raise ValidationError.from_exception_data(
                self._title,
                [
                    InitErrorDetails(type=kind, loc=(where,), input=given.get(str(where)))
                    for kind, where in self._call.problems
                ],
            )
        if self._all_exact:
            return cast("dict[str, Any]", self._adapter.validate_python(given))
        if self._typed:
            # By JSON: strict models take a text for a date there, and `Json[...]` its text.
            given = self._adapter.validate_json(_json(given), by_alias=True, by_name=True)
        return given


class Results:
    """Reads what a function returned, as its annotation says, for those who wait for it.

    Args:
        function: the one that is called, whatever it wraps.
        validate: whether the annotation counts.
    """

    def __init__(self, function: Callable[..., Any], *, validate: bool = True) -> None:
        self._function = function
        self._title = getattr(function, "__qualname__", type(function).__qualname__)
        self._validate = validate

    @cached_property
    def _adapter(self) -> TypeAdapter[Any] | None:
        annotation = return_annotation(self._function) if self._validate else Any
        return None if annotation is Any else adapter_of(annotation)

    def read(self, value: Any, job_id: str) -> Any:
        """Return the result of a job, made of the plain data of its outcome.

        Raises:
            InvalidResult: it is not what the function returns.
        """
        if self._adapter is None:
            return value
        try:
            return self._adapter.validate_json(_json({"value": value}))["value"]
        except ValidationError as error:
            raise InvalidResult(job_id, self._title, _all_messages(error)) from None


def _shown(slot: Slot) -> str:
    return slot.key if slot.key.isdigit() else repr(slot.key)  # of `*args` the position


def _exact_classes(annotation: Any) -> frozenset[type]:
    try:
        return EXACT_TYPES.get(annotation, frozenset())
    except TypeError:  # it cannot be hashed
        return frozenset()


def _is_plain(value: Any, exact: frozenset[type]) -> bool:
    """Return whether a value is of one of these classes, and JSON can hold it."""
    kind = type(value)
    if kind not in exact:
        return False
    if kind is str:
        return value.isascii() or _is_unicode(value)
    if kind is int:
        return bool(value.bit_length() <= PLAIN_BITS)
    return kind is not float or math.isfinite(value)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _json(value: Any) -> bytes:
    # `null`, since NaN is no JSON: it does not arrive equal then.
    return to_json(value, inf_nan_mode="null")


def _round_trip(adapter: TypeAdapter[Any], given: dict[str, Any]) -> dict[str, Any] | None:
    """Return plain data that the adapter reads as it reads the values, or `None`."""
    if _holds_iterator(given):
        return None
    for of_expected, by_alias in ((False, True), (False, False), (True, True)):
        try:
            expected = adapter.validate_python(given, by_alias=True, by_name=True)
            written = _dump(adapter, expected if of_expected else given, by_alias=by_alias)
            arrived = adapter.validate_json(_json(written), by_alias=True, by_name=True)
        except (ValidationError, *SerializationErrors):
            continue
        if _is_same(expected, arrived):
            return written
    return None


def _holds_iterator(value: Any) -> bool:
    """Return whether something in the value can be read once only: a trial would use it up."""
    if isinstance(value, Mapping):
        return any(map(_holds_iterator, value.values()))
    if isinstance(value, list | tuple | deque):
        return any(map(_holds_iterator, value))
    if isinstance(value, BaseModel) or dataclasses.is_dataclass(value):
        return any(map(_holds_iterator, getattr(value, "__dict__", {}).values()))
    return isinstance(value, Iterator)


def _dump(adapter: TypeAdapter[Any], values: Any, *, by_alias: bool) -> dict[str, Any]:
    # `round_trip`: computed fields are left out, and `Json[...]` is a text again.
    dumped: dict[str, Any] = adapter.dump_python(
        values, mode="json", round_trip=True, by_alias=by_alias, warnings="none"
    )
    return dumped


def _difference(
    adapter: TypeAdapter[Any], given: dict[str, Any], expected: dict[str, Any], slot: Slot
) -> str:
    try:
        arrived = adapter.validate_json(
            _json(_dump(adapter, given, by_alias=True)), by_alias=True, by_name=True
        )
    except ValidationError as error:
        return f"what is written of it is refused by its annotation ({_first_message(error)})"
    except SerializationErrors as error:
        return str(error)
    return _tell(expected[slot.key], arrived[slot.key])


def _tell(expected: Any, arrived: Any) -> str:
    there, here = type(arrived).__name__, type(expected).__name__
    if there != here:
        return f"a {here} would arrive as {there}"
    return f"the {here} would arrive with another value"


def _all_messages(error: ValidationError) -> str:
    problems = error.errors(include_url=False, include_input=False, include_context=False)
    told = [f"{'.'.join(str(part) for part in p['loc'])}: {p['msg']}" for p in problems[:5]]
    return "; ".join(told)


def _first_message(error: ValidationError) -> str:
    problem = error.errors(include_url=False, include_input=False, include_context=False)[0]
    return f"{'.'.join(str(part) for part in problem['loc'])}: {problem['msg']}"


def _require_json_equal(value: Any, what: str, refused: str = "") -> None:
    """See that a value without an annotation arrives as it is."""
    try:
        arrived = from_json(_json(value))
        equal = bool(arrived == value)
    except SerializationErrors as error:
        raise NotSerializable(what, str(error)) from None
    if equal:
        return
    if refused:
        raise NotSerializable(what, f"it is not what its annotation says ({refused})")
    raise NotSerializable(what, f"{_tell(value, arrived)}, since the task does not annotate it")


def _is_same(one: Any, other: Any) -> bool:
    """Return whether two values are equal, and what they are made of is of the same classes."""
    kind = type(one)
    if kind is not type(other):
        # A `StrEnum` for a `str` is equal, and fine.
        return isinstance(one, str | int | float) and isinstance(one, type(other)) and one == other
    if kind in (dict, list, tuple, deque):
        return len(one) == len(other) and (
            _are_same(one, other)
            if kind is not dict
            else _are_same(one, other) and _are_same(one.values(), other.values())
        )
    if issubclass(kind, BaseModel) or dataclasses.is_dataclass(kind):
        return _are_same_fields(one, other)
    if issubclass(kind, Iterator):  # pydantic makes one for `Iterable[int]`
        return _is_same(list(one), list(other))
    if getattr(kind, "__eq__", None) is object.__eq__ and hasattr(one, "__dict__"):
        return _is_same(vars(one), vars(other))
    return bool(one == other)


def _are_same(ones: Iterable[Any], others: Iterable[Any]) -> bool:
    return all(_is_same(one, other) for one, other in zip(ones, others, strict=True))


def _are_same_fields(one: Any, other: Any) -> bool:
    if isinstance(one, BaseModel):
        mine: list[Any] = [vars(one), one.__pydantic_extra__, one.__pydantic_private__]
        return _is_same(mine, [vars(other), other.__pydantic_extra__, other.__pydantic_private__])
    return all(
        _is_same(getattr(one, field.name, None), getattr(other, field.name, None))
        for field in dataclasses.fields(one)
    )


# -- of a task that this process does not know


def write_by_class(
    args: Sequence[Any], kwargs: Mapping[str, Any], task_id: str
) -> tuple[list[Any], dict[str, Any]]:
    """Return the arguments as plain data, written by their classes.

    Only the worker knows the annotations.

    Raises:
        NotSerializable: a value does not arrive equal even where its own class is the annotation;
            the message names it.
    """
    if PLAIN.issuperset(map(type, args)) and PLAIN.issuperset(map(type, kwargs.values())):
        return list(args), dict(kwargs)
    return (
        [_by_class(arg, f"argument {i} of task {task_id!r}") for i, arg in enumerate(args)],
        {k: _by_class(value, f"argument {k!r} of task {task_id!r}") for k, value in kwargs.items()},
    )


def _by_class(value: Any, what: str) -> Any:
    kind = type(value)
    if kind in PLAIN:
        return value
    if isinstance(value, Mapping) and not isinstance(value, BaseModel):
        return _mapping_by_class(value, what)
    if isinstance(value, list | tuple | set | frozenset | deque):
        return [_by_class(item, what) for item in value]
    try:
        adapter = adapter_of(kind)
        if adapter is None:
            return to_jsonable_python(value)
        given = {"value": value}
        if (written := _round_trip(adapter, given)) is not None:
            return written["value"]
        reason = _difference(adapter, given, given, Slot("value", kind))
    except SerializationErrors as error:
        reason = str(error)
    raise NotSerializable(what, reason)


def _mapping_by_class(value: Mapping[Any, Any], what: str) -> dict[str, Any]:
    written: dict[str, Any] = {}
    for key, item in value.items():
        try:
            text = key if type(key) is str else next(iter(from_json(to_json({key: None}))))
        except SerializationErrors as error:
            raise NotSerializable(what, str(error)) from None
        if text in written:
            raise NotSerializable(what, f"two of its keys are written as {text!r}")
        written[text] = _by_class(item, what)
    return written
