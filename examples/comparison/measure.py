"""The same application three times: counts its lines, and runs its tests.

    python examples/comparison/measure.py [--run ours celery_app saq_app] [--rounds 5]

Lines are those with code: no blank ones, no comments, no docstrings. All other files of the tests,
pytest.ini included, are their support. Times are the best of the rounds: others use the machine,
too. docs/comparison-application.md tells what they mean. `nox -s comparison` makes an environment
with the versions that it names; SAQ needs the program `redis-server`.
"""

import argparse
import ast
import io
import os
import subprocess
import sys
import tempfile
import time
import tokenize
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

FOLDER = Path(__file__).parent
NAMES = {"ours": "asyncmq-nats", "celery_app": "Celery", "saq_app": "SAQ"}
TESTS = 4
NO_CODE = {
    tokenize.COMMENT,
    tokenize.DEDENT,
    tokenize.ENCODING,
    tokenize.ENDMARKER,
    tokenize.INDENT,
    tokenize.NEWLINE,
    tokenize.NL,
}


def count_lines(source: str) -> int:
    """Return how many lines have code."""
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in NO_CODE:
            lines |= set(range(token.start[0], token.end[0] + 1))
    return len(lines - set(_docstrings(ast.parse(source))))


def _docstrings(tree: ast.Module) -> Iterator[int]:
    owners = ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef
    for node in ast.walk(tree):
        if isinstance(node, owners) and ast.get_docstring(node, clean=False) is not None:
            text = node.body[0]
            yield from range(text.lineno, (text.end_lineno or text.lineno) + 1)


def count(name: str) -> dict[str, int]:
    """Return the lines of an application by what they are for."""
    files = {path.name: count_lines(path.read_text()) for path in (FOLDER / name).glob("*.py")}
    parts = {"application": files.pop("shop.py"), "tests": files.pop("test_shop.py")}
    settings = (FOLDER / name / "pytest.ini").read_text().split("\n")
    parts["support of tests"] = sum(files.values()) + sum(map(bool, settings))
    return parts | {"all": sum(parts.values())}


def run_tests(name: str) -> tuple[float, float]:
    """Run the tests of an application. Return the seconds of the tests, and of the whole run."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        options = ["-q", "-c", "pytest.ini", "-p", "no:cacheprovider", f"--junitxml={report}"]
        begun = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *options],
            cwd=FOLDER / name,
            env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"},
            capture_output=True,
            text=True,
        )
        elapsed = time.perf_counter() - begun
        if done.returncode != 0:
            raise SystemExit(f"{name}: {done.stdout}{done.stderr}")
        cases = list(ElementTree.parse(report).iter("testcase"))
    if len(cases) != TESTS:
        raise SystemExit(f"{name}: {len(cases)} tests were run, not {TESTS}")
    return sum(float(case.attrib["time"]) for case in cases), elapsed


def table(rows: dict[str, dict[str, str]]) -> str:
    """Return a table in Markdown: a row for each name."""
    heads = list(next(iter(rows.values())))
    lines = [["", *heads], ["---"] * (len(heads) + 1)]
    lines += [[name, *row.values()] for name, row in rows.items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines).replace("|  |", "| |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", nargs="+", choices=NAMES, default=[], metavar="NAME")
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    counted = {NAMES[name]: {k: str(v) for k, v in count(name).items()} for name in NAMES}
    print(table(counted))
    times = {}
    for name in given.run:
        rounds = [run_tests(name) for _ in range(given.rounds)]
        tests, whole = (min(each) for each in zip(*rounds, strict=True))
        times[NAMES[name]] = {"the four tests": f"{tests:.2f} s", "all of pytest": f"{whole:.1f} s"}
    if times:
        print(f"\n{table(times)}")


if __name__ == "__main__":
    main()
