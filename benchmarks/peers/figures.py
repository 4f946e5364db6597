"""The figures of a run, as JSON and as tables in Markdown. Pure: reads no clock."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any, Final, Self

__all__ = [
    "COLUMNS",
    "Column",
    "Row",
    "Run",
    "ratio",
    "ratios",
    "show_ratios",
    "show_table",
    "spread",
]

NOTHING: Final = "–"


@dataclass(frozen=True, slots=True)
class Column:
    """A column of the table: of one figure, or of two beside each other."""

    title: str
    keys: tuple[str, ...]
    unit: str
    more_is_better: bool = True


COLUMNS: Final = (
    Column("add one by one", ("add_one_by_one",), "jobs/s"),
    Column("100 at once", ("add_100_at_once",), "jobs/s"),
    Column("bulk", ("add_bulk",), "jobs/s"),
    Column("process, 100 at a time", ("process_100",), "jobs/s"),
    Column("process, 10 at a time", ("process_10",), "jobs/s"),
    Column("200 due at one instant: late, p50 / p95", ("late_p50", "late_p95"), "ms", False),
    Column("worker CPU per job", ("worker_cpu_100",), "µs", False),
    Column("server CPU per job", ("server_cpu_100",), "µs", False),
)


@dataclass(slots=True)
class Row:
    """The figures of one library: a value a round for each."""

    versions: dict[str, str] = field(default_factory=dict)
    server: str = ""
    note: str = ""
    figures: dict[str, list[float]] = field(default_factory=dict)
    no_way: dict[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class Run:
    """One run of all libraries, round by round; `ours` is the name of the row for ratios."""

    ours: str
    rows: dict[str, Row] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        """Return the run as a file's text."""
        return json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what `to_json` wrote."""
        stored = json.loads(text)
        rows = {name: Row(**row) for name, row in stored.pop("rows").items()}
        return cls(**stored, rows=rows)


def spread(values: Sequence[float]) -> float:
    """Return half the distance from the least to the greatest value, as a share of the median."""
    return (max(values) - min(values)) / 2 / median(values)


def ratio(ours: Sequence[float], theirs: Sequence[float], more_is_better: bool = True) -> float:
    """Return how many times as good ours is: the median of the ratios within each round.

    Other load shifts both sides of a round.
    """
    pairs = zip(ours, theirs, strict=True)
    return median(mine / other if more_is_better else other / mine for mine, other in pairs)


def ratios(run: Run, name: str) -> dict[str, float]:
    """Return ours beside one library, by column: above 1, ours is better."""
    ours, theirs = run.rows[run.ours].figures, run.rows[name].figures
    return {
        column.title: ratio(ours[key], theirs[key], column.more_is_better)
        for column in COLUMNS
        if (key := column.keys[0]) in ours and key in theirs
    }


def show_table(run: Run) -> str:
    """Return medians and their spread, a row for each library, and the reasons for each gap."""
    heads = ["", *(f"{column.title}, {column.unit}" for column in COLUMNS)]
    lines = [
        [f"{name}, {row.server}", *(_cell(row, column) for column in COLUMNS)]
        for name, row in run.rows.items()
    ]
    return "\n".join([*_markdown(heads, lines), "", *_notes(run)]) + "\n"


def show_ratios(run: Run) -> str:
    """Return how many times as good ours is, a row for each other library."""
    if run.ours not in run.rows:
        return ""
    heads = ["ours beside", *(column.title.partition(":")[0] for column in COLUMNS)]
    lines = []
    for name in run.rows:
        if name != run.ours:
            found = ratios(run, name)
            cells = (found.get(column.title) for column in COLUMNS)
            lines.append([name, *(NOTHING if each is None else f"{each:.2f}" for each in cells)])
    return "\n".join(_markdown(heads, lines)) + "\n"


def _cell(row: Row, column: Column) -> str:
    if any(key not in row.figures for key in column.keys):
        return NOTHING
    values = " / ".join(f"{median(row.figures[key]):,.0f}" for key in column.keys)
    first = row.figures[column.keys[0]]
    return f"{values} ±{100 * spread(first):.0f} %" if len(first) > 1 else values


def _notes(run: Run) -> Iterable[str]:
    machine = run.machine
    if machine.get("load"):
        low, high = min(machine["load"]), max(machine["load"])
        fast, slow = min(machine["loop_ms"]), max(machine["loop_ms"])
        yield (
            f"* {machine['taken']}, {machine['rounds']} rounds, Python {machine['python']}, "
            f"{machine['cores']} cores. Load average {low:.0f} to {high:.0f}; "
            f"a loop of a million additions took {fast:.0f} to {slow:.0f} ms."
        )
    for name, row in run.rows.items():
        parts = [row.note] if row.note else []
        by_reason: dict[str, list[str]] = {}
        for column in COLUMNS:
            if column.keys[0] in row.no_way:
                reason = row.no_way[column.keys[0]]
                by_reason.setdefault(reason, []).append(column.title.partition(":")[0])
        parts += [f"{', '.join(titles)}: {reason}" for reason, titles in by_reason.items()]
        versions = ", ".join(f"{package} {version}" for package, version in row.versions.items())
        yield f"* {name} ({versions}){': ' if parts else ''}{'; '.join(parts)}."


def _markdown(heads: Sequence[str], lines: Iterable[Sequence[str]]) -> list[str]:
    rows = [heads, ["---"] * len(heads), *lines]
    return [f"| {' | '.join(cells)} |".replace("|  |", "| |") for cells in rows]
