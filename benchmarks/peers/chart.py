"""The chart of a run: small bars by column, light and dark. Needs matplotlib."""

import io
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Final

from benchmarks.peers.figures import COLUMNS, Column, Row, Run
from benchmarks.peers.library import RAW

__all__ = ["draw"]


@dataclass(frozen=True, slots=True)
class Colours:
    """The colours of one theme."""

    ground: str
    text: str
    quiet: str
    bar: str
    ours: str
    raw: str


THEMES: Final = {
    "light": Colours("#ffffff", "#1f2328", "#656d76", "#c3c9d0", "#2a6fdb", "#e6e9ed"),
    "dark": Colours("#131416", "#e6edf3", "#9198a1", "#454c56", "#6aa7ff", "#30353c"),
}


def draw(run: Run, folder: Path) -> None:
    """Write `peers-light.png` and `peers-dark.png`."""
    from matplotlib import pyplot
    from PIL import Image  # of matplotlib's requirements

    for theme, colours in THEMES.items():
        figure = _draw(run, colours, pyplot)
        with io.BytesIO() as drawn:
            figure.savefig(drawn, format="png", facecolor=colours.ground)
            pyplot.close(figure)
            # A palette: a third of the bytes, at each change of the figures.
            small = Image.open(drawn).convert("RGB").quantize(48)
            small.save(folder / f"peers-{theme}.png", optimize=True)


def _draw(run: Run, colours: Colours, pyplot: Any) -> Any:
    size = 8.4, 3 * (0.5 + 0.22 * len(run.rows)) + 0.2
    settings = {"font.family": "DejaVu Sans", "font.size": 8.5, "text.color": colours.text}
    with pyplot.rc_context(settings):
        figure, grid = pyplot.subplots(
            3, 3, figsize=size, dpi=170, layout="constrained", sharey=True
        )
        figure.get_layout_engine().set(w_pad=0.08, h_pad=0.06)
        panels = list(grid.flat)
        for panel, column in zip(panels, COLUMNS, strict=False):
            _draw_panel(panel, run, column, colours)
        panels[0].invert_yaxis()  # of all panels: they share it
        for panel in panels[len(COLUMNS) :]:
            panel.axis("off")
            _explain(panel, run, colours)
    return figure


def _label(name: str, row: Row) -> str:
    server = row.server.partition(" ")[0].replace("PostgreSQL", "Postgres")
    return name if "nats" in server else f"{name} · {server}"


def _draw_panel(panel: Any, run: Run, column: Column, colours: Colours) -> None:
    names = [_label(name, row) for name, row in run.rows.items()]
    ours = list(run.rows).index(run.ours)
    key = column.keys[0]
    found = [median(row.figures[key]) if key in row.figures else 0.0 for row in run.rows.values()]
    shades = [
        colours.ours if name == run.ours else colours.raw if name == RAW.name else colours.bar
        for name in run.rows
    ]
    bars = panel.barh(names, found, color=shades, height=0.72)
    labels = [f"{value:,.0f}" if value else "–" for value in found]
    texts = panel.bar_label(bars, labels, padding=3, color=colours.text, fontsize=8)
    texts[ours].set_fontweight("bold")
    title, _, more = column.title.partition(":")
    suffix = f" {more.strip().partition(' / ')[0]}" if more else ""
    panel.set_title(title, loc="left", fontsize=9, fontweight="bold", color=colours.text, pad=16)
    direction = "more is better" if column.more_is_better else "less is better"
    unit = f"{column.unit}{suffix and ','}{suffix}, {direction}"
    panel.text(0, 1.03, unit, transform=panel.transAxes, fontsize=7.5, color=colours.quiet)
    panel.set_xlim(0, 1.38 * max(found))
    panel.set_facecolor(colours.ground)
    panel.xaxis.set_visible(False)
    panel.tick_params(axis="y", length=0, labelcolor=colours.text)
    for label in panel.get_yticklabels()[ours : ours + 1]:  # only the first of a line has them
        label.set_fontweight("bold")
    panel.spines[:].set_visible(False)


def _explain(panel: Any, run: Run, colours: Colours) -> None:
    machine = run.machine
    lines = [
        "No-op jobs. The server, a worker process",
        f"and the producer share {machine['cores']} cores.",
        f"Medians of {machine['rounds']} rounds, {machine['taken']}.",
        "–: it has no way for that.",
        "Pale: the same traffic without a queue.",
    ]
    place = {"transform": panel.transAxes, "va": "top", "linespacing": 1.6}
    panel.text(0, 0.95, "\n".join(lines), fontsize=8, color=colours.quiet, **place)
