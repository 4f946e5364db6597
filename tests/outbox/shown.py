"""The code of a page is part of a program that a test runs."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]


def shown_nowhere(page: str, *programs: str, language: str = "python") -> list[str]:
    """Return the blocks of a page that are in none of these programs, line by line."""
    text = (ROOT / page).read_text()
    blocks = re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert blocks, "there are none"
    sources = [_lines((ROOT / program).read_text()) for program in programs]
    return [block for block in blocks if not any(_is_in(_lines(block), each) for each in sources)]


def _is_in(block: list[str], source: list[str]) -> bool:
    starts = [at for at, line in enumerate(source) if line == block[0]]
    return any(source[at : at + len(block)] == block for at in starts)
