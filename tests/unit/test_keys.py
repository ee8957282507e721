"""Stream keys."""

from __future__ import annotations

import pytest

from soma_common.errors import EventTooLarge, ValidationError
from soma_common.events.keys import StreamKey, check_header, check_name, kafka_key, partition_of


def test_a_key_is_a_value() -> None:
    key = StreamKey("t", "order", "5")
    assert str(key) == "t:order:5"
    assert key == StreamKey(tenant_id="t", aggregate_type="order", aggregate_id="5")
    assert sorted([StreamKey("b", "a", "a"), StreamKey("a", "b", "b")])[0].tenant_id == "a"


@pytest.mark.parametrize(
    ("parts", "key"),
    [(("t", "o", "5"), b"t:o:5"), (("a:b", "c", "d"), b"a%3Ab:c:d"), (("a%", "c", "é"), "a%25:c:é".encode())],
)
def test_the_kafka_key_joins_and_escapes(parts: tuple[str, str, str], key: bytes) -> None:
    assert kafka_key(StreamKey(*parts))[0] == key


def test_partitions_of_negative_hashes() -> None:
    assert partition_of(-1, 7) == 0x7FFFFFFF % 7
    assert partition_of(5, 3) == 2


@pytest.mark.parametrize("value", ["a", "é", "a b", "🛩", "x" * 512, "\u200b", "\u2028"])
def test_names(value: str) -> None:
    assert check_name("name", value) is value


def test_headers() -> None:
    assert check_header("baggage", "") == ""
    assert check_header("baggage", "b" * 8192)
    for value, kind in (("b" * 8193, EventTooLarge), ("\n", ValidationError), ("\ud800", ValidationError)):
        with pytest.raises(kind, match="baggage"):
            check_header("baggage", value)
