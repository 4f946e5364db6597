"""A flow as a picture: which job is drawn where, and the lines between them. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final

__all__ = ["Drawing", "Edge", "Node", "draw"]

WIDTH: Final = 190
HEIGHT: Final = 52
GAP_X: Final = 64
GAP_Y: Final = 18
MARGIN: Final = 8
ORDERING_PASSES: Final = 6
"""Passes that move each job near those it is tied to, so that few lines cross."""


@dataclass(frozen=True, slots=True)
class Node:
    """A job in the picture: its upper left corner, in pixels."""

    id: str
    x: int
    y: int


@dataclass(frozen=True, slots=True)
class Edge:
    """A line from a parent to its child, as the `d` of an SVG path."""

    parent: str
    child: str
    path: str


@dataclass(frozen=True, slots=True)
class Drawing:
    """A picture: the size of all of it and of each job, in pixels."""

    width: int
    height: int
    nodes: list[Node]
    edges: list[Edge]
    node_width: int = WIDTH
    node_height: int = HEIGHT


def draw(parents: Mapping[str, Sequence[str]]) -> Drawing:
    """Return the picture of jobs, each given with those that it depends on.

    A job is right of all its parents. Parents that are no job of the picture, and circles, are
    passed over.
    """
    known = {
        job: [p for p in dict.fromkeys(given) if p in parents] for job, given in parents.items()
    }
    columns = _columns(known)
    layers: list[list[str]] = [[] for _ in range(max(columns.values(), default=-1) + 1)]
    for job in known:
        layers[columns[job]].append(job)
    _untangle(layers, known)
    tallest = max((len(layer) for layer in layers), default=0)
    nodes = [
        Node(job, _x(column), _y(row, len(layer), tallest))
        for column, layer in enumerate(layers)
        for row, job in enumerate(layer)
    ]
    places = {node.id: node for node in nodes}
    edges = [
        Edge(parent, job, _path(places[parent], places[job]))
        for job, given in known.items()
        for parent in given
        if columns[parent] < columns[job]
    ]
    width = max(1, len(layers)) * (WIDTH + GAP_X) - GAP_X + 2 * MARGIN
    height = max(1, tallest) * (HEIGHT + GAP_Y) - GAP_Y + 2 * MARGIN
    return Drawing(width, height, nodes, edges)


def _columns(parents: Mapping[str, Sequence[str]]) -> dict[str, int]:
    """Return the column of each job: one right of the rightmost of its parents."""
    columns: dict[str, int] = {}
    left = dict(parents)
    while left:
        ready = [job for job, given in left.items() if all(p in columns for p in given)]
        # None is ready: they form a circle, which no flow has; begin with the first one.
        for job in ready or [next(iter(left))]:
            known = [columns[p] for p in left.pop(job) if p in columns]
            columns[job] = max(known, default=-1) + 1
    return columns


def _untangle(layers: list[list[str]], parents: Mapping[str, Sequence[str]]) -> None:
    """Order each layer by the middle of its jobs' neighbours, from both sides in turn."""
    children: dict[str, list[str]] = {job: [] for job in parents}
    for job, given in parents.items():
        for parent in given:
            children[parent].append(job)
    for sweep in range(ORDERING_PASSES):
        forward = sweep % 2 == 0
        tied: Mapping[str, Sequence[str]] = parents if forward else children
        order = layers if forward else layers[::-1]
        for before, layer in pairwise(order):
            rank = {job: index for index, job in enumerate(before)}
            old = {job: index for index, job in enumerate(layer)}

            def middle(job: str, rank: Any = rank, old: Any = old, tied: Any = tied) -> float:
                ranks = [rank[other] for other in tied[job] if other in rank]
                return sum(ranks) / len(ranks) if ranks else float(old[job])

            layer.sort(key=middle)


def _x(column: int) -> int:
    return MARGIN + column * (WIDTH + GAP_X)


def _y(row: int, count: int, tallest: int) -> int:
    offset = (tallest - count) * (HEIGHT + GAP_Y) // 2
    return MARGIN + offset + row * (HEIGHT + GAP_Y)


def _path(parent: Node, child: Node) -> str:
    x1, y1 = parent.x + WIDTH, parent.y + HEIGHT // 2
    x2, y2 = child.x, child.y + HEIGHT // 2
    bend = max(24, (x2 - x1) // 2)
    return f"M{x1} {y1} C{x1 + bend} {y1} {x2 - bend} {y2} {x2} {y2}"
