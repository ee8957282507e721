"""Strategies for the codec's property tests: payload models of any shape with values, and whole events."""

from __future__ import annotations

from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from enum import Enum, IntEnum, StrEnum
from typing import Annotated, Any, Literal
from uuid import UUID

from hypothesis import strategies as st
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, JsonValue, NaiveDatetime, create_model

from soma_common.events.models import RecordedEvent
from soma_common.events.payloads import MAX_PAYLOAD_BYTES, Payload, to_json
from soma_common.schemas.avro import Schema, event_schemas, schema_text
from soma_common.schemas.table import SchemaRef, SchemaTable
from soma_common.tracing.context import TraceContext


class Colour(StrEnum):
    RED = "red"
    BLUE = "blue"


class Level(IntEnum):
    LOW = 1
    HIGH = 7


class Odd(Enum):
    SPACED = "not a name"
    DASHED = "a-b"


class Card(BaseModel):
    kind: Literal["card"] = "card"
    number: int
    paid_at: AwareDatetime | None = None


class Bank(BaseModel):
    model_config = ConfigDict(ser_json_bytes="base64", val_json_bytes="base64")
    kind: Literal["bank", "giro"]
    signature: bytes
    notes: dict[str, date] = Field(default_factory=dict)


class Cash(BaseModel):
    kind: Literal["cash"] = "cash"


Payment = Annotated[Card | Bank | Cash, Field(discriminator="kind")]
Shape = tuple[Any, st.SearchStrategy[Any]]

EARLY = datetime(2, 1, 1)
LATE = datetime(9998, 1, 1)
texts = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), max_size=12)
words = st.text("abcdefgh-_123", min_size=1, max_size=8)
integers = st.integers(-(2**63), 2**63 - 1)
floats = st.floats(allow_nan=False, allow_infinity=False)
offsets = st.sampled_from([UTC, timezone(timedelta(hours=5, minutes=30)), timezone(timedelta(hours=-3))])
aware = st.datetimes(EARLY, LATE, timezones=offsets)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | floats | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)
cards = st.builds(Card, number=integers, paid_at=st.none() | aware)
banks = st.builds(
    Bank,
    kind=st.sampled_from(["bank", "giro"]),
    signature=st.binary(max_size=9),
    notes=st.dictionaries(texts, st.dates()),
)

SCALARS: list[Shape] = [
    (str, texts),
    (int, integers | st.integers(2**63, 2**64 - 1)),
    (float, floats),
    (bool, st.booleans()),
    (bytes, texts.map(str.encode)),
    (UUID, st.uuids()),
    (Decimal, st.decimals(allow_nan=False, allow_infinity=False)),
    (datetime, aware | st.datetimes(EARLY)),
    (AwareDatetime, aware),
    (NaiveDatetime, st.datetimes(EARLY)),
    (date, st.dates()),
    (time, st.times() | st.times(timezones=st.just(UTC))),
    (timedelta, st.timedeltas()),
    (Colour, st.sampled_from(Colour)),
    (Level, st.sampled_from(Level)),
    (Odd, st.sampled_from(Odd)),
    (Literal["x", "y z"], st.sampled_from(["x", "y z"])),
    (Literal[1, "one"], st.sampled_from([1, "one"])),
    (JsonValue, json_values),
    (dict[str, Any], st.dictionaries(texts, json_values, max_size=3)),
    (int | float, integers | floats),
    (int | str, integers | texts),
    (bool | int | str | None, st.booleans() | integers | texts | st.none()),
    (Payment, cards | banks | st.builds(Cash)),
    (Payment | None, cards | banks | st.none()),
    (Card, cards),
    (Bank | None, banks | st.none()),
]


def _wider(shape: Shape) -> st.SearchStrategy[Shape]:
    kind, values = shape
    return st.sampled_from(
        [
            (list[kind], st.lists(values, max_size=3)),
            (dict[str, kind], st.dictionaries(texts, values, max_size=3)),
            (kind | None, values | st.none()),
            (tuple[kind, kind], st.tuples(values, values)),
        ]
    )


shapes = st.recursive(st.sampled_from(SCALARS), lambda inner: inner.flatmap(_wider), max_leaves=3)
names = st.text("abcdefghij_", min_size=1, max_size=6).filter(lambda name: name.strip("_") == name and name != "copy")


@st.composite
def payloads(draw: st.DrawFn) -> Payload:
    """A payload of a model made up on the spot."""
    fields = draw(st.dictionaries(names, shapes, max_size=5))
    model = create_model(  # type: ignore[call-overload]
        "Made",
        __base__=Payload,
        __cls_kwargs__={"event_type": draw(st.sampled_from(["order.placed", "a-b.1c", "x_y"]))},
        **{name: (kind, ...) for name, (kind, _) in fields.items()},
    )
    made: Payload = model(**{name: draw(values) for name, (_, values) in fields.items()})
    return made


@st.composite
def events(draw: st.DrawFn, payload: Any, event_type: str, version: int) -> RecordedEvent:
    """A recorded event around this payload, with any envelope."""
    return RecordedEvent(
        event_id=draw(st.uuids()),
        event_type=event_type,
        schema_version=version,
        payload=payload,
        tenant_id=draw(words),
        aggregate_type=draw(words),
        aggregate_id=draw(texts.filter(bool)),
        service_id=draw(words),
        correlation_id=draw(words),
        idempotency_key=draw(words),
        trace=draw(st.builds(_trace, st.integers(1, 2**128 - 1), st.integers(1, 2**64 - 1), st.none() | words)),
        timestamp=draw(st.datetimes(EARLY, timezones=st.just(UTC))),
        occurred_at=draw(aware),
        causation_id=draw(st.none() | words),
        baggage=draw(st.none() | words),
        metadata=draw(st.dictionaries(texts, json_values, max_size=3)),
    )


def _trace(trace: int, span: int, state: str | None) -> TraceContext:
    return TraceContext(f"{trace:032x}", f"{span:016x}", 1, state)


def table_of(schemas: dict[tuple[str, int], Schema]) -> SchemaTable:
    """A table that knows these schemas under ids from 1."""
    table = SchemaTable()
    for number, (key, schema) in enumerate(schemas.items(), 1):
        table.learn(SchemaRef("content", number), schema_text(schema))
        table.bind(*key, number)
    return table


def table_for(payload: Payload) -> SchemaTable:
    """A table that knows the generic schema (1) and the schema of this payload (2)."""
    return table_of(event_schemas([type(payload)]))


def json_of(payload: Any) -> bytes:
    """The payload's JSON, as the store makes it."""
    return to_json("payload", payload, MAX_PAYLOAD_BYTES)
