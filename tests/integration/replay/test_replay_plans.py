"""Each filter of a replay is served by an index: its pages, and where its time range lies."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
import pytest

from soma_common.events.store import ALL_TENANTS
from soma_common.replay.models import ReplayFilter
from soma_common.replay.reading import bounds_query, counts_query, page_query
from tests.integration.test_plans import CUSTOM, ONE_ID, ROWS, filled, indexes, plan, server

__all__ = ["filled", "server"]  # the fixtures of that module

pytestmark = pytest.mark.xdist_group("plans")

SNAPSHOT = "1:900000000:"
PKEY = {"events_pkey"}
FILTERS = {
    "nothing": ({}, PKEY),
    "trace": ({"trace_id": ONE_ID}, {"events_trace_id_idx"}),
    "type": ({"event_type": "kind.n5"}, {"events_event_type_position_idx"}),
    "tenant": ({"tenant_id": "t5"}, {"events_tenant_id_position_idx"}),
    "aggregate": ({"aggregate_id": "a-5"}, {"events_stream_id_version_idx"}),
    "tenant_and_aggregate": ({"tenant_id": "t5", "aggregate_type": "default", "aggregate_id": "a-5"},
                             {"events_stream_id_version_idx", "events_tenant_id_position_idx"}),
    # One log is one service's, or a few services': the walk along the positions finds it at once.
    "service": ({"service_id": "svc"}, PKEY),
}  # fmt: skip


@pytest.mark.parametrize("name", FILTERS)
def test_a_page_of_each_filter_uses_an_index(filled: str, name: str) -> None:
    conditions, wanted = FILTERS[name]
    sql, args = page_query(ReplayFilter(**({"tenant_id": ALL_TENANTS} | conditions)), 0, ROWS, SNAPSHOT, 1000)
    used = _used(filled, sql, args)
    assert used
    assert used <= wanted


@pytest.mark.parametrize("name", ["nothing", "type", "tenant"])
def test_a_later_page_begins_at_its_position(filled: str, name: str) -> None:
    conditions, _ = FILTERS[name]
    sql, args = page_query(ReplayFilter(**({"tenant_id": ALL_TENANTS} | conditions)), 15_000, ROWS, SNAPSHOT, 100)
    with psycopg.connect(filled, autocommit=True) as connection:
        text = plan(connection, sql, args, CUSTOM)
    assert any('"position" >' in line for line in text.splitlines() if "Index Cond" in line), text
    assert name != "nothing" or "Sort" not in text, text  # the few that are left of a rare type may be sorted


def test_a_time_range_is_found_by_the_index_on_time(filled: str) -> None:
    """Not by walking the positions until the first event of the range comes."""
    recent = datetime.now(UTC) - timedelta(seconds=30)
    for times in ({"since": recent}, {"since": recent, "until": recent + timedelta(seconds=10)}):
        sql, args = bounds_query(times)
        assert _used(filled, sql, args) == {"events_timestamp_idx"}


def test_a_page_of_a_time_range_reads_between_its_positions(filled: str) -> None:
    recent = datetime.now(UTC) - timedelta(seconds=30)
    sql, args = page_query(ReplayFilter(tenant_id=ALL_TENANTS, since=recent), ROWS - 200, ROWS, SNAPSHOT, 100)
    with psycopg.connect(filled, autocommit=True) as connection:
        text = plan(connection, sql, args, CUSTOM)
    assert indexes(text) <= {"events_pkey", "events_timestamp_idx"}, text
    assert "Seq Scan on events_p0" not in text, text


@pytest.mark.parametrize("name", ["trace", "type", "tenant", "aggregate"])
def test_the_counts_of_a_plan_use_the_filters_index(filled: str, name: str) -> None:
    conditions, wanted = FILTERS[name]
    sql, args = counts_query(ReplayFilter(**({"tenant_id": ALL_TENANTS} | conditions)), 0, ROWS, SNAPSHOT, 1)
    used = {index for index in _used(filled, sql, args) if index.startswith("events_")}
    assert used
    assert used <= wanted


def _used(dsn: str, sql: str, args: list[Any]) -> set[str]:
    with psycopg.connect(dsn, autocommit=True) as connection:
        text = plan(connection, sql, args, CUSTOM)
    assert "Seq Scan on events_p0" not in text, text
    return indexes(text) - {"streams_aggregate_idx"}
