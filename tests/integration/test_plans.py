"""The hot queries use the indexes meant for them, with generic and custom plans, fresh and stale statistics."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import psycopg
import pytest

from soma_common import sync
from soma_common.events.rows import SELECT
from soma_common.events.store import _compose
from soma_common.postgres.migrate import upgrade
from soma_common.sql.loader import blocks
from soma_common.tracing.context import TraceContext
from tests.core_support import FakeClock, Reader, connected, event, opened, settings

pytestmark = pytest.mark.xdist_group("plans")  # one worker, so that what they share is made once

ROWS, BATCH = 20_000, 1000
GENERIC, CUSTOM = "force_generic_plan", "force_custom_plan"


@pytest.fixture(scope="module")
def server(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue("soma_postgres")


@pytest.fixture(scope="module")
def filled(server: Any) -> Iterator[str]:
    """A log with 20,000 events of an hour: 400 tenants, 2,000 streams, 200 types."""
    name = f"soma_plans_{uuid4().hex[:12]}"
    dsn = server.sql.create_database(name)
    asyncio.run(upgrade(dsn))
    clock = FakeClock()
    store = sync.EventStore(settings(clock=clock))
    traces = [TraceContext.new() for _ in range(ROWS // 4)]
    with psycopg.connect(dsn, autocommit=True) as connection:
        for start in range(0, ROWS, BATCH):
            clock.offset = timedelta(seconds=(start - ROWS) / 5)
            numbers = range(start, start + BATCH)
            store.publish(
                [event(f"a-{n % 2000}", tenant_id=f"t{n % 400}", event_type=f"kind.n{n % 200}",
                       correlation_id=f"c-{n // 3}", trace=traces[n // 4]) for n in numbers], connection,
            )  # fmt: skip
        connection.execute("VACUUM ANALYZE soma.events, soma.outbox, soma.streams")
    yield dsn
    server.sql.drop_database(name)


def plan(connection: Any, sql: str, args: Sequence[Any], mode: str) -> str:
    """The plan of a prepared statement with these arguments."""
    connection.execute("DEALLOCATE ALL")
    connection.execute(f"SET plan_cache_mode = {mode}")
    connection.execute(f"PREPARE q AS {sql}", prepare=False)
    given = f"({', '.join(map(_literal, args))})" if args else ""
    rows = connection.execute(f"EXPLAIN (COSTS OFF) EXECUTE q {given}", prepare=False)
    return "\n".join(row[0] for row in rows)


def _literal(value: Any) -> str:
    if isinstance(value, list):
        return "'{" + ",".join(map(str, value)) + "}'"
    return "NULL" if value is None else "'" + str(value).replace("'", "''") + "'"


def indexes(text: str) -> set[str]:
    """The parents' names of the indexes that a plan scans."""
    found = re.findall(r"(?:Index (?:Only )?Scan(?: Backward)? using|Bitmap Index Scan on) (\S+)", text)
    return {re.sub(r"_p\d+_", "_", name) for name in found}


ONE_ID = "00000000-0000-7000-8000-000000000000"
RECENT = datetime.now(UTC) - timedelta(seconds=30)
QUERIES = {
    "event_id": ({"event_id": ONE_ID}, {"events_event_id_idx"}),
    "trace_id": ({"trace_id": ONE_ID}, {"events_trace_id_idx"}),
    "correlation_id": ({"correlation_id": "c-5"}, {"events_correlation_id_idx"}),
    "tenant_id": ({"tenant_id": "t5"}, {"events_tenant_id_position_idx"}),
    "tenant_and_type": ({"tenant_id": "t5", "event_type": "kind.n5"}, {"events_event_type_position_idx",
                                                                        "events_tenant_id_position_idx"}),
    "event_type": ({"event_type": "kind.n5"}, {"events_event_type_position_idx"}),
    "aggregate_id": ({"aggregate_id": "a-5"}, {"events_stream_id_version_idx"}),
    "tenant_and_aggregate": ({"tenant_id": "t5", "aggregate_id": "a-5"},
                             {"events_stream_id_version_idx", "events_tenant_id_position_idx"}),
    "everything": ({}, {"events_pkey"}),
    "service_id": ({"service_id": "svc"}, {"events_pkey"}),
}  # fmt: skip


@pytest.mark.parametrize("name", QUERIES)
@pytest.mark.parametrize("order", ["oldest_first", "newest_first"])
def test_each_filter_of_query_uses_an_index(filled: str, name: str, order: str) -> None:
    conditions, wanted = QUERIES[name]
    sql, args = _compose(dict(conditions), order, 101)
    with psycopg.connect(filled, autocommit=True) as connection:
        text = plan(connection, sql, args, CUSTOM)  # Pool.fetch_planned sees to that
        used = indexes(text) - {"streams_aggregate_idx"}
        assert used, text
        assert used <= wanted, text
        assert "Seq Scan on events_p0" not in text, text


@pytest.mark.parametrize("after", ["after", "before"])
def test_later_pages_begin_where_the_last_one_ended(filled: str, after: str) -> None:
    order = "oldest_first" if after == "after" else "newest_first"
    with psycopg.connect(filled, autocommit=True) as connection:
        for conditions in ({}, {"tenant_id": "t5"}, {"event_type": "kind.n5"}):
            sql, args = _compose(conditions | {after: 15_000}, order, 101)
            text = plan(connection, sql, args, CUSTOM)
            condition = '"position" ' + (">" if after == "after" else "<")
            assert any(condition in line for line in text.splitlines() if "Index Cond" in line), text


def test_a_time_range_uses_the_index_on_time(filled: str) -> None:
    sql, args = _compose({"since": RECENT, "until": RECENT + timedelta(seconds=5)}, "oldest_first", 101)
    with psycopg.connect(filled, autocommit=True) as connection:
        text = plan(connection, sql, args, CUSTOM)
        assert indexes(text) <= {"events_timestamp_idx", "events_pkey"}, text
        assert "Seq Scan on events_p0" not in text, text


def test_a_stream_is_read_by_its_index(filled: str) -> None:
    with psycopg.connect(filled, autocommit=True) as connection:
        for mode in (CUSTOM, GENERIC):
            text = plan(connection, SELECT + blocks("store")["stream"], ["t5", "default", "a-5", 1, 100], mode)
            assert "events_stream_id_version_idx" in indexes(text), text
            assert indexes(text) <= {"events_stream_id_version_idx", "streams_pkey", "streams_aggregate_idx"}, text


def test_the_log_is_paged_by_position(filled: str) -> None:
    """Not by transaction id: that would read all that is newer, and sort it, for each page."""
    with psycopg.connect(filled, autocommit=True) as connection:
        for low, high in ((0, ROWS), (ROWS - 100, ROWS), (5000, 5100)):
            args = [low, high, "1", "1:900000000:", 1000, None, 0]
            for mode in (CUSTOM, GENERIC):
                text = plan(connection, SELECT + blocks("store")["log_page"], args, mode)
                assert indexes(text) == {"events_pkey"}, text
                assert "Sort" not in text, text


def test_stragglers_are_found_by_transaction_id(filled: str) -> None:
    with psycopg.connect(filled, autocommit=True) as connection:
        for mode in (CUSTOM, GENERIC):
            args = [["800", "801", "802"], 0, ROWS, 1000, None, 0]
            text = plan(connection, SELECT + blocks("store")["log_stragglers"], args, mode)
            assert indexes(text) == {"events_xid_idx"}, text


def test_a_consumer_reads_its_shards_along_the_same_indexes(filled: str) -> None:
    sql = blocks("consumer")
    page = [0, ROWS, "1", "1:900000000:", 1000, 7, [1, 3, 5], "consumer:c", 0]
    late = [["800", "801", "802"], 0, ROWS, 1000, 7, [1, 3, 5], "consumer:c", 0]
    with psycopg.connect(filled, autocommit=True) as connection:
        for mode in (CUSTOM, GENERIC):
            text = plan(connection, SELECT + sql["log_page"], page, mode)
            assert indexes(text) == {"events_pkey"}, text
            assert "Sort" not in text, text
            text = plan(connection, SELECT + sql["log_stragglers"], late, mode)
            assert indexes(text) == {"events_xid_idx"}, text


def test_the_appends_own_statements_use_keys(filled: str) -> None:
    """What soma.append looks up besides inserting: the stream, keys given by callers, events by id."""
    statements = {
        "UPDATE soma.streams SET version = version WHERE tenant_id = $1 AND aggregate_type = $2 AND aggregate_id = $3":
            (["t5", "default", "a-5"], "streams_pkey"),
        "SELECT r.position FROM unnest($1::uuid[]) AS e (id) JOIN soma.events r ON r.event_id = e.id":
            ([[ONE_ID]], "events_event_id_idx"),
        "SELECT event_id FROM soma.events WHERE event_id = ANY ($1::uuid[])": ([[ONE_ID]], "events_event_id_idx"),
    }  # fmt: skip
    with psycopg.connect(filled, autocommit=True) as connection:
        for sql, (args, wanted) in statements.items():
            for mode in (CUSTOM, GENERIC):
                text = plan(connection, sql, args, mode)
                assert indexes(text) & {wanted, "streams_aggregate_idx"}, text
                assert "Filter: (tenant_id" not in text.replace("((", "("), text  # the whole key is looked up


@pytest.mark.parametrize("mode", [CUSTOM, GENERIC])
async def test_a_hundred_and_twenty_partitions_with_stale_statistics(soma_database: str, mode: str) -> None:
    """Whatever the planner believes, a page reads the partitions it needs, and every event comes once, in order."""
    session = {"plan_cache_mode": mode}
    async with opened(soma_database, session=session) as store, connected(soma_database) as slow:
        await store.pool.fetch("SELECT setval('soma.event_position', 5000000)")
        await store.publish([event(str(n)) for n in range(30)])
        await store.pool.fetch("ANALYZE soma.events")  # the last time that anybody looked
        reader = Reader(store)
        await reader.drain()
        transaction = slow.transaction()
        await transaction.start()
        await store.publish([event(f"slow-{n}") for n in range(10)], tx=slow)
        await reader.drain()
        count = 40
        while True:
            made = (await store.pool.fetch("SELECT soma.maintain_events(50)"))[0][0]
            parts = await store.pool.fetch("SELECT count(*) FROM pg_inherits WHERE inhparent = 'soma.events'::regclass")
            if parts[0][0] >= 120:
                break
            assert made or count
            await store.publish([event(str(n)) for n in range(200)])
            count += 200
            if transaction is not None:
                await transaction.commit()
                transaction = None
        tick = await store.ticks.latest()
        diff = await store.ticks.next_diff(reader.cursor, tick)
        assert diff is not None
        args = [
            tick.position_after - 60,
            tick.position_after,
            diff.base.xmax,
            tick.snapshot,
            1000,
            None,
            diff.base.tick_id,
        ]
        with psycopg.connect(soma_database, autocommit=True) as connection:
            text = plan(connection, SELECT + blocks("store")["log_page"], args, mode)
        scanned = text.count("Index Scan") + text.count("Seq Scan") + text.count("Bitmap Heap Scan")
        assert scanned <= 4, text
        assert "Seq Scan" not in text, text
        await reader.drain(limit=333)
        assert len(reader.seen) == len({e.event_id for e in reader.seen}) == count
        for name in {e.aggregate_id for e in reader.seen}:
            versions = [e.version for e in reader.seen if e.aggregate_id == name]
            assert versions == list(range(1, len(versions) + 1))
