"""JSON from outside as an event: what is not exactly an envelope is refused, and the error says where."""

from __future__ import annotations

import json
from typing import Any

import pytest

from soma_common.errors import CodecError
from soma_common.events.codec import JsonCodec

ENVELOPE: dict[str, Any] = {
    "event_id": "01936c5e-7d2a-7c3f-8b1e-5f0a6d9c4b21",
    "event_type": "order.placed",
    "schema_version": 1,
    "tenant_id": "acme",
    "aggregate_type": "order",
    "aggregate_id": "o-1",
    "service_id": "shop",
    "correlation_id": "c-1",
    "idempotency_key": "k-1",
    "traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
    "timestamp": "2026-11-03T09:30:00.000001+00:00",
    "occurred_at": "2026-11-03T10:30:00+01:00",
    "payload": {"cents": 4200},
}


def _decode(**changed: Any) -> Any:
    return JsonCodec().decode(json.dumps(ENVELOPE | changed).encode())


def test_what_may_be_left_out_is_left_out() -> None:
    event = _decode()
    assert (event.causation_id, event.baggage, event.trace.tracestate, event.metadata) == (None, None, None, {})
    assert event.occurred_at < event.timestamp, "times are compared by their zones"
    assert event == _decode(causation_id=None, baggage=None, tracestate=None, metadata=None)


def test_what_is_not_known_is_passed_over() -> None:
    assert _decode(colour="red") == _decode()


def test_numbers_beyond_64_bits_are_exact() -> None:
    assert _decode(payload={"n": 2**80}).payload == {"n": 2**80}


@pytest.mark.parametrize("name", sorted(ENVELOPE))
def test_each_field_is_needed(name: str) -> None:
    value = json.dumps({field: value for field, value in ENVELOPE.items() if field != name}).encode()
    with pytest.raises(CodecError, match=f"missing required field `{name}`"):
        JsonCodec().decode(value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("event_id", "one"),
        ("event_id", 7),
        ("event_type", ""),
        ("tenant_id", None),
        ("aggregate_id", ["o-1"]),
        ("schema_version", "1"),
        ("schema_version", 1.5),
        ("timestamp", "2026-11-03T09:30:00"),
        ("timestamp", "yesterday"),
        ("timestamp", 1793698200),
        ("occurred_at", "10000-01-01T00:00:00Z"),
        ("payload", None),
        ("payload", [1]),
        ("payload", "{}"),
        ("metadata", [1]),
        ("causation_id", 1),
    ],
)
def test_a_field_of_another_kind_is_refused_by_its_name(name: str, value: Any) -> None:
    with pytest.raises(CodecError, match=rf"\$\.{name}"):
        _decode(**{name: value})


@pytest.mark.parametrize("traceparent", ["", "00-0-0-01", f"00-{'0' * 32}-b7ad6b7169203331-01"])
def test_a_malformed_traceparent_is_refused(traceparent: str) -> None:
    with pytest.raises(CodecError, match="traceparent is malformed"):
        _decode(traceparent=traceparent)


@pytest.mark.parametrize(
    "value",
    [
        b"",
        b"null",
        b"[]",
        b"{",
        b'{"event_id": NaN}',
        b'{"payload": ' + b"[" * 100_000,
        b'{"payload": {"a": ' + b'{"a": ' * 100_000,
        b'{"schema_version": ' + b"9" * 5_000 + b"}",
        b'{"payload": {"n": ' + b"9" * 5_000 + b"}}",
        b'{"payload": {"n": 1e999}}',
        b'{"payload": {"t": "\xff"}}',
        b'{"payload": {"t": "\\ud800"}}',
        b"\xff\xfe",
    ],
    ids=lambda value: repr(value[:24]),
)
def test_other_bytes_are_refused(value: bytes) -> None:
    with pytest.raises(CodecError, match="are not a soma event in JSON"):
        JsonCodec().decode(value)
