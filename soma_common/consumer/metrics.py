"""A consumer's figures for probes, Prometheus and OpenTelemetry."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Final

from soma_common.consumer.source import Partition
from soma_common.consumer.worker import ConsumerStats
from soma_common.health import Health, Metric

_COUNTERS: Final = {
    "applied": "Events applied by handlers.",
    "skipped": "Events passed over for want of a handler.",
    "repeated": "Events that were known already.",
    "blocked": "Events written behind a dead letter of their sequence.",
    "retried": "Failures after which an event was tried again in its lane.",
    "parked": "Events that became letters with automatic tries.",
    "dead": "Letters that died: no automatic try is left.",
    "refused": "Events that became letters because no handler takes their type.",
    "redriven": "Letters that were applied after all.",
    "published": "Events recorded by handlers.",
    "transactions": "Batches begun, failed ones included.",
    "conflicts": "Batches that met another transaction.",
    "timeouts": "Handlers that took too long.",
    "stalls": "Times the worker hung up and began anew, because nothing answered.",
    "alerts": "Calls of on_dead_letter that ended well.",
    "alerts_lost": "Calls of on_dead_letter that failed or were not made.",
}


def consumer_health(workers: Sequence[ConsumerStats]) -> Health:
    """Live while every worker gets on or knows what it waits for; ready while none waits."""
    details = {
        name: {
            "live": all(s.live for s in of),
            "ready": all(s.ready for s in of),
            "away": next((s.away for s in of if s.away is not None), None),
            "halted": {str(partition): str(error) for s in of for partition, error in s.halted.items()},
            "partitions": sum(len(s.partitions) for s in of),
            "in_flight": sum(s.in_flight for s in of),
            "idle_seconds": round(max(s.idle for s in of), 3),
        }
        for name, of in _by_consumer(workers)
    }
    return Health(all(s.live for s in workers), {"consumers": details}, all(s.ready for s in workers))


def consumer_metrics(workers: Iterable[ConsumerStats]) -> Iterator[Metric]:
    """One sample per consumer and figure, lag per partition; several workers of a consumer count as one."""
    every = [({"consumer": name}, group) for name, group in _by_consumer(workers)]
    for name, words in _COUNTERS.items():
        for labels, group in every:
            total = sum(getattr(stats.tally, name) for stats in group)
            yield Metric(f"soma_consumer_{name}_total", "counter", words, float(total), labels)
    for name, words, value in _GAUGES:
        for labels, group in every:
            yield Metric(f"soma_consumer_{name}", "gauge", words, float(value(group)), labels)
    for labels, group in every:
        for partition, lag in sorted(_lags(group).items()):
            where = labels | {"topic": partition.name, "partition": str(partition.number)}
            yield Metric("soma_consumer_lag", "gauge", _LAG, float(lag), where)


def _by_consumer(workers: Iterable[ConsumerStats]) -> list[tuple[str, list[ConsumerStats]]]:
    by_name = sorted(workers, key=lambda stats: stats.consumer)
    return [(name, list(group)) for name, group in groupby(by_name, key=lambda stats: stats.consumer)]


_LAG: Final = "Offsets (in standalone: positions of the log) from the stored place to the end."
_GAUGES: Final = (
    ("in_flight", "Events fetched and not settled.", lambda of: sum(s.in_flight for s in of)),
    ("held", "Events that wait for their next try, followers included.", lambda of: sum(s.held for s in of)),
    ("oldest_seconds", "How long the oldest event in flight has been waiting.", lambda of: max(s.oldest for s in of)),
    ("idle_seconds", "Without progress; finding nothing to do is progress.", lambda of: max(s.idle for s in of)),
    ("partitions", "Partitions owned.", lambda of: sum(len(s.partitions) for s in of)),
    (
        "halted_partitions",
        "Partitions that stopped until a person mends it.",
        lambda of: sum(len(s.halted) for s in of),
    ),
    (
        "single_file",
        "1 while events are begun one by one: owners kept dying.",
        lambda of: any(s.single_file for s in of),
    ),
    ("live", "0 when a new process would help.", lambda of: all(s.live for s in of)),
    ("ready", "0 while it waits for something, or has not begun.", lambda of: all(s.ready for s in of)),
)


def _lags(group: Iterable[ConsumerStats]) -> Mapping[Partition, int]:
    return {partition: lag for stats in group for partition, lag in stats.lag.items()}
