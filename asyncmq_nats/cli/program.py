"""Commands that are programs: they run until they are told to stop, on an event loop of their own.

    @program(group, "start")
    def start(session: Session, queues: list[str]) -> None: ...

The function is sync; its first parameter is the session, the rest is what Typer makes options of.
"""

import importlib
import logging
import os
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import typer

from asyncmq_nats.cli.command import CommandFailed, Session, add_command, connection_options
from asyncmq_nats.cli.output import Output
from asyncmq_nats.telemetry.logs import JobFields, JSONFormatter

__all__ = ["load_attribute", "log_to_stderr", "program"]

F = TypeVar("F", bound=Callable[..., None])

LOG_FORMAT = "%(asctime)s %(levelname)-7s %(name)s: %(message)s"


def program(group: typer.Typer, name: str, **options: Any) -> Callable[[F], F]:
    """Make a function a command that is a program. `options`: of `Typer.command`."""

    def register(function: F) -> F:
        def run(ctx: typer.Context, arguments: dict[str, Any], _: dict[str, Any]) -> None:
            function(Session(connection_options(ctx), Output()), **arguments)

        add_command(group, name, function, run, **options)
        return function

    return register


def log_to_stderr(level: str, *, as_json: bool = False) -> None:
    """Write the log of the program to stderr, as a service does; `as_json`: with the job's fields.

    Raises:
        CommandFailed: there is no such level.
    """
    if level.upper() not in logging.getLevelNamesMapping():
        raise CommandFailed(f"there is no log level {level!r}: DEBUG, INFO, WARNING or ERROR")
    logging.basicConfig(level=level.upper(), format=LOG_FORMAT)
    for handler in logging.getLogger().handlers if as_json else ():
        handler.addFilter(JobFields())
        handler.setFormatter(JSONFormatter())


def load_attribute(path: str) -> Any:
    """Return what `module:attribute` names; modules in the current directory are found first.

    Raises:
        CommandFailed: it is malformed, or there is nothing of that name.
    """
    name, _, attribute = path.partition(":")
    if not name or not attribute:
        raise CommandFailed(f"--app is module:attribute, such as shop.jobs:queues, not {path!r}")
    find_modules_here()
    try:
        found: Any = importlib.import_module(name)
    except Exception as problem:
        raise CommandFailed(
            f"--app: {name!r} cannot be imported: {type(problem).__name__}: {problem}"
        ) from problem
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise CommandFailed(f"--app: {name!r} has no {attribute!r}")
        found = getattr(found, part)
    return found


def find_modules_here() -> None:
    """Have modules of the current directory found, as `python -m` does."""
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
