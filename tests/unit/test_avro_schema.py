"""Schemas from models: names, types, defaults, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, date, datetime, time
from decimal import Decimal
from enum import StrEnum
from pathlib import Path
from typing import Any

import fastavro
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, Field, JsonValue

from soma_common.errors import ConfigurationError
from soma_common.events.payloads import Payload
from soma_common.events.standard import STANDARD_MODELS
from soma_common.events.types import EventType
from soma_common.schemas.avro import event_schema, event_schemas, namespace_of, schema_text
from soma_common.schemas.files import differences, write

FOLDER = Path(__file__).parents[2] / "schemas"


class Mode(StrEnum):
    FAST = "fast"
    SLOW = "slow"


class Point(BaseModel):
    x: int = 0
    y: int = 0


class Empty(BaseModel):
    pass


class Tree(BaseModel):
    children: list[Tree] = Field(default_factory=list)


class Loose(BaseModel, extra="allow"):
    x: int


def _fields(**annotations: Any) -> dict[str, Any]:
    namespace = {name: value for name, (_, value) in _pairs(annotations) if value is not ...}
    kinds = {name: kind for name, (kind, _) in _pairs(annotations)}
    model = type("Made", (Payload,), {"__annotations__": kinds, "__module__": __name__, **namespace}, event_type="a.b")
    payload = event_schema(model)["fields"][-1]["type"]
    return {field["name"]: field for field in payload["fields"]}


def _pairs(annotations: dict[str, Any]) -> list[tuple[str, tuple[Any, Any]]]:
    return [(name, each if isinstance(each, tuple) else (each, ...)) for name, each in annotations.items()]


def test_defaults_are_written_as_avro_writes_them() -> None:
    moment = datetime(2024, 1, 1, tzinfo=UTC)
    fields = _fields(
        mode=(Mode, Mode.SLOW),
        price=(Decimal, Decimal("1.10")),
        at=(datetime, moment),
        day=(date, date(1970, 1, 3)),
        clock=(time, time(0, 0, 1)),
        raw=(bytes, b"\x7f"),
        place=(Point, Point(x=1)),
        places=(list[Point], [Point()]),
        maybe=(int | None, None),
        chosen=(int | None, 5),
        tags=(list[str], Field(default_factory=list)),
        free=(JsonValue, {"a": 1}),
    )
    defaults = {name: field["default"] for name, field in fields.items()}
    assert defaults == {
        "mode": "slow",
        "price": "1.10",
        "at": 1704067200000000,
        "day": 2,
        "clock": 1_000_000,
        "raw": "\x7f",
        "place": {"x": 1, "y": 0},
        "places": [{"x": 0, "y": 0}],
        "maybe": None,
        "chosen": 5,
        "tags": [],
        "free": '{"a":1}',
    }
    assert fields["maybe"]["type"] == ["null", "long"]
    assert fields["chosen"]["type"] == ["long", "null"]


def test_a_default_made_anew_each_time_is_none_of_the_schemas() -> None:
    assert "default" not in _fields(at=(datetime, Field(default_factory=lambda: datetime.now(UTC))))["at"]


def test_a_type_used_twice_is_written_once() -> None:
    fields = _fields(a=Point, b=Point, c=list[Point])
    assert fields["b"]["type"] == "com.soma.events.a.b.v1.Point"
    assert fields["c"]["type"] == {"type": "array", "items": "com.soma.events.a.b.v1.Point"}


@pytest.mark.parametrize(
    ("annotations", "says"),
    [
        ({"f": Tree}, ["Made.f.children[]", "contains itself", "JsonValue"]),
        ({"f": list[Empty]}, ["Made.f[]", "no content"]),
        ({"f": list[None]}, ["Made.f[]", "no content"]),
        ({"f": Loose}, ["Made.f", "extra"]),
        ({"f": tuple[int, str]}, ["Made.f", "tuple", "model"]),
        ({"f": Point | Empty}, ["Made.f", "nothing in the data tells which", "Literal"]),
        ({"f": list[int] | list[str]}, ["Made.f", "nothing in the data tells which"]),
        ({"f": Callable[[], int]}, ["Made.f", "use a type that JSON has"]),
        ({"f": (datetime, datetime(2024, 1, 1))}, ["Made.f", "default"]),
    ],
)
def test_what_avro_cannot_hold_is_refused_with_model_field_and_cure(
    annotations: dict[str, Any], says: list[str]
) -> None:
    with pytest.raises(ConfigurationError) as caught:
        _fields(**annotations)
    assert all(word in str(caught.value) for word in says), str(caught.value)


class Aliased(Payload, event_type="a.b"):
    plain: int = Field(serialization_alias="other")


class ByAlias(Payload, event_type="a.b", serialize_by_alias=True):
    plain: int = Field(serialization_alias="other")


class BadAlias(Payload, event_type="a.b", serialize_by_alias=True):
    plain: int = Field(serialization_alias="a-b")


def test_fields_are_named_as_in_the_json() -> None:
    names = [event_schema(model)["fields"][-1]["type"]["fields"][0]["name"] for model in (Aliased, ByAlias)]
    assert names == ["plain", "other"]
    with pytest.raises(ConfigurationError, match=r"BadAlias.a-b.*not an Avro name"):
        event_schema(BadAlias)


TYPES = st.from_regex(r"\A[a-z][a-z0-9_-]{0,4}(\.[a-z0-9][a-z0-9_-]{0,4}){0,3}\Z")


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # on a busy machine
@given(st.tuples(TYPES, st.integers(1, 30)), st.tuples(TYPES, st.integers(1, 30)))
def test_namespaces_are_valid_and_never_shared(one: tuple[str, int], other: tuple[str, int]) -> None:
    assert (namespace_of(*one) == namespace_of(*other)) == (one == other)
    fastavro.parse_schema({"type": "record", "name": "Event", "namespace": namespace_of(*one), "fields": []})


def test_namespaces_that_look_alike() -> None:
    types = ["a-b", "a.b", "a_b", "ahb", "a.1b", "a.n1b", "a1b"]
    assert len({namespace_of(name, 1) for name in types}) == len(types)


def test_standard_models_cover_the_standard_types() -> None:
    assert {name for name, _ in STANDARD_MODELS} == set(EventType)


def test_schema_files_equal_the_models() -> None:
    assert differences(FOLDER, event_schemas(STANDARD_MODELS.values())) == []


def test_files_tell_how_they_differ(tmp_path: Path) -> None:
    schemas = event_schemas(STANDARD_MODELS.values())
    assert len(write(tmp_path, schemas)) == len(schemas)
    assert write(tmp_path, schemas) == []
    (tmp_path / "saga.started.v1.avsc").write_text("{}")
    (tmp_path / "txn.failed.v1.avsc").unlink()
    (tmp_path / "gone.v1.avsc").write_text("{}")
    assert differences(tmp_path, schemas) == [
        "gone.v1.avsc belongs to no model",
        "saga.started.v1.avsc differs from its model",
        "txn.failed.v1.avsc is missing",
    ]


def test_the_text_of_a_schema_is_json_in_both_forms() -> None:
    schema = event_schemas([])["", 0]
    assert json.loads(schema_text(schema)) == json.loads(schema_text(schema, pretty=True)) == schema
