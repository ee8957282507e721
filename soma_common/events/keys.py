"""The key of a stream: what orders events, and which Kafka partition they go to."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from soma_common.errors import EventTooLarge, ValidationError

MAX_PART_BYTES = 512
MAX_HEADER_BYTES = 8192  # what W3C Baggage asks implementations to carry
_CONTROL = {*range(32), 127}


class StreamKey(NamedTuple):
    """Names a stream. Two events of one key are processed in the order in which they were recorded."""

    tenant_id: str
    aggregate_type: str
    aggregate_id: str

    def __str__(self) -> str:
        return f"{self.tenant_id}:{self.aggregate_type}:{self.aggregate_id}"


def stream_key(tenant_id: str, aggregate_type: str, aggregate_id: str) -> StreamKey:
    """A StreamKey without the detour of a named tuple's own constructor, which takes twice as long."""
    return tuple.__new__(StreamKey, (tenant_id, aggregate_type, aggregate_id))


def check_name(what: str, value: str) -> str:
    """The value itself when it can be a part of a key.

    Raises:
        ValidationError: not text, empty, with control characters, or not writable as UTF-8.
        EventTooLarge: more than 512 bytes.
    """
    # Plain words, which nearly all names are, need no closer look.
    if isinstance(value, str) and value.isascii() and value.isprintable() and 0 < len(value) <= MAX_PART_BYTES:
        return value
    if not isinstance(value, str) or not value:
        raise ValidationError(
            f"{what} must be text that is not empty, not {value!r:.80}.", cure=f"give {what} a value."
        )
    return _check_text(what, value, MAX_PART_BYTES)


def check_header(what: str, value: str) -> str:
    """The value itself when a header can carry it. Raises ValidationError or EventTooLarge (8192 bytes)."""
    if not isinstance(value, str):
        raise ValidationError(f"{what} must be text, not {value!r:.80}.", cure=f"give {what} as text or leave it out.")
    return _check_text(what, value, MAX_HEADER_BYTES)


def _check_text(what: str, value: str, most: int) -> str:
    try:
        size = len(value.encode())
    except UnicodeEncodeError:
        raise ValidationError(f"{what} holds a lone surrogate: {value!r:.80}.", cure="decode it properly.") from None
    if size > most:
        raise EventTooLarge(f"{what} has {size} bytes.", cure=f"use at most {most}.")
    if not value.isprintable() and any(ord(letter) in _CONTROL for letter in value):
        raise ValidationError(f"{what} holds control characters: {value!r:.80}.", cure="remove them.")
    return value


@lru_cache(maxsize=65_536)
def kafka_key(stream: StreamKey) -> tuple[bytes, int]:
    """The record key of a stream and its murmur2 hash (signed 32 bits).

    The parts are joined by ``:``, with ``%`` and ``:`` inside a part escaped, so different streams never share a key.
    """
    parts = (stream.tenant_id, stream.aggregate_type, stream.aggregate_id)
    key = ":".join(part.replace("%", "%25").replace(":", "%3A") for part in parts).encode()
    return key, murmur2(key)


def partition_of(key_hash: int, partitions: int) -> int:
    """The partition Kafka's default partitioner gives a key with this hash."""
    return (key_hash & 0x7FFFFFFF) % partitions


def murmur2(data: bytes) -> int:
    """Kafka's murmur2 (org.apache.kafka.common.utils.Utils), as a signed 32-bit number."""
    length = len(data)
    multiplier, mask = 0x5BD1E995, 0xFFFFFFFF
    value = (0x9747B28C ^ length) & mask
    whole = length - length % 4
    for start in range(0, whole, 4):
        word = int.from_bytes(data[start : start + 4], "little") * multiplier & mask
        word = (word ^ word >> 24) * multiplier & mask
        value = (value * multiplier & mask) ^ word
    rest = data[whole:]
    if rest:
        value = (value ^ int.from_bytes(rest, "little")) * multiplier & mask
    value = (value ^ value >> 13) * multiplier & mask
    value ^= value >> 15
    return value - (1 << 32) if value & 0x80000000 else value
