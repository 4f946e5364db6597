"""The pages of the documentation as blocks of code.

A block is a fence. After its language come words that say how it is treated:

* ` ```python ` runs in the page's program, with those before it: `run_page.py`.
* ` ```python title="tasks.py" ` is written to that file, in the folder where the page runs.
* ` ```text output ` is what the block before it printed, `…` standing for anything.
* ` ```sh ` is typed in a shell, in the folder where the page runs.
* `run`: a test of its own runs it. `old`: code of another library, see `test_old_code.py`.

A comment `<!-- hidden` … `-->` is run as well, and not shown.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[2]
DOCS: Final = ROOT / "docs"

START: Final = re.compile(
    r"^(?P<indent> *)(?:```(?P<language>\w+)(?P<words>[^\n`]*)|<!-- hidden(?P<rest>.*))$"
)
WORD: Final = re.compile(r'(\w+)(?:="([^"]*)")?')


@dataclass(frozen=True, slots=True)
class Block:
    """A piece of code of a page. `line`: of its first line, from 1."""

    page: str
    line: int
    language: str
    source: str
    words: dict[str, str] = field(default_factory=dict)
    hidden: bool = False

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"


def read_blocks(page: Path) -> list[Block]:
    """Return the blocks of a page, those that are hidden included."""
    return list(_blocks(page.relative_to(ROOT).as_posix(), page.read_text().splitlines()))


def _blocks(name: str, lines: list[str]) -> Iterator[Block]:
    numbered = iter(enumerate(lines, 1))
    for number, line in numbered:
        start = START.match(line)
        if start is None:
            continue
        hidden, indent = start["language"] is None, len(start["indent"])
        words = dict(WORD.findall(start["rest"] if hidden else start["words"]))
        body = []
        for _, inner in numbered if not (start["rest"] or "").endswith("-->") else ():
            if inner.strip() == ("-->" if hidden else "```"):
                break
            body.append(inner[indent:])
        yield Block(
            page=name,
            line=number + 1,
            language=start["language"] or ("ts" if "ts" in words else "python"),
            source="".join(f"{each}\n" for each in body),
            words=words,
            hidden=hidden,
        )


def pages() -> list[Path]:
    """Return all pages of the site, and those of the repository."""
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
