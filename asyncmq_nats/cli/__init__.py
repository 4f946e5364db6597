"""The command line: `asyncmq-nats`, in short `amq`. Needs the extra `cli`.

There is a module per group of commands. A command calls the public API and prints for a person; it
holds no logic of queues. `command.py` has what all commands share, `connection.py` finds the
server, `output.py` prints.
"""

import importlib.util
import sys

__all__ = ["main"]

REQUIRED_MODULES = ("typer", "rich", "cron_descriptor")


def main() -> None:
    """Run the command line and exit: 0 done, 1 an error, 2 wrong usage, 130 interrupted."""
    missing = [package for package in REQUIRED_MODULES if importlib.util.find_spec(package) is None]
    if missing:
        print(
            f"asyncmq-nats: the command line needs {', '.join(missing)}: "
            "pip install 'asyncmq-nats[cli]'",
            file=sys.stderr,
        )
        sys.exit(2)
    from asyncmq_nats.cli.app import run

    sys.exit(run(sys.argv[1:]))
