"""Runs the Python blocks of a page as one program, as if typed into `python -m asyncio`.

    python -m tests.docs.run_page docs/guides/retries.md

Its queues are in memory, or with `<!-- hidden server -->` on the page, on a server of its own.
Tracebacks name the lines of the page. With `old` after its name, the code of other libraries on
it is run instead; it needs these libraries, and a Redis at $REDIS_PORT: `nox -s old_code`.
"""

import ast
import asyncio
import io
import linecache
import os
import re
import sys
import tempfile
from contextlib import redirect_stdout
from inspect import CO_COROUTINE
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import anyio

from tests.docs.pages import ROOT, Block, read_blocks

FLAGS: Final = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
PATIENCE: Final = 60.0
"""How long a page may take, in seconds: a bound against hangs."""


class WrongOutput(AssertionError):
    """A block printed something else than the page says."""


class Page:
    """A page that runs: its blocks share a namespace, a folder and an event loop."""

    def __init__(self, path: Path, folder: Path, *, old: bool = False) -> None:
        self.blocks = [block for block in read_blocks(path) if ("old" in block.words) == old]
        self.folder = folder
        self.module = ModuleType("page")
        self.printed = ""
        sys.modules["page"] = self.module

    async def run(self) -> dict[str, int]:
        """Run all blocks; return how many of each language were run."""
        counts: dict[str, int] = {}
        for block in self.blocks:
            if "run" in block.words or not await self._run(block):
                continue
            if not block.hidden:
                counts[block.language] = counts.get(block.language, 0) + 1
        return counts

    async def _run(self, block: Block) -> bool:
        if block.language == "text" and "output" in block.words:
            self._compare(block)
        elif "title" in block.words:
            path = self.folder / block.words["title"]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.source)
        elif block.language == "python":
            await self._execute(block)
        elif block.language == "sh":
            await self._type(block)
        else:
            return False
        return True

    def _compare(self, block: Block) -> None:
        expected = re.escape(block.source.strip()).replace("…", ".*?")
        if not re.fullmatch(expected, self.printed.strip(), re.DOTALL):
            raise WrongOutput(f"{block.place}: printed was\n{self.printed}")

    async def _type(self, block: Block) -> None:
        command = ["bash", "-euo", "pipefail", "-c", block.source]
        done = await anyio.run_process(command, cwd=self.folder, stderr=None)
        self.printed = done.stdout.decode()

    async def _execute(self, block: Block) -> None:
        # Blank lines before it, so that the numbers of the lines are those of the page.
        source = "\n" * (block.line - 1) + block.source
        file = str(ROOT / block.page)
        linecache.checkcache(file)
        code = compile(source, file, "exec", flags=FLAGS)
        output = io.StringIO()
        with redirect_stdout(output):
            value = eval(code, vars(self.module))
            if code.co_flags & CO_COROUTINE:
                await value
        self.printed = output.getvalue()


async def run(path: Path, folder: Path, *, old: bool = False) -> dict[str, int]:
    """Run a page, and end what it left running."""
    async with asyncio.timeout(PATIENCE):
        counts = await Page(path, folder, old=old).run()
        rest = asyncio.all_tasks() - {asyncio.current_task()}
        for task in rest:
            task.cancel()
        await asyncio.gather(*rest, return_exceptions=True)
    return counts


def main(name: str, *, old: bool = False) -> None:
    """Run the page of this name, in a folder that goes afterwards."""
    path = ROOT / name
    on_server = any(block.hidden and "server" in block.words for block in read_blocks(path))
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        sys.path.insert(0, folder)
        if old:
            print(asyncio.run(run(path, Path(folder), old=True)))
        elif on_server:
            run_on_server(path, Path(folder))
        else:
            run_in_memory(path, Path(folder))


def run_in_memory(path: Path, folder: Path) -> None:
    from asyncmq_nats import InMemoryBackend, set_default_backend

    set_default_backend(InMemoryBackend())
    print(asyncio.run(run(path, folder)))


def run_on_server(path: Path, folder: Path) -> None:
    from asyncmq_nats.backends.nats.embedded.server import EmbeddedServer

    server = EmbeddedServer(folder / "nats")
    server.start()
    try:
        os.environ["ASYNCMQ_NATS_SERVERS"] = server.url
        from asyncmq_nats import NATSBackend, set_default_backend

        set_default_backend(NATSBackend(server.url))
        print(asyncio.run(run(path, folder)))
    finally:
        server.stop()


def report(error: BaseException) -> Any:
    """Print an error of a page without the lines of this program."""
    import traceback

    frames = traceback.extract_tb(error.__traceback__)
    of_page = [frame for frame in frames if frame.filename.endswith(".md")]
    print("".join(traceback.format_list(of_page or frames)), file=sys.stderr, end="")
    print("".join(traceback.format_exception_only(error)), file=sys.stderr)
    return 1


if __name__ == "__main__":
    try:
        main(sys.argv[1], old=sys.argv[2:] == ["old"])
    except Exception as problem:
        sys.exit(report(problem))
