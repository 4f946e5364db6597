"""The program: all groups together, its exit codes, and errors in one line."""

import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any, Final

import typer
from typer.main import get_command

import asyncmq_nats
from asyncmq_nats.cli import command as commands
from asyncmq_nats.cli import (
    config,
    dashboard,
    doctor,
    events,
    flow,
    job,
    outbox,
    permissions,
    queue,
    queue_config,
    schedule,
    server,
    worker,
)
from asyncmq_nats.cli.command import Session
from asyncmq_nats.cli.output import Output
from asyncmq_nats.exceptions import AsyncMQError

__all__ = ["GROUPS", "make_app", "run"]

GROUPS: Final = (
    queue.group,
    job.group,
    schedule.group,
    flow.group,
    worker.group,
    outbox.group,
    config.group,
)
COMMANDS: Final = (("events", events.follow), ("permissions", permissions.grant))
"""Commands that are in no group."""

queue.group.add_typer(queue_config.group)

DONE, FAILED, INTERRUPTED = 0, 1, 130

HELP: Final = """Look at job queues on NATS JetStream, and steer them.

Which server: --server, or NATS_URL, ASYNCMQ_NATS_SERVERS, or a context of the `nats` tool.
"""


def make_app() -> typer.Typer:
    """Return the application with all its groups."""
    app = typer.Typer(
        name="asyncmq-nats",
        help=HELP,
        no_args_is_help=True,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )

    def root(**_: Any) -> None:
        """Have these options before a command too: the command reads them."""

    commands.set_parameters(root, commands.connection_parameters(hidden=False))
    app.callback()(root)
    commands.command(app, "version")(show_version)
    for name, function in COMMANDS:
        commands.command(app, name)(function)
    for program in (server, dashboard, doctor):
        program.register(app)
    for group in GROUPS:
        app.add_typer(group)
    return app


async def show_version(session: Session) -> None:
    """Print the version of asyncmq-nats."""
    session.output.raw(asyncmq_nats.__version__)


def run(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code; see `cli.main`."""
    try:
        program = os.path.basename(sys.argv[0])
        name = "asyncmq-nats" if program in ("__main__.py", "") else program
        code = get_command(make_app()).main(list(arguments), name, standalone_mode=False)
        sys.stdout.flush()
    except BrokenPipeError:
        return _end_output()
    except SystemExit as end:
        if isinstance(end.__context__, BrokenPipeError):  # made an exit with code 1 by `main`
            return _end_output()
        raise
    except typer.TyperException as error:
        Output().error(f"{error.format_message()} (see --help)")
        return error.exit_code
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED
    except Exception as error:  # one line for a person; -v has the rest
        return _report(error)
    return code if isinstance(code, int) else DONE


def _end_output() -> int:
    """Print no more: the reader, such as `head`, has enough.

    Python would complain when it flushes at its end.
    """
    sys.stdout = sys.__stdout__ or sys.stdout  # `main` has wrapped it
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return DONE


def _report(error: Exception) -> int:
    if commands.shows_tracebacks():
        traceback.print_exc()
    elif isinstance(error, AsyncMQError | ValueError | OSError):
        Output().error(_describe(error))
    else:
        Output().error(f"{type(error).__name__}: {error} (-v shows where)")
    return FAILED


def _describe(error: Exception) -> str:
    problems = getattr(error, "errors", None)
    if callable(problems):  # pydantic tells of each value in several lines
        return "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in problems())
    text = str(error) or type(error).__name__
    return text.replace(
        "use declare=False in a producer whose queue exists already", "--no-declare, if all exists"
    )
