"""Bytes from outside: a CodecError or an event, never another exception, never memory without bound."""

from __future__ import annotations

import contextlib
from typing import Any

from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from soma_common.errors import CodecError
from soma_common.events.codec import JsonCodec
from soma_common.events.payloads import Payload
from soma_common.schemas.avro_codec import AvroCodec

from .codec_values import Card, Payment, events, json_of, table_for

CALM = settings(suppress_health_check=[HealthCheck.too_slow], deadline=None, max_examples=300)


class Rich(Payload, event_type="rich.one"):
    numbers: list[int]
    cards: list[Card]
    by_name: dict[str, list[str]]
    payment: Payment | None = None
    free: Any = None


SAMPLE = Rich(numbers=[1], cards=[Card(number=2)], by_name={"a": ["b"]}, payment=Card(number=3), free={"x": [1]})
CODEC = AvroCodec(table_for(SAMPLE))


def _decode(value: bytes, headers: dict[str, bytes] | None = None) -> None:
    with contextlib.suppress(CodecError):
        CODEC.decode(value, headers)


@CALM
@given(st.binary(max_size=200))
@example(b"")
@example(b"\0\0\0\0\0")
@example(b"\0\0\0\0\0\xff\xff\xff\xff")
@example(b"\0\0\0\0\2" + b"\xff" * 400)
@example(b"\0\0\0\0\2" + b"\xfe\xff\xff\xff\xff\xff\xff\xff\x7f" * 20)
def test_random_bytes(value: bytes) -> None:
    _decode(value)
    with contextlib.suppress(CodecError):
        JsonCodec().decode(value)


@CALM
@given(st.sampled_from([1, 2]), st.binary(max_size=300))
def test_random_bytes_behind_a_known_id(number: int, rest: bytes) -> None:
    _decode(b"\0" + number.to_bytes(4, "big") + rest)


@CALM
@given(st.data())
def test_a_valid_record_truncated_or_changed(data: st.DataObject) -> None:
    event = data.draw(events(SAMPLE, "rich.one", 1))
    value = bytearray(CODEC.encode(event, json_of(SAMPLE)))
    cut = data.draw(st.integers(0, len(value)))
    _decode(bytes(value[:cut]))
    _decode(bytes(value) + data.draw(st.binary(min_size=1, max_size=5)))
    for _ in range(data.draw(st.integers(1, 6))):
        value[data.draw(st.integers(5, len(value) - 1))] = data.draw(st.integers(0, 255))
    _decode(bytes(value))


@CALM
@given(st.dictionaries(st.sampled_from(["apicurio.value.contentId", "apicurio.value.globalId"]), st.binary(max_size=9)))
def test_hostile_headers(headers: dict[str, bytes]) -> None:
    _decode(b"\0\0\0\0\2", headers)
