"""Figures as OpenTelemetry metrics: the other edge to OpenTelemetry. Never sets a provider."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from opentelemetry import metrics
from opentelemetry.metrics import CallbackOptions, Observation

from soma_common.health import Metric

_SECONDS = "_seconds"


class Meter:
    """Hands samples to whatever MeterProvider the application has set; with none, nothing happens.

    The SDK asks from a thread of its own, so it gets what ``show`` was given last, never a living object.
    """

    def __init__(self, name: str = "soma-common", provider: metrics.MeterProvider | None = None) -> None:
        self._meter = metrics.get_meter(name, meter_provider=provider)
        self._shown: Mapping[str, list[Metric]] = {}
        self._known: set[str] = set()

    def show(self, samples: Iterable[Metric]) -> None:
        """Replace all samples; a name that is new gets an instrument."""
        shown: dict[str, list[Metric]] = {}
        for sample in samples:
            if sample.kind == "histogram":  # recorded value by value (tracing/instruments.py)
                continue
            shown.setdefault(sample.name, []).append(sample)
        self._shown = shown
        for name in shown.keys() - self._known:
            self._known.add(name)
            self._instrument(shown[name][0])

    def _instrument(self, sample: Metric) -> None:
        name, unit = otel_name(sample.name), "s" if sample.name.endswith(_SECONDS) else ""
        make = (
            self._meter.create_observable_counter if sample.kind == "counter" else self._meter.create_observable_gauge
        )
        make(name, [self._observer(sample.name)], unit=unit, description=sample.help)

    def _observer(self, name: str) -> Callable[[CallbackOptions], Iterable[Observation]]:
        def observe(_: CallbackOptions) -> Iterable[Observation]:
            return [Observation(sample.value, dict(sample.labels)) for sample in self._shown.get(name, ())]

        return observe


def otel_name(name: str) -> str:
    """OpenTelemetry's name of a Prometheus metric: ``soma_consumer_oldest_seconds`` is ``soma.consumer.oldest``.

    An exporter to Prometheus makes the same name of it again, from unit and kind.
    """
    return ".".join(name.removesuffix("_total").removesuffix(_SECONDS).split("_", 2))
