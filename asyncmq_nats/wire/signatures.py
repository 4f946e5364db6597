"""Matches the arguments of a call with the parameters of a function, then of those it wraps."""

import functools
import inspect
import typing
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from inspect import Parameter
from typing import Annotated, Any, Final, Literal, Optional, cast

from pydantic import ConfigDict, PydanticUserError, TypeAdapter
from pydantic.errors import PydanticInvalidForJsonSchema, PydanticUndefinedAnnotation
from pydantic.fields import FieldInfo
from typing_extensions import TypedDict

from asyncmq_nats._logging import get_logger

__all__ = ["Call", "Chain", "Slot", "adapter_of", "make_adapter", "return_annotation"]

logger = get_logger(__name__)

POSITIONAL: Final = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
BY_NAME: Final = (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)
CONFIG: Final = ConfigDict(arbitrary_types_allowed=True)
Kind = Literal[
    "missing_argument",
    "multiple_argument_values",
    "unexpected_keyword_argument",
    "unexpected_positional_argument",
]
"""The problem of a call, in the words of pydantic."""


@dataclass(frozen=True, slots=True)
class Slot:
    """One argument of a call: its name for messages, and its annotation; `Any` if it has none."""

    key: str
    annotation: Any


@dataclass(frozen=True, slots=True)
class Call:
    """The arguments of a call in order, its problem, and what pydantic's `Field` supplies."""

    slots: tuple[Slot, ...]
    problems: tuple[tuple[Kind, str | int], ...] = ()
    defaults: tuple[tuple[str, Callable[[], Any]], ...] = ()

    def without_types(self) -> "Call":
        """Return the call with nothing annotated."""
        return Call(tuple(replace(slot, annotation=Any) for slot in self.slots))


@dataclass(frozen=True, slots=True)
class _Level:
    """The parameters of one function."""

    positional: tuple[Parameter, ...]
    by_name: Mapping[str, Parameter]
    rest: Parameter | None
    others: Parameter | None
    annotations: Mapping[str, Any]

    def parameters(self) -> Iterator[Parameter]:
        yield from dict.fromkeys((*self.positional, *self.by_name.values()))


class Chain:
    """A function, and the functions that it wraps (`functools.wraps`), outermost first.

    The outermost one is called. An argument that it takes as `*args` or `**kwargs` is for the one
    that it wraps.
    """

    def __init__(self, function: Callable[..., Any], supplied: frozenset[str]) -> None:
        self.title = getattr(function, "__name__", type(function).__name__)
        self._supplied = supplied
        self._functions = tuple(_unwrapped(function))

    @functools.cached_property
    def _levels(self) -> tuple[_Level, ...]:
        return tuple(
            _level(function, self._supplied, is_called=number == 0)
            for number, function in enumerate(self._functions)
        )

    @property
    def names(self) -> frozenset[str]:
        """The names of all parameters other than `*args` and `**kwargs`."""
        return frozenset(
            parameter.name
            for function in self._functions
            for parameter in _parameters(function)
            if parameter.kind in (*POSITIONAL, Parameter.KEYWORD_ONLY)
        )

    def match(self, count: int, names: Sequence[str]) -> Call:
        """Return which parameters a call with this many positions and these names is for."""
        placed, named, problems = self._match(0, count, names)
        slots = [*placed, *(named[name] for name in names)]
        filled = {slot.key for slot in slots}
        defaults = tuple(
            (parameter.name, functools.partial(_default, parameter.default))
            for parameter in self._levels[0].parameters()
            if isinstance(parameter.default, FieldInfo) and parameter.name not in filled
        )
        return Call(tuple(_distinct(slots)), tuple(problems), defaults)

    def _match(
        self, number: int, count: int, names: Sequence[str]
    ) -> tuple[list[Slot], dict[str, Slot], list[tuple[Kind, str | int]]]:
        level = self._levels[number]
        placed = [_slot(level, parameter) for parameter in level.positional[:count]]
        taken = {slot.key for slot in placed}
        problems: list[tuple[Kind, str | int]] = []
        named: dict[str, Slot] = {}
        left = []
        for name in names:
            parameter = level.by_name.get(name)
            if parameter is not None and name in taken:
                problems.append(("multiple_argument_values", name))
            if parameter is None or name in taken:
                left.append(name)
            else:
                named[name] = _slot(level, parameter)
        problems += [
            ("missing_argument", parameter.name)
            for parameter in level.parameters()
            if _is_required(parameter) and parameter.name not in taken | named.keys()
        ]
        surplus = count - len(placed)
        if surplus and level.rest is None:
            problems += [
                ("unexpected_positional_argument", len(placed) + i) for i in range(surplus)
            ]
        if left and level.others is None:
            problems += [
                ("unexpected_keyword_argument", name) for name in left if name not in taken
            ]
        rest, others = self._pass_on(number, surplus, left)
        return [*placed, *rest], named | others, problems

    def _pass_on(
        self, number: int, surplus: int, left: Sequence[str]
    ) -> tuple[list[Slot], dict[str, Slot]]:
        """Match the `*args` and `**kwargs` of a function with the parameters of what it wraps."""
        level = self._levels[number]
        start = len(level.positional)
        rest = [_rest_slot(level, level.rest, f"{start + i}") for i in range(surplus)]
        others = {name: _rest_slot(level, level.others, name) for name in left}
        if number + 1 == len(self._levels):
            return rest, others
        to_rest = surplus if level.rest is not None else 0
        to_others = left if level.others is not None else ()
        placed, named, problems = self._match(number + 1, to_rest, to_others)
        if any(kind == "missing_argument" for kind, _ in problems):
            placed = rest  # the decorator supplies one: no one can tell which
        return placed or rest, others | named


def _unwrapped(function: Callable[..., Any]) -> Iterator[Callable[..., Any]]:
    seen: set[int] = set()
    current: Any = function
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        is_last = "__signature__" in getattr(current, "__dict__", {})
        current = None if is_last else getattr(current, "__wrapped__", None)


def _parameters(function: Callable[..., Any]) -> Sequence[Parameter]:
    try:
        return tuple(inspect.signature(function, follow_wrapped=False).parameters.values())
    except (ValueError, TypeError):  # one that is written in C and does not say
        return (
            Parameter("args", Parameter.VAR_POSITIONAL),
            Parameter("kwargs", Parameter.VAR_KEYWORD),
        )


def _level(function: Callable[..., Any], supplied: frozenset[str], *, is_called: bool) -> _Level:
    parameters = [p for p in _parameters(function) if p.name not in supplied]
    annotations = {p.name: _annotation(function, p) for p in parameters}
    if not is_called:
        # A decorator gives what no message can carry, such as a session.
        parameters = [p for p in parameters if _can_travel(annotations[p.name])]
    kinds = {p.kind: p for p in parameters}
    return _Level(
        positional=tuple(p for p in parameters if p.kind in POSITIONAL),
        by_name={p.name: p for p in parameters if p.kind in BY_NAME},
        rest=kinds.get(Parameter.VAR_POSITIONAL),
        others=kinds.get(Parameter.VAR_KEYWORD),
        annotations={
            name: annotation if adapter_of(annotation) is not None else Any
            for name, annotation in annotations.items()
        },
    )


def _slot(level: _Level, parameter: Parameter) -> Slot:
    return Slot(parameter.name, level.annotations[parameter.name])


def _rest_slot(level: _Level, parameter: Parameter | None, key: str) -> Slot:
    return Slot(key, Any if parameter is None else level.annotations[parameter.name])


def _distinct(slots: Sequence[Slot]) -> Iterator[Slot]:
    seen: set[str] = set()
    for slot in slots:
        key = slot.key
        while key in seen:
            key += "'"
        seen.add(key)
        yield replace(slot, key=key)


def _is_required(parameter: Parameter) -> bool:
    default = parameter.default
    return default is Parameter.empty or (isinstance(default, FieldInfo) and default.is_required())


def _default(field: FieldInfo) -> Any:
    return field.get_default(call_default_factory=True, validated_data={})


# -- annotations


def _annotation(function: Callable[..., Any], parameter: Parameter) -> Any:
    annotation = parameter.annotation
    if annotation is Parameter.empty:
        return Any
    annotation = _resolved(function, annotation)
    if parameter.default is None and annotation is not Any:
        annotation = Optional[annotation]  # noqa: UP045  of any annotation, also a special form
    if isinstance(parameter.default, FieldInfo):
        annotation = Annotated[annotation, parameter.default]
    return annotation


def return_annotation(function: Callable[..., Any]) -> Any:
    """Return the annotation of what a function returns; `Any` if it has none.

    A coroutine returns what awaiting it gives.
    """
    for each in _unwrapped(function):
        try:
            annotation = inspect.signature(each, follow_wrapped=False).return_annotation
        except (ValueError, TypeError):  # one that is written in C and does not say
            continue
        if annotation is not inspect.Signature.empty:
            break
    else:
        return Any
    annotation = _resolved(function, annotation)
    if typing.get_origin(annotation) in (Awaitable, Coroutine):
        annotation = (typing.get_args(annotation) or (Any,))[-1]
    return annotation


def _resolved(function: Callable[..., Any], annotation: Any) -> Any:
    """Return an annotation with the names in it looked up, `Any` if one has no meaning."""

    def stub() -> None: ...

    stub.__annotations__ = {"value": annotation}
    problem: Exception | None = None
    for scope in _scopes(function):
        try:
            return typing.get_type_hints(stub, globalns=dict(scope), include_extras=True)["value"]
        except Exception as error:  # the annotation is the user's code
            problem = error
    logger.warning(
        "%s: an argument stays plain data, since its annotation %r cannot be read: %r",
        getattr(function, "__qualname__", function),
        annotation,
        problem,
    )
    return Any


def _scopes(function: Callable[..., Any]) -> Iterator[Mapping[str, Any]]:
    """Return the globals of the function and of the one it wraps: it may have its annotations."""
    while isinstance(function, functools.partial):
        function = function.func
    for each in (function, inspect.unwrap(function)):
        code: Any = each if hasattr(each, "__globals__") else type(each).__call__
        yield getattr(code, "__globals__", {})


def make_adapter(title: str, fields: Mapping[str, Any]) -> TypeAdapter[Any]:
    """Return the adapter of a dict with these annotations. `title`: for messages."""
    values = cast("Any", TypedDict)(title, dict(fields))
    values.__pydantic_config__ = CONFIG
    return TypeAdapter(values)


def adapter_of(annotation: Any) -> TypeAdapter[Any] | None:
    """Return the adapter of `{"value": …}`.

    `None` for an annotation that pydantic does not know.
    """
    try:
        return _adapter_of(annotation)
    except TypeError:  # one that cannot be hashed
        return _adapter_of.__wrapped__(annotation)


@functools.lru_cache(maxsize=1_000)
def _adapter_of(annotation: Any) -> TypeAdapter[Any] | None:
    try:
        return make_adapter("Value", {"value": annotation})
    except (PydanticUserError, PydanticUndefinedAnnotation):
        return None


def _can_travel(annotation: Any) -> bool:
    adapter = adapter_of(annotation)
    if adapter is None:
        return False
    try:
        adapter.json_schema()
    except PydanticInvalidForJsonSchema:
        return False
    return True
