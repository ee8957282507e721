"""The statements of a rebuild use the indexes meant for them: those of each page, and those under the swap's lock."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import psycopg
import pytest

from soma_common.sql.loader import blocks

GENERIC, CUSTOM = "force_generic_plan", "force_custom_plan"
ID = "00000000-0000-7000-8000-000000000000"
FILL = """
INSERT INTO soma.consumers (name) SELECT 'c' || n FROM generate_series(1, 200) n;
INSERT INTO soma.inbox SELECT gen_random_uuid(), n % 5 + 1, 't', 's' FROM generate_series(1, 20000) n;
INSERT INTO soma.inbox_keys SELECT 'k' || n, n % 5 + 1, 't', 's', now() FROM generate_series(1, 20000) n;
INSERT INTO soma.dead_letters (letter_id, consumer_id, sequence, status, topic, partition, record_offset, header_names,
    header_values, digest, event_id, attempts, automatic_left, parked_at, changed_at)
SELECT gen_random_uuid(), 1, 'k', (ARRAY['dead', 'resolved'])[n % 2 + 1], 't', 0, n, '{}', '{}', sha256('x'),
    CASE WHEN n % 10 > 0 THEN gen_random_uuid() END, 1, 0, now(), now()
FROM generate_series(1, 20000) n;
INSERT INTO soma.replays (run_id, consumer_id, inbox_id, mode, source, filter, end_tick, end_token, first_position,
    last_position, requested_by, reason, created_at)
SELECT gen_random_uuid(), 1, 7, 'rebuild', 'log', '{}', 0, 0, 1, 1, '', '', now() FROM generate_series(1, 50);
INSERT INTO soma.replay_held SELECT (SELECT run_id FROM soma.replays LIMIT 1), letter_id FROM soma.dead_letters LIMIT 500;
INSERT INTO soma.shards (reader, shard) SELECT 'r' || n, 0 FROM generate_series(1, 300) n;
"""
EVENTS = {"inbox_first_pkey", "inbox_keys_pkey"}
STATEMENTS: dict[str, tuple[list[Any], set[str]]] = {
    "letters": ([ID, 1, [ID], ["t"], [0], [5], 500],
                {"dead_letters_event_idx", "dead_letters_record_key", "replay_held_pkey", "dead_letters_pkey"}),
    "known": ([1, [ID], ["t"], ["s"], ["k"]], EVENTS),
    "clean_inbox_page": ([ID, 1000], {"inbox_first_pkey"}),
}  # fmt: skip
# What functions of the migration run.
INSIDE = {
    "clean_inbox_page": "SELECT i.event_id FROM soma.inbox i WHERE i.event_id > $1::uuid ORDER BY i.event_id LIMIT $2::int",
}


@pytest.fixture
def filled(soma_database: str) -> Iterator[Any]:
    with psycopg.connect(soma_database, autocommit=True) as connection:
        connection.prepare_threshold = None  # it would prepare by itself what DEALLOCATE ALL forgets
        connection.execute(FILL)
        connection.execute(
            "VACUUM ANALYZE soma.dead_letters, soma.inbox, soma.inbox_keys, soma.consumers, soma.replay_held, soma.replays"
        )
        yield connection


def plan(connection: Any, sql: str, args: Sequence[Any], mode: str) -> str:
    connection.execute("DEALLOCATE ALL")
    connection.execute(f"SET plan_cache_mode = {mode}")
    connection.execute(f"PREPARE q AS {sql}", prepare=False)
    given = ", ".join("'" + str(a).replace("[", "{").replace("]", "}").replace("'", "") + "'" for a in args)
    return "\n".join(row[0] for row in connection.execute(f"EXPLAIN (COSTS OFF) EXECUTE q ({given})", prepare=False))


@pytest.mark.parametrize("mode", [GENERIC, CUSTOM])
def test_the_statements_of_a_rebuild(filled: Any, mode: str) -> None:
    for name, (args, wanted) in STATEMENTS.items():
        text = plan(filled, INSIDE.get(name) or blocks("rebuilds")[name], args, mode)
        used = set(re.findall(r"(?:Index (?:Only )?Scan(?: Backward)? using|Bitmap Index Scan on) (\S+)", text))
        assert used & wanted, (name, text)
        for table in ("dead_letters", "inbox_first", "inbox_keys"):
            assert f"Seq Scan on {table}" not in text, (name, text)
