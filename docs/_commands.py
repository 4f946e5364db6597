"""Writes the reference in commands.md from the commands themselves: `python docs/_commands.py`."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from typer.main import get_command

from asyncmq_nats.cli.app import make_app

PAGE: Final = Path(__file__).parent / "commands.md"
MARK: Final = "<!-- What follows is written by docs/_commands.py. -->\n"
LEFT_OUT: Final = ("install_completion", "show_completion", "help")


def write_commands(text: str) -> str:
    """Return the page with a new reference below the mark; the text above it stays."""
    head, mark, _ = text.partition(MARK)
    assert mark, "the page has no mark"
    return head + mark + "\n" + "\n".join(_group(get_command(make_app()), "amq"))


def _group(group: Any, path: str) -> Iterator[str]:
    commands = {name: each for name, each in group.commands.items() if not each.hidden}
    alone = [name for name, each in commands.items() if not hasattr(each, "commands")]
    for name in alone:
        yield from _command(commands[name], f"{path} {name}")
    for name in commands:
        if name not in alone:
            yield f"## {path} {name}\n"
            yield f"{_sentence(commands[name].help)}\n"
            yield from _group(commands[name], f"{path} {name}")


def _command(command: Any, path: str) -> Iterator[str]:
    arguments = [each for each in command.params if each.param_type_name == "argument"]
    options = [
        each
        for each in command.params
        if each.param_type_name == "option" and not each.hidden and each.name not in LEFT_OUT
    ]
    words = " ".join(_metavar(each) for each in arguments)
    yield f"### {path}\n"
    yield f"`{path} {words}`".replace(" `", "`") + "\n"
    yield "\n\n".join(_sentence(part) for part in (command.help or "").split("\n\n")) + "\n"
    if arguments or options:
        yield "| | |\n|---|---|"
        for each in arguments:
            yield f"| `{_metavar(each)}` | {_cell(each.help)} |"
        for each in options:
            yield f"| {_names(each)} | {_cell(each.help)}{_default(each)} |"
        yield ""


def _metavar(argument: Any) -> str:
    return str(argument.metavar or argument.name.upper())


def _names(option: Any) -> str:
    metavar = "" if option.is_flag else f" {option.metavar or 'N'}"
    return ", ".join(f"`{name}{metavar}`" for name in option.opts)


def _default(option: Any) -> str:
    if option.is_flag or option.default in (None, "", (), []) or callable(option.default):
        return ""
    return f" Default: `{option.default}`."


def _sentence(text: str | None) -> str:
    return " ".join((text or "").split())


def _cell(text: str | None) -> str:
    return _sentence(text).replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(write_commands(PAGE.read_text()))
    sys.exit(0)
