"""Figures for OpenTelemetry: what a real SDK collects, and the names that an exporter makes of them."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader

from soma_common.health import Metric, exposition
from soma_common.tracing.meter import Meter, otel_name


def collected(reader: InMemoryMetricReader) -> dict[str, Any]:
    data = reader.get_metrics_data()
    if data is None:
        return {}
    metrics = [m for resource in data.resource_metrics for scope in resource.scope_metrics for m in scope.metrics]
    return {metric.name: metric for metric in metrics}


def test_the_sdk_collects_what_was_shown_last() -> None:
    reader = InMemoryMetricReader()
    provider = MeterProvider([reader], shutdown_on_exit=False)
    meter = Meter("tests", provider)
    meter.show([Metric("soma_consumer_applied_total", "counter", "Applied.", 3.0, {"consumer": "a"})])
    meter.show(
        [
            Metric("soma_consumer_applied_total", "counter", "Applied.", 5.0, {"consumer": "a"}),
            Metric("soma_consumer_applied_total", "counter", "Applied.", 7.0, {"consumer": "b"}),
            Metric("soma_consumer_oldest_seconds", "gauge", "Oldest.", 1.5, {"consumer": "a"}),
        ]
    )
    found = collected(reader)
    points = {point.attributes["consumer"]: point.value for point in found["soma.consumer.applied"].data.data_points}
    assert points == {"a": 5.0, "b": 7.0}
    assert found["soma.consumer.applied"].data.is_monotonic
    assert found["soma.consumer.oldest"].unit == "s"
    meter.show([])
    assert collected(reader) == {}
    provider.shutdown()


def test_the_sdk_may_ask_from_its_own_thread_while_figures_change() -> None:
    reader = InMemoryMetricReader()
    provider = MeterProvider([reader], shutdown_on_exit=False)
    meter, over, wrong = Meter("tests", provider), threading.Event(), []

    def ask() -> None:
        while not over.is_set():
            points = collected(reader).get("soma.consumer.lag")
            if points is not None and len(points.data.data_points) not in (50, 100):
                wrong.append(len(points.data.data_points))

    thread = threading.Thread(target=ask)
    thread.start()
    for number in range(300):
        count = 50 if number % 2 else 100
        meter.show([Metric("soma_consumer_lag", "gauge", "Lag.", 1.0, {"partition": str(n)}) for n in range(count)])
    over.set()
    thread.join()
    provider.shutdown()
    assert wrong == []


def test_without_a_provider_nothing_happens() -> None:
    Meter("tests").show([Metric("soma_consumer_live", "gauge", "Live.", 1.0)])


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("soma_consumer_applied_total", "soma.consumer.applied"),
        ("soma_consumer_oldest_seconds", "soma.consumer.oldest"),
        ("soma_consumer_in_flight", "soma.consumer.in_flight"),
    ],
)
def test_names(name: str, wanted: str) -> None:
    assert otel_name(name) == wanted


@pytest.mark.parametrize(
    ("value", "shown"),
    [(12_345_678.0, "12345678"), (0.1, "0.1"), (0.0, "0"), (float("inf"), "inf"), (1e300, "1e+300"), (True, "1")],
)
def test_a_number_keeps_its_digits(value: float, shown: str) -> None:
    assert exposition([Metric("m", "counter", "M.", value)]).splitlines()[-1] == f"m {shown}"
