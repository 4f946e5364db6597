"""The pages that show a run: a table between two marks, and the charts."""

import re
from pathlib import Path
from typing import Final

from benchmarks.peers.chart import draw
from benchmarks.peers.figures import Run, show_ratios, show_table

__all__ = ["FIGURES", "PAGES", "renew", "write_pages"]

ROOT: Final = Path(__file__).parents[2]
FIGURES: Final = Path(__file__).parent / "figures.json"
PAGES: Final = {
    ROOT / "docs" / "comparison.md": ("peers", show_table),
    ROOT / "benchmarks" / "README.md": ("ratios", show_ratios),
}
"""By page: the mark of its table, and what writes that."""


def renew(text: str, mark: str, table: str) -> str:
    """Return a page whose table between the marks is this one.

    Raises:
        ValueError: it does not have the marks once.
    """
    begin, end = f"<!-- figures: {mark} -->\n", "<!-- end of figures -->"
    between = re.compile(f"(?<={re.escape(begin)}).*?(?={re.escape(end)})", re.DOTALL)
    renewed, count = between.subn(lambda _: f"\n{table}\n", text)
    if count != 1:
        raise ValueError(f"the page has {count} tables between {begin!r} and {end!r}")
    return renewed


def write_pages(run: Run) -> None:
    """Write the figures of a run into the pages, and draw the charts."""
    for page, (mark, show) in PAGES.items():
        page.write_text(renew(page.read_text(), mark, show(run)))
    draw(run, ROOT / "docs" / "images")
