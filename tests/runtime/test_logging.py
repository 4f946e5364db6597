"""Nothing that others write forges a line of a log, and nothing floods it."""

import logging
from io import StringIO
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import asyncmq_nats
from asyncmq_nats._logging import Throttle, escape_controls, get_logger
from asyncmq_nats.backends.base import Backend
from tests.running import make_queue, outcome, running

FORGED = "fine\nCRITICAL root: the disk is on fire\r\x1b[31m\u2028x\x85y"


@pytest.fixture
def lines() -> "tuple[logging.Logger, StringIO]":
    logger, stream = get_logger("asyncmq_nats.tests.forging"), StringIO()
    logger.handlers = [logging.StreamHandler(stream)]
    logger.propagate = False
    return logger, stream


def test_a_message_is_one_line(lines: tuple[logging.Logger, StringIO]) -> None:
    logger, stream = lines
    logger.warning("job %s: %s", FORGED, ValueError(FORGED))
    logger.warning(FORGED)
    logger.warning("%d jobs of %.3r", 5, "abcdef")
    assert len(stream.getvalue().splitlines()) == 3
    assert "\\nCRITICAL" in stream.getvalue()
    assert stream.getvalue().endswith("5 jobs of 'ab\n")


def test_the_lines_of_a_traceback_are_behind_a_margin(
    lines: tuple[logging.Logger, StringIO],
) -> None:
    logger, stream = lines
    try:
        raise ValueError(FORGED)
    except ValueError:
        logger.exception("it failed")
    first, *rest = stream.getvalue().splitlines()
    assert first == "it failed"
    assert rest
    assert all(line.startswith("  | ") for line in rest)


@given(st.text())
def test_no_text_makes_a_second_line(text: str) -> None:
    assert len(f"x{escape_controls(text)}x".splitlines()) == 1
    escape_controls(text).encode()


def test_plain_text_stays_as_it_is() -> None:
    assert escape_controls("Grüße, 世界 🌍 'x' \\ %s") == "Grüße, 世界 🌍 'x' \\ %s"


def test_every_logger_of_the_package_is_one_of_ours() -> None:
    package = Path(asyncmq_nats.__file__).parent
    others = [
        str(path.relative_to(package))
        for path in package.rglob("*.py")
        if "logging.getLogger(__name__)" in path.read_text() and path.name != "_logging.py"
    ]
    assert others == []


async def test_an_error_of_a_task_forges_no_line(
    backend: Backend, caplog: pytest.LogCaptureFixture
) -> None:
    async def fail() -> None:
        raise ValueError(FORGED)

    queue = make_queue(backend, fail=fail)
    async with running(queue):
        await outcome(queue, await queue.add("fail", job_id="bad\nCRITICAL root forged"))
    ours = [r for r in caplog.records if r.name.startswith("asyncmq_nats")]
    assert any("disk is on fire" in record.getMessage() for record in ours)
    assert all(len(record.getMessage().splitlines()) == 1 for record in ours)


def test_a_throttle_lets_the_first_through_and_counts_the_others() -> None:
    throttle = Throttle(interval=1000.0)
    assert [throttle.note() for _ in range(5)] == [1, 0, 0, 0, 0]
    assert throttle.take() == 4
    assert throttle.take() == 0
