"""What is given to Prometheus and Grafana is what a real promtool accepts, and asks for metrics that are printed."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from soma_common.health import exposition
from tests import promtool
from tests.docs.test_metrics import samples

CONFIG = Path(__file__).parents[2] / "deployments" / "config"
PROMETHEUS, DASHBOARD = CONFIG / "prometheus", CONFIG / "grafana" / "soma-common.json"
RULES = sorted(file for file in PROMETHEUS.glob("soma-*.yaml") if not file.name.endswith(".test.yaml"))
NAME = re.compile(r"(?<![\w:])soma[_:][\w:]+")


def rules() -> list[dict[str, Any]]:
    return [rule for file in RULES for group in yaml.safe_load(file.read_text())["groups"] for rule in group["rules"]]


def panels() -> list[dict[str, Any]]:
    return [panel for panel in json.loads(DASHBOARD.read_text())["panels"] if panel["type"] != "row"]


def expressions() -> list[str]:
    return [target["expr"] for panel in panels() for target in panel["targets"]]


def test_the_page_of_metrics_is_what_prometheus_reads() -> None:
    promtool.run("check", "metrics", given=exposition(samples()))


@pytest.mark.parametrize("file", RULES, ids=lambda file: file.name)
def test_rules_are_accepted_and_do_what_their_tests_say(file: Path) -> None:
    assert "SUCCESS" in promtool.run("check", "rules", file)
    tests = file.with_suffix("").with_suffix(".test.yaml")
    assert "SUCCESS" in promtool.run("test", "rules", tests.name, cwd=PROMETHEUS)


def test_every_expression_of_the_dashboard_is_accepted(tmp_path: Path) -> None:
    made = [{"record": f"panel:{number}", "expr": expr} for number, expr in enumerate(expressions())]
    file = tmp_path / "panels.yaml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": made}]}))
    assert f"{len(made)} rules found" in promtool.run("check", "rules", file)


def test_what_is_asked_for_is_printed_or_recorded() -> None:
    recorded = {rule["record"] for rule in rules() if "record" in rule}
    printed = {metric.name for metric in samples()}
    for expr in [*expressions(), *(rule["expr"] for rule in rules())]:
        named = set(NAME.findall(expr))
        assert named, expr
        assert named <= printed | recorded, expr


def test_the_dashboard_s_legends_name_labels_that_its_metrics_have() -> None:
    labels: dict[str, set[str]] = {}
    for metric in samples():
        labels.setdefault(metric.name, {"instance", "job"}).update(metric.labels)
    for rule in rules():
        if "record" in rule:
            labels[rule["record"]] = set.union(*(labels[name] for name in NAME.findall(rule["expr"])))
    for panel in panels():
        for target in panel["targets"]:
            known = set.union(*(labels[name] for name in NAME.findall(target["expr"])))
            assert set(re.findall(r"{{(\w+)}}", target["legendFormat"])) <= known, target


def test_the_dashboard_is_whole() -> None:
    known = json.loads(DASHBOARD.read_text())
    ids = [panel["id"] for panel in known["panels"]]
    assert len(set(ids)) == len(ids) >= 24
    places = [tuple(panel["gridPos"].values()) for panel in known["panels"]]
    assert len(set(places)) == len(places)
    assert known["templating"]["list"][0]["type"] == "datasource"
    for panel in panels():
        assert panel["datasource"]["uid"] == "${datasource}"
        assert panel["title"]
