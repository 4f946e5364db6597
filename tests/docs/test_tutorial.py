"""The tutorial, followed to the letter: its files are saved, its commands are typed into terminals.

The package is built and installed into a fresh virtual environment, by the commands of the page.
Two things are not as for a reader: a free port, and the wheel of this checkout beside the index.
"""

import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.docs.pages import ROOT, Block, read_blocks
from tests.docs.terminal import Terminal
from tests.receiver import PATIENCE

TUTORIAL = ROOT / "docs" / "tutorial.md"
HERE = "here"
"""The name of the terminal in which commands end."""


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


@pytest.fixture
def wheels(tmp_path: Path) -> Path:
    """A folder with the wheel of this checkout."""
    built = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", tmp_path / "wheels", ROOT],
        capture_output=True,
        text=True,
        timeout=4 * PATIENCE,
    )
    if "No matching distribution" in built.stderr and not os.environ.get("CI"):
        pytest.skip("no package index answers")
    assert built.returncode == 0, built.stderr
    return tmp_path / "wheels"


@pytest.fixture
def environment(tmp_path: Path, wheels: Path) -> dict[str, str]:
    """The environment of somebody who has Python and nothing else."""
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "python3").symlink_to(os.path.realpath(sys.executable))
    kept = {name: value for name, value in os.environ.items() if name.startswith(("PIP_", "LC_"))}
    return kept | {
        "PATH": f"{programs}:/usr/bin:/bin",
        "HOME": os.environ.get("HOME", str(tmp_path)),
        "TERM": "dumb",
        "PIP_FIND_LINKS": str(wheels),
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "VIRTUAL_ENV_DISABLE_PROMPT": "1",
        "ASYNCMQ_NATS_SERVERS": f"nats://127.0.0.1:{free_port()}",
    }


class Reader:
    """Follows the page: saves, types, and compares."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self._folder = folder
        self._environment = environment
        self._terminals: dict[str, Terminal] = {}
        self._printed = ""
        self._awaits: tuple[Terminal, int] | None = None

    def terminal(self, name: str) -> Terminal:
        if name not in self._terminals:
            terminal = self._terminals[name] = Terminal(self._folder, self._environment)
            port = self._environment["ASYNCMQ_NATS_SERVERS"].rpartition(":")[2]
            terminal.run(f'nats-server() {{ command nats-server -a 127.0.0.1 -p {port} "$@"; }}')
        return self._terminals[name]

    def follow(self, block: Block) -> None:
        name = block.words.get("terminal", HERE)
        if "press" in block.words:
            self.terminal(name).type("\x03")
            self.terminal(name).run("")  # the program has ended: the shell answers
        elif "title" in block.words:
            with (self._folder / block.words["title"]).open(
                "a" if "append" in block.words else "w"
            ) as file:
                file.write(("\n\n" if "append" in block.words else "") + block.source)
        elif block.language == "sh" and name == HERE:
            self._awaits = None
            self._printed = self.terminal(name).run(block.source)
        elif block.language == "sh":
            terminal = self.terminal(name)
            self._awaits = terminal, terminal.type(block.source)
        elif block.language == "text":
            self._compare(re.escape(block.source.strip()).replace("…", ".*?"))
        else:
            pytest.fail(f"{block.place}: what is to be done with it?")

    def _compare(self, pattern: str) -> None:
        if self._awaits is not None:
            self._awaits[0].wait_for(pattern, self._awaits[1])
        else:
            assert re.fullmatch(pattern, self._printed.strip(), re.DOTALL), self._printed

    def close(self) -> None:
        for terminal in self._terminals.values():
            terminal.close()


@contextmanager
def reading(folder: Path, environment: dict[str, str]) -> Iterator[Reader]:
    reader = Reader(folder, environment)
    try:
        yield reader
    finally:
        reader.close()


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_the_tutorial_followed_to_the_letter(tmp_path: Path, environment: dict[str, str]) -> None:
    folder = tmp_path / "empty"
    folder.mkdir()
    blocks = read_blocks(TUTORIAL)
    assert len(blocks) > 20
    with reading(folder, environment) as reader:
        for block in blocks:
            reader.follow(block)
    used = (folder / ".venv/lib").glob("*/site-packages/asyncmq_nats/queues.py")
    assert len(list(used)) == 1, "the package was installed, and not found elsewhere"
