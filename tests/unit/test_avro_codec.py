"""The Avro codec: framing, foreign schemas, evolution, and schemas that are not read."""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime
from decimal import Decimal
from io import BytesIO
from typing import Any
from uuid import UUID

import fastavro
import pytest

from soma_common.errors import CodecError, SchemaNotFound, UnknownSchemaId
from soma_common.events.payloads import Payload, to_json
from soma_common.schemas.avro import event_schema, event_schemas, schema_text
from soma_common.schemas.avro_codec import AvroCodec
from soma_common.schemas.framing import frame_prefix
from soma_common.schemas.table import SchemaRef, SchemaTable
from tests.core_support import recorded

MOMENT = datetime(2024, 1, 1, 12, 30, tzinfo=UTC)


class Order(Payload, event_type="order.placed"):
    number: int
    at: datetime


PAYLOAD = Order(number=1, at=MOMENT)


def _table(first: int = 1) -> SchemaTable:
    table = SchemaTable()
    for number, (key, schema) in enumerate(event_schemas([Order]).items(), first):
        table.learn(SchemaRef("content", number), schema_text(schema))
        table.bind(*key, number)
    return table


def _encode(table: SchemaTable, payload: Any = PAYLOAD) -> bytes:
    return AvroCodec(table).encode(recorded(payload), to_json("payload", payload, 1000))


def _with_schema(kind: Any, number: int, schema: Any) -> AvroCodec:
    table = SchemaTable()
    table.learn(SchemaRef(kind, number), json.dumps(schema))
    return AvroCodec(table, read_ids=kind)


def test_the_id_stands_in_four_bytes_behind_a_zero() -> None:
    assert _encode(_table(first=299))[:5] == b"\0" + (300).to_bytes(4, "big")


@pytest.mark.parametrize("number", [0, -1, 2**32])
def test_an_id_that_does_not_fit_is_an_error(number: int) -> None:
    with pytest.raises(CodecError, match="does not fit"):
        frame_prefix(number)


def test_every_framing_is_read() -> None:
    value, schema = _encode(_table()), event_schema(Order)
    body, big = value[5:], 2**33 + 5
    expected = AvroCodec(_table()).decode(value)
    for kind in ("content", "global"):
        codec = _with_schema(kind, 9, schema)
        assert codec.decode(b"\0" + (9).to_bytes(4, "big") + body) == expected
        assert codec.decode(b"\0" + (9).to_bytes(8, "big") + body) == expected
        assert codec.decode(body, {f"apicurio.value.{kind}Id": (9).to_bytes(8, "big"), "other": b"x"}) == expected
    # A wide id whose upper half is not zero looks like a short one: it needs the header.
    assert (
        _with_schema("global", big, schema).decode(body, {"apicurio.value.globalId": big.to_bytes(8, "big")})
        == expected
    )


def test_a_header_that_says_json_is_refused() -> None:
    headers = {"apicurio.value.contentId": (2).to_bytes(8, "big"), "apicurio.value.encoding": b"JSON"}
    with pytest.raises(CodecError, match="not in binary"):
        AvroCodec(_table()).decode(_encode(_table())[5:], headers)


async def test_an_unknown_id_is_named_and_ensure_says_when_nobody_has_it() -> None:
    codec = AvroCodec(SchemaTable())
    value = _encode(_table())
    with pytest.raises(UnknownSchemaId) as caught:
        codec.decode(value)
    assert (caught.value.kind, caught.value.id) == ("content", 2)
    with pytest.raises(SchemaNotFound):
        await codec.ensure(value)
    await AvroCodec(_table()).ensure(value)


def test_without_the_generic_schema_an_unregistered_event_cannot_be_written() -> None:
    with pytest.raises(UnknownSchemaId, match="generic"):
        _encode(SchemaTable())


def test_a_payload_the_schema_cannot_hold_goes_generic_and_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    codec = AvroCodec(_table())
    payload = {"number": 1.5, "at": "2024-01-01T12:30:00Z"}
    with caplog.at_level(logging.WARNING):
        values = [codec.encode(recorded(payload), to_json("payload", payload, 1000)) for _ in range(3)]
    assert {value[:5] for value in values} == {b"\0\0\0\0\1"}
    assert codec.decode(values[0]).payload == payload
    assert len(caplog.records) == 1


def test_an_envelope_that_cannot_be_written_is_a_codec_error() -> None:
    broken: Any = None
    event = recorded(PAYLOAD)
    object.__setattr__(event, "tenant_id", broken)
    with pytest.raises(CodecError, match="cannot be written as Avro"):
        AvroCodec(_table()).encode(event, to_json("payload", PAYLOAD, 1000))


def _foreign(payload_fields: list[dict[str, Any]]) -> dict[str, Any]:
    schema = event_schema(Order)
    record = {"type": "record", "name": "Payload", "fields": payload_fields}
    return {**schema, "fields": [*schema["fields"][:-1], {"name": "payload", "type": record}]}


def _foreign_value(schema: dict[str, Any], payload: Any) -> bytes:
    table = _table()
    fields: Any = fastavro.schemaless_reader(
        BytesIO(_encode(table)[5:]), table.schema_of(SchemaRef("content", 2)), None
    )
    out = BytesIO()
    fastavro.schemaless_writer(out, fastavro.parse_schema(schema), {**fields, "payload": payload})
    return b"\0\0\0\0\5" + out.getvalue()


def test_the_logical_types_of_other_producers_come_out_as_json_has_them() -> None:
    day = {"name": "day", "type": {"type": "int", "logicalType": "date"}}
    records = [{"type": "record", "name": name, "fields": [day]} for name in ("A", "B")]
    schema = _foreign([
        {"name": "price", "type": {"type": "bytes", "logicalType": "decimal", "precision": 9, "scale": 2}},
        {"name": "id", "type": {"type": "fixed", "size": 16, "name": "U", "logicalType": "uuid"}},
        {"name": "at", "type": {"type": "long", "logicalType": "timestamp-millis"}},
        {"name": "way", "type": ["null", *records]},
    ])  # fmt: skip
    payload = {
        "price": Decimal("1.50"),
        "id": UUID(int=3).bytes,
        "at": MOMENT,
        "way": ("com.soma.events.order.placed.v1.B", {"day": 1}),
    }
    codec = _with_schema("content", 5, schema)
    assert codec.decode(_foreign_value(schema, payload)).payload == {
        "price": "1.50",
        "id": str(UUID(int=3)),
        "at": "2024-01-01T12:30:00Z",
        "way": {"day": "1970-01-02"},
    }


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ([{"name": "f", "type": {"type": "array", "items": "null"}}], "no content"),
        (
            [{"name": "f", "type": {"type": "array", "items": {"type": "record", "name": "E", "fields": []}}}],
            "no content",
        ),
        ([{"name": "f", "type": {"type": "array", "items": {"type": "fixed", "name": "Z", "size": 0}}}], "no content"),
        ([{"name": "f", "type": {"type": "array", "items": "Payload"}}], "cannot be read safely"),
        ([{"name": "f", "type": ["null", "com.soma.events.order.placed.v1.Payload"]}], "contains itself"),
        ([{"name": "f", "type": "no_such_type"}], "is not Avro"),
        ([{"name": "f"}], "malformed"),
    ],
)
def test_schemas_that_would_let_a_record_harm_its_reader_are_refused(fields: list[dict[str, Any]], says: str) -> None:
    with pytest.raises(CodecError, match=says):
        _with_schema("content", 5, _foreign(fields)).decode(b"\0\0\0\0\5" + b"\2" * 1000)


@pytest.mark.parametrize("schema", ["string", ["null"], {"type": "record", "name": "X", "fields": []}, {}, 5])
def test_a_schema_of_something_else_is_refused(schema: Any) -> None:
    with pytest.raises(CodecError):
        _with_schema("content", 5, schema).decode(b"\0\0\0\0\5abc")


def test_deep_nesting_is_refused() -> None:
    kind: Any = "int"
    for _ in range(3000):
        kind = {"type": "array", "items": kind}
    table = SchemaTable()
    table._schemas[SchemaRef("content", 5)] = _foreign([{"name": "f", "type": kind}])
    with pytest.raises(CodecError):
        AvroCodec(table).decode(b"\0\0\0\0\5" + b"\2" * 5000)


def test_types_that_name_each_other_many_times_over_are_refused() -> None:
    kind: Any = "int"
    for level in range(16):
        first = {"type": "record", "name": f"L{level}", "fields": [{"name": "x", "type": kind}]}
        second = {"name": "b", "type": f"com.soma.events.order.placed.v1.L{level}"}
        kind = {"type": "record", "name": f"M{level}", "fields": [{"name": "a", "type": first}, second]}
    with pytest.raises(CodecError, match="more than"):
        _with_schema("content", 5, _foreign([{"name": "f", "type": kind}])).decode(b"\0\0\0\0\5")


def test_bytes_behind_the_record_are_an_error() -> None:
    with pytest.raises(CodecError, match="3 bytes follow"):
        AvroCodec(_table()).decode(_encode(_table()) + b"abc")


class Narrow(Payload, event_type="order.placed"):
    """What an older release wrote."""

    number: int
    at: datetime


class Wide(Payload, event_type="order.placed"):
    """What the next release reads: a field more, with a default."""

    number: int
    at: datetime
    note: str = "none"


def test_an_old_writers_record_fits_the_new_model() -> None:
    codec = _with_schema("content", 2, event_schema(Narrow))
    back = codec.decode(_encode(_table(), Narrow(number=1, at=MOMENT)))
    assert Wide.model_validate(back.payload) == Wide(number=1, at=MOMENT)
