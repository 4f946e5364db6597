"""Subjects in the in-memory backend: a tree that finds records by filter, and republish rules."""

import re
from collections.abc import Iterator
from typing import Final, Generic, TypeVar

from asyncmq_nats.backends.filters import compile_filter

__all__ = ["SubjectTree", "transform"]

Value = TypeVar("Value")
WILDCARD: Final = re.compile(r"\{\{\s*wildcard\((\d+)\)\s*\}\}", re.IGNORECASE)


def transform(pattern: str, destination: str, subject: str) -> str | None:
    """Return the destination with the tokens that the wildcards of the pattern stand for.

    `None`: the subject does not match.
    """
    match = compile_filter(pattern).match(subject)
    return match and WILDCARD.sub(lambda wildcard: str(match[int(wildcard[1])]), destination)


class Node(Generic[Value]):
    """One token of a subject."""

    __slots__ = ("children", "value")

    def __init__(self) -> None:
        self.children: dict[str, Node[Value]] = {}
        self.value: Value | None = None


class SubjectTree(Generic[Value]):
    """One value per subject.

    The cost of a search grows with the matches of the wildcards, not with the number of subjects.
    """

    def __init__(self) -> None:
        self._root: Node[Value] = Node()

    def get(self, subject: str) -> Value | None:
        """Return the value of the subject."""
        node: Node[Value] | None = self._root
        for token in subject.split("."):
            node = node.children.get(token) if node is not None else None
        return node.value if node is not None else None

    def set(self, subject: str, value: Value) -> None:
        """Give the subject a value."""
        node = self._root
        for token in subject.split("."):
            if token not in node.children:
                node.children[token] = Node()
            node = node.children[token]
        node.value = value

    def remove(self, subject: str) -> None:
        """Take the value of a subject that has one away."""
        tokens = subject.split(".")
        path = [self._root]
        for token in tokens:
            path.append(path[-1].children[token])
        path[-1].value = None
        for token, parent, node in zip(
            reversed(tokens), reversed(path[:-1]), reversed(path), strict=False
        ):
            if node.value is not None or node.children:
                return
            del parent.children[token]

    def find(self, pattern: str) -> Iterator[Value]:
        """Yield the values of all subjects that the filter matches, in no order.

        The tree must not change meanwhile.
        """
        nodes = [self._root]
        for token in pattern.split("."):
            if token == ">":
                yield from self._below(nodes)
                return
            if token == "*":
                nodes = [child for node in nodes for child in node.children.values()]
            else:
                nodes = [child for node in nodes if (child := node.children.get(token)) is not None]
        yield from (node.value for node in nodes if node.value is not None)

    def _below(self, nodes: list[Node[Value]]) -> Iterator[Value]:
        stack = [child for node in nodes for child in node.children.values()]
        while stack:
            node = stack.pop()
            stack.extend(node.children.values())
            if node.value is not None:
                yield node.value
