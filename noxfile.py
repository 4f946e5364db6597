"""The commands for development: `nox -s fast`, `nox -s check`, `nox -s lowest`, `nox -s docs`.

`fast` and `check` run in the environment that nox is in: `pip install -e '.[dev]'` has all they
need.
"""

import re
import tomllib
from pathlib import Path

import nox

nox.options.sessions = ["fast"]
nox.options.default_venv_backend = "none"
nox.options.reuse_existing_virtualenvs = True

FAST_TESTS = ("tests/values", "tests/contract")


def check_style(session: nox.Session) -> None:
    session.run("ruff", "format", "--check", ".")
    session.run("ruff", "check", ".")
    session.run("lint-imports")
    session.run("mypy")


@nox.session
def fast(session: nox.Session) -> None:
    """Check style, types and imports, and run tests that need no server, in under a minute.

    `nox -s fast -- tests/transitions`: those of other folders.
    """
    check_style(session)
    session.run("pytest", "-m", "not server and not slow", *(session.posargs or FAST_TESTS))


@nox.session
def check(session: nox.Session) -> None:
    """Check everything."""
    check_style(session)
    session.run("pytest", *session.posargs)


@nox.session(venv_backend="virtualenv")
def lowest(session: nox.Session) -> None:
    """Run all tests with the oldest versions of the dependencies that pyproject.toml allows."""
    session.install("-e", ".[dev]")
    session.install(*lowest_versions())
    session.run("pytest", *session.posargs)


@nox.session(venv_backend="virtualenv")
def old_code(session: nox.Session) -> None:
    """Run the code of other libraries in docs/migrating. Needs an empty Redis at $REDIS_PORT."""
    session.install("anyio", "arq==0.28.0", "celery==5.7.0", "packaging", "saq==0.26.4")
    for name in ("arq", "celery", "saq"):
        page = f"docs/migrating/{name}.md"
        session.run("python", "-m", "tests.docs.run_page", page, "old", env={"PYTHONPATH": "."})


@nox.session(venv_backend="virtualenv")
def comparison(session: nox.Session) -> None:
    """Measure the application of docs/comparison-application.md. Needs the program redis-server."""
    web = "fastapi", "httpx", "httpx2"
    session.install(
        "-e", ".", "celery==5.7.0", "saq[redis]==0.26.4", *web, "pytest", "time-machine"
    )
    applications = "ours", "celery_app", "saq_app"
    session.run("python", "examples/comparison/measure.py", "--run", *applications)


@nox.session(venv_backend="virtualenv")
def peers(session: nox.Session) -> None:
    """Measure other job queues beside ours. Needs redis-server, PostgreSQL's programs and npm."""
    session.install("-e", ".[embedded,uvloop]", "matplotlib")
    session.run("python", "-m", "benchmarks.peers", *session.posargs)


@nox.session
def docs(session: nox.Session) -> None:
    """Build the documentation into docs/_build; warnings are errors."""
    session.run("sphinx-build", "-W", "--keep-going", "-q", "docs", "docs/_build/html")


def lowest_versions() -> list[str]:
    """Return the requirements with `>=` made `==`; of two for one package, the higher one.

    pytest's plugin in anyio needs a younger anyio than the library does.
    """
    project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
    tests = [line for line in project["optional-dependencies"]["dev"] if line.startswith("anyio")]
    lowest: dict[str, str] = {}
    for line in [*project["dependencies"], *tests]:
        name, version = re.fullmatch(r"([\w-]+)>=([\d.]+)", line).groups()
        lowest[name] = version
    return [f"{name}=={version}" for name, version in lowest.items()]
