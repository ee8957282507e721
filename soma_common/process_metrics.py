"""The figures of a process's appends and of its connections, for probes, Prometheus and OpenTelemetry."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import accumulate

from soma_common.events.tally import BOUNDS, Appends
from soma_common.health import Metric
from soma_common.postgres.pool import Pool

_TOOK = "Seconds that an append took."


def append_metrics(stores: Iterable[Appends]) -> Iterator[Metric]:
    """Of all stores of a process, added up."""
    every = list(stores)
    yield Metric("soma_append_events_total", "counter", "Events recorded.", float(sum(one.events for one in every)))
    failed = float(sum(one.failed for one in every))
    yield Metric(
        "soma_append_failed_total", "counter", "Appends that raised: refused, in conflict, or cut off.", failed
    )
    name, kind = "soma_append_duration_seconds", "histogram"
    classes = [sum(counts) for counts in zip(*(one.classes for one in every), strict=True)] or [0] * (len(BOUNDS) + 1)
    for bound, count in zip([*map(str, BOUNDS), "+Inf"], accumulate(classes), strict=True):
        yield Metric(f"{name}_bucket", kind, _TOOK, float(count), {"le": bound}, name)
    yield Metric(f"{name}_sum", kind, _TOOK, float(sum(one.seconds for one in every)), {}, name)
    yield Metric(f"{name}_count", kind, _TOOK, float(sum(classes)), {}, name)


def pool_metrics(pool: Pool) -> Iterator[Metric]:
    """Of the application's pool; replays and synchronous code have connections of their own."""
    most, made, idle = pool.settings.size, *pool.counts()
    yield Metric("soma_pool_size", "gauge", "Most connections that the pool makes.", float(most))
    yield Metric("soma_pool_connections", "gauge", "Connections that are open.", float(made))
    yield Metric("soma_pool_idle", "gauge", "Of them, those that nobody uses.", float(idle))
