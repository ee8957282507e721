"""Charts for the documentation: ``python -m benchmarks.charts`` draws them from ``docs/benchmarks/*.json``.

The JSON files are results of ``python -m benchmarks`` that were worth keeping; a test holds charts and files equal.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, Final, NamedTuple

DOCS: Final = Path(__file__).parents[1] / "docs"
OURS: Final = "soma"
_WIDTH, _LEFT, _ROW, _TOP = 720, 250, 26, 46
_STYLE: Final = (
    "text{font:13px system-ui,sans-serif;fill:#24292f}.title{font-weight:600;font-size:15px}"
    ".note{fill:#57606a;font-size:12px}"
    ".ours{fill:#0a6c74}.other{fill:#b6bec7}.group{font-weight:600}"
    "@media(prefers-color-scheme:dark){text{fill:#e6edf3}.note{fill:#9aa4af}.ours{fill:#3fb6c0}.other{fill:#4b5563}}"
)


class Bar(NamedTuple):
    """One bar of a chart, under the heading of its group."""

    group: str
    name: str
    value: float


class Chart(NamedTuple):
    """Horizontal bars; ``unit`` stands behind each number."""

    title: str
    unit: str
    note: str
    bars: Sequence[Bar]


def draw(chart: Chart) -> str:
    """The chart as SVG. Colours follow the reader's light or dark."""
    most = max(bar.value for bar in chart.bars)
    parts, y, group = [], _TOP, ""
    for bar in chart.bars:
        if bar.group != group:
            group, y = bar.group, y + (8 if group else 0)
            parts.append(f'<text class="group" x="12" y="{y + 14}">{escape(group)}</text>')
            y += _ROW
        width = max(1.0, (_WIDTH - _LEFT - 130) * bar.value / most)
        kind = "ours" if bar.name.startswith(OURS) else "other"
        parts += [
            f'<text x="{_LEFT - 10}" y="{y + 14}" text-anchor="end">{escape(bar.name)}</text>',
            f'<rect class="{kind}" x="{_LEFT}" y="{y + 2}" width="{width:.1f}" height="16" rx="3"/>',
            f'<text x="{_LEFT + width + 8:.1f}" y="{y + 14}">{bar.value:,.0f} {escape(chart.unit)}</text>',
        ]
        y += _ROW
    height = y + 30
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" role="img" '
        f'aria-label="{escape(chart.title)}"><style>{_STYLE}</style>'
        f'<text class="title" x="12" y="24">{escape(chart.title)}</text>'
    )
    return "\n".join(
        [head, *parts, f'<text class="note" x="12" y="{height - 10}">{escape(chart.note)}</text></svg>', ""]
    )


def _read(name: str) -> tuple[Sequence[Mapping[str, Any]], str]:
    """The rows of a result, and where and when it was measured."""
    content = json.loads((DOCS / "benchmarks" / f"{name}.json").read_text())
    machine = content["machine"]
    return content["rows"], f"{content['when'][:10]}, {machine['cores']} cores, Python {machine['python']}"


def _sagas(steps: str) -> Chart:
    rows, where = _read("sagas")
    names = {
        "soma": "soma-common",
        "floor": "bare loop, same statements",
        "DBOS, called": "DBOS 3.4",
        "DBOS, queue": "DBOS 3.4, queue",
    }
    bars = [
        Bar(f"{row['at once']} at once", names[row["who"]], row["steps/s"])
        for row in rows
        if row["steps"] == steps and row["who"] in names
    ]
    return Chart(f"Sagas of three {steps} steps", "steps/s", where, bars)


def _consume() -> Chart:
    rows, where = _read("consume")
    bars = [
        Bar(
            {"log": "From the log", "kafka": "From Kafka"}[row["source"]],
            row["who"].replace("soma", "soma-common").replace("bare", "bare loop"),
            row["events/s"],
        )
        for row in rows
    ]
    return Chart("Consuming: effect and inbox in one transaction", "events/s", where, bars)


CHARTS: Final[Mapping[str, Callable[[], Chart]]] = {
    "sagas-transactional": lambda: _sagas("transactional"),
    "sagas-external": lambda: _sagas("external"),
    "consume": _consume,
}


def files() -> Iterable[tuple[Path, str]]:
    """The charts as they are to be."""
    for name, chart in CHARTS.items():
        yield DOCS / "images" / f"{name}.svg", draw(chart())


def main() -> None:
    """Write them."""
    for path, text in files():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        print(path.relative_to(DOCS.parent))


if __name__ == "__main__":
    main()
