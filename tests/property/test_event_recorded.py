"""Every field of an event survives the log (22.1); event, outbox row and the caller's write share one fate (22.2)."""

from __future__ import annotations

import asyncio
from datetime import datetime
from typing import Any

import orjson
from hypothesis import HealthCheck, assume, given, settings, strategies

from soma_common.events.codec import JsonCodec
from soma_common.events.models import RecordedEvent
from soma_common.tracing.context import TraceContext
from tests.core_support import connected, event, opened

_text = strategies.text(strategies.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), min_size=1, max_size=40)
_json = strategies.recursive(
    strategies.none()
    | strategies.booleans()
    | strategies.integers(-(2**63), 2**64 - 1)
    | strategies.floats(allow_nan=False, allow_infinity=False)
    | strategies.text(strategies.characters(codec="utf-8", exclude_characters="\0"), max_size=20),
    lambda inner: strategies.lists(inner, max_size=4) | strategies.dictionaries(_text, inner, max_size=4),
    max_leaves=12,
)
_fields = strategies.fixed_dictionaries(
    {
        "tenant_id": _text,
        "aggregate_type": _text,
        "aggregate_id": _text,
        "payload": strategies.dictionaries(_text, _json, max_size=5),
    },
    optional={
        "correlation_id": _text,
        "causation_id": _text,
        "service_id": _text,
        "metadata": strategies.dictionaries(_text, _json, max_size=3),
        "baggage": _text,
        "schema_version": strategies.integers(1, 2**31 - 1),
        "trace": strategies.builds(
            TraceContext,
            strategies.integers(1, 2**128 - 1).map(lambda n: f"{n:032x}"),
            strategies.integers(1, 2**64 - 1).map(lambda n: f"{n:016x}"),
            strategies.integers(0, 255),
            strategies.none() | strategies.just("vendor=1"),
        ),
        "occurred_at": strategies.datetimes(
            min_value=datetime(1, 1, 3), max_value=datetime(9999, 12, 29), timezones=strategies.timezones()
        ),
    },
)
REQUIRED = (
    "event_id", "trace_id", "correlation_id", "service_id", "tenant_id", "timestamp", "event_type", "payload",
    "metadata",
)  # fmt: skip


async def _record(dsn: str, batch: list[dict[str, Any]]) -> None:
    async with opened(dsn, size=2) as store:
        given = [event(**fields) for fields in batch]
        published = await store.publish(given)
        for one, recorded in zip(given, published, strict=True):
            [read] = await store.query(tenant_id=one.tenant_id, event_id=one.event_id)
            assert read == recorded
            assert all(getattr(read, name) is not None for name in REQUIRED)
            for name in ("tenant_id", "aggregate_id", "aggregate_type", "correlation_id", "causation_id", "payload",
                         "metadata", "baggage", "occurred_at"):  # fmt: skip
                assert getattr(read, name) == getattr(one, name), name
            assert read.service_id == (one.service_id or "svc")
            [row] = await store.pool.fetch("SELECT value, version, key_hash FROM soma.outbox WHERE event_id = $1",
                                           one.event_id)  # fmt: skip
            assert _as_sent(JsonCodec().decode(row[0])) == _as_sent(read)
            assert row[1] == read.version


def _as_sent(recorded: RecordedEvent) -> dict[str, Any]:
    """What the bytes can know: not the position, version and time that the database gave."""
    names = [name for name in RecordedEvent.__slots__ if name not in ("version", "position", "recorded_at")]
    return {name: getattr(recorded, name) for name in names}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(strategies.lists(_fields, min_size=1, max_size=4))
def test_every_field_survives(soma_database: str, batch: list[dict[str, Any]]) -> None:
    assume(all(len(orjson.dumps(fields["payload"])) < 100_000 for fields in batch))
    asyncio.run(_record(soma_database, batch))


async def _share(dsn: str, plan: list[tuple[bool, int]]) -> None:
    async with opened(dsn, size=2) as store, connected(dsn) as mine:
        await mine.execute("CREATE TABLE IF NOT EXISTS effects (event_id uuid)")
        for commits, count in plan:
            transaction = mine.transaction()
            await transaction.start()
            published = await store.publish([event(str(n)) for n in range(count)], tx=mine)
            await mine.executemany("INSERT INTO effects VALUES ($1)", [(e.event_id,) for e in published])
            await (transaction.commit() if commits else transaction.rollback())
            ids = [e.event_id for e in published]
            for table in ("soma.events", "soma.outbox", "effects"):
                found = await mine.fetchval(f"SELECT count(*) FROM {table} WHERE event_id = ANY($1)", ids)
                assert found == (count if commits else 0), table


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(strategies.lists(strategies.tuples(strategies.booleans(), strategies.integers(1, 5)), min_size=1, max_size=6))
def test_event_outbox_row_and_effect_share_one_fate(soma_database: str, plan: list[tuple[bool, int]]) -> None:
    asyncio.run(_share(soma_database, plan))
