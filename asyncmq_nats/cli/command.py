"""What every command shares: its session, the options of the connection, confirmation, completion.

    group = make_group("queue", "Queues: look at them, pause, clean, move.")

    @command(group, "ls")
    async def list_all(session: Session, as_json: AsJson = False) -> None:
        '''List the queues.'''

The function is async; its first parameter is the session, the rest is what Typer makes options of.
"""

import functools
import getpass
import inspect
import logging
import socket
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from typing import Annotated, Any, Final, TypeVar, get_args

import anyio
import typer

from asyncmq_nats import NATSBackend, Queue, list_queues
from asyncmq_nats.audit import AuditEntry, record_action
from asyncmq_nats.cli.connection import ConnectionOptions, make_backend
from asyncmq_nats.cli.interrupts import cancelled_by_sigint, interrupt, on_sigint
from asyncmq_nats.cli.output import Output
from asyncmq_nats.exceptions import AsyncMQError
from asyncmq_nats.settings import mask_login

__all__ = [
    "AsJson",
    "AsNames",
    "CommandFailed",
    "DryRun",
    "Force",
    "Options",
    "QueueName",
    "Session",
    "add_command",
    "command",
    "complete_queues",
    "connection_options",
    "connection_parameters",
    "make_group",
    "require_queue",
    "set_parameters",
]

F = TypeVar("F", bound=Callable[..., Awaitable[None]])

TARGETS: Final = ("ids", "job_id", "name", "names", "workers")
"""Parameters that name the targets of a command."""
ADDRESSES: Final = ("to_server",)
"""Parameters that are the address of a server: its login is not recorded."""
AUDIT_LENGTH: Final = 500
"""Characters of the target of a command that the audit keeps."""
COMPLETION_TIMEOUT: Final = 1.0
"""Seconds that the completion of a queue's name may take."""


class CommandFailed(AsyncMQError):
    """A command failed; the message says why."""


class Session:
    """One run of a command: its connection, made when first asked for, and what it prints."""

    def __init__(self, options: ConnectionOptions, output: Output) -> None:
        self.options = options
        self.output = output
        self.count = 1
        """The number of jobs or other targets that the command has changed, for the audit log."""
        self._backend: NATSBackend | None = None

    @property
    def backend(self) -> NATSBackend:
        """The backend that the options name; it connects when first used."""
        if self._backend is None:
            self._backend = make_backend(self.options)
        return self._backend

    def queue(self, name: str, **options: Any) -> Queue:
        """Return a queue on that backend, whether it exists or not."""
        return Queue(name, self.backend, **options)

    def elsewhere(self, server: str) -> "Session":
        """Return a session with another server, all else alike."""
        return Session(ConnectionOptions(server=server).or_else(self.options), self.output)

    async def record(self, action: str, given: Mapping[str, Any]) -> None:
        """Write an entry into the audit log. `given`: the arguments of the command."""
        told = {name: value for name, value in given.items() if value not in (None, False, [], ())}
        queue = str(told.pop("queue", ""))
        ids = next((told.pop(each) for each in TARGETS if each in told), "")
        target = ids if isinstance(ids, str) else ", ".join(ids)
        told |= {name: mask_login(told[name]) for name in ADDRESSES if name in told}
        details = {name: str(value) for name, value in told.items() if name != "force"}
        entry = AuditEntry(operator(), action, queue, target[:AUDIT_LENGTH], self.count, details)
        await record_action(self.backend, entry)

    async def close(self) -> None:
        """End the connection."""
        if self._backend is not None:
            await self._backend.close()


# -- options that many commands have


def complete_queues(ctx: typer.Context, incomplete: str) -> list[str]:
    """Return the queues that begin so; none if no server answers in time."""

    async def read() -> list[str]:
        backend = make_backend(connection_options(ctx))
        try:
            return await list_queues(backend)
        finally:
            await backend.close()

    async def read_in_time() -> list[str]:
        with anyio.move_on_after(COMPLETION_TIMEOUT):
            return await read()
        return []

    with suppress(AsyncMQError, ValueError, OSError):  # a completion never complains
        return [name for name in anyio.run(read_in_time) if name.startswith(incomplete)]
    return []


QueueName = Annotated[
    str, typer.Argument(metavar="QUEUE", help="Name of the queue.", autocompletion=complete_queues)
]
AsJson = Annotated[bool, typer.Option("--json", "-j", help="Print JSON, for programs.")]
AsNames = Annotated[bool, typer.Option("--names", "-n", help="Print names only, one a line.")]
Force = Annotated[bool, typer.Option("--force", "-f", help="Do not ask for confirmation.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and do nothing.")]

CONNECTION: Final = {
    "server": (("--server", "-s"), "URL", "Servers, with commas between."),
    "context": (("--context",), "NAME", "A context of the `nats` tool."),
    "timeout": (("--timeout",), "TIME", "How long to wait for answers, as in 5s."),
    "prefix": (("--prefix",), "WORD", "First token of all subjects and names."),
}
"""The options of the connection: their names, what they take, their help."""


def connection_parameters(*, hidden: bool) -> list[inspect.Parameter]:
    """Return the parameters that make Typer take the options of the connection, and `-v`.

    They may stand before and after the command.
    """
    found = [
        _keyword(
            name, str | None, None, typer.Option(*flags, metavar=metavar, help=help, hidden=hidden)
        )
        for name, (flags, metavar, help) in CONNECTION.items()
    ]
    verbose = typer.Option(
        "--verbose", "-v", help="Log what happens; errors with their traceback.", hidden=hidden
    )
    no_declare = typer.Option(
        "--no-declare",
        help="Make no streams and consumers: for a login that may not.",
        hidden=hidden,
    )
    return [
        *found,
        _keyword("no_declare", bool, False, no_declare),
        _keyword("verbose", bool, False, verbose),
    ]


def _keyword(name: str, kind: Any, default: Any, option: Any) -> inspect.Parameter:
    annotation = Annotated[kind, option]
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation
    )


def set_parameters(call: Callable[..., Any], parameters: Sequence[inspect.Parameter]) -> None:
    """Have Typer make options of these parameters; the function is called with the context too."""
    context = inspect.Parameter(
        "ctx", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context
    )
    every = [context, *parameters]
    call.__signature__ = inspect.Signature(every)  # type: ignore[attr-defined]
    call.__annotations__ = {each.name: each.annotation for each in every}


class Options:
    """Options that several commands have: each of these takes them as one dict.

        Window = Annotated[dict[str, Any], Options(since=Since, until=Until)]

        async def show(session: Session, window: Window) -> None: ...

    By default a switch is off, and every other option is `None`.
    """

    def __init__(self, **annotations: Any) -> None:
        self.parameters = [
            inspect.Parameter(
                name,
                inspect.Parameter.POSITIONAL_OR_KEYWORD,
                default=False if get_args(annotation)[0] is bool else None,
                annotation=annotation,
            )
            for name, annotation in annotations.items()
        ]

    @classmethod
    def of(cls, parameter: inspect.Parameter) -> list[inspect.Parameter] | None:
        """Return the options that a parameter stands for; `None` if it is an option itself."""
        notes = getattr(parameter.annotation, "__metadata__", ())
        return next((each.parameters for each in notes if isinstance(each, cls)), None)


def _given(ctx: typer.Context) -> list[dict[str, Any]]:
    """Return the arguments of the command, of its group, and of the program."""
    at: Any = ctx
    given = []
    while at is not None:
        given.append(at.params)
        at = at.parent
    return given


def connection_options(ctx: typer.Context) -> ConnectionOptions:
    """Return the connection options, given after the command or before it."""
    options = ConnectionOptions()
    for values in _given(ctx):
        given = {name: values.get(name) for name in CONNECTION}
        declare = not values.get("no_declare")
        options = options.or_else(ConnectionOptions(**given, declare=declare))
    return options


# -- groups and commands


def make_group(name: str, help: str) -> typer.Typer:
    """Return a group of commands."""
    return typer.Typer(name=name, help=help, no_args_is_help=True, rich_markup_mode=None)


def operator() -> str:
    """Return who gives commands here, as the audit names them: `cli:ana@host`."""
    with suppress(KeyError, OSError):  # no such user, as in a container
        return f"cli:{getpass.getuser()}@{socket.gethostname()}"
    return f"cli:@{socket.gethostname()}"


def add_command(
    group: typer.Typer,
    name: str,
    function: Callable[..., Any],
    run: Callable[[typer.Context, dict[str, Any], dict[str, Any]], None],
    **options: Any,
) -> None:
    """Make a function a command: its options are the parameters after the session.

    `run`: called with the context, the arguments of the function, and the value of each option.
    `options`: of `Typer.command`.
    """
    taken = list(inspect.signature(function).parameters.values())[1:]
    own = [option for each in taken for option in Options.of(each) or [each]]

    @functools.wraps(function)
    def call(ctx: typer.Context, **values: Any) -> None:
        if any(given.get("verbose") for given in _given(ctx)):
            log_verbosely()
        arguments: dict[str, Any] = {}
        for each in taken:
            together = Options.of(each)
            arguments[each.name] = (
                values[each.name]
                if together is None
                else {option.name: values[option.name] for option in together}
            )
        run(ctx, arguments, {each.name: values[each.name] for each in own})

    set_parameters(call, [*own, *connection_parameters(hidden=True)])
    group.command(name, **options)(call)


def command(
    group: typer.Typer, name: str, *, audited: bool = False, **options: Any
) -> Callable[[F], F]:
    """Make an async function a command.

    `audited`: it changes something, and is recorded when it is done, unless it was a dry run.
    `options`: of `Typer.command`.
    """

    def register(function: F) -> F:
        def run(ctx: typer.Context, arguments: dict[str, Any], given: dict[str, Any]) -> None:
            action = f"{group.info.name}.{name}" if audited and not given.get("dry_run") else None

            async def act(session: Session) -> None:
                await function(session, **arguments)
                if action is not None:
                    await session.record(action, given)

            start(ctx, act)

        add_command(group, name, function, run, **options)
        return function

    return register


def start(ctx: typer.Context, act: Callable[[Session], Awaitable[None]]) -> None:
    """Run a command with its session."""
    session = Session(connection_options(ctx), Output())

    async def run() -> None:
        with anyio.CancelScope() as scope, cancelled_by_sigint(scope):
            try:
                await act(session)
            finally:
                with anyio.CancelScope(shield=True):
                    await session.close()
        if scope.cancelled_caught:
            raise KeyboardInterrupt

    anyio.run(run)


def log_verbosely() -> None:
    """Show the log of this library on stderr, and have errors shown with their tracebacks."""
    global _verbose
    _verbose = True
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("asyncmq_nats").setLevel(logging.INFO)


_verbose = False


def shows_tracebacks() -> bool:
    """Return whether `-v` was given in this process."""
    return _verbose


# -- steps that many commands have


async def require_queue(session: Session, name: str) -> Queue:
    """Return a queue that exists.

    Raises:
        CommandFailed: there is none of that name.
    """
    queue = session.queue(name)
    names = await list_queues(session.backend)
    if name not in names:
        known = ", ".join(names[:10]) or "none"
        raise CommandFailed(f"there is no queue {name!r} (queues here: {known})")
    return queue


def confirm(question: str, *, force: bool) -> None:
    """Ask whether to go on.

    Raises:
        CommandFailed: the answer is no; or no one can be asked, and not `force`.
    """
    if force:
        return
    if not sys.stdin.isatty():
        raise CommandFailed(f"{question} No one can answer here: add --force to do it")
    with on_sigint(interrupt):  # nothing is under way that it could tear
        is_wanted = typer.confirm(question, err=True)
    if not is_wanted:
        raise CommandFailed("nothing was done")
