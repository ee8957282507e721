"""Measurements that are recorded as they happen, by OpenTelemetry's API; without a MeterProvider they go nowhere."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from opentelemetry import metrics


def histogram(name: str, unit: str, description: str, bounds: Sequence[float]) -> Callable[[float], None]:
    """What records a value of a distribution with these bounds."""
    meter = metrics.get_meter("soma-common")
    return meter.create_histogram(name, unit, description, explicit_bucket_boundaries_advisory=list(bounds)).record
