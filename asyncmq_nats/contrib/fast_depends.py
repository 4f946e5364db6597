"""Dependency injection into tasks, by FastDepends (`pip install 'asyncmq-nats[fast-depends]'`)."""

from collections.abc import Callable, Iterator
from functools import wraps
from inspect import Parameter, Signature, iscoroutinefunction, signature
from typing import Any, ParamSpec, TypeVar, overload

from fast_depends import Depends, Provider
from fast_depends import inject as inject_by_fast_depends
from fast_depends.core import CallModel

__all__ = ["Depends", "Provider", "inject"]

P = ParamSpec("P")
R = TypeVar("R")


@overload
def inject(function: Callable[P, R], /, *, provider: Provider | None = None) -> Callable[P, R]: ...
@overload
def inject(
    function: None = None, /, *, provider: Provider | None = None
) -> Callable[[Callable[P, R]], Callable[P, R]]: ...


def inject(function: Any = None, /, *, provider: Provider | None = None) -> Any:
    """Have a task's dependencies, `session: Session = Depends(open_session)`, made for each run.

    It belongs under `@task`. Dependencies are no arguments of a job: who enqueues gives the others,
    and those that the dependencies themselves need, by name. They may use `current_job()`; one that
    yields is ended after the run.

    Args:
        function: the function of the task.
        provider: where overrides for tests are; by default one for all.
    """
    if function is None:
        return lambda given: inject(given, provider=provider)
    models: list[CallModel] = []

    def keep(model: CallModel) -> CallModel:
        models.append(model)
        return model

    # No cast: the worker has made the arguments what the annotations say.
    injected: Any = inject_by_fast_depends(
        function, cast=False, cast_result=False, dependency_provider=provider, wrap_model=keep
    )
    if iscoroutinefunction(function):

        @wraps(function)
        async def run(*args: Any, **kwargs: Any) -> Any:
            return await injected(*args, **kwargs)

    else:

        @wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            return injected(*args, **kwargs)

    vars(run)["__signature__"] = _signature_of_calls(function, models[0])
    return run


def _signature_of_calls(function: Callable[..., Any], model: CallModel) -> Signature:
    """Return the parameters that a job gives.

    They are those of a function without its dependencies, and those of the dependencies.
    """
    whole = signature(function)
    hidden = {*model.dependencies, *model.custom_fields}
    own = [each for name, each in whole.parameters.items() if name not in hidden]
    others = [each.kind is Parameter.VAR_KEYWORD for each in own]
    at = others.index(True) if any(others) else len(own)
    own[at:at] = _parameters_of_dependencies(model, {each.name for each in own} | hidden)
    return whole.replace(parameters=_in_order(own))


def _parameters_of_dependencies(model: CallModel, known: set[str]) -> Iterator[Parameter]:
    for item in model.flat_params:
        if item.field_name not in known:
            default = Parameter.empty if item.default_value is ... else item.default_value
            yield Parameter(
                item.field_name,
                Parameter.KEYWORD_ONLY,
                default=default,
                annotation=item.field_type,
            )


def _in_order(parameters: list[Parameter]) -> list[Parameter]:
    """Return parameters of which none without a default follows one with a default."""
    seen_default = False
    ordered = []
    for each in parameters:
        is_positional = each.kind is Parameter.POSITIONAL_OR_KEYWORD
        if is_positional and each.default is not Parameter.empty:
            seen_default = True
        elif is_positional and seen_default:
            each = each.replace(kind=Parameter.KEYWORD_ONLY)
        ordered.append(each)
    return sorted(ordered, key=lambda each: each.kind)
