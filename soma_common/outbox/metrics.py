"""A relay's figures for probes and Prometheus."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from soma_common.health import Health, Metric
from soma_common.outbox.stats import RelayStats


def relay_health(workers: Sequence[RelayStats]) -> Health:
    """Live while every worker makes progress, ready while none waits for a server; the rest is told only."""
    details = {
        "healthy": all(stats.healthy for stats in workers),
        "owned": sorted(group for stats in workers for group in stats.owned),
        "away": sorted({what for stats in workers for what in stats.away}),
        "refused_topics": {topic: why for stats in workers for topic, why in stats.refused_topics.items()},
        "lost_groups": {group: why for stats in workers for group, why in stats.lost_groups.items()},
        "parked_now": sum(stats.parked_now for stats in workers),
        "lag_seconds": round(max((stats.lag_seconds for stats in workers), default=0.0), 3),
    }
    return Health(all(stats.live for stats in workers), details, not any(stats.away for stats in workers))


def relay_metrics(workers: Iterable[RelayStats]) -> Iterator[Metric]:
    """One sample per worker and figure."""
    every = [({"relay": stats.name, "worker": stats.worker}, stats) for stats in workers]
    figures = (
        ("soma_relay_rows_total", "counter", "Rows acknowledged by the broker.", "relayed"),
        ("soma_relay_rows_per_second", "gauge", "Rows per second over ten seconds.", "rows_per_second"),
        ("soma_relay_lag_rows", "gauge", "Positions the slowest owned group is behind.", "lag_rows"),
        ("soma_relay_lag_seconds", "gauge", "Age of the oldest row on its way.", "lag_seconds"),
        ("soma_relay_parked_total", "counter", "Rows parked by this worker.", "parked"),
        ("soma_relay_parked_rows", "gauge", "Rows parked now, in owned groups.", "parked_now"),
        ("soma_relay_errors_total", "counter", "Rounds that failed and began anew.", "errors"),
        ("soma_relay_idle_seconds", "gauge", "Seconds without progress.", "idle_for"),
    )
    for name, kind, words, attribute in figures:
        for labels, stats in every:
            yield Metric(name, kind, words, float(getattr(stats, attribute)), labels)
    for labels, stats in every:
        yield Metric("soma_relay_groups", "gauge", "Groups owned.", float(len(stats.owned)), labels)
    for labels, stats in every:
        yield Metric("soma_relay_healthy", "gauge", "1 when nothing needs an operator.", float(stats.healthy), labels)
