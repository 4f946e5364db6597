"""Builds an example in another language once for all processes of a run of the tests."""

import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

__all__ = ["build_once"]


def build_once(factory: pytest.TempPathFactory, name: str, build: Callable[[Path], str]) -> Path:
    """Return the directory of a built example; skip the test if it cannot be built.

    `build`: makes the directory, and returns why it cannot be built, `""` if it is.
    """
    base = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent
    directory, problem = base / f"{name}-example", base / f"{name}-problem"
    with (base / f"{name}-lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not problem.exists():
            shutil.rmtree(directory, ignore_errors=True)  # of a build that failed
            problem.write_text(build(directory))
    if reason := problem.read_text():
        pytest.skip(reason)
    return directory
