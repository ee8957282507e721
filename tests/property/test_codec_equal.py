"""Both codecs give the same event back, whatever its payload's model."""

from __future__ import annotations

import json
from typing import Any

import fastavro
import orjson
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from soma_common.events.codec import JsonCodec
from soma_common.events.payloads import Payload
from soma_common.schemas.avro import event_schema
from soma_common.schemas.avro_codec import AvroCodec
from soma_common.schemas.compat import breaks

from .codec_values import events, json_of, json_values, payloads, table_for, texts

CALM = settings(suppress_health_check=[HealthCheck.too_slow], deadline=None, max_examples=100)


@CALM
@given(st.data())
def test_avro_and_json_decode_to_the_same_event(data: st.DataObject) -> None:
    payload = data.draw(payloads())
    event = data.draw(events(payload, payload.event_type, 1))
    text = json_of(payload)
    avro = AvroCodec(table_for(payload))
    value = avro.encode(event, text)
    back = avro.decode(value)
    assert back == JsonCodec().decode(JsonCodec().encode(event, text))
    # Equal in Python is not enough: 1, 1.0 and True are different JSON.
    assert orjson.dumps(back.payload, option=orjson.OPT_SORT_KEYS) == orjson.dumps(
        orjson.loads(text), option=orjson.OPT_SORT_KEYS
    )
    # A payload that came back is a dict; writing it again gives the same bytes.
    assert avro.decode(avro.encode(event.with_payload(back.payload, 1), text)) == back


@CALM
@given(st.data(), st.dictionaries(texts, json_values, max_size=4))
def test_a_type_without_schema_travels_in_the_generic_record(data: st.DataObject, payload: dict[str, Any]) -> None:
    event = data.draw(events(payload, "never.seen", 3))
    avro = AvroCodec(table_for(_Any(x=1)))
    value = avro.encode(event, json_of(payload))
    assert value[:5] == b"\0\0\0\0\1"
    assert avro.decode(value) == JsonCodec().decode(JsonCodec().encode(event, json_of(payload)))


@CALM
@given(st.data(), st.dictionaries(st.sampled_from(["x", "y"]), json_values, max_size=2))
def test_a_dict_that_does_not_fit_its_schema_is_not_bent_to_it(data: st.DataObject, payload: dict[str, Any]) -> None:
    event = data.draw(events(payload, "any.x", 1))
    avro = AvroCodec(table_for(_Any(x=1)))
    back = avro.decode(avro.encode(event, json_of(payload)))
    assert orjson.dumps(back.payload, option=2) == orjson.dumps(payload, option=2)


@CALM
@given(payloads())
def test_each_schema_parses_and_reads_itself(payload: Payload) -> None:
    schema = event_schema(type(payload))
    fastavro.parse_schema(json.loads(json.dumps(schema)))
    assert breaks(schema, schema) == []


class _Any(Payload, event_type="any.x"):
    x: int
