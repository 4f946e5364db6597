"""Loggers whose messages cannot forge a line, and warnings that cannot flood.

Job ids, task names, error texts and server messages come from others. A control character in
one of them must not begin a new line of a log.
"""

import logging
import re
import time
from typing import Final

__all__ = ["Throttle", "escape_controls", "get_logger"]

CONTROL: Final = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
LINE_END: Final = re.compile("\r\n|[\n\r\x0b\x0c\x1c-\x1e\x85\u2028\u2029]")
WARNING_INTERVAL: Final = 5.0
"""Seconds between two warnings of one `Throttle`."""
TRACEBACK_MARGIN: Final = "  | "
FORMATTER: Final = logging.Formatter()


def escape_controls(text: str) -> str:
    """Return the text on one line: control characters and lone surrogates as Python escapes."""
    return CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


class _OneLine(logging.Filter):
    """Keeps each message on one line, and each line of a traceback behind a margin."""

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        if CONTROL.search(message):
            record.msg, record.args = escape_controls(message), ()
        if record.exc_info and not record.exc_text:
            lines = LINE_END.split(FORMATTER.formatException(record.exc_info))
            record.exc_text = "\n".join(TRACEBACK_MARGIN + escape_controls(line) for line in lines)
        return True


ONE_LINE: Final = _OneLine()


def get_logger(name: str) -> logging.Logger:
    """Return the logger of a module. It has no handler and no level, only the one-line filter."""
    logger = logging.getLogger(name)
    logger.addFilter(ONE_LINE)
    return logger


class Throttle:
    """Counts events of one kind; says when to log them: at once, then once per `interval`."""

    def __init__(self, interval: float = WARNING_INTERVAL) -> None:
        self._interval = interval
        self._quiet_until = float("-inf")
        self._count = 0

    def note(self) -> int:
        """Count one event. Return how many to log now; 0: log nothing."""
        self._count += 1
        now = time.monotonic()
        if now < self._quiet_until:
            return 0
        self._quiet_until = now + self._interval
        return self.take()

    def take(self) -> int:
        """Return how many events were counted and not logged, and begin again at 0."""
        count, self._count = self._count, 0
        return count
