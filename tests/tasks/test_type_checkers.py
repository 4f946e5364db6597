"""Pyright checks the typed calls; mypy reads the same files in its normal run."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = ["tests/tasks/typed_application.py", "tests/api/test_typing.py"]
IGNORED = "# type: ignore"


def has_pyright() -> bool:
    return importlib.util.find_spec("pyright") is not None and shutil.which("node") is not None


@pytest.mark.skipif(
    not has_pyright() and not os.environ.get("CI"), reason="pyright needs its package and node"
)
@pytest.mark.slow
def test_pyright_reports_each_misuse_and_no_right_use() -> None:
    program = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable]
    done = subprocess.run([*program, *FILES], cwd=ROOT, capture_output=True, text=True, check=False)
    report = json.loads(done.stdout)
    assert report["summary"]["filesAnalyzed"] == len(FILES)
    told = [
        f"{Path(each['file']).name}:{each['range']['start']['line'] + 1}: {each['message']}"
        for each in report["generalDiagnostics"]
        if each["severity"] == "error"
    ]
    assert told == []


def test_there_are_misuses_of_each_kind() -> None:
    text = (ROOT / FILES[0]).read_text()
    parts = text.split("\n# -- ")[1:]
    counts = {part.partition("\n")[0]: part.count(IGNORED) for part in parts}
    assert all(counts.values()), counts
    assert sum(counts.values()) > 30
