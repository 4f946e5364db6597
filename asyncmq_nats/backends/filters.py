"""Filters of subjects, as both backends read them.

`*` stands for one token, a final `>` for one or more.
"""

import re
from collections.abc import Iterable
from functools import lru_cache

__all__ = ["compile_filter", "is_key", "matches"]


@lru_cache(maxsize=4096)
def compile_filter(pattern: str) -> re.Pattern[str]:
    """Return an expression that matches the subjects the filter matches.

    Its groups are what stands for each `*`.
    """
    tokens = pattern.split(".")
    rest = tokens[-1] == ">"
    expressions = [
        r"([^.]+)" if token == "*" else re.escape(token) for token in tokens[: len(tokens) - rest]
    ]
    return re.compile(r"\.".join([*expressions, ".+"] if rest else expressions) + r"\Z", re.DOTALL)


def is_key(subject: str) -> bool:
    """Return whether the subject, or filter, is of a KV bucket."""
    return subject.startswith("$KV.")


def matches(filters: Iterable[str], subject: str) -> bool:
    """Return whether any of the filters matches the subject."""
    return any(compile_filter(pattern).match(subject) is not None for pattern in filters)
