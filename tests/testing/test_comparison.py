"""The application of docs/comparison-application.md: its tests pass, and its lines are counted."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.receiver import PATIENCE

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples" / "comparison"
PAGE = ROOT / "docs" / "comparison-application.md"


@pytest.fixture(scope="module")
def measure() -> ModuleType:
    spec = importlib.util.spec_from_file_location("measure", FOLDER / "measure.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_tests_of_our_application_pass() -> None:
    options = [
        "-q",
        "-c",
        "pytest.ini",
        "-p",
        "no:cacheprovider",
        "-p",
        "asyncmq_nats.pytest_plugin",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options],
        cwd=FOLDER / "ours",
        env=os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},  # other plugins take seconds
        capture_output=True,
        text=True,
        timeout=2 * PATIENCE,
    )
    assert "4 passed" in done.stdout, done.stdout + done.stderr


def test_the_page_has_the_lines_that_are_counted(measure: ModuleType) -> None:
    rows = {measure.NAMES[name]: measure.count(name) for name in measure.NAMES}
    table = measure.table({name: {k: str(v) for k, v in row.items()} for name, row in rows.items()})
    assert table in PAGE.read_text()


def test_the_tests_of_all_three_have_the_same_names() -> None:
    names = {
        folder: re.findall(r"def (test_\w+)", (FOLDER / folder / "test_shop.py").read_text())
        for folder in ("ours", "celery_app", "saq_app")
    }
    assert len(names["ours"]) == 4
    assert names["celery_app"] == names["saq_app"] == names["ours"]


def test_lines_without_code_are_not_counted(measure: ModuleType) -> None:
    source = '"""A docstring\n\nof three lines."""\n\n# a comment\nx = """\ntext\n"""  # three\n\n'
    assert measure.count_lines(source) == 3
    assert measure.count_lines(source + "def f():\n    '''None.'''\n    return (\n    1)\n") == 6
