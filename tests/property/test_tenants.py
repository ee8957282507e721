"""A tenant's query never shows another tenant's events, whatever the filters (22)."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings, strategies

from soma_common.errors import TenantRequired
from soma_common.events.models import RecordedEvent
from soma_common.events.store import ALL_TENANTS, EventStore
from tests.core_support import event, opened

_names = strategies.sampled_from(["a", "b", "a:b", "%", "'", "A", "a ", "é"])
_events = strategies.lists(
    strategies.fixed_dictionaries(
        {
            "tenant_id": _names,
            "aggregate_id": _names,
            "aggregate_type": _names,
            "event_type": strategies.sampled_from(["x.a", "x.b"]),
            "correlation_id": _names,
            "service_id": _names,
        }
    ),
    min_size=1,
    max_size=12,
)
_filters = strategies.fixed_dictionaries(
    {},
    optional={
        "aggregate_id": _names,
        "aggregate_type": _names,
        "event_type": strategies.sampled_from(["x.a", "x.b"]),
        "correlation_id": _names,
        "service_id": _names,
        "since": strategies.integers(0, 12),
        "until": strategies.integers(0, 12),
        "newest_first": strategies.booleans(),
        "limit": strategies.integers(1, 20),
    },
)


def _matches(recorded: RecordedEvent, conditions: dict[str, Any]) -> bool:
    """The model: what a filter means, in plain Python."""
    for name, value in conditions.items():
        if name == "since" and recorded.timestamp < value:
            return False
        if name == "until" and recorded.timestamp >= value:
            return False
        if name not in ("since", "until") and getattr(recorded, name) != value:
            return False
    return True


async def _check(store: EventStore, batch: list[dict[str, Any]], filters: list[tuple[str, dict[str, Any]]]) -> None:
    run = f"{datetime.now(UTC).timestamp()}-"
    recorded = await store.publish([event(**(given | {"tenant_id": run + given["tenant_id"]})) for given in batch])
    others = {e.tenant_id for e in recorded}
    for tenant, conditions in filters:
        given = dict(conditions)
        limit, newest = given.pop("limit", 100), given.pop("newest_first", False)
        for name in ("since", "until"):
            if name in given:
                given[name] = recorded[given[name] % len(recorded)].timestamp + timedelta(microseconds=given[name] % 2)
        expected = [e for e in recorded if e.tenant_id == run + tenant and _matches(e, given)]
        expected.sort(key=lambda e: e.position, reverse=newest)
        page = await store.query(tenant_id=run + tenant, limit=limit, newest_first=newest, **given)
        assert list(page) == expected[:limit]
        assert {e.tenant_id for e in page} <= {run + tenant}
        everyone = await store.query(tenant_id=ALL_TENANTS, limit=10_000, **given)
        assert [e for e in everyone if e.tenant_id in others] == [e for e in recorded if _matches(e, given)]
        with pytest.raises(TenantRequired):
            await store.query(**given)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(_events, strategies.lists(strategies.tuples(_names, _filters), min_size=1, max_size=4))
def test_a_query_shows_one_tenant_only(
    soma_database: str, batch: list[dict[str, Any]], filters: list[tuple[str, dict[str, Any]]]
) -> None:
    async def run() -> None:
        async with opened(soma_database, size=2) as store:
            await _check(store, batch, filters)

    asyncio.run(run())
