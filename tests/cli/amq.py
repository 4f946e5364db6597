"""The command line as a test calls it.

In this process, in a thread with an event loop of its own.
"""

import json
import shlex
from dataclasses import dataclass
from typing import Any

import pytest
from anyio import to_thread

from asyncmq_nats.cli.app import run


@dataclass
class Result:
    """The output of a command, and its exit code."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The output, parsed as JSON."""
        return json.loads(self.out)

    @property
    def lines(self) -> list[str]:
        return self.out.splitlines()


class Amq:
    """Runs commands against one server."""

    def __init__(self, url: str, capsys: pytest.CaptureFixture[str]) -> None:
        self.url = url
        self._capsys = capsys

    async def __call__(self, line: str) -> Result:
        """Run a command, whatever its exit code."""
        arguments = shlex.split(line)
        if "-s" not in arguments:  # before what is no option
            at = arguments.index("--") if "--" in arguments else len(arguments)
            arguments[at:at] = ["--server", self.url]
        self._capsys.readouterr()
        code = await to_thread.run_sync(run, arguments)
        out, err = self._capsys.readouterr()
        return Result(code, out, err)

    async def ok(self, line: str) -> Result:
        """Run a command that must succeed."""
        result = await self(line)
        assert result.code == 0, (line, result)
        return result

    async def fails(self, line: str, code: int = 1) -> str:
        """Run a command that must fail, and return the one line that says why."""
        result = await self(line)
        assert result.code == code, (line, result)
        assert result.err.count("\n") == 1, result.err
        assert result.err.startswith("error: ")
        return result.err
