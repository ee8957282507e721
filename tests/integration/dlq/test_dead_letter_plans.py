"""The statements about dead letters use the indexes meant for them, with many letters and with generic plans."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import psycopg
import pytest

from soma_common.dlq.filters import LetterFilter
from soma_common.dlq.rows import FULL_LETTERS
from soma_common.dlq.verbs import compose
from soma_common.events.store import ALL_TENANTS
from soma_common.sql.loader import blocks

GENERIC, CUSTOM = "force_generic_plan", "force_custom_plan"
UUID_ = "00000000-0000-7000-8000-000000000000"
FILL = """
INSERT INTO soma.consumers (name) VALUES ('billing');
INSERT INTO soma.dead_letters (letter_id, consumer_id, sequence, status, topic, partition, record_offset, header_names,
    header_values, digest, event_id, tenant_id, fingerprint, attempts, automatic_left, parked_at, changed_at, trace_id)
SELECT gen_random_uuid(), 1, convert_to('k' || n % 4000, 'UTF8'), (ARRAY['dead', 'resolved', 'resolved', 'blocked'])[n % 4 + 1],
    't', 0, n, '{}', '{}', sha256('x'), gen_random_uuid(), 't' || n % 300, 'f' || n % 200, 1, 0, now(), now(),
    gen_random_uuid()
FROM generate_series(1, 20000) n;
INSERT INTO soma.dead_sequences (consumer_id, sequence, next_at, opened_at)
SELECT 1, convert_to('k' || n, 'UTF8'), CASE WHEN n % 20 = 0 THEN now() + n * interval '1 second' END, now()
FROM generate_series(1, 4000) n;
"""


@pytest.fixture
def filled(soma_database: str) -> Any:
    with psycopg.connect(soma_database, autocommit=True) as connection:
        connection.prepare_threshold = None  # it would prepare by itself what DEALLOCATE ALL forgets
        connection.execute(FILL)
        connection.execute("VACUUM ANALYZE soma.dead_letters, soma.dead_sequences")
        yield connection


def plan(connection: Any, sql: str, args: Sequence[Any], mode: str) -> str:
    connection.execute("DEALLOCATE ALL")
    connection.execute(f"SET plan_cache_mode = {mode}")
    connection.execute(f"PREPARE q AS {sql}", prepare=False)
    call = "q" if not args else "q ({})"
    given = ", ".join(
        "NULL" if a is None else "'" + str(a).replace("[", "{").replace("]", "}").replace("'", "") + "'" for a in args
    )
    return "\n".join(
        row[0] for row in connection.execute(f"EXPLAIN (COSTS OFF) EXECUTE {call.format(given)}", prepare=False)
    )


def indexes(text: str) -> set[str]:
    return set(re.findall(r"(?:Index (?:Only )?Scan(?: Backward)? using|Bitmap Index Scan on) (\S+)", text))


def test_the_hot_statements(filled: Any) -> None:
    sql = blocks("dead_letters")
    of_sequence = {"dead_letters_open_idx", "dead_sequences_pkey", "consumers_pkey"}
    statements: dict[str, tuple[str, list[Any], set[str]]] = {
        "lock_open": (sql["lock_open"], [1, r"{\\x6b31}"], {"dead_sequences_pkey"}),
        "lease_due": (sql["lease_due"], [1, 1, "w", 30], {"dead_sequences_due_idx", "dead_sequences_pkey"}),
        "renew_lease": (sql["renew_lease"], [1, r"\x6b31", UUID_, 30], {"dead_sequences_pkey"}),
        "of_lease": (FULL_LETTERS + sql["of_lease"], [1, r"\x6b31", UUID_, 100, 10**7], of_sequence),
        "by_id": (FULL_LETTERS + sql["by_id"], [UUID_], {"dead_letters_pkey", "consumers_pkey"}),
        "history": (sql["history"], [UUID_], {"dead_letter_history_pkey"}),
        "gauges": (sql["gauges"], [], {"dead_letters_gauge_idx", "consumers_pkey"}),
        "exists": (sql["exists"], ["billing", "t", 0, 5, r"\x00"],
                   {"dead_letters_record_key", "consumers_name_key"}),
        "outcomes": (sql["outcomes"], ["{" + UUID_ + "}"], {"dead_letters_pkey", "dead_sequences_pkey"}),
        # The statements inside the functions.
        "look": (("SELECT array_agg(s.number) FROM unnest($1::bytea[]) WITH ORDINALITY AS s (sequence, number) "
                 "JOIN soma.dead_sequences d ON d.consumer_id = $2::integer AND d.sequence = s.sequence"),
                 [r"{\\x6b31}", 1], {"dead_sequences_pkey"}),
        "head": (("SELECT l.status FROM soma.dead_letters l WHERE l.consumer_id = $1::integer AND l.sequence = $2::bytea "
                 "AND l.status IN ('retrying', 'blocked', 'dead', 'redriving') ORDER BY l.place LIMIT 1"),
                 [1, r"\x6b31"], {"dead_letters_open_idx"}),
        "mark": (("UPDATE soma.dead_letters l SET status = 'redriving' WHERE l.consumer_id = $1::integer "
                 "AND l.sequence = $2::bytea AND l.status IN ('dead', 'retrying')"),
                 [1, r"\x6b31"], {"dead_letters_open_idx"}),
    }  # fmt: skip
    for name, (statement, args, wanted) in statements.items():
        for mode in (CUSTOM, GENERIC):
            text = plan(filled, statement, args, mode)
            assert indexes(text) <= wanted, f"{name}: {text}"
            assert indexes(text), f"{name}: {text}"
            assert "Seq Scan on dead_" not in text, f"{name}: {text}"


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({}, "dead_letters_place_idx"),
        ({"tenant_id": "t5"}, "dead_letters_tenant_idx"),
        ({"fingerprint": "f5"}, "dead_letters_fingerprint_idx"),
        ({"event_id": UUID_}, "dead_letters_event_idx"),
        ({"trace_id": UUID_}, "dead_letters_trace_idx"),
    ],
)
def test_the_filters_of_list(filled: Any, given: dict[str, Any], wanted: str) -> None:
    sql, args = compose(LetterFilter(**({"tenant_id": ALL_TENANTS} | given)), 5000, 101)
    text = plan(filled, sql, args, CUSTOM)  # Pool.fetch_planned sees to that
    assert wanted in indexes(text), text
    assert "Seq Scan on dead_letters" not in text, text


def test_a_status_is_read_in_order_without_sorting_everything(filled: Any) -> None:
    sql, args = compose(LetterFilter(tenant_id=ALL_TENANTS, statuses="dead"), 0, 101)
    text = plan(filled, sql, args, CUSTOM)
    assert indexes(text) & {"dead_letters_status_idx", "dead_letters_place_idx"}, text
    assert "Seq Scan on dead_letters" not in text, text
