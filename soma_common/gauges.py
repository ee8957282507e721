"""How the sagas, replays and archives of a whole database stand, read now and then."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from soma_common.counting import Counted
from soma_common.health import Metric
from soma_common.postgres.pool import Pool
from soma_common.sql.loader import blocks

Rows = Sequence[Sequence[Any]]


class DatabaseGauges(Counted):
    """Knows what was counted last, as far as this role may see it."""

    def __init__(self, pool: Pool, *, every: float = 15.0) -> None:
        super().__init__("Sagas and replays", every=every)
        self._pool = pool
        self._found: dict[str, Rows] = {}

    async def count(self) -> None:
        """Count now."""
        self._found = {
            name: await self._pool.fetch(blocks("gauges")[name]) for name in ("sagas", "replays", "archives")
        }
        self.counted()

    def metrics(self) -> Iterator[Metric]:
        """What was counted last; nothing before the first count."""
        since = self.since
        if since is not None:
            yield from database_metrics(self._found, since)


def database_metrics(found: dict[str, Rows], since: float) -> Iterator[Metric]:
    """What ``sql/gauges.sql`` found ``since`` seconds ago. A saga that goes on ageing does so here as well."""
    for name, status, count, _ in found["sagas"]:
        yield Metric(
            "soma_sagas", "gauge", "Sagas that have not ended.", float(count), {"saga": name, "status": status}
        )
    for name, status, _, late in found["sagas"]:
        if status != "stuck":
            late = late + since if late > 0 else 0.0
            labels = {"saga": name, "status": status}
            yield Metric("soma_sagas_late_seconds", "gauge", "How long the oldest due saga waits.", float(late), labels)
    for consumer, state, count, _ in found["replays"]:
        labels = {"consumer": consumer, "state": state}
        yield Metric("soma_replays", "gauge", "Replays that are open, or failed within a day.", float(count), labels)
    for consumer, state, _, silent in found["replays"]:
        if state == "running":
            labels, late = {"consumer": consumer}, float(silent + since if silent > 0 else 0.0)
            yield Metric(
                "soma_replays_silent_seconds", "gauge", "Since the lease of a running replay ended.", late, labels
            )
    for state, count, events in found["archives"]:
        labels = {"state": state}
        yield Metric("soma_archives", "gauge", "Archives by what became of their events.", float(count), labels)
        yield Metric("soma_archived_events", "gauge", "Events in them.", float(events), labels)
    yield Metric("soma_database_counted_seconds", "gauge", "Since sagas, replays and archives were counted.", since)
