"""Stream keys: different streams never share a Kafka key, and the hash is Kafka's own."""

from __future__ import annotations

import pytest
from aiokafka.partitioner import murmur2 as kafkas_murmur2
from hypothesis import given, strategies

from soma_common.errors import EventTooLarge, ValidationError
from soma_common.events.keys import StreamKey, check_name, kafka_key, murmur2, partition_of

_parts = strategies.text("ab:%3A25é\\", min_size=1, max_size=8)
_keys = strategies.builds(StreamKey, _parts, _parts, _parts)


@given(_keys, _keys)
def test_different_streams_have_different_keys(one: StreamKey, two: StreamKey) -> None:
    assert (kafka_key(one)[0] == kafka_key(two)[0]) is (one == two)


def test_the_pair_that_a_plain_join_confuses() -> None:
    assert kafka_key(StreamKey("a:b", "c", "d"))[0] != kafka_key(StreamKey("a", "b:c", "d"))[0]
    assert kafka_key(StreamKey("a%3Ab", "c", "d"))[0] != kafka_key(StreamKey("a:b", "c", "d"))[0]


@given(strategies.binary(max_size=200))
def test_the_hash_is_kafkas(data: bytes) -> None:
    assert murmur2(data) & 0xFFFFFFFF == kafkas_murmur2(data) & 0xFFFFFFFF
    assert -(2**31) <= murmur2(data) < 2**31


@given(strategies.binary(min_size=1, max_size=50), strategies.integers(1, 100))
def test_the_partition_is_that_of_kafkas_default_partitioner(data: bytes, partitions: int) -> None:
    assert partition_of(murmur2(data), partitions) == (kafkas_murmur2(data) & 0x7FFFFFFF) % partitions


@pytest.mark.parametrize(
    ("text", "value"), [("21", -973932308), ("foobar", -790332482), ("a-little-bit-long-string", -985981536)]
)
def test_the_hash_of_kafkas_own_tests(text: str, value: int) -> None:
    assert murmur2(text.encode()) == value


@given(strategies.text(max_size=600))
def test_a_name_is_taken_whole_or_refused(text: str) -> None:
    storable = bool(text) and not any(ord(c) < 32 or ord(c) == 127 or 0xD800 <= ord(c) < 0xE000 for c in text)
    fits = storable and len(text.encode()) <= 512
    try:
        assert check_name("name", text) == text
        assert fits
    except EventTooLarge:
        assert len(text.encode()) > 512
    except ValidationError:
        assert not storable
