"""Bad input: refused by the library before anything is sent, and by the database whoever sends it."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal
from typing import Any
from uuid import uuid4

import psycopg
import pytest
from pydantic import BaseModel

from soma_common import sync
from soma_common.errors import EventTooLarge, PayloadInvalid, ValidationError
from soma_common.events.append import Stamps, append_steps
from soma_common.events.payloads import Payload, PayloadModels
from soma_common.postgres.errors import translated
from soma_common.postgres.migrate import upgrade
from soma_common.testing.lane.sql_tools import SqlTools
from soma_common.tracing.context import TraceContext
from tests.core_support import connected, event, opened, settings


class Ordered(Payload, event_type="order.placed"):
    """A typed payload."""

    n: int
    price: float = 1.0


class Inner(BaseModel):
    """A model that allows NaN."""

    x: float


@dataclass
class Plain:
    """Not a model at all."""

    x: float


MODELS = PayloadModels(Ordered)

PAYLOADS: list[tuple[Any, str]] = [
    ({"a": "nul\0"}, "NUL"),
    ({"nul\0": 1}, "NUL"),
    ({"a": [1, {"b": math.nan}]}, r"nan at \.a\[1\]\.b"),
    ({"a": math.inf}, "inf"),
    ({"a": -math.inf}, "-inf"),
    ({"a": Plain(x=math.inf)}, r"inf at \.a\.x"),
    ({"a": "\ud800"}, "cannot be written"),
    ({"\udfff": 1}, "cannot be written"),
    ({"a": 2**64}, r"beyond 64 bits at \.a"),
    ({"a": [-(2**63) - 1]}, "beyond 64 bits"),
    ({"a": 10**500}, "beyond 64 bits"),
    ({"a": object()}, "cannot be written"),
    ({"a": b"\xff"}, "cannot be written"),
    ([1, 2], "not an object"),
    ("text", "not an object"),
    (None, "not an object"),
]


@pytest.mark.parametrize(("payload", "message"), PAYLOADS, ids=range(len(PAYLOADS)))
async def test_payloads_that_cannot_be_kept(payload: Any, message: str) -> None:
    for given in ({"payload": payload}, {"metadata": payload, "payload": {}}):
        if given.get("metadata", 1) is None:
            continue
        with pytest.raises(PayloadInvalid, match=message):
            next(append_steps([event(**given)], settings(), Stamps()))


def test_a_payload_that_contains_itself_is_refused() -> None:
    loop: dict[str, Any] = {}
    loop["loop"] = loop
    deep: Any = {}
    for _ in range(2000):
        deep = {"d": deep}
    for payload in (loop, deep):
        with pytest.raises(PayloadInvalid):
            next(append_steps([event(payload=payload)], settings(), Stamps()))


async def test_odd_payloads_that_can_be_kept(soma_database: str) -> None:
    odd = {
        "NaN": "Infinity \\u0000 NaN", "": "", "🛩": "\u2028\x01", "digits": "1" * 40, "d": Decimal("1.10"),
        "edge": [2**64 - 1, -(2**63), 1e18, 1e300, 0.1, -0.0], "nested": {"a": {"b": [[]]}},
    }  # fmt: skip
    async with opened(soma_database) as store:
        await store.publish(event("a", payload=odd))
        [read] = [e async for e in store.read(event("a").stream)]
        assert read.payload == odd | {"d": "1.10"}


@pytest.mark.parametrize(
    "fields",
    [
        {"payload": {"n": "x"}, "event_type": "order.placed"},
        {"payload": {"n": 1, "extra": 1}, "event_type": "order.placed"},
        {"payload": {"n": 1, "price": math.nan}, "event_type": "order.placed"},
        {"payload": Ordered.model_construct(n="x"), "event_type": ""},
        {"payload": Ordered.model_construct(), "event_type": ""},
        {"payload": Ordered.model_construct(n=1, price=math.nan), "event_type": ""},
        {"payload": Inner(x=1), "event_type": "order.placed"},
    ],
)
def test_payloads_that_do_not_match_their_model(fields: dict[str, Any]) -> None:
    with pytest.raises(PayloadInvalid):
        next(append_steps([event(**fields)], settings(models=MODELS), Stamps()))


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({"payload": {"a": "x" * 921_601}}, EventTooLarge),
        ({"metadata": {"a": "x" * 65_537}}, EventTooLarge),
    ],
)
def test_sizes_have_limits(fields: dict[str, Any], kind: type[Exception]) -> None:
    with pytest.raises(kind):
        next(append_steps([event(**fields)], settings(), Stamps()))


async def test_the_largest_event_fits(soma_database: str) -> None:
    async with opened(soma_database) as store:
        name = "n" * 512
        big = event(
            name, tenant_id=name, aggregate_type=name, correlation_id=name, causation_id=name, idempotency_key=name,
            service_id=name, payload={"a": "x" * (921_600 - 8)}, metadata={"a": "x" * (65_536 - 8)}, baggage="b" * 8192,
        )  # fmt: skip
        [recorded] = await store.publish(big)
        [read] = [e async for e in store.read(big.stream)]
        for field in fields(read):
            assert getattr(read, field.name) == getattr(recorded, field.name), field.name
        assert len(await store.query(tenant_id=name, correlation_id=name)) == 1


NAMES = [
    "tenant_id",
    "aggregate_id",
    "aggregate_type",
    "correlation_id",
    "causation_id",
    "idempotency_key",
    "service_id",
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", ["nul\0", "tab\t", "del\x7f", "line\n", "\ud800", 5, b"bytes"])
def test_names_that_are_refused(name: str, value: Any) -> None:
    with pytest.raises(ValidationError, match=name):
        event(**({"aggregate_id": "a"} | {name: value}))


@pytest.mark.parametrize("name", NAMES)
def test_names_that_are_too_long(name: str) -> None:
    with pytest.raises(EventTooLarge, match=name):
        event(**({"aggregate_id": "a"} | {name: "é" * 257}))


@pytest.mark.parametrize("name", ["tenant_id", "aggregate_id", "aggregate_type", "causation_id", "idempotency_key"])
def test_names_that_are_empty(name: str) -> None:
    with pytest.raises(ValidationError, match=name):
        event(**({"aggregate_id": "a"} | {name: ""}))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"event_type": ""}, "event type"),
        ({"event_type": "Order Placed"}, "event type"),
        ({"event_type": "order.placed\n"}, "event type"),
        ({"event_type": "x" * 201}, "event type"),
        ({"event_type": 5}, "event type"),
        ({"payload": Ordered(n=1), "event_type": "other.type"}, "is a order.placed"),
        ({"schema_version": -1}, "schema_version"),
        ({"schema_version": 2**31}, "schema_version"),
        ({"event_id": "not-a-uuid"}, "event_id"),
        ({"occurred_at": datetime(2026, 1, 1)}, "time zone"),
        ({"occurred_at": datetime.max.replace(tzinfo=timezone(timedelta(hours=-5)))}, "calendar"),
        ({"baggage": "nul\0"}, "baggage"),
        ({"baggage": "\ud800"}, "baggage"),
        ({"baggage": "b" * 8193}, "baggage"),
        ({"baggage": 5}, "baggage"),
        ({"trace": TraceContext("xyz", "0" * 15 + "1")}, "malformed"),
        ({"trace": TraceContext("0" * 32, "0" * 15 + "1")}, "malformed"),
        ({"trace": TraceContext("a" * 32, "b" * 16, 300)}, "malformed"),
        ({"trace": TraceContext("a" * 32, "b" * 16, 1, "bad\n")}, "tracestate"),
    ],
)
def test_other_fields_that_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        event(**fields)


async def test_times_at_the_edge_of_the_calendar_are_kept(soma_database: str) -> None:
    async with opened(soma_database) as store:
        early = datetime(1, 1, 2, tzinfo=UTC)
        await store.publish(event("a", occurred_at=early))
        [read] = [e async for e in store.read(event("a").stream)]
        assert read.occurred_at == early


async def test_hostile_names_are_names(soma_database: str) -> None:
    hostile = [
        "'; DROP SCHEMA soma; --",
        "%s",
        "$1",
        "a:b",
        "a%3Ab",
        "\\",
        '"',
        "{}",
        "🛩",
        "\u200b",
        " ",
        "NULL",
        "null",
    ]
    async with opened(soma_database) as store:
        for name in hostile:
            await store.publish(event(name, tenant_id=name, aggregate_type=name, idempotency_key=name))
        for name in hostile:
            [found] = await store.query(tenant_id=name, aggregate_id=name, aggregate_type=name)
            assert (found.tenant_id, found.aggregate_type, found.aggregate_id) == (name, name, name)
        keys = await store.pool.fetch("SELECT count(DISTINCT key), count(DISTINCT key_hash) FROM soma.outbox")
        assert tuple(keys[0]) == (len(hostile), len(hostile))


# -- whoever calls the SQL function without the library ---------------------------------------------------------------


def _arguments(**changes: Any) -> list[Any]:
    """The arguments of soma.append for one event, with some replaced, by position."""
    places = {
        "service": 0, "tenant": 2, "type": 3, "id": 4, "event_type": 13, "schema_version": 14, "correlation": 15,
        "traceparent": 18, "payload": 23, "metadata": 24,
    }  # fmt: skip
    _, args = next(append_steps([event("a")], settings(), Stamps()))
    given = list(args)
    for name, value in changes.items():
        given[places[name]] = [value]
    return given


BAD_ARGUMENTS: list[tuple[dict[str, Any], type[Exception]]] = [
    ({"payload": "{"}, PayloadInvalid),
    ({"payload": '{"a": NaN}'}, PayloadInvalid),
    ({"payload": '{"a": Infinity}'}, PayloadInvalid),
    ({"payload": '{"a": "\\ud800"}'}, PayloadInvalid),
    ({"payload": '{"a": "\\u0000"}'}, PayloadInvalid),
    ({"payload": "[1]"}, ValidationError),
    ({"payload": "null"}, ValidationError),
    ({"payload": '{"a": "' + "x" * 921_600 + '"}'}, ValidationError),
    ({"metadata": "[]"}, ValidationError),
    ({"metadata": '{"a": "' + "x" * 65_536 + '"}'}, ValidationError),
    ({"tenant": ""}, ValidationError),
    ({"id": "x" * 513}, ValidationError),
    ({"type": ""}, ValidationError),
    ({"service": ""}, ValidationError),
    ({"event_type": ""}, ValidationError),
    ({"schema_version": 0}, ValidationError),
    ({"correlation": "x" * 100_000}, ValidationError),
    ({"traceparent": "nonsense"}, ValidationError),
]


@pytest.fixture(scope="module")
def refusing(request: pytest.FixtureRequest) -> Iterator[str]:
    """One database for all of them: what is refused leaves no row behind."""
    server = request.getfixturevalue("soma_postgres")
    name = f"soma_refusing_{uuid4().hex[:12]}"
    dsn = server.sql.create_database(name)
    asyncio.run(upgrade(dsn))
    yield dsn
    server.sql.drop_database(name)


@pytest.mark.parametrize("arguments", [arguments for arguments, _ in BAD_ARGUMENTS], ids=range(len(BAD_ARGUMENTS)))
def test_the_sql_function_refuses_it_too(refusing: str, arguments: dict[str, Any]) -> None:
    kind = next(kind for given, kind in BAD_ARGUMENTS if given is arguments)
    statement, _ = next(append_steps([event("a")], settings(), Stamps()))
    with psycopg.connect(refusing) as connection:
        with pytest.raises(kind), translated(), psycopg.RawCursor(connection) as cursor:
            cursor.execute(statement, _arguments(**arguments))
        connection.rollback()
        assert connection.execute("SELECT count(*) FROM soma.events").fetchone() == (0,)


async def test_nul_bytes_by_psycopg(soma_database: str) -> None:
    with psycopg.connect(soma_database) as connection:
        statement, _ = next(append_steps([event("a")], settings(), Stamps()))
        with pytest.raises((psycopg.DataError, psycopg.errors.CharacterNotInRepertoire)):
            psycopg.RawCursor(connection).execute(statement, _arguments(tenant="nul\0"))


async def test_json_that_only_the_database_took_stops_no_reader(soma_database: str) -> None:
    """Numbers that orjson refuses, written by hand through the SQL function."""
    statement, _ = next(append_steps([event("a")], settings(), Stamps()))
    with psycopg.connect(soma_database, autocommit=True) as connection:
        psycopg.RawCursor(connection).execute(statement, _arguments(payload='{"n": 1e400, "m": 1' + "0" * 400 + "}"))
    async with opened(soma_database) as store:
        [read] = [e async for e in store.read(event("a").stream)]
        assert read.payload == {"n": math.inf, "m": 10**400}


# -- the database guards the promises ---------------------------------------------------------------------------------


@pytest.mark.parametrize("table", ["events", "events_p0", "events_p5000000"])
@pytest.mark.parametrize("statement", ["UPDATE soma.{} SET version = 9", "DELETE FROM soma.{}", "TRUNCATE soma.{}"])
async def test_events_are_append_only(soma_postgres: Any, soma_database: str, table: str, statement: str) -> None:
    async with opened(soma_database) as store, connected(soma_database) as admin:
        await store.publish(event("a"))
        await admin.execute("SELECT setval('soma.event_position', 5000000)")
        await store.publish(event("b"))
        if not (statement.startswith("TRUNCATE") or table == "events"):
            assert await admin.fetchval(f"SELECT count(*) FROM soma.{table}") == 1
        with pytest.raises(Exception, match="append-only") as caught:
            await admin.execute(statement.format(table))
        assert getattr(caught.value, "sqlstate", None) == "SC003"


def test_psycopg_reads_every_refusal(soma_database: str) -> None:
    """-infinity, the stamp of a stream that was never written, is more than psycopg can read."""
    store = sync.EventStore(settings())
    with psycopg.connect(soma_database, autocommit=True) as connection, pytest.raises(Exception, match="version 3"):
        store.publish([event("a"), event("b")], connection, expected_version=3)
    assert SqlTools.at(soma_database).query("SELECT count(*) FROM soma.streams") == "0"
