"""The statements of retention use the indexes meant for them, on tables with many rows."""

from __future__ import annotations

from typing import Any

import psycopg
import pytest

from soma_common.events.rows import SELECT
from soma_common.sql.loader import blocks
from tests.integration.test_plans import CUSTOM, GENERIC, ROWS, filled, indexes, plan, server

__all__ = ["filled", "server"]  # the fixtures of that module

pytestmark = pytest.mark.xdist_group("plans")

SQL = blocks("retention")
OLD = "2001-01-01"
FILL = """
INSERT INTO soma.idempotency_keys
SELECT 't', 'k' || n, gen_random_uuid(), timestamptz '2000-01-01' + n * interval '1 minute' FROM generate_series(1, 50000) n;
INSERT INTO soma.inbox_keys
SELECT 'k' || n, 1, 't', 's', timestamptz '2000-01-01' + n * interval '1 minute' FROM generate_series(1, 50000) n;
INSERT INTO soma.dead_letters (letter_id, consumer_id, sequence, status, topic, partition, record_offset, header_names,
    header_values, digest, attempts, automatic_left, parked_at, changed_at)
SELECT gen_random_uuid(), 1, 'k', (ARRAY['dead', 'resolved', 'discarded', 'blocked'])[n % 4 + 1],
    't', 0, n, '{}', '{}', sha256('x'), 1, 0, now(), timestamptz '2000-01-01' + n * interval '1 hour'
FROM generate_series(1, 20000) n;
INSERT INTO soma.dead_letter_history (letter_id, at, who, what) SELECT letter_id, now(), 'w', 'dead' FROM soma.dead_letters;
"""


@pytest.fixture
def beside(soma_database: str) -> Any:
    with psycopg.connect(soma_database, autocommit=True) as connection:
        connection.prepare_threshold = None
        connection.execute("INSERT INTO soma.consumers (name) VALUES ('billing')")
        connection.execute(FILL)
        connection.execute(
            "VACUUM ANALYZE soma.idempotency_keys, soma.inbox_keys, soma.dead_letters, soma.dead_letter_history"
        )
        yield connection


@pytest.mark.parametrize("mode", [CUSTOM, GENERIC])
def test_keys_are_found_by_time_and_deleted_by_place(beside: Any, mode: str) -> None:
    for table, index in (
        ("inbox_keys", "inbox_keys_applied_idx"),
        ("idempotency_keys", "idempotency_keys_recorded_idx"),
    ):
        text = plan(beside, SQL[f"old_{table}"], ["2000-01-02", 50_000], mode)
        assert indexes(text) == {index}, text
        text = plan(beside, SQL[f"delete_{table}"], [['"(0,1)"', '"(0,2)"'], OLD], mode)
        assert "Tid Scan" in text, text
        assert "Seq Scan" not in text, text


@pytest.mark.parametrize("mode", [CUSTOM, GENERIC])
def test_letters_are_found_by_the_time_of_their_end(beside: Any, mode: str) -> None:
    text = plan(beside, SQL["delete_letters"], [OLD, 1000], mode)
    assert indexes(text) == {"dead_letters_settled_idx", "dead_letters_pkey", "dead_letter_history_pkey"}, text
    assert "Seq Scan" not in text, text
    assert "Sort" not in text, text


def test_the_types_of_a_partition_are_leaped_over(filled: str) -> None:
    with psycopg.connect(filled, autocommit=True) as connection:
        text = plan(connection, SQL["types"], [0, 5_000_000], CUSTOM)
        assert indexes(text) == {"events_event_type_position_idx"}, text
        assert "Sort" not in text, text
        assert "p5000000" not in text, text
        types = connection.execute(SQL["types"].replace("$1", "0").replace("$2", "5000000")).fetchall()
        assert len(types) == 200


def test_a_page_of_an_export_walks_along_its_partition(filled: str) -> None:
    with psycopg.connect(filled, autocommit=True) as connection:
        for types in (None, ["kind.n5", "kind.n6"]):
            text = plan(connection, SELECT + SQL["page"], [ROWS // 2, 5_000_000, types, 1000], CUSTOM)
            assert indexes(text) <= {"events_pkey", "events_event_type_position_idx"}, text
            assert "Seq Scan" not in text, text
            assert "p5000000" not in text, text
            text = plan(connection, SQL["reach"], [ROWS // 2, 5_000_000, types, 1000, 8_000_000], CUSTOM)
            assert indexes(text) <= {"events_pkey", "events_event_type_position_idx"}, text
            assert "Seq Scan" not in text, text
            assert "p5000000" not in text, text


def test_the_last_stamp_of_a_range_of_ids_is_found_by_id(filled: str) -> None:
    with psycopg.connect(filled, autocommit=True) as connection:
        args = ["01900000-0000-0000-0000-000000000000", "01900000-ffff-0000-0000-000000000000"]
        text = plan(connection, SQL["latest"], args, CUSTOM)
        assert indexes(text) == {"events_event_id_idx"}, text


def test_batches_that_thin_a_partition_use_the_index_on_types(filled: str) -> None:
    with psycopg.connect(filled, autocommit=True) as connection:
        sql = (
            "DELETE FROM soma.events_p0 WHERE position = ANY (ARRAY(SELECT e.position FROM soma.events_p0 e "
            "WHERE e.event_type = $1 AND e.position > $2::bigint ORDER BY e.position LIMIT $3::integer))"
        )
        for mode in (CUSTOM, GENERIC):
            text = plan(connection, sql, ["kind.n5", 0, 1000], mode)
            assert indexes(text) == {"events_event_type_position_idx", "events_pkey"}, text
            assert "Sort" not in text, text
