"""The page of metrics and the alert rules name what /metrics prints, and nothing else."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import yaml

from soma_common.consumer.metrics import consumer_health, consumer_metrics
from soma_common.consumer.source import Partition
from soma_common.consumer.tally import Tally
from soma_common.consumer.worker import ConsumerStats
from soma_common.errors import OffsetLost
from soma_common.dlq.gauges import OpenLetters, letter_metrics
from soma_common.events.tally import AppendTally
from soma_common.gauges import database_metrics
from soma_common.health import Metric
from soma_common.outbox.metrics import relay_metrics
from soma_common.outbox.stats import RelayStats
from soma_common.postgres.pool import Pool
from soma_common.process_metrics import append_metrics, pool_metrics
from soma_common.sagas.metrics import SagaStats, saga_metrics
from soma_common.sagas.tally import SagaTally

ROOT = Path(__file__).parents[2]
RULES = ROOT / "deployments" / "config" / "prometheus" / "soma-alerts.yaml"
ROW = re.compile(r"^\| `(soma_\w+)` \| (\w+) \|", re.MULTILINE)


def worker() -> ConsumerStats:
    return ConsumerStats(
        consumer="billing", tally=Tally(), partitions=frozenset(), in_flight=0, held=0, oldest=0.0,
        lag={Partition("t", 0): 3}, halted={}, away=None, running=True, idle=0.0, single_file=False, live=True, ready=True,
    )  # fmt: skip


def samples() -> list[Metric]:
    """What a process with a consumer and a relay prints."""
    stats = worker()
    relay = RelayStats(
        name="shop", worker="w", exactly_once=False, owned=(), relayed=0, rows_per_second=0.0, lag_rows=0,
        lag_seconds=0.0, parked=0, parked_now=0, errors=0, idle_for=0.0, away=(), refused_topics={}, lost_groups={},
        live=True,
    )  # fmt: skip
    letters = letter_metrics([OpenLetters("billing", "dead", 1, 5.0)], 1.0)
    sagas = SagaStats(sagas=["order"], tally=SagaTally(), driven={"order": 1}, oldest=0.0, away=False)
    counted = {
        "sagas": [("order", "running", 1, 5.0), ("order", "stuck", 1, 0.0)],
        "replays": [("billing", "running", 1, 0.0)], "archives": [("removed", 1, 100)],
    }  # fmt: skip
    tally = AppendTally()
    with tally.timed(1):
        pass
    return [
        *consumer_metrics([stats]), *relay_metrics([relay]), *letters, *saga_metrics([sagas]),
        *append_metrics([tally.read()]), *pool_metrics(Pool("postgresql://h/d")), *database_metrics(counted, 1.0),
    ]  # fmt: skip


def test_the_page_names_every_metric_and_its_kind() -> None:
    page = (ROOT / "docs" / "reference" / "metrics.md").read_text()
    assert dict(ROW.findall(page)) == {m.family or m.name: m.kind for m in samples()}


def test_the_rules_ask_for_metrics_and_labels_that_are_printed() -> None:
    labels: dict[str, set[str]] = {}
    for metric in samples():
        labels.setdefault(metric.name, {"instance", "job"}).update(metric.labels)
    rules = [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]
    assert len(rules) >= 10
    for rule in rules:
        named = re.findall(r"\b(soma_\w+)", rule["expr"])
        assert named, rule
        assert set(named) <= labels.keys(), rule
        allowed = set.union(*(labels[name] for name in named))
        used = {word for by in re.findall(r"by \(([^)]*)\)", rule["expr"]) for word in re.split(r",\s*", by)}
        used |= set(re.findall(r"(\w+)=\"", rule["expr"]))
        used |= set(re.findall(r"\$labels\.(\w+)", " ".join(rule["annotations"].values())))
        assert used <= allowed, rule
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert rule["annotations"]["summary"]


def test_a_well_worker_does_not_hide_a_sick_one_of_its_consumer() -> None:
    """The details told of the last worker only: not live, and nobody could see why."""
    gone = {Partition("t", 1): OffsetLost("it is gone")}
    sick = replace(worker(), away="PostgreSQL does not answer.", live=False, ready=False, idle=200.0, halted=gone)
    for workers in ([sick, worker()], [worker(), sick]):
        health = consumer_health(workers)
        told = health.details["consumers"]["billing"]
        assert (health.live, told["live"], told["ready"]) == (False, False, False)
        assert (told["away"], told["idle_seconds"]) == ("PostgreSQL does not answer.", 200.0)
        assert "it is gone" in str(told["halted"])


def test_the_number_of_series_does_not_grow_with_the_data() -> None:
    assert {label for metric in samples() for label in metric.labels} == {
        "consumer", "topic", "partition", "status", "relay", "worker", "saga", "outcome", "state", "le",
    }  # fmt: skip
