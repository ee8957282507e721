"""Charts show what the kept results say, and the comparison's table has the same figures."""

from __future__ import annotations

import json
import re
from xml.etree import ElementTree

from benchmarks.charts import DOCS, Bar, Chart, draw, files


def test_charts_are_those_of_the_results() -> None:
    for path, text in files():
        assert path.read_text() == text, f"{path.name}: run `python -m benchmarks.charts`"
        assert f"images/{path.name}" in (DOCS / "explanation" / "comparison.md").read_text()


def test_the_table_has_the_figures_of_the_results() -> None:
    rows = json.loads((DOCS / "benchmarks" / "sagas.json").read_text())["rows"]
    page = (DOCS / "explanation" / "comparison.md").read_text()
    table = re.findall(r"^\| (transactional|external) \| (\d+) \| ([\d,]+) \| (\d+) % \| ([\d,]+) \| ([\d.]+) \|$", page, re.M)
    assert len(table) == 6
    for steps, at_once, ours, share, dbos, times in table:
        of = {row["who"]: row for row in rows if (row["steps"], row["at once"]) == (steps, int(at_once))}
        assert ours == f"{of['soma']['steps/s']:,.0f}"
        assert share == f"{of['soma']['share %']:.0f}"
        assert dbos == f"{max(of['DBOS, called']['steps/s'], of['DBOS, queue']['steps/s']):,.0f}"
        assert times == f"{of['soma']['times DBOS']:.1f}"


def test_hostile_names_stay_text() -> None:
    svg = draw(Chart("<b>&\"", "x/s", "</svg>", [Bar("a", "<script>", 1), Bar("a", "soma", 0.0)]))
    root = ElementTree.fromstring(svg)
    assert not root.findall(".//{*}script")
    assert "<script>" in "".join(root.itertext())
