"""The pages of the documentation: their code runs, and says what it is said to print."""

import ast
import re
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

from asyncmq_nats import InMemoryBackend, Settings, exceptions
from asyncmq_nats.backends.base import Backend
from tests.docs.pages import DOCS, ROOT, Block, pages, read_blocks
from tests.receiver import PATIENCE
from tests.running import make_queue, run_jobs

TUTORIAL: Final = "docs/tutorial.md"
OF_OTHER_TESTS: Final = {
    TUTORIAL: "test_tutorial.py",
    "CONTRIBUTING.md": "below",
    "README.md": "tests/docs/test_docs.py",
}
"""Pages whose blocks are run elsewhere."""
OF_OTHER_ROOMS: Final = {
    f"docs/{name}.md"
    for name in (
        *("commands", "dashboard", "frameworks", "languages", "monitoring", "outbox"),
        *("production", "sync", "tasks", "testing", "troubleshooting"),
    )
}
"""Pages with tests of their own, in the folders of their subjects."""
NOT_RUN: Final = {
    ("docs/protocol.md", "sh"): "needs the program `nats`",
    ("docs/protocol.md", "go"): "part of a program: tests/languages/test_go.py",
    ("docs/releasing.md", "sh"): "publishes a release",
    ("README.md", "sh"): "installs; its programs are run by test_examples.py and test_compose.py",
    ("CONTRIBUTING.md", "sh"): "clones the repository",
}
"""The blocks that no test runs, and why."""

SKIPPED: Final = 77
"""The exit code of a page that cannot run here."""

ALL_PAGES: Final = [page.relative_to(ROOT).as_posix() for page in pages()]


def blocks(name: str) -> list[Block]:
    return [block for block in read_blocks(ROOT / name) if not block.hidden]


def is_run_with_its_page(block: Block) -> bool:
    return block.language in ("python", "sh") and not block.words.keys() & {"run", "old"}


def is_excused(block: Block) -> bool:
    return (block.page, block.language) in NOT_RUN


RUN: Final = [
    name
    for name in ALL_PAGES
    if name not in OF_OTHER_TESTS.keys() | OF_OTHER_ROOMS
    and any(is_run_with_its_page(each) and not is_excused(each) for each in blocks(name))
]


@pytest.mark.parametrize("name", RUN)
def test_the_code_of_a_page_runs_and_prints_what_it_says(name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.docs.run_page", name],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=2 * PATIENCE,
    )
    if done.returncode == SKIPPED:
        pytest.skip("a program that the page needs is not there")
    assert done.returncode == 0, done.stderr


def test_there_are_pages_to_run() -> None:
    assert len(RUN) > 7


def test_every_block_is_run_or_said_to_be_not() -> None:
    unknown = [
        block.place
        for name in ALL_PAGES
        if name not in OF_OTHER_ROOMS
        for block in blocks(name)
        if not (
            "run" in block.words
            or "old" in block.words
            or "title" in block.words
            or block.language == "text"
            or is_run_with_its_page(block)
            or is_excused(block)
        )
    ]
    assert unknown == []


def test_no_block_is_excused_that_is_not_there() -> None:
    there = {(block.page, block.language) for name in ALL_PAGES for block in blocks(name)}
    assert sorted(NOT_RUN.keys() - there) == []


@pytest.mark.parametrize(
    "block",
    [block for name in ALL_PAGES for block in blocks(name) if block.language == "sh"],
    ids=lambda block: block.place,
)
def test_shell_commands_can_be_read(block: Block) -> None:
    subprocess.run(["bash", "-n", "-c", block.source], check=True, timeout=PATIENCE)


def test_no_line_of_code_is_too_long_to_be_read() -> None:
    too_long = [
        f"{block.place} {len(line)}"
        for name in ALL_PAGES
        for block in blocks(name)
        if block.language == "python"
        for line in block.source.splitlines()
        if len(line) > 100
    ]
    assert too_long == []


@pytest.mark.parametrize("name", ["architecture.md", "delivery.md"])
def test_the_design_is_written_in_lines_of_100_characters(name: str) -> None:
    too_long = [
        line
        for line in (DOCS / name).read_text().splitlines()
        if len(line) > 100 and not line.startswith("|")
    ]
    assert too_long == []


# -- what other tests do not cover


async def test_the_example_of_contributing() -> None:
    (block,) = [each for each in blocks("CONTRIBUTING.md") if each.language == "python"]
    names = {"Backend": Backend, "make_queue": make_queue, "run_jobs": run_jobs}
    exec(block.source, names)
    (function,) = [node for node in ast.parse(block.source).body if hasattr(node, "name")]
    backend = InMemoryBackend(settings=Settings(stalled_after=1.0))
    await names[function.name](backend)  # type: ignore[operator]


def test_every_error_has_its_cause_and_its_cure() -> None:
    text = (DOCS / "errors.md").read_text()
    sections = {part.partition("\n")[0]: part for part in text.split("\n### ")[1:]}
    assert sorted(sections) == sorted(exceptions.__all__)
    own = {"AsyncMQError", "BackendError"}  # bases: they are caught, and not cured
    assert [name for name in sections if name not in own and "**Cure**" not in sections[name]] == []


def test_the_bases_of_errors_are_those_that_the_page_names() -> None:
    for part in (DOCS / "errors.md").read_text().split("\n### ")[1:]:
        name, _, text = part.partition("\n")
        kind = getattr(exceptions, name)
        builtin = {each.__name__ for each in kind.__bases__ if each.__module__ == "builtins"}
        builtin.discard("object")
        first = text.partition(")")[0] if text.startswith("(`") else ""
        assert {word for word in builtin - {"Exception"} if f"`{word}`" not in first} == set(), name


def test_the_pictures_of_the_dashboard_are_those_that_its_script_takes_in_both_colours() -> None:
    script = (DOCS / "images" / "dashboard.py").read_text()
    names = re.findall(r'^    "(\w+)": \("/', script, re.MULTILINE)
    taken = {f"dashboard-{name}-{theme}.png" for name in names for theme in ("light", "dark")}
    assert taken == {each.name for each in (DOCS / "images").glob("dashboard-*.png")}
    page = (DOCS / "dashboard.md").read_text()
    assert [name for name in sorted(taken) if f"images/{name}" not in page] == []


def test_the_pictures_are_those_that_are_drawn(tmp_path: Path) -> None:
    script = (DOCS / "images" / "job_flow.py").read_text()
    (tmp_path / "job_flow.py").write_text(script)
    subprocess.run([sys.executable, str(tmp_path / "job_flow.py")], check=True, timeout=PATIENCE)
    for drawn in tmp_path.glob("*.svg"):
        assert drawn.read_text() == (DOCS / "images" / drawn.name).read_text()
    assert len(list(tmp_path.glob("*.svg"))) == 2
