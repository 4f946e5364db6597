"""Draws how a job flows, for light and for dark pages: `python docs/images/job_flow.py`."""

from pathlib import Path
from typing import Final

FOLDER: Final = Path(__file__).parent
WIDTH, HEIGHT = 920, 430

LIGHT: Final = {
    "text": "#1f2328",
    "soft": "#57606a",
    "line": "#6e7781",
    "code": "#ffffff",
    "program": "#eef2f6",
    "ready": "#dff1e4",
    "later": "#fdf0d5",
    "done": "#e1ecfb",
    "border": "#8c959f",
}
DARK: Final = {
    "text": "#e6edf3",
    "soft": "#a0a9b4",
    "line": "#8b949e",
    "code": "#0d1117",
    "program": "#21262d",
    "ready": "#173524",
    "later": "#3a2e12",
    "done": "#172a45",
    "border": "#6e7681",
}


def box(x: int, y: int, width: int, height: int, fill: str, *lines: str) -> str:
    """Return a box with a title and lines below it."""
    title, *rest = lines
    middle = x + width / 2
    top = y + 26
    texts = [f'<text x="{middle}" y="{top}" class="title">{title}</text>']
    texts += [
        f'<text x="{middle}" y="{top + 21 * number}" class="soft">{line}</text>'
        for number, line in enumerate(rest, 1)
    ]
    return (
        f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="9" class="{fill}"/>'
        + "".join(texts)
    )


def arrow(path: str, label: str = "", x: int = 0, y: int = 0, anchor: str = "middle") -> str:
    """Return a line with a head, and its label."""
    text = f'<text x="{x}" y="{y}" class="label" text-anchor="{anchor}">{label}</text>'
    return f'<path d="{path}" class="line" marker-end="url(#head)"/>' + (text if label else "")


def draw(colours: dict[str, str]) -> str:
    """Return the picture in these colours."""
    fills = "".join(
        f".{name} {{ fill: {colours[name]}; stroke: {colours['border']}; stroke-width: 1.2 }}"
        for name in ("program", "ready", "later", "done")
    )
    style = (
        "text { font-family: system-ui, -apple-system, 'Segoe UI', Helvetica, Arial, sans-serif;"
        f" font-size: 14px; fill: {colours['text']} }}"
        " .title { font-weight: 600; font-size: 15px; text-anchor: middle }"
        f" .soft {{ fill: {colours['soft']}; font-size: 13px; text-anchor: middle }}"
        f" .label {{ fill: {colours['text']}; font-size: 13px }}"
        f" .line {{ fill: none; stroke: {colours['line']}; stroke-width: 1.7 }}"
        f" #head path {{ fill: {colours['line']} }}"
        f" .server {{ fill: none; stroke: {colours['border']}; stroke-dasharray: 5 5 }}"
        f" {fills}"
    )
    parts = [
        '<rect x="222" y="34" width="430" height="376" rx="12" class="server"/>',
        '<text x="238" y="26" class="label">nats-server</text>',
        box(20, 84, 140, 74, "program", "producer", "add, enqueue"),
        box(256, 84, 200, 74, "ready", "ready", "waiting · active"),
        box(740, 84, 160, 74, "program", "worker", "runs the task"),
        box(256, 232, 200, 74, "later", "later", "delayed · waiting-children"),
        box(480, 312, 156, 80, "done", "done", "completed · failed", "expired · cancelled"),
        arrow("M160,112 H254", "add", 191, 104),
        arrow("M456,112 H738", "pull, on a lease", 640, 104, "end"),
        arrow("M90,158 V269 H254", "delay, depends_on", 214, 261, "end"),
        arrow("M330,232 V160", "timer, last parent done", 338, 200, "start"),
        arrow("M800,158 V269 H458", "failed: retry later", 640, 261, "end"),
        arrow("M850,158 V352 H638", "outcome", 846, 344, "end"),
        arrow("M480,352 H356 V308", "retry_job", 364, 344, "start"),
    ]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img"'
        ' aria-label="A job goes from a producer to the ready stream, or first to later; a worker'
        ' pulls it and stores its outcome in done">'
        f"<style>{style}</style>"
        '<defs><marker id="head" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7"'
        ' markerHeight="7" orient="auto"><path d="M0,0 L10,5 L0,10 z"/></marker></defs>'
        + "".join(parts)
        + "</svg>\n"
    )


def main() -> None:
    """Write both pictures."""
    for name, colours in (("light", LIGHT), ("dark", DARK)):
        (FOLDER / f"job-flow-{name}.svg").write_text(draw(colours))


if __name__ == "__main__":
    main()
